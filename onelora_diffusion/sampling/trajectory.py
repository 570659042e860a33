"""Images on their way from noise to latents: each by its own sampler, several in one batch of the networks."""

import contextlib
import copy
import functools
import inspect
from collections.abc import Sequence
from math import prod

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from onelora_diffusion.denoisers import denoiser_of
from onelora_diffusion.families import Family
from onelora_diffusion.families.recording import fresh
from onelora_diffusion.injection.routing import reroute_adapters, route_adapters
from onelora_diffusion.sampling.guidance import GuidedDenoiser, ImageRequest, first_weight
from onelora_diffusion.sampling.schedulers import make_scheduler
from onelora_diffusion.sampling.settings import SamplerSettings


class Trajectory:
    """Images that take the steps of one sampler together, from the noise of each one's own generator.

    `scheduler` has its timesteps set, and keeps what its sampler remembers of a step. Latents are (images, *shape) in
    float32, as the steps that were taken have left them. `learned_variance`: whether the scheduler gets the variance
    that the model predicts.
    """

    def __init__(
        self,
        requests: Sequence[ImageRequest],
        scheduler,
        shape: tuple[int, ...],
        device: torch.device,
        learned_variance: bool = False,
    ):
        self.requests, self.scheduler = list(requests), scheduler
        self.step = 0  # number of steps that were taken
        self._channels = None if learned_variance else shape[0]
        generators = [request.generator for request in requests]
        takes_noise = "generator" in inspect.signature(scheduler.step).parameters
        self._noise = {"generator": generators} if takes_noise else {}
        latents = randn_tensor((len(requests), *shape), generators, device=device, dtype=torch.float32)
        self.latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
        self._scaled = getattr(scheduler, "scale_model_input", lambda latents, timestep: latents)
        self.num_steps = len(scheduler.timesteps)  # number of times that the networks run

    @property
    def is_done(self) -> bool:
        return self.step == self.num_steps

    @property
    def timestep(self) -> Tensor:
        """The time of the next step, on the CPU, so that no step waits for the device."""
        return self.scheduler.timesteps[self.step]

    def inputs(self) -> Tensor:
        """What the networks get of the latents, (images, C, ...)."""
        return self._scaled(self.latents, self.timestep)

    def advance(self, prediction: Tensor) -> None:
        """Take a step by the networks' prediction (images, C, ...), of 2C channels if that has a variance."""
        own = prediction[:, : self._channels]
        self.latents = self.scheduler.step(own, self.timestep, self.latents, **self._noise).prev_sample
        self.step += 1


class RunningBatch:
    """Lets trajectories take their steps in one batch of the networks, which may be others at every step.

    `close` has to be called at the end: until then, the transformer uses the adapters of the last step's images.

    The pipeline's transformer is in eval mode; `channels` and `interval` are as for `GuidedDenoiser`.
    """

    def __init__(self, pipeline, family: Family, channels: int | None = None, interval: tuple[int, int] | None = None):
        self.pipeline, self.family, self.guidance = pipeline, family, (channels, interval)
        self._denoise: GuidedDenoiser | None = None
        self._route = contextlib.ExitStack()
        self._scheduler = functools.lru_cache(maxsize=64)(functools.partial(scheduler_of, pipeline, family))

    def close(self) -> None:
        """End the use of the images' adapters; the next step begins it again."""
        self._denoise = None
        self._route.close()

    def start(self, requests: Sequence[ImageRequest], settings: SamplerSettings, shape: tuple[int, ...]) -> Trajectory:
        """The trajectory of images with one sampler and latents of a shape (C, ...), before its first step."""
        transformer = denoiser_of(self.pipeline)
        own = "" if self.family.takes_samplers else str(self.pipeline.scheduler.config.get("variance_type"))
        is_asked = settings.sampler == "ddpm" or "learned" in own
        learned_variance = is_asked and transformer.config.out_channels == 2 * shape[0]
        scheduler = copy.deepcopy(self._scheduler(settings, shape, learned_variance))
        return Trajectory(requests, scheduler, shape, first_weight(transformer).device, learned_variance)

    @torch.no_grad()
    def step(self, trajectories: Sequence[Trajectory]) -> None:
        """Run the networks once for all images of these trajectories, whose latents have one size, and step each."""
        requests = [request for trajectory in trajectories for request in trajectory.requests]
        if self._denoise is None or requests != self._denoise.requests:
            self._compose(requests)
        latents = torch.cat([trajectory.inputs() for trajectory in trajectories])
        times = [trajectory.timestep.item() for trajectory in trajectories for _ in trajectory.requests]
        prediction = self._denoise(latents, torch.tensor(times))
        sizes = [len(trajectory.requests) for trajectory in trajectories]
        for trajectory, own in zip(trajectories, prediction.split(sizes), strict=True):
            trajectory.advance(own)

    def _compose(self, requests: list[ImageRequest]) -> None:
        transformer, before = denoiser_of(self.pipeline), self._denoise
        denoise = GuidedDenoiser(self.family, transformer, requests, *self.guidance)
        if before is None or before.entries is None or denoise.entries is None:
            self.close()
            if denoise.entries is not None:
                self._route.enter_context(route_adapters(transformer, denoise.entries))
        else:
            reroute_adapters(transformer, denoise.entries)
        self._denoise = denoise


def scheduler_of(
    pipeline, family: Family, settings: SamplerSettings, shape: tuple[int, ...], learned_variance: bool = False
):
    """A scheduler with its timesteps set for latents of this shape: the chosen sampler's, or the pipeline's own."""
    own, steps = pipeline.scheduler, settings.num_inference_steps
    num_tokens = prod(shape[1:]) // family.patch_size(denoiser_of(pipeline)) ** 2
    if family.takes_samplers:
        sampler = settings.for_scheduler(own.config).sampler
        return make_scheduler(sampler, own.config, steps, num_tokens, learned_variance)
    frames = shape[1] if len(shape) == 4 else 1
    return family.sampling_scheduler(fresh(own), steps, num_tokens, frames)
