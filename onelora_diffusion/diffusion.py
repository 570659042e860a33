"""The training loss of DiT: mean squared error on the noise, and a variational bound for the variance."""

import math
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

# scheduler -> {(device, dtype): its table}, so that a training step neither rebuilds it nor waits for a copy.
_tables: WeakKeyDictionary = WeakKeyDictionary()


def training_losses(
    model_output: Tensor, x_start: Tensor, noise: Tensor, timesteps: Tensor, scheduler
) -> dict[str, Tensor]:
    """The hybrid loss of a model that predicts the noise ε and a variance between two bounds.

        loss = mse + vb,    mse = mean (ε - ε_θ)²
        vb   = KL(q(x_{t-1} | x_t, x_0) || p_θ(x_{t-1} | x_t)) in bits per dimension for t > 0,
               -log2 p_θ(x_0 | x_1) of a Gaussian discretised to 256 grey levels for t = 0

    (Nichol & Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021, equations 14 to 16, as
    DiT was trained). `vb` teaches the variance only: its mean is detached from the graph. Without a
    variance half there is no `vb`, and loss = mse.

    Both means are linear in x_0 and x_t, and x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε, so they differ by
    β_t / √(α_t (1-ᾱ_t)) · (ε_θ - ε): x_t itself is not needed, and nothing large cancels at small t.

    Args:
        model_output: (batch, 2C, H, W), the noise ε_θ, then where the log variance lies between its bounds
            (-1 lower, 1 upper); or (batch, C, H, W), the noise alone.
        x_start: (batch, C, H, W), the clean latents.
        noise: (batch, C, H, W), the noise ε the model was shown.
        timesteps: (batch,) int64, in [0, number of training steps).
        scheduler: any diffusers scheduler with `betas`, for a model that predicts ε. Its betas are float32
            and all that follows from them is computed in float64.

    Returns:
        `loss`, `mse` and `vb`, each (batch,), in float32 also under autocast (float64 for float64 tensors).

    Raises:
        ValueError: `model_output` has neither C nor 2C channels, or the scheduler predicts something else.
    """
    channels = x_start.shape[1]
    if model_output.shape[1] not in (channels, 2 * channels):
        raise ValueError(
            f"model_output has {model_output.shape[1]} channels; latents of {channels} channels need "
            f"{channels} (noise) or {2 * channels} (noise and variance)"
        )
    dtype = torch.promote_types(x_start.dtype, torch.float32)
    error = model_output[:, :channels].to(dtype) - noise.to(dtype)
    mse = _mean_flat(error**2)
    if model_output.shape[1] == channels:
        return {"loss": mse, "mse": mse}

    table = _table(scheduler, x_start.device, dtype)[:, timesteps, None, None, None]
    mean_per_error, min_log_variance, log_variance_range = table
    mean_difference = mean_per_error * error.detach()
    log_ratio = (model_output[:, channels:].to(dtype) + 1) / 2 * log_variance_range  # log(variance of p / of q)
    log_variance = min_log_variance + log_ratio

    kl = 0.5 * (log_ratio + torch.expm1(-log_ratio) + mean_difference**2 * torch.exp(-log_variance))
    nll = _discretized_nll(x_start.to(dtype), mean_difference, log_variance)
    vb = torch.where(timesteps == 0, _mean_flat(nll), _mean_flat(kl)) / math.log(2)
    return {"loss": mse + vb, "mse": mse, "vb": vb}


def _discretized_nll(x_start: Tensor, difference: Tensor, log_variance: Tensor) -> Tensor:
    """-log P(the grey level of x_start), with x_start - mean = difference, in nats, of x_start's shape.

    A grey level is 2/255 wide; the first and the last reach to infinity (Ho et al. 2020, equation 13).
    """
    inverse_std = torch.exp(-0.5 * log_variance)
    below = _normal_cdf(inverse_std * (difference - 1 / 255))
    above = _normal_cdf(inverse_std * (difference + 1 / 255))
    probability = torch.where(x_start < -0.999, above, torch.where(x_start > 0.999, 1 - below, above - below))
    return -torch.log(probability.clamp(min=1e-12))


def _normal_cdf(x: Tensor) -> Tensor:
    # ADM's and DiT's approximation: with the exact erf this would be another loss than theirs.
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _mean_flat(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)


def _table(scheduler, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(3, T): β/√(α(1-ᾱ)), the log of the smallest variance β̃, and log β - log β̃, cached on the device."""
    tables = _tables.setdefault(scheduler, {})
    if (device, dtype) not in tables:
        prediction_type = scheduler.config.prediction_type
        if prediction_type != "epsilon":
            raise ValueError(f"the scheduler's prediction_type is {prediction_type!r}; this loss needs 'epsilon'")
        betas = scheduler.betas.double()
        # Not the scheduler's own float32 alphas_cumprod: of 1 - ᾱ at small t it keeps three digits.
        alphas_cumprod = torch.cumprod(1 - betas, 0)
        variance = betas[1:] * (1 - alphas_cumprod[:-1]) / (1 - alphas_cumprod[1:])
        variance = torch.cat([variance[:1], variance])  # β̃_0 = 0 has no log: β̃_1 stands in for it
        mean_per_error = betas / ((1 - betas) * (1 - alphas_cumprod)).sqrt()
        table = torch.stack([mean_per_error, variance.log(), betas.log() - variance.log()])
        tables[device, dtype] = table.to(device=device, dtype=dtype)
    return tables[device, dtype]
