"""A route: the weighted sums of adapters that a batch needs, and the one that each sample uses."""

import itertools
from collections.abc import Mapping, Sequence

import torch

from onelora_diffusion.adapters.weights import Weight


class Route:
    """The distinct weighted sums of adapters (mixtures) that a batch needs, and the one that each sample uses."""

    def __init__(self, samples: Sequence[Mapping[str, Weight]]):
        self.assign(samples)

    def assign(self, samples: Sequence[Mapping[str, Weight]]) -> None:
        """Set the mixture of each sample; seats that have the route read it again when it is given to them."""
        keys = [repr(mixture) for mixture in samples]
        # K dicts of weights by adapter name, each by a key; an empty one stands for the base alone.
        self.mixtures: dict[str, Mapping[str, Weight]] = dict(zip(keys, samples, strict=True))
        numbers = {key: number for number, key in enumerate(self.mixtures)}
        # The index of the mixture of each sample that was given, and of each in the current batch.
        self.samples = self.batch = [numbers[key] for key in keys]
        self._index = torch.tensor(self.batch)
        self._copied: dict[tuple, torch.Tensor] = {}

    def start(self, args: tuple, kwargs: dict) -> None:
        """Repeat the given samples' mixtures to the size of the batch."""
        first = next(x for x in itertools.chain(args, kwargs.values()) if isinstance(x, torch.Tensor))
        size = len(first)
        if size % len(self.samples):
            raise ValueError(f"a batch of {size} is no multiple of the {len(self.samples)} samples that have a route")
        if size != len(self.batch) or first.device != self._index.device:
            self.batch = self.samples * (size // len(self.samples))
            self._index = torch.tensor(self.batch).to(first.device, non_blocking=True)

    def index(self, device: torch.device) -> torch.Tensor:
        """(batch,) the index of the mixture of every sample."""
        return self._index.to(device)

    def copied(self, numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Numbers as a tensor on the device, copied once, since a copy waits until the GPU has finished its work."""
        if torch.compiler.is_compiling():  # torch.compile caches constants itself
            return torch.tensor(numbers, dtype=dtype, device=device)
        key = (tuple(numbers), dtype, device)
        if key not in self._copied:
            self._copied[key] = torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)
        return self._copied[key]
