"""Sheets of pictures: blocks of images beside each other, a row for each class or prompt."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.utils import make_grid

from onelora_diffusion.data.clips import write_frames
from onelora_diffusion.files import printable, written_beside

SMALLEST_TILE = 64  # pixels; smaller images are enlarged in a grid
HEADER = 18  # pixels of a line above a block
CHARACTER = 6  # pixels of a character's width
LONGEST = 60  # characters of a row's name


def write_sheet(
    output: Path,
    blocks: Mapping[str, Sequence[Tensor]],
    names: Sequence[str],
    left: str | None = None,
    frame_rate: float | None = None,
) -> None:
    """Write a PNG with a row for each name, whatever the number of blocks; of clips an animated one.

    Image i, uint8 (3, H, W), or clip (3, frames, H, W) of so many frames a second, of a block is in row i mod
    len(names). The titles of several blocks stand above them. The block `left` is on the left of the names, all others
    are on their right.
    """
    (first, *_), *_ = blocks.values()
    frames = range(first.shape[1]) if first.ndim == 4 else [...]
    sheets = [
        sheet_of({title: [image[:, frame] for image in images] for title, images in blocks.items()}, names, left)
        for frame in frames
    ]
    with written_beside(output) as part:
        write_frames(part, sheets, frame_rate)


def sheet_of(blocks: Mapping[str, Sequence[Tensor]], names: Sequence[str], left: str | None) -> Image.Image:
    """The sheet of images (3, H, W), as `write_sheet` describes it."""
    grids = {title: grid_of(images, len(names)) for title, images in blocks.items()}
    names = [printable(name, LONGEST) for name in names]
    height = next(iter(grids.values())).height
    lines = {title: textwrap.wrap(title, max(1, grid.width // CHARACTER)) for title, grid in grids.items()}
    top = HEADER * max(map(len, lines.values())) if len(grids) > 1 else 0
    canvas = Image.new("RGB", (1, 1))
    margin = math.ceil(max(ImageDraw.Draw(canvas).textlength(name) for name in names)) + 12
    sheet = Image.new("RGB", (margin + sum(grid.width for grid in grids.values()), top + height), "white")
    draw = ImageDraw.Draw(sheet)
    x = 0 if left is None else grids[left].width
    for row, name in enumerate(names):
        draw.text((x + margin / 2, top + (row + 0.5) * height / len(names)), name, fill="black", anchor="mm")
    x += margin
    for title, grid in grids.items():
        start = 0 if title == left else x
        sheet.paste(grid, (start, top))
        if top:
            middle = start + grid.width / 2, top / 2
            draw.multiline_text(middle, "\n".join(lines[title]), fill="black", anchor="mm", align="center")
        x += 0 if title == left else grid.width
    return sheet


def grid_of(images: Sequence[Tensor], rows: int) -> Image.Image:
    """Images in rows, small ones enlarged; image i is in row i mod `rows`."""
    columns, (height, width) = math.ceil(len(images) / rows), images[0].shape[-2:]
    tiles = torch.full((rows * columns, 3, height, width), 255, dtype=torch.uint8)
    for index, image in enumerate(images):
        tiles[index % rows * columns + index // rows] = image
    enlarge = math.ceil(SMALLEST_TILE / width)
    tiles = tiles.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    return Image.fromarray(make_grid(tiles, nrow=columns, pad_value=255).permute(1, 2, 0).numpy())
