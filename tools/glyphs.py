"""Captioned pictures of printed letters and signs, drawn from matplotlib's own fonts: "a bold Q, turned left".

Each character of each font is kept as a field of distances from its outline, which is read where the pixels of a
turned, slanted and bent picture come to lie; so a heavier stroke is a larger distance that still is ink.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample

FONTS = {
    "plain": ("DejaVuSans", "cmss10"),
    "serif": ("DejaVuSerif", "STIXGeneral", "cmr10"),
    "typewriter": ("DejaVuSansMono", "cmtt10"),
}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghjkmnqrty"  # the other small ones look like these
SIGNS = {
    "+": "plus sign",
    "=": "equals sign",
    "?": "question mark",
    "!": "exclamation mark",
    "&": "ampersand",
    "@": "at sign",
    "#": "hash sign",
    "%": "percent sign",
    "/": "slash",
    "*": "star",
    "(": "bracket",
    "<": "less sign",
}
NAMES = {**{letter: letter for letter in LETTERS}, **SIGNS}

SAID_WITH_AN = {*"AEFHILMNORSXaefhmnr", "italic", "equals", "exclamation", "ampersand", "at"}

FIELD = 64  # pixels a side of a field of distances, which shows -1 to 1 in both directions
DRAWN = 2 * FIELD  # and of the characters it is taken from
SUPERSAMPLED = 2


class Glyph(NamedTuple):
    character: str
    kind: str
    """Of the font."""
    font: str


class Glyphs(NamedTuple):
    """How each of some pictures is drawn."""

    glyph: Tensor
    """(pictures,) int64: which field."""
    thickness: Tensor
    """(pictures,) what is added to strokes on either side, as a share of half the picture."""
    angle: Tensor
    """(pictures,) radians to the left."""
    slant: Tensor
    """(pictures,) how far the top leans to the right, as a share of the height."""
    bend: Tensor
    """(pictures, 2) how far strokes along and across are bowed."""
    size: Tensor
    """(pictures,) 1: as large as the font draws it."""
    shift: Tensor
    """(pictures, 2) right and down, as a share of half the picture."""


def captioned_glyphs(count: int, resolution: int = 16, seed: int = 0) -> tuple[Tensor, list[str]]:
    """Pictures uint8 (count, 3, resolution, resolution), ink 255 on 0, and what each shows; drawn from the seed."""
    generator = np.random.default_rng(seed)

    def normal(scale: float, *shape: int) -> Tensor:
        return torch.from_numpy(scale * generator.standard_normal((count, *shape))).float()

    glyphs = glyph_list()
    glyph = generator.integers(0, len(glyphs), count)
    weight = generator.choice(3, count, p=(0.5, 0.3, 0.2))
    leans = generator.random(count) < 0.3
    turn = generator.choice(3, count, p=(0.6, 0.2, 0.2))
    drawn = Glyphs(
        torch.from_numpy(glyph),
        torch.tensor([0.025, 0.08, -0.005])[weight] + normal(0.006),
        torch.tensor([0.0, np.pi / 2, -np.pi / 2]).float()[turn] + normal(0.08),
        torch.tensor([0.0, 0.35])[leans.astype(int)] + normal(0.03),
        normal(0.04, 2),
        1 + normal(0.05),
        normal(0.05, 2),
    )
    words = zip(glyph, weight, leans, turn, strict=True)
    captions = [caption(glyphs[one].character, glyphs[one].kind, *rest) for one, *rest in words]
    return draw(drawn, resolution).expand(-1, 3, -1, -1), captions


def caption(character: str, kind: str, weight: int, leans: bool, turn: int) -> str:
    """A picture in words: an italic serif ampersand, turned right."""
    words = [("", "bold", "thin")[weight], "italic" if leans else "", "" if kind == "plain" else kind]
    named = " ".join(word for word in (*words, NAMES[character]) if word)
    article = "an" if named.split()[0] in SAID_WITH_AN else "a"
    return f"{article} {named}{('', ', turned left', ', turned right')[turn]}"


def draw(glyphs: Glyphs, resolution: int) -> Tensor:
    """Pictures uint8 (pictures, 1, resolution, resolution)."""
    parts = zip(*(each.split(1024) for each in glyphs), strict=True)
    return torch.cat([_drawn(Glyphs(*part), resolution) for part in parts])


def _drawn(glyphs: Glyphs, resolution: int) -> Tensor:
    # From where a pixel is, back through shift, turn, size, slant and bend to where it lies in the field.
    side = SUPERSAMPLED * resolution
    at = (torch.arange(side) + 0.5) / side * 2 - 1  # right and down
    shift, bend = glyphs.shift[:, :, None, None], glyphs.bend[:, :, None, None]
    right, down = at[None, None, :] - shift[:, 0], at[None, :, None] - shift[:, 1]
    cosine, sine = (each[:, None, None] for each in (glyphs.angle.cos(), glyphs.angle.sin()))
    size = glyphs.size[:, None, None]
    x, y = (cosine * right - sine * down) / size, (sine * right + cosine * down) / size
    x = x + glyphs.slant[:, None, None] * y + bend[:, 0] * (1 - 2 * y**2)
    y = y + bend[:, 1] * (1 - 2 * x**2)
    fields = glyph_fields()[glyphs.glyph]
    distance = grid_sample(fields, torch.stack([x, y], -1), padding_mode="border", align_corners=False)
    inside = (glyphs.thickness[:, None, None, None] - distance) * side / 2  # in pixels
    return avg_pool2d((inside + 0.5).clamp(0, 1), SUPERSAMPLED).mul(255).round().to(torch.uint8)


@lru_cache(maxsize=1)
def glyph_list() -> list[Glyph]:
    """Every character of every font that has it."""
    return [
        Glyph(character, kind, font)
        for kind, fonts in FONTS.items()
        for font in fonts
        for character in (LETTERS if font.startswith("cm") else NAMES)  # Computer Modern has its signs elsewhere
    ]


@lru_cache(maxsize=1)
def glyph_fields() -> Tensor:
    """(glyphs, 1, FIELD, FIELD) distances from the outline, negative in ink, in halves of the picture."""
    return torch.stack([glyph_field(glyph) for glyph in glyph_list()])[:, None]


def glyph_field(glyph: Glyph, fitted: float | None = None) -> Tensor:
    """(FIELD, FIELD) distances from the outline, negative in ink, in halves of the picture.

    The character is as large as its font has it, or its ink fills the picture but for a share `fitted` on all sides.
    """
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont
    from scipy.ndimage import distance_transform_edt

    path = f"{get_data_path()}/fonts/ttf/{glyph.font}.ttf"
    font = ImageFont.truetype(path, size=round(0.9 * DRAWN))
    left, top, right, bottom = font.getbbox(glyph.character)
    if fitted is not None:
        fill = (1 - fitted) * DRAWN / max(right - left, bottom - top)
        font = ImageFont.truetype(path, size=round(0.9 * DRAWN * fill))
        left, top, right, bottom = font.getbbox(glyph.character)
    picture = Image.new("L", (DRAWN, DRAWN))
    middle = (DRAWN - left - right) / 2, (DRAWN - top - bottom) / 2
    ImageDraw.Draw(picture).text(middle, glyph.character, fill=255, font=font)
    ink = np.asarray(picture) >= 128
    # Distances are those of the middles of pixels, and the outline is half a pixel from both sides' first ones.
    distance = np.where(ink, 0.5 - distance_transform_edt(ink), distance_transform_edt(~ink) - 0.5)
    return avg_pool2d(torch.from_numpy(distance).float()[None], 2)[0] / (DRAWN / 2)
