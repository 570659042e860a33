"""SANA (Xie et al. 2024): flow matching on the latents of a deterministic autoencoder, and Gemma."""

import inspect

import torch
from torch import Tensor, nn

from onelora_diffusion.families.family import Condition, Conditions, Family, as_prompts, longest
from onelora_diffusion.injection.book import unwrapped


class Sana(Family):
    name = "sana"
    transformer_class = "SanaTransformer2DModel"
    targets = ("transformer_blocks.*", "time_embed.linear", "proj_out")

    def check(self, pipeline) -> None:
        if pipeline.transformer.config.guidance_embeds:
            raise ValueError("SANA-Sprint is distilled to few steps, which fine-tuning undoes: take SANA itself")

    def encode_conditions(self, pipeline, conditions: list[Condition], max_length: int | None = None) -> Conditions:
        # The pipeline asks Gemma to describe a prompt further, but not the empty one that it guides from.
        instruction = inspect.signature(_pipeline_class().__call__).parameters["complex_human_instruction"].default
        encoded = [
            pipeline.encode_prompt(
                [prompt],
                False,
                complex_human_instruction=instruction if prompt else None,
                **longest(max_length),
            )
            for prompt in as_prompts(conditions)
        ]
        return {
            "prompt_embeds": torch.cat([embeddings for embeddings, *_ in encoded]),
            "prompt_attention_mask": torch.cat([mask for _, mask, *_ in encoded]),
        }

    def predict(self, denoiser: nn.Module, latents: Tensor, times: Tensor, conditions: Conditions) -> Tensor:
        return denoiser(
            latents.to(conditions["prompt_embeds"].dtype),
            encoder_hidden_states=conditions["prompt_embeds"],
            encoder_attention_mask=conditions["prompt_attention_mask"],
            timestep=times * unwrapped(denoiser).config.timestep_scale,
        ).sample


def _pipeline_class():
    from diffusers import SanaPipeline

    return SanaPipeline
