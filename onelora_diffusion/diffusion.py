"""Diffusion training: the noise schedule, the prediction target and the loss."""

import math
from collections.abc import Callable, Mapping
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

Prediction = Literal["epsilon", "v_prediction", "flow", "edm"]

# scheduler -> {(table, device, dtype): tensor}, so that a training step does not compute or copy tables again.
_tables: WeakKeyDictionary = WeakKeyDictionary()


def prediction_of(scheduler_config: Mapping) -> Prediction:
    """What a model with this scheduler config predicts: the noise ε, v = √ᾱ ε - √(1-ᾱ) x_0, or ε - x_0 (flow).

    Of EDM (Karras et al. 2022) it is F, of which c_skip x_t + c_out F is x_0. ValueError for anything else, such as
    x_0 itself.
    """
    # Only flow-matching schedulers have no prediction_type.
    name = scheduler_config.get("prediction_type", "flow_prediction" if "shift" in scheduler_config else None)
    if name not in ("epsilon", "v_prediction", "flow_prediction"):
        raise ValueError(
            f"the scheduler's prediction_type is {name!r}; known are 'epsilon', 'v_prediction' and 'flow_prediction'"
        )
    if name == "flow_prediction":
        return "flow"
    return "edm" if "sigma_data" in scheduler_config else name


def add_noise(x_start: Tensor, noise: Tensor, timesteps: Tensor, scheduler) -> Tensor:
    """x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε, of flow matching (1-σ_t) x_0 + σ_t ε, of EDM c_in (x_0 + σ_t ε).

    It is (batch, C, H, W).

    `timesteps` (batch,) int64 are in [0, number of training steps); larger ones are noisier. The training schedule of
    a diffusers scheduler that `prediction_of` knows is used, not the one set by `set_timesteps`.
    """
    signal, sigma = _at(noise_schedule, timesteps, scheduler, x_start)
    return signal * x_start + sigma * noise


def model_timesteps(timesteps: Tensor, scheduler) -> Tensor:
    """What a model is told of time, (batch,): the timestep, of flow matching σ_t times their number, of EDM ¼ ln σ."""
    prediction = prediction_of(scheduler.config)
    if prediction in ("epsilon", "v_prediction"):
        return timesteps
    table = device_table(noise_schedule, scheduler, timesteps.device, torch.float32)[:, timesteps]
    if prediction == "edm":
        return 0.25 * (table[1] / table[0]).log()
    return table[1] * scheduler.config.num_train_timesteps


def training_losses(
    model_output: Tensor,
    x_start: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    scheduler,
    mask: Tensor | None = None,
    target_offset: Tensor | None = None,
) -> dict[str, Tensor]:
    """The training loss of a prediction and, if the model learns it, of the variance between its two bounds.

        loss = mse + vb,    mse = mean (target - prediction)²
        vb   = KL(q(x_{t-1} | x_t, x_0) || p_θ(x_{t-1} | x_t)) in bits per dimension for t > 0,
               -log2 p_θ(x_0 | x_1) of a Gaussian discretised to 256 grey levels for t = 0

    The target is ε, the velocity √ᾱ ε - √(1-ᾱ) x_0 (Salimans & Ho 2022), of flow matching ε - x_0 (Esser et al.
    2024), or of EDM (x_0 - c_skip x_t) / c_out, whose plain mean square is the loss of Karras et al. 2022 (equation 8,
    with their weights λ = 1 / c_out²). `vb` teaches the variance only: its mean is detached from the graph (Nichol &
    Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021, equations 14 to 16, as DiT was trained).
    Without a variance half, and of flow matching and EDM, there is no `vb`, and loss = mse.

    With a mask m, every mean of e over the N latents of a sample is Σ m e / Σ m, so that samples count alike whatever
    the areas of their masks: OneTrainer's loss with "normalize masked area loss". ai-toolkit divides by the mean mask
    of the batch, and kohya's scripts and SimpleTuner by N.

    Both means are linear in x_0 and x_t, and x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε, so they differ by
    β_t / √(α_t (1-ᾱ_t)) · (ε_θ - ε), and ε_θ - ε by √ᾱ_t (v_θ - v): x_t itself is not needed, and nothing large
    cancels at small t.

    Args:
        model_output: (batch, 2C, H, W), the prediction and the position of the log variance between its bounds (-1
            lower, 1 upper); or (batch, C, H, W), the prediction alone.
        x_start: (batch, C, H, W), the clean latents.
        noise: (batch, C, H, W), the noise ε the model was shown.
        timesteps: (batch,) int64 in [0, number of training steps); larger ones are noisier.
        scheduler (SchedulerMixin): a scheduler of diffusers, which tells the prediction type. `vb` is computed in
            float64 from its float32 betas.
        mask: (batch, 1, H, W) from 0 to 1, some of it not 0 in each sample; None is 1 everywhere.
        target_offset: (batch, C, H, W) that is added to the target of `mse`; `vb` is that of the noise itself.

    Returns:
        `loss`, `mse` and `vb`, each (batch,), in float32 also under autocast (float64 for float64 tensors).

    Raises:
        ValueError: `model_output` has neither C nor 2C channels, or the scheduler predicts something else.
    """
    channels = x_start.shape[1]
    if model_output.shape[1] not in (channels, 2 * channels):
        raise ValueError(
            f"model_output has {model_output.shape[1]} channels; latents of {channels} channels need "
            f"{channels} (a prediction) or {2 * channels} (a prediction and its variance)"
        )
    dtype = torch.promote_types(x_start.dtype, torch.float32)
    target = _target(x_start.to(dtype), noise.to(dtype), timesteps, scheduler)
    error = model_output[:, :channels].to(dtype) - target
    mse = _mean_flat((error if target_offset is None else error - target_offset.to(dtype)) ** 2, mask)
    if model_output.shape[1] == channels or prediction_of(scheduler.config) in ("flow", "edm"):
        return {"loss": mse, "mse": mse}

    mean_per_error, min_log_variance, log_variance_range = _at(_variance_bounds, timesteps, scheduler, error)
    mean_difference = mean_per_error * error.detach()
    log_ratio = (model_output[:, channels:].to(dtype) + 1) / 2 * log_variance_range  # log(variance of p / of q)
    log_variance = min_log_variance + log_ratio

    kl = 0.5 * (log_ratio + torch.expm1(-log_ratio) + mean_difference**2 * torch.exp(-log_variance))
    nll = _discretized_nll(x_start.to(dtype), mean_difference, log_variance)
    vb = torch.where(timesteps == 0, _mean_flat(nll, mask), _mean_flat(kl, mask)) / math.log(2)
    return {"loss": mse + vb, "mse": mse, "vb": vb}


