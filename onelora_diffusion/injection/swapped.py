"""The seat that replaces a module's own tensors: for norms, and for full fine-tuning."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import nn

from onelora_diffusion.adapters.swap import SwapAdapter
from onelora_diffusion.injection.linear import why_not_writable
from onelora_diffusion.injection.route import Route
from onelora_diffusion.injection.seat import Seat


class SwapSeat(Seat):
    """The `SwapAdapter`s of one module, its child module `onelora_swap`, whose tensors it reads during its forward.

    The module keeps the base's parameters, so that code which moves, casts, offloads, loads or saves a model handles
    those alone. While its forward runs, the module's class returns the adapters' tensors under the same names. Each
    call adds the module's path to `reached`.
    """

    def __init__(self, model: nn.Module, places: list[str], reached: set[str]):
        super().__init__(model.get_submodule(places[0]), places)
        self.reached = reached
        self.num_calls = 0  # number of running calls of the module
        self.originals: dict[str, nn.Parameter] = {}
        self.caller = _caller(model, self.path)
        self.layer.onelora_swap = self
        self.hook()

    @property
    def is_in_use(self) -> bool:
        return self._alone is not None or bool(self._weighted)

    def lend(self, name: str, base: torch.Tensor) -> torch.Tensor:
        """p0 + Σₖ wₖ (pₖ − p0), p0 the base's parameter of this name, in its dtype and on its device.

        For one adapter of weight 1 it is the adapter's tensor itself.
        """
        if not torch.compiler.is_compiling():
            self.reached.add(self.path)
            if self._is_replica:
                self._list_adapters()
        if self._alone is not None:
            lent = self._value(self._alone, name)
        else:
            tensors = [(self._value(adapter, name), weight) for adapter, weight in self._weighted]
            lent = tensors[0][0]
        if base.is_meta and not lent.is_meta:  # accelerate reads the parameter that it is about to load
            return base
        if self._alone is None:
            start = base.detach().to(lent)
            lent = start + sum(weight * (tensor - start) for tensor, weight in tensors)
        return lent.to(base)

    def of_lent(
        self, name: str, linear: Callable[[torch.Tensor], torch.Tensor], of_base: torch.Tensor
    ) -> torch.Tensor:
        """A linear function of what is lent, by its value for the base's own tensor, which may be elsewhere."""
        if self._alone is not None:
            return linear(self._value(self._alone, name))
        of_adapters = [(linear(self._value(adapter, name)).to(of_base), weight) for adapter, weight in self._weighted]
        return of_base + sum(weight * (value - of_base) for value, weight in of_adapters)

    def _value(self, adapter: SwapAdapter, name: str) -> torch.Tensor:
        if adapter.may_lack_values:
            adapter.start_as(self.layer)
        # A call costs more than all else here; accelerate and diffusers wrap the forward of modules that they offload.
        return adapter(name) if "forward" in adapter.__dict__ else getattr(adapter, name)

    def hook(self) -> None:
        if self._hooks:
            return
        self.layer.__class__ = lending_class(type(self.layer), tuple(self.layer._parameters))
        before = self.caller.register_forward_pre_hook(begin_lending, prepend=True)
        self._hooks = [before, self.caller.register_forward_hook(end_lending, always_call=True)]

    def unhook(self) -> None:
        super().unhook()
        if "lent_parameters" in vars(type(self.layer)):  # otherwise other code has changed the class, which is kept
            self.layer.__class__ = type(self.layer).__base__

    def leave(self) -> None:
        self.unhook()
        del self.layer.onelora_swap

    def activate(self, weights: dict[str, float]) -> None:
        super().activate(weights)
        self.num_calls = 0  # a call may have been interrupted by Ctrl-C
        if self._hooks:
            self.caller._forward_hooks.move_to_end(self._hooks[1].id)  # it runs after the adapters beside the layer

    def why_not_mergeable(self, users: dict[tuple, list[str]]) -> str | None:
        return why_not_writable(self.layer) if self.is_in_use and "weight" in self.layer._parameters else None

    def merge(self, check: bool) -> None:
        """Replace the base's tensors by frozen copies of the trained ones, in the base's dtype."""
        if not self.is_in_use:
            return
        merged = {name: self.lend(name, base).detach() for name, base in self.layer.named_parameters(recurse=False)}
        if check and not all(torch.isfinite(tensor).all() for tensor in merged.values()):
            raise ValueError(f"merging into {self.path} gives NaN or infinity")
        self.originals = {name: self.layer._parameters[name] for name in merged}
        for name, tensor in merged.items():
            self.layer._parameters[name] = nn.Parameter(tensor.clone(), requires_grad=False)
        self._alone, self._weighted = None, []

    def unmerge(self) -> None:
        self.layer._parameters.update(self.originals)
        self.originals = {}

    def route(self, route: Route | None) -> None:
        for mixture in () if route is None else route.mixtures.values():
            if name := next((name for name in mixture if name in self), None):
                raise ValueError(
                    f"adapter '{name}' trains {self.path} itself, which all samples share: it cannot serve single "
                    "samples"
                )

    def _apply(self, fn, recurse=True):
        for parameter in self.originals.values():  # they are not registered in the model while replaced
            parameter.data = fn(parameter.data)
        return super()._apply(fn, recurse)


