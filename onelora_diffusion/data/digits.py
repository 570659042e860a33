"""scikit-learn's 1797 handwritten digits as small RGB images: real data that needs no download."""

import string

import numpy as np
import torch
from torch.nn.functional import interpolate

from onelora_diffusion.data.latents import SmallImages, check_chosen

SPLITS = ("train", "test", "all")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = tuple(f"a handwritten {word}" for word in WORDS)
CAPTIONED = "handwritten digits"  # the name of the digits with captions
# What the text-to-image miniature draws before it learns digits.
UNRELATED = tuple(f"a large {letter}" for letter in string.ascii_uppercase)


class Digits(SmallImages):
    """Handwritten digits, 8 by 8 pixels of 0..16, enlarged bilinearly to RGB (Alpaydin & Kaynak, UCI, 1998).

    Item: `(image, label)`, image float32 `(3, resolution, resolution)` in [-1, 1] (paper -1, ink 1), label
    an int in `0..len(classes)-1`: the position of the digit in `classes`. `split="test"` holds every fifth
    image of each digit in scikit-learn's order, `"train"` the others, `"all"` both.
    ValueError if the split or a class is unknown.
    """

    name, class_names = "digits", tuple("0123456789")

    def __init__(self, split: str = "train", resolution: int = 16, classes: tuple[int, ...] | None = None):
        from sklearn.datasets import load_digits

        classes = tuple(range(10)) if classes is None else classes
        check_chosen(self.name, split, SPLITS, classes)
        pixels, digits = (load_digits()[key] for key in ("images", "target"))
        rank = np.zeros_like(digits)  # for each image, the number of earlier images of the same digit
        for digit in range(10):
            rank[digits == digit] = np.arange((digits == digit).sum())
        is_test = rank % 5 == 4
        chosen = np.isin(digits, classes) & {"train": ~is_test, "test": is_test, "all": True}[split]

        grey = torch.from_numpy(pixels[chosen]).float()[:, None] / 8 - 1
        grey = interpolate(grey, size=(resolution, resolution), mode="bilinear", align_corners=False)
        super().__init__(grey, digits[chosen], self.class_names, classes, split)


class CaptionedDigits(Digits):
    """The digits with their captions as names of the classes."""

    name, class_names = CAPTIONED, CAPTIONS
