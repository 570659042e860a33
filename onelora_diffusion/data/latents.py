"""From images to latents: the VAE's mean and standard deviation, once per image, and samples of them."""

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm


@torch.no_grad()
def encode_moments(vae, images: Tensor) -> Tensor:
    """Mean and standard deviation of the scaled latents of images (batch, 3, R, R): (batch, 2, C, H, W)."""
    posterior = vae.encode(images.to(vae.dtype)).latent_dist
    mean = posterior.mean - (vae.config.get("shift_factor") or 0)
    return torch.stack([mean, posterior.std], dim=1).float() * vae.config.scaling_factor


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


class CachedMoments(Dataset):
    """`[index, flip] -> (moments, label)`: every image of a data set encoded once and kept in memory."""

    def __init__(self, dataset: Dataset, vae, flip: bool, batch_size=32, num_workers=0, show_progress=True):
        loader = DataLoader(dataset, batch_size=batch_size, num_workers=num_workers)
        moments, labels = [], []
        for images, batch_labels in tqdm(loader, desc="encode", unit="batch", disable=not show_progress):
            images = images.to(vae.device)
            both = [images, images.flip(-1)] if flip else [images]
            moments.append(torch.stack([encode_moments(vae, each).cpu() for each in both]))
            labels.append(batch_labels)
        self.moments = torch.cat(moments, dim=1)  # (1 or 2, images, 2, C, H, W)
        self.labels = torch.cat(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, bool]) -> tuple[Tensor, Tensor]:
        index, flip = key
        return self.moments[int(flip), index], self.labels[index]

    @staticmethod
    def size_in_bytes(num_images: int, flip: bool, latent_shape: tuple[int, int, int]) -> int:
        channels, height, width = latent_shape
        return num_images * (1 + flip) * 2 * channels * height * width * 4
