"""PixArt-Σ (Chen et al. 2024), and PixArt-α without conditions on the size: noise with a learned variance, and T5."""

from torch import Tensor, nn

from onelora_diffusion.families.family import Family, Prompts, longest


class PixArt(Family):
    name = "pixart"
    transformer_class = "PixArtTransformer2DModel"
    targets = ("transformer_blocks.*", "adaln_single.linear", "proj_out")

    call = {"use_resolution_binning": False}

    def check(self, pipeline) -> None:
        if pipeline.transformer.config.use_additional_conditions:
            raise ValueError(
                "this PixArt-α is told the size and the shape of its images, which is not known here: take PixArt-Σ"
            )

    def encode_prompts(self, pipeline, prompts: list[str], max_sequence_length: int | None = None) -> Prompts:
        embeddings, mask, *_ = pipeline.encode_prompt(prompts, False, **longest(max_sequence_length))
        return {"prompt_embeds": embeddings, "prompt_attention_mask": mask}

    def predict(self, transformer: nn.Module, latents: Tensor, timesteps: Tensor, prompts: Prompts) -> Tensor:
        return transformer(
            latents.to(prompts["prompt_embeds"].dtype),
            encoder_hidden_states=prompts["prompt_embeds"],
            encoder_attention_mask=prompts["prompt_attention_mask"],
            timestep=timesteps,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
