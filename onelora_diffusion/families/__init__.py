"""The families of diffusion transformers, one file each, chosen by the transformer's class; or a recorded family."""

from pathlib import Path

from onelora_diffusion.denoisers import denoiser_of
from onelora_diffusion.families.dit import DiT
from onelora_diffusion.families.family import Conditions, Edit, Family
from onelora_diffusion.families.flux import Flux
from onelora_diffusion.families.modular import Modular
from onelora_diffusion.families.pixart import PixArt
from onelora_diffusion.families.recorded import Recorded
from onelora_diffusion.families.references import choose_references, references_of
from onelora_diffusion.families.sana import Sana
from onelora_diffusion.families.sd3 import StableDiffusion3
from onelora_diffusion.injection.book import unwrapped

__all__ = ["FAMILIES", "Conditions", "Edit", "Family", "Recorded", "WRITTEN", "choose_references", "family_of"]

FAMILIES: tuple[Family, ...] = (DiT(), PixArt(), StableDiffusion3(), Flux(), Sana())
WRITTEN = {family.transformer_class: family for family in FAMILIES}
"""The families that have a file here; every other one is recorded."""


def family_of(pipeline, records: Path | None = None) -> Family:
    """The family of a pipeline's denoiser, recorded from the pipeline where no file here has it.

    Args:
        records: the folder in which what is recorded is kept.

    Raises:
        ValueError: it cannot be recorded, with the reason.
    """
    # Sharding or wrapping a model may give it a subclass of its class.
    classes = [each.__name__ for each in type(unwrapped(denoiser_of(pipeline))).__mro__]
    family = next((WRITTEN[name] for name in classes if name in WRITTEN), None)
    if family is None and not hasattr(pipeline, "scheduler"):
        raise ValueError(
            f"{type(pipeline).__name__} has a {classes[0]} and no scheduler: give a pipeline of diffusers"
        )
    if references_of(pipeline) or family is None or isinstance(pipeline, Modular):
        return recorded_of(pipeline, records)
    family.check(pipeline)
    return family


def recorded_of(pipeline, records: Path | None = None) -> Recorded:
    """The family that was recorded from this pipeline, with the denoiser that it has now."""
    family = vars(pipeline).get("_onelora_family")  # kept there: once trained, it has no text encoders to be asked
    is_other = family is None or family.denoiser is not unwrapped(denoiser_of(pipeline))
    if is_other or family.record.references != references_of(pipeline):
        family = vars(pipeline)["_onelora_family"] = Recorded(pipeline, records)
    return family
