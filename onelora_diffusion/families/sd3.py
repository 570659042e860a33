"""Stable Diffusion 3 and 3.5 (Esser et al. 2024): flow matching, two CLIPs, and T5 where the pipeline has it."""

from torch import Tensor, nn

from onelora_diffusion.families.family import Family, Prompts, longest


class StableDiffusion3(Family):
    name = "sd3"
    transformer_class = "SD3Transformer2DModel"
    targets = ("transformer_blocks.*", "norm_out.linear", "proj_out")

    def check_resolution(self, pipeline, resolution: int) -> None:
        super().check_resolution(pipeline, resolution)
        most = pipeline.transformer.config.pos_embed_max_size * self.multiple(pipeline)
        if resolution > most:
            raise ValueError(
                f"a resolution of {resolution} is beyond the {most} pixels that this model has places for"
            )

    def encode_prompts(self, pipeline, prompts: list[str], max_sequence_length: int | None = None) -> Prompts:
        embeddings, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, **longest(max_sequence_length)
        )
        return {"prompt_embeds": embeddings, "pooled_prompt_embeds": pooled}

    def predict(self, transformer: nn.Module, latents: Tensor, timesteps: Tensor, prompts: Prompts) -> Tensor:
        return transformer(
            latents.to(prompts["prompt_embeds"].dtype),
            encoder_hidden_states=prompts["prompt_embeds"],
            pooled_projections=prompts["pooled_prompt_embeds"],
            timestep=timesteps,
        ).sample
