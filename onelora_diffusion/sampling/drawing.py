"""From requests to images: one noise stream for each image, a sampler's steps, and decoding."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from onelora_diffusion.denoisers import autoencoder_of, denoiser_of
from onelora_diffusion.families import Conditions, Family, family_of
from onelora_diffusion.families.family import Condition, emptied, joined, sides_of
from onelora_diffusion.injection.merging import merged
from onelora_diffusion.pipelines.base import eval_mode
from onelora_diffusion.sampling.guidance import ImageRequest
from onelora_diffusion.sampling.settings import SamplerSettings
from onelora_diffusion.sampling.trajectory import RunningBatch

IMAGES_AT_ONCE = 16  # in one batch of the networks, enough to use a GPU fully
KEPT_CONDITIONS = 64  # number of encoded conditions that are cached

OnStep = Callable[[float], object]


def image_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per image, a function of (seed, index) alone.

    PyTorch's CPU generator uses only the low 32 bits of its seed, so hashes of (seed, index) would soon give two
    images of a large set the same noise. Instead index is added to a hash of `seed`, so that all images differ.
    """
    start = int(np.random.SeedSequence(seed % 2**64).generate_state(1)[0])
    return [torch.Generator().manual_seed((start + int(index)) % 2**32) for index in indices]


class EncodedConditions:
    """Encodes conditions of a pipeline one by one, so that no row depends on others, and caches the last ones.

    `encoded[condition]` is a row of the family's `encode_conditions`, and `encoded[emptied(condition)]` the empty one,
    which guidance uses.
    """

    def __init__(self, pipeline, max_sequence_length: int | None = None):
        family = family_of(pipeline)

        @torch.no_grad()
        def encode(condition: Condition) -> Conditions:
            return family.encode_conditions(pipeline, [condition], max_sequence_length)

        # To encode a class costs nothing, and is not cached.
        self._encode = lru_cache(KEPT_CONDITIONS)(encode) if family.condition is str else encode

    def __getitem__(self, condition: Condition) -> Conditions:
        return self._encode(condition)


@torch.no_grad()
def draw(
    pipeline,
    requests: Sequence[ImageRequest],
    settings: SamplerSettings,
    size: int | tuple[int, int] | None = None,
    on_step: OnStep = lambda share: None,
    frames: int = 1,
) -> Tensor:
    """Draw requests in one batch of the networks: (batch, 3, height, width) in float32, from about -1 to 1.

    Of several frames clips are drawn: (batch, 3, frames, height, width). The size is a side, or (height, width).

    The first noise and that of every step come from each image's own generator, so an image does not depend on the
    other images of its batch. Their number affects only rounding, which `generate_images` avoids.

    The pipeline's transformer is in eval mode. The settings give the sampler, its steps, and the channels and interval
    of guidance; requests have all others. `on_step` is called after every step with its share of the work, and ends
    the drawing by an exception.
    """
    family = family_of(pipeline)
    shape = family.latent_shape(pipeline, *sides_of(size or family.resolution(pipeline)), frames)
    latents = denoised_latents(pipeline, family, requests, settings, shape, on_step)
    return family.decode(autoencoder_of(pipeline), latents)


@torch.no_grad()
def denoised_latents(
    pipeline,
    family: Family,
    requests: Sequence[ImageRequest],
    settings: SamplerSettings,
    shape: tuple[int, ...],
    on_step: OnStep = lambda share: None,
) -> Tensor:
    """From the noise of each request's generator, by a sampler's steps, to latents (batch, *shape) in float32."""
    with closing(RunningBatch(pipeline, family, settings.guidance_channels, settings.guidance_interval)) as batch:
        trajectory = batch.start(requests, settings, shape)
        while not trajectory.is_done:
            batch.step([trajectory])
            on_step(1 / trajectory.num_steps)
    return family.completed(trajectory.latents, joined([request.condition for request in requests]))


