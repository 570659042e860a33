"""Images of every mode as they are meant to be seen, by values known by hand, and the same for every loader."""

import io
import struct
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from reading import load_captioned

from onelora_diffusion.data import load_dataset
from onelora_diffusion.data.decoding import BrokenImageError, decoded, read_image, upright_size
from onelora_diffusion.evaluation.images import FolderImages

RED, BLUE, GREEN, YELLOW, WHITE = (255, 0, 0), (0, 0, 255), (0, 255, 0), (255, 255, 0), (255, 255, 255)


def file_of(image, kind, **options):
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content


def seen(image, kind="PNG", **options):
    """(height, width, 3) of an image that was written and read again."""
    with Image.open(file_of(image, kind, **options)) as read:
        found = decoded(read)
        assert found.mode == "RGB" and not found.info and decoded(found) is found
        assert upright_size(read) == found.size[::-1]
        return np.array(found).astype(int)


def colours(image, kind="PNG", **options):
    return [tuple(pixel) for pixel in seen(image, kind, **options).reshape(-1, 3).tolist()]


CORNERS = np.array([[RED, BLUE, BLUE], [GREEN, YELLOW, YELLOW]], np.uint8)  # 2 high, 3 wide
# How an upright picture is stored for each orientation, from the definition in EXIF's table of tag 274: where its
# row 0 and column 0 are.
STORED = {
    1: lambda seen: seen,
    2: lambda seen: seen[:, ::-1],  # column 0 is on the right
    3: lambda seen: seen[::-1, ::-1],
    4: lambda seen: seen[::-1],
    5: lambda seen: seen.transpose(1, 0, 2),  # row 0 is on the left, column 0 above
    6: lambda seen: seen.transpose(1, 0, 2)[::-1],  # row 0 is on the right
    7: lambda seen: seen.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda seen: seen.transpose(1, 0, 2)[:, ::-1],
}


@pytest.mark.parametrize("orientation", STORED)
def test_images_are_turned_as_their_cameras_say(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(STORED[orientation](CORNERS))
    assert np.array_equal(seen(Image.fromarray(stored), exif=exif), CORNERS)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_orientation_turns_nothing():
    image = Image.fromarray(CORNERS)
    for exif in (b"Exif\0\0MM\0*\0\0", b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x01\0\0\0\x09\0\0\0"):
        assert np.array_equal(seen(image, exif=exif), CORNERS)


def test_what_is_transparent_is_white_whatever_its_hidden_colour():
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0] = [(0, 200, 0, 0), (255, 255, 0, 255), (255, 0, 0, 51)]
    expected = [WHITE, YELLOW, (255, 204, 204)]  # a fifth of red, and four of white
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        assert colours(Image.fromarray(pixels), kind, **options) == expected
    assert decoded(Image.fromarray(pixels).convert("RGBa")).getpixel((1, 0)) == YELLOW
    greys = np.array([[[100, 0], [100, 255], [0, 51]]], np.uint8)
    assert seen(Image.fromarray(greys))[0, :, 0].tolist() == [255, 100, 204]


def test_palettes_and_keys_of_transparency():
    palette = Image.new("P", (3, 1))
    palette.putpalette([*RED, *BLUE, *GREEN])
    palette.putdata([0, 1, 2])
    assert colours(palette) == [RED, BLUE, GREEN]
    assert colours(palette, transparency=1) == [RED, WHITE, GREEN]
    assert colours(palette, transparency=bytes([255, 51, 0])) == [RED, (204, 204, 255), WHITE]
    assert colours(palette, "GIF", transparency=0) == [WHITE, BLUE, GREEN]
    assert colours(Image.fromarray(CORNERS), transparency=RED)[:3] == [WHITE, BLUE, BLUE]
    assert seen(Image.fromarray(np.array([[0, 1]], bool)))[0, :, 0].tolist() == [0, 255]


def test_of_several_frames_the_first_is_seen():
    frames = [Image.new("RGB", (2, 2), colour) for colour in (RED, GREEN)]
    for kind in ("GIF", "WEBP"):
        assert seen(frames[0], kind, save_all=True, append_images=frames[1:])[0, 0, 0] > 250


def tiff(values, bits, photometric=1, kind=1):
    """A TIFF file of unsigned (kind 1) or signed (2) greys, of which 0 is black (photometric 1) or white (0)."""
    values = np.asarray(values)
    data, (height, width) = values.tobytes(), values.shape
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, height)]
    tags += [(279, len(data)), (339, kind)]
    listed = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return io.BytesIO(
        b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + listed + bytes(4)
    )


