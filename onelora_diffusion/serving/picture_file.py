"""PNG files that hold the settings they were drawn by, in a text chunk."""

import io
import json

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

KEY = "onelora"  # name of the text chunk


def png_of(picture: Tensor, settings: dict) -> bytes:
    """The PNG file of a picture (size, size, 3) uint8, with its settings as JSON in a text chunk."""
    text, file = PngInfo(), io.BytesIO()
    text.add_text(KEY, json.dumps(settings))
    Image.fromarray(picture.numpy()).save(file, "png", pnginfo=text)
    return file.getvalue()
