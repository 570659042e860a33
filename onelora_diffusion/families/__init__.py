"""The families of denoisers: those of the table, by the denoiser's class; any other is recorded from its pipeline."""

from pathlib import Path

from onelora_diffusion.denoisers import denoiser_of
from onelora_diffusion.families.dit import DiT
from onelora_diffusion.families.family import Conditions, Edit, Family, Sized
from onelora_diffusion.families.given import draws_from_first_frame
from onelora_diffusion.families.recorded import Recorded
from onelora_diffusion.families.references import choose_references, references_of
from onelora_diffusion.injection.book import unwrapped

__all__ = [
    "FAMILIES",
    "Conditions",
    "Edit",
    "Family",
    "Recorded",
    "Sized",
    "choose_references",
    "draws_from_first_frame",
    "family_of",
    "references_of",
]

FAMILIES: tuple[Family, ...] = (DiT(),)
"""The families that have a file here; every other one is recorded."""


def family_of(pipeline, records: Path | None = None) -> Family:
    """The family of a pipeline's denoiser, recorded from the pipeline where it is none of the table.

    Args:
        records: the folder in which what is recorded is kept.

    Raises:
        ValueError: it cannot be recorded, with the reason.
    """
    # Sharding or wrapping a model may give it a subclass of its class.
    classes = [each.__name__ for each in type(unwrapped(denoiser_of(pipeline))).__mro__]
    family = next((family for family in FAMILIES if family.transformer_class in classes), None)
    if family is None and not hasattr(pipeline, "scheduler"):
        raise ValueError(
            f"{type(pipeline).__name__} has a {classes[0]} and no scheduler: give a pipeline of diffusers"
        )
    return recorded_of(pipeline, records) if family is None else family


def recorded_of(pipeline, records: Path | None = None) -> Recorded:
    """The family that was recorded from this pipeline, with the denoiser that it has now."""
    family = vars(pipeline).get("_onelora_family")  # kept there: once trained, it has no text encoders to be asked
    is_other = family is None or family.denoiser is not unwrapped(denoiser_of(pipeline))
    if is_other or family.record.references != references_of(pipeline):
        family = vars(pipeline)["_onelora_family"] = Recorded(pipeline, records)
    return family