SIXTEEN = np.array([[0, 257, 32896, 65535]])  # 0, 1, 128 and 255 times 257
EIGHT = [0, 1, 128, 255]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (SIXTEEN.astype(np.uint16), "PNG"),
        (SIXTEEN.astype(np.uint16), "TIFF"),
        (SIXTEEN.astype(np.uint16), "PPM"),
        (SIXTEEN.astype(np.int32), "TIFF"),
        ((SIXTEEN / 65535).astype(np.float32), "TIFF"),
    ],
)
def test_greys_of_more_bits_are_scaled_to_eight(values, kind):
    found = seen(Image.fromarray(values), kind)
    assert found[0].tolist() == [[grey] * 3 for grey in EIGHT]


def test_greys_of_white_at_zero_and_of_big_endian_files():
    with Image.open(tiff(SIXTEEN.astype("<u2"), 16, photometric=0)) as image:
        assert np.array(decoded(image))[0, :, 0].tolist() == [255, 254, 127, 0]
    big = Image.frombytes("I;16B", (4, 1), SIXTEEN.astype(">u2").tobytes())
    assert np.array(decoded(big))[0, :, 0].tolist() == EIGHT
    keyed = seen(Image.fromarray(SIXTEEN.astype(np.uint16)), transparency=257)
    assert keyed[0, :, 0].tolist() == [0, 255, 128, 255]
    assert not seen(Image.fromarray(np.zeros((2, 2), np.int32)), "TIFF").any()
    with (
        Image.open(tiff(np.array([[0, 300, 999, 30000]], "<i2"), 16, kind=2)) as signed,
        pytest.raises(ValueError, match="grey values are from 0 to 30000, and their range is not known"),
    ):
        decoded(signed)


@pytest.mark.parametrize(
    ("values", "described"),
    [
        (np.array([[0, 200]], np.int32), "from 0 to 200"),  # of 8 bits, or dark ones of 16?
        (np.array([[-1, 999]], np.int32), "from -1 to 999"),
        (np.array([[0, 70000]], np.int32), "from 0 to 70000"),
        (np.array([[0, 255]], np.float32), "from 0 to 255"),
        (np.array([[0, np.nan]], np.float32), "from nan to nan"),
    ],
)
def test_greys_of_an_unknown_range_are_refused(tmp_path, values, described):
    (tmp_path / "a").mkdir()
    Image.fromarray(values).save(tmp_path / "a" / "x.tif")
    with pytest.raises(BrokenImageError, match=f"x.tif is not a readable image: its grey values are {described}, and"):
        read_image(tmp_path / "a" / "x.tif")


def icc(space, **tags):
    """A profile of ICC's version 2 of a display, from its tags."""
    head, listed = b"", b""
    offset = 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        listed += name.encode() + struct.pack(">II", offset + len(head), len(data))
        head += data
    body = struct.pack(">I", len(tags)) + listed + head
    start = struct.pack(">I4sI4s4s4s", 128 + len(body), b"none", 0x02100000, b"mntr", space.ljust(4), b"XYZ ")
    white = struct.pack(">iii", *(round(v * 65536) for v in (0.9642, 1, 0.8249)))
    return (start + bytes(12) + b"acsp" + bytes(28) + white).ljust(128, b"\0") + body


def xyz(*values):
    return b"XYZ \0\0\0\0" + struct.pack(">iii", *(round(v * 65536) for v in values))


# The primaries of sRGB, adapted to D50 (IEC 61966-2-1), which a profile may name in another order.
R, G, B = xyz(0.4361, 0.2225, 0.0139), xyz(0.3851, 0.7169, 0.0971), xyz(0.1431, 0.0606, 0.7141)
LINEAR, WHITEPOINT = b"curv" + bytes(8), xyz(0.9642, 1, 0.8249)
TEXT = b"text" + bytes(4) + b"none\0"
CURVES = dict(rTRC=LINEAR, gTRC=LINEAR, bTRC=LINEAR)
SWAPPED = icc(b"RGB", desc=TEXT, cprt=TEXT, wtpt=WHITEPOINT, rXYZ=G, gXYZ=R, bXYZ=B, **CURVES)  # red is green
GREY = icc(b"GRAY", desc=TEXT, cprt=TEXT, wtpt=WHITEPOINT, kTRC=LINEAR)


