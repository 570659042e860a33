"""From the file of an image to its pixels, the same way for every data set: upright, over white, in 8-bit sRGB."""

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms

from onelora_diffusion.data.identity import OF_THE_FILE

# What PIL raises for an image that is damaged, missing, too large or none.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# ICC's names of the colour spaces of modes.
SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK", "LAB": "Lab"}
BITS, PHOTOMETRIC = 258, 262  # tags of TIFF


class BrokenImageError(ValueError):
    """An image that cannot be read; the message names it."""


def read_image(path: str | Path) -> Image.Image:
    """A file's image as `decoded` makes it; BrokenImageError names a file that is missing, damaged or no image."""
    with opened(path, str(path)) as image:
        return decoded(image)


@contextmanager
def opened(file, named: str) -> Iterator[Image.Image]:
    """Context manager: an image as PIL opens it; what is wrong with it, also inside, is a BrokenImageError."""
    try:
        with Image.open(file) as image:
            yield image
    except UNREADABLE as error:
        if isinstance(error, OSError) and error.errno and error.errno not in OF_THE_FILE:
            raise BrokenImageError(f"{named} cannot be read now ({error.strerror}): start again") from error
        raise BrokenImageError(f"{named} is not a readable image: {error}") from error


def decoded(image: Image.Image) -> Image.Image:
    """An image as it is meant to be seen, as RGB of 8 bits; of several frames the first.

    It is turned as its EXIF or XMP data say. A colour profile is converted to sRGB; one that is damaged or belongs to
    another colour space is ignored, as browsers do. What is transparent shows white. Grey values of 16 bits, integers
    from 0 to 65535, and floating-point numbers from 0 to 1 are scaled to 0..255.

    Raises:
        ValueError: grey values have another range.
    """
    image.load()
    if image.mode == "RGB" and not image.info:
        return image
    file_format, tags, profile = image.format, dict(getattr(image, "tag_v2", {})), image.info.get("icc_profile")
    turn = TURNS.get(orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode == "F" or image.mode[0] == "I":
        image = in_8_bits(image, file_format, tags)
    alpha = None
    if image.has_transparency_data:
        with_alpha = image.convert("RGBA")
        alpha = with_alpha.getchannel("A")
        image = image.convert("L") if image.mode in ("1", "L", "LA") else with_alpha.convert("RGB")
    elif image.mode not in SPACES:
        image = image.convert("L" if image.mode == "1" else "RGB")
    transform = to_srgb(profile, image.mode) if profile else None
    colours = ImageCms.applyTransform(image, transform) if transform else image.convert("RGB")
    if alpha is not None:
        colours = Image.composite(colours, Image.new("RGB", colours.size, "white"), alpha)
    colours.info = {}
    return colours


def orientation(image: Image.Image) -> int:
    """EXIF's number of how an image is turned and mirrored; 1, as it is, where there is none or it is damaged."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except (*UNREADABLE, TypeError, struct.error):
        return 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Height and width of an opened image when it is turned as it says; the pixels are not read."""
    # A PNG that does not say so at its head would be decoded to the end in search of it.
    says = image.format != "PNG" or {"exif", "xmp", "XML:com.adobe.xmp"} & image.info.keys()
    return image.size if says and orientation(image) in (5, 6, 7, 8) else image.size[::-1]


def in_8_bits(image: Image.Image, file_format: str | None, tags: dict) -> Image.Image:
    """Grey values of more bits, or floating-point ones, as 8 bits; ValueError if their range is not known.

    Args:
        tags: of a TIFF file, by their numbers.
    """
    values, mode, bits = np.asarray(image), image.mode, tags.get(BITS, (16,))[0]
    low, high = values.min(), values.max()
    if mode.startswith("I;16"):
        top = 2**bits - 1
    elif mode == "I" and (file_format in ("PNG", "PPM") or (bits == 32 and low >= 0 and 255 < high <= 65535)):
        top = 65535
    elif mode == "F" and low >= 0 and high <= 1:
        top = 1
    elif low == high == 0:
        top = 1
    else:
        raise ValueError(
            f"its grey values are from {low:g} to {high:g}, and their range is not known: write them with 8 or 16 "
            "bits, or as floating-point numbers from 0 to 1"
        )
    grey = np.round(values.astype(np.float32) * (255 / top)).astype(np.uint8)
    if tags.get(PHOTOMETRIC) == 0:  # 0 is white
        grey = 255 - grey
    found = Image.fromarray(grey)
    if "transparency" in image.info:  # the value of a grey that is transparent
        found.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return found


@lru_cache(maxsize=16)
def to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform from a colour profile; None if it is sRGB already, damaged, or none of images of this mode."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != SPACES.get(mode):
            return None
        if (source.profile.profile_description or "").startswith("sRGB"):
            return None
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (OSError, ValueError, ImageCms.PyCMSError):
        return None
