"""Conditions that are kept for a size of image, each argument as long as it is and without the zeros at its ends."""

from collections.abc import Sequence

import torch
from torch import Tensor

from onelora_diffusion.families.family import Conditions


def row_of(name: str, value: Tensor) -> dict[str, Tensor]:
    """An argument for one image as a row of conditions.

    Rows of zeros at its ends, by which some pipelines pad each prompt to thousands of tokens, are left out.
    """
    own = value.flatten(1).any(1).nonzero().flatten().tolist() if value.ndim > 1 else []
    start, end = (own[0], own[-1] + 1) if own else (0, len(value) if value.ndim == 1 else 0)
    part = value[start:end] if value.ndim else value
    return {name: part[None], f"{name}.shape": torch.tensor([[start, *value.shape]])}


def rows_in(name: str, conditions: Conditions) -> list[Tensor]:
    """The arguments of which these are rows, on their device."""
    shapes = conditions[f"{name}.shape"].tolist()
    return [_filled(part, *shape) for part, shape in zip(conditions[name], shapes, strict=True)]


def _filled(part: Tensor, start: int, *shape: int) -> Tensor:
    if not shape:
        return part
    row = part.new_zeros(shape)
    own = part[tuple(slice(size - start * (dim == 0)) for dim, size in enumerate(shape))]
    row[start : start + len(own)] = own
    return row


def shapes_in(names: Sequence[str], conditions: Conditions) -> list[Tensor]:
    """What has to be the same for arguments that are computed together, (batch,) each."""
    return [size for name in names for size in conditions[f"{name}.shape"][:, 1:].unbind(1)]
