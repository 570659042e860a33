"""The task of a run: a base with its adapter, and the images and conditions to learn."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from onelora_diffusion.config import AdapterConfig
from onelora_diffusion.data.buckets import Buckets, side_and_frames
from onelora_diffusion.data.identity import DataIdentity
from onelora_diffusion.data.latent_cache import LatentCache, build_cache, cache_size
from onelora_diffusion.data.latents import FlippableImages, sample_moments
from onelora_diffusion.data.listing import describe
from onelora_diffusion.data.prompt_cache import ConditionRows, PromptCache, build_prompt_cache, identity_of
from onelora_diffusion.data.row_cache import EncodingError
from onelora_diffusion.denoisers import autoencoder_of, denoiser_of, denoisers_in, guides_in
from onelora_diffusion.diffusion import add_noise, model_timesteps, training_losses
from onelora_diffusion.families import Conditions, family_of
from onelora_diffusion.families.arguments import on
from onelora_diffusion.families.family import Condition, emptied, joined
from onelora_diffusion.injection.book import disable_adapter
from onelora_diffusion.injection.routing import route_adapters
from onelora_diffusion.injection.verbs import adapter_state_dict, inject_adapter, set_adapters, unload_adapter
from onelora_diffusion.processes import among_sharers
from onelora_diffusion.sampling import SamplerSettings, adapters_merged, generate_images
from onelora_diffusion.storage.lora import check_export
from onelora_diffusion.storage.naming import namings_of
from onelora_diffusion.training.randomness import HELD_OUT, StepDraws, keyed_generator
from onelora_diffusion.training.samples import png_of
from onelora_diffusion.training.settings import RunSettings
from onelora_diffusion.training.stopping import Stop
from onelora_diffusion.training.training_adapter import NAME as TRAINING_ADAPTER
from onelora_diffusion.training.training_adapter import load_training_adapter, serving_alone
from onelora_diffusion.training.weighting import loss_weights, weighted_loss


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The images of a run and their conditions."""

    # [index] -> (image, number of its condition); with `broken`, (images,) bool, if unreadable images are skipped.
    images: Dataset
    conditions: Sequence[Condition]  # in the order of their numbers, `conditions_each` for each number
    shown: Sequence[tuple[Condition, str]]  # the conditions of which samples are drawn, with their names
    identity: DataIdentity  # of images and conditions, equal on every process and at every start of a run
    resolution: int  # side of the images in pixels
    described: str
    facts: dict  # entries for the adapter's header: the data set's name and those that the script adds
    id2label: dict[int, str] | None = None  # class names by label, if there are classes
    buckets: Buckets | None = None  # of images of several shapes
    conditions_each: int = 1  # for each number, how many prompts are trained, of which the first is validated
    # The masks (h, w) of latents, by the number of their image's condition; others are 1 everywhere.
    masks: dict[int, Tensor] = field(default_factory=dict)
    repeats: Sequence[int] | None = None  # how often each image counts in an epoch; None is once
    notes: Sequence[str] = ()  # what a user should know about the data, a line each
    frames: int = 1  # of each clip
    shown_size: tuple[int, int] | None = None  # height and width of samples; None: that of the images
    held: "TrainingData | None" = None  # of another split, some of which are held out for validation

    def masks_of(self, numbers: Tensor, flips: Sequence[bool], size: tuple[int, ...]) -> Tensor | None:
        """The masks (batch, 1, *size) of images by numbers, mirrored where `flips`; None if no image has one.

        `size` is that of the latents: (h, w), or (f, h, w) of clips, of which all frames have one mask.
        """
        if not self.masks:
            return None
        masks = [self.masks.get(number, torch.ones(size[-2:])) for number in numbers.tolist()]
        masks = torch.stack([mask.flip(-1) if flip else mask for mask, flip in zip(masks, flips, strict=True)])
        return masks.view(len(masks), *[1] * (len(size) - 1), *size[-2:]).expand(-1, 1, *size)


