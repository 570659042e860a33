"""Sizes of several shapes and about the same number of pixels, and which of them suits an image."""

import math
from typing import NamedTuple

import numpy as np

STEPS = 16  # of the shorter side, from the resolution's square down: half of them, so shapes are 1:4 at most


class Buckets(NamedTuple):
    """The sizes that images are brought to; a batch is of one bucket."""

    sizes: list[tuple[int, int]]
    """Height and width in pixels of each bucket."""
    of_image: np.ndarray
    """(images,) int64: the number of each image's bucket."""


def one_bucket(num_images: int, resolution: int) -> Buckets:
    return Buckets([(resolution, resolution)], np.zeros(num_images, np.int64))


def nearest_buckets(image_sizes: list[tuple[int, int]], resolution: int, multiple: int) -> Buckets:
    """Each image, (height, width), in the bucket whose aspect ratio is nearest to its own; empty ones are left out."""
    sizes = bucket_sizes(resolution, multiple)
    ratios = np.log([width / height for height, width in sizes])
    wanted = np.log([width / height for height, width in image_sizes])
    nearest = np.abs(wanted[:, None] - ratios).argmin(1)
    used, of_image = np.unique(nearest, return_inverse=True)
    return Buckets([sizes[number] for number in used], of_image)


def bucket_sizes(resolution: int, multiple: int) -> list[tuple[int, int]]:
    """(height, width) of all buckets, from 1:4 to 4:1; both sides are multiples of what the model needs.

    The shorter side falls from the resolution to its half in about eight steps; the longer one is the multiple that
    brings the area nearest to the square's. So with (resolution / multiple)² tokens in the square, n², a bucket has at
    most n / 2 tokens more or less.
    """
    step = multiple * math.ceil(resolution / STEPS / multiple)
    tall = [
        (multiple * round(resolution**2 / width / multiple), width)
        for width in range(resolution, resolution // 2 - 1, -step)
    ]
    return sorted({*tall, *((width, height) for height, width in tall)})
