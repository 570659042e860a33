"""From requests that agree in sampler, steps and size to their pictures, in one batch of the networks."""

import difflib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from onelora_diffusion.diffusion import prediction_of
from onelora_diffusion.families import Prompts, family_of
from onelora_diffusion.injection.routing import Entry, route_adapters
from onelora_diffusion.pipelines.base import resolution_of
from onelora_diffusion.sampling import (
    FLOW_SAMPLERS,
    NOISE_SAMPLERS,
    SamplerSettings,
    as_uint8,
    decoded_latents,
    denoised_latents,
    draw_prompts,
    image_generators,
    null_and_last_label,
)
from onelora_diffusion.serving.library import AdapterEntry
from onelora_diffusion.serving.request import Request

KEPT_PROMPTS = 64
OnStep = Callable[[float], object]


class ClassDrawing:
    """Pictures of classes, by a DiT: each sample of a batch has its own adapters, class, guidance and noise.

    Args:
        pipeline: a `DiTPipeline`, on its device.
        max_steps: of a sampler, that a request may ask for.
        class_names: of the base by label, as its `model_index.json` has them; those that are missing are numbers.
    """

    kind = "class"

    def __init__(self, pipeline, max_steps: int, class_names: Mapping[int, str] | None = None):
        self.pipeline, self.max_steps = pipeline, max_steps
        self.transformer = pipeline.transformer.eval()
        # diffusers looks for them in every module, and thousands of adapters have more of those than the base.
        self.device, self.dtype = self.transformer.device, self.transformer.dtype
        self.size = resolution_of(pipeline)
        labels, names = range(pipeline.transformer.config.num_embeds_ada_norm), class_names or {}
        self.base_classes = {label: names.get(label, str(label)) for label in labels}
        is_flow = prediction_of(pipeline.scheduler.config) == "flow"
        self.samplers = FLOW_SAMPLERS if is_flow else NOISE_SAMPLERS

    # -----------------------------------------------------------------------------------------------
    # Where a request comes in

    def completed(self, request: Request, entries: Sequence[AdapterEntry]) -> Request:
        """The request with its class as a label, and with the base's own sampler and size where it names none.

        Args:
            entries: of the request's adapters.

        Raises:
            ValueError: no such class, sampler or size, or more steps than are allowed.
        """
        if request.size not in (None, self.size):
            raise ValueError(f"size is {request.size}; this base draws {self.size} by {self.size} pixels")
        if request.num_inference_steps > self.max_steps:
            raise ValueError(
                f"num_inference_steps is {request.num_inference_steps}; {self.max_steps} is the most here"
            )
        config = self.pipeline.scheduler.config
        settings = sampler_settings(request)
        settings.check(self.transformer, config)
        classes, owner = self.classes_of(request.adapters, entries)
        return replace(
            request,
            subject=find_class(request.subject, classes, owner),
            sampler=settings.for_scheduler(config).sampler,
            size=self.size,
        )

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

    @torch.no_grad()
    def draw(self, requests: Sequence[Request], mixtures: Sequence[Mapping[str, float]], on_step: OnStep) -> Tensor:
        """(batch, 3, size, size) in float32, from -1 to 1 and a little beyond: image 0 of each request's seed.

        Args:
            requests: completed ones that agree in `company`.
            mixtures: for each, weights by the names that its adapters have in the model.
            on_step: called with its share of the work after every step; what it raises ends the drawing.
        """
        labels = torch.tensor([request.subject for request in requests])
        generators = [generator for request in requests for generator in image_generators(request.seed, [0])]
        guided = [sample for sample, request in enumerate(requests) if request.guidance_scale > 1]
        # Without its class a sample is left to its own adapters, or by domain guidance to the base.
        unconditional = [{} if requests[sample].guidance == "domain" else mixtures[sample] for sample in guided]
        scales = [requests[sample].guidance_scale for sample in guided]
        with self._routed([*mixtures, *unconditional]):
            null_label, _ = null_and_last_label(self.transformer)
            denoise = self._denoiser(labels, guided, scales, null_label)
            latents = denoised_latents(
                self.transformer,
                self.pipeline.scheduler.config,
                generators,
                sampler_settings(requests[0]),
                denoise,
                self.device,
                on_step,
            )
        return decoded_latents(self.pipeline.vae, latents)

    def _denoiser(
        self, class_labels: Tensor, guided: list[int], guidance_scales: list[float], null_label: int
    ) -> Callable[[Tensor, float], Tensor]:
        """`guided_denoiser` with a scale for each sample; those without guidance run once, and the others twice.

            ε_i(x, t) = ε_i(x, t, ∅) + w_i · (ε_i(x, t, y_i) - ε_i(x, t, ∅))

        Args:
            class_labels: (batch,), y.
            guided: the samples that are guided.
            guidance_scales: w of each of those.
            null_label: ∅, the label of no class.

        Returns:
            `denoise(latents, timestep) -> model_output`; the transformer is called with all samples and their
            classes, then with the guided ones without.
        """
        transformer, device, channels = self.transformer, self.device, self.transformer.config.in_channels
        index = torch.tensor(guided, dtype=torch.long, device=device)
        scales = torch.tensor(guidance_scales, device=device).view(-1, 1, 1, 1)
        labels = torch.cat([class_labels, torch.full((len(guided),), null_label)]).to(device)

        def denoise(latents: Tensor, timestep: float) -> Tensor:
            inputs = torch.cat([latents, latents[index]]).to(self.dtype)
            timesteps = torch.full((len(inputs),), timestep, device=device)
            output = transformer(inputs, timestep=timesteps, class_labels=labels).sample.float()
            conditional, unconditional = output[: len(latents)], output[len(latents) :, :channels]
            towards = conditional[index, :channels] - unconditional
            conditional[index, :channels] = unconditional + scales * towards
            return conditional

        return denoise

    def _routed(self, entries: list[Entry]):
        return route_adapters(self.transformer, entries) if hasattr(self.transformer, "_onelora") else nullcontext()


