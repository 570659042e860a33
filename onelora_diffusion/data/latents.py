"""Sample latents from their mean and standard deviation, mirror images, and keep small ones in memory."""

from collections.abc import Sequence

import numpy as np
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


class SmallImages(Dataset):
    """`[index] -> (image, label)`: grey images in memory as RGB, float32 (3, height, width) in [-1, 1].

    Args:
        grey: (images, 1, height, width).
        numbers: (images,), the class of each image by its number in `names`.
        classes: the numbers of the chosen classes; a label is a position in this.
    """

    crop = "none"

    def __init__(self, grey: Tensor, numbers: np.ndarray, names: Sequence[str], classes: Sequence[int], split: str):
        self.split = split
        self.images = grey.expand(-1, 3, -1, -1)  # three views of one channel
        self.labels = [classes.index(number) for number in numbers.tolist()]
        self.id2label = {label: names[number] for label, number in enumerate(classes)}
        self.num_classes = len(classes)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]


def check_chosen(name: str, split: str, splits: Sequence[str], classes: Sequence[int]) -> None:
    """ValueError unless the split and the classes exist, those from 0 to 9."""
    if split not in splits:
        raise ValueError(f"{name}: unknown split {split!r}, choose one of {', '.join(splits)}")
    if not classes or len(set(classes)) < len(classes) or not set(classes) <= set(range(10)):
        raise ValueError(f"{name}: classes {tuple(classes)} must be different numbers from 0 to 9")
