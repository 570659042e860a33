"""The verbs on a model with adapters."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from onelora_diffusion.adapters.weights import Weight
from onelora_diffusion.config import AdapterConfig
from onelora_diffusion.injection.attaching import attach_adapter, build_adapter, state_dict_of
from onelora_diffusion.injection.book import adapters_of, check_name, unwrapped


def inject_adapter(model: nn.Module, config: AdapterConfig, adapter_name: str = "default") -> nn.Module:
    """Freeze a base model and add a trainable adapter, which leaves its output as it was.

    Base layers stay where and what they are; an adapter is a child, `onelora`, of the layer it serves.
    Earlier adapters of the model stay, frozen and inactive (`train_adapters`, `set_adapters`). Works on the meta
    device.

    Args:
        model: `DiTTransformer2DModel`, or any module with linear layers; changed in place.
        config: what is trained, and where.
        adapter_name: a new name without dots.

    Returns:
        `model`; its parameters that require gradients are exactly the adapter's, in fp32.

    Raises:
        TypeError: `model` is a pipeline, or `config` no `AdapterConfig`.
        ValueError: the name is in use, a target matches no layer, or a class table is asked of a model
            without class embeddings. The model is left as it was.
    """
    check_name(model, adapter_name)
    if not isinstance(config, AdapterConfig):
        raise TypeError(f"the config is an AdapterConfig, as in AdapterConfig(method='1lora'), not {config!r:.60}")
    inner = unwrapped(model)
    attach_adapter(inner, config, adapter_name, build_adapter(inner, config))
    return model


def unload_adapter(model: nn.Module, adapter_name: str | None = None) -> nn.Module:
    """Remove an adapter, or every one; after the last the model is the plain base, bit for bit.

    Merged weights are unmerged first.
    """
    book = adapters_of(model)
    names = list(book.adapters) if adapter_name is None else [book.check_present(adapter_name)]
    book.unload(names)
    return model


def set_adapters(
    model: nn.Module,
    adapter_names: str | Sequence[str] | None = None,
    weights: Weight | Sequence[Weight] | None = None,
) -> nn.Module:
    """Let the named adapters serve together: their vectors are summed with these weights.

    A weighted sum of 1LoRA adapters is a 1LoRA adapter, so that n of them cost what one costs. Class tables are
    not summed: the last named adapter that brought one and weighs other than 0 serves its classes.

    Args:
        adapter_names: None: the one that is active, to which `weights` gives another weight.
        weights: one for all or one for each: a number, or numbers by block, such as
            `{"transformer_blocks.3": 0.5, "*.attn1": 0.0}`, where the longest key that fits counts and 1 is
            the weight of all that no key names.

    Raises:
        ValueError: an unknown name or block, a weight that is no finite number, as many weights as there are not
            names, or a name twice with a weight for each. Nothing is changed then.
    """
    adapters_of(model).serve(adapter_names, weights)
    return model


def train_adapters(model: nn.Module, adapter_names: str | Sequence[str] | None = None) -> nn.Module:
    """Let the named adapters train, and no others of the model; which of them serve is another matter.

    `inject_adapter` lets the new adapter train. No other verb changes what trains: not loading beside it, combining,
    hot-swapping, serving others, merging or unloading another. Until one is injected or named here, it is the adapter
    that was loaded last.

    Args:
        adapter_names: None: the one that is active. An empty list: none trains.

    Raises:
        ValueError: an unknown name.
    """
    book = adapters_of(model)
    with book.turn:
        book.train(book.choose_all(adapter_names))
    return model


def adapter_state_dict(model: nn.Module, adapter_name: str | None = None) -> dict[str, torch.Tensor]:
    """The trained tensors of an adapter, live, by their names in an adapter file (without its prefix).

    Args:
        adapter_name: None: the one that is active.
    """
    book = adapters_of(model)
    return state_dict_of(book.adapters[book.choose(adapter_name)])


def count_trainable(model: nn.Module) -> int:
    """The number of weights that require gradients; each shared one counts once."""
    return sum(parameter.numel() for parameter in unwrapped(model).parameters() if parameter.requires_grad)


class Part(NamedTuple):
    """The weights that are trained in one kind of layer, and their share of all that are."""

    count: int
    share: float


def trainable_parts(model: nn.Module) -> dict[str, Part]:
    """What `count_trainable` counts, by kind of layer: its path, with `*` for the number of a block."""
    inner = unwrapped(model)
    adapters = inner._onelora.adapters.values() if hasattr(inner, "_onelora") else ()
    layers = {id(p): path for adapter in adapters for path, module in adapter.items() for p in module.parameters()}
    counts: dict[str, int] = {}
    for name, parameter in inner.named_parameters():
        if parameter.requires_grad:
            path = layers.get(id(parameter), name.rpartition(".")[0])
            part = ".".join("*" if word.isdigit() else word for word in path.split("."))
            counts[part] = counts.get(part, 0) + parameter.numel()
    total = sum(counts.values())
    return {part: Part(count, count / total) for part, count in counts.items()}
