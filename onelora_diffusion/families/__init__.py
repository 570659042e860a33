"""What differs between diffusion transformers: one file each; for prompts, chosen by the transformer's class."""

from onelora_diffusion.families.family import Family, Prompts
from onelora_diffusion.families.flux import Flux
from onelora_diffusion.families.pixart import PixArt
from onelora_diffusion.families.sana import Sana
from onelora_diffusion.families.sd3 import StableDiffusion3

__all__ = ["FAMILIES", "Family", "Prompts", "family_named", "family_of"]

FAMILIES: tuple[Family, ...] = (PixArt(), StableDiffusion3(), Flux(), Sana())


def family_of(pipeline) -> Family:
    """The family of a pipeline's transformer; ValueError if it is none of those that are known here."""
    family = family_named(type(getattr(pipeline, "transformer", None)).__name__)
    family.check(pipeline)
    return family


def family_named(transformer_class: str) -> Family:
    """The family that has transformers of this class; ValueError if it is none of those that are known here."""
    for family in FAMILIES:
        if family.transformer_class == transformer_class:
            return family
    known = ", ".join(f"{family.name} ({family.transformer_class})" for family in FAMILIES)
    what = "no transformer" if transformer_class == "NoneType" else f"a {transformer_class}"
    raise ValueError(f"the pipeline has {what}, of no family that is known here: {known}")
