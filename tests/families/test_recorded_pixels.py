"""Recordings of pipelines without an autoencoder, or with another name of it; mixed outputs, guidance that is told."""

import functools

import pytest
import torch
from rounding import assert_rounded, rounding_of_images
from tiny_models import make_pipeline

from onelora_diffusion.denoisers import autoencoder_name, autoencoder_of, denoiser_of
from onelora_diffusion.families import family_of
from onelora_diffusion.families.coordinates import measured
from onelora_diffusion.sampling import SamplerSettings, draw, image_generators
from onelora_diffusion.sampling.drawing import EncodedConditions
from onelora_diffusion.sampling.guidance import ImageRequest

NAMES = ["deepfloyd", "prx_pixel", "kandinsky3", "lcm"]
PROMPTS = ["a bold Q", "", "a violet triangle, upside down"]


@functools.cache
def stock(name):
    pipeline = make_pipeline(name)
    return pipeline, family_of(pipeline)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_each_image_of_a_batch_is_predicted_as_alone(name):
    pipeline, family = stock(name)
    latents = torch.randn(3, *family.latent_shape(pipeline, 64, 64), generator=torch.Generator().manual_seed(0))
    times = torch.tensor([100.0, 500.0, 900.0])
    together = family.predict(denoiser_of(pipeline), latents, times, family.encode_conditions(pipeline, PROMPTS))
    assert together.std() > 0.01 and together.shape[1] == (2 if name == "deepfloyd" else 1) * latents.shape[1]
    for row, prompt in enumerate(PROMPTS):
        alone = family.encode_conditions(pipeline, [prompt])
        one = family.predict(denoiser_of(pipeline), latents[row : row + 1], times[row : row + 1], alone)
        assert_rounded(together[row : row + 1], one, denoiser_of(pipeline))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_pictures_are_those_of_the_stock_pipeline(name):
    pipeline, family = stock(name)
    encoded, steps, scale = EncodedConditions(pipeline), 3, 3.0
    request = ImageRequest(
        condition=encoded["a bold Q"],
        empty=encoded[None],
        generator=image_generators(0, [0])[0],
        guidance_scale=scale + (family.record.offset if family.is_guided else 0),
    )
    found = draw(pipeline, [request], SamplerSettings(num_inference_steps=steps), 64)
    asked = {"use_resolution_binning": False} if name == "prx_pixel" else {}
    asked |= {"clean_caption": False} if name == "deepfloyd" else {}
    generator, sizes = image_generators(0, [0])[0], {"height": 64, "width": 64}
    settings = {"num_inference_steps": steps, "guidance_scale": scale, "output_type": "pt", **sizes, **asked}
    expected = pipeline("a bold Q", generator=generator, **settings)[0]
    if name == "lcm":
        found = (found / 2 + 0.5).clamp(0, 1)
    # Without clipping, a few steps of noise prediction end far outside of -1 to 1.
    tolerance = rounding_of_images(pipeline, steps) * 2 * scale * max(1, float(expected.abs().max()))
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    assert expected.std() > 0.01


@torch.no_grad()
def test_pixels_are_their_own_latents():
    pipeline, family = stock("deepfloyd")
    assert autoencoder_name(pipeline) is None and family.pixels_of_latent(pipeline) == 1
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = family.encode_images(autoencoder_of(pipeline), images).unbind(1)
    assert torch.equal(mean, images) and not std.any()
    assert torch.equal(family.decode(autoencoder_of(pipeline), images), images)


def test_an_autoencoder_is_what_encodes_and_decodes():
    pipeline, family = stock("kandinsky3")
    assert autoencoder_of(pipeline) is pipeline.movq and family.place(64, 64).decoding["kwargs"] == {
        "force_not_quantize": True
    }


def test_an_image_is_predicted_and_the_scheduler_gets_a_velocity():
    _, family = stock("prx_pixel")
    steps = measured(family.recorder, (64, 64), 3, times=(500.0, 100.0, 10.0))
    expected = torch.tensor([2.0, 10.0, 20.0], dtype=torch.float64)
    torch.testing.assert_close(steps.of_sample, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(steps.of_output, -expected, rtol=1e-6, atol=0)
    assert family.record.steps == "image" and abs(family.record.least - 0.05) < 1e-6


def test_a_strength_of_guidance_is_told_as_an_embedding():
    pipeline, family = stock("lcm")
    assert family.record.told[0] == "timestep_cond" and not family.is_guided
    told = family._told(torch.tensor([1.0, 4.5]))
    expected = pipeline.get_guidance_scale_embedding(torch.tensor([0.0, 3.5]), embedding_dim=8)
    torch.testing.assert_close(told, expected)
