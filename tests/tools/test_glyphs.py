import torch

from tools.glyphs import LETTERS, NAMES, Glyphs, caption, captioned_glyphs, draw, glyph_list


def drawn(character, font="DejaVuSans", resolution=32, **changes):
    """A character as its font has it but for the changes: (resolution, resolution) of 0..1."""
    number = next(i for i, glyph in enumerate(glyph_list()) if (glyph.character, glyph.font) == (character, font))
    plain = dict(thickness=0.0, angle=0.0, slant=0.0, bend=[0.0, 0.0], size=1.0, shift=[0.0, 0.0])
    parts = {name: torch.tensor([value]) for name, value in {**plain, **changes}.items()}
    return draw(Glyphs(glyph=torch.tensor([number]), **parts), resolution)[0, 0].float() / 255


def box(picture):
    """Height and width of the ink."""
    rows, columns = (picture > 0.5).nonzero().T
    return int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1


def test_pictures_and_words_are_drawn_from_the_seed():
    pictures, captions = captioned_glyphs(300, 16, seed=3)
    assert pictures.shape == (300, 3, 16, 16) and pictures.dtype == torch.uint8 and len(captions) == 300
    again, words = captioned_glyphs(300, 16, seed=3)
    assert torch.equal(pictures, again) and captions == words
    assert captions != captioned_glyphs(300, 16, seed=4)[1]
    ink = pictures.float().mean((1, 2, 3)) / 255
    assert ((ink > 0.005) & (ink < 0.6)).all()  # no picture is empty, none is full
    assert len(set(captions)) > 200


def test_the_base_is_shown_no_digit():
    assert not any(name.isdigit() for name in NAMES)
    assert {glyph.character for glyph in glyph_list()} == set(NAMES)


def test_captions_say_what_is_drawn():
    assert caption("Q", "plain", weight=1, leans=False, turn=1) == "a bold Q, turned left"
    assert caption("&", "serif", weight=0, leans=True, turn=2) == "an italic serif ampersand, turned right"
    assert caption("F", "plain", weight=0, leans=False, turn=0) == "an F"
    assert caption("@", "typewriter", weight=2, leans=False, turn=0) == "a thin typewriter at sign"


def test_a_quarter_turn_left_is_the_turned_picture():
    for character in ("Q", "F", "?"):
        upright, turned = drawn(character), drawn(character, angle=torch.pi / 2)
        torch.testing.assert_close(turned, upright.rot90(), rtol=0, atol=2 / 255)  # of bytes, each rounded


def test_a_heavier_stroke_has_the_ink_of_a_stroke_that_much_wider():
    # The I of DejaVu Sans is one upright stroke; half of 32 pixels by 0.0625 is one pixel more on either side.
    light, bold = drawn("I"), drawn("I", thickness=0.0625)
    assert light[16].sum() > 1
    assert abs(float(bold[16].sum() - light[16].sum()) - 2) < 0.25


def test_an_italic_leans_to_the_right_and_a_shift_moves():
    upright = drawn("I")
    columns = torch.arange(32.0)

    def middle(row):
        return float((row * columns).sum() / row.sum())

    leaning, moved = drawn("I", slant=0.35), drawn("I", shift=[0.25, 0.0])
    assert abs(middle(leaning[8]) - middle(leaning[23]) - 0.35 * 15) < 0.5
    assert abs(middle(moved[16]) - middle(upright[16]) - 4) < 0.25


def test_a_size_scales_and_the_picture_is_the_same_at_any_resolution():
    height, width = box(drawn("H", resolution=64))
    small_height, small_width = box(drawn("H", resolution=64, size=0.5))
    assert abs(small_height - height / 2) <= 1 and abs(small_width - width / 2) <= 1
    halved = drawn("H", resolution=64).reshape(32, 2, 32, 2).mean((1, 3))
    assert (halved - drawn("H")).abs().mean() < 0.01


def test_letters_are_told_apart_from_all_others():
    pictures = torch.stack([drawn(letter, resolution=16).flatten() for letter in LETTERS])
    distances = torch.cdist(pictures, pictures, p=1) + 256 * torch.eye(len(LETTERS))
    assert distances.min() > 4  # pixels of 256
