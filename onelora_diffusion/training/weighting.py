"""Weights of the squared error over timesteps."""

from torch import Tensor


def min_snr_weights(timesteps: Tensor, scheduler, gamma: float) -> Tensor:
    """min(SNR, γ) / SNR with SNR = ᾱ / (1 - ᾱ), for a model that predicts the noise: (batch,).

    Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", ICCV 2023.
    """
    alphas_cumprod = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return snr.clamp(max=gamma) / snr
