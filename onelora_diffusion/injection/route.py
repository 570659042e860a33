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
        self._index: dict[tuple[int, torch.device], torch.Tensor] = {}

    def start(self, args: tuple, kwargs: dict) -> None:
        """Spread the samples over the batch that comes into the model."""
        size = next(len(x) for x in itertools.chain(args, kwargs.values()) if isinstance(x, torch.Tensor))
        if size % len(self.samples):
            raise ValueError(f"a batch of {size} is no multiple of the {len(self.samples)} samples that have a route")
        self.batch = self.samples * (size // len(self.samples))

    def index(self, device: torch.device) -> torch.Tensor:
        """(batch,) the mixture of every sample."""
        key = (len(self.batch), device)
        if key not in self._index:
            self._index[key] = torch.tensor(self.batch, device=device)
        return self._index[key]
