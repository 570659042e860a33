"""Hooks on every forward of a model with adapters: they lock it, apply the call's scale and check all layers."""

import functools
import logging
import sys

import torch
from torch import nn

from onelora_diffusion.adapters.contract import AS_CLASS_TABLE, BESIDE_LINEAR
from onelora_diffusion.denoisers import TwoDenoisers
from onelora_diffusion.injection.layers import untuned
from onelora_diffusion.injection.linear import Reached

logger = logging.getLogger(__name__)

CALL_KWARGS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")


class Watch:
    """The hooks on every forward of a model with this book of adapters."""

    def __init__(self, book):
        self.book, self.reached = book, Reached()  # the adapted layers that the current or last forward has called
        self._unreached: set[str] = set()  # layers of which a warning was given
        self._hooks: list = []

    def start(self) -> None:
        model = self.book.model
        self._hooks = self._hooks or [
            model.register_forward_pre_hook(self._begin, prepend=True, with_kwargs=True),
            model.register_forward_hook(self._check_reached),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def guard_merged(self) -> None:
        """Install only what merged adapters need: it refuses a scale in a call, and other weights for the base."""
        model = self.book.model
        self._hooks = [
            model.register_forward_pre_hook(self._check_unscaled, with_kwargs=True),
            model.register_load_state_dict_pre_hook(self._refuse_weights),
        ]

    def stop(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _begin(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        scale, taken = take_scale(kwargs)
        if _is_elsewhere(model):
            if scale != 1:
                raise ValueError(f"a scale of {scale} in the call reaches no compiled or copied model: set_adapters")
            return None
        call = self.book.lock.begin_call(sys._getframe(1))
        self.reached.clear()
        self.reached.takes_gradients = torch.is_grad_enabled()
        for (kind, _), seat in self.book.seats.items():
            if kind == BESIDE_LINEAR and (taken_by := seat.taken_by) is not None:
                raise ValueError(
                    f"{taken_by} took the adapters away with their layers, to where they are not found: unload them, "
                    "offload first, and load them then"
                )
        if self.book.open_route is not None:
            self.book.open_route.start(args, kwargs)
        if scale != 1 and (before := self.book.scale(scale)):
            call.undo = functools.partial(self.book.activate, before)
        return args, taken

    def _check_unscaled(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if (scale := take_scale(kwargs)[0]) != 1:
            self.book.require_unmerged(f"they are scaled by {scale}")

    def _refuse_weights(self, model: nn.Module, *args) -> None:
        self.book.require_unmerged("other weights are loaded, which unmerging would replace by those of now")

    def _end(self, model: nn.Module, args: tuple, output) -> None:
        if not _is_elsewhere(model):
            self.book.lock.end_call()

    def _check_reached(self, model: nn.Module, args: tuple, output) -> None:
        """Raise an error if an adapter's layer was replaced; warn once if a layer was not called."""
        if _is_elsewhere(model):
            return
        expected = {path: s for (kind, path), s in self.book.seats.items() if kind != AS_CLASS_TABLE and s.is_in_use}
        if isinstance(model, TwoDenoisers):
            expected = {path: seat for path, seat in expected.items() if path.startswith(f"{args[0]}.")}
        if len(self.reached) >= len(expected) and self.reached.issuperset(expected):
            return
        for path, seat in expected.items():
            if path in self.reached or _is_compiled(model, path):
                continue
            if not _is_at(model, path, seat.layer):
                raise ValueError(
                    f"{path} was replaced after its adapter was attached (by a quantisation?), so that the adapter is "
                    "lost there: attach adapters after all that changes the base's layers"
                )
            if getattr(model.get_submodule(path.rpartition(".")[0]), "fused_projections", False):
                raise ValueError(
                    f"{path} was fused with others after its adapter was attached, so that the adapter has no effect: "
                    "unfuse_qkv_projections() first"
                )
            if path not in self._unreached:
                self._unreached.add(path)
                logger.warning(
                    "%s took no part in this forward pass, so that the adapter which serves it has no effect there",
                    path,
                )


def take_scale(kwargs: dict) -> tuple[float, dict]:
    """(the `scale` in the attention kwargs of a call, a factor on the adapters' weights; the kwargs without it)."""
    for name in CALL_KWARGS:
        if "scale" in (given := kwargs.get(name) or {}):
            rest = {key: value for key, value in given.items() if key != "scale"}
            return given["scale"], kwargs | {name: rest or None}
    return 1.0, kwargs


def _is_elsewhere(model: nn.Module) -> bool:
    """Whether this forward is being compiled, or is that of a copy that DataParallel made for a device."""
    return torch.compiler.is_compiling() or getattr(model, "_is_replica", False)


def _is_at(model: nn.Module, path: str, layer: nn.Module) -> bool:
    try:
        return untuned(model.get_submodule(path)) is layer
    except AttributeError:
        return False


def _is_compiled(model: nn.Module, path: str) -> bool:
    """Whether compiled code, which records nothing, may have run the layer.

    That is so if the layer, a module around it, or a method of either was compiled, for example by a decorator.
    """
    names = path.split(".")
    try:
        around = [model.get_submodule(".".join(names[:depth])) for depth in range(len(names) + 1)]
    except AttributeError:
        return False
    return any(
        module._compiled_call_impl is not None or hasattr(module, "_orig_mod") or _has_compiled_method(module)
        for module in around
    )


def _has_compiled_method(module: nn.Module) -> bool:
    own = type(module).__mro__[: type(module).__mro__.index(nn.Module)]
    methods = (value for holder in (module, *own) for value in vars(holder).values())
    return any(hasattr(method, "_torchdynamo_orig_callable") for method in methods)
