"""The public functions on a model with adapters."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from onelora_diffusion.adapters.weights import Weight
from onelora_diffusion.config import AdapterConfig
from onelora_diffusion.injection.attaching import attach_adapter, build_adapter, state_dict_of
from onelora_diffusion.injection.book import adapters_of, check_name, unwrapped


def inject_adapter(model: nn.Module, config: AdapterConfig, adapter_name: str = "default") -> nn.Module:
    """Freeze a base model and add a trainable adapter, which does not change the output at first.

    The base's layers stay the same, and each adapted layer has a child module `onelora`. Earlier adapters of the model
    stay, frozen and inactive (see `train_adapters`, `set_adapters`). It also works on the meta device.

    Args:
        model: `DiTTransformer2DModel`, or any module with linear layers; changed in place.
        config: the settings of the adapter.
        adapter_name: a new name without dots.

    Returns:
        `model`, in which exactly the adapter's parameters require gradients, in fp32.

    Raises:
        TypeError: `model` is a pipeline, or `config` no `AdapterConfig`.
        ValueError: the name is in use, a target matches no layer, or a class table is to be trained in a model
            without class embeddings. The model is not changed then.
    """
    check_name(model, adapter_name)
    if not isinstance(config, AdapterConfig):
        raise TypeError(f"the config is an AdapterConfig, as in AdapterConfig(method='1lora'), not {config!r:.60}")
    inner = unwrapped(model)
    attach_adapter(inner, config, adapter_name, build_adapter(inner, config))
    return model


def unload_adapter(model: nn.Module, adapter_name: str | None = None) -> nn.Module:
    """Remove one adapter, or all (None). Without adapters the model is the plain base again, bit for bit.

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
    """Activate the named adapters: the model computes with the weighted sum of their vectors.

    A weighted sum of 1LoRA adapters is a 1LoRA adapter, so n of them cost as much as one. Class tables are not summed:
    the last named adapter with a table and a weight other than 0 provides the classes.

    Args:
        adapter_names: None takes the active adapter, whose weight is changed.
        weights: one for all adapters or one for each: a number, or numbers by block, such as
            `{"transformer_blocks.3": 0.5, "*.attn1": 0.0}`. The longest matching key counts, and layers without one
            have weight 1.

    Raises:
        ValueError: a name or block is unknown, a weight is not finite, the numbers of names and weights differ, or a
            name is given twice with two weights. Nothing is changed then.
    """
    adapters_of(model).serve(adapter_names, weights)
    return model


def train_adapters(model: nn.Module, adapter_names: str | Sequence[str] | None = None) -> nn.Module:
    """Make the named adapters trainable, and no others of the model; which ones are active does not change.

    `inject_adapter` makes the new adapter trainable. No other function changes which adapters train: neither loading,
    combining, hot-swapping, activating and merging adapters, nor unloading others. If none was injected or named here,
    the adapter that was loaded last trains.

    Args:
        adapter_names: None takes the active adapter; with an empty list none trains.

    Raises:
        ValueError: a name is unknown.
    """
    book = adapters_of(model)
    with book.lock:
        book.train(book.choose_all(adapter_names))
    return model


def adapter_state_dict(model: nn.Module, adapter_name: str | None = None) -> dict[str, torch.Tensor]:
    """The trained tensors of an adapter (not copies), by their names in an adapter file without its prefix.

    Args:
        adapter_name: None takes the active adapter.
    """
    book = adapters_of(model)
    return state_dict_of(book.adapters[book.choose(adapter_name)])


def count_trainable(model: nn.Module) -> int:
    """The number of weights that require gradients; shared ones count once."""
    return sum(parameter.numel() for parameter in unwrapped(model).parameters() if parameter.requires_grad)


class Part(NamedTuple):
    """The number of trained weights in one kind of layer, and their share of all trained weights."""

    count: int
    share: float


def trainable_parts(model: nn.Module) -> dict[str, Part]:
    """The weights that `count_trainable` counts, by kind of layer: its path with `*` for the number of a block."""
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
