"""Requests as one base draws them: checked, and step by step, those of equal size in one batch of the networks."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from onelora_diffusion.data.caption_texts import filled_by
from onelora_diffusion.denoisers import autoencoder_of, denoiser_of
from onelora_diffusion.families import family_of
from onelora_diffusion.families.classes import find_class
from onelora_diffusion.sampling import SamplerSettings, as_uint8, image_generators
from onelora_diffusion.sampling.drawing import EncodedConditions
from onelora_diffusion.sampling.guidance import ImageRequest
from onelora_diffusion.sampling.schedulers import fitting_samplers
from onelora_diffusion.sampling.trajectory import RunningBatch, Trajectory
from onelora_diffusion.serving.library import AdapterEntry
from onelora_diffusion.serving.request import Request


class Drawing:
    """Draws requests with one base; each image of a batch has its own adapters, condition, guidance and noise.

    Args:
        pipeline: a pipeline of one of the families, on the device that draws.
        max_steps: the most sampling steps that a request may ask for.
        class_names: the base's class names by label, as in its `model_index.json`; a class without one is named by
            its number.
    """

    def __init__(self, pipeline, max_steps: int, class_names: Mapping[int, str] | None = None):
        self.pipeline, self.max_steps, self.family = pipeline, max_steps, family_of(pipeline)
        self.transformer = denoiser_of(pipeline).eval()
        self.size = self.family.resolution(pipeline)  # side of the images in pixels, if a request does not give one
        self.encoded = EncodedConditions(pipeline)
        self.draws_classes = self.family.condition is int  # otherwise requests name prompts
        self.takes_negative_prompts = self.family.guides_itself and not self.draws_classes
        self.base_classes: dict[int, str] = {}
        if self.draws_classes:
            labels, names = range(self.transformer.config.num_embeds_ada_norm), class_names or {}
            self.base_classes = {label: names.get(label, str(label)) for label in labels}
        self.samplers = fitting_samplers(pipeline.scheduler.config) if self.family.takes_samplers else []
        self._batch = RunningBatch(pipeline, self.family)

    def completed(self, request: Request, entries: Sequence[AdapterEntry]) -> Request:
        """The request with its class as a label, and with the base's own sampler and size if it names none.

        Guidance that it does not ask for is what its adapters were trained for, and in its prompts their trigger word
        is in place of `{trigger}`. `entries` are those of its adapters.

        ValueError if the base has no such class, sampler or size, the steps exceed `max_steps`, the subject is a class
        where the base draws prompts, or a prompt has `{trigger}` and the adapters no word for it.
        """
        size, config = request.size or self.size, self.family.training_scheduler(self.pipeline).config
        if size > self.size:
            raise ValueError(f"size is {size}; {self.size}, the base's own, is the most here")
        self.family.check_resolution(self.pipeline, size)
        if (steps := request.num_inference_steps) > self.max_steps:
            raise ValueError(f"num_inference_steps is {steps}; {self.max_steps} is the most here")
        settings = sampler_settings(request)
        replace(settings, guidance=request.guidance).check_family(self.family)
        settings.check(self.transformer, config)
        if (negative := request.negative_prompt) and not self.takes_negative_prompts:
            raise ValueError(f"negative_prompt is '{negative[:60]}'; this base is not guided from a prompt")
        pairs = zip(request.adapters, entries, strict=True)
        serving = [entry for (_, weight), entry in pairs if weight != 0]
        if request.guidance_scale is None:
            is_trained = bool(serving) and all(entry.has_guidance for entry in serving)
            request = replace(request, guidance_scale=1.0 if is_trained else SamplerSettings.guidance_scale)
        if self.draws_classes:
            subject = find_class(request.subject, *self.classes_of(request.adapters, entries))
            sampler = settings.for_scheduler(config).sampler
            return replace(request, subject=subject, sampler=sampler, size=size)
        if not isinstance(request.subject, str):
            raise ValueError(f"subject is {request.subject}; this base draws a prompt, which is a text")
        triggers = [entry.trigger for entry in serving]
        subject, negative = filled_by([request.subject, negative or ""], triggers)
        return replace(request, subject=subject, negative_prompt=negative or None, size=size)

    def classes_of(
        self, adapters: Sequence[tuple[str, float]], entries: Sequence[AdapterEntry]
    ) -> tuple[dict[int, str], str]:
        """(class names by label for a weighted sum of adapters, the owner of these classes as errors name it)."""
        for (name, weight), entry in reversed(list(zip(adapters, entries, strict=True))):
            if weight != 0 and entry.classes is not None:
                return entry.classes, f"adapter '{name}'"
        return self.base_classes, "the base"

    @staticmethod
    def batch_key(request: Request) -> tuple:
        """The key by which requests share a batch: those with equal keys can be drawn together."""
        return (request.size,)

    def start(self, request: Request, mixture: Mapping[str, float]) -> Trajectory:
        """Begin with image 0 of a completed request's seed; `mixture` has each adapter's weight by its name here."""
        image = ImageRequest(
            condition=self.encoded[self.family.at_size(request.subject, request.size)],
            empty=self.encoded[self.family.at_size(request.negative_prompt or None, request.size)],
            generator=image_generators(request.seed, [0])[0],
            guidance_scale=request.guidance_scale,
            guidance=request.guidance,
            adapters=mixture,
        )
        shape = self.family.latent_shape(self.pipeline, request.size, request.size)
        return self._batch.start([image], sampler_settings(request), shape)

    def step(self, trajectories: Sequence[Trajectory]) -> None:
        """Take the next step of images with equal batch keys; the model keeps their adapters for the step after."""
        self._batch.step(trajectories)

    @torch.no_grad()
    def images(self, trajectories: Sequence[Trajectory]) -> Tensor:
        """The images of trajectories that are done: (batch, 3, size, size) in float32, from about -1 to 1."""
        return self.family.decode(autoencoder_of(self.pipeline), torch.cat([each.latents for each in trajectories]))

    def pause(self) -> None:
        """Free the model, whose adapters may change until the next step."""
        self._batch.close()

    def refresh(self, trajectories: Iterable[Trajectory]) -> None:
        """After adapters came or went: the label of no class is that of all class tables which are there now."""
        if self.draws_classes:
            empty = self.encoded[None]
            for each in trajectories:
                each.requests = [replace(request, empty=empty) for request in each.requests]


def sampler_settings(request: Request) -> SamplerSettings:
    """The sampler and steps of a request; guidance is given for each image instead."""
    return SamplerSettings(sampler=request.sampler, num_inference_steps=request.num_inference_steps)


def picture_of(image: Tensor) -> Tensor:
    """Convert an image (3, size, size) from -1 to 1 into (size, size, 3) uint8 on the CPU."""
    return as_uint8(image).permute(1, 2, 0).cpu()
