"""MoRA types 1 and 6: a trained square matrix between fixed compression and decompression."""

import functools
import math

import torch
from torch import nn

from onelora_diffusion.adapters.base_layer import features_of
from onelora_diffusion.adapters.contract import LayerAdapter
from onelora_diffusion.config import AdapterConfig

ROPE_BASE = 10000


class MoraAdapter(LayerAdapter):
    """y = W0 x + bias + f_d(M f_c(x)) (MoRA, arXiv 2405.12130, equations 6 and 9; 1LoRA, table 1).

    M is (r̂, r̂) in fp32 and starts at 0. The input is padded with its own first features to n groups of r̂.
    Type 1 (sharing): f_c sums the groups, f_d repeats the r̂ results. Type 6 (RoPE): f_c rotates each group by
    its index, M serves every group, f_d lays the groups end to end and repeats or cuts them to out_features.
    """

    def __init__(self, linear: nn.Linear, kind: int):
        super().__init__()
        self.kind, (self.in_features, self.out_features) = kind, features_of(linear)
        rank = square_rank(self.out_features, kind)
        self.M = nn.Parameter(torch.empty(rank, rank, dtype=torch.float32, device=linear.weight.device))
        self.start()

    @torch.no_grad()
    def start(self) -> None:
        self.M.zero_()

    def forward(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """(..., in_features) and the base layer's (..., out_features) -> (..., out_features)."""
        return out + self.update(x).to(out.dtype)

    def update(self, x: torch.Tensor) -> torch.Tensor:
        """f_d(M f_c(x)): (..., in_features) -> (..., out_features)."""
        rank = len(self.M)
        groups = math.ceil(self.in_features / rank)
        x = repeat_to(x, groups * rank).unflatten(-1, (groups, rank))
        x = x.sum(-2) if self.kind == 1 else rotate(x)
        x = x @ self.M.T.to(x.dtype)
        return repeat_to(x if self.kind == 1 else x.flatten(-2), self.out_features)

    def delta_weight(self) -> torch.Tensor:
        """ΔW (out_features, in_features), fp32: the update is linear, so its columns are those of the unit vectors."""
        return self.update(torch.eye(self.in_features, device=self.M.device)).T

    def merged(self, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return weight + self.delta_weight(), bias


def build_mora(layers: dict[str, nn.Linear], config: AdapterConfig) -> dict[str, LayerAdapter]:
    return {path: MoraAdapter(linear, kind=int(config.method[-1])) for path, linear in layers.items()}


def square_rank(out_features: int, kind: int) -> int:
    """r̂ = ⌊√d + ½⌋, so that M has about as many weights as 1LoRA's b; even for type 6, which rotates halves."""
    rank = int(math.sqrt(out_features) + 0.5)
    return max(2, rank // 2 * 2) if kind == 6 else rank


def repeat_to(x: torch.Tensor, length: int) -> torch.Tensor:
    """Repeat the last dimension from its first entry on, or cut it, to `length`."""
    whole, rest = divmod(length, x.shape[-1])
    return torch.cat([x] * whole + [x[..., :rest]], dim=-1)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of (..., n, r̂) by the index of the group; feature i turns with feature i + r̂/2."""
    angles = _angles if torch.compiler.is_compiling() else _kept_angles  # torch.compile caches constants itself
    cos, sin = angles(*x.shape[-2:], x.device, x.dtype)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


@functools.lru_cache
def _kept_angles(*args) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode(False):  # the cached tensors may be saved for a backward later
        return _angles(*args)


def _angles(groups: int, rank: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    frequencies = ROPE_BASE ** -(torch.arange(0, rank, 2, dtype=torch.float32) / rank)
    angles = torch.outer(torch.arange(groups, dtype=torch.float32), frequencies).repeat(1, 2)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)
