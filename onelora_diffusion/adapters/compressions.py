"""Compressions C in y = W0 x + bias + B (C x). C is fixed and a function of the base alone; no adapter stores it."""

import functools
from dataclasses import dataclass

import torch
from torch import nn

from onelora_diffusion.adapters.functional import group_sums
from onelora_diffusion.config import COMPRESSIONS, AdapterConfig


@dataclass(frozen=True)
class Compression:
    """C, of shape (rank, in_features) for a layer. Equal compressions of one layer are the same C."""

    rank: int = 1

    reads_input = True  # C depends on no tensor of the layer, so layers that read the same input share C x
    reads_bias = reads_weight = False  # whether `compress` needs what `of_base` takes of the layer's bias or weight

    def compress(self, x: torch.Tensor, out: torch.Tensor, of_base: torch.Tensor | None = None) -> torch.Tensor:
        """C x, (...) or (..., rank) for a rank above 1, of a layer's input (..., in_features).

        `out` is the base layer's output for x, (..., out_features), and `of_base` what that method returns for it.
        """
        raise NotImplementedError

    def of_base(self, layer: nn.Linear) -> torch.Tensor | None:
        """What `compress` needs of the base layer beside its input and output, in fp32; None if that is nothing."""

    def matrix(self, weight: torch.Tensor, of_base: torch.Tensor | None = None) -> torch.Tensor:
        """C as (rank, in_features) in fp32, for a base layer's fp32 weight (out_features, in_features)."""
        raise NotImplementedError

    def max_rank(self, in_features: int, out_features: int) -> int:
        return in_features


@dataclass(frozen=True)
class InputSums(Compression):
    """Sums of `rank` groups of the inputs: input i is in group i mod rank (MiSS of that rank; 1LoRA for rank 1)."""

    def compress(self, x, out, of_base=None):
        return group_sums(x, self.rank)

    def matrix(self, weight, of_base=None):
        return groups(self.rank, weight.shape[1], weight.device)


@dataclass(frozen=True)
class OutputSums(Compression):
    """Sums of `rank` groups of the layer's own outputs without its bias, C = G W0: output i is in group i mod rank."""

    reads_input = False
    reads_bias = True

    def compress(self, x, out, of_base=None):
        sums = group_sums(out, self.rank)
        return sums if of_base is None else sums - of_base.to(sums)

    def of_base(self, layer):
        return None if layer.bias is None else self.of_bias(layer.bias.detach())

    def of_bias(self, bias: torch.Tensor) -> torch.Tensor:
        """The share of a bias (out_features,) in the sums, which `compress` subtracts."""
        return group_sums(bias.float(), self.rank)

    def matrix(self, weight, of_base=None):
        return groups(self.rank, len(weight), weight.device) @ weight

    def max_rank(self, in_features, out_features):
        return out_features


@dataclass(frozen=True)
class LeadingDirections(Compression):
    """Products with the directions that the layer amplifies most, of length 1 (`leading_directions`)."""

    reads_input = False
    reads_weight = True

    def compress(self, x, out, of_base=None):
        values = nn.functional.linear(x, of_base.to(x))
        values = values.float() if x.dtype == torch.float16 else values
        return values.squeeze(-1) if self.rank == 1 else values

    def of_base(self, layer):
        return leading_directions(plain_weight(layer), self.rank)

    def matrix(self, weight, of_base=None):
        return of_base

    def max_rank(self, in_features, out_features):
        return min(in_features, out_features)


@dataclass(frozen=True)
class RandomDirections(Compression):
    """Fixed random vectors of N(0, 1), the same for all layers of equal width (1LoRA, appendix B.2)."""

    seed: int = 0

    def compress(self, x, out, of_base=None):
        directions = random_directions(self.seed, self.rank, x.shape[-1], x.device)
        return x.float() @ (directions[0] if self.rank == 1 else directions.T)

    def matrix(self, weight, of_base=None):
        return random_directions(self.seed, self.rank, weight.shape[1], weight.device)


COMPRESSIONS |= {"sum": InputSums, "random": RandomDirections, "outputs": OutputSums, "singular": LeadingDirections}


def compression_of(config: AdapterConfig) -> Compression:
    options = {"seed": config.seed} if config.compression == "random" else {}
    return COMPRESSIONS[config.compression](config.rank, **options)


def groups(rank: int, features: int, device: torch.device) -> torch.Tensor:
    """Indicator matrix of the groups, (rank, features) in fp32: 1 where feature i is in group i mod rank, else 0."""
    index = torch.arange(features, device=device)
    return (index % rank == torch.arange(rank, device=device).unsqueeze(1)).float()


@functools.lru_cache
@torch.inference_mode(False)  # tensors of inference mode cannot be saved for a backward
def random_directions(seed: int, rank: int, in_features: int, device: torch.device) -> torch.Tensor:
    """Draw (rank, in_features) of N(0, 1) in fp32 from the seed; adapter files store the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, in_features, generator=generator).to(device)


@torch.no_grad()
def plain_weight(linear: nn.Linear) -> torch.Tensor:
    """A linear layer's weight (out_features, in_features) in fp32; of a quantised layer, computed by its forward."""
    if type(linear.weight) is nn.Parameter and linear.weight.is_floating_point():
        return linear.weight.detach().float().flatten(1)
    dtype = torch.float32 if linear.bias is None else linear.bias.dtype
    rows = linear.forward(torch.eye(linear.in_features, dtype=dtype, device=linear.weight.device)).float()
    return (rows if linear.bias is None else rows - linear.bias.float()).T


ROUNDS = 6  # of subspace iteration; with other directions, the adapters in files would be wrong


@torch.no_grad()
@torch.inference_mode(False)  # tensors of inference mode cannot be saved for a backward
def leading_directions(weight: torch.Tensor, rank: int, rounds: int = ROUNDS) -> torch.Tensor:
    """Orthonormal directions of the input, (rank, in_features), that a weight (out_features, in_features) amplifies.

    They approximate the span of the leading right singular vectors: a fixed number of rounds of subspace iteration
    (Halko et al., 2011) that starts from the sums of groups of outputs. So they are a smooth function of the weight
    alone, without random numbers or signs left to choice. All is fp32; the rank is at most the smaller width.
    """
    if weight.is_meta:  # autocast has no such device type
        return weight.new_empty(rank, weight.shape[1])
    with torch.autocast(weight.device.type, enabled=False):
        basis = groups(rank, len(weight), weight.device) @ weight
        for _ in range(rounds):
            basis = _orthonormal(basis) @ weight.T @ weight
        return _orthonormal(basis)


def _orthonormal(rows: torch.Tensor) -> torch.Tensor:
    """Gram-Schmidt: each row without its share in those before it, scaled to length 1."""
    q, r = torch.linalg.qr(rows.T)
    return (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).T
