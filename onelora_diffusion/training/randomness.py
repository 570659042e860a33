"""Randomness that is a function of the seed and the step alone.

Everything random in a step is drawn for the global batch and sliced by processes and micro-batches, so a run
does not depend on how it is spread over processes, on accumulation or on interruptions, and resuming it needs
the number of the step and no generator states.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from onelora_diffusion.data.latents import sample_moments

# One independent stream of numbers for each purpose: drawing more for one does not move another.
BATCH_ORDER, FLIPS, POSTERIOR_NOISE, NOISE, TIMESTEPS, LABEL_DROPS = range(6)


def keyed_generator(seed: int, purpose: int, index: int) -> np.random.Generator:
    # NumPy's seed sequence mixes the whole key; torch's CPU generator keeps 32 bits of a seed.
    return np.random.default_rng((seed, purpose, index))


@lru_cache(maxsize=4)
def epoch_permutation(seed: int, epoch: int, num_images: int) -> np.ndarray:
    return keyed_generator(seed, BATCH_ORDER, epoch).permutation(num_images)


def batch_indices(seed: int, step: int, batch_size: int, num_images: int) -> list[int]:
    """The images of a global batch: batches are cut from an endless row of permutations, one an epoch."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [int(epoch_permutation(seed, p // num_images, num_images)[p % num_images]) for p in positions]


def batch_flips(seed: int, step: int, batch_size: int) -> list[bool]:
    return (keyed_generator(seed, FLIPS, step).random(batch_size) < 0.5).tolist()


class StepDraws(NamedTuple):
    """What a step draws for each sample of its batch, before any is sliced."""

    posterior_noise: Tensor  # (batch, C, H, W) float32, of the VAE's posterior
    noise: Tensor  # (batch, C, H, W) float32, of the diffusion
    timesteps: Tensor  # (batch,) int64
    label_drops: Tensor  # (batch,) bool, samples that train the null label

    def rows(self, rows: slice, device: torch.device) -> "StepDraws":
        return StepDraws(*(drawn[rows].to(device, non_blocking=True) for drawn in self))

    def shown(self, moments: Tensor, labels: Tensor, scheduler, null_label: int) -> tuple[Tensor, Tensor, Tensor]:
        """What the model is shown of images, with these draws: x_start, latents, class_labels.

        Args:
            moments: (batch, 2, C, H, W), the VAE's mean and standard deviation of each image.
            labels: (batch,) int64.

        Returns:
            x_start (batch, C, H, W), drawn from the VAE's posterior; latents, the same with noise; and the class
            labels (batch,), where a dropped one is the null label.
        """
        x_start = sample_moments(moments, self.posterior_noise)
        latents = scheduler.add_noise(x_start, self.noise, self.timesteps)
        return x_start, latents, torch.where(self.label_drops, null_label, labels)


def draw_step(
    seed: int, step: int, batch_size: int, latent_shape: tuple[int, ...], num_timesteps: int, label_drop: float
) -> StepDraws:
    def normal(purpose: int) -> Tensor:
        generator = keyed_generator(seed, purpose, step)
        return torch.from_numpy(generator.standard_normal((batch_size, *latent_shape), dtype=np.float32))

    timesteps = keyed_generator(seed, TIMESTEPS, step).integers(0, num_timesteps, batch_size)
    drops = keyed_generator(seed, LABEL_DROPS, step).random(batch_size) < label_drop
    return StepDraws(normal(POSTERIOR_NOISE), normal(NOISE), torch.from_numpy(timesteps), torch.from_numpy(drops))


def micro_batches(batch_size: int, num_processes: int, process_index: int, accumulation: int) -> list[slice]:
    """Which rows of the global batch a process takes, one slice for each of its micro-batches.

    ValueError if they cannot all be of one size: the mean of their means would not be the batch's.
    """
    size, rest = divmod(batch_size, num_processes * accumulation)
    if rest or not size:
        raise ValueError(
            f"a batch of {batch_size} images cannot be shared equally by {num_processes} processes with "
            f"{accumulation} accumulation steps each"
        )
    first = process_index * accumulation
    return [slice(i * size, (i + 1) * size) for i in range(first, first + accumulation)]


class StepKeyedBatches:
    """An endless batch sampler for DataLoader: the (index, flip) pairs of a process's micro-batches, in order."""

    def __init__(self, seed: int, first_step: int, batch_size: int, num_images: int, flip: bool, rows: list[slice]):
        self.seed, self.first_step, self.batch_size = seed, first_step, batch_size
        self.num_images, self.flip, self.rows = num_images, flip, rows

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        for step in count(self.first_step):
            indices = batch_indices(self.seed, step, self.batch_size, self.num_images)
            flips = batch_flips(self.seed, step, self.batch_size) if self.flip else [False] * self.batch_size
            keys = list(zip(indices, flips, strict=True))
            for rows in self.rows:
                yield keys[rows]
