"""What differs between text-to-image transformers: one file each, chosen by the transformer's class."""

from onelora_diffusion.families.family import Family, Prompts
from onelora_diffusion.families.flux import Flux
from onelora_diffusion.families.pixart import PixArt
from onelora_diffusion.families.sana import Sana
from onelora_diffusion.families.sd3 import StableDiffusion3

__all__ = ["FAMILIES", "Family", "Prompts", "family_of"]

FAMILIES: tuple[Family, ...] = (PixArt(), StableDiffusion3(), Flux(), Sana())


def family_of(pipeline) -> Family:
    """The family of a pipeline's transformer; ValueError if it is none of those that are known here."""
    found = type(getattr(pipeline, "transformer", None)).__name__
    for family in FAMILIES:
        if family.transformer_class == found:
            family.check(pipeline)
            return family
    known = ", ".join(f"{family.name} ({family.transformer_class})" for family in FAMILIES)
    what = "has no transformer" if found == "NoneType" else f"has a {found}"
    raise ValueError(f"{type(pipeline).__name__} {what}, of no family that is known here: {known}")
