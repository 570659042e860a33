"""The interface of a layer adapter: the module of an adapter at one layer, whatever its method."""

import torch
from torch import nn

from onelora_diffusion.adapters.weights import keeping_precision

# The seats at which a layer adapter can be attached, provided by `injection`: beside a linear layer, whose output it
# changes; in place of a module's own tensors; or as the class table of a DiT.
BESIDE_LINEAR, IN_PLACE, AS_CLASS_TABLE = "beside a linear layer", "in place of tensors", "as the class table"


class LayerAdapter(nn.Module):
    """The part of an adapter that serves one layer of the base.

    Beside a linear layer it has `forward(x, out)`, the method's formula for the layer's input (..., in_features) and
    output (..., out_features), and `merged(weight, bias)`.
    """

    seat: str = BESIDE_LINEAR
    takes_directions = False  # whether it has `directions_of(layer)`, of the weight of the layer, which no file stores
    no_lora = "it trains more than vectors"  # why it cannot be a LoRA

    def trained_tensors(self) -> dict[str, nn.Parameter]:
        """The trained tensors, by the names that follow the layer's path in an adapter file."""
        return {f"onelora_{name}": parameter for name, parameter in self.named_parameters()}

    def serve(self, layer: nn.Module) -> None:
        """Called when the adapter is attached to `layer`."""

    def vectors(self):
        """Its vectors (`adapters.vector.Vectors`), if these are all that it trains; else None."""
        return None

    def merged(self, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The base layer's fp32 weight (out, in) and bias (out,) with this adapter merged into them."""
        raise NotImplementedError

    @classmethod
    def summed(cls, group: list[tuple["LayerAdapter", float]], names: list[str], path: str) -> dict[str, torch.Tensor]:
        """The tensors of Σₖ wₖ · adapterₖ, by name as in `trained_tensors`; ValueError if their sum is no adapter."""
        raise ValueError(f"adapter '{names[0]}' trains more than vectors at {path}: it cannot be summed up")

    def lora(self, with_bias: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The adapter as a LoRA in fp32: A (r, in_features), B (out_features, r), and β (out_features,) or None.

        With `with_bias` the LoRA can have β too; r is 0 for an adapter of β alone. ValueError says why there is none.
        """
        raise ValueError(self.no_lora)

    @torch.no_grad()
    def start(self) -> None:
        """Initialise tensors that have come from the meta device; by default with NaN, until values are loaded."""
        for parameter in self.parameters():
            parameter.fill_(torch.nan)

    def _apply(self, fn, recurse=True):
        was_meta = any(parameter.is_meta for parameter in self.parameters())
        super()._apply(keeping_precision(fn), recurse)
        if was_meta and not any(parameter.is_meta for parameter in self.parameters()):
            self.start()
        return self
