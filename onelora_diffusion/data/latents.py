"""From images to latents: the VAE's mean and standard deviation, and samples of them."""

import torch
from torch import Tensor
from torch.utils.data import Dataset


def in_range(images: Tensor) -> Tensor:
    """Images float32 in [-1, 1], of such, or of uint8."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


@torch.no_grad()
def encode_moments(vae, images: Tensor) -> Tensor:
    """Mean and standard deviation of the scaled latents of images: (batch, 2, C, H, W).

    A deterministic autoencoder, as SANA's is, has the deviation 0.

    Args:
        images: (batch, 3, height, width), in [-1, 1], or uint8.
    """
    encoded = vae.encode(in_range(images).to(vae.dtype))
    if hasattr(encoded, "latent_dist"):
        mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
    else:
        mean, std = encoded.latent, torch.zeros_like(encoded.latent)
    mean = mean - (vae.config.get("shift_factor") or 0)
    return torch.stack([mean, std], dim=1).float() * vae.config.scaling_factor


def sample_moments(moments: Tensor, noise: Tensor) -> Tensor:
    """Latents mean + std · noise, (batch, C, H, W), of moments (batch, 2, C, H, W)."""
    mean, std = moments.unbind(1)
    return torch.addcmul(mean, std, noise)


class FlippableImages(Dataset):
    """`[index, flip] -> (image, label)`: the images of a data set, mirrored where asked."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, bool]) -> tuple[Tensor, int]:
        index, flip = key
        image, label = self.dataset[index]
        return (image.flip(-1) if flip else image), label
