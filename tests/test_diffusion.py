"""The training loss against Gaussians written out by hand, DiT's own code and diffusers' scripts."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from rounding import assert_rounded, rounding
from torch.distributions import Normal, kl_divergence

from onelora_diffusion.diffusion import add_noise, model_timesteps, prediction_of, training_losses

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


def test_a_mask_weighs_the_squared_error_and_the_variance_term_by_its_share():
    output, x_start, noise = example()
    whole = training_losses(output, x_start, noise, TIMESTEPS, SCHEDULER)
    ones = torch.ones(6, 1, 4, 4)
    for name, values in training_losses(output, x_start, noise, TIMESTEPS, SCHEDULER, ones).items():
        assert torch.equal(values, whole[name])
    # A mask of 1 on two rows of latents and of 1/2 on one: those rows alone, the last one with half the weight.
    mask = torch.tensor([1.0, 1.0, 0.5, 0.0])[:, None].expand(6, 1, 4, 4)
    found = training_losses(output, x_start, noise, TIMESTEPS, SCHEDULER, mask)
    rows = [
        training_losses(*(each[:, :, row : row + 1] for each in (output, x_start, noise)), TIMESTEPS, SCHEDULER)
        for row in range(3)
    ]
    for name in ("loss", "mse", "vb"):
        expected = (rows[0][name] + rows[1][name] + rows[2][name] / 2) / 2.5
        torch.testing.assert_close(found[name], expected, rtol=rounding(terms=64), atol=1e-7)


def test_computes_in_float32_under_autocast():
    model_output, x_start, noise = example()
    model_output = model_output.bfloat16()
    expected = training_losses(model_output.float(), x_start, noise, TIMESTEPS, SCHEDULER)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = training_losses(model_output, x_start, noise, TIMESTEPS, SCHEDULER)
    assert all(losses[name].dtype == torch.float32 for name in losses)
    assert all(torch.equal(losses[name], expected[name]) for name in losses)


VELOCITY = DDPMScheduler(beta_schedule="linear", prediction_type="v_prediction")


def test_the_loss_of_a_velocity_is_that_of_the_noise_it_means():
    """v = √ᾱ ε - √(1-ᾱ) x_0, so ε = √ᾱ v + √(1-ᾱ) x_t: the same variance, and an error √ᾱ as large."""
    model_output, x_start, noise = (tensor.double() for tensor in example())
    alpha_bar = torch.cumprod(1 - VELOCITY.betas.double(), 0)[TIMESTEPS].view(-1, 1, 1, 1)
    x_t = alpha_bar.sqrt() * x_start + (1 - alpha_bar).sqrt() * noise
    predicted = (model_output[:, :4] - (1 - alpha_bar).sqrt() * x_t) / alpha_bar.sqrt()
    losses = training_losses(torch.cat([predicted, model_output[:, 4:]], 1), x_start, noise, TIMESTEPS, VELOCITY)
    expected = training_losses(model_output, x_start, noise, TIMESTEPS, SCHEDULER)
    # The velocity shown is of the scheduler's float32 ᾱ, of which 1 - ᾱ has three digits at the first steps.
    torch.testing.assert_close(losses["mse"], expected["mse"] / alpha_bar.flatten(), rtol=1e-3, atol=0)
    torch.testing.assert_close(losses["vb"], expected["vb"], rtol=1e-3, atol=0)


def test_the_velocity_and_its_noise_are_those_of_diffusers():
    _, x_start, noise = example()
    losses = training_losses(noise, x_start, noise, TIMESTEPS, VELOCITY)
    expected = (noise - VELOCITY.get_velocity(x_start, noise, TIMESTEPS)).square().mean((1, 2, 3))
    assert_rounded(losses["mse"], expected, terms=256)
    for scheduler in (VELOCITY, SCHEDULER):
        found = add_noise(x_start, noise, TIMESTEPS, scheduler)
        assert torch.equal(found, scheduler.add_noise(x_start, noise, TIMESTEPS))
        assert torch.equal(model_timesteps(TIMESTEPS, scheduler), TIMESTEPS)


def test_a_velocity_is_scored_where_no_signal_is_left():
    """At zero terminal SNR: v = -x_0, and the mean of p is off by nothing where v is right."""
    scheduler = DDIMScheduler(beta_schedule="linear", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    _, x_start, noise = example()
    timesteps = torch.full((6,), 999)
    right = torch.cat([-x_start, -torch.ones_like(x_start)], dim=1)
    losses = training_losses(right, x_start, noise, timesteps, scheduler)
    assert_rounded(losses["mse"], torch.zeros(6), terms=1, size=x_start.abs().max().item())
    assert losses["vb"].abs().max() < 1e-5


FLOW_SCHEDULERS = [
    FlowMatchEulerDiscreteScheduler(shift=3.0),
    FlowMatchHeunDiscreteScheduler(shift=3.0),
    DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
]


@pytest.mark.parametrize("scheduler", FLOW_SCHEDULERS, ids=lambda scheduler: type(scheduler).__name__)
def test_flow_matching_equals_diffusers_scripts(scheduler):
    # train_dreambooth_lora_{flux,sana}.py on `example()`: with noise_scheduler = FlowMatchEulerDiscreteScheduler(
    # shift=3.0) and indices = 999 - TIMESTEPS, what they name timesteps, sigmas, noisy_model_input and loss, where
    # model_pred is `predicted`; by their formulas in float64.
    position = (TIMESTEPS.double() + 1) / 1000
    sigmas = 3 * position / (1 + 2 * position)
    model_output, x_start, noise = example()
    predicted = model_output[:, :4]
    at = sigmas.view(-1, 1, 1, 1)
    assert_rounded(model_timesteps(TIMESTEPS, scheduler), sigmas * 1000, terms=4)
    assert_rounded(add_noise(x_start, noise, TIMESTEPS, scheduler), (1 - at) * x_start + at * noise, terms=4)
    expected = (predicted.double() - (noise.double() - x_start.double())).square().mean((1, 2, 3))
    losses = training_losses(predicted, x_start, noise, TIMESTEPS, scheduler)
    assert losses.keys() == {"loss", "mse"} and torch.equal(losses["loss"], losses["mse"])
    assert_rounded(losses["mse"], expected, terms=256)
    assert torch.equal(losses["mse"], training_losses(model_output, x_start, noise, TIMESTEPS, scheduler)["loss"])


def test_flow_matching_by_hand():
    """Half way, with shift 3: σ = 3 · 0.5 / (1 + 2 · 0.5) = 0.75; x = 2, ε = -2: x_t = -1, and ε - x = -4."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    x_start, timesteps = torch.full((1, 1, 1, 1), 2.0), torch.tensor([499])
    assert model_timesteps(timesteps, scheduler).item() == 750
    assert add_noise(x_start, -x_start, timesteps, scheduler).item() == -1
    assert training_losses(torch.zeros(1, 1, 1, 1), x_start, -x_start, timesteps, scheduler)["loss"].item() == 16


