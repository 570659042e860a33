"""Fold adapters into the base weights, take them out again, and write a model as plain diffusers has it."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from onelora_diffusion.injection.book import AdapterBook, adapters_of
from onelora_diffusion.injection.layers import is_made_here


def merge_adapter(
    model: nn.Module, adapter_names: str | list[str] | None = None, *, safe_merging: bool = True
) -> nn.Module:
    """Fold adapters into the base weights: W = γ ⊙ (W0 + b 1ᵀ), in fp32, then cast to the base's dtype.

    A merged model has the base's operators and no others. The original weights wait in host memory.

    Args:
        adapter_names: which adapters; None: those that serve, with their weights.
        safe_merging: refuse, with nothing changed, if a merged weight is not finite.

    Raises:
        ValueError: unknown name, already merged, nothing to merge, weights that are not finite, or a layer whose
            weight cannot take an adapter in: quantised, in eight bits, tied to another's, computed from other tensors,
            or not all that the layer computes with. Nothing is changed then.
    """
    book = adapters_of(model)
    with book.turn:
        book.require_unmerged("others are merged")
        serving = book.serving
        names = serving if adapter_names is None else book.choose_all(adapter_names)
        weights = {name: serving.get(name, 1.0) for name in names}
        if not weights:
            raise ValueError("no adapter is active: name the adapters to merge")
        book.merge(weights, safe_merging)
    return model


def unmerge_adapter(model: nn.Module) -> nn.Module:
    """Restore the base weights bit for bit; the adapters that served before the merge serve again."""
    book = adapters_of(model)
    with book.turn:
        if book.merged is None:
            raise ValueError("no adapter is merged")
        book.unmerge()
    return model


@contextlib.contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """Context manager: inside, the adapters that serve are folded into the base; afterwards it is itself, bit for bit.

    What they compute is the same, at the base's own cost. Where they cannot be merged (a quantised base, a tuner
    without a merge), and where there are none or they are merged already, the model is left as it is.
    """
    try:
        merge_adapter(model)
        is_merged = True
    except ValueError:
        is_merged = False
    try:
        yield model
    finally:
        if is_merged:
            unmerge_adapter(model)


def stock_state_dict(
    model: nn.Module, state_dict: dict[str, torch.Tensor] | None = None, *, table_rows: int | None = None
) -> dict[str, torch.Tensor]:
    """A model's state dict without adapters, as its own class loads it where this library is not.

    Merged, it is the adapted model's: new classes come first in the class table, and the null row stays last, where
    `DiTPipeline` and Meta's sample.py look for it. Otherwise it is the base's.

    Args:
        state_dict: of the model while the base serves alone or is merged; None: it is taken here.
        table_rows: rows of a merged model's class table; None: as many as the base's has.

    Raises:
        ValueError: the merged adapter has more classes than there is room for, or biases where the base has none.
    """
    book = adapters_of(model)
    if state_dict is None:
        with _base_in_place(book):
            state_dict = book.model.state_dict()
    if new := [path for (_, path), seat in book.seats.items() if seat.has_new_bias]:
        raise ValueError(
            f"merging gave {new[0]} a bias, which its own class has no place for: serve the adapter unmerged there"
        )
    added = {"onelora", "onelora_swap"}
    made = tuple(f"{path}." for path, module in book.model.named_modules() if is_made_here(module))
    stock = {
        key: tensor
        for key, tensor in state_dict.items()
        if added.isdisjoint(key.split(".")) and not key.startswith(made)
    }
    if book.merged is not None and (seat := book.class_tables) is not None:
        room = table_rows or seat.num_rows
        for key in (f"{path}.weight" for path in seat.paths):
            if len(stock[key]) > room:
                raise ValueError(
                    f"the adapter has {len(stock[key]) - 1} classes, but the base's class table only has room for "
                    f"{room - 1}"
                )
            stock[key] = torch.cat([stock[key], stock[key][-1:].expand(room - len(stock[key]), -1)])

    seen = set()
    for key, tensor in stock.items():  # safetensors writes no tensor twice: shared ones become copies
        storage = tensor.untyped_storage().data_ptr()
        stock[key] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return stock


def save_base(model: nn.Module, save_directory, *args, **kwargs):
    """`save_pretrained` of a model with adapters: writes a plain diffusers model, in the stock layout."""
    book = adapters_of(model)

    def stock(module, state_dict, prefix, local_metadata):
        clean = stock_state_dict(module, state_dict)
        state_dict.clear()
        state_dict.update(clean)

    with _base_in_place(book):
        hook = model.register_state_dict_post_hook(stock)
        try:
            return type(model).save_pretrained(model, save_directory, *args, **kwargs)
        finally:
            hook.remove()


@contextlib.contextmanager
def _base_in_place(book: AdapterBook) -> Iterator[None]:
    """Context manager: inside, trained norms and weights that serve make way for the base's; merged ones stay."""
    with book.turn:
        was_serving = bool(book.serving)
        if was_serving:
            book.pause()
        try:
            yield
        finally:
            if was_serving:
                book.resume()
