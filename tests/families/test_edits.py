"""Pipelines that edit reference images, against the stock pipelines that they are recorded from."""

import functools
from dataclasses import dataclass

import pytest
import torch
from edit_pipelines import EDITS, make_edit
from families.learning import learn_a_batch
from PIL import Image
from rounding import assert_rounded, rounding_of_images
from tiny_models import make_pipeline

from onelora_diffusion import route_adapters
from onelora_diffusion.denoisers import denoiser_of
from onelora_diffusion.families import choose_references, family_of
from onelora_diffusion.families.family import Edit, emptied
from onelora_diffusion.sampling import SamplerSettings, draw, image_generators
from onelora_diffusion.sampling.drawing import EncodedConditions
from onelora_diffusion.sampling.guidance import ImageRequest
from tools.stock_calls import stock_call

# Appended tokens, told guidance; two pictures as list; tokens of the prompt too, guided; one prompt a call; channels;
# pictures that say how large what is drawn is, and guidance from no picture besides
NUMBERS = dict.fromkeys(EDITS, 1) | {"flux2_klein": 2, "qwen_edit_plus": 2}
del NUMBERS["pix2pix_xl"], NUMBERS["flux2"], NUMBERS["joy_image"]  # which are in tools/try_families.py
SIDE = (64, 96)


