"""Clips of recorded pipelines: each step of the stock pipeline's, whatever the number of frames and the size."""

import functools

import pytest
import torch
from families.learning import learn_a_batch
from rounding import assert_rounded, rounding_of_images
from tiny_models import make_pipeline

from onelora_diffusion.denoisers import denoiser_of
from onelora_diffusion.families import family_of
from onelora_diffusion.sampling import SamplerSettings, image_generators
from onelora_diffusion.sampling.drawing import EncodedConditions, denoised_latents
from onelora_diffusion.sampling.guidance import ImageRequest

PROMPTS = ["a dog runs", "", "a violet triangle turns"]
DRAWN = [("wan", 5, 96, 3.0), ("wan_ti2v", 9, 64, 1.0), ("ltx", 9, 96, 3.0), ("hunyuan_video", 9, 64, 6.0)]
DRAWN += [("animatediff", 3, 96, 3.0)]  # whose autoencoder is one of images, and whose prompt has a row for each frame
NAMES = ["wan", "ltx", "hunyuan_video", "animatediff"]


@functools.cache
def stock(name):
    pipeline = make_pipeline(name)
    return pipeline, family_of(pipeline)


def inputs(family, pipeline, prompts=PROMPTS, frames=5):
    latents = torch.randn(
        len(prompts), *family.latent_shape(pipeline, 64, 64, frames), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        return latents, family.encode_conditions(pipeline, prompts)


@pytest.mark.parametrize("name, frames, width, scale", DRAWN)
@torch.no_grad()
def test_clips_are_those_of_the_stock_pipeline(name, frames, width, scale):
    pipeline, family = stock(name)
    encoded, steps = EncodedConditions(pipeline), 2
    family.frame_rate = 12.0  # which LTX tells its transformer
    request = ImageRequest(
        condition=encoded["a dog runs"],
        empty=encoded[None],
        generator=image_generators(0, [0])[0],
        guidance_scale=scale,
    )
    shape = family.latent_shape(pipeline, 64, width, frames)
    assert len(shape) == 4 and shape[1] == 1 + (frames - 1) // family.record.stride
    settings = SamplerSettings(num_inference_steps=steps)
    found = family.decode(pipeline.vae, denoised_latents(pipeline, family, [request], settings, shape))[0]

    noise, place = torch.randn(1, *shape, generator=image_generators(0, [0])[0]), family.place(64, width, frames)
    sample = torch.empty(noise.numel())
    sample[place.order] = noise.flatten()
    given = sample.reshape(-1, *noise.shape[1:]) if name != "ltx" else sample.reshape(1, -1, shape[0])
    told = {"frame_rate": 12.0} if name == "ltx" else {}
    clip = pipeline(
        "a dog runs",
        height=64,
        width=width,
        num_frames=frames,
        num_inference_steps=steps,
        latents=given,
        output_type="pt",
        guidance_scale=scale,
        **told,
    ).frames[0]
    assert clip.shape == (frames, 3, 64, width) and clip.std(0).mean() > 0.001
    tolerance = rounding_of_images(pipeline, steps) * 2 * scale
    torch.testing.assert_close((found / 2 + 0.5).clamp(0, 1), clip.transpose(0, 1), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_each_clip_of_a_batch_is_predicted_as_alone_and_encoded_back(name):
    pipeline, family = stock(name)
    latents, conditions = inputs(family, pipeline)
    times = torch.tensor([100.0, 500.0, 900.0])
    together = family.predict(denoiser_of(pipeline), latents, times, conditions)
    assert together.shape == latents.shape and together.std() > 0.01
    for row, prompt in enumerate(PROMPTS):
        alone = family.encode_conditions(pipeline, [prompt])
        one = family.predict(denoiser_of(pipeline), latents[row : row + 1], times[row : row + 1], alone)
        assert_rounded(together[row : row + 1], one, denoiser_of(pipeline))
    clips = torch.randint(0, 256, (2, 3, 5, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    moments = family.encode_images(pipeline.vae, clips)
    assert moments.shape == (2, 2, *latents.shape[1:])
    first = family.encode_images(pipeline.vae, clips[:, :, 0])  # as one image: the first latent sees no other frame
    if name == "wan":
        assert_rounded(moments[:, :, :, 0], first, pipeline.vae.encoder)
    place = family.place(64, 64, 5)
    given = clips.float() / 127.5 - 1
    if place.frames:
        of_vae = pipeline.vae.encode(given).latent_dist.mean
    else:
        of_vae = torch.stack([pipeline.vae.encode(frame).latent_dist.mean for frame in given.unbind(2)], dim=2)
    assert_rounded(moments[:, 0] * place.scale + place.shift, of_vae, pipeline.vae.encoder)


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_learns_clips(name):
    pipeline = make_pipeline(name)
    learn_a_batch(pipeline, *inputs(family_of(pipeline), pipeline, ["a dog runs", "a cat"]))


@pytest.mark.parametrize(
    "name, frames, message",
    [
        ("wan", 16, "Wan draws clips of 4 k \\+ 1 frames, not of 16: give 13 or 17"),
        ("ltx", 2, "LTX draws clips of 2 k \\+ 1 frames, not of 2: give 1 or 3"),
        ("sd15", 9, "StableDiffusion draws images, and no clips of 9 frames: leave --frames out"),
    ],
)
def test_numbers_of_frames_that_are_not_drawn_name_the_nearest(name, frames, message):
    family = stock(name)[1]
    family.check_frames(1)
    family.check_frames(17) if name != "sd15" else None
    with pytest.raises(ValueError, match=message):
        family.check_frames(frames)


def test_numbers_of_frames_that_a_model_does_not_take_name_those_that_it_does():
    family = stock("animatediff")[1]  # whose denoiser has places for 32 frames, and whose pipeline draws 16
    family.try_frames(32)
    with pytest.raises(
        ValueError, match="AnimateDiff takes no clips of 34 frames, RuntimeError: .* give 1 or 16 or 32"
    ):
        family.try_frames(34)


@pytest.mark.parametrize("name", ["ltx", "hunyuan_video15"])  # latents are cast before decoding; the time is cast
@torch.no_grad()
def test_a_base_in_bfloat16_is_recorded_as_in_float32(name):
    pipeline, exact = make_pipeline(name), stock(name)[1]
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(torch.bfloat16)
    family = family_of(pipeline)
    found, expected = (each.place(64, 64, 5) for each in (family, exact))
    for value in ("order", "packed", "unpacked"):
        assert torch.equal(getattr(found, value), getattr(expected, value)), value
    for value in ("scale", "shift"):
        torch.testing.assert_close(getattr(found, value), getattr(expected, value), rtol=2**-7, atol=2**-7)
    predicted = []
    for own, of in ((pipeline, family), stock(name)):
        latents, conditions = inputs(of, own, ["a dog runs"])
        predicted.append(of.predict(denoiser_of(own), latents, torch.tensor([300.0]), conditions).float())
    assert (predicted[0] - predicted[1]).abs().max() < 0.1 * predicted[1].abs().max()


def test_a_base_that_draws_no_picture_is_refused():
    pipeline = make_pipeline("wan")

    class Clips(type(pipeline)):
        @functools.wraps(type(pipeline).__call__)
        def __call__(self, *args, num_frames, **kwargs):
            return super().__call__(*args, num_frames=max(num_frames, 5), **kwargs)

    pipeline.__class__ = Clips
    with pytest.raises(
        ValueError, match="asked for one frame it draws latents \\(4, 2, 16, 16\\), of a clip: a base that"
    ):
        family_of(pipeline)
