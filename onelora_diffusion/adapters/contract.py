"""What every adapter's module answers, whatever it computes."""

import torch
from torch import nn

from onelora_diffusion.adapters.weights import keeping_precision

# The seats of a model, which `injection` provides: beside a linear layer, whose output an adapter adds to; in the
# place of a module's own tensors; or as the class table of a DiT.
BESIDE_LINEAR, IN_PLACE, AS_CLASS_TABLE = "beside a linear layer", "in place of tensors", "as the class table"


class Adapter(nn.Module):
    """The part of an adapter that serves one layer of the base.

    A subclass names its seat. One beside a linear layer has a `forward(x, out)` that is the method's formula, from
    the layer's input (..., in_features) and output (..., out_features), and `merged(weight, bias)`.
    """

    seat: str = BESIDE_LINEAR

    def trained_tensors(self) -> dict[str, nn.Parameter]:
        """What is trained, by name in an adapter file behind the path of the layer."""
        return {f"onelora_{name}": parameter for name, parameter in self.named_parameters()}

    def serve(self, layer: nn.Module) -> None:
        """Called when the adapter takes its seat at `layer`."""

    def vectors(self):
        """Its trained vectors (`adapters.vector.Vectors`), summed with those of others; None if it has more."""
        return None

    def merged(self, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The base layer's fp32 weight (out, in) and bias (out,) with this adapter in them."""
        raise NotImplementedError

    @classmethod
    def summed(cls, group: list[tuple["Adapter", float]], names: list[str], path: str) -> dict[str, torch.Tensor]:
        """The tensors of Σₖ wₖ · adapterₖ, by name as in `trained_tensors`.

        Raises:
            ValueError: their sum is no adapter.
        """
        raise ValueError(f"adapter '{names[0]}' trains more than vectors at {path}: it cannot be summed up")

    def lora(self, with_bias: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The same as A (r, in_features) and B (out_features, r) of a LoRA, fp32, and β (out_features,) or None.

        Args:
            with_bias: β can be carried too. r is 0 where it is all that there is.

        Raises:
            ValueError: why a LoRA cannot carry it.
        """
        raise ValueError("it trains more than vectors")

    @torch.no_grad()
    def start(self) -> None:
        """Called when tensors of the meta device, which have no values, were given memory.

        Without a start that is known here they are NaN until values are loaded.
        """
        for parameter in self.parameters():
            parameter.fill_(torch.nan)

    def _apply(self, fn, recurse=True):
        was_meta = any(parameter.is_meta for parameter in self.parameters())
        super()._apply(keeping_precision(fn), recurse)
        if was_meta and not any(parameter.is_meta for parameter in self.parameters()):
            self.start()
        return self
