"""Randomness that is a function of the seed and the step alone.

All random values of a step are drawn for the global batch and then sliced for processes and micro-batches. So a run
does not depend on the number of processes, on accumulation or on interruptions, and resuming it needs only the number
of the step.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

# One independent stream of random numbers for each purpose, so that drawing more for one does not change another.
BATCH_ORDER, FLIPS, POSTERIOR_NOISE, NOISE, TIMESTEPS, LABEL_DROPS, BUCKET_ORDER, VALIDATION, HELD_OUT = range(9)
TAG_ORDERS, CAPTION_CHOICE = 9, 10


def keyed_generator(seed: int, purpose: int, index: int) -> np.random.Generator:
    # NumPy's seed sequence uses the whole key, while torch's CPU generator uses only 32 bits of a seed.
    return np.random.default_rng((seed, purpose, index))


def batch_flips(seed: int, step: int, batch_size: int) -> list[bool]:
    return (keyed_generator(seed, FLIPS, step).random(batch_size) < 0.5).tolist()


def caption_choices(seed: int, step: int, batch_size: int, captions_each: int) -> Tensor:
    """(batch,) int64: which of its captions each sample of a step has, all of them equally often."""
    return torch.from_numpy(keyed_generator(seed, CAPTION_CHOICE, step).integers(captions_each, size=batch_size))


class TimestepDensity(NamedTuple):
    """The density of timesteps: uniform, or logit-normal or by mode (Esser et al., 2024, section 3.1).

    As in diffusers' scripts, u = 0 is the noise and u = 1 the image: a positive `logit_mean` draws less noise. A
    positive `mode_scale` draws the middle more often, a negative one the ends.
    """

    kind: Literal["uniform", "logit-normal", "mode"] = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29

    def draw(self, generator: np.random.Generator, batch_size: int, num_timesteps: int) -> Tensor:
        """Draw (batch,) int64 timesteps in [0, num_timesteps); larger ones are noisier."""
        if self.kind == "uniform":
            return torch.from_numpy(generator.integers(0, num_timesteps, batch_size))
        from diffusers.training_utils import compute_density_for_timestep_sampling

        u = compute_density_for_timestep_sampling(
            self.kind.replace("-", "_"),
            batch_size,
            self.logit_mean,
            self.logit_std,
            self.mode_scale,
            generator=torch.Generator().manual_seed(int(generator.integers(2**32))),
        )
        # u may round to 1, for which the formula of diffusers' scripts gives a timestep after the last one.
        return num_timesteps - 1 - (u * num_timesteps).long().clamp(0, num_timesteps - 1)


UNIFORM = TimestepDensity()


class StepDraws(NamedTuple):
    """The random values of a step for all samples of the global batch."""

    posterior_noise: Tensor  # (batch, C, H, W) float32, to sample the VAE's posterior
    noise: Tensor  # (batch, C, H, W) float32, the noise to predict
    timesteps: Tensor  # (batch,) int64
    label_drops: Tensor  # (batch,) bool, True for samples that train the null label

    def rows(self, rows: slice, device: torch.device) -> "StepDraws":
        """Those of some samples, the noise on a device; what a batch is arranged by stays on the CPU."""
        posterior_noise, noise, *others = (drawn[rows] for drawn in self)
        return StepDraws(*(each.to(device, non_blocking=True) for each in (posterior_noise, noise)), *others)


def draw_step(
    seed: int,
    step: int,
    batch_size: int,
    latent_shape: tuple[int, ...],
    num_timesteps: int,
    label_drop: float,
    density: TimestepDensity = UNIFORM,
    first_timestep: int = 0,
) -> StepDraws:
    """Draw the random values of a step; the density is spread over the `num_timesteps` from `first_timestep` on."""

    def normal(purpose: int) -> Tensor:
        generator = keyed_generator(seed, purpose, step)
        return torch.from_numpy(generator.standard_normal((batch_size, *latent_shape), dtype=np.float32))

    timesteps = first_timestep + density.draw(keyed_generator(seed, TIMESTEPS, step), batch_size, num_timesteps)
    drops = keyed_generator(seed, LABEL_DROPS, step).random(batch_size) < label_drop
    return StepDraws(normal(POSTERIOR_NOISE), normal(NOISE), timesteps, torch.from_numpy(drops))


def micro_batches(batch_size: int, num_processes: int, process_index: int, accumulation: int) -> list[slice]:
    """The rows of the global batch that a process takes, a slice a micro-batch; ValueError for unequal sizes."""
    size, rest = divmod(batch_size, num_processes * accumulation)
    if rest or not size:  # the mean of their means would not be the mean of the batch
        raise ValueError(
            f"a batch of {batch_size} images cannot be shared equally by {num_processes} processes with "
            f"{accumulation} accumulation steps each"
        )
    first = process_index * accumulation
    return [slice(i * size, (i + 1) * size) for i in range(first, first + accumulation)]


@dataclass
class StepKeyedBatches:
    """An endless batch sampler for DataLoader: the (index, flip) pairs of a process's micro-batches, in order.

    Batches are consecutive parts of an endless sequence of permutations of the images, one permutation per epoch. If
    images are in buckets, each bucket has its own sequence and all images of a batch are in one bucket. The buckets of
    an epoch's batches are in random order, and a bucket has as many batches as its images have filled by then. So in
    the long run all images are shown equally often. A bucket with fewer images than a batch repeats them within it.
    """

    seed: int
    first_step: int
    batch_size: int
    num_images: int
    flip: bool
    rows: list[slice]  # of the global batch, for each micro-batch
    bucket_of: np.ndarray | None = None  # (images,) int64, the number of each image's bucket; None puts all into one
    images: np.ndarray | None = None  # (images,) those that are trained on, in a larger data set; None takes all of it

    def __post_init__(self):
        self.bucket_of = np.zeros(self.num_images, np.int64) if self.bucket_of is None else self.bucket_of
        self.images = np.arange(self.num_images) if self.images is None else self.images
        self.sizes = np.bincount(self.bucket_of)
        self.order = lru_cache(maxsize=2)(self.order)
        self.permutation = lru_cache(maxsize=4 * len(self.sizes))(self.permutation)

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        for step in count(self.first_step):
            keys = self.global_batch(step)
            for rows in self.rows:
                yield keys[rows]

    def global_batch(self, step: int) -> list[tuple[int, bool]]:
        """The (index, flip) pairs of the global batch of a step."""
        flips = batch_flips(self.seed, step, self.batch_size) if self.flip else [False] * self.batch_size
        return list(zip(self.images[self.indices(step)].tolist(), flips, strict=True))

    def indices(self, step: int) -> list[int]:
        """The indices of the images of a step's global batch."""
        # The epoch is this one or a later one, as buckets fill at most their share of batches.
        epoch = step * self.batch_size // self.num_images
        while self.filled(epoch + 1).sum() <= step:
            epoch += 1
        filled = self.filled(epoch)
        buckets = self.order(epoch)[: step - filled.sum() + 1]
        bucket = buckets[-1]
        size, batch = int(self.sizes[bucket]), int(filled[bucket] + np.count_nonzero(buckets[:-1] == bucket))
        first, last = batch * self.batch_size, (batch + 1) * self.batch_size - 1  # positions in the bucket's sequence
        epochs = range(first // size, last // size + 1)
        row = np.concatenate([self.permutation(bucket, each) for each in epochs])
        return row[first % size :][: self.batch_size].tolist()

    def filled(self, epochs: int) -> np.ndarray:
        """(buckets,) the number of batches that each bucket fills in `epochs` epochs; a remainder is carried over."""
        return epochs * self.sizes // self.batch_size

    def order(self, epoch: int) -> np.ndarray:
        """The bucket of each batch of an epoch."""
        buckets = np.repeat(np.arange(len(self.sizes)), self.filled(epoch + 1) - self.filled(epoch))
        return keyed_generator(self.seed, BUCKET_ORDER, epoch).permutation(buckets)

    def permutation(self, bucket: int, epoch: int) -> np.ndarray:
        """The images of a bucket in the order of an epoch: the permutation of all images, restricted to the bucket."""
        images = keyed_generator(self.seed, BATCH_ORDER, epoch).permutation(self.num_images)
        return images[self.bucket_of[images] == bucket]
