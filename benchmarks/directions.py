"""Frozen directions along which a layer's input is read, and what they are made of."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.compare_run import Updates
from onelora_diffusion.adapters.compressions import groups, leading_directions
from onelora_diffusion.adapters.contract import LayerAdapter


class FrozenDirections(LayerAdapter):
    """y = W0 x + bias + B (U x): U (m, k) is frozen, B (d, m) is trained from 0."""

    def __init__(self, linear: nn.Linear, count: int):
        super().__init__()
        self.register_buffer("directions", torch.zeros(count, linear.in_features))
        self.b = nn.Parameter(torch.zeros(linear.out_features, count))

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        return out + (x @ self.directions.T) @ self.b.T

    def merged(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return weight + self.b @ self.directions, bias


class PrincipalStart(LayerAdapter):
    """y = W0 x + bias + B A x - B₀ A₀ x: A and B are trained from A₀ = √S Vᵀ and B₀ = U √S (PiSSA, arXiv:2404.02948).

    U S Vᵀ are the leading `rank` singular values of W0 with their vectors.
    """

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        u, s, v = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
        root = s[:rank].sqrt()
        self.a, self.b = nn.Parameter(root[:, None] * v[:rank]), nn.Parameter(u[:, :rank] * root)
        self.register_buffer("start_a", self.a.detach().clone())
        self.register_buffer("start_b", self.b.detach().clone())

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        return out + (x @ self.a.T) @ self.b.T - (x @ self.start_a.T) @ self.start_b.T

    def merged(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return weight + self.b @ self.a - self.start_b @ self.start_a, bias


@dataclass(frozen=True)
class Seen:
    """What a layer's directions may be made of: W0 (d, k), E[x xᵀ] (k, k) of its inputs, ∂L/∂W (d, k), and chance."""

    weight: Tensor
    moments: Tensor
    gradient: Tensor
    generator: torch.Generator | None = None


# Rules: from what is seen of a layer of k inputs and a count m to directions (m, k).
RULES: dict[str, Callable[[Seen, int], Tensor]] = {
    "inputs' sums": lambda seen, count: groups(count, seen.weight.shape[1], seen.weight.device),
    "outputs' sums": lambda seen, count: groups(count, len(seen.weight), seen.weight.device) @ seen.weight,
    "singular vectors": lambda seen, count: torch.linalg.svd(seen.weight, full_matrices=False)[2][:count],
    "subspace iteration": lambda seen, count: leading_directions(seen.weight, count),
    **{
        f"{rounds} rounds": lambda seen, count, rounds=rounds: leading_directions(seen.weight, count, rounds)
        for rounds in (3, 10)
    },
    "inputs": lambda seen, count: torch.linalg.eigh(seen.moments)[1].T.flip(0)[:count],
    "gradient": lambda seen, count: torch.linalg.svd(seen.gradient, full_matrices=False)[2][:count],
    "random": lambda seen, count: torch.randn(count, len(seen.moments), generator=seen.generator),
}


def directions(seen: Seen, rule: str, count: int, scale: str) -> Tensor:
    """(count, k) directions.

    Args:
        scale: `rms`: the RMS of each u·x is k^¼. `layer`: one factor for the directions of a layer, so that their RMS
            is. `sigma`: each u has the length ‖W0 u‖ of its unit vector. `none`: as the rule has them.
    """
    chosen = RULES[rule](seen, count)
    if scale == "none":
        return chosen
    if scale == "sigma":
        unit = nn.functional.normalize(chosen, dim=1)
        return unit * (unit @ seen.weight.T).norm(dim=1, keepdim=True)
    square = torch.einsum("mk,kl,ml->m", chosen, seen.moments, chosen)
    rms = (square if scale == "rms" else square.mean().expand(count)).sqrt()
    return chosen * (len(seen.moments) ** 0.25 / rms)[:, None]


def look_at(layers: dict[str, nn.Linear], updates: Updates, batches: int) -> dict[str, Seen]:
    """What directions may be made of, for each layer, of the first batches."""
    moments = {path: 0 for path in layers}

    def hook(path):
        def add(seat, args):
            rows = args[0].detach().flatten(0, -2)
            moments[path] = moments[path] + rows.T @ rows / len(rows) / batches

        return add

    handles = [layer.onelora.register_forward_pre_hook(hook(path)) for path, layer in layers.items()]
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    for step in range(batches):
        updates.loss(step).backward()
    gradients = {path: layer.weight.grad for path, layer in layers.items()}
    for handle in handles:
        handle.remove()
    for parameter in updates.transformer.parameters():
        parameter.grad = None
    for layer in layers.values():
        layer.weight.requires_grad_(False)
    generator = torch.Generator().manual_seed(updates.job.seed)
    return {
        path: Seen(layer.weight.detach(), moments[path], gradients[path], generator) for path, layer in layers.items()
    }


def rate_factors(
    layers: dict[str, nn.Linear],
    trained: dict[str, Tensor],
    updates: Updates,
    batches: int,
    name: str,
    multiplied: Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor],
) -> dict[str, float]:
    """k^¼ / RMS of what a trained tensor multiplies, by the tensor's name, over the first batches."""
    squares: dict[str, list[float]] = {path: [] for path in layers}

    def hook(path):
        own = {key.removeprefix(f"{path}."): tensor for key, tensor in trained.items() if key.startswith(f"{path}.")}
        return lambda seat, args: squares[path].append(float(multiplied(*args[:2], own).square().mean()))

    handles = [layer.onelora.register_forward_pre_hook(hook(path)) for path, layer in layers.items()]
    with torch.no_grad():
        for step in range(batches):
            updates.loss(step)
    for handle in handles:
        handle.remove()
    return {
        f"{path}.{name}": layer.in_features**0.25 / statistics.mean(squares[path]) ** 0.5
        for path, layer in layers.items()
    }


def share_of_gradient(layers: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Of each kind of layer, which share of ‖∂L/∂W‖² the directions hold, in the mean over its layers.

    Args:
        layers: for each layer the gradient ∂L/∂W (d, k) and the directions (m, k).
    """
    shares: dict[str, list[float]] = {}
    for path, (gradient, chosen) in layers.items():
        basis = torch.linalg.qr(chosen.T)[0]
        share = (gradient @ basis).square().sum() / gradient.square().sum()
        kind = path.split(".", 2)[2] if path.startswith("transformer_blocks.") else path
        shares.setdefault(kind, []).append(float(share))
    return {kind: statistics.mean(values) for kind, values in shares.items()}
