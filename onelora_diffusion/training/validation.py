"""The loss on images that are not trained on, with the same noise and timesteps each time, beside that of the base."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor

from onelora_diffusion.denoisers import denoiser_of
from onelora_diffusion.pipelines.base import eval_mode
from onelora_diffusion.training.randomness import VALIDATION, StepDraws, keyed_generator
from onelora_diffusion.training.task import Task
from onelora_diffusion.training.training_adapter import base_in_training

TIMES = 4  # timesteps at which each image is measured, one in each quarter of the schedule


class Validation:
    """The mean loss of an adapter on the images that its task holds out.

    Random values are a function of the image alone, so that losses of different steps, runs and seeds can be compared.
    Conditions are not dropped, tags stay in their order, images are not mirrored, and timesteps are uniform in each
    quarter of the schedule. Masks weigh the loss of their images, as in training.
    """

    def __init__(self, task: Task):
        self.task = task
        self.of_base: float | None = None

    def measure(self, adapted: AbstractContextManager, at_once: Callable) -> dict[str, float]:
        """`{"validation_loss": ..., "base_validation_loss": ...}`, the former in `adapted`, both in `at_once()`."""
        if self.of_base is None:
            with base_in_training(denoiser_of(self.task.pipeline)), at_once():
                self.of_base = self._mean_loss()
        with adapted, at_once():
            return {"validation_loss": self._mean_loss(), "base_validation_loss": self.of_base}

    @torch.no_grad()
    def _mean_loss(self) -> float:
        transformer = denoiser_of(self.task.pipeline)
        with eval_mode(transformer):
            losses = [self.task.losses(transformer, *batch)["loss"] for batch in self._batches()]
        return float(torch.cat(losses).double().mean())

    def _batches(self) -> Iterator[tuple[Tensor, dict, StepDraws, Tensor | None]]:
        """Moments, conditions, random values and masks of images of one shape."""
        task, size, data = self.task, self.task.settings.batch_size, self.task.held_data
        buckets, held = data.buckets, task.held_out
        bucket_of = np.zeros(len(held), np.int64) if buckets is None else buckets.of_image[held]
        for bucket in np.unique(bucket_of):
            samples = [(index, time) for index in held[bucket_of == bucket].tolist() for time in range(TIMES)]
            for first in range(0, len(samples), size):
                chosen = samples[first : first + size]
                images, numbers = zip(*(task.held_examples[index, False] for index, _ in chosen), strict=True)
                moments = task.moments(torch.stack([torch.as_tensor(image) for image in images]), task.held_is_cached)
                numbers, kept = torch.tensor(numbers), torch.zeros(len(chosen), dtype=torch.bool)
                conditions = task.held_conditions.embeddings(numbers * data.conditions_each, kept)
                shape = tuple(moments.shape[2:])
                masks = data.masks_of(numbers, [False] * len(numbers), shape[1:])
                masks = send_to_device(masks, task.accelerator.device, non_blocking=True)
                yield moments, task.on_device(conditions), self._draws(chosen, shape), masks

    def _draws(self, samples: list[tuple[int, int]], shape: tuple[int, ...]) -> StepDraws:
        first, part = self.task.timesteps.start, len(self.task.timesteps) / TIMES
        noises, timesteps = [], []
        for index, time in samples:
            random = keyed_generator(0, VALIDATION, index * TIMES + time)
            noises.append(random.standard_normal((2, *shape), dtype=np.float32))  # of the posterior; to be predicted
            timesteps.append(first + int((time + random.random()) * part))
        drops = torch.zeros(len(samples), dtype=torch.bool)
        drawn = StepDraws(*torch.from_numpy(np.stack(noises, axis=1)), torch.tensor(timesteps), drops)
        return drawn.rows(slice(None), self.task.accelerator.device)
