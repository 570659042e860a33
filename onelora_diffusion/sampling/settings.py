"""The settings of sampling, for command lines and calls."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from onelora_diffusion.diffusion import prediction_of
from onelora_diffusion.families import Family
from onelora_diffusion.injection.routing import GUIDANCES, Guidance
from onelora_diffusion.sampling.schedulers import SAMPLERS, fitting_samplers

SamplerName = Literal[tuple(SAMPLERS)]


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """The settings by which images are sampled from noise.

    The samplers are those of `sampling.schedulers`. Guidance is classifier-free (Ho & Salimans 2022) or from the base
    without class or prompt towards the adapted model (Zhong et al., ICLR 2025). Both double the batch. It may be
    limited to some of the timesteps (Kynkäänniemi et al. 2024).
    """

    sampler: SamplerName | None = None
    """ddpm is the ancestral sampler with the learned variance, ADM's and DiT's own (250 steps there). euler and heun
    are for flow matching. Default: ddim, or euler for flow matching."""
    num_inference_steps: int = 50
    """Steps of the sampler."""
    guidance: Guidance = "cfg"
    """cfg: classifier-free guidance; domain: from the base without class to the adapter (Zhong et al., 2025)."""
    guidance_scale: float = 4.0
    """Strength of the guidance; 1 is none."""
    guidance_channels: int | None = None
    """Guide only the first so many latent channels (3 in DiT's own code). Default: all."""
    guidance_interval: tuple[int, int] | None = None
    """Guide only between these two timesteps of training (0 is the image), the lower first. Default: always."""

    @property
    def is_beside_base(self) -> bool:
        """Whether every step uses the base in addition to the adapters."""
        return self.guidance == "domain" and self.guidance_scale > 1

    def for_scheduler(self, scheduler_config: Mapping) -> "SamplerSettings":
        """These settings with the default sampler of a model with this scheduler, if none is chosen."""
        return self if self.sampler else replace(self, sampler=fitting_samplers(scheduler_config)[0])

    def check_family(self, family: Family) -> None:
        """ValueError for settings with which a family cannot draw."""
        if self.sampler and not family.takes_samplers:
            raise ValueError(f"sampler {self.sampler!r} is for classes: pictures of prompts have their pipeline's own")
        if family.is_guided:
            return
        if self.guidance == "domain":
            raise ValueError(f"domain guidance leads from the empty prompt, from which {family.name} is not guided")
        if self.guidance_channels is not None or self.guidance_interval is not None:
            raise ValueError(f"{family.name} is told its guidance, which has no channels and no interval")

    def check(self, transformer: nn.Module, scheduler_config: Mapping) -> None:
        """ValueError for an unknown sampler or guidance, one that does not fit the model, or for steps or channels
        that it does not have."""
        if self.guidance not in GUIDANCES:
            raise ValueError(f"unknown guidance {self.guidance!r}; choose from {', '.join(GUIDANCES)}")
        if self.guidance == "domain" and self.guidance_interval is not None:
            raise ValueError("domain guidance has no guidance interval: the base takes part in every step")
        if self.guidance == "domain" and not hasattr(transformer, "_onelora"):
            raise ValueError("domain guidance leads from the base to an adapter: load one first")
        if self.sampler not in (None, *SAMPLERS):
            raise ValueError(f"unknown sampler {self.sampler!r}; choose from {', '.join(SAMPLERS)}")
        fitting = fitting_samplers(scheduler_config)
        if self.sampler not in (None, *fitting):
            kind = "flow matching" if prediction_of(scheduler_config) == "flow" else "noise"
            kind += ", shifted by the size of its images" * bool(scheduler_config.get("use_dynamic_shifting"))
            raise ValueError(
                f"sampler {self.sampler!r} does not fit this model, which predicts {kind}: "
                f"choose {' or '.join(fitting)}"
            )
        most = scheduler_config["num_train_timesteps"]
        if not 1 <= self.num_inference_steps <= most:
            raise ValueError(f"{self.num_inference_steps} inference steps asked for; this model takes 1 to {most}")
        if (asked := self.guidance_channels) is not None and not 1 <= asked <= transformer.config.in_channels:
            channels = transformer.config.in_channels
            raise ValueError(f"guidance of {asked} channels asked for; the latents have {channels}")
        lowest, highest = self.guidance_interval or (0, most - 1)
        if not 0 <= lowest <= highest < most:
            raise ValueError(
                f"guidance interval {lowest} to {highest}: give two timesteps from 0 to {most - 1}, the lower first"
            )
