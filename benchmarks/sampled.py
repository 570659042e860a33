"""Latents of classes as `generate_images` makes them, without their images, for what is checked of them."""

from collections.abc import Mapping
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from onelora_diffusion.families.dit import DiT, null_and_last_label
from onelora_diffusion.pipelines.base import eval_mode
from onelora_diffusion.sampling import SamplerSettings
from onelora_diffusion.sampling.drawing import denoised_latents
from onelora_diffusion.sampling.guidance import ImageRequest


def sample_latents(
    transformer: nn.Module,
    scheduler_config: Mapping,
    class_labels: Tensor,
    generators: list[torch.Generator],
    settings: SamplerSettings,
    null_label: int | None = None,
    on_step=lambda share: None,
) -> Tensor:
    """(batch,) labels -> (batch, C, H, W) in float32, by a DiT.

    Args:
        null_label: the label of no class. None: that of the model's class tables, and labels must be classes there.
    """
    family, size = DiT(), transformer.config.sample_size
    pipeline = SimpleNamespace(transformer=transformer, scheduler=SimpleNamespace(config=scheduler_config))
    settings.check(transformer, scheduler_config)
    if null_label is None:
        family.check_conditions(pipeline, class_labels.tolist())
        null_label, _ = null_and_last_label(transformer)
    requests = [
        ImageRequest(
            condition={"class_labels": label[None]},
            empty={"class_labels": torch.tensor([null_label])},
            generator=generator,
            guidance_scale=settings.guidance_scale,
            guidance=settings.guidance,
        )
        for label, generator in zip(class_labels, generators, strict=True)
    ]
    shape = (transformer.config.in_channels, size, size)
    with eval_mode(transformer):
        return denoised_latents(pipeline, family, requests, settings, shape, on_step)
