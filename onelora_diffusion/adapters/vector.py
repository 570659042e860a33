"""1LoRA, BitFit, DiffFit and every combination of their parts: trained vectors around a frozen linear layer."""

import functools
from dataclasses import dataclass, field

import torch
from torch import nn

from onelora_diffusion.adapters.contract import Adapter
from onelora_diffusion.adapters.functional import add_outer_, add_vector_, feature_sum
from onelora_diffusion.config import AdapterConfig


@dataclass
class Vectors:
    """b, β and γ of one adapter, of a weighted sum of adapters, or of each sample of a batch; None is not there.

    Attributes:
        b: by the seed of its compression, which is None for the feature sum.
    """

    b: dict[int | None, torch.Tensor] = field(default_factory=dict)
    beta: torch.Tensor | None = None
    gamma: torch.Tensor | None = None

    def serve(self, x: torch.Tensor, out: torch.Tensor, sums: dict | None = None) -> torch.Tensor:
        """y = γ ⊙ (out + β + b · Σᵢ xᵢ) (1LoRA, equation 3 and table 1).

        Args:
            x: (..., in_features), the base layer's input.
            out: (..., out_features), the base layer's output, whose memory is reused.
            sums: the feature sums of x taken so far, filled here. Layers that read the same x share it.
        """
        sums = {} if sums is None else sums
        for seed, b in self.b.items():
            if seed not in sums:
                sums[seed] = compress(x, seed)
            out = add_outer_(out, sums[seed], b)
        if self.beta is not None:
            out = add_vector_(out, self.beta)
        return out if self.gamma is None else self.gamma.to(out.dtype) * out

    def merged(self, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """W = γ ⊙ (W0 + b 1ᵀ), bias = γ ⊙ (bias0 + β), in fp32."""
        for seed, b in self.b.items():
            row = torch.ones_like(weight[0])
            if seed is not None:
                row = random_compression(seed, weight.shape[1], weight.device)
            weight = weight + torch.outer(b.to(weight), row)
        if self.beta is not None:
            bias = bias + self.beta.to(bias)
        if self.gamma is not None:
            weight, bias = self.gamma.to(weight).unsqueeze(1) * weight, self.gamma.to(bias) * bias
        return weight, bias

    def map(self, change) -> "Vectors":
        """Each part that is there, changed."""
        beta, gamma = (None if part is None else change(part) for part in (self.beta, self.gamma))
        return Vectors({seed: change(b) for seed, b in self.b.items()}, beta, gamma)

    @staticmethod
    def stacked(mixtures: list["Vectors"]) -> "Vectors":
        """Each part as (K, out_features), with what changes nothing where a mixture does not have it."""
        seeds = dict.fromkeys(seed for vectors in mixtures for seed in vectors.b)
        return Vectors(
            {seed: _stack([vectors.b.get(seed) for vectors in mixtures], 0) for seed in seeds},
            _stack([vectors.beta for vectors in mixtures], 0),
            _stack([vectors.gamma for vectors in mixtures], 1),
        )

    @staticmethod
    def weighted_sum(group: list[tuple["Vectors", float]]) -> "Vectors":
        """Σₖ wₖ vₖ, part by part; γ is weighted around 1.

        The compression is fixed, so a weighted sum of adapters is an adapter of the same size.
        """
        if len(group) == 1 and group[0][1] == 1:
            return group[0][0]
        return Vectors.combined(group)

    @staticmethod
    def combined(group: list[tuple["Vectors", float | torch.Tensor]]) -> "Vectors":
        """The same by its formula whatever the weights are, so that compiled code need not look at them."""
        seeds = dict.fromkeys(seed for vectors, _ in group for seed in vectors.b)
        return Vectors(
            {seed: _sum([(vectors.b.get(seed), weight) for vectors, weight in group], 0) for seed in seeds},
            _sum([(vectors.beta, weight) for vectors, weight in group], 0),
            _sum([(vectors.gamma, weight) for vectors, weight in group], 1),
        )


class VectorAdapter(Adapter):
    """y = γ ⊙ (W0 x + bias + β + b·Σᵢ xᵢ) (1LoRA, equation 3 and table 1).

    Holds only the parts its settings ask for, each fp32 of shape (out_features,): `b` and `beta` start at 0,
    `gamma` at 1, so that the adapted layer starts as the base layer.
    """

    def __init__(self, linear: nn.Linear, config: AdapterConfig):
        super().__init__()
        shape, options = (linear.out_features,), {"dtype": torch.float32, "device": linear.weight.device}
        self.in_features = linear.in_features
        self.b = nn.Parameter(torch.zeros(shape, **options)) if config.sum else None
        self.beta = nn.Parameter(torch.zeros(shape, **options)) if config.bias else None
        self.gamma = nn.Parameter(torch.ones(shape, **options)) if config.scale else None
        self.compression_seed = config.seed if config.compression == "random" else None

    def forward(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """y = γ ⊙ (out + β + b · Σᵢ xᵢ), in the memory of `out`."""
        return self.vectors().serve(x, out)

    def vectors(self) -> Vectors:
        return Vectors({} if self.b is None else {self.compression_seed: self.b}, self.beta, self.gamma)

    def merged(self, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.vectors().merged(weight, bias)

    @classmethod
    def summed(cls, group, names, path):
        if (other := next((i for i, (adapter, _) in enumerate(group) if adapter.vectors() is None), None)) is not None:
            return type(group[other][0]).summed(group[other:], names[other:], path)
        total = Vectors.weighted_sum([(adapter.vectors(), weight) for adapter, weight in group])
        parts = {"b": next(iter(total.b.values()), None), "beta": total.beta, "gamma": total.gamma}
        return {f"onelora_{name}": part.clone() for name, part in parts.items() if part is not None}

    def lora(self) -> tuple[torch.Tensor, torch.Tensor]:
        reasons = {
            "it trains biases (β)": self.beta is not None,
            "it trains scales (γ)": self.gamma is not None,
            "its compression is random, not the sum": self.compression_seed is not None,
            "it has no sum part (b)": self.b is None,
        }
        if found := [reason for reason, holds in reasons.items() if holds]:
            raise ValueError(", ".join(found))
        return torch.ones(1, self.in_features), self.b.detach().cpu().float().unsqueeze(1)


def build_vectors(layers: dict[str, nn.Linear], config: AdapterConfig) -> dict[str, Adapter]:
    if not (config.sum or config.bias or config.scale):
        return {}
    return {path: VectorAdapter(linear, config) for path, linear in layers.items()}


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


def _sum(parts: list[tuple[torch.Tensor | None, float | torch.Tensor]], neutral: float) -> torch.Tensor | None:
    present = [(part, weight) for part, weight in parts if part is not None]
    return neutral + sum(weight * (part - neutral) for part, weight in present) if present else None


def _stack(parts: list[torch.Tensor | None], neutral: float) -> torch.Tensor | None:
    present = [part for part in parts if part is not None]
    if not present:
        return None
    return torch.stack([torch.full_like(present[0], neutral) if part is None else part for part in parts])