def _target(x_start: Tensor, noise: Tensor, timesteps: Tensor, scheduler) -> Tensor:
    return target_at(_at(noise_schedule, timesteps, scheduler, x_start), x_start, noise, scheduler.config)


def target_at(level: Tensor, x_start: Tensor, noise: Tensor, scheduler_config: Mapping) -> Tensor:
    """What a model is to predict, (batch, C, ...), where it is given `level[0]` x_0 + `level[1]` ε."""
    prediction = prediction_of(scheduler_config)
    if prediction == "epsilon":
        return noise
    if prediction == "flow":
        return noise - x_start
    signal, sigma = level
    if prediction == "v_prediction":
        return signal * noise - sigma * x_start
    # c_skip = σ_data² / (σ² + σ_data²), c_out = ± σ σ_data / √(σ² + σ_data²): plus, unless it predicts a velocity.
    data = scheduler_config["sigma_data"]
    target = sigma / data * x_start - data * signal * noise
    return -target if scheduler_config["prediction_type"] == "v_prediction" else target


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
    # This is ADM's and DiT's approximation of the erf, so that the loss equals theirs.
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _mean_flat(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return x.flatten(1).mean(1)
    return (mask * x).flatten(1).mean(1) / mask.flatten(1).mean(1)


def noise_schedule(scheduler, dtype: torch.dtype) -> Tensor:
    """(2, T), the coefficients of x_0 and ε in x_t: √ᾱ and √(1-ᾱ), for flow matching 1 - σ and σ, shifted.

    For EDM they are c_in and c_in σ, c_in = 1 / √(σ² + σ_data²), at the T largest of the scheduler's own σ.
    """
    config = scheduler.config
    if prediction_of(config) == "edm":
        from diffusers import EDMEulerScheduler  # as below

        own = ("sigma_min", "sigma_max", "sigma_data", "sigma_schedule", "num_train_timesteps", "rho")
        scheduler = EDMEulerScheduler(**{name: config[name] for name in own})
        sigma = scheduler.sigmas[: config.num_train_timesteps].flip(0).to(dtype)
        return torch.stack([torch.ones_like(sigma), sigma]) / (sigma**2 + config.sigma_data**2) ** 0.5
    if prediction_of(config) == "flow":
        from diffusers import FlowMatchEulerDiscreteScheduler  # importing the package does not import diffusers

        # If the shift depends on the image size, models are trained without a shift, as in diffusers' scripts.
        flow = FlowMatchEulerDiscreteScheduler(
            config.num_train_timesteps,
            shift=config.get("shift", config.get("flow_shift", 1.0)),
            use_dynamic_shifting=config.get("use_dynamic_shifting", False),
        )
        sigma = flow.sigmas.flip(0).to(dtype)
        return torch.stack([1 - sigma, sigma])
    alphas_cumprod = scheduler.alphas_cumprod.to(dtype)
    return torch.stack([alphas_cumprod**0.5, (1 - alphas_cumprod) ** 0.5])


def _variance_bounds(scheduler, dtype: torch.dtype) -> Tensor:
    """(3, T): the mean's difference per error, the log of the smallest variance β̃, and log β - log β̃."""
    betas = scheduler.betas.double()
    # The scheduler's float32 alphas_cumprod is not used, since 1 - ᾱ at small t would have only three digits.
    alphas_cumprod = torch.cumprod(1 - betas, 0)
    variance = betas[1:] * (1 - alphas_cumprod[:-1]) / (1 - alphas_cumprod[1:])
    variance = torch.cat([variance[:1], variance])  # log β̃_0 = log 0 is replaced by log β̃_1
    # The factor √ᾱ_t is cancelled by hand, since 1 - β_t may be 0.
    if prediction_of(scheduler.config) == "v_prediction":
        alphas_before = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
        mean_per_error = betas * (alphas_before / (1 - alphas_cumprod)).sqrt()
    else:
        mean_per_error = betas / ((1 - betas) * (1 - alphas_cumprod)).sqrt()
    return torch.stack([mean_per_error, variance.log(), betas.log() - variance.log()]).to(dtype)


def device_table(make: Callable, scheduler, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The table `make(scheduler, dtype)`, (..., T), cached on the device."""
    tables = _tables.setdefault(scheduler, {})
    if (make, device, dtype) not in tables:
        tables[make, device, dtype] = make(scheduler, dtype).to(device)
    return tables[make, device, dtype]


def _at(make: Callable, timesteps: Tensor, scheduler, latents: Tensor) -> Tensor:
    """The entries of a table at timesteps (batch,), in the type of latents, over which they broadcast: (rows, batch,
    1, ...)."""
    entries = device_table(make, scheduler, timesteps.device, latents.dtype)[:, timesteps]
    return entries.view(*entries.shape, *[1] * (latents.ndim - 1))
