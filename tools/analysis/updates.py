"""The weight updates of a fine-tuned model, layer by layer."""

import re
from collections.abc import Iterator

import torch
from torch import nn

from onelora_diffusion.injection.layers import target_layers


def served_parameter(module: nn.Module, name: str) -> torch.Tensor | None:
    """The tensor that the module's forward reads under this name: its own parameter, or the lent one."""
    base, seat = module._parameters[name], module._modules.get("onelora_swap")
    return base if base is None or seat is None or not seat.is_in_use else seat.lend(name, base)


def weight_updates(
    base: nn.Module, finetuned: nn.Module, targets: tuple[str, ...] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (path, ΔW = W − W0) of every linear layer that an adapter would serve; (out, in), fp32.

    Args:
        base, finetuned: models of one architecture. A `full` adapter that serves counts as its model's weights,
            and so does any adapter that is merged.
        targets: as in `AdapterConfig`.

    Raises:
        ValueError: a layer of the base is not in the fine-tuned model with the same shape.
    """
    others = target_layers(finetuned, targets)
    for path, linear in target_layers(base, targets).items():
        if path not in others or others[path].weight.shape != linear.weight.shape:
            raise ValueError(f"{path} with shape {tuple(linear.weight.shape)} is not in the fine-tuned model")
        yield path, served_parameter(others[path], "weight").detach().float() - linear.weight.detach().float()


def layer_kind(path: str) -> str:
    """What a layer is in its block: `transformer_blocks.3.ff.net.2` is an `ff.net.2`."""
    return re.sub(r"^.*?\.\d+\.", "", path)
