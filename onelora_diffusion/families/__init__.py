"""What differs between diffusion transformers: one file each, chosen by the transformer's class."""

from torch import nn

from onelora_diffusion.families.dit import DiT
from onelora_diffusion.families.family import Conditions, Family
from onelora_diffusion.families.flux import Flux
from onelora_diffusion.families.pixart import PixArt
from onelora_diffusion.families.sana import Sana
from onelora_diffusion.families.sd3 import StableDiffusion3
from onelora_diffusion.injection.book import unwrapped

__all__ = ["FAMILIES", "Conditions", "Family", "family_named", "family_of"]

FAMILIES: tuple[Family, ...] = (DiT(), PixArt(), StableDiffusion3(), Flux(), Sana())


def family_of(pipeline) -> Family:
    """The family of a pipeline's transformer; ValueError if it is none of those that are known here."""
    transformer = getattr(pipeline, "transformer", None)
    # Whoever shares out or wraps a model may give it a class of its own, below the model's.
    classes = type(unwrapped(transformer) if isinstance(transformer, nn.Module) else transformer).__mro__
    known = {family.transformer_class for family in FAMILIES}
    family = family_named(next((each.__name__ for each in classes if each.__name__ in known), classes[0].__name__))
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