class Task:
    """A base, its adapter and its training data, on every process of a run; `attach` adds the adapter."""

    def __init__(
        self, settings: RunSettings, accelerator: Accelerator, pipeline, config: AdapterConfig, data: TrainingData
    ):
        self.settings, self.accelerator, self.pipeline, self.data = settings, accelerator, pipeline, data
        self.config, self.family = config, family_of(pipeline)
        self.subject: str | None = None  # the name of what it learns, if it is one of several tasks on one base
        self.adapter_name = "default"  # in the transformer
        self.training_adapter: str | None = None  # a hash of the frozen adapter that serves in training, if any
        self.condition_drop = settings.condition_drop(self.family.guides_itself)  # share of samples without condition
        scheduler = self.family.training_scheduler(pipeline)
        self.timesteps = self.family.timestep_range(scheduler)  # those that are trained on
        most = scheduler.config.num_train_timesteps
        if settings.sample_every and settings.sample_steps > most:
            raise ValueError(f"--sample-steps is {settings.sample_steps}; this base takes 1 to {most}")
        # [index, flip] -> (image or, if `is_cached`, its moments, number of its condition)
        self.examples, self.is_cached = FlippableImages(data.images), False
        # The caches that `encode` has built, of prompts and of latents, if there are any.
        self.folders: tuple[list[Path] | None, list[Path | None]] = None, [None] * len(self.encoded_data)
        self._base_images: Tensor | None = None
        self.held_data = data.held or data
        # (images,) the indices of those of `held_data` for validation, and of those that are trained on, each as often
        # as it counts.
        self.held_out, learned = held_out(settings.validation_images, data)
        self.learned_images = learned if data.repeats is None else learned.repeat(np.array(data.repeats)[learned])
        self.held_examples, self.held_is_cached = FlippableImages(self.held_data.images), False
        for each in self.encoded_data:
            held = "" if each is data else "held out: "
            accelerator.print("\n".join(f"{held}{line}" for line in (describe(each.images), *each.notes)))

    def attach(self) -> dict[str, Tensor]:
        """Attach the adapter, and return its trained tensors, on the device, by name; ValueError if that cannot be."""
        transformer, name = denoiser_of(self.pipeline), self.adapter_name
        beside = self.settings.training_adapter
        self.training_adapter = beside and load_training_adapter(self.pipeline, beside)
        inject_adapter(transformer, self.config, name)
        if beside:
            self.accelerator.print(f"{beside} serves in training; samples are drawn without it")
            set_adapters(transformer, [TRAINING_ADAPTER, name])
        for naming in namings_of(self.settings.export_lora):
            check_export(transformer, name, naming)
        trained = adapter_state_dict(transformer, name)
        for tensor in trained.values():
            tensor.data = tensor.to(self.accelerator.device)
        return trained

    @property
    def all_conditions(self) -> dict[str, list[Condition]]:
        """The conditions of the images, of samples, of images of another split, and of prior preservation."""
        found = {"learned": list(self.data.conditions)}
        if self.data.shown:
            found["shown"] = [condition for condition, _ in self.data.shown]
        if self.data.held:
            found["held"] = list(self.data.held.conditions)
        if self.settings.prior_weight:
            sizes = map(side_and_frames, self.data.buckets.sizes)
            found["prior"] = [self.family.at_size(self.settings.prior_prompt, *size) for size in sizes]
        return found

    def _bucket_of(self, latents: Tensor) -> int:
        """The number of the bucket of a batch's latents (batch, C, ...)."""
        sizes = map(side_and_frames, self.data.buckets.sizes)
        shapes = (self.family.latent_shape(self.pipeline, *side, frames) for side, frames in sizes)
        return next(number for number, shape in enumerate(shapes) if shape == tuple(latents.shape[1:]))

    def serving(self, in_training: bool) -> AbstractContextManager:
        """Context manager in which the transformer has this adapter alone; `in_training` with the training adapter."""
        transformer = denoiser_of(self.pipeline)
        if self.subject is not None:
            set_adapters(transformer, self.adapter_name)
        is_served = in_training or self.training_adapter is None
        return nullcontext() if is_served else serving_alone(transformer, self.adapter_name)

    def detach(self) -> None:
        """Remove the adapter from the transformer, if it was attached."""
        transformer = denoiser_of(self.pipeline)
        if hasattr(transformer, "_onelora") and self.adapter_name in transformer._onelora.adapters:
            unload_adapter(transformer, self.adapter_name)

    def open_caches(self) -> None:
        """Read the complete caches; without one of prompts, conditions are encoded, for the attached adapter."""
        prompts, latents = self.folders
        if prompts is None:
            encode = partial(self.family.encode_conditions, self.pipeline)
            read = (ConditionRows(encode([None, *conditions])) for conditions in self.all_conditions.values())
        else:
            read = map(PromptCache, prompts, self.all_conditions.values())
        encoded = dict(zip(self.all_conditions, read, strict=True))
        self.learned, self.shown = encoded["learned"], encoded.get("shown")
        self.held_conditions, self.prior = encoded.get("held", self.learned), encoded.get("prior")
        caches = [
            None if folder is None else LatentCache(folder, len(data.images), data.buckets)
            for folder, data in zip(latents, self.encoded_data, strict=True)
        ]
        self.is_cached, self.held_is_cached = caches[0] is not None, caches[-1] is not None
        self.examples, self.held_examples = caches[0] or self.examples, caches[-1] or self.held_examples

    @property
    def encoded_data(self) -> list[TrainingData]:
        """The data whose images are encoded."""
        return [self.data, *([self.data.held] if self.data.held else [])]

    def conditions(self, numbers: Tensor, drops: Tensor) -> Conditions:
        """The encoded conditions of numbers (batch,); where `drops`, (batch,) bool, is True, the empty condition."""
        return self.on_device(self.learned.embeddings(numbers, drops))

    def on_device(self, conditions: Conditions) -> Conditions:
        return self.family.on_device(conditions, self.accelerator.device)

    def moments(self, images: Tensor, is_cached: bool) -> Tensor:
        """Moments (batch, 2, C, H, W) on the device, of images or as they were cached."""
        images = images.to(self.accelerator.device, non_blocking=True)
        return images if is_cached else self.family.encode_images(autoencoder_of(self.pipeline), images)

    def losses(
        self,
        model: nn.Module,
        moments: Tensor,
        conditions: Conditions,
        draws: StepDraws,
        masks: Tensor | None = None,
        keeps_prior: bool = False,
        guidance: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The losses of a batch by name, each (batch,).

        With `keeps_prior` the batch is computed again with the prompt of prior preservation, p, by the adapter and by
        the base alone, and the loss gains w · mean (ε(x_t, t, p) − ε_base(x_t, t, p))², `prior` by itself, without
        the masks. With `guidance`, w − 1 of each sample (batch,), the target is that of `trained_guidance`.

        Moments are (batch, 2, C, H, W), and masks (batch, 1, ...) as in `training_losses`. The conditions may be those
        of several tasks on the same base, and the model may be wrapped for several processes.
        """
        settings, scheduler = self.settings, self.family.training_scheduler(self.pipeline)
        x_start, timesteps = sample_moments(moments, draws.posterior_noise), on(draws.timesteps, moments.device)
        latents = add_noise(x_start, draws.noise, timesteps, scheduler)
        times = model_timesteps(draws.timesteps, scheduler)
        predict, offset = self.family.predict, None
        first = torch.zeros(len(latents), dtype=torch.long)
        with self.accelerator.autocast():
            if keeps_prior:
                prior = self.prior.embeddings(first + self._bucket_of(latents), first.bool())
                prior = self.on_device(prior)
                of_base = self._of_base(latents, times, prior)
                both = predict(model, torch.cat([latents, latents]), times.repeat(2), joined([conditions, prior]))
                output, of_prior = both.chunk(2)
            else:
                output = predict(model, latents, times, conditions)
            if guidance is not None:
                empty = self.on_device(self.learned.embeddings(first, ~first.bool()))
                away = (output.detach().float() - self._of_base(latents, times, empty).float())[:, : x_start.shape[1]]
                offset = guidance.to(away).view(-1, *[1] * (away.ndim - 1)) * away
        if (learned := self.family.learned(tuple(x_start.shape[1:]))) is not None:
            learned = on(learned, x_start.device).expand(len(x_start), -1, -1, -1, -1)
            masks = learned if masks is None else masks * learned
        losses = training_losses(output, x_start, draws.noise, timesteps, scheduler, masks, offset)
        weights = loss_weights(timesteps, scheduler, settings.snr_gamma, settings.loss_weighting)
        losses |= {"loss": weighted_loss(losses, weights)}
        if keeps_prior:
            losses["prior"] = (of_prior.float() - of_base.float()).square().flatten(1).mean(1)
            losses["loss"] = losses["loss"] + settings.prior_weight * losses["prior"]
        return losses

    @torch.no_grad()
    def _of_base(self, latents: Tensor, times: Tensor, conditions: Conditions) -> Tensor:
        """What the base alone predicts."""
        base = denoiser_of(self.pipeline)
        with route_adapters(base, [None] * len(latents)):
            return self.family.predict(base, latents, times, conditions)

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Context manager in which all that draws pictures is on the device: also what is not trained, and decodes."""
        denoisers = denoisers_in(self.pipeline) | guides_in(self.pipeline)
        parts, there = (autoencoder_of(self.pipeline), *denoisers.values()), self.accelerator.device
        before = {part: part.device for part in parts if part.device != there}
        try:
            for part in before:
                part.to(there)
            yield
        finally:
            for part, device in before.items():
                part.to(device)

    def sample_grid(self, is_stopped: Callable[[], object]) -> bytes | None:
        """The PNG of a grid with a column per condition, from the same noise each time; None if stopped or empty."""
        shown, transformer = self.data.shown, denoiser_of(self.pipeline)
        if not shown:
            return None
        with self.decoding():
            if self.settings.shows_base and self._base_images is None:
                with disable_adapter(transformer):
                    self._base_images = self._samples(is_stopped)
                if self._base_images is None:
                    return None
            with adapters_merged(self.pipeline, SamplerSettings()):
                images = self._samples(is_stopped)
        if images is None:
            return None
        rows = [images] if self._base_images is None else [self._base_images, images]
        return png_of(torch.cat(rows), [name for _, name in shown], self.family.frame_rate)

    def _samples(self, is_stopped: Callable[[], object]) -> Tensor | None:
        settings, conditions = self.settings, [condition for condition, _ in self.data.shown]
        encoded = {}
        for number, condition in enumerate(conditions):
            for key, is_dropped in ((emptied(condition), True), (condition, False)):
                encoded[key] = self.shown.embeddings(torch.tensor([number]), torch.tensor([is_dropped]))
        scale, wanted = settings.drawn_at(settings.guidance_scale), range(settings.sample_rows * len(conditions))
        batches = generate_images(
            self.pipeline,
            [conditions[index % len(conditions)] for index in wanted],
            settings.seed,
            wanted,
            SamplerSettings(num_inference_steps=settings.sample_steps, guidance_scale=scale),
            size=self.data.shown_size or self.data.resolution,
            frames=self.data.frames,
            encoded=encoded,
            images_at_once=self.family.images_at_once,
            batch_size=self.family.images_at_once,
        )
        images = []
        for _, batch in batches:
            images.append(batch.cpu())
            if is_stopped():
                return None
        return torch.cat(images)


def held_out(number: int | Path, data: TrainingData) -> tuple[np.ndarray, np.ndarray]:
    """(indices of the images that are held out for validation, those of the images that are trained on).

    They are the same for every seed; of another split none is trained on, and of a folder all are held out. ValueError
    if no image would be left to train on, or the split has fewer images.
    """
    source, least = data.held or data, 0 if data.held else 1
    if isinstance(number, Path):
        number = len(source.images)
    if number > len(source.images) - least:
        raise ValueError(f"--validation-images {number} are more than {source.described} can spare: hold out fewer")
    chosen = np.sort(keyed_generator(0, HELD_OUT, 0).permutation(len(source.images))[:number])
    learned = np.arange(len(data.images))
    return chosen, learned if data.held else np.setdiff1d(learned, chosen)


def encode(tasks: Sequence[Task], stop: Stop) -> None:
    """Encode the conditions and, unless the cache would be too large, the images of tasks on one pipeline.

    Text encoders are freed before the images are encoded, and the denoiser alone stays on the device, with the
    autoencoder if anything is left to encode. After a signal caches may be incomplete, and no task is to train.
    """
    pipeline, device = tasks[0].pipeline, tasks[0].accelerator.device
    tasks[0].family.keep()  # as nothing is refused from here on
    prompts, autoencoder = _encode_all_prompts(tasks, stop), autoencoder_of(pipeline)
    dtype = autoencoder.dtype
    autoencoder.to(device, torch.float32)
    latents = [[_encode_images(task, data, stop) for data in task.encoded_data] for task in tasks]
    if not any(None in each for each in latents):
        autoencoder.to("cpu", dtype)
    denoiser_of(pipeline).to(device)
    for task, *folders in zip(tasks, prompts, latents, strict=True):
        task.folders = tuple(folders)


def _encode_all_prompts(tasks: Sequence[Task], stop: Stop) -> list[list[Path] | None]:
    """The folders of the encoded conditions of each task; what encodes them is freed, or leaves the device."""
    pipeline, family = tasks[0].pipeline, tasks[0].family
    encoders, conditioners = family.encoders(pipeline), family.conditioners(pipeline)
    if not (identity := identity_of(encoders | conditioners)):
        return [None] * len(tasks)
    models = {name: part for name, part in (encoders | conditioners).items() if isinstance(part, nn.Module)}
    models = {name: part for name, part in models.items() if name not in guides_in(pipeline)}
    for model in models.values():
        model.to(tasks[0].accelerator.device)
    folders = [_encode_prompts(task, identity, stop) for task in tasks]
    for name in models.keys() & conditioners.keys():
        models[name].to("cpu")
    pipeline.register_modules(**dict.fromkeys(encoders))
    return folders


def _encode_prompts(task: Task, identity: dict, stop: Stop) -> list[Path]:
    """The folders of a task's encoded conditions, one for samples alone: others do not encode the data again."""
    family, pipeline, length = task.family, task.pipeline, task.settings.max_sequence_length

    def encoded(conditions: list[Condition]) -> Conditions:
        try:
            return family.encode_conditions(pipeline, conditions, length)
        except ValueError as error:
            more = f" to --max-sequence-length {length}, where more may do" if length else ""
            raise EncodingError(f"prompts cannot be encoded{more}: {error}") from error

    return [
        build_prompt_cache(
            task.settings.caches,
            conditions,
            encoded,
            identity,
            f"{family.name}, {length or 'all'} tokens",
            **_share(task, stop),
        )
        for conditions in task.all_conditions.values()
    ]


def _encode_images(task: Task, data: TrainingData, stop: Stop) -> Path | None:
    """The folder of the latents of a task's data; None if they would be too large."""
    settings, family = task.settings, task.family
    shape = family.latent_shape(task.pipeline, data.resolution, data.resolution, data.frames)
    if cache_size(len(data.images), settings.flip, shape) > settings.latent_cache_gb * 1e9:
        return None
    return build_cache(
        settings.caches,
        data.images,
        autoencoder_of(task.pipeline),
        settings.flip,
        family.encode_images,
        batch_size=32 if data.frames == 1 else 1,
        num_workers=settings.num_workers,
        **_share(task, stop),
    )


def _share(task: Task, stop: Stop) -> dict:
    """The share of a cache's files that this process writes, as arguments."""
    number, sharers = among_sharers(task.settings.caches, task.accelerator)
    return {"process_index": number, "num_processes": sharers, "is_stopped": stop.asked, "report": tqdm.write}