def srgb(linear):
    """The formula of IEC 61966-2-1."""
    return 255 * (12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055)


def test_colour_profiles_are_converted_to_srgb():
    image = Image.fromarray(np.array([[RED, GREEN, (51, 51, 51), WHITE]], np.uint8))
    for kind in ("PNG", "TIFF"):
        found = seen(image, kind, icc_profile=SWAPPED)[0]
        expected = [GREEN, RED, [srgb(0.2)] * 3, WHITE]
        assert np.abs(found - expected).max() <= 2  # the profile has its primaries to four digits
    grey = Image.fromarray(np.array([[0, 51, 255]], np.uint8))
    assert np.abs(seen(grey, icc_profile=GREY)[0] - [[0] * 3, [srgb(0.2)] * 3, [255] * 3]).max() <= 1
    clear = Image.fromarray(np.array([[[*RED, 255], [*RED, 0]]], np.uint8))
    assert np.abs(seen(clear, icc_profile=SWAPPED)[0] - [GREEN, WHITE]).max() <= 2


def test_profiles_of_srgb_of_another_space_and_damaged_ones_change_nothing():
    built_in = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (built_in, GREY, SWAPPED[:200], b"none"):
        assert np.array_equal(seen(Image.fromarray(CORNERS), icc_profile=profile), CORNERS)


def test_cmyk_and_lab():
    inks = Image.fromarray(np.array([[[0, 255, 255, 0], [255, 255, 0, 0], [0, 0, 0, 0]]], np.uint8), "CMYK")
    assert colours(inks, "TIFF") == [RED, BLUE, WHITE]
    large = inks.resize((48, 16), Image.Resampling.NEAREST)
    assert np.abs(seen(large, "JPEG", quality=98)[8, [8, 24, 40]] - [RED, BLUE, WHITE]).max() <= 8
    grey = Image.new("LAB", (1, 1), (128, 128, 128))  # L 50.2 of 100: Y = ((50.2 + 16) / 116)³
    assert np.abs(seen(grey, "TIFF") - srgb(((100 * 128 / 255 + 16) / 116) ** 3)).max() <= 2


def stored_sideways(folder):
    """A file that shows CORNERS once it is turned, its left half hidden."""
    exif = Image.Exif()
    exif[0x0112] = 6
    clear = np.dstack([CORNERS.repeat(8, 0).repeat(8, 1)[:, :16], np.full((16, 16), 255, np.uint8)])
    clear[:, :8, 3] = 0
    folder.mkdir(parents=True)
    Image.fromarray(np.ascontiguousarray(STORED[6](clear))).save(folder / "1.png", exif=exif)


def test_every_loader_decodes_alike(tmp_path, monkeypatch):
    stored_sideways(tmp_path / "train" / "a")
    with Image.open(tmp_path / "train" / "a" / "1.png") as image:
        row = {"picture": image.copy(), "kind": 0}
    row["picture"].info = image.info
    label = type("ClassLabel", (), {"names": ["a"]})()
    features = {"picture": type("Image", (), {})(), "kind": label}
    at = lambda rows, key: [0] if key == "kind" else row  # noqa: E731
    rows = type("Rows", (list,), {"features": features, "__getitem__": at})([row])
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *a, **k: rows))

    expected = torch.full((3, 16, 16), 255, dtype=torch.uint8)
    expected[:, :8, 8:], expected[:, 8:, 8:] = (torch.tensor(each)[:, None, None] for each in (BLUE, YELLOW))
    for name, root in (
        ("imagefolder", tmp_path),
        ("torchvision:ImageFolder", tmp_path / "train"),
        ("hf:some/rows", None),
    ):
        found = (load_dataset(name, root, resolution=16)[0][0] + 1) * 127.5
        assert torch.equal(found.round().to(torch.uint8), expected), name
    assert torch.equal(load_captioned(tmp_path, "x", resolution=16)[0, False][0], expected)
    assert torch.equal(FolderImages(tmp_path / "train" / "a")[0], expected)
