"""Choose the class of each generated image."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from torch.utils.data import Dataset

from onelora_diffusion.data.listing import labels_of

LabelOrder = Literal["turns", "random", "dataset"]
STREAM = 0x1ABE15  # distinguishes the random numbers for labels from others of the same seed


def draw_labels(
    order: LabelOrder, num_images: int, num_classes: int, seed: int, frequencies: Sequence[int] | None = None
) -> list[int]:
    """The label of each image; that of image i is a function of (seed, i), whatever the number of images.

    By `turns` image i has class i mod `num_classes`; `random`: all classes are equally likely; `dataset`: their
    probabilities are proportional to `frequencies`.
    """
    if order == "turns":
        return [index % num_classes for index in range(num_images)]
    weights = np.ones(num_classes) if order == "random" else np.array(frequencies, dtype=np.float64)
    bounds = np.cumsum(weights) / weights.sum()
    bounds[-1] = 1
    draws = np.random.default_rng([seed % 2**64, STREAM]).random(num_images)
    return np.searchsorted(bounds, draws, side="right").tolist()


def class_frequencies(dataset: Dataset, names: Sequence[str]) -> list[int]:
    """The number of images of each of these classes in a data set; ValueError if it lists no labels, or lacks one."""
    labels = labels_of(dataset)
    if labels is None:
        raise ValueError(f"{dataset.name} does not list its labels: choose --labels turns or random")
    counts = np.bincount(np.asarray(labels), minlength=dataset.num_classes)
    known = {name: int(count) for name, count in zip(dataset.id2label.values(), counts, strict=True)}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"'{unknown[0]}' is no class of {dataset.name}: --labels dataset draws those of --dataset")
    return [known[name] for name in names]
