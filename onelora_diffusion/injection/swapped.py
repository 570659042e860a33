"""The seat in the place of a module's own tensors: norms, and full fine-tuning."""

import functools
from collections.abc import Iterator

import torch
from torch import nn

from onelora_diffusion.adapters.swap import SwapAdapter
from onelora_diffusion.adapters.weights import as_tensor
from onelora_diffusion.injection.compiled import anything_is_compiled
from onelora_diffusion.injection.linear import why_not_writable
from onelora_diffusion.injection.route import Route
from onelora_diffusion.injection.seat import Seat


class SwapSeat(Seat):
    """The named `SwapAdapter`s of one module, its child `onelora_swap`, which lend it their tensors.

    The module keeps the base's parameters, so that whoever moves, casts, offloads, loads or saves a model deals with
    those alone. While its forward runs, the module's class reads the adapters' tensors under the same names.

    Args:
        model: whose module at `path` it serves.
        reached: the paths of the layers that the model's forward has come by, filled in each.
    """

    def __init__(self, model: nn.Module, path: str, reached: set[str]):
        super().__init__()
        self.layer, self.path, self.reached = model.get_submodule(path), path, reached
        self.num_calls = 0  # of the module, that are running
        self.originals: dict[str, nn.Parameter] = {}
        self.active: dict[str, float] = {}
        # The same as compiled code looks at it, without names and numbers, which it would take for unchanging.
        self._alone: SwapAdapter | None = None
        self._weighted: list[tuple[SwapAdapter, torch.Tensor]] = []
        self.caller = _caller(model, path)
        self._hooks: list = []
        self.layer.onelora_swap = self
        self.hook()

    @property
    def is_in_use(self) -> bool:
        return self._alone is not None or bool(self._weighted)

    def lend(self, name: str, base: torch.Tensor) -> torch.Tensor:
        """p0 + Σₖ wₖ (pₖ − p0) in the base's dtype and on its device: of one adapter of weight 1 its tensor itself.

        Args:
            name: of the parameter.
            base: p0, the base's own.
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
        if base.is_meta and not lent.is_meta:  # accelerate looks at what it is about to bring
            return base
        if self._alone is None:
            start = base.detach().to(lent)
            lent = start + sum(weight * (tensor - start) for tensor, weight in tensors)
        return lent.to(base)

    def _value(self, adapter: SwapAdapter, name: str) -> torch.Tensor:
        if adapter.may_lack_values:
            adapter.start_as(self.layer)
        # A call costs more than the rest of this; accelerate and diffusers wrap the forward of what they offload.
        return adapter(name) if "forward" in adapter.__dict__ else getattr(adapter, name)

    def hook(self) -> None:
        if self._hooks:
            return
        self.layer.__class__ = lending_class(type(self.layer), tuple(self.layer._parameters))
        before = self.caller.register_forward_pre_hook(begin_lending, prepend=True)
        self._hooks = [before, self.caller.register_forward_hook(end_lending, always_call=True)]

    def unhook(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        if "lent_parameters" in vars(type(self.layer)):  # otherwise another made a class of it, and it stays
            self.layer.__class__ = type(self.layer).__base__

    # -----------------------------------------------------------------------------------------------
    # What every seat answers

    def leave(self) -> None:
        self.unhook()
        del self.layer.onelora_swap

    def activate(self, weights: dict[str, float]) -> None:
        self.active = {name: weight for name, weight in weights.items() if name in self._modules}
        self._list_adapters()
        self.num_calls = 0  # should Ctrl-C have broken one off
        if self._hooks:
            self.caller._forward_hooks.move_to_end(self._hooks[1].id)  # what adapters beside add is computed before it

    def _list_adapters(self) -> None:
        serving = [(self._modules[name], weight) for name, weight in self.active.items()]
        is_alone = len(serving) == 1 and serving[0][1] == 1
        self._alone = serving[0][0] if is_alone else None
        self._weighted = [] if is_alone else [(adapter, as_tensor(weight)) for adapter, weight in serving]

    def why_not_foldable(self, users: dict[tuple, list[str]]) -> str | None:
        return why_not_writable(self.layer) if self.is_in_use and "weight" in self.layer._parameters else None

    def fold(self, check: bool) -> None:
        """Put frozen copies of the tensors in the base's place, in its dtype."""
        if not self.is_in_use:
            return
        merged = {name: self.lend(name, base).detach() for name, base in self.layer.named_parameters(recurse=False)}
        if check and not all(torch.isfinite(tensor).all() for tensor in merged.values()):
            raise ValueError(f"merging into {self.path} gives NaN or infinity")
        self.originals = {name: self.layer._parameters[name] for name in merged}
        for name, tensor in merged.items():
            self.layer._parameters[name] = nn.Parameter(tensor.clone(), requires_grad=False)
        self._alone, self._weighted = None, []
        if not anything_is_compiled():  # which would not see it come back
            self.unhook()

    def unfold(self) -> None:
        self.layer._parameters.update(self.originals)
        self.originals = {}
        self.hook()

    def route(self, route: Route | None) -> None:
        for name in {} if route is None else dict.fromkeys(name for mixture in route.mixtures for name in mixture):
            if name in self:
                raise ValueError(
                    f"adapter '{name}' trains {self.path} itself, which all samples share: it cannot serve single "
                    "samples"
                )

    def _apply(self, fn, recurse=True):
        for parameter in self.originals.values():  # no child of the model while merged values are in its place
            parameter.data = fn(parameter.data)
        return super()._apply(fn, recurse)


