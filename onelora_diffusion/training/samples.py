"""Grids of samples with the same noise all along a run."""

import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from onelora_diffusion.files import write_bytes
from onelora_diffusion.sampling import SamplerSettings, adapters_folded_in, generate_images
from onelora_diffusion.training.settings import Settings

GRID_CLASSES, GRID_ROWS = 10, 4


def sample_grid(pipeline, num_classes: int, settings: Settings, is_stopped) -> bytes | None:
    """The PNG of a grid with a class a column; image i has the same noise in every grid. None if stopped midway."""
    columns = min(GRID_CLASSES, num_classes)
    classes = [column * (num_classes - 1) // max(1, columns - 1) for column in range(columns)]
    labels, images = classes * GRID_ROWS, []
    sampler = SamplerSettings(num_inference_steps=settings.sample_steps, guidance_scale=settings.guidance_scale)
    batches = generate_images(pipeline, labels, settings.seed, range(len(labels)), sampler, batch_size=columns)
    with adapters_folded_in(pipeline.transformer, sampler):
        for _, batch in batches:
            images.append(batch.cpu())
            if is_stopped():
                return None
    return png_of(torch.cat(images), columns)


def png_of(images: Tensor, columns: int) -> bytes:
    """Images (N, 3, R, R) in uint8 as a grid."""
    png = io.BytesIO()
    grid = make_grid(images, nrow=columns)
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(png, format="PNG")
    return png.getvalue()


def write_sample(path: Path, png: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    write_bytes(path, png)
