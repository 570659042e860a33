"""The samplers: for each a function that makes diffusers' scheduler with its timesteps set, and a row of the table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)

from onelora_diffusion.diffusion import prediction_of


@dataclass(frozen=True)
class Sampler:
    """A sampler: how its scheduler is made from the config of the model's own scheduler.

    `of_noise(config, num_inference_steps, learned_variance)` is for a model that predicts noise or a velocity,
    `of_flow(config, num_inference_steps, num_tokens)` for one of flow matching; None where the sampler does not fit.
    """

    of_noise: Callable | None = None
    of_flow: Callable | None = None
    shifts_by_size: bool = False  # whether it can shift the time of flow matching by the number of an image's tokens


def ddim(config: Mapping, num_inference_steps: int, learned_variance: bool) -> DDIMScheduler:
    """DDIM with eta 0 (Song et al. 2020)."""
    scheduler = DDIMScheduler.from_config(config, clip_sample=_clips(config))
    scheduler.set_timesteps(num_inference_steps)
    return scheduler


def dpm_solver(config: Mapping, num_inference_steps: int, learned_variance: bool) -> DPMSolverMultistepScheduler:
    """DPM-Solver++ of the second order, multistep (Lu et al. 2022)."""
    # "leading", DDIM's default, would start below the noise level that the first latents have.
    spacing = "trailing" if config.get("timestep_spacing") == "trailing" else "linspace"
    scheduler = DPMSolverMultistepScheduler.from_config(
        config,
        algorithm_type="dpmsolver++",
        timestep_spacing=spacing,
        final_sigmas_type="zero",
        variance_type=None,  # otherwise it reduces the noise to three channels
    )
    scheduler.set_timesteps(num_inference_steps)
    return scheduler


def ddpm(config: Mapping, num_inference_steps: int, learned_variance: bool) -> DDPMScheduler:
    """Ancestral sampling (Nichol & Dhariwal 2021) on DiT's evenly respaced steps, with the learned variance."""
    variance_type = "learned_range" if learned_variance else "fixed_large"
    scheduler = DDPMScheduler.from_config(config, variance_type=variance_type, clip_sample=_clips(config))
    # In float32, 1 - ᾱ has only three digits at the last steps.
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), 0)
    # DiT's steps, from the first to the last of the schedule; `linspace` rounds some of them differently.
    stride = (config["num_train_timesteps"] - 1) / max(num_inference_steps - 1, 1)
    timesteps = accumulate([0.0] + [stride] * (num_inference_steps - 1))
    scheduler.set_timesteps(timesteps=[round(timestep) for timestep in timesteps][::-1])
    return scheduler


def euler(config: Mapping, num_inference_steps: int, num_tokens: int) -> FlowMatchEulerDiscreteScheduler:
    """Euler's steps of flow matching (Esser et al. 2024)."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config, shift=_shift(config))
    is_shifted = scheduler.config.use_dynamic_shifting
    shift = {"mu": dynamic_shift(scheduler.config, num_tokens)} if is_shifted else {}
    scheduler.set_timesteps(num_inference_steps, **shift)
    return scheduler


def heun(config: Mapping, num_inference_steps: int, num_tokens: int) -> FlowMatchHeunDiscreteScheduler:
    """Heun's steps of the second order, which run the model twice but for the last (Karras et al. 2022)."""
    scheduler = FlowMatchHeunDiscreteScheduler(config["num_train_timesteps"], _shift(config))
    scheduler.set_timesteps(num_inference_steps)
    return scheduler


def dpm_solver_of_flow(config: Mapping, num_inference_steps: int, num_tokens: int) -> DPMSolverMultistepScheduler:
    """DPM-Solver++ of a model of flow matching."""
    scheduler = DPMSolverMultistepScheduler(
        config["num_train_timesteps"],
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=_shift(config),
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(num_inference_steps)
    return scheduler


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(of_noise=ddim),
    "euler": Sampler(of_flow=euler, shifts_by_size=True),
    "heun": Sampler(of_flow=heun),
    "dpm-solver++": Sampler(of_noise=dpm_solver, of_flow=dpm_solver_of_flow),
    "ddpm": Sampler(of_noise=ddpm),
}
"""The samplers by name. The first one that fits a model is its default."""


def fitting_samplers(scheduler_config: Mapping) -> list[str]:
    """The names of the samplers that fit a model whose own scheduler has this config, the default first."""
    if prediction_of(scheduler_config) != "flow":
        return [name for name, sampler in SAMPLERS.items() if sampler.of_noise]
    shifts = scheduler_config.get("use_dynamic_shifting")
    return [name for name, each in SAMPLERS.items() if each.of_flow and (each.shifts_by_size or not shifts)]


def make_scheduler(
    sampler: str, scheduler_config: Mapping, num_inference_steps: int, num_tokens: int, learned_variance: bool
):
    """diffusers' scheduler of one of the `fitting_samplers`, with its timesteps set, for images of so many tokens.

    `scheduler_config` is that of the model's own scheduler; with `learned_variance` the scheduler gets the variance
    that the model predicts.
    """
    if prediction_of(scheduler_config) == "flow":
        return SAMPLERS[sampler].of_flow(scheduler_config, num_inference_steps, num_tokens)
    return SAMPLERS[sampler].of_noise(scheduler_config, num_inference_steps, learned_variance)


def _clips(config: Mapping) -> bool:
    # Without a setting in the config diffusers would clip to [-1, 1], but latents have no such bounds.
    return config.get("clip_sample", False)


def _shift(config: Mapping) -> float:
    return config.get("shift", config.get("flow_shift", 1.0))


def dynamic_shift(config: Mapping, num_tokens: int) -> float:
    """The shift μ for an image of this number of tokens, interpolated between `base_shift` and `max_shift`."""
    slope = (config["max_shift"] - config["base_shift"]) / (config["max_image_seq_len"] - config["base_image_seq_len"])
    return config["base_shift"] + slope * (num_tokens - config["base_image_seq_len"])
