"""PixArt-Σ (Chen et al. 2024), and PixArt-α without conditions on the size: noise with a learned variance, and T5."""

from torch import Tensor, nn

from onelora_diffusion.families.family import Condition, Conditions, Family, as_prompts, longest


class PixArt(Family):
    name = "pixart"
    transformer_class = "PixArtTransformer2DModel"
    targets = ("transformer_blocks.*", "adaln_single.linear", "proj_out")

    def check(self, pipeline) -> None:
        if pipeline.transformer.config.use_additional_conditions:
            raise ValueError(
                "this PixArt-α is told the size and the shape of its images, which is not known here: take PixArt-Σ"
            )

    def encode_conditions(self, pipeline, conditions: list[Condition], max_length: int | None = None) -> Conditions:
        embeddings, mask, *_ = pipeline.encode_prompt(as_prompts(conditions), False, **longest(max_length))
        return {"prompt_embeds": embeddings, "prompt_attention_mask": mask}

    def predict(self, denoiser: nn.Module, latents: Tensor, times: Tensor, conditions: Conditions) -> Tensor:
        return denoiser(
            latents.to(conditions["prompt_embeds"].dtype),
            encoder_hidden_states=conditions["prompt_embeds"],
            encoder_attention_mask=conditions["prompt_attention_mask"],
            timestep=times,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
