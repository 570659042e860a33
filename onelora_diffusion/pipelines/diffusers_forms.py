"""The forms of diffusers' API: weights by component, lists of components, methods that are called on the class."""

import logging
import re
import types
from collections.abc import Iterable

from onelora_diffusion.adapters.weights import Weight, by_path

logger = logging.getLogger(__name__)

LORA_LAYERS = re.compile(r"(transformer(?:_2)?|unet|text_encoder(?:_\d+)?)_lora_(layers|adapter_metadata)")
TEXT_ENCODER = re.compile(r"text_encoder(_\d+)?")


class on_the_class_too:
    """Decorator for a method that can also be called on the class; `self` is the class then."""

    def __init__(self, method):
        self.method = method

    def __get__(self, instance, owner):
        return types.MethodType(self.method, owner if instance is None else instance)


def weight_of(weight: float | dict | None, component: str, components: Iterable[str]) -> Weight:
    """Select the weight of one of the components from a weight that may be given by component and by block.

    Weights for text encoders are ignored with a warning.
    """
    if isinstance(weight, dict):
        if left := [name for name in weight if TEXT_ENCODER.fullmatch(name)]:
            logger.warning("weights of %s are left out: adapters here have none for it", ", ".join(left))
        weight = {name: value for name, value in weight.items() if name not in left} or None
    if isinstance(weight, dict) and set(weight) <= set(components):
        weight = weight.get(component)
    return 1.0 if weight is None else by_path(weight) if isinstance(weight, dict) else weight


def lora_layers(given: dict[str, dict | None]) -> tuple[dict[str, dict], dict[str, dict | None]]:
    """(LoRA layers by component, PEFT's settings by component) of the keyword arguments of `save_lora_weights`."""
    found = {name: LORA_LAYERS.fullmatch(name) for name in given}
    if unknown := [name for name, match in found.items() if match is None]:
        raise ValueError(f"save_lora_weights takes no {unknown[0]}: give those of a component, as in unet_lora_layers")
    layers, settings = (
        {match[1]: given[name] for name, match in found.items() if match[2] == kind}
        for kind in ("layers", "adapter_metadata")
    )
    layers = {component: tensors for component, tensors in layers.items() if tensors is not None}
    return layers, settings


def check_components(components: list[str] | None, own: Iterable[str]) -> None:
    """ValueError unless this is a list of a pipeline's own components and text encoders."""
    if components is None:
        return
    is_list = isinstance(components, list | tuple)
    known = [name in own or TEXT_ENCODER.fullmatch(name) for name in components] if is_list else []
    if True not in known or not all(known):
        raise ValueError(
            f"components {components!r}: adapters are in {in_words(own)} only; adapters are named by adapter_names, "
            "and weighed by lora_scale"
        )


def in_words(components: Iterable[str]) -> str:
    return " and ".join(f"'{name}'" for name in components)
