"""1LoRA, BitFit, DiffFit and every combination of their parts: trained vectors around a frozen linear layer."""

import functools

import torch
from torch import nn

from onelora_diffusion.adapters.functional import feature_sum
from onelora_diffusion.config import AdapterConfig


class VectorAdapter(nn.Module):
    """y = γ ⊙ (W0 x + bias + β + b·Σᵢ xᵢ) (1LoRA, equation 3 and table 1).

    Holds only the parts its settings ask for, each fp32 of shape (out_features,): `b` and `beta` start at 0,
    `gamma` at 1, so that the adapted layer starts as the base layer.
    """

    def __init__(self, linear: nn.Linear, config: AdapterConfig):
        super().__init__()
        shape, options = (linear.out_features,), {"dtype": torch.float32, "device": linear.weight.device}
        self.b = nn.Parameter(torch.zeros(shape, **options)) if config.sum else None
        self.beta = nn.Parameter(torch.zeros(shape, **options)) if config.bias else None
        self.gamma = nn.Parameter(torch.ones(shape, **options)) if config.scale else None
        self.compression_seed = config.seed if config.compression == "random" else None


def weighted_sum(active: list[tuple[VectorAdapter, float]], part: str) -> torch.Tensor | None:
    """Σₖ wₖ vₖ over the adapters that have this part; γ is weighted around 1. None where no adapter has it.

    The compression is fixed, so a weighted sum of adapters is an adapter of the same size.
    """
    vectors = [(getattr(adapter, part), weight) for adapter, weight in active]
    vectors = [(vector, weight) for vector, weight in vectors if vector is not None]
    if not vectors:
        return None
    if len(vectors) == 1 and vectors[0][1] == 1:
        return vectors[0][0]
    neutral = 1 if part == "gamma" else 0
    return neutral + sum(weight * (vector - neutral) for vector, weight in vectors)


def compress(x: torch.Tensor, seed: int | None) -> torch.Tensor:
    """The feature sum of x, or with a seed its product with a fixed random vector (1LoRA, appendix B.2); fp32."""
    if seed is None:
        return feature_sum(x)
    return x.float() @ random_compression(seed, x.shape[-1], x.device)


@functools.lru_cache
def random_compression(seed: int, in_features: int, device: torch.device) -> torch.Tensor:
    """A vector of N(0, 1) in fp32, the same for every layer with as many input features; never stored."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(in_features, generator=generator).to(device)
