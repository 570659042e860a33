"""Train the miniature that ships in onelora_diffusion/miniature: facebook/DiT-XL-2-256 in small.

    python -m tools.make_miniature                     # writes onelora_diffusion/miniature
    python -m tools.make_miniature --output runs/mini  # writes somewhere else

A KL autoencoder, then a latent DiT with learned variance, both on scikit-learn's handwritten digits 0-4 and on
nothing else. Each digit is shown in eight orientations, which are 40 classes (0-4 are the upright digits), and
slightly turned, stretched and moved: a base with many classes answers to new class embeddings, as one trained on
ImageNet's 1000 does. Same model classes and same schedule as the large model, weights stored in half precision.
`--data letters` trains on letters and signs of five alphabets as if written by hand (`tools/letters.py`) instead, 180
classes of which none is a digit. That is not the base which ships: its 8,000 steps give strokes, but not yet the
letters asked for. Everything is drawn from one seed; the last digits of the weights depend on the machine and its
number of threads.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate

from onelora_diffusion.data import load_dataset
from onelora_diffusion.pipelines.base import load_base, miniature_path
from onelora_diffusion.training.from_scratch import BaseRecipe, draw_samples, train_base, write_base
from tools.letters import CHARACTERS, Hand, letters

DIGITS = (0, 1, 2, 3, 4)
ORIENTATIONS = ("", " turned left", " upside down", " turned right", *(f" mirrored{t}" for t in ("", ", turned left")))
ORIENTATIONS += (" mirrored, upside down", " mirrored, turned right")
VAE_CHANNELS = (16, 32)  # two levels: 16 by 16 pixels to 8 by 8 latents


@dataclass
class Settings(BaseRecipe):
    data: Literal["digits", "letters"] = "digits"
    """What it learns."""
    output: Path = miniature_path()
    """Folder to write; an older miniature in it is replaced."""
    num_layers: int = 6
    steps: int = 8000
    copies: tuple[int, int] = (8, 2)
    """How often each image is shown upright, and in every other orientation."""
    per_letter: int = 200
    """Pictures of each letter or sign."""
    preview: Path | None = None
    """Where to write a PNG of ten samples of each class."""


def main(settings: Settings) -> None:
    if settings.data == "letters" and settings.output == miniature_path():
        raise SystemExit("make_miniature.py: --data letters makes another base than the package's: give an --output")
    images, labels, names = (letters_of if settings.data == "letters" else digits_of)(settings)
    pipeline = train_base(images, labels, VAE_CHANNELS, settings)
    write_base(pipeline, names, settings.output)

    pipeline = load_base(settings.output)
    weights = {name: sum(p.numel() for p in getattr(pipeline, name).parameters()) for name in ("transformer", "vae")}
    size = sum(file.stat().st_size for file in settings.output.rglob("*") if file.is_file())
    print(f"{settings.output}: {size / 1e6:.2f} MB, weights {weights}")
    if settings.preview:
        draw_samples(settings.output, settings.preview)
        print(f"samples: {settings.preview}")


def letters_of(settings: Settings) -> tuple[Tensor, Tensor, dict[int, str]]:
    """Images (N, 3, 16, 16), their labels, and what the labels are called."""
    small, labels = letters(settings.per_letter, Hand(), torch.Generator().manual_seed(settings.seed))
    images = interpolate(2 * small - 1, size=(16, 16), mode="bilinear", align_corners=False)  # as the digits are
    return images.expand(-1, 3, -1, -1), labels, dict(enumerate(CHARACTERS))


def digits_of(settings: Settings) -> tuple[Tensor, Tensor, dict[int, str]]:
    """The same of digits 0-4 in all orientations."""
    digits = load_dataset("digits", split="all", resolution=16, classes=DIGITS)
    images, labels = in_all_orientations(digits.images, torch.tensor(digits.labels), settings)
    names = {
        orientation * len(DIGITS) + digit: f"{digit}{name}"
        for orientation, name in enumerate(ORIENTATIONS)
        for digit in DIGITS
    }
    return images, labels, names


def in_all_orientations(images: Tensor, labels: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """(N, 3, R, R) images and (N,) labels, varied copies of them: quarter turns, then the same mirrored."""
    torch.manual_seed(settings.seed)
    all_images, all_labels = [], []
    for orientation in range(len(ORIENTATIONS)):
        for _ in range(settings.copies[min(orientation, 1)]):
            copy = varied(images).rot90(orientation % 4, (2, 3))
            all_images.append(copy.flip(-1) if orientation >= 4 else copy)
            all_labels.append(labels + orientation * len(DIGITS))
    return torch.cat(all_images), torch.cat(all_labels)


def varied(images: Tensor) -> Tensor:
    """Each image turned by up to 12°, stretched by 12 %, sheared by 0.2 and moved by 5 % of its width."""
    n = len(images)
    angle = math.radians(12) * uniform(n)
    (stretch_x, stretch_y), shear, (move_x, move_y) = 1 + 0.12 * uniform(2, n), 0.2 * uniform(n), 0.1 * uniform(2, n)
    cos, sin = angle.cos(), angle.sin()
    rows = [torch.stack([cos * stretch_x, shear - sin, move_x], 1), torch.stack([sin, cos * stretch_y, move_y], 1)]
    grid = affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return grid_sample(images, grid, padding_mode="border", align_corners=False)


def uniform(*shape: int) -> Tensor:
    """Uniform in [-1, 1]."""
    return 2 * torch.rand(shape) - 1


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