# -----------------------------------------------------------------------------------------------
# A module that reads what it is lent


@functools.cache
def lending_class(cls: type, names: tuple[str, ...]) -> type:
    """A subclass that goes by its base's name, and reads these parameters as its seat lends them."""

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
        elif name in module.__dict__:  # of a replica that DataParallel makes
            base = module.__dict__[name]
        else:
            raise AttributeError(f"'{type(module).__name__}' object has no attribute '{name}'")
        seat = module._modules.get("onelora_swap")
        if base is None or seat is None or not seat.is_in_use:
            return base
        return seat.lend(name, base) if torch.compiler.is_compiling() or seat.num_calls else base

    return read


def served_parameter(module: nn.Module, name: str) -> torch.Tensor | None:
    """What the module's forward reads under this name: its own parameter, or what is lent in its place."""
    base, seat = module._parameters[name], module._modules.get("onelora_swap")
    return base if base is None or seat is None or not seat.is_in_use else seat.lend(name, base)


def _writer(name: str):
    def write(module: nn.Module, value) -> None:  # of what is no parameter, for which `nn.Module` has its own way
        module.__dict__[name] = value

    return write


def begin_lending(module: nn.Module, args: tuple) -> None:
    """Forward pre-hook of a module whose tensors, or those of modules that it reads, are lent."""
    if not torch.compiler.is_compiling():
        for seat in _seats_of(module):
            seat.num_calls += 1


def end_lending(module: nn.Module, args: tuple, output) -> None:
    """Forward hook of the same, also when its forward has failed."""
    if not torch.compiler.is_compiling():
        for seat in _seats_of(module):
            seat.num_calls = max(0, seat.num_calls - 1)
            for parameter in seat.layer._parameters.values():
                if parameter is not None and parameter.is_meta and seat.is_in_use:
                    parameter.requires_grad_(False)  # accelerate made it, after the one that it read


def _seats_of(module: nn.Module) -> Iterator[SwapSeat]:
    for name, child in module._modules.items():
        if name == "onelora_swap":
            yield child
        elif child is not None and not _is_called(module, name):
            yield from _seats_of(child)


def _caller(model: nn.Module, path: str) -> nn.Module:
    """The module at `path`, or the one around it whose forward reads its tensors without calling it."""
    parent, _, name = path.rpartition(".")
    if not path or _is_called(model.get_submodule(parent), name):
        return model.get_submodule(path)
    return _caller(model, parent)


def _is_called(parent: nn.Module, name: str) -> bool:
    if isinstance(parent, nn.MultiheadAttention):
        return False
    return type(parent._modules[name]).forward is not nn.Module.forward  # as of ParameterList
