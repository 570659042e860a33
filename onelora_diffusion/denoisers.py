"""The denoiser of a pipeline of diffusers, its transformer or UNet, and its blocks; what decodes its latents."""

from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor, nn

DENOISERS = ("transformer", "transformer_2", "unet")  # Wan 2.2 has two transformers, used one after the other
BOTH = "both"


class TwoDenoisers(nn.Module):
    """Two denoisers as one model with the adapters of both, which calls the one that is named.

    Args:
        parts: the denoisers by the name of their component, by which the paths of their layers begin.
    """

    def __init__(self, parts: dict[str, nn.Module]):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.config = next(self.children()).config

    def forward(self, component: str, **arguments):
        return self.get_submodule(component)(**arguments)

    def enable_gradient_checkpointing(self) -> None:
        for part in self.children():
            part.enable_gradient_checkpointing()


class Pixels(nn.Module):
    """In the place of the autoencoder of a pipeline that draws pixels: latents are images themselves, from -1 to 1."""

    config: ClassVar[dict] = {}

    def __init__(self):
        super().__init__()
        self.register_buffer("at", torch.zeros(()), persistent=False)  # says a device and a precision

    device, dtype = (property(lambda self, name=name: getattr(self.at, name)) for name in ("device", "dtype"))

    def encode(self, images: Tensor):
        return SimpleNamespace(latents=images)

    def decode(self, latents: Tensor):
        return SimpleNamespace(sample=latents)


def denoisers_in(pipeline) -> dict[str, nn.Module]:
    """The denoisers of a pipeline by the name of the component."""
    parts = {name: getattr(pipeline, name, None) for name in DENOISERS}
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


def guides_in(pipeline) -> dict[str, nn.Module]:
    """Other models of the denoisers' class in a pipeline, by which it may guide, by the name of the component."""
    known = denoisers_in(pipeline)
    kinds = {type(part) for part in known.values()}
    return {name: part for name, part in pipeline.components.items() if type(part) in kinds and name not in known}


def choose_denoiser(pipeline, name: str | None) -> None:
    """Let `denoiser_of` answer the component `name` of a pipeline with two denoisers, or both; None for one of one.

    ValueError if the pipeline has no such component, or has two and none is named.
    """
    there = denoisers_in(pipeline)
    if name is None and len(there) > 1:
        raise ValueError(f"{type(pipeline).__name__} has {' and '.join(there)}: choose one, or both, by --denoisers")
    if name == BOTH and len(there) > 1:
        vars(pipeline)["_onelora_both"] = TwoDenoisers(there)
    elif name is not None and name not in there:
        raise ValueError(f"{type(pipeline).__name__} has no {name}; it has {' and '.join(there) or 'no denoiser'}")
    vars(pipeline)["_onelora_denoiser"] = name


def denoiser_name(pipeline) -> str:
    """The component of a pipeline that denoises: the chosen one of two, or the first; ValueError if it has none."""
    name = vars(pipeline).get("_onelora_denoiser")
    if name in (None, BOTH):
        name = next(iter(denoisers_in(pipeline)), None)
    if name is None:
        raise ValueError(f"{type(pipeline).__name__} has neither a transformer nor a unet")
    return name


def denoiser_of(pipeline) -> nn.Module:
    """The model that adapters are in: the denoiser, the chosen one of two, or both as one."""
    if vars(pipeline).get("_onelora_denoiser") == BOTH:
        return vars(pipeline)["_onelora_both"]
    return getattr(pipeline, denoiser_name(pipeline))


def autoencoder_name(pipeline) -> str | None:
    """The component of a pipeline that decodes latents: `vae`, or one that encodes as well; None: it draws pixels."""
    both = [name for name, part in pipeline.components.items() if hasattr(part, "encode") and hasattr(part, "decode")]
    return next(iter(sorted((n for n in both if isinstance(getattr(pipeline, n), nn.Module)), key="vae".__ne__)), None)


def autoencoder_of(pipeline) -> nn.Module:
    """The model that makes latents of images and images of latents."""
    name = autoencoder_name(pipeline)
    return getattr(pipeline, name) if name else vars(pipeline).setdefault("_onelora_pixels", Pixels())


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model in the order of its `repeated_blocks`."""
    return [block for path in repeated_blocks(model) for block in model.get_submodule(path)]


def repeated_blocks(model: nn.Module) -> tuple[str, ...]:
    """Paths of the outermost lists of a model's blocks: of the classes that it names, or else of one class each.

    A block is a module with linear layers in it, which a layer is not.
    """
    named = set(getattr(model, "_repeated_blocks", None) or ())
    return _lists_of_blocks(model, named) or _lists_of_blocks(model, set())


def _lists_of_blocks(model: nn.Module, named: set[str]) -> tuple[str, ...]:
    """Those of the classes that are `named`; of an empty set, those of one class each."""
    lists = {path: module for path, module in model.named_modules() if path and isinstance(module, nn.ModuleList)}
    found = []
    for path, module in lists.items():
        classes = {type(entry).__name__ for entry in module}
        is_one = classes <= named if named else len(classes) == 1
        is_inner = any(path.startswith(f"{outer}.") for outer in found)
        parts = (part for entry in module for part in entry.modules() if part is not entry)
        if classes and is_one and not is_inner and any(isinstance(part, nn.Linear) for part in parts):
            found.append(path)
    return tuple(found)
