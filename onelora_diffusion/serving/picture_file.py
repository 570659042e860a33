"""A PNG with the settings that it was drawn by inside, in a text chunk, from which they come back."""

import json
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from onelora_diffusion.serving.request import Request
from onelora_diffusion.storage.opening import strict_json

KEY = "onelora"  # of the text chunk
MAX_SETTINGS = 100_000  # characters


def picture_with_settings(picture: Tensor, request: Request, base: str) -> Image.Image:
    """(size, size, 3) uint8 -> an image whose `info` goes into the text chunks of a PNG."""
    image = Image.fromarray(picture.numpy())
    image.info[KEY] = json.dumps({"base": base, "request": request.as_json()})
    return image


def request_of(path: str | Path) -> tuple[Request, str]:
    """(the request that a PNG was drawn by, the base that drew it).

    Raises:
        ValueError: no PNG, or one without settings of ours, or with some that are none.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.load()  # text may stand behind the pixels
            return request_of_image(image, Path(path).name)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{Path(path).name} is no PNG that can be read") from error


def request_of_image(image: Image.Image, name: str = "the picture") -> tuple[Request, str]:
    """The same of an image that is read already; `name` is how errors call it."""
    text = image.info.get(KEY)
    if not isinstance(text, str) or len(text) > MAX_SETTINGS:
        raise ValueError(f"{name} has no settings of a picture in it: give a PNG that was saved here, as it was saved")
    values = strict_json(text, name)
    if not isinstance(values, dict) or not isinstance(values.get("base"), str):
        raise ValueError(f"{name} has settings in it that are none of a picture's")
    return Request.from_json(values.get("request")), values["base"]