def as_uint8(images: Tensor) -> Tensor:
    """Convert images from -1 to 1 to uint8, rounded and not truncated."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def generate_images(
    pipeline,
    conditions: Sequence[Condition],
    seed: int,
    indices: Sequence[int],
    settings: SamplerSettings,
    *,
    size: int | tuple[int, int] | None = None,
    frames: int = 1,
    max_sequence_length: int | None = None,
    encoded: Mapping[Condition, Conditions] | None = None,
    images_at_once: int | None = IMAGES_AT_ONCE,
    batch_size: int = 32,
    progress: Callable[[float], object] = lambda images: None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Generate image `indices[k]` of the class or prompt `conditions[k]` for every k, batch by batch.

    Image i is a function of (seed, i), its condition and the sampler. It is the same bit for bit if the networks
    always run on the same number of images, since matrix products of other shapes are summed in another order. Then
    neither `batch_size` nor the share of a process changes it. (This holds on one kind of machine with equally many
    CPU threads: see docs/evaluation.md.)

    Args:
        pipeline: of one of the families. Its transformer runs in eval mode, which is restored afterwards, and under
            the caller's autocast.
        conditions: labels, prompts, or edits.
        size: side of the images in pixels, or (height, width); None takes the pipeline's default.
        frames: number of frames; of more than one, clips are drawn.
        max_sequence_length: number of tokens of a prompt; None takes the pipeline's default.
        encoded: what conditions and their empty ones are encoded to; None encodes them by the pipeline.
        images_at_once: number of images in each batch of the networks; the last batch is padded. None takes as many as
            there are, up to the family's default, without padding.
        batch_size: number of images that the iterator yields at a time.
        progress: called after every step with the number of images that it completed, a fraction.

    Returns:
        An iterator over batches (indices, images); images are (batch, 3, height, width), or of clips (batch, 3,
        frames, height, width), uint8, on the pipeline's device.

    Raises:
        ValueError: before the first image, as `SamplerSettings.check`, or if the numbers of conditions and indices
            differ. At the first image, if a label is not among the active classes.
    """
    if len(conditions) != len(indices):
        kind = "class labels" if family_of(pipeline).condition is int else "prompts"
        raise ValueError(f"{len(conditions)} {kind} for {len(indices)} images; one each is needed")
    family, denoiser = family_of(pipeline), denoiser_of(pipeline)
    encoded = EncodedConditions(pipeline, max_sequence_length) if encoded is None else encoded
    settings.check_family(family)
    settings.check(denoiser, family.training_scheduler(pipeline).config)
    scale = family.guidance_scale(pipeline) if settings.guidance_scale is None else settings.guidance_scale
    at_once = images_at_once or family.images_at_once
    side = size or family.resolution(pipeline)

    def request(k: int) -> ImageRequest:
        family.check_conditions(pipeline, [conditions[k]])
        condition = family.at_size(conditions[k], side, frames)
        return ImageRequest(
            condition=encoded[condition],
            empty=encoded[emptied(condition)],
            generator=image_generators(seed, [indices[k]])[0],
            guidance_scale=scale,
            guidance=settings.guidance,
        )

    def chunks() -> Iterator[Tensor]:
        for first in range(0, len(indices), at_once):
            chunk = list(range(first, min(first + at_once, len(indices))))
            padding = [] if images_at_once is None else [chunk[-1]] * (at_once - len(chunk))

            def count(share: float, num_images: int = len(chunk)) -> None:
                progress(num_images * share)

            with eval_mode(denoiser):
                images = draw(pipeline, [request(k) for k in chunk + padding], settings, size, count, frames)
            yield as_uint8(images)[: len(chunk)]

    def batches() -> Iterator[tuple[list[int], Tensor]]:
        drawn, images = chunks(), []
        for first in range(0, len(indices), batch_size):
            batch = [int(index) for index in indices[first : first + batch_size]]
            while len(images) < len(batch):
                images = [*images, *next(drawn)]
            yield batch, torch.stack(images[: len(batch)])
            images = images[len(batch) :]

    return batches()


def adapters_merged(pipeline, settings: SamplerSettings) -> AbstractContextManager:
    """Context manager that merges adapters during sampling, if the family does so and the base is not used, too."""
    merges = family_of(pipeline).merges_adapters and not settings.is_beside_base
    return merged(denoiser_of(pipeline)) if merges else nullcontext()


class ImageBar(tqdm):
    """A bar that counts fractions of images; their sum, which is rounded, does not exceed the total."""

    def update(self, images: float = 1) -> bool | None:
        return super().update(min(images, self.total - self.n))


def progress_bar(num_images: int, description: str = "", **options) -> tqdm:
    """A progress bar for `generate_images(progress=bar.update)` that counts images and moves with every step."""
    bar_format = "{l_bar}{bar}| {n:.1f}/{total} images [{elapsed}<{remaining}, {rate_fmt}]"
    return ImageBar(total=num_images, desc=description, unit=" images", bar_format=bar_format, **options)
