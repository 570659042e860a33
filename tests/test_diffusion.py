"""The training loss against Gaussians written out by hand and against DiT's own code."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from rounding import assert_rounded, rounding
from torch.distributions import Normal, kl_divergence

from onelora_diffusion.diffusion import training_losses

SCHEDULER = DDIMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
TIMESTEPS = torch.tensor([0, 1, 20, 250, 700, 999])


def wave(*shape, frequency):
    """Numbers in [-1, 1] that any code can make again."""
    return torch.sin(frequency * torch.arange(math.prod(shape), dtype=torch.float64)).reshape(shape).float()


def example():
    x_start = 1.2 * wave(6, 4, 4, 4, frequency=0.37)
    noise = 1.4 * wave(6, 4, 4, 4, frequency=1.91)
    predicted = noise + 0.3 * wave(6, 4, 4, 4, frequency=2.77)
    variance = wave(6, 4, 4, 4, frequency=0.83)
    return torch.cat([predicted, variance], dim=1), x_start, noise


@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler])
def test_equals_dits_own_code(scheduler_class):
    # facebookresearch/DiT on `example()`: create_diffusion(timestep_respacing="").training_losses(
    #     lambda x_t, t: model_output, x_start, TIMESTEPS, noise=noise), float32 on a CPU.
    vb = [1.220069, 0.0939266, 0.003689945, 0.0003380683, 0.0004851276, 0.0006377784]
    mse = [0.0447146, 0.04446258, 0.0462579, 0.04326124, 0.04688846, 0.04332155]
    loss = [1.264784, 0.1383892, 0.04994784, 0.04359931, 0.04737358, 0.04395933]
    losses = training_losses(*example(), TIMESTEPS, scheduler_class(beta_schedule="linear"))
    # Means of 256 terms; in vb's, logarithms of variances, of 11 at most, cancel: the mean is off by 1 / √256 of that.
    cancels = 11 * rounding(terms=1) / 256**0.5
    for name, expected in {"vb": vb, "mse": mse, "loss": loss}.items():
        torch.testing.assert_close(losses[name], torch.tensor(expected), rtol=rounding(terms=256), atol=cancels)


def posteriors(model_output, x_start, noise, t):
    """q(x_{t-1} | x_t, x_0) by Bayes' rule, and p(x_{t-1} | x_t) from the predicted noise; all float64."""
    betas = SCHEDULER.betas.double()
    alphas_cumprod = torch.cumprod(1 - betas, 0)
    alpha_bar, before = alphas_cumprod[t], alphas_cumprod[t - 1] if t > 0 else torch.tensor(1.0)
    x_t = alpha_bar.sqrt() * x_start + (1 - alpha_bar).sqrt() * noise

    def bayes(x_0):
        # prior N(√ᾱ_{t-1} x_0, 1 - ᾱ_{t-1}) times likelihood N(x_t; √α_t x_{t-1}, β_t): precisions add
        precision = 1 / (1 - before) + (1 - betas[t]) / betas[t]
        mean = (before.sqrt() * x_0 / (1 - before) + (1 - betas[t]).sqrt() * x_t / betas[t]) / precision
        return mean, 1 / precision

    predicted, fraction = model_output[:4], (model_output[4:] + 1) / 2
    predicted_x_0 = (x_t - (1 - alpha_bar).sqrt() * predicted) / alpha_bar.sqrt()
    if t == 0:
        smallest = betas[1] * (1 - alphas_cumprod[0]) / (1 - alphas_cumprod[1])
        return x_start, Normal(predicted_x_0, (betas[0] ** fraction * smallest ** (1 - fraction)).sqrt())
    q_mean, smallest = bayes(x_start)
    variance = betas[t] ** fraction * smallest ** (1 - fraction)
    return Normal(q_mean, smallest.sqrt()), Normal(bayes(predicted_x_0)[0], variance.sqrt())


@pytest.mark.parametrize("index", range(1, 6))
def test_vb_is_the_kl_divergence_of_the_posteriors(index):
    example64 = [tensor.double() for tensor in example()]
    vb = training_losses(*example64, TIMESTEPS, SCHEDULER)["vb"][index]
    q, p = posteriors(*(tensor[index] for tensor in example64), int(TIMESTEPS[index]))
    torch.testing.assert_close(vb, kl_divergence(q, p).mean() / math.log(2), rtol=1e-9, atol=0)


def test_first_step_is_the_likelihood_of_the_grey_level():
    example64 = [tensor.double() for tensor in example()]
    vb = training_losses(*example64, TIMESTEPS, SCHEDULER)["vb"][0]
    x_start, p = posteriors(*(tensor[0] for tensor in example64), 0)
    above = torch.where(x_start > 0.999, 1, p.cdf(x_start + 1 / 255))
    below = torch.where(x_start < -0.999, 0, p.cdf(x_start - 1 / 255))
    bits = -torch.log2((above - below).clamp(min=1e-12)).mean()
    # The loss approximates the normal distribution function to 3e-4, as ADM does.
    torch.testing.assert_close(vb, bits, rtol=2e-3, atol=0)


def test_a_perfect_model_loses_nothing():
    _, x_start, noise = example()
    losses = training_losses(torch.cat([noise, -torch.ones_like(noise)], 1), x_start, noise, TIMESTEPS, SCHEDULER)
    assert torch.equal(losses["mse"], torch.zeros(6))
    assert torch.equal(losses["vb"][1:], torch.zeros(5))  # the smallest variance is the posterior's own


def test_each_half_learns_from_its_own_term():
    model_output, x_start, noise = example()
    model_output.requires_grad_()
    losses = training_losses(model_output, x_start, noise, TIMESTEPS, SCHEDULER)
    by_vb = torch.autograd.grad(losses["vb"].sum(), model_output, retain_graph=True)[0]
    by_mse = torch.autograd.grad(losses["mse"].sum(), model_output)[0]
    assert torch.equal(by_vb[:, :4], torch.zeros_like(noise)) and by_vb[:, 4:].abs().min() > 0
    assert_rounded(by_mse[:, :4], 2 * (model_output[:, :4] - noise).detach() / 64, terms=3)
    assert torch.equal(by_mse[:, 4:], torch.zeros_like(noise))


def test_without_a_variance_half_the_loss_is_the_mean_squared_error():
    model_output, x_start, noise = example()
    losses = training_losses(model_output[:, :4], x_start, noise, TIMESTEPS, SCHEDULER)
    assert losses.keys() == {"loss", "mse"}
    assert torch.equal(losses["loss"], losses["mse"])
    assert_rounded(losses["mse"], (model_output[:, :4] - noise).square().mean((1, 2, 3)), terms=256)


def test_computes_in_float32_under_autocast():
    model_output, x_start, noise = example()
    model_output = model_output.bfloat16()
    expected = training_losses(model_output.float(), x_start, noise, TIMESTEPS, SCHEDULER)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = training_losses(model_output, x_start, noise, TIMESTEPS, SCHEDULER)
    assert all(losses[name].dtype == torch.float32 for name in losses)
    assert all(torch.equal(losses[name], expected[name]) for name in losses)


def test_refuses_what_it_cannot_score():
    model_output, x_start, noise = example()
    with pytest.raises(ValueError, match="6 channels; latents of 4 channels need 4 .* or 8"):
        training_losses(model_output[:, :6], x_start, noise, TIMESTEPS, SCHEDULER)
    with pytest.raises(ValueError, match="'v_prediction'"):
        training_losses(model_output, x_start, noise, TIMESTEPS, DDIMScheduler(prediction_type="v_prediction"))
