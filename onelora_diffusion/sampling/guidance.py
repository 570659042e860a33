"""One denoiser for a batch of images, each with its own condition, strength of guidance, adapters and time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from onelora_diffusion.adapters.weights import Weight
from onelora_diffusion.families import Conditions, Family
from onelora_diffusion.families.arguments import on
from onelora_diffusion.families.family import joined
from onelora_diffusion.injection.routing import Entry, Guidance, warn_of_trained_guidance


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageRequest:
    """An image to draw."""

    condition: Conditions  # encoded, a row of a family's `encode_conditions`
    empty: Conditions  # the encoded empty condition, which guidance uses
    generator: torch.Generator  # of its noise, on the CPU
    # w; 1 or less turns guidance off. For a family without such guidance, an input of its transformer.
    guidance_scale: float
    guidance: Guidance = "cfg"  # or `domain`, from the base without condition
    # The weights of its adapters by name; {} for the base alone, None for the active adapters.
    adapters: Mapping[str, Weight] | None = None


class GuidedDenoiser:
    """`denoise(latents, times) -> prediction` of a batch, in float32, with its variance if the model predicts one.

        ε_i(x, t) = ε_i(x, t, ∅) + w_i · (ε_i(x, t, y_i) − ε_i(x, t, ∅))

    (Ho & Salimans 2022). One batch contains all images with their conditions, and the guided ones again without
    condition: with their own adapters, or for domain guidance (Zhong et al., ICLR 2025) with the base alone. A learned
    variance is that of the prediction with condition. It is called inside a route of its `entries`, if it has any.

    The first `channels` of the latents are guided (None: all), at times in `interval`, the lower first (None: always).
    """

    def __init__(
        self,
        family: Family,
        transformer: nn.Module,
        requests: Sequence[ImageRequest],
        channels: int | None = None,
        interval: tuple[int, int] | None = None,
    ):
        self.family, self.transformer, self.requests, self.channels = family, transformer, requests, channels
        self.interval = interval or (-float("inf"), float("inf"))
        self.device, self.dtype = first_weight(transformer).device, first_weight(transformer).dtype
        scales = [request.guidance_scale for request in requests]
        self.guided = [image for image, scale in enumerate(scales) if family.is_guided and scale > 1]
        rows = [request.condition for request in requests] + [requests[image].empty for image in self.guided]
        self.conditions = joined(rows) | ({} if family.is_guided else {"guidance": torch.tensor(scales)})
        self.conditions = family.on_device(self.conditions, self.device)
        self.index = on(torch.tensor(self.guided, dtype=torch.long), self.device)
        self.scales = on(torch.tensor([scales[image] for image in self.guided]), self.device)
        self.entries = self._entries(requests)

    def _entries(self, requests: Sequence[ImageRequest]) -> list[Entry] | None:
        """The adapters of each row of the batch; None if all rows use the active adapters."""
        is_domain = [requests[image].guidance == "domain" for image in self.guided]
        if not hasattr(self.transformer, "_onelora"):
            return None
        book = self.transformer._onelora
        own = [book.serving if request.adapters is None else request.adapters for request in requests]
        for image in self.guided:
            warn_of_trained_guidance(self.transformer, own[image] or book.merged or (), requests[image].guidance_scale)
        if not any(is_domain) and all(request.adapters is None for request in requests):
            return None
        return own + [None if base else own[image] for image, base in zip(self.guided, is_domain, strict=True)]

    def __call__(self, latents: Tensor, times: Tensor) -> Tensor:
        """Of latents (batch, C, ...) in float32 on the transformer's device, each with its own time (batch,).

        Times are on the CPU, so that no step waits for the device.
        """
        lowest, highest = self.interval
        is_inside = ((times >= lowest) & (times <= highest))[self.guided]
        if not is_inside.any() and self.entries is None:
            alone = {name: rows[: len(latents)] for name, rows in self.conditions.items()}
            return self._predict(latents, times, alone)
        both = torch.cat([latents, latents[self.index]]), torch.cat([times, times[self.guided]])
        output = self._predict(*both, self.conditions)
        channels = self.channels or latents.shape[1]
        with_condition, without = output[: len(latents)], output[len(latents) :, :channels]
        own = with_condition[self.index, :channels]
        per_image = (-1, *[1] * (latents.ndim - 1))
        guided = without + self.scales.view(per_image) * (own - without)
        if not is_inside.all():
            guided = torch.where(on(is_inside, self.device).view(per_image), guided, own)
        with_condition[self.index, :channels] = guided
        return with_condition

    def _predict(self, latents: Tensor, times: Tensor, conditions: Conditions) -> Tensor:
        return self.family.predict(self.transformer, latents.to(self.dtype), times, conditions).float()


def first_weight(transformer: nn.Module) -> Tensor:
    """A weight that has the transformer's device and dtype.

    diffusers' properties for these walk over all modules, of which thousands of adapters have very many.
    """
    return next(parameter for parameter in transformer.parameters() if parameter.is_floating_point())
