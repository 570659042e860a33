"""diffusers' adapter methods for models, which handle this library's adapters while a model has any.

diffusers' own methods look only for PEFT's layers and would silently do nothing.
"""

import functools
from collections.abc import Iterable

from torch import nn

from onelora_diffusion.adapters.contract import BESIDE_LINEAR, IN_PLACE
from onelora_diffusion.adapters.peft import PeftAdapter
from onelora_diffusion.adapters.weights import Weight, by_path
from onelora_diffusion.injection.book import AdapterBook
from onelora_diffusion.injection.layers import is_tuned
from onelora_diffusion.injection.merging import save_base


def set_adapters(
    model: nn.Module, adapter_names: str | list[str], weights: Weight | list[Weight | None] | None = None
):
    """Activate the named adapters with these weights, which may also be diffusers' nested weights by block."""
    if _are_of_peft(model, adapter_names, "set_adapters"):
        return type(model).set_adapters(model, adapter_names, weights)
    given = weights if isinstance(weights, list | tuple) else [weights]
    plain = [1.0 if w is None else by_path(w) if isinstance(w, dict) else w for w in given]
    model._onelora.serve(adapter_names, plain if isinstance(weights, list | tuple) else plain[0])


def set_adapter(model: nn.Module, adapter_name: str | list[str]) -> None:
    """Activate the named adapters, each with weight 1."""
    if _are_of_peft(model, adapter_name, "set_adapter"):
        return type(model).set_adapter(model, adapter_name)
    model._onelora.serve(adapter_name)


def delete_adapters(model: nn.Module, adapter_names: str | list[str]) -> None:
    """Remove the named adapters; the others are not changed. Fused weights are unfused first."""
    if _are_of_peft(model, adapter_names, "delete_adapters"):
        return type(model).delete_adapters(model, adapter_names)
    model._onelora.unload(model._onelora.choose_all(adapter_names))


def fuse_lora(
    model: nn.Module, lora_scale: float = 1.0, safe_fusing: bool = True, adapter_names: str | list[str] | None = None
) -> None:
    """Merge adapters, times `lora_scale`, into the base's weights; None takes the active ones with their weights."""
    book: AdapterBook = model._onelora
    if adapter_names is not None and _are_of_peft(model, adapter_names, "fuse_lora"):
        _check_additive(model, adapter_names)
        return type(model).fuse_lora(model, lora_scale, safe_fusing, adapter_names)
    _check_apart(model, "fuse_lora")
    book.merge(adapter_names, lora_scale, safe_fusing)
    if adapter_names is None:
        _peft_too(model, "fuse_lora", lora_scale, safe_fusing)


def unfuse_lora(model: nn.Module) -> None:
    """Restore the base's weights bit for bit, and activate the adapters that were active before with their weights."""
    with model._onelora.lock:
        if model._onelora.merged is not None:
            _peft_too(model, "unfuse_lora")
        model._onelora.unmerge()


def unload_lora(model: nn.Module) -> None:
    """Remove every adapter, fused or not; the model is the plain base again, bit for bit."""
    _peft_too(model, "unload_lora")
    model._onelora.unload(list(model._onelora.adapters))


def disable_lora(model: nn.Module) -> None:
    """Let the base compute alone until `enable_lora`, `set_adapters` or the next load."""
    book: AdapterBook = model._onelora
    with book.lock:
        book.require_unmerged("they are disabled")
        _peft_too(model, "disable_lora")
        book.pause()


def enable_lora(model: nn.Module) -> None:
    """Activate the adapters that `disable_lora` deactivated, with their weights."""
    with model._onelora.lock:
        _peft_too(model, "enable_lora")
        model._onelora.resume()


def active_adapters(model: nn.Module) -> list[str]:
    """The names of the active adapters, including fused ones."""
    own = list(model._onelora.merged or model._onelora.serving)
    return own + list(type(model).active_adapters(model) if _has_peft(model) else ())


def add_peft(verb: str, model: nn.Module, *args, **kwargs) -> None:
    """diffusers' own `add_adapter` or `load_lora_adapter`, for an adapter of PEFT beside those of this library."""
    _check_no_tuner(model, verb, "load PEFT's before it")
    getattr(type(model), verb)(model, *args, **kwargs)


VERBS = {
    "add_adapter": functools.partial(add_peft, "add_adapter"),
    "load_lora_adapter": functools.partial(add_peft, "load_lora_adapter"),
    "set_adapters": set_adapters,
    "set_adapter": set_adapter,
    "delete_adapters": delete_adapters,
    "fuse_lora": fuse_lora,
    "unfuse_lora": unfuse_lora,
    "unload_lora": unload_lora,
    "disable_lora": disable_lora,
    "disable_adapters": disable_lora,
    "enable_lora": enable_lora,
    "enable_adapters": enable_lora,
    "active_adapters": active_adapters,
    "save_pretrained": save_base,
}


def take_over(model: nn.Module) -> None:
    """Replace the adapter methods that a model's class has by those of this file, until `AdapterBook.unload`."""
    for name in VERBS:
        if (stock := getattr(type(model), name, None)) is not None:
            verb = functools.partial(VERBS[name], model)
            verb.__wrapped__ = stock  # diffusers inspects the signature of a method
            model.__dict__[name] = verb
    model._onelora.verbs = tuple(VERBS)


def _has_peft(model: nn.Module) -> bool:
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def _are_of_peft(model: nn.Module, adapter_names: str | Iterable[str], verb: str) -> bool:
    """Whether these names are those of PEFT's adapters in the model, and not of this library's."""
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    if not _has_peft(model) or all(name in model._onelora.adapters for name in names):
        return False
    if mixed := [name for name in names if name in model._onelora.adapters]:
        raise ValueError(f"{verb}: '{mixed[0]}' is of this library, and others are PEFT's: one call for each")
    _check_apart(model, verb)
    return True


def _peft_too(model: nn.Module, verb: str, *args) -> None:
    """Call diffusers' own method for PEFT's adapters in the model, if it has any."""
    if _has_peft(model):
        _check_apart(model, verb)
        getattr(type(model), verb)(model, *args)


def _check_apart(model: nn.Module, verb: str) -> None:
    """ValueError if diffusers' method would also change the layers of PEFT that compute an adapter of this library."""
    if _has_peft(model):
        _check_no_tuner(model, verb, "unload one of them first")


def _check_no_tuner(model: nn.Module, verb: str, remedy: str) -> None:
    for name, adapter in model._onelora.adapters.items():
        if any(isinstance(module, PeftAdapter) for module in adapter.values()):
            raise ValueError(
                f"{verb}: adapter '{name}' is computed by PEFT's layers, and PEFT has others in this model, which "
                f"diffusers cannot tell apart: {remedy}"
            )


def _check_additive(model: nn.Module, adapter_names: str | list[str]) -> None:
    """ValueError if an adapter of this library replaces or reads weights that PEFT would merge into."""
    names = adapter_names if isinstance(adapter_names, str) else ", ".join(adapter_names)
    for (kind, path), seat in model._onelora.seats.items():
        if not is_tuned(model.get_submodule(path)):
            continue
        for name, adapter in seat.items():
            reads = kind == BESIDE_LINEAR and any(not c.reads_input for c in getattr(adapter.vectors(), "b", {}))
            if kind == IN_PLACE or reads:
                raise ValueError(
                    f"fuse_lora: '{name}' {'reads' if reads else 'replaces'} the weights of {path} that '{names}' "
                    "would be fused into: unload it first"
                )
