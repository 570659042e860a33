"""Sample latents from their mean and standard deviation, and mirror images."""

import torch
from torch import Tensor
from torch.utils.data import Dataset


def sample_moments(moments: Tensor, noise: Tensor) -> Tensor:
    """Sample latents mean + std · noise, (batch, C, H, W), from moments (batch, 2, C, H, W)."""
    mean, std = moments.unbind(1)
    return torch.addcmul(mean, std, noise)


class FlippableImages(Dataset):
    """`[index, flip] -> (image, label)`: the images of a data set, mirrored if `flip`."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, bool]) -> tuple[Tensor, int]:
        index, flip = key
        image, label = self.dataset[index]
        return (image.flip(-1) if flip else image), label
