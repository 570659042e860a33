"""Fold adapters into the base weights, take them out again, and write a model as plain diffusers has it."""

import torch
from torch import nn

from onelora_diffusion.injection.book import AdapterBook, adapters_of


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
    try:
        merged = _merged_layers(book)
        if safe_merging:
            _check_finite(book, merged, names=list(weights))
    except ValueError:
        book.activate(before)
        raise

    layers = {path: model.get_submodule(path) for path in merged}
    for path, layer in layers.items():  # all before the first is changed: q, k and v are views of a fused to_qkv
        bias = None if layer.bias is None else layer.bias.detach().cpu().clone()
        book.originals[path] = layer.weight.detach().cpu().clone(), bias
    for layer in book.swapped.values():
        layer.onelora_swap.merge(layer)
    for path, (weight, bias) in merged.items():
        layers[path].weight.copy_(weight)
        if layers[path].bias is not None:
            layers[path].bias.copy_(bias)
        elif bias.any():
            layers[path].bias = nn.Parameter(bias.to(layers[path].weight.dtype), requires_grad=False)
    book.merged = dict(weights)
    book.remove_hooks()
    return model


def _merged_layers(book: AdapterBook) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """path -> fp32 weight and bias of every linear layer with its active adapters folded in."""
    merged = {}
    for path, layer in book.served_layers().items():
        if not layer.onelora.active:
            continue
        weight = layer.weight.float()
        bias = torch.zeros(layer.out_features, device=weight.device) if layer.bias is None else layer.bias.float()
        parent, _, name = path.rpartition(".")
        if name in ("to_q", "to_k", "to_v") and f"{parent}.to_qkv" in merged:  # served after the three as one
            part = ("to_q", "to_k", "to_v").index(name)
            weight, bias = (tensor.chunk(3)[part] for tensor in merged[f"{parent}.to_qkv"])
        merged[path] = layer.onelora.merged(weight, bias)
    return merged


def _check_finite(book: AdapterBook, merged: dict[str, tuple[torch.Tensor, torch.Tensor]], names: list[str]) -> None:
    swapped = {path: layer.parameters(recurse=False) for path, layer in book.swapped.items()}
    for path, tensors in (swapped | merged).items():
        if not all(torch.isfinite(tensor).all() for tensor in tensors):
            raise ValueError(f"merging {', '.join(names)} into {path} gives NaN or infinity: nothing was merged")


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
    book.activate(book.weights)
    book.add_hooks()
    return model


def stock_state_dict(
    model: nn.Module, state_dict: dict[str, torch.Tensor], *, table_rows: int | None = None
) -> dict[str, torch.Tensor]:
    """A model's state dict without adapters, as stock diffusers loads it.

    Unmerged, it is the base's. Merged, it is the adapted model's: new classes come first in the class table,
    and the null row stays last, where `DiTPipeline` looks for it.

    Args:
        table_rows: rows of a merged model's class table; None: as many as the base's has.

    Raises:
        ValueError: the merged adapter has more classes than there is room for.
    """
    book = adapters_of(model)
    stock = {k: v for k, v in state_dict.items() if ".onelora" not in k and ".to_qkv." not in k}
    if book.merged is None:
        base_of = {}  # by address: the shared embedding is there under the name of every block
        for layer in book.swapped.values():
            for name, base in layer.onelora_swap.base.items():
                base_of[getattr(layer, name).data_ptr()] = base.detach()
        stock = {key: base_of.get(tensor.data_ptr(), tensor) for key, tensor in stock.items()}
    elif book.conditioning is not None:
        table = book.conditioning.active_table()
        for key in [key for key in stock if key.endswith("class_embedder.embedding_table.weight")]:
            own = stock[key] if table is None else table.detach().to(stock[key])
            stock[key] = _padded_table(own, table_rows or len(stock[key]))

    seen = set()
    for key, tensor in stock.items():  # safetensors writes no tensor twice: shared ones become copies
        storage = tensor.untyped_storage().data_ptr()
        stock[key] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return stock


def _padded_table(table: torch.Tensor, rows: int) -> torch.Tensor:
    if len(table) > rows:
        raise ValueError(
            f"the adapter has {len(table) - 1} classes, but the base's class table only has room for {rows - 1}"
        )
    return torch.cat([table, table[-1:].expand(rows - len(table), -1)])
