"""Weights of the squared error over timesteps."""

from typing import Literal

import torch
from torch import Tensor

from onelora_diffusion.diffusion import device_table, noise_schedule, prediction_of

Weighting = Literal["none", "sigma-sqrt", "cosmap"]


def check_weighting(scheduler, snr_gamma: float | None, weighting: Weighting) -> None:
    """ValueError for weights that do not fit the model's prediction type."""
    is_flow = prediction_of(scheduler.config) == "flow"
    if snr_gamma is not None and is_flow:
        raise ValueError("--snr-gamma weighs the error of noise; this base learns flow matching: --loss-weighting")
    if weighting != "none" and not is_flow:
        raise ValueError(f"--loss-weighting {weighting} is for flow matching, which this base does not learn")


def loss_weights(timesteps: Tensor, scheduler, snr_gamma: float | None, weighting: Weighting) -> Tensor | None:
    """The weights of the squared error at each timestep, (batch,); None if all are 1."""
    if snr_gamma is not None:
        return min_snr_weights(timesteps, scheduler, snr_gamma)
    return None if weighting == "none" else flow_weights(timesteps, scheduler, weighting)


def weighted_loss(losses: dict[str, Tensor], weights: Tensor | None) -> Tensor:
    """The loss (batch,) from the `losses` of `training_losses`, each (batch,), with a weighted squared error."""
    return losses["loss"] if weights is None else losses["loss"] + (weights - 1) * losses["mse"]


def min_snr_weights(timesteps: Tensor, scheduler, gamma: float) -> Tensor:
    """min(SNR, γ) / SNR with SNR = ᾱ / (1 - ᾱ) for a model that predicts noise, / (SNR + 1) for velocity: (batch,).

    EDM's F is a velocity, too. (Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", 2023.)
    """
    alphas_cumprod = device_table(_alphas_cumprod, scheduler, timesteps.device, torch.float32)[timesteps]
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return snr.clamp(max=gamma) / (snr if prediction_of(scheduler.config) == "epsilon" else snr + 1)


def flow_weights(timesteps: Tensor, scheduler, weighting: Weighting) -> Tensor:
    """σ⁻², or 2 / π (1 - 2σ + 2σ²): (batch,). Esser et al., "Scaling Rectified Flow Transformers", 2024, section 3."""
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    sigmas = device_table(noise_schedule, scheduler, timesteps.device, torch.float32)[1, timesteps]
    return compute_loss_weighting_for_sd3(weighting.replace("-", "_"), sigmas)


def _alphas_cumprod(scheduler, dtype: torch.dtype) -> Tensor:
    if prediction_of(scheduler.config) == "edm":
        return 1 - noise_schedule(scheduler, dtype)[1] ** 2
    return scheduler.alphas_cumprod.to(dtype)
