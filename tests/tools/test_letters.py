import unicodedata
from pathlib import Path

import matplotlib
import pytest
import torch

from tools.glyphs import Glyph, glyph_field
from tools.letters import ALPHABETS, CHARACTERS, FONTS, Hand, letters, written

TTF = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
with_fonts = pytest.mark.skipif(
    not all((TTF / f"{font}.ttf").is_file() for font in FONTS), reason="this matplotlib ships fewer fonts"
)
STEADY = Hand(*[0.0] * 4, size=0.0, taller=1.0, narrower=1.0, shift=0.0, bend=0.0)


def test_no_digit_is_among_them():
    assert len(CHARACTERS) == len(set(CHARACTERS)) == 180
    assert not any(character.isnumeric() for character in CHARACTERS)
    assert not set("OIlОЗ") & set(CHARACTERS)  # nor what is printed like one
    assert all(unicodedata.category(character)[0] in "LPS" for character in CHARACTERS)


@with_fonts
def test_every_font_has_what_is_drawn_of_it():
    from matplotlib.ft2font import FT2Font

    for font, alphabets in FONTS.items():
        has = set(map(chr, FT2Font(str(TTF / f"{font}.ttf")).get_charmap()))
        assert has >= {character for alphabet in alphabets for character in ALPHABETS[alphabet]}, font


@with_fonts
def test_pictures_are_counts_of_sixteen_points_drawn_from_the_seed(monkeypatch):
    monkeypatch.setattr("tools.letters.CHARACTERS", "AZ@")
    one, two, other = (letters(5, Hand(), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    pictures, labels = one
    assert pictures.shape == (15, 1, 8, 8) and labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert torch.equal(pictures, two[0]) and not torch.equal(pictures, other[0])
    assert torch.equal(pictures * 16, (pictures * 16).round()) and pictures.min() == 0 and pictures.max() <= 1
    assert (pictures.mean((1, 2, 3)) > 0.05).all() and (pictures.mean((1, 2, 3)) < 0.7).all()


def test_a_steady_hand_writes_what_the_font_has_and_a_heavy_one_more():
    fields = torch.stack([glyph_field(Glyph(character, "", "DejaVuSans"), fitted=0.25) for character in "HT"])
    generator = torch.Generator().manual_seed(0)
    h, t = written(fields, STEADY, generator)[:, 0]
    # Both are as high as there is room, and the same mirrored but for a column of a pixel's points.
    assert (h - h.flip(1)).abs().max() <= 4 / 16 and (t - t.flip(1)).abs().max() <= 4 / 16
    assert h[0].max() > 0.5 and h[-1].max() > 0.5 and t[0].mean() > 0.5 and t[-1].sum() < 2.5
    heavy = written(fields, Hand(**vars(STEADY) | {"heavier": 0.1}), generator)
    assert (heavy.sum((1, 2, 3)) > 1.3 * torch.stack([h, t]).sum((1, 2))).all()
