"""Images and their normalised latents, by diffusers' autoencoders; clips as these take them."""

import torch
from torch import Tensor, nn

from onelora_diffusion.families.record import Place


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
    images = images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images
    encoded = vae.encode(images.to(vae.dtype))
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


def to_autoencoder(images: Tensor, place: Place) -> Tensor:
    """Images or clips, or their latents, as the autoencoder takes them: as clips, or each frame as an image."""
    is_clip = images.ndim == 5
    if place.frames:
        return images if is_clip else images[:, :, None]
    return images.transpose(1, 2).flatten(0, 1) if is_clip else images


def from_autoencoder(found: Tensor, images: Tensor, place: Place) -> Tensor:
    """What the autoencoder has made of images or clips, in their shape."""
    is_clip = images.ndim == 5
    if place.frames:
        return found if is_clip else found[:, :, 0]
    return found.unflatten(0, images.shape[:3:2]).transpose(1, 2) if is_clip else found
