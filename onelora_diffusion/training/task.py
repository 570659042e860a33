"""The task of a run: a base with its adapter, and the images and conditions to learn."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from onelora_diffusion.data.buckets import Buckets
from onelora_diffusion.data.identity import DataIdentity
from onelora_diffusion.data.latent_cache import LatentCache, build_cache, cache_size
from onelora_diffusion.data.latents import FlippableImages
from onelora_diffusion.data.listing import describe
from onelora_diffusion.data.prompt_cache import ConditionRows, PromptCache, build_prompt_cache, identity_of
from onelora_diffusion.families import Conditions, family_of
from onelora_diffusion.injection.book import disable_adapter
from onelora_diffusion.injection.verbs import adapter_state_dict
from onelora_diffusion.processes import among_sharers
from onelora_diffusion.sampling import SamplerSettings, adapters_merged, image_generators
from onelora_diffusion.sampling.drawing import draw_in_chunks
from onelora_diffusion.sampling.guidance import ImageRequest
from onelora_diffusion.training.samples import png_of
from onelora_diffusion.training.settings import RunSettings
from onelora_diffusion.training.stopping import Stop


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The images of a run and their conditions.

    Attributes:
        images: `[index] -> (image, number of its condition)`; it has `broken`, (images,) bool, if unreadable images
            are skipped.
        conditions: labels or prompts, in the order of their numbers.
        shown: the conditions of which samples are drawn, with their names.
        identity: the identity of images and conditions, equal on every process and at every start of a run.
        resolution: side of the images in pixels.
        described: a short description.
        facts: entries for the adapter's header: the data set's name and those that the script adds.
        id2label: class names by label, if there are classes.
        buckets: the buckets of images of several shapes.
    """

    images: Dataset
    conditions: Sequence[int | str]
    shown: Sequence[tuple[int | str, str]]
    identity: DataIdentity
    resolution: int
    described: str
    facts: dict
    id2label: dict[int, str] | None = None
    buckets: Buckets | None = None