class PromptDrawing:
    """Pictures of prompts, by a text-to-image transformer and its pipeline's own sampler, an adapter for each sample.

    Args:
        pipeline: of one of `FAMILIES`, on its device.
        max_steps: as in `ClassDrawing`.
    """

    kind = "prompt"
    samplers = (None,)

    def __init__(self, pipeline, max_steps: int):
        self.pipeline, self.max_steps = pipeline, max_steps
        self.transformer, self.family = pipeline.transformer, family_of(pipeline)
        self.size = self.family.resolution(pipeline)
        pipeline.set_progress_bar_config(disable=True)
        self._encoded: OrderedDict[str, Prompts] = OrderedDict()

    def completed(self, request: Request, entries: Sequence[AdapterEntry]) -> Request:
        """The request with the base's own size where it names none; ValueError for what is not drawn here."""
        if not isinstance(request.subject, str):
            raise ValueError(f"subject is {request.subject}; this base draws a prompt, which is a text")
        if request.sampler is not None:
            raise ValueError(f"sampler is {request.sampler}; pictures of prompts have their pipeline's own")
        if request.guidance == "domain" and not self.family.is_guided:
            raise ValueError(
                f"guidance 'domain' leads from the empty prompt, from which {self.family.name} is not guided"
            )
        check_steps(request, self.max_steps)
        size = request.size or self.size
        self.family.check_resolution(self.pipeline, size)
        if size > self.size:
            raise ValueError(f"size is {size}; {self.size}, the base's own, is the most here")
        return replace(request, size=size)

    @staticmethod
    def company(request: Request) -> tuple:
        """What requests of one batch have in common: pipelines take one scale of guidance."""
        return request.guidance_scale, request.num_inference_steps, request.size

    @torch.no_grad()
    def draw(self, requests: Sequence[Request], mixtures: Sequence[Mapping[str, float]], on_step: OnStep) -> Tensor:
        """As `ClassDrawing.draw`."""
        rows = [self._prompt(request.subject) for request in requests]
        first, is_adapted = requests[0], hasattr(self.transformer, "_onelora")
        base_guides = [request.guidance == "domain" for request in requests]
        hook = self.transformer.register_forward_hook(lambda *_: on_step(1 / first.num_inference_steps))
        try:
            pictures = draw_prompts(
                self.pipeline,
                self.family,
                {name: torch.cat([row[name] for row in rows]) for name in rows[0]},
                self._prompt(""),
                [generator for request in requests for generator in image_generators(request.seed, [0])],
                first.size,
                num_inference_steps=first.num_inference_steps,
                guidance_scale=first.guidance_scale,
                adapter_names=mixtures if is_adapted else None,
                empty_names=[{} if base else own for base, own in zip(base_guides, mixtures, strict=True)],
            )
        finally:
            hook.remove()
        return pictures * 2 - 1

    def _prompt(self, text: str) -> Prompts:
        """Encoded alone, so that no row depends on the others; the last ones are kept."""
        if text not in self._encoded:
            self._encoded[text] = self.family.encode_prompts(self.pipeline, [text])
        self._encoded.move_to_end(text)
        while len(self._encoded) > KEPT_PROMPTS:
            self._encoded.popitem(last=False)
        return self._encoded[text]


def check_steps(request: Request, most: int) -> None:
    if request.num_inference_steps > most:
        raise ValueError(f"num_inference_steps is {request.num_inference_steps}; {most} is the most here")


def sampler_settings(request: Request) -> SamplerSettings:
    """How a request's noise is sampled; its guidance is its own affair."""
    return SamplerSettings(sampler=request.sampler, num_inference_steps=request.num_inference_steps)


def find_class(wanted: str | int, classes: Mapping[int, str], owner: str) -> int:
    """The label of a class by name or number; a name wins over a number.

    Raises:
        ValueError: there is none; with those that are there.
    """
    known = {plain(part): label for label, names in reversed(classes.items()) for part in (names, *names.split(","))}
    if isinstance(wanted, str):
        if plain(wanted) in known:
            return known[plain(wanted)]
        if wanted.isascii() and wanted.isdecimal() and int(wanted) in classes:
            return int(wanted)
        near = difflib.get_close_matches(plain(wanted), known, n=5) or [*list(known)[-5:][::-1], "..."]
        raise ValueError(f"no class '{wanted[:60]}' among the {len(classes)} of {owner}: there is {', '.join(near)}")
    if wanted not in classes:
        raise ValueError(
            f"label {wanted} is none of the {len(classes)} classes of {owner}: give 0 to {len(classes) - 1}"
        )
    return wanted


def plain(name: str) -> str:
    return name.strip().casefold().replace(" ", "_")


def picture_of(image: Tensor) -> Tensor:
    """(3, size, size) from -1 to 1 -> (size, size, 3) in uint8 on the CPU."""
    return as_uint8(image).permute(1, 2, 0).cpu()
