"""Trained copies that take the place of the base's own tensors: norms, and full fine-tuning."""

from torch import nn

from onelora_diffusion.adapters.contract import IN_PLACE, Adapter
from onelora_diffusion.config import AdapterConfig


class SwapAdapter(Adapter):
    """Trained fp32 copies of a module's own parameters, under their own names.

    Args:
        copies: the copies made so far by the id of the base's parameter, filled here, so that parameters that the
            base shares between modules stay shared.
    """

    seat = IN_PLACE

    def __init__(self, module: nn.Module, copies: dict[int, nn.Parameter] | None = None):
        super().__init__()
        copies = {} if copies is None else copies
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in copies:
                copies[id(parameter)] = nn.Parameter(parameter.detach().float().clone())
            self.register_parameter(name, copies[id(parameter)])

    def lora(self):
        raise ValueError("it trains norms")


def build_copies(modules: dict[str, nn.Module], config: AdapterConfig) -> dict[str, Adapter]:
    copies = {}
    return {path: SwapAdapter(module, copies) for path, module in modules.items()}
