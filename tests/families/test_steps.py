"""What a pipeline's steps mean: EDM, flow matching in other coordinates, and times that are told before a shift."""

import functools
import math

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler
from families.learning import assert_routed, learn_a_batch
from rounding import rounding_of_images
from scheduled_pipelines import SCHEDULED
from tiny_models import make_pipeline

from onelora_diffusion.denoisers import denoiser_of
from onelora_diffusion.diffusion import add_noise, model_timesteps, training_losses
from onelora_diffusion.families import Recorded, family_of
from onelora_diffusion.sampling import SamplerSettings, draw, image_generators
from onelora_diffusion.sampling.drawing import EncodedConditions
from onelora_diffusion.sampling.guidance import ImageRequest
from onelora_diffusion.training.weighting import loss_weights

NAMES = [*SCHEDULED]
STEPS = {"sana_sprint": 2}
DATA = 0.5  # σ_data of EDM's default


@functools.cache
def stock(name):
    pipeline = make_pipeline(name)
    return pipeline, family_of(pipeline)


def sprint_or_cosmos2(noisy, told, picture):
    """The velocity ε − x_0 of what is (1 - t) x_0 + t ε."""
    return (noisy - picture) / told


def cosmos(noisy, told, picture):
    """F = (x_0 − c_skip (x_0 + σ ε)) / c_out, of c_in (x_0 + σ ε), told ¼ ln σ: Karras et al. 2022, table 1."""
    sigma = (4 * told).exp()
    whole = (sigma**2 + DATA**2).sqrt()
    return (picture - DATA**2 / whole**2 * noisy * whole) / (sigma * DATA / whole)


EXACT = {"cosmos": cosmos, "cosmos2": sprint_or_cosmos2, "sana_sprint": sprint_or_cosmos2}


def knowing(pipeline, monkeypatch, name, picture):
    """The denoiser answers as one that knows the picture, (1, C, h, w) as it is given it."""

    def forward(hidden_states=None, *args, timestep=None, **kwargs):
        told = timestep.double().reshape(-1, *[1] * (hidden_states.ndim - 1))
        known = picture.double().reshape(1, *hidden_states.shape[1:])
        return (EXACT[name](hidden_states.double(), told, known).float(),)

    monkeypatch.setattr(denoiser_of(pipeline), "forward", forward)


def drawn_by(pipeline, name, **settings):
    settings |= {"cosmos": {"num_frames": 1}, "sana_sprint": {"use_resolution_binning": False}}.get(name, {})
    size, generator = {"height": 64, "width": 64}, image_generators(0, [0])[0]
    steps = STEPS.get(name, 3)
    return pipeline("a bold Q", generator=generator, num_inference_steps=steps, output_type="pt", **size, **settings)[
        0
    ]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_denoiser_that_knows_a_picture_has_no_loss_and_lets_the_stock_pipeline_draw_it(name, monkeypatch):
    pipeline, family = stock(name)
    shape = family.latent_shape(pipeline, 64, 64)
    picture = torch.randn(1, *shape, generator=torch.Generator().manual_seed(2))
    prompts = family.encode_conditions(pipeline, ["a bold Q"] * 4)
    knowing(pipeline, monkeypatch, name, picture)
    scheduler = family.training_scheduler(pipeline)
    noise = torch.randn(4, *shape, generator=torch.Generator().manual_seed(3))
    pictures, timesteps = picture.expand(4, *shape), torch.tensor([10, 300, 700, 999])
    noisy = add_noise(pictures, noise, timesteps, scheduler)
    output = family.predict(denoiser_of(pipeline), noisy, model_timesteps(timesteps, scheduler), prompts)
    assert training_losses(output, pictures, noise, timesteps, scheduler)["loss"].max() < 1e-6
    drawn = drawn_by(pipeline, name, **family.record.off)
    expected = (family.decode(pipeline.vae, picture) / 2 + 0.5).clamp(0, 1)
    # The last step of both Cosmos leaves noise of 0.002.
    torch.testing.assert_close(drawn.reshape(expected.shape), expected, rtol=0, atol=0.05)
    assert expected.std() > 0.01


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_pictures_are_those_of_the_stock_pipeline(name):
    pipeline, family = stock(name)
    encoded, steps, scale = EncodedConditions(pipeline), STEPS.get(name, 3), 3.0
    request = ImageRequest(
        condition=encoded["a bold Q"],
        empty=encoded[None],
        generator=image_generators(0, [0])[0],
        guidance_scale=scale + (family.record.offset if family.is_guided else 0),
    )
    found = draw(pipeline, [request], SamplerSettings(num_inference_steps=steps), 64)
    expected = drawn_by(pipeline, name, guidance_scale=scale).reshape(found.shape)
    # A picture that Cosmos' pipelines have checked is one of 256 levels.
    tolerance = rounding_of_images(pipeline, steps) * 2 * scale + (name != "sana_sprint") / 255
    torch.testing.assert_close((found / 2 + 0.5).clamp(0, 1), expected, rtol=0, atol=tolerance)
    assert expected.std() > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_learns_and_samples_have_adapters_of_their_own(name):
    pipeline = make_pipeline(name)
    family, model = family_of(pipeline), denoiser_of(pipeline)
    shape = family.latent_shape(pipeline, 64, 64)
    latents = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    conditions = family.encode_conditions(pipeline, ["a bold Q", "a bold O"])
    noisy, times = learn_a_batch(pipeline, latents, conditions)
    assert_routed(family, model, noisy, times, conditions)


def test_a_known_schedule_of_edm_is_trained_by_its_scheduler_s_own_noise():
    pipeline = make_pipeline("sdxl")
    pipeline.scheduler = EDMDPMSolverMultistepScheduler()  # as Playground v2.5's
    scheduler = Recorded(pipeline).training_scheduler(pipeline)
    timesteps = torch.tensor([0, 500, 999])
    rho, high, low = 7.0, 80.0, 0.002
    ramp = 1 - (timesteps.double() + 1) / 1000
    sigma = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    torch.testing.assert_close(model_timesteps(timesteps, scheduler), (sigma.log() / 4).float())
    snr = DATA**2 / sigma**2
    expected = (snr.clamp(max=5) / (snr + 1)).float()
    torch.testing.assert_close(loss_weights(timesteps, scheduler, 5.0, "none"), expected)


def test_a_time_that_is_told_before_the_shift_by_size_is_told_so_in_training():
    """CogView4's scheduler shifts σ by the size of the image, and its denoiser is told the time without that."""
    pipeline, family = stock("cogview4")
    for side in (64, 128):
        config, tokens = pipeline.scheduler.config, (side // pipeline.vae_scale_factor // 2) ** 2
        shift = (tokens / config.base_image_seq_len) ** 0.5 * config.max_shift + config.base_shift
        assert math.isclose(family.place(side, side).odds, math.exp(shift), rel_tol=1e-3)
    assert family.record.steps == "flow"
