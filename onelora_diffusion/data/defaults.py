"""What suits a data set where nothing is chosen: every script asks here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Defaults:
    """The values of a data set; those written here are for photographs."""

    recipe: str = "food101.yaml"
    """Of training, in configs/."""
    resolution: int = 256
    """Pixels a side of the real images."""
    features: str = "inception"
    """What generated and real images are compared by."""
    guidance_scale: float = 4.0
    """Of pictures to look at."""
    eval_guidance_scale: float = 1.5
    """Of images to measure: a distance likes less of it."""
    eval_images: int = 10_000
    eval_steps: int = 50
    compares_base: bool = False
    """Whether the base is measured beside the adapter."""


EMBEDDED = "digits"  # the data set that needs no files, and the one of every script without flags

_OF = {
    "digits": Defaults("digits.yaml", 16, "pixels", 2.0, 2.0, 500, 25, compares_base=True),
    "handwritten digits": Defaults(resolution=16, guidance_scale=2.0),
    "fashion-mnist": Defaults("fashion_mnist.yaml"),
}


def defaults_of(dataset: str | None) -> Defaults:
    """Those of a data set by its name; most have the same."""
    return _OF.get(dataset, Defaults())
