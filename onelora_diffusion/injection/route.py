"""What a route is to the seats: which mixtures of adapters a batch asks for, and which of them each sample takes."""

import itertools
from collections.abc import Mapping, Sequence

import torch

from onelora_diffusion.adapters.weights import Weight


class Route:
    """The different sums of adapters that a batch asks for, and which of them each sample takes.

    Attributes:
        mixtures: (K) weights by adapter name; an empty one is the bare base.
        samples: for each given sample, the number of its mixture.
        batch: the same for every sample of the batch that is in the model now.
    """

    def __init__(self, samples: Sequence[Mapping[str, Weight]]):
        self.mixtures: list[Mapping[str, Weight]] = []
        self.samples: list[int] = []
        numbers: dict[str, int] = {}
        for mixture in samples:
            if (key := repr(mixture)) not in numbers:
                numbers[key] = len(self.mixtures)
                self.mixtures.append(mixture)
            self.samples.append(numbers[key])
        self.batch = self.samples
        self._index = torch.tensor(self.batch)
        self._copied: dict[tuple, torch.Tensor] = {}

    def start(self, args: tuple, kwargs: dict) -> None:
        """Spread the samples over the batch that comes into the model."""
        first = next(x for x in itertools.chain(args, kwargs.values()) if isinstance(x, torch.Tensor))
        size = len(first)
        if size % len(self.samples):
            raise ValueError(f"a batch of {size} is no multiple of the {len(self.samples)} samples that have a route")
        if size != len(self.batch) or first.device != self._index.device:
            self.batch = self.samples * (size // len(self.samples))
            self._index = torch.tensor(self.batch, device=first.device)

    def index(self, device: torch.device) -> torch.Tensor:
        """(batch,) the mixture of every sample."""
        return self._index.to(device)

    def copied(self, numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Numbers as a tensor. Copied to the device once: every copy waits for what a GPU has been given to do."""
        if torch.compiler.is_compiling():  # a compiler keeps constants itself
            return torch.tensor(numbers, dtype=dtype, device=device)
        key = (tuple(numbers), dtype, device)
        if key not in self._copied:
            self._copied[key] = torch.tensor(numbers, dtype=dtype, device=device)
        return self._copied[key]
