"""FLUX.1 (Black Forest Labs 2024): flow matching on patches of 2 by 2 latents, CLIP's pooled embedding, and T5."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from onelora_diffusion.families.family import Condition, Conditions, Family, as_prompts, dynamic_shift, longest
from onelora_diffusion.injection.book import unwrapped

GUIDANCE = 3.5  # what `FluxPipeline` tells a distilled model by default; it is trained with what it draws with


class Flux(Family):
    name = "flux"
    transformer_class = "FluxTransformer2DModel"
    targets = ("transformer_blocks.*", "single_transformer_blocks.*", "norm_out.linear", "proj_out")
    is_guided = False

    def encode_conditions(self, pipeline, conditions: list[Condition], max_length: int | None = None) -> Conditions:
        embeddings, pooled, _ = pipeline.encode_prompt(as_prompts(conditions), **longest(max_length))
        return {"prompt_embeds": embeddings, "pooled_prompt_embeds": pooled}

    def predict(self, denoiser: nn.Module, latents: Tensor, times: Tensor, conditions: Conditions) -> Tensor:
        height, width = latents.shape[2] // 2, latents.shape[3] // 2
        ids = torch.zeros(height, width, 3, device=latents.device)
        ids[..., 1] = torch.arange(height, device=latents.device)[:, None]
        ids[..., 2] = torch.arange(width, device=latents.device)
        guidance = None
        if unwrapped(denoiser).config.guidance_embeds:
            guidance = conditions.get("guidance", torch.full((len(latents),), GUIDANCE, device=latents.device))
        tokens = denoiser(
            pack(latents.to(conditions["prompt_embeds"].dtype)),
            encoder_hidden_states=conditions["prompt_embeds"],
            pooled_projections=conditions["pooled_prompt_embeds"],
            timestep=times / 1000,  # which the model multiplies by 1000 again
            img_ids=ids.flatten(0, 1),
            txt_ids=ids.new_zeros(conditions["prompt_embeds"].shape[1], 3),
            guidance=guidance,
        ).sample
        return unpack(tokens, height, width)

    def timesteps(self, scheduler, num_inference_steps: int, num_tokens: int, frames: int = 1) -> dict:
        if scheduler.config.get("use_flow_sigmas"):
            return {"num_inference_steps": num_inference_steps}
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        is_shifted = scheduler.config.get("use_dynamic_shifting")
        return {"sigmas": sigmas} | ({"mu": dynamic_shift(scheduler.config, num_tokens)} if is_shifted else {})

    def resolution(self, pipeline) -> int:
        return pipeline.default_sample_size * pipeline.vae_scale_factor

    def patch_size(self, transformer: nn.Module) -> int:
        return 2

    def latent_channels(self, transformer: nn.Module) -> int:
        return transformer.config.in_channels // 4


def pack(latents: Tensor) -> Tensor:
    """(batch, C, 2h, 2w) -> tokens (batch, h·w, 4C)."""
    return pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """(batch, h·w, 4C) -> latents (batch, C, 2h, 2w)."""
    return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, width)), 2)
