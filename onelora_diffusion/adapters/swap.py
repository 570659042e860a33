"""Trained copies that replace the base's own tensors: for norms, and for full fine-tuning."""

import torch
from torch import nn

from onelora_diffusion.adapters.contract import IN_PLACE, LayerAdapter
from onelora_diffusion.config import AdapterConfig


class SwapAdapter(LayerAdapter):
    """Trained fp32 copies of a module's own parameters, under their own names.

    `copies` are those made so far, by the id of the base's parameter: parameters that modules share stay shared.
    """

    seat = IN_PLACE

    def __init__(self, module: nn.Module, copies: dict[int, nn.Parameter] | None = None):
        super().__init__()
        copies = {} if copies is None else copies
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in copies:
                copies[id(parameter)] = nn.Parameter(parameter.detach().float().clone())
            self.register_parameter(name, copies[id(parameter)])
        self.may_lack_values = False

    def start(self) -> None:
        super().start()
        self.may_lack_values = True

    @torch.no_grad()
    def start_as(self, module: nn.Module) -> None:
        """Copy the values of the base's module, unless values were loaded since `start`."""
        for name, parameter in self._parameters.items():
            if parameter.isnan().all():
                parameter.copy_(module._parameters[name])
        self.may_lack_values = False

    def forward(self, name: str) -> torch.Tensor:
        """The tensor that replaces the base's parameter of this name; an offloaded one is loaded for the call.

        It is returned as a view, since diffusers frees the values of an offloaded parameter after the call.
        """
        parameter = getattr(self, name)
        return parameter.view_as(parameter)

    no_lora = "it trains norms"


def build_copies(modules: dict[str, nn.Module], config: AdapterConfig) -> dict[str, LayerAdapter]:
    copies = {}
    return {path: SwapAdapter(module, copies) for path, module in modules.items()}
