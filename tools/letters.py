"""Letters and signs as if written by hand: characters of many alphabets and fonts, bent and thickened, no digit.

A character is drawn as scikit-learn's digits were: inked or not on 32 by 32 points, which are counted in blocks of 4
by 4. So a picture is of 8 by 8 numbers from 0 to 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample, interpolate

from tools.glyphs import Glyph, glyph_field

# Of each shape one: what looks like another letter is left out, and so are O, I and З, which look like digits.
ALPHABETS = {
    "Latin": "ABCDEFGHJKLMNPQRSTUVWXYZabdefghijkmnqrty",
    "Greek": "ΓΔΘΛΞΠΣΦΨΩαβγδεζηθλμξπρστφχψω",
    "Cyrillic": "БДЖИЛЦЧШЩЫЭЮЯбжфъ",
    "Armenian": "ԱԲԳԴԵԶԷԸԹԺԻԼԽԾԿՀՁՂՃՄՅՆՇՈՉՊՋՌՍՎՏՐՑՒՓՔՕՖ",
    "Georgian": "აბგდევზთიკლმნოპჟრსტუფქღყშჩცძწჭხჯჰ",
    "signs": "+=?!&@#%/*(<>$€£¥§¶~^{©",
}
FONTS = {
    **dict.fromkeys(
        ("DejaVuSans", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSerif-Italic", "DejaVuSansMono"), tuple(ALPHABETS)
    ),
    **dict.fromkeys(("STIXGeneral", "STIXGeneralItalic"), ("Latin", "Greek", "Cyrillic", "signs")),
    **dict.fromkeys(("cmr10", "cmss10", "cmtt10", "cmti10"), ("Latin",)),  # their signs lie elsewhere
}
CHARACTERS = "".join(ALPHABETS.values())

POINTS = 32  # a side
BLOCK = 4  # of them make a pixel
ROOM = 0.25  # of a field's half are free around a character


@dataclass(frozen=True)
class Hand:
    """How far hands differ: standard deviations, of numbers around what the font has."""

    thickness: float = 0.03
    """Added to strokes on either side, as a share of half the picture; and `heavier` on average."""
    heavier: float = 0.06
    angle: float = 0.1
    """Radians."""
    slant: float = 0.2
    """How far the top leans to the right, as a share of the height."""
    size: float = 0.06
    """In either direction; and `taller` on average."""
    taller: float = 1.06
    narrower: float = 0.78
    """Than the font, on average."""
    shift: float = 0.04
    """As a share of half the picture."""
    bend: float = 0.09
    """Of the points of a grid of 4 by 4, between which the paper is stretched smoothly."""


def letters(per_class: int, hand: Hand, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures (N, 1, 8, 8) of 0 (paper) to 1 (ink) and labels (N,), places in `CHARACTERS`; N = per_class · 180."""
    pictures, labels = [], []
    for label, character in enumerate(CHARACTERS):
        fields = torch.stack(
            [
                glyph_field(Glyph(character, "", font), fitted=ROOM)
                for font, alphabets in FONTS.items()
                if any(character in ALPHABETS[alphabet] for alphabet in alphabets)
            ]
        )
        chosen = torch.randint(len(fields), (per_class,), generator=generator)
        pictures.append(written(fields[chosen], hand, generator))
        labels.append(torch.full((per_class,), label))
    return torch.cat(pictures), torch.cat(labels)


def written(fields: Tensor, hand: Hand, generator: torch.Generator) -> Tensor:
    """Distances from outlines (N, S, S) -> pictures (N, 1, 8, 8), each by a hand of its own."""
    n = len(fields)

    def normal(scale: float, *shape: int) -> Tensor:
        return scale * torch.randn(n, *shape, generator=generator)

    # From where a point is, back to where it lies in the field.
    at = (torch.arange(POINTS) + 0.5) / POINTS * 2 - 1
    points = torch.stack(torch.meshgrid(at, at, indexing="xy"), -1)
    bends = interpolate(normal(hand.bend, 2, 4, 4), POINTS, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    angle, slant = normal(hand.angle), normal(hand.slant)
    width, height = (1 + normal(hand.size, 2)).unbind(1)
    rows = [
        torch.stack([angle.cos() / (width * hand.narrower), slant - angle.sin()], -1),
        torch.stack([angle.sin(), angle.cos() / (height * hand.taller)], -1),
    ]
    moved = points + bends + normal(hand.shift, 1, 1, 2)
    places = moved @ torch.stack(rows, 1).mT[:, None] * (1 - ROOM)
    distance = grid_sample(fields[:, None], places, padding_mode="border", align_corners=False)
    inked = distance < (hand.heavier + normal(hand.thickness, 1, 1, 1)) * (1 - ROOM)
    return avg_pool2d(inked.float(), BLOCK)
