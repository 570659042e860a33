"""The seat in the place of a module's own tensors: norms, and full fine-tuning."""

import torch
from torch import nn

from onelora_diffusion.injection.route import Route
from onelora_diffusion.injection.seat import Seat


class SwapSeat(Seat):
    """The named `SwapAdapter`s of one module, its child `onelora_swap`.

    The module runs its own forward on whichever tensors are in place, so that training and inference cost what the
    base costs. The base's tensors wait here.
    """

    def __init__(self, module: nn.Module, path: str):
        super().__init__()
        self.module, self.path = module, path
        self.base = {name: parameter for name, parameter in module.named_parameters(recurse=False)}
        module.onelora_swap = self

    def leave(self) -> None:
        del self.module.onelora_swap

    def activate(self, weights: dict[str, float]) -> None:
        """Put p0 + Σₖ wₖ (pₖ − p0) in place; a single adapter of weight 1 is put there itself, and trains."""
        adapters = [(self[name], weight) for name, weight in weights.items() if name in self]
        for name, base in self.base.items():
            if not adapters:
                self.module._parameters[name] = base
            elif len(adapters) == 1 and adapters[0][1] == 1:
                self.module._parameters[name] = getattr(adapters[0][0], name)
            else:
                start = base.detach().float()
                mixed = start + sum(w * (getattr(adapter, name).detach() - start) for adapter, w in adapters)
                self.module._parameters[name] = nn.Parameter(mixed.to(base.dtype), requires_grad=False)

    def fold(self, check: bool) -> None:
        """Put frozen copies of the tensors in place there, in the base's dtype; `activate` undoes it."""
        for name, base in self.base.items():
            if self.module._parameters[name] is base:  # nothing is in its place, and a fused q, k, v may be its memory
                continue
            merged = self.module._parameters[name].detach().to(base.dtype).clone()
            if check and not torch.isfinite(merged).all():
                raise ValueError(f"merging into {self.path} gives NaN or infinity")
            self.module._parameters[name] = nn.Parameter(merged, requires_grad=False)

    def route(self, route: Route | None) -> None:
        for name in {} if route is None else dict.fromkeys(name for mixture in route.mixtures for name in mixture):
            if name in self:
                raise ValueError(
                    f"adapter '{name}' trains {self.path} itself, which all samples share: it cannot serve single "
                    "samples"
                )

    def _apply(self, fn, recurse=True):
        for parameter in self.base.values():  # no child of the model while an adapter is in its place
            parameter.data = fn(parameter.data)
        return super()._apply(fn, recurse)
