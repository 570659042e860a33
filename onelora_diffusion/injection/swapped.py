"""The seat in the place of a module's own tensors: norms, and full fine-tuning."""

from torch import nn


class SwappedParameters(nn.ModuleDict):
    """The named `SwapAdapter`s of one module, which runs its own forward on whichever tensors are in place.

    So training and inference cost what the base costs. The base's tensors wait here.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.base = {name: parameter for name, parameter in module.named_parameters(recurse=False)}

    def set_active(self, module: nn.Module, active: dict[str, float]) -> None:
        """Put p0 + Σₖ wₖ (pₖ − p0) in place; a single adapter of weight 1 is put there itself, and trains."""
        adapters = [(self[name], weight) for name, weight in active.items() if name in self]
        for name, base in self.base.items():
            if not adapters:
                module._parameters[name] = base
            elif len(adapters) == 1 and adapters[0][1] == 1:
                module._parameters[name] = getattr(adapters[0][0], name)
            else:
                start = base.detach().float()
                mixed = start + sum(w * (getattr(adapter, name).detach() - start) for adapter, w in adapters)
                module._parameters[name] = nn.Parameter(mixed.to(base.dtype), requires_grad=False)

    def merge(self, module: nn.Module) -> None:
        """Put frozen copies of the tensors in place there, in the base's dtype; `set_active` undoes it."""
        for name, base in self.base.items():
            merged = module._parameters[name].detach().to(base.dtype).clone()
            module._parameters[name] = nn.Parameter(merged, requires_grad=False)

    def _apply(self, fn, recurse=True):
        for parameter in self.base.values():  # no child of the model while an adapter is in its place
            parameter.data = fn(parameter.data)
        return super()._apply(fn, recurse)
