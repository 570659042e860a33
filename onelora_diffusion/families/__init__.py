"""The families of diffusion transformers, one file each, chosen by the transformer's class; or a recorded family."""

from pathlib import Path

from onelora_diffusion.denoisers import denoiser_of
from onelora_diffusion.families.dit import DiT
from onelora_diffusion.families.family import Conditions, Edit, Family
from onelora_diffusion.families.flux import Flux
from onelora_diffusion.families.pixart import PixArt
from onelora_diffusion.families.recorded import Recorded
from onelora_diffusion.families.references import choose_references, references_of
from onelora_diffusion.families.sana import Sana
from onelora_diffusion.families.sd3 import StableDiffusion3
from onelora_diffusion.injection.book import unwrapped

__all__ = ["FAMILIES", "Conditions", "Edit", "Family", "Recorded", "choose_references", "family_named", "family_of"]

FAMILIES: tuple[Family, ...] = (DiT(), PixArt(), StableDiffusion3(), Flux(), Sana())


def family_of(pipeline, records: Path | None = None) -> Family:
    """The family of a pipeline's denoiser, recorded from the pipeline where no file here has it.

    Args:
        records: the folder in which what is recorded is kept.

    Raises:
        ValueError: the pipeline cannot be recorded, or is none.
    """
    # Sharding or wrapping a model may give it a subclass of its class.
    classes = [each.__name__ for each in type(unwrapped(denoiser_of(pipeline))).__mro__]
    known = {family.transformer_class for family in FAMILIES}
    if references_of(pipeline) or not known & set(classes) and hasattr(pipeline, "scheduler"):
        return recorded_of(pipeline, records)
    family = family_named(next((name for name in classes if name in known), classes[0]))
    family.check(pipeline)
    return family


def recorded_of(pipeline, records: Path | None = None) -> Recorded:
    """The family that was recorded from this pipeline, with the denoiser that it has now."""
    family = vars(pipeline).get("_onelora_family")  # kept there: once trained, it has no text encoders to be asked
    is_other = family is None or family.denoiser is not unwrapped(denoiser_of(pipeline))
    if is_other or family.record.references != references_of(pipeline):
        family = vars(pipeline)["_onelora_family"] = Recorded(pipeline, records)
    return family


def family_named(transformer_class: str) -> Family:
    """The family that has transformers of this class; ValueError if it is none of those that are known here."""
    for family in FAMILIES:
        if family.transformer_class == transformer_class:
            return family
    known = ", ".join(f"{family.name} ({family.transformer_class})" for family in FAMILIES)
    what = "no transformer" if transformer_class == "NoneType" else f"a {transformer_class}"
    raise ValueError(f"the pipeline has {what}, of no family that is known here: {known}")