@dataclass(frozen=True)
class Picture:
    """A reference of one colour at the left and another at the right."""

    left: tuple[int, int, int]
    right: tuple[int, int, int]
    size: tuple[int, int]

    def image(self):
        picture = Image.new("RGB", self.size, self.left)
        picture.paste(self.right, (self.size[0] // 2, 0, *self.size))
        return picture


RED, GREEN, BLUE = (230, 20, 20), (20, 200, 40), (20, 40, 230)
PICTURES = [Picture(RED, GREEN, (64, 96)), Picture(BLUE, RED, (96, 64)), Picture(GREEN, BLUE, (128, 64))]


@functools.cache
def edited(name):
    pipeline = make_edit(name)
    choose_references(pipeline, NUMBERS[name])
    return pipeline, family_of(pipeline)


def edit(name, prompt, *pictures, side=SIDE):
    return Edit(prompt, tuple(PICTURES[number] for number in pictures[: NUMBERS[name]]), side)


def edits(name, *prompts):
    return [edit(name, prompt, number, (number + 1) % 3) for number, prompt in enumerate(prompts)]


def noise_of(family, pipeline, number, seed=0):
    shape = family.latent_shape(pipeline, *SIDE)
    return torch.randn(number, *shape, generator=torch.Generator().manual_seed(seed))


def called(pipeline, family, one, **settings):
    """What the stock pipeline draws of an edit."""
    images = [picture.image() for picture in one.references]
    return pipeline(**family.recorder.arguments(one.prompt, one.side, 2, images, **settings))[0]


@pytest.mark.parametrize("name", list(NUMBERS))
@torch.no_grad()
def test_a_recording_predicts_what_the_stock_pipeline_does_in_each_step(name):
    pipeline, family = edited(name)
    (one,) = edits(name, "make it a bold Q")
    call = stock_call(pipeline, family, one, **family.record.off)
    assert call.returned[0].shape[-2:] == SIDE and len(call.steps) == 2
    place, encoded = family.place(*SIDE), family.encode_conditions(pipeline, [one])
    for output, time, sample, _ in call.steps:
        latents, expected = (values[place.order].reshape(1, *place.shape) for values in (sample, output))
        found = family.predict(denoiser_of(pipeline), latents, torch.tensor([time]), encoded)
        assert_rounded(found, expected, denoiser_of(pipeline))
    others = [
        family.encode_conditions(pipeline, [other])
        for other in (edit(name, "make it a bold Q", 1, 1), edit(name, "make it a violet triangle", 0, 1))
    ]
    for other in others:
        changed = family.predict(denoiser_of(pipeline), latents, torch.tensor([time]), other)
        assert (changed - found).abs().max() > 1e-3


@pytest.mark.parametrize("name", list(NUMBERS))
@torch.no_grad()
def test_each_edit_of_a_batch_is_predicted_as_alone(name):
    """References of two sizes in one batch, and of one size."""
    pipeline, family = edited(name)
    prompts = ["make it a bold Q", "", "a violet triangle, upside down"]
    batch = [*edits(name, *prompts), edit(name, "seven", 0, 1)]
    conditions, times = family.encode_conditions(pipeline, batch), torch.tensor([100.0, 500.0, 900.0, 300.0])
    latents = noise_of(family, pipeline, len(batch))
    together = family.predict(denoiser_of(pipeline), latents, times, conditions)
    for row, one in enumerate(batch):
        alone = family.encode_conditions(pipeline, [one])
        own = family.predict(denoiser_of(pipeline), latents[row : row + 1], times[row : row + 1], alone)
        assert_rounded(together[row : row + 1], own, denoiser_of(pipeline))


@pytest.mark.parametrize("name", ["kontext", "qwen_edit_plus", "flux2_klein", "pix2pix"])
def test_an_adapter_learns_an_edit_and_the_stock_pipeline_draws_with_it(name):
    pipeline = make_edit(name)
    choose_references(pipeline, NUMBERS[name])
    family, model = family_of(pipeline), denoiser_of(pipeline)
    batch = edits(name, "a bold Q", "a bold O")
    conditions, latents = family.encode_conditions(pipeline, batch), noise_of(family, pipeline, 2)
    noisy, times = learn_a_batch(pipeline, latents, conditions)
    with torch.no_grad():
        adapted = family.predict(model, noisy, times, conditions)
        with route_adapters(model, [None, None]):
            base = family.predict(model, noisy, times, conditions)
        with route_adapters(model, ["default", None]):
            routed = family.predict(model, noisy, times, conditions)
    assert_rounded(routed, torch.cat([adapted[:1], base[1:]]), model)
    assert (adapted - base).abs().max() > 1e-3

    square, steps, scale = edit(name, "a bold Q", 0, 1, side=(64, 64)), 2, 1.0 if name == "qwen_edit_plus" else 3.0
    encoded = EncodedConditions(pipeline)
    request = ImageRequest(
        condition=encoded[square],
        empty=encoded[emptied(square)],
        generator=image_generators(0, [0])[0],
        guidance_scale=scale,
    )
    found = draw(pipeline, [request], SamplerSettings(num_inference_steps=steps), 64)
    noise = torch.randn(1, *family.latent_shape(pipeline, 64, 64), generator=image_generators(0, [0])[0])
    place = family.place(64, 64)
    sample = torch.empty(noise.numel())
    sample[place.order] = noise.flatten()
    told = {"guidance_scale": scale} if name != "qwen_edit_plus" else family.record.off
    told |= {"image_guidance_scale": 1.0} if name == "pix2pix" else {}
    sample = sample.reshape(1, -1, noise.shape[1] * 4)  # a token has two by two latents
    if name == "pix2pix":
        sample = sample.reshape(noise.shape)
    if name == "flux2_klein":  # which packs the latents that it is given
        sample = sample.transpose(1, 2).reshape(1, -1, 16, 16)
    picture = called(pipeline, family, square, num_inference_steps=steps, latents=sample, **told)
    tolerance = rounding_of_images(pipeline, steps) * 2 * scale
    torch.testing.assert_close((found / 2 + 0.5).clamp(0, 1), picture, rtol=0, atol=tolerance)
    assert picture.std() > 0.01


def test_references_that_a_pipeline_does_not_take_or_lacks_are_refused():
    pipeline = make_pipeline("flux")
    with pytest.raises(ValueError, match="FluxPipeline takes no reference images, and each prompt is given 1"):
        choose_references(pipeline, 1)
    pipeline = make_edit("qwen_edit")
    with pytest.raises(ValueError, match="QwenImageEditPipeline cannot be .* with no reference images fails"):
        family_of(pipeline)
    pipeline = make_edit("kontext")
    choose_references(pipeline, 2)
    with pytest.raises(ValueError, match="FluxKontextPipeline cannot be .* with 2 reference images fails"):
        family_of(pipeline)
    pipeline, family = edited("kontext")
    with pytest.raises(ValueError, match="FluxKontext is given 2 reference images, not 1"):
        family.encode_conditions(pipeline, [Edit("a bold Q", tuple(PICTURES[:2]), SIDE)])
    with pytest.raises(ValueError, match="FluxKontext edits reference images here, and a prompt has none"):
        family.encode_conditions(pipeline, ["a bold Q"])
    conditions = family.encode_conditions(pipeline, edits("kontext", "a bold Q"))
    with pytest.raises(ValueError, match="an edit of 64 by 96 pixels is asked for 64 by 64"):
        family.predict(denoiser_of(pipeline), torch.zeros(1, 1, 32, 32), torch.tensor([1.0]), conditions)
