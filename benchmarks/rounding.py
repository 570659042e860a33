"""How far apart rounding may bring two ways of computing the same numbers, on any machine.

Kernels add in another order on another processor, with more threads, or at another batch size. A sum of n terms is
rounded n times, each time by half an eps of its size at most, up as often as down: such errors grow as √n. Eight
times that is allowed, 4 √n eps of the largest value. Equal bits are asserted only where the same kernels meet the same
shapes and as many threads.
"""

import torch
from torch import nn


def rounding(terms: int | nn.Module, dtype: torch.dtype = torch.float32) -> float:
    """The error allowed in a sum of so many terms, or in a model's output, relative to its size.

    A model adds up one row of each of its weights on the way to an output, in float32 or better, and keeps each sum in
    the weight's own precision.
    """
    if not isinstance(terms, nn.Module):
        return 4 * terms**0.5 * torch.finfo(dtype).eps
    squares = 0.0
    for row in (parameter[0] for parameter in terms.parameters() if parameter.ndim > 1):
        eps = torch.finfo(row.dtype).eps
        squares += row.numel() * min(eps, torch.finfo(torch.float32).eps) ** 2 + eps**2
    return 4 * squares**0.5
