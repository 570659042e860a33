"""From requests to images: one noise stream for each image, a sampler's steps, and decoding."""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from tqdm import tqdm

from onelora_diffusion.families import Conditions, Family, family_of
from onelora_diffusion.injection.merging import merged
from onelora_diffusion.pipelines.base import eval_mode
from onelora_diffusion.sampling.guidance import GuidedDenoiser, ImageRequest
from onelora_diffusion.sampling.schedulers import make_scheduler
from onelora_diffusion.sampling.settings import SamplerSettings

IMAGES_AT_ONCE = 16  # in one batch of the networks: enough to fill a GPU
KEPT_CONDITIONS = 64  # encoded, at a time

OnStep = Callable[[float], object]


def image_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per image, a function of (seed, index) alone.

    PyTorch's CPU generator keeps only the low 32 bits of its seed, so hashing (seed, index) would soon give
    two images of a large set the same noise. Here the hash of `seed` is where the images start counting,
    and no two of them meet.
    """
    start = int(np.random.SeedSequence(seed % 2**64).generate_state(1)[0])
    return [torch.Generator().manual_seed((start + int(index)) % 2**32) for index in indices]


class EncodedConditions:
    """Conditions of a pipeline, encoded one by one, so that no row depends on the others; the last ones are kept.

    `encoded[condition]` is a row of the family's `encode_conditions`, and `encoded[None]` that from which images are
    guided.
    """

    def __init__(self, pipeline, max_sequence_length: int | None = None):
        self.pipeline, self.family, self.max_sequence_length = pipeline, family_of(pipeline), max_sequence_length
        self.keeps = bool(self.family.encoders(pipeline))  # what needs no encoder is made anew at no cost
        self._kept: OrderedDict[int | str | None, Conditions] = OrderedDict()

    @torch.no_grad()
    def __getitem__(self, condition: int | str | None) -> Conditions:
        if condition not in self._kept:
            row = self.family.encode_conditions(self.pipeline, [condition], self.max_sequence_length)
            if not self.keeps:
                return row
            self._kept[condition] = row
        self._kept.move_to_end(condition)
        while len(self._kept) > KEPT_CONDITIONS:
            self._kept.popitem(last=False)
        return self._kept[condition]


@torch.no_grad()
def draw(
    pipeline,
    requests: Sequence[ImageRequest],
    settings: SamplerSettings,
    size: int | None = None,
    on_step: OnStep = lambda share: None,
) -> Tensor:
    """The images of requests, (batch, 3, size, size) in float32, around -1 to 1, in one batch of the networks.

    The first noise and that of every step come from each image's own generator, so an image does not depend on the
    others of its batch; on their number only by rounding, which `generate_images` avoids.

    Args:
        pipeline: its transformer, in eval mode, its vae and scheduler are used.
        settings: its sampler, steps, and the channels and interval of guidance; all else is each request's own.
        size: pixels a side. None: as many as the pipeline draws by itself.
        on_step: called with its share of the work after every step; what it raises ends the drawing.
    """
    family = family_of(pipeline)
    size = size or family.resolution(pipeline)
    shape = family.latent_shape(pipeline, size, size)
    return family.decode(pipeline.vae, denoised_latents(pipeline, family, requests, settings, shape, on_step))


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
    transformer, channels = pipeline.transformer, shape[0]
    denoise = GuidedDenoiser(family, transformer, requests, settings.guidance_channels, settings.guidance_interval)
    learned_variance = settings.sampler == "ddpm" and transformer.config.out_channels == 2 * channels
    scheduler = scheduler_of(pipeline, family, settings, shape, learned_variance)
    generators = [request.generator for request in requests]
    takes_noise = "generator" in inspect.signature(scheduler.step).parameters
    noise = {"generator": generators} if takes_noise else {}
    latents = randn_tensor((len(requests), *shape), generators, device=denoise.device, dtype=torch.float32)
    latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
    scaled = getattr(scheduler, "scale_model_input", lambda latents, timestep: latents)
    with denoise.routed():
        for timestep in scheduler.timesteps:  # on the CPU, as the schedule is: no step waits for the device
            prediction = denoise(scaled(latents, timestep), timestep.item())
            if not learned_variance:
                prediction = prediction[:, :channels]
            latents = scheduler.step(prediction, timestep, latents, **noise).prev_sample
            on_step(1 / len(scheduler.timesteps))
    return latents


def scheduler_of(
    pipeline, family: Family, settings: SamplerSettings, shape: tuple[int, ...], learned_variance: bool = False
):
    """A scheduler with its timesteps set for latents of this shape: the chosen sampler's, or the pipeline's own."""
    own, steps = pipeline.scheduler, settings.num_inference_steps
    num_tokens = prod(shape[1:]) // family.patch_size(pipeline.transformer) ** 2
    if family.takes_samplers:
        sampler = settings.for_scheduler(own.config).sampler
        return make_scheduler(sampler, own.config, steps, num_tokens, learned_variance)
    scheduler = type(own).from_config(own.config)
    scheduler.set_timesteps(**family.timesteps(scheduler, steps, num_tokens))
    return scheduler


def as_uint8(images: Tensor) -> Tensor:
    """Images from -1 to 1 in uint8, rounded, not truncated."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def generate_images(
    pipeline,
    conditions: Sequence[int | str],
    seed: int,
    indices: Sequence[int],
    settings: SamplerSettings,
    *,
    size: int | None = None,
    max_sequence_length: int | None = None,
    images_at_once: int | None = IMAGES_AT_ONCE,
    batch_size: int = 32,
    progress: Callable[[float], object] = lambda images: None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Generate image `indices[k]` of the class or prompt `conditions[k]` for every k, batch by batch.

    Image i is a function of (seed, i), its condition and the sampler. It is so to the bit where the networks always
    run on the same number of images: a matrix product of another shape is summed in another order. Then neither
    `batch_size` nor the share of a process changes it. (On one kind of machine, with as many CPU threads: see
    docs/evaluation.md.)

    Args:
        pipeline: of one of the families; its transformer runs in eval mode, under the caller's autocast, and gets its
            own mode back.
        conditions: labels, or prompts.
        size: pixels a side. None: as many as the pipeline draws by itself.
        max_sequence_length: tokens of a prompt. None: as many as the pipeline draws with.
        images_at_once: how many images the networks always run on, the last ones padded. None: on as many as there
            are, up to the family's own number, so that few images cost what they cost.
        batch_size: how many images the iterator gives at a time.
        progress: called after every step with the images that it made, in parts of an image.

    Returns:
        An iterator of (indices, images), a batch each; images are (batch, 3, size, size), uint8, on the pipeline's
        device.

    Raises:
        ValueError: at once, not at the first image: see `SamplerSettings.check`; or conditions and indices do not
            pair up. At the first image: a label is none of the classes that serve.
    """
    if len(conditions) != len(indices):
        kind = "class labels" if family_of(pipeline).condition is int else "prompts"
        raise ValueError(f"{len(conditions)} {kind} for {len(indices)} images; one each is needed")
    family, encoded = family_of(pipeline), EncodedConditions(pipeline, max_sequence_length)
    settings.check_family(family)
    settings.check(pipeline.transformer, pipeline.scheduler.config)
    scale = family.guidance_scale(pipeline) if settings.guidance_scale is None else settings.guidance_scale

    def request(k: int) -> ImageRequest:
        family.check_conditions(pipeline, [conditions[k]])
        return ImageRequest(
            condition=encoded[conditions[k]],
            empty=encoded[None],
            generator=image_generators(seed, [indices[k]])[0],
            guidance_scale=scale,
            guidance=settings.guidance,
        )

    def batches():
        wanted = range(len(indices))
        chunks = draw_in_chunks(pipeline, request, wanted, settings, size, images_at_once, progress)
        images = []
        for first in range(0, len(indices), batch_size):
            batch = [int(index) for index in indices[first : first + batch_size]]
            while len(images) < len(batch):
                images = [*images, *next(chunks)]
            yield batch, torch.stack(images[: len(batch)])
            images = images[len(batch) :]

    return batches()


def draw_in_chunks(
    pipeline,
    request: Callable[[int], ImageRequest],
    wanted: Sequence[int],
    settings: SamplerSettings,
    size: int | None = None,
    images_at_once: int | None = None,
    progress: Callable[[float], object] = lambda images: None,
) -> Iterator[Tensor]:
    """The images of `request(k)` for every k of `wanted`, (chunk, 3, size, size) in uint8.

    The transformer runs in eval mode, and gets its own mode back.

    Args:
        images_at_once, progress: as in `generate_images`.
    """
    at_once = images_at_once or family_of(pipeline).images_at_once
    for first in range(0, len(wanted), at_once):
        chunk = list(wanted[first : first + at_once])
        padding = [] if images_at_once is None else [chunk[-1]] * (at_once - len(chunk))

        def count(share: float, num_images: int = len(chunk)) -> None:
            progress(num_images * share)

        with eval_mode(pipeline.transformer):
            images = draw(pipeline, [request(k) for k in chunk + padding], settings, size, count)
        yield as_uint8(images)[: len(chunk)]


def adapters_merged(transformer: nn.Module, settings: SamplerSettings) -> AbstractContextManager:
    """Context manager around sampling: adapters cost nothing inside, unless the base takes part beside them."""
    return nullcontext() if settings.is_beside_base else merged(transformer)


def progress_bar(num_images: int, description: str = "", **options) -> tqdm:
    """A bar for `generate_images(progress=bar.update)`: it counts images, and moves with every step of a sampler."""
    bar_format = "{l_bar}{bar}| {n:.1f}/{total} images [{elapsed}<{remaining}, {rate_fmt}]"
    return tqdm(total=num_images, desc=description, unit=" images", bar_format=bar_format, **options)
