"""PNG files that hold the request they were drawn by, in a text chunk."""

import json
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from onelora_diffusion.serving.request import Request
from onelora_diffusion.storage.opening import strict_json

KEY = "onelora"  # name of the text chunk
MAX_SETTINGS = 100_000  # characters


def picture_with_settings(picture: Tensor, request: Request, base: str) -> Image.Image:
    """The image of a picture (size, size, 3) uint8, with its request in `info`, which a PNG saves as a text chunk."""
    image = Image.fromarray(picture.numpy())
    image.info[KEY] = json.dumps({"base": base, "request": request.as_json()})
    return image


def request_of(path: str | Path) -> tuple[Request, str]:
    """The request that a PNG was drawn by, and the name of the base that drew it.

    Raises:
        ValueError: the file is no PNG, or has no valid request in it.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.load()  # the text chunk may come after the pixels
            return request_of_image(image, Path(path).name)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{Path(path).name} is no PNG that can be read") from error


def request_of_image(image: Image.Image, name: str = "the picture") -> tuple[Request, str]:
    """The request and base of an image that is open already; errors call it `name`."""
    text = image.info.get(KEY)
    if not isinstance(text, str) or len(text) > MAX_SETTINGS:
        raise ValueError(f"{name} has no settings of a picture in it: give a PNG that was saved here, as it was saved")
    values = strict_json(text, name)
    if not isinstance(values, dict) or not isinstance(values.get("base"), str):
        raise ValueError(f"{name} has settings in it, but not those of a picture")
    return Request.from_json(values.get("request")), values["base"]
