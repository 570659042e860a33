"""How far apart rounding may bring two ways of computing the same numbers, on any machine.

Kernels add in another order on another processor, with more threads, or at another batch size. A sum of n terms is
rounded n times, each time by half an eps of its size at most, up as often as down: such errors grow as √n. Eight
times that is allowed, 4 √n eps of the largest value. Equal bits are asserted only where the same kernels meet the same
shapes and as many threads.
"""

import torch
from torch import Tensor, nn


def rounding(terms: int, dtype: torch.dtype = torch.float32) -> float:
    """The error allowed in a sum of so many terms, relative to its size."""
    return 4 * terms**0.5 * torch.finfo(dtype).eps


def terms_of(model: nn.Module) -> int:
    """The terms that a model adds up on the way to one output: what one row of each of its weights has.

    In half precision a row is summed in float32 and rounded once, to the layer's output.
    """
    rows = [parameter[0] for parameter in model.parameters() if parameter.ndim > 1]
    return sum(row.numel() if row.element_size() >= 4 else 1 for row in rows)


def assert_rounded(found: Tensor, expected: Tensor, terms: int | nn.Module, size: float | None = None) -> None:
    """Assert that values differ by no more than the rounding of so many terms, or of a model's.

    Args:
        size: how large the terms' sums get on their way, if larger than the largest expected value.
    """
    terms = terms_of(terms) if isinstance(terms, nn.Module) else terms
    size = expected.abs().max().item() if size is None else size
    torch.testing.assert_close(found, expected, rtol=0, atol=size * rounding(terms, expected.dtype))
