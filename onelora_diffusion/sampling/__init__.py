"""From noise and conditions to images: settings, samplers, guidance and drawing."""

from onelora_diffusion.sampling.drawing import (
    IMAGES_AT_ONCE,
    adapters_merged,
    as_uint8,
    draw,
    generate_images,
    image_generators,
    progress_bar,
)
from onelora_diffusion.sampling.settings import SamplerSettings

__all__ = ["IMAGES_AT_ONCE", "SamplerSettings", "adapters_merged", "as_uint8", "draw", "generate_images"]
__all__ += ["image_generators", "progress_bar"]