@functools.cache
def lending_class(cls: type, names: tuple[str, ...]) -> type:
    """A subclass with the name of its base class whose instances read these parameters from their seat."""

    def __reduce_ex__(self, protocol):
        return _new, (cls, names), super(made, self).__reduce_ex__(protocol)[2]

    members = {name: property(_reader(name), _writer(name)) for name in names}
    members |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__reduce_ex__": __reduce_ex__}
    made = type(cls)(cls.__name__, (cls,), members | {"lent_parameters": names})
    return made


def _new(cls: type, names: tuple[str, ...]) -> nn.Module:
    made = lending_class(cls, names)
    return made.__new__(made)


def _reader(name: str):
    def read(module: nn.Module) -> torch.Tensor | None:
        if name in module._parameters:
            base = module._parameters[name]
        elif name in module.__dict__:  # in a replica of DataParallel
            base = module.__dict__[name]
        else:
            raise AttributeError(f"'{type(module).__name__}' object has no attribute '{name}'")
        seat = module._modules.get("onelora_swap")
        if base is None or seat is None or not seat.is_in_use:
            return base
        return seat.lend(name, base) if torch.compiler.is_compiling() or seat.num_calls else base

    return read


def _writer(name: str):
    def write(module: nn.Module, value) -> None:  # `value` may be no parameter, so `nn.Module` assigns it
        module.__dict__[name] = value

    return write


def begin_lending(module: nn.Module, args: tuple) -> None:
    """Forward pre-hook of a module that reads lent tensors, its own or those of child modules."""
    if not torch.compiler.is_compiling():
        for seat in _seats_of(module):
            seat.num_calls += 1


def end_lending(module: nn.Module, args: tuple, output) -> None:
    """Forward hook of such a module, which also runs if the forward has failed."""
    if not torch.compiler.is_compiling():
        for seat in _seats_of(module):
            seat.num_calls = max(0, seat.num_calls - 1)
            for parameter in seat.layer._parameters.values():
                if parameter is not None and parameter.is_meta and seat.is_in_use:
                    parameter.requires_grad_(False)  # accelerate has created it like the lent tensor that it read


def _seats_of(module: nn.Module) -> Iterator[SwapSeat]:
    for name, child in module._modules.items():
        if name == "onelora_swap":
            yield child
        elif child is not None and not _is_called(module, name):
            yield from _seats_of(child)


def _caller(model: nn.Module, path: str) -> nn.Module:
    """The module at `path`, or the parent whose forward reads its tensors without calling it."""
    parent, _, name = path.rpartition(".")
    if not path or _is_called(model.get_submodule(parent), name):
        return model.get_submodule(path)
    return _caller(model, parent)


def _is_called(parent: nn.Module, name: str) -> bool:
    if isinstance(parent, nn.MultiheadAttention):
        return False
    return type(parent._modules[name]).forward is not nn.Module.forward  # false for ParameterList
