"""Aspect ratio buckets: image sizes of several shapes with about the same number of pixels."""

import math
from typing import NamedTuple

import numpy as np

STEPS = 16  # steps in which the shorter side falls from the resolution to 0; half are used, so shapes are 1:4 at most


class Buckets(NamedTuple):
    """The sizes to which images are resized; all images of a batch are in one bucket."""

    sizes: list[tuple[int, ...]]  # height and width in pixels of each; of clips number of frames, height and width
    of_image: np.ndarray  # (images,) int64: the number of each image's bucket


def side_and_frames(size: tuple[int, ...]) -> tuple[tuple[int, int], int]:
    """(height, width) and the number of frames of a bucket."""
    return size[-2:], size[0] if len(size) > 2 else 1


def with_frames(buckets: Buckets, frames: int, is_clip: np.ndarray) -> Buckets:
    """The buckets of clips of so many frames, where `is_clip`, (images,) bool, and of single images; no empty ones."""
    used, of_image = np.unique(2 * buckets.of_image + is_clip, return_inverse=True)
    sizes = [((frames,) if number % 2 else ()) + buckets.sizes[number // 2] for number in used]
    return Buckets(sizes, of_image)


def nearest_buckets(image_sizes: list[tuple[int, int]], resolution: int, multiple: int) -> Buckets:
    """Assign each image size (height, width) to the bucket of the nearest aspect ratio; empty buckets are left out."""
    sizes = bucket_sizes(resolution, multiple)
    ratios = np.log([width / height for height, width in sizes])
    wanted = np.log([width / height for height, width in image_sizes])
    nearest = np.abs(wanted[:, None] - ratios).argmin(1)
    used, of_image = np.unique(nearest, return_inverse=True)
    return Buckets([sizes[number] for number in used], of_image)


def bucket_sizes(resolution: int, multiple: int) -> list[tuple[int, int]]:
    """(height, width) of all buckets, from 1:4 to 4:1. Both sides are multiples of `multiple`.

    The shorter side falls from the resolution to half of it in about eight steps, and the longer side is the multiple
    whose area is nearest to the square's. If the square has n² tokens, n = resolution / multiple, a bucket has at most
    n / 2 tokens more or less.
    """
    step = multiple * math.ceil(resolution / STEPS / multiple)
    tall = [
        (multiple * round(resolution**2 / width / multiple), width)
        for width in range(resolution, resolution // 2 - 1, -step)
    ]
    return sorted({*tall, *((width, height) for height, width in tall)})
