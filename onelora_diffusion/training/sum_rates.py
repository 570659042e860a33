"""Learning rates of b for each layer, divided by the size of the feature sums that b multiplies there.

Adam changes every number of b by about the learning rate, whatever its gradient. So the layer's output changes by the
learning rate times the sum, whose RMS differs between the layers of a model by a factor of ten and more. Therefore
each layer's learning rate is divided by that RMS. The forward pass, files and merging stay the same.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from onelora_diffusion.adapters.base_layer import features_of
from onelora_diffusion.injection.linear import LinearSeat

SUM = "onelora_b"


class SumScales:
    """The mean square of each layer's sum that a trained `<path>.onelora_b` multiplies, over the passes `watching`."""

    def __init__(self, transformer: nn.Module, trained: dict[str, Tensor], adapter_name: str = "default"):
        self.adapter_name = adapter_name
        names = [name for name in trained if name.endswith(f".{SUM}")]
        self.seats: dict[str, LinearSeat] = {
            name: transformer.get_submodule(name.removesuffix(f".{SUM}")).onelora for name in names
        }
        self.squares: dict[str, list[Tensor]] = {name: [] for name in names}

    @contextmanager
    def watching(self, samples: slice = slice(None)) -> Iterator[None]:
        """Context manager that measures the sums of these samples; compiled code, which skips hooks, is not run."""
        handles = [seat.register_forward_pre_hook(self._look(name, samples)) for name, seat in self.seats.items()]
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _look(self, name: str, samples: slice):
        @torch.no_grad()
        def hook(seat: LinearSeat, args: tuple) -> None:
            vectors, (x, out) = seat[self.adapter_name].vectors(), (each.detach()[samples] for each in args[:2])
            compression = next(iter(vectors.b))
            compressed = compression.compress(x, out, vectors.of_base[compression])
            self.squares[name].append(compressed.float().square().mean())

        return hook

    def factors(self, accelerator: Accelerator) -> dict[str, float]:
        """k^¼ / RMS(Σx) for each layer of k inputs, the same on every process, rounded to a power of √2.

        Layers of equal factors share a group of the optimiser, so that its update takes few kernels. k^¼ is the
        geometric mean of 1, a bias's input, and √k, the RMS of a sum of k independent inputs of unit variance.
        """
        names = list(self.seats)
        if not names:
            return {}
        means = torch.stack([torch.stack(self.squares[name]).mean() for name in names])
        means = accelerator.reduce(means, "mean").tolist()
        factors = {}
        for name, mean in zip(names, means, strict=True):
            exact = features_of(self.seats[name].layer)[0] ** 0.25 / math.sqrt(mean) if mean else 1.0
            factors[name] = 2 ** (round(2 * math.log2(exact)) / 2)
        return factors

    @staticmethod
    def in_words(factors: dict[str, float]) -> str:
        if not factors:
            return "rates by the sum: no layer has one, all learn at their plain rates"
        low, high = min(factors.values()), max(factors.values())
        return f"rates by the sum: {len(factors)} layers learn at {low:.3g} to {high:.3g} times the learning rate"


def divide_groups(optimizer: Optimizer, trained: dict[str, Tensor], factors: dict[str, float]) -> None:
    """Split the groups of an optimiser before its first step, and multiply each tensor's rate by its factor."""
    factor_of = {trained[name]: factor for name, factor in factors.items()}
    groups = []
    for group in optimizer.param_groups:
        for factor in sorted({factor_of.get(parameter, 1.0) for parameter in group["params"]}):
            parameters = [parameter for parameter in group["params"] if factor_of.get(parameter, 1.0) == factor]
            rates = {name: group[name] * factor for name in ("lr", "peak_lr")}
            groups.append({**group, **rates, "factor": factor, "params": parameters})
    optimizer.param_groups[:] = groups
