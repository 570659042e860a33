"""Fold adapters into the base weights, take them out again, and write a model as plain diffusers has it."""

import torch
from torch import nn

from onelora_diffusion.adapters.layer import LayerAdapters
from onelora_diffusion.adapters.swap import SwappedParameters
from onelora_diffusion.injection import adapters_of


@torch.no_grad()
def merge_adapter(
    model: nn.Module, adapter_names: str | list[str] | None = None, *, safe_merging: bool = True
) -> nn.Module:
    """Fold adapters into the base weights: W = γ ⊙ (W0 + b 1ᵀ), in fp32, then cast to the base's dtype.

    A merged model has the base's operators and no others. The original weights wait in host memory.

    Args:
        adapter_names: which adapters; None: those that serve, with their weights.
        safe_merging: refuse, with nothing changed, if a merged weight is not finite.

    Raises:
        ValueError: unknown name, already merged, nothing to merge, or weights that are not finite.
    """
    book = adapters_of(model)
    if book.merged is not None:
        raise ValueError(f"adapters {', '.join(book.merged)} are already merged: unmerge them first")
    names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
    weights = book.weights if names is None else {book.known(name): book.weights.get(name, 1.0) for name in names}
    if not weights:
        raise ValueError("no adapter is active: name the adapters to merge")

    before = book.weights
    book.activate(weights)
    merged = {}
    for path, layer in book.served_layers().items():
        if isinstance(layer.onelora, LayerAdapters):
            bias = torch.zeros(layer.out_features, device=layer.weight.device) if layer.bias is None else layer.bias
            merged[path] = layer.onelora.merged(layer.weight.float(), bias.float())
            if safe_merging and not all(torch.isfinite(tensor).all() for tensor in merged[path]):
                book.activate(before)
                raise ValueError(f"merging {', '.join(weights)} into {path} gives NaN or infinity: nothing was merged")

    for path, (weight, bias) in merged.items():
        layer = model.get_submodule(path)
        book.originals[path] = (
            layer.weight.detach().cpu().clone(),
            None if layer.bias is None else layer.bias.detach().cpu().clone(),
        )
        layer.weight.copy_(weight)
        if layer.bias is not None:
            layer.bias.copy_(bias)
        elif bias.any():
            layer.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=False)
    book.merged = dict(weights)
    book.remove_hooks()
    return model


@torch.no_grad()
def unmerge_adapter(model: nn.Module) -> nn.Module:
    """Restore the base weights bit for bit; the adapters that were merged serve again."""
    book = adapters_of(model)
    if book.merged is None:
        raise ValueError("no adapter is merged")
    for path, (weight, bias) in book.originals.items():
        layer = model.get_submodule(path)
        layer.weight.copy_(weight)
        if bias is None:
            layer.bias = None
        else:
            layer.bias.copy_(bias)
    book.originals = {}
    book.merged = None
    book.add_hooks()
    return model


def stock_state_dict(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's state dict without adapters, as stock diffusers loads it.

    Unmerged, it is the base's. Merged, it is the adapted model's: new classes come first in the class table,
    and the null row stays last, where `DiTPipeline` looks for it.

    Raises:
        ValueError: the merged adapter has more classes than the base's table has room for.
    """
    book = adapters_of(model)
    stock = {k: v for k, v in state_dict.items() if ".onelora." not in k and ".to_qkv." not in k}
    if book.merged is None:
        for path, layer in book.served_layers().items():
            if isinstance(layer.onelora, SwappedParameters):
                stock |= {f"{path}.{name}": tensor.detach() for name, tensor in layer.onelora.base.items()}
    elif book.conditioning is not None and (table := book.conditioning.active_table()) is not None:
        for key in [key for key in stock if key.endswith("class_embedder.embedding_table.weight")]:
            stock[key] = _padded_table(table.detach(), stock[key])

    seen = set()
    for key, tensor in stock.items():  # safetensors writes no tensor twice: shared ones become copies
        storage = tensor.untyped_storage().data_ptr()
        stock[key] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return stock


def _padded_table(table: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    if len(table) > len(base):
        raise ValueError(
            f"the adapter has {len(table) - 1} classes, but the base's class table only has room for {len(base) - 1}"
        )
    padded = table[-1].to(base).repeat(len(base), 1)
    padded[: len(table) - 1] = table[:-1].to(base)
    return padded
