"""All adapters of one base layer, side by side, and the hook through which they serve it."""

import torch
from torch import nn

from onelora_diffusion.adapters.functional import add_outer_, add_vector_
from onelora_diffusion.adapters.vector import VectorAdapter, compress, random_compression, weighted_sum
from onelora_diffusion.adapters.weights import keeping_precision


class LayerAdapters(nn.ModuleDict):
    """The named adapters of one linear layer; `active` says which of them serve and with what weight.

    While a `route` is open, it decides sample by sample in their place.
    """

    def __init__(self):
        super().__init__()
        self.active: dict[str, float] = {}
        self.route = None
        self._cached_vectors = None

    def forward(self, x: torch.Tensor, out: torch.Tensor, sums: dict | None = None) -> torch.Tensor:
        """The base layer's output with the active adapters' terms.

        Args:
            x: (..., in_features), the base layer's input.
            out: (..., out_features), the base layer's output; its memory is reused.
            sums: the feature sums of x taken so far, filled here. Layers that read the same x share it.
        """
        sums = {} if sums is None else sums
        if self.route is not None:
            return self.route(x, out, sums)
        if not self.active:
            return out
        base = out
        for name, weight in self.active.items():
            if not isinstance(self[name], VectorAdapter):
                adapted = self[name](x, base)  # new memory, which the vectors' terms below may reuse
                out = adapted if out is base and weight == 1 else out + weight * (adapted - base)
        decompressions, beta, gamma = self.vectors()
        for seed, b in decompressions.items():
            if seed not in sums:
                sums[seed] = compress(x, seed)
            out = add_outer_(out, sums[seed], b)
        if beta is not None:
            out = add_vector_(out, beta)
        if gamma is not None:
            out = gamma.to(out.dtype) * out
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

    def set_active(self, active: dict[str, float]) -> None:
        self.active = {name: weight for name, weight in active.items() if name in self._modules}
        self._cached_vectors = None

    @torch.no_grad()
    def merged(self, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The base layer's fp32 weight (out, in) and bias (out,) with the active adapters folded in.

        W = γ ⊙ (W0 + ΔW + b 1ᵀ), bias = γ ⊙ (bias0 + β), where ΔW is that of every other method.
        """
        base = weight, bias
        for name, scale in self.active.items():
            if not isinstance(self[name], VectorAdapter):
                adapted = self[name].merged(*base)
                weight, bias = weight + scale * (adapted[0] - base[0]), bias + scale * (adapted[1] - base[1])
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
        return weight, bias

    def _apply(self, fn, recurse=True):
        self._cached_vectors = None  # the vectors move to another device

        return super()._apply(keeping_precision(fn), recurse)


def _sums_of(active: list[tuple[VectorAdapter, float]]):
    seeds = dict.fromkeys(adapter.compression_seed for adapter, _ in active if adapter.b is not None)
    same_seed = {seed: [(a, w) for a, w in active if a.compression_seed == seed] for seed in seeds}
    decompressions = {seed: weighted_sum(group, "b") for seed, group in same_seed.items()}
    return decompressions, weighted_sum(active, "beta"), weighted_sum(active, "gamma")


def adapter_hook(linear: nn.Module, args: tuple, out: torch.Tensor) -> torch.Tensor:
    """Forward hook of an adapted linear layer."""
    return linear.onelora(args[0], out)
