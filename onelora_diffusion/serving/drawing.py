"""From requests that agree in sampler, steps and size to their images, in one batch of the networks."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from onelora_diffusion.families import family_of
from onelora_diffusion.families.classes import find_class
from onelora_diffusion.sampling import SamplerSettings, as_uint8, draw, image_generators
from onelora_diffusion.sampling.drawing import EncodedConditions, OnStep
from onelora_diffusion.sampling.guidance import ImageRequest
from onelora_diffusion.sampling.schedulers import fitting_samplers
from onelora_diffusion.serving.library import AdapterEntry
from onelora_diffusion.serving.request import Request


class Drawing:
    """Images of requests, by one base: each of a batch has its own adapters, condition, guidance and noise.

    Args:
        pipeline: of one of the families, on its device.
        max_steps: of a sampler, that a request may ask for.
        class_names: of the base by label, as its `model_index.json` has them; those that are missing are numbers.

    Attributes:
        draws_classes: whether requests name classes, and not prompts.
        samplers: that requests may choose among.
        size: pixels a side, where a request names none.
    """

    def __init__(self, pipeline, max_steps: int, class_names: Mapping[int, str] | None = None):
        self.pipeline, self.max_steps, self.family = pipeline, max_steps, family_of(pipeline)
        self.transformer = pipeline.transformer.eval()
        self.size, self.encoded = self.family.resolution(pipeline), EncodedConditions(pipeline)
        self.draws_classes = self.family.condition is int
        self.base_classes: dict[int, str] = {}
        if self.draws_classes:
            labels, names = range(self.transformer.config.num_embeds_ada_norm), class_names or {}
            self.base_classes = {label: names.get(label, str(label)) for label in labels}
        self.samplers = fitting_samplers(pipeline.scheduler.config) if self.family.takes_samplers else []

    # -----------------------------------------------------------------------------------------------
    # Where a request comes in

    def completed(self, request: Request, entries: Sequence[AdapterEntry]) -> Request:
        """The request with its class as a label, and with the base's own sampler and size where it names none.

        Args:
            entries: of the request's adapters.

        Raises:
            ValueError: no such class, sampler or size, more steps than are allowed, or what this base does not draw.
        """
        size, config = request.size or self.size, self.pipeline.scheduler.config
        self.family.check_resolution(self.pipeline, size)
        if size > self.size:
            raise ValueError(f"size is {size}; {self.size}, the base's own, is the most here")
        if request.num_inference_steps > self.max_steps:
            raise ValueError(
                f"num_inference_steps is {request.num_inference_steps}; {self.max_steps} is the most here"
            )
        settings = sampler_settings(request)
        replace(settings, guidance=request.guidance).check_family(self.family)
        settings.check(self.transformer, config)
        if self.draws_classes:
            subject = find_class(request.subject, *self.classes_of(request.adapters, entries))
            sampler = settings.for_scheduler(config).sampler
            return replace(request, subject=subject, sampler=sampler, size=size)
        if not isinstance(request.subject, str):
            raise ValueError(f"subject is {request.subject}; this base draws a prompt, which is a text")
        return replace(request, size=size)

    def classes_of(
        self, adapters: Sequence[tuple[str, float]], entries: Sequence[AdapterEntry]
    ) -> tuple[dict[int, str], str]:
        """(names by label of the classes that a sum of adapters draws, whose they are)."""
        for (name, weight), entry in reversed(list(zip(adapters, entries, strict=True))):
            if weight != 0 and entry.classes is not None:
                return entry.classes, f"adapter '{name}'"
        return self.base_classes, "the base"

    @staticmethod
    def company(request: Request) -> tuple:
        """What requests of one batch have in common."""
        return request.sampler, request.num_inference_steps, request.size

    # -----------------------------------------------------------------------------------------------
    # Draw

    def draw(self, requests: Sequence[Request], mixtures: Sequence[Mapping[str, float]], on_step: OnStep) -> Tensor:
        """(batch, 3, size, size) in float32, from -1 to 1 and a little beyond: image 0 of each request's seed.

        Args:
            requests: completed ones that agree in `company`.
            mixtures: for each, weights by the names that its adapters have in the model.
            on_step: called with its share of the work after every step; what it raises ends the drawing.
        """
        empty = self.encoded[None]
        asked = [
            ImageRequest(
                condition=self.encoded[request.subject],
                empty=empty,
                generator=image_generators(request.seed, [0])[0],
                guidance_scale=request.guidance_scale,
                guidance=request.guidance,
                adapters=mixture,
            )
            for request, mixture in zip(requests, mixtures, strict=True)
        ]
        return draw(self.pipeline, asked, sampler_settings(requests[0]), requests[0].size, on_step)


def sampler_settings(request: Request) -> SamplerSettings:
    """How a request's noise is sampled; its guidance is its own affair."""
    return SamplerSettings(sampler=request.sampler, num_inference_steps=request.num_inference_steps)


def picture_of(image: Tensor) -> Tensor:
    """(3, size, size) from -1 to 1 -> (size, size, 3) in uint8 on the CPU."""
    return as_uint8(image).permute(1, 2, 0).cpu()
