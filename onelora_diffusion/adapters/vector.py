"""1LoRA, BitFit, DiffFit and every combination of their parts: trained vectors around a frozen linear layer."""

import functools
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from onelora_diffusion.adapters import functional
from onelora_diffusion.adapters.base_layer import features_of, offload_group
from onelora_diffusion.adapters.compressions import Compression, compression_of, plain_weight
from onelora_diffusion.adapters.contract import LayerAdapter
from onelora_diffusion.config import AdapterConfig


@dataclass
class Vectors:
    """b, β and γ of one adapter, of a weighted sum of adapters, or of each sample of a batch; an absent part is None.

    `b` has for each compression a decompression (out_features,), or (rank, out_features) for a rank above 1; `of_base`
    what it needs of the base layer. With `per_sample` each trained part has a leading dimension for the samples.
    """

    b: dict[Compression, torch.Tensor] = field(default_factory=dict)
    beta: torch.Tensor | None = None
    gamma: torch.Tensor | None = None
    of_base: dict[Compression, torch.Tensor | None] = field(default_factory=dict)
    per_sample: bool = False

    def serve(self, x: torch.Tensor, out: torch.Tensor, base: torch.Tensor, sums: dict | None = None) -> torch.Tensor:
        """y = γ ⊙ (out + β + B (C x)); for one sum, B (C x) is b · Σᵢ xᵢ (1LoRA, equation 3 and table 1).

        Args:
            x: (..., in_features), the layer's input.
            out: (..., out_features), to which the terms are added in place.
            base: the base layer's own output for x, which `out` may be.
            sums: the compressed values of x by compression; new ones are added. Layers with the same x share it.
        """
        add_outer, add_vector, scale = (
            (functional.add_outer_rows_, functional.add_vector_rows_, functional.scale_rows)
            if self.per_sample
            else (functional.add_outer_, functional.add_vector_, lambda out, gamma: gamma.to(out.dtype) * out)
        )
        sums = {} if sums is None else sums
        compressed = []  # compute all before `out` is changed, as it may be the same tensor as `base`
        for compression, b in self.b.items():
            shared = sums if compression.reads_input else {}
            if compression not in shared:
                shared[compression] = compression.compress(x, base, self.of_base.get(compression))
            compressed.append((shared[compression], b))
        for s, b in compressed:
            out = add_outer(out, s, b)
        if self.beta is not None:
            out = add_vector(out, self.beta)
        return out if self.gamma is None else scale(out, self.gamma)

    def merged(self, weight: torch.Tensor, bias: torch.Tensor, base: torch.Tensor):
        """W = γ ⊙ (weight + B C), bias = γ ⊙ (bias + β), in fp32; C is that of the base layer's weight `base`."""
        for compression, b in self.b.items():
            matrix = compression.matrix(base, self.of_base.get(compression))
            weight = weight + torch.atleast_2d(b.to(weight)).T @ matrix
        if self.beta is not None:
            bias = bias + self.beta.to(bias)
        if self.gamma is not None:
            weight, bias = self.gamma.to(weight).unsqueeze(1) * weight, self.gamma.to(bias) * bias
        return weight, bias

    @property
    def require_grad(self) -> bool:
        return any(part is not None and part.requires_grad for part in (*self.b.values(), self.beta, self.gamma))

    def map(self, change) -> "Vectors":
        """Apply `change` to each part that is not None."""
        beta, gamma = (None if part is None else change(part) for part in (self.beta, self.gamma))
        return replace(self, b={kind: change(b) for kind, b in self.b.items()}, beta=beta, gamma=gamma)

    @staticmethod
    def stacked(mixtures: list["Vectors"]) -> "Vectors":
        """Stack each part of K mixtures; a missing part is filled with values that change nothing (0, or 1 for γ)."""
        return replace(Vectors._joined(mixtures, _stack), per_sample=True)

    @staticmethod
    def weighted_sum(group: list[tuple["Vectors", float]]) -> "Vectors":
        """Σₖ wₖ vₖ, part by part, γ around 1: as the compression is fixed, an adapter of the same size."""
        if len(group) == 1 and group[0][1] == 1:
            return group[0][0]
        return Vectors.combined(group)

    @staticmethod
    def combined(group: list[tuple["Vectors", float | torch.Tensor]]) -> "Vectors":
        """As `weighted_sum`, without branches on the weights, so that compiled code is right for all their values."""
        weights = [weight for _, weight in group]
        return Vectors._joined([vectors for vectors, _ in group], lambda parts, neutral: _sum(parts, weights, neutral))

    @staticmethod
    def _joined(group: list["Vectors"], join) -> "Vectors":
        """Join each part of a group by `join(parts, neutral)`, of which the neutral value changes nothing."""
        kinds = dict.fromkeys(kind for vectors in group for kind in vectors.b)
        return Vectors(
            {kind: join([vectors.b.get(kind) for vectors in group], 0) for kind in kinds},
            join([vectors.beta for vectors in group], 0),
            join([vectors.gamma for vectors in group], 1),
            {kind: of_base for vectors in group for kind, of_base in vectors.of_base.items()},
        )


