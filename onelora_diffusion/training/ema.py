"""An exponential moving average of the trained values alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class ExponentialMovingAverage:
    """ema ← d·ema + (1 - d)·value with d = min(decay, (1 + n) / (10 + n)) at update n = 1, 2, ...

    The growing decay is TensorFlow's `num_updates` rule: so the start does not dominate the average of a short run.
    `values` holds the averages in float32, by the names of the trained tensors.
    """

    def __init__(self, trained: dict[str, Tensor], decay: float):
        self.decay = decay
        self.trained = trained
        self.values = {name: tensor.detach().float().clone() for name, tensor in trained.items()}

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        decay = min(self.decay, (1 + num_updates) / (10 + num_updates))
        torch._foreach_lerp_(list(self.values.values()), [t.float() for t in self.trained.values()], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context manager in which the model computes with the averages."""
        kept = {name: tensor.detach().clone() for name, tensor in self.trained.items()}
        try:
            copy_values(self.trained, self.values)
            yield
        finally:
            copy_values(self.trained, kept)


@torch.no_grad()
def copy_values(tensors: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(values[name])
