"""Grids of samples, drawn from the same noise throughout a run."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torchvision.utils import make_grid

from onelora_diffusion.data.clips import write_frames

GRID_CLASSES, PADDING = 10, 2
COLUMNS, ROWS = "columns", "rows"


def shown_classes(id2label: dict[int, str]) -> list[tuple[int, str]]:
    """The (label, name) of the classes of which samples are drawn, spread from the first to the last."""
    num_classes = len(id2label)
    columns = min(GRID_CLASSES, num_classes)
    labels = [column * (num_classes - 1) // max(1, columns - 1) for column in range(columns)]
    return [(label, id2label[label]) for label in labels]


def png_of(images: Tensor, columns: Sequence[str], frame_rate: float | None = None) -> bytes:
    """The PNG, with the names of its columns, of a grid of uint8 images (N, 3, H, W) or clips (N, 3, frames, H, W)."""
    png, header = io.BytesIO(), PngInfo()
    header.add_itxt(COLUMNS, json.dumps(list(columns)))
    header.add_itxt(ROWS, str(len(images) // len(columns)))
    shown = images.unbind(2) if images.ndim == 5 else [images]
    grids = [make_grid(each, nrow=len(columns), padding=PADDING) for each in shown]
    frames = [Image.fromarray(grid.permute(1, 2, 0).numpy()) for grid in grids]
    write_frames(png, frames, frame_rate, pnginfo=header)
    return png.getvalue()


def last_row(path: Path) -> list[tuple[str, Image.Image]]:
    """(name, last image) of each column of such a grid; the whole grid if the columns have no names."""
    with Image.open(path) as grid:
        grid.load()
        columns = json.loads(grid.info.get(COLUMNS, "[]"))
    if not columns:
        return [("samples", grid)]
    width = (grid.width - PADDING) // len(columns) - PADDING
    rows = int(grid.info.get(ROWS) or (grid.height - PADDING) // (width + PADDING))  # older grids are of squares
    height = (grid.height - PADDING) // rows - PADDING
    top = grid.height - PADDING - height
    lefts = [PADDING + number * (width + PADDING) for number in range(len(columns))]
    return [
        (name, grid.crop((left, top, left + width, top + height))) for name, left in zip(columns, lefts, strict=True)
    ]
