"""scikit-learn's 1797 handwritten digits as small RGB images: real data that needs no download."""

import numpy as np
import torch
from torch.nn.functional import interpolate

SPLITS = ("train", "test", "all")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = tuple(f"a handwritten {word}" for word in WORDS)


class Digits(torch.utils.data.Dataset):
    """Handwritten digits, 8 by 8 pixels of 0..16, enlarged bilinearly to RGB (Alpaydin & Kaynak, UCI, 1998).

    Item: `(image, label)`, image float32 `(3, resolution, resolution)` in [-1, 1] (paper -1, ink 1), label
    an int in `0..len(classes)-1`: the position of the digit in `classes`. `split="test"` holds every fifth
    image of each digit in scikit-learn's order, `"train"` the others, `"all"` both.
    ValueError if the split or a class is unknown.
    """

    name = "digits"
    crop = "none"

    def __init__(self, split: str = "train", resolution: int = 16, classes: tuple[int, ...] = tuple(range(10))):
        from sklearn.datasets import load_digits

        if split not in SPLITS:
            raise ValueError(f"digits: unknown split {split!r}, choose one of {', '.join(SPLITS)}")
        if not classes or len(set(classes)) < len(classes) or not set(classes) <= set(range(10)):
            raise ValueError(f"digits: classes {tuple(classes)} must be different digits from 0 to 9")

        pixels, digits = (load_digits()[key] for key in ("images", "target"))
        rank = np.zeros_like(digits)  # for each image, the number of earlier images of the same digit
        for digit in range(10):
            rank[digits == digit] = np.arange((digits == digit).sum())
        is_test = rank % 5 == 4
        chosen = np.isin(digits, classes) & {"train": ~is_test, "test": is_test, "all": True}[split]

        grey = torch.from_numpy(pixels[chosen]).float()[:, None] / 8 - 1
        grey = interpolate(grey, size=(resolution, resolution), mode="bilinear", align_corners=False)
        self.split = split
        self.images = grey.expand(-1, 3, -1, -1)  # three views of one channel
        self.labels = [classes.index(digit) for digit in digits[chosen].tolist()]
        self.id2label = {label: str(digit) for label, digit in enumerate(classes)}
        self.num_classes = len(classes)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], self.labels[index]
