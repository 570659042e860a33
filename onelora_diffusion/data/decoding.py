"""Decode image files in the same way for every data set: upright, on a white background, in 8-bit sRGB."""

import io
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageCms

from onelora_diffusion.data.identity import OF_THE_FILE

# The errors of PIL for an image that is damaged, missing or too large, or a file that is no image.
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
# ICC's name of the colour space of each mode.
SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK", "LAB": "Lab"}
BITS, PHOTOMETRIC = 258, 262  # TIFF tags

T = TypeVar("T")


class BrokenImageError(ValueError):
    """An image that cannot be read; the message names it."""


def read_image(path: str | Path) -> Image.Image:
    """Read an image file and decode it; BrokenImageError names one that is missing, damaged or no image."""
    with opened(path, str(path)) as image:
        return decoded(image)


@contextmanager
def opened(file, named: str) -> Iterator[Image.Image]:
    """Context manager that opens an image with PIL; errors on opening it and inside become a BrokenImageError."""
    try:
        with Image.open(file) as image:
            yield image
    except UNREADABLE as error:
        if isinstance(error, OSError) and error.errno and error.errno not in OF_THE_FILE:
            raise BrokenImageError(f"{named} cannot be read now ({error.strerror}): start again") from error
        raise BrokenImageError(f"{named} is not a readable image: {error}") from error


def of_readable(number: int, read: Callable[[int], T], broken: str, named: str) -> list[T]:
    """`read` of each index below `number`; unless `broken` is `fatal`, an unreadable image gets that of the next one.

    BrokenImageError, with what the images are `named`, if none can be read.
    """
    found: list[T] = []
    unread = 0
    for index in range(number):
        try:
            value = read(index)
        except BrokenImageError:
            if broken == "fatal":
                raise
            unread += 1
        else:
            found += [value] * (unread + 1)
            unread = 0
    if not found:
        raise BrokenImageError(f"none of the {number} {named} can be read")
    return found + found[:1] * unread


def decoded(image: Image.Image, background: str = "white") -> Image.Image:
    """Convert an image to upright 8-bit RGB; of several frames, the first is taken.

    The image is rotated and mirrored as its EXIF or XMP data say. A colour profile is converted to sRGB; it is ignored
    if it is damaged or belongs to another colour space, as in browsers. Transparent pixels become `background`. 16-bit
    grey values, integers from 0 to 65535, and floating-point values from 0 to 1 are scaled to 0..255; ValueError for
    other ranges.
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
        colours = Image.composite(colours, Image.new("RGB", colours.size, background), alpha)
    colours.info = {}
    return colours


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image, 1 to 8; 1 (upright) if it has none or its EXIF data are damaged."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except (*UNREADABLE, TypeError, struct.error):
        return 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Height and width of an opened image after rotation by its orientation; pixels are not decoded."""
    # Looking for an orientation that is not at the start of a PNG would decode the whole file.
    says = image.format != "PNG" or {"exif", "xmp", "XML:com.adobe.xmp"} & image.info.keys()
    return image.size if says and orientation(image) in (5, 6, 7, 8) else image.size[::-1]


def in_8_bits(image: Image.Image, file_format: str | None, tags: dict) -> Image.Image:
    """Convert grey values of more than 8 bits or in floating point to 8 bits; `tags` are those of a TIFF by number."""
    values, mode, bits = np.asarray(image), image.mode, tags.get(BITS, (16,))[0]
    low, high = values.min(), values.max()
    if mode.startswith("I;16"):
        top = 2**bits - 1
    elif mode == "I" and (file_format in ("PNG", "PPM") or (bits == 32 and low >= 0 and 255 < high <= 65535)):
        top = 65535
    elif low == high == 0 or mode == "F" and low >= 0 and high <= 1:
        top = 1
    else:
        raise ValueError(
            f"its grey values are from {low:g} to {high:g}, and their range is not known: write them with 8 or 16 "
            "bits, or as floating-point numbers from 0 to 1"
        )
    grey = np.round(values.astype(np.float32) * (255 / top)).astype(np.uint8)
    if tags.get(PHOTOMETRIC) == 0:  # 0 stands for white
        grey = 255 - grey
    found = Image.fromarray(grey)
    if "transparency" in image.info:  # the grey value that stands for transparent
        found.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return found


@lru_cache(maxsize=16)
def to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform from a colour profile to sRGB; None if it is sRGB, damaged, or not for images of this mode."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        is_srgb = (source.profile.profile_description or "").startswith("sRGB")
        if is_srgb or source.profile.xcolor_space.strip() != SPACES.get(mode):
            return None
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (OSError, ValueError, ImageCms.PyCMSError):
        return None