class Task:
    """A base, its adapter and its training data, on every process of a run.

    Args:
        pipeline: a pipeline of one of the families, with its adapter in the transformer. Trained tensors are moved to
            the device at once, and the rest by `encode`.

    Attributes:
        family: the family of the pipeline.
        condition_drop: share of samples that train without their condition.
    """

    def __init__(self, settings: RunSettings, accelerator: Accelerator, pipeline, data: TrainingData):
        self.settings, self.accelerator, self.pipeline, self.data = settings, accelerator, pipeline, data
        self.family = family_of(pipeline)
        self.condition_drop = settings.condition_drop(self.family.is_guided)
        for tensor in adapter_state_dict(pipeline.transformer).values():
            tensor.data = tensor.to(accelerator.device)
        self._base_images: Tensor | None = None
        accelerator.print(describe(data.images))

    def encode(self, stop: Stop) -> tuple[Dataset, bool]:
        """Encode conditions and, unless the cache would be too large, images.

        Returns:
            (`[index, flip] -> (image or its moments, number of its condition)`, whether moments are cached). Text
            encoders are freed, and the autoencoder leaves the device if nothing is left to encode.
        """
        settings, pipeline, data, family = self.settings, self.pipeline, self.data, self.family
        device, examples = self.accelerator.device, FlippableImages(data.images)
        parent = settings.latent_cache or settings.output_dir.parent / "latents"
        shape, encoders = family.latent_shape(pipeline, data.resolution, data.resolution), family.encoders(pipeline)
        is_cached = cache_size(len(data.images), settings.flip, shape) <= settings.latent_cache_gb * 1e9
        number, sharers = among_sharers(parent, self.accelerator) if is_cached or encoders else (0, 1)
        share = {
            "process_index": number,
            "num_processes": sharers,
            "is_stopped": stop.asked,
            "report": tqdm.write,
        }
        identity, length = identity_of(encoders), settings.max_sequence_length
        for encoder in encoders.values():
            if isinstance(encoder, nn.Module):
                encoder.to(device)
        # The conditions of samples have a cache of their own: choosing others does not encode the training data again.
        all_conditions = (data.conditions, [condition for condition, _ in data.shown])
        folders = [
            build_prompt_cache(
                parent,
                conditions,
                lambda conditions: family.encode_conditions(pipeline, conditions, length),
                identity,
                f"{family.name}, {length or 'all'} tokens",
                **share,
            )
            for conditions in (all_conditions if encoders else ())
        ]
        pipeline.register_modules(**dict.fromkeys(encoders))
        dtype = pipeline.vae.dtype
        pipeline.vae.to(device, torch.float32)  # it stays there for all steps
        if is_cached:
            latents = build_cache(
                parent,
                data.images,
                pipeline.vae,
                settings.flip,
                family.encode_images,
                num_workers=settings.num_workers,
                **share,
            )
            pipeline.vae.to("cpu", dtype)
        pipeline.transformer.to(device)
        if stop.agreed():  # caches may be incomplete, and there will be no step
            return examples, False
        if encoders:
            self.learned, self.shown = map(PromptCache, folders, all_conditions)
        else:
            rows = (family.encode_conditions(pipeline, [None, *conditions]) for conditions in all_conditions)
            self.learned, self.shown = map(ConditionRows, rows)
        return (LatentCache(latents, len(data.images), data.buckets), True) if is_cached else (examples, False)

    def conditions(self, numbers: Tensor, drops: Tensor) -> Conditions:
        """The encoded conditions of numbers (batch,); where `drops`, (batch,) bool, is True, the empty condition."""
        return self.learned.embeddings(numbers, drops)

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Context manager in which the autoencoder is on the device."""
        before = self.pipeline.vae.device
        self.pipeline.vae.to(self.accelerator.device)
        try:
            yield
        finally:
            self.pipeline.vae.to(before)

    def sample_grid(self, is_stopped: Callable[[], object]) -> bytes | None:
        """The PNG of a grid with one column per condition; image i has the same noise in every grid.

        If the settings ask for it, the first row is drawn by the base. None if stopped early or without conditions.
        """
        shown, transformer = self.data.shown, self.pipeline.transformer
        if not shown:
            return None
        with self.decoding():
            if self.settings.shows_base and self._base_images is None:
                with disable_adapter(transformer):
                    self._base_images = self._samples(is_stopped)
                if self._base_images is None:
                    return None
            merges = self.family.merges_adapters
            with adapters_merged(transformer, SamplerSettings()) if merges else nullcontext():
                images = self._samples(is_stopped)
        if images is None:
            return None
        rows = [images] if self._base_images is None else [self._base_images, images]
        return png_of(torch.cat(rows), [name for _, name in shown])

    def _samples(self, is_stopped: Callable[[], object]) -> Tensor | None:
        settings, columns = self.settings, len(self.data.shown)
        scale = settings.guidance_scale
        scale = self.family.guidance_scale(self.pipeline) if scale is None else scale
        kept, dropped = torch.tensor([False]), torch.tensor([True])

        def request(index: int) -> ImageRequest:
            number = torch.tensor([index % columns])
            return ImageRequest(
                condition=self.shown.embeddings(number, kept),
                empty=self.shown.embeddings(number, dropped),
                generator=image_generators(settings.seed, [index])[0],
                guidance_scale=scale,
            )

        sampler = SamplerSettings(num_inference_steps=settings.sample_steps)
        images = []
        wanted, size, at_once = range(settings.sample_rows * columns), self.data.resolution, self.family.images_at_once
        chunks = draw_in_chunks(self.pipeline, request, wanted, sampler, size, at_once)
        for chunk in chunks:
            images.append(chunk.cpu())
            if is_stopped():
                return None
        return torch.cat(images)
