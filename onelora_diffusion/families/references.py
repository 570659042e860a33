"""The reference images of a pipeline that edits."""

import inspect
from collections.abc import Iterable

from PIL import Image

# Arguments of pipelines that are reference images: the first of them that a call has.
REFERENCES = ("image", "images", "reference_image", "reference_images", "ref_image", "control_image", "input_images")
BLANK = (64, 64)  # width and height of the reference images of probes


def choose_references(pipeline, number: int) -> None:
    """Let a pipeline be recorded with so many reference images; ValueError if its call takes none."""
    vars(pipeline)["_onelora_references"] = number
    if number and taken_by(pipeline) is None:
        raise ValueError(f"{type(pipeline).__name__} takes no reference images, and each prompt is given {number}")


def taken_by(pipeline) -> str | None:
    """The argument of a pipeline's call that is its reference images."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    return next((name for name in REFERENCES if name in parameters), None)


def references_of(pipeline) -> int:
    """The number of reference images with which a pipeline is recorded."""
    return vars(pipeline).get("_onelora_references", 0)


def blank(sizes: Iterable[tuple[int, int]]) -> list[Image.Image]:
    """Black pictures of these sizes, (width, height)."""
    return [Image.new("RGB", tuple(size)) for size in sizes]
