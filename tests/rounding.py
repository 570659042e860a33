"""Assert that numbers differ by no more than rounding, whatever machine they come from (benchmarks/rounding.py)."""

import torch
from torch import Tensor, nn

from benchmarks.rounding import rounding
from onelora_diffusion.denoisers import autoencoder_of, denoiser_of


def assert_rounded(found: Tensor, expected: Tensor, terms: int | nn.Module, size: float | None = None) -> None:
    """Assert that values differ by no more than the rounding of so many terms, or of a model.

    Args:
        size: how large the sums get on their way, if larger than the largest expected value.
    """
    dtype = max(found.dtype, expected.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    size = expected.abs().max().item() if size is None else size
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=size * rounding(terms, dtype))


def assert_rounded_together(found: list[Tensor], expected: list[Tensor], terms: int | nn.Module) -> None:
    """The same for tensors that are parts of one result, such as a model's gradients: the largest sets the size."""
    found, expected = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (found, expected))
    assert_rounded(found, expected, terms)


def rounding_of_images(pipeline, num_inference_steps: int) -> float:
    """The error allowed in a pipeline's images in [0, 1]: that of each step's prediction, and of decoding."""
    autoencoder = autoencoder_of(pipeline)
    decoding = rounding(getattr(autoencoder, "decoder", autoencoder))
    return num_inference_steps * rounding(denoiser_of(pipeline)) + decoding