def test_the_noise_of_training_is_no_matter_of_the_steps_that_sampling_has_set():
    _, x_start, noise = example()
    for make in (lambda: FlowMatchEulerDiscreteScheduler(shift=3.0), DPMSolverMultistepScheduler):
        fresh, used = make(), make()
        used.set_timesteps(7)
        assert torch.equal(add_noise(x_start, noise, TIMESTEPS, used), add_noise(x_start, noise, TIMESTEPS, fresh))


def test_a_shift_by_the_size_of_the_image_is_for_sampling():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)  # FLUX.1-dev's
    assert_rounded(model_timesteps(TIMESTEPS, scheduler), TIMESTEPS.double() + 1, terms=1)


def test_what_is_predicted_is_read_from_the_scheduler():
    assert [prediction_of(scheduler.config) for scheduler in FLOW_SCHEDULERS] == ["flow"] * 3
    assert prediction_of(SCHEDULER.config) == "epsilon" and prediction_of(VELOCITY.config) == "v_prediction"


def test_refuses_what_it_cannot_score():
    model_output, x_start, noise = example()
    with pytest.raises(ValueError, match="6 channels; latents of 4 channels need 4 .* or 8"):
        training_losses(model_output[:, :6], x_start, noise, TIMESTEPS, SCHEDULER)
    with pytest.raises(ValueError, match="'sample'; known are 'epsilon', 'v_prediction' and 'flow_prediction'"):
        training_losses(model_output, x_start, noise, TIMESTEPS, DDIMScheduler(prediction_type="sample"))
