"""Train the miniature that ships in onelora_diffusion/miniature: facebook/DiT-XL-2-256 in small.

    python -m tools.make_miniature                     # writes onelora_diffusion/miniature
    python -m tools.make_miniature --output runs/mini  # writes somewhere else

A KL autoencoder, then a latent DiT with learned variance, on letters and signs of five alphabets as if written by hand
(`tools/letters.py`): 180 classes, of which none is a digit. Same model classes and same schedule as the large model,
weights stored in half precision. Everything is drawn from one seed; the last digits of the weights depend on the
machine and its number of threads.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch.nn.functional import interpolate

from onelora_diffusion.pipelines.base import load_base, miniature_path
from tools.from_scratch import BaseRecipe, draw_samples, train_base, write_base
from tools.letters import CHARACTERS, Hand, letters

VAE_CHANNELS = (16, 32)  # two levels: 16 by 16 pixels to 8 by 8 latents


@dataclass
class Settings(BaseRecipe):
    output: Path = miniature_path()
    """Folder to write; an older miniature in it is replaced."""
    per_letter: int = 400
    """Pictures of each letter or sign."""
    num_layers: int = 6
    steps: int = 22_000
    lr: float = 5e-3
    snr_gamma: float | None = 5.0
    class_std: float = 1.0
    preview: Path | None = None
    """Where to write a PNG of ten samples of each class."""


def main(settings: Settings) -> None:
    small, labels = letters(settings.per_letter, Hand(), torch.Generator().manual_seed(settings.seed))
    images = interpolate(2 * small - 1, size=(16, 16), mode="bilinear", align_corners=False)  # as the digits are
    pipeline = train_base(images.expand(-1, 3, -1, -1), labels, VAE_CHANNELS, settings)
    write_base(pipeline, dict(enumerate(CHARACTERS)), settings.output)

    pipeline = load_base(settings.output)
    weights = {name: sum(p.numel() for p in getattr(pipeline, name).parameters()) for name in ("transformer", "vae")}
    size = sum(file.stat().st_size for file in settings.output.rglob("*") if file.is_file())
    print(f"{settings.output}: {size / 1e6:.2f} MB, weights {weights}")
    if settings.preview:
        draw_samples(settings.output, settings.preview)
        print(f"samples: {settings.preview}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
