"""What suits a data set where nothing is chosen."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Defaults:
    guidance_scale: float = 4.0
    """Of pictures to look at."""


_OF = {"digits": Defaults(guidance_scale=2.0)}


def defaults_of(dataset: str | None) -> Defaults:
    """Those of a data set by its name; most have the same."""
    return _OF.get(dataset, Defaults())