class VectorAdapter(LayerAdapter):
    """y = γ ⊙ (W0 x + bias + β + B (C x)); for one sum, B (C x) is b·Σᵢ xᵢ (1LoRA, equation 3 and table 1).

    It holds the parts that its settings ask for, in fp32. `b`, (out_features,) or (rank, out_features) for a rank
    above 1, and `beta`, (out_features,), start at 0; `gamma`, (out_features,), starts at 1. So the adapted layer
    starts as the base layer. C is not stored: it is computed by `compressions`.
    """

    def __init__(self, linear: nn.Linear, config: AdapterConfig):
        super().__init__()
        shape, options = features_of(linear)[1:], {"dtype": torch.float32, "device": linear.weight.device}
        self.compression = compression_of(config)
        decompression = shape if config.rank == 1 else (config.rank, *shape)
        self.b = nn.Parameter(torch.empty(decompression, **options)) if config.sum else None
        self.beta = nn.Parameter(torch.empty(shape, **options)) if config.bias else None
        self.gamma = nn.Parameter(torch.empty(shape, **options)) if config.scale else None
        self.register_buffer("of_base", None, persistent=False)
        self.start()

    def serve(self, layer: nn.Module) -> None:
        object.__setattr__(self, "layer", layer)  # no child module: the base's layer is not part of the adapter
        if self.b is not None and not self.compression.reads_weight:
            self.of_base = self.compression.of_base(layer)  # now, as it cannot be while the layer is offloaded
        if self.takes_directions:
            self.directions_of(layer)

    @property
    def takes_directions(self) -> bool:
        return self.b is not None and self.compression.reads_weight

    def directions_of(self, layer: nn.Module) -> torch.Tensor:
        """The directions of the weight of `layer` that its input is read along: (rank, in_features), of length 1."""
        if self.of_base is None:
            others = layer._modules["onelora"].children() if "onelora" in layer._modules else ()
            known = [other.of_base for other in others if getattr(other, "compression", None) == self.compression]
            known = [of_base for of_base in known if of_base is not None]  # the adapters of a layer share it
            self.of_base = known[0] if known else self.compression.of_base(layer)
        return self.of_base

    @torch.no_grad()
    def start(self) -> None:
        for name, parameter in self.named_parameters():
            parameter.fill_(name == "gamma")
        if self.compression.reads_weight:
            self.of_base = None

    def forward(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """y = γ ⊙ (out + β + B (C x)), in the memory of `out`."""
        return self.vectors().serve(x, out, out)

    def vectors(self) -> Vectors:
        if self.b is None:
            return Vectors({}, self.beta, self.gamma)
        compression, of_base = self.compression, self.of_base
        if compression.reads_bias and of_base is not None:
            of_base = self.layer.onelora.of_bias(compression, of_base)
        elif compression.reads_weight and of_base is None:  # the weight has come from the meta device since
            of_base = self.directions_of(self.layer)
        return Vectors({compression: self.b}, self.beta, self.gamma, {compression: of_base})

    def merged(self, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.vectors().merged(weight, bias, weight)

    @classmethod
    def summed(cls, group, names, path):
        if (other := next((i for i, (adapter, _) in enumerate(group) if adapter.vectors() is None), None)) is not None:
            return type(group[other][0]).summed(group[other:], names[other:], path)
        total = Vectors.weighted_sum([(adapter.vectors(), weight) for adapter, weight in group])
        parts = {"b": next(iter(total.b.values()), None), "beta": total.beta, "gamma": total.gamma}
        return {f"onelora_{name}": part.clone() for name, part in parts.items() if part is not None}

    def lora(self, with_bias: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        reasons = {
            "it trains biases (β)": self.beta is not None and not with_bias,
            "it trains scales (γ)": self.gamma is not None,
            "it has no sum part (b)": self.b is None and not (with_bias and self.beta is not None),
        }
        if found := [reason for reason, holds in reasons.items() if holds]:
            raise ValueError(", ".join(found))
        in_features, out_features = features_of(self.layer)
        beta = None if self.beta is None else self.beta.detach().cpu().float()
        if self.b is None:
            return torch.zeros(0, in_features), torch.zeros(out_features, 0), beta
        shape_alone = torch.zeros(()).expand(out_features, in_features)
        weight = shape_alone if self.compression.reads_input else plain_weight(self.layer)
        b = torch.atleast_2d(self.b.detach().cpu().float()).T.contiguous()
        return self.compression.matrix(weight, self.vectors().of_base[self.compression]).cpu().clone(), b, beta


def build_vectors(layers: dict[str, nn.Linear], config: AdapterConfig) -> dict[str, LayerAdapter]:
    if not (config.sum or config.bias or config.scale):
        return {}
    compression = compression_of(config)
    for path, linear in layers.items() if config.sum else ():
        features = compression.max_rank(*features_of(linear))
        what = "bias" if compression.reads_bias else "weight"
        if not compression.reads_input and getattr(offload_group(linear), "offload_to_disk_path", None):
            raise ValueError(f"{path} is on the disk, but its {what} is read: attach before enable_group_offload")
        if linear.weight.is_complex():
            raise ValueError(f"{path} computes with complex numbers, these vectors do not: leave it out of targets")
        if config.rank > features:
            raise ValueError(f"a rank of {config.rank} is above the {features} features of {path} that are compressed")
    return {path: VectorAdapter(linear, config) for path, linear in layers.items()}


def _sum(parts: list[torch.Tensor | None], weights: list[float | torch.Tensor], neutral: float) -> torch.Tensor | None:
    present = [(part, weight) for part, weight in zip(parts, weights, strict=True) if part is not None]
    if not present:
        return None
    # This skips the zeros of the general formula, since it runs at every forward.
    terms = [weight * (part - neutral if neutral else part) for part, weight in present]
    total = functools.reduce(torch.add, terms)
    return neutral + total if neutral else total


def _stack(parts: list[torch.Tensor | None], neutral: float) -> torch.Tensor | None:
    present = [part for part in parts if part is not None]
    if not present:
        return None
    return torch.stack([torch.full_like(present[0], neutral) if part is None else part for part in parts])
