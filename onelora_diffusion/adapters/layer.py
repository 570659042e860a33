"""All adapters of one base layer, side by side, and the hook through which they serve it."""

import torch
from torch import nn

from onelora_diffusion.adapters.functional import add_outer_, add_vector_
from onelora_diffusion.adapters.vector import VectorAdapter, compress, random_compression, weighted_sum


class LayerAdapters(nn.ModuleDict):
    """The named adapters of one linear layer; `active` says which of them serve and with what weight."""

    def __init__(self):
        super().__init__()
        self.active: dict[str, float] = {}
        self._cached_vectors = None

    def forward(self, x: torch.Tensor, out: torch.Tensor, sums: dict | None = None) -> torch.Tensor:
        """The base layer's output with the active adapters' terms.

        Args:
            x: (..., in_features), the base layer's input.
            out: (..., out_features), the base layer's output; its memory is reused.
            sums: the feature sums of x taken so far, filled here. Layers that read the same x share it.
        """
        if not self.active:
            return out
        sums = {} if sums is None else sums
        decompressions, beta, gamma = self.vectors()
        for seed, b in decompressions.items():
            if seed not in sums:
                sums[seed] = compress(x, seed)
            out = add_outer_(out, sums[seed], b)
        if beta is not None:
            out = add_vector_(out, beta)
        if gamma is not None:
            out = gamma.to(out.dtype) * out
        for name, weight in self.active.items():
            if not isinstance(self[name], VectorAdapter):
                out = out + weight * self[name](x)
        return out

    def vectors(self) -> tuple[dict[int | None, torch.Tensor], torch.Tensor | None, torch.Tensor | None]:
        """({compression seed: b}, β, γ): the weighted sums of the active vector adapters.

        Without gradients the sums are taken once and kept until a vector or a weight changes.
        """
        active = [(self[name], weight) for name, weight in self.active.items()]
        active = [(adapter, weight) for adapter, weight in active if isinstance(adapter, VectorAdapter)]
        if len(active) == 1 and active[0][1] == 1:
            adapter = active[0][0]
            return (
                {} if adapter.b is None else {adapter.compression_seed: adapter.b},
                adapter.beta,
                adapter.gamma,
            )
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return _sums_of(active)
        versions = [(weight, *(vector._version for vector in adapter.parameters())) for adapter, weight in active]
        if self._cached_vectors is None or self._cached_vectors[0] != versions:
            self._cached_vectors = versions, _sums_of(active)
        return self._cached_vectors[1]

    def set_active(self, linear: nn.Module, active: dict[str, float]) -> None:
        self.active = {name: weight for name, weight in active.items() if name in self}
        self._cached_vectors = None

    @torch.no_grad()
    def merged(self, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The base layer's fp32 weight (out, in) and bias (out,) with the active adapters folded in.

        W = γ ⊙ (W0 + b 1ᵀ), bias = γ ⊙ (bias0 + β), and ΔW of every other method.
        """
        decompressions, beta, gamma = self.vectors()
        for seed, b in decompressions.items():
            row = torch.ones_like(weight[0])
            if seed is not None:
                row = random_compression(seed, weight.shape[1], weight.device)
            weight = weight + torch.outer(b.to(weight), row)
        if beta is not None:
            bias = bias + beta.to(bias)
        if gamma is not None:
            weight, bias = gamma.to(weight).unsqueeze(1) * weight, gamma.to(bias) * bias
        for name, scale in self.active.items():
            if not isinstance(self[name], VectorAdapter):
                weight = weight + scale * self[name].delta_weight().to(weight)
        return weight, bias

    def _apply(self, fn, recurse=True):
        self._cached_vectors = None  # the vectors move to another device or dtype
        return super()._apply(fn, recurse)


def _sums_of(active: list[tuple[VectorAdapter, float]]):
    seeds = dict.fromkeys(adapter.compression_seed for adapter, _ in active if adapter.b is not None)
    same_seed = {seed: [(a, w) for a, w in active if a.compression_seed == seed] for seed in seeds}
    decompressions = {seed: weighted_sum(group, "b") for seed, group in same_seed.items()}
    return decompressions, weighted_sum(active, "beta"), weighted_sum(active, "gamma")


def adapter_hook(linear: nn.Module, args: tuple, out: torch.Tensor) -> torch.Tensor:
    """Forward hook of an adapted linear layer."""
    return linear.onelora(args[0], out)
