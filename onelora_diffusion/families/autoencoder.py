"""Images and their normalised latents, by diffusers' autoencoders of images."""

import torch
from torch import Tensor, nn


@torch.no_grad()
def encode_moments(vae: nn.Module, images: Tensor) -> Tensor:
    """Mean and standard deviation of the scaled latents of images: (batch, 2, C, H, W) in float32.

    A deterministic autoencoder, as SANA's is, has the deviation 0.

    Args:
        images: (batch, 3, height, width), in [-1, 1], or uint8.
    """
    mean, std = moments_of(vae, images)
    mean = mean - (getattr(vae.config, "shift_factor", None) or 0)
    return torch.stack([mean, std], dim=1).float() * vae.config.scaling_factor


@torch.no_grad()
def moments_of(vae: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents of images, as the autoencoder has them, (batch, C, ...) each."""
    encoded = vae.encode(in_range(images).to(vae.dtype))
    if hasattr(encoded, "latent_dist"):
        mean = encoded.latent_dist.mode()
        return mean, getattr(encoded.latent_dist, "std", torch.zeros_like(mean))
    latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent
    return latents, torch.zeros_like(latents)


@torch.no_grad()
def decode_latents(vae: nn.Module, latents: Tensor) -> Tensor:
    """Scaled latents (batch, C, H, W) -> images (batch, 3, R, R) in float32, around -1 to 1."""
    latents = latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0)
    return vae.decode(latents.to(vae.dtype)).sample.float()


def in_range(images: Tensor) -> Tensor:
    """Images in float32 from -1 to 1, of such, or of uint8."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images
