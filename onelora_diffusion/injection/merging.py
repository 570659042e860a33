"""Merge adapters into the base's weights, unmerge them, and write a model in plain diffusers' layout."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from onelora_diffusion.injection.book import AdapterBook, adapters_of, disable_adapter
from onelora_diffusion.injection.layers import is_made_here


def merge_adapter(
    model: nn.Module, adapter_names: str | list[str] | None = None, *, safe_merging: bool = True
) -> nn.Module:
    """Merge adapters into the base's weights: W = γ ⊙ (W0 + b 1ᵀ), in fp32, then cast to the base's dtype.

    A merged model computes with the base's operators alone. The original weights are kept in host memory.

    Args:
        adapter_names: the adapters to merge; None takes the active ones with their weights.
        safe_merging: raise an error, and change nothing, if a merged weight is not finite.

    Raises:
        ValueError: a name is unknown, adapters are merged already, there are none to merge, a merged weight is not
            finite, or a layer's weight cannot be changed: it is quantised, in eight bits, tied to another, computed
            from other tensors, or not all that the layer computes with. Nothing is changed then.
    """
    adapters_of(model).merge(adapter_names, check_finite=safe_merging)
    return model


def unmerge_adapter(model: nn.Module) -> nn.Module:
    """Restore the base's weights bit for bit; the adapters that were active before the merge are active again."""
    adapters_of(model).unmerge()
    return model


@contextlib.contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """Context manager in which the active adapters are merged into the base, which is restored bit for bit.

    Outputs stay the same, at the cost of the base alone. If adapters cannot be merged (a quantised base, a tuner
    without a merge), if there are none or if they are merged already, the model is not changed.
    """
    with contextlib.ExitStack() as after:
        with contextlib.suppress(ValueError):
            merge_adapter(model)
            after.callback(unmerge_adapter, model)
        yield model


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
        raise ValueError(f"merging gave {new[0]} a bias, which its class has not: serve the adapter unmerged there")
    added = {"onelora", "onelora_swap"}
    made = tuple(f"{path}." for path, module in book.model.named_modules() if is_made_here(module))
    stock = {
        key: tensor
        for key, tensor in state_dict.items()
        if added.isdisjoint(key.split(".")) and not key.startswith(made)
    }
    if book.merged is not None and (seat := book.class_tables) is not None:
        room = table_rows or seat.num_rows
        for key in (f"{path}.weight" for path in seat.places):
            new, most = len(stock[key]) - 1, room - 1
            if new > most:
                raise ValueError(f"the adapter has {new} classes, but the base's class table only has room for {most}")
            stock[key] = torch.cat([stock[key], stock[key][-1:].expand(room - len(stock[key]), -1)])

    seen = set()
    for key, tensor in stock.items():  # safetensors refuses shared tensors, so they are copied
        storage = tensor.untyped_storage().data_ptr()
        stock[key] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return stock


def save_base(model: nn.Module, save_directory, *args, **kwargs):
    """`save_pretrained` of a model with adapters: write a plain diffusers model, in the original layout."""
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


def _base_in_place(book: AdapterBook) -> contextlib.AbstractContextManager:
    """Context manager in which trained norms and weights are replaced by the base's, unless they are merged."""
    return disable_adapter(book.model) if book.merged is None else book.lock
