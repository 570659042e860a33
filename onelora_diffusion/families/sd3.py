"""Stable Diffusion 3 and 3.5 (Esser et al. 2024): flow matching, two CLIPs, and T5 where the pipeline has it."""

from torch import Tensor, nn

from onelora_diffusion.families.family import Condition, Conditions, Family, as_prompts, dynamic_shift, longest


class StableDiffusion3(Family):
    name = "sd3"
    transformer_class = "SD3Transformer2DModel"
    targets = ("transformer_blocks.*", "norm_out.linear", "proj_out")

    def check_resolution(self, pipeline, *sides: int) -> None:
        super().check_resolution(pipeline, *sides)
        most = pipeline.transformer.config.pos_embed_max_size * self.multiple(pipeline)
        if max(sides) > most:
            raise ValueError(
                f"a resolution of {max(sides)} is beyond the {most} pixels that this model has places for"
            )

    def encode_conditions(self, pipeline, conditions: list[Condition], max_length: int | None = None) -> Conditions:
        embeddings, _, pooled, _ = pipeline.encode_prompt(
            as_prompts(conditions), None, None, do_classifier_free_guidance=False, **longest(max_length)
        )
        return {"prompt_embeds": embeddings, "pooled_prompt_embeds": pooled}

    def predict(self, denoiser: nn.Module, latents: Tensor, times: Tensor, conditions: Conditions) -> Tensor:
        return denoiser(
            latents.to(conditions["prompt_embeds"].dtype),
            encoder_hidden_states=conditions["prompt_embeds"],
            pooled_projections=conditions["pooled_prompt_embeds"],
            timestep=times,
        ).sample

    def timesteps(self, scheduler, num_inference_steps: int, num_tokens: int, frames: int = 1) -> dict:
        is_shifted = scheduler.config.get("use_dynamic_shifting")
        shift = {"mu": dynamic_shift(scheduler.config, num_tokens)} if is_shifted else {}
        return {"num_inference_steps": num_inference_steps} | shift
