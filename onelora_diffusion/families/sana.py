"""SANA (Xie et al. 2024): flow matching on the latents of a deterministic autoencoder, and Gemma."""

import inspect

import torch
from torch import Tensor, nn

from onelora_diffusion.families.family import Family, Prompts, longest
from onelora_diffusion.injection.book import unwrapped


class Sana(Family):
    name = "sana"
    transformer_class = "SanaTransformer2DModel"
    targets = ("transformer_blocks.*", "time_embed.linear", "proj_out")

    call = {"use_resolution_binning": False}

    def check(self, pipeline) -> None:
        if pipeline.transformer.config.guidance_embeds:
            raise ValueError("SANA-Sprint is distilled to few steps, which fine-tuning undoes: take SANA itself")

    def encode_prompts(self, pipeline, prompts: list[str], max_sequence_length: int | None = None) -> Prompts:
        # The pipeline asks Gemma to describe a prompt further, but not the empty one that it guides from.
        instruction = inspect.signature(_pipeline_class().__call__).parameters["complex_human_instruction"].default
        encoded = [
            pipeline.encode_prompt(
                [prompt],
                False,
                complex_human_instruction=instruction if prompt else None,
                **longest(max_sequence_length),
            )
            for prompt in prompts
        ]
        return {
            "prompt_embeds": torch.cat([embeddings for embeddings, *_ in encoded]),
            "prompt_attention_mask": torch.cat([mask for _, mask, *_ in encoded]),
        }

    def predict(self, transformer: nn.Module, latents: Tensor, timesteps: Tensor, prompts: Prompts) -> Tensor:
        return transformer(
            latents.to(prompts["prompt_embeds"].dtype),
            encoder_hidden_states=prompts["prompt_embeds"],
            encoder_attention_mask=prompts["prompt_attention_mask"],
            timestep=timesteps * unwrapped(transformer).config.timestep_scale,
        ).sample


def _pipeline_class():
    from diffusers import SanaPipeline

    return SanaPipeline
