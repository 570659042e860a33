"""A pipeline that draws sound beside its clips: they are learned without it, and drawn with it as before."""

import functools
from types import SimpleNamespace

import clip_pipelines  # noqa: F401  which adds to the small pipelines
import pytest
import torch
from families.learning import learn_a_batch
from rounding import assert_rounded, rounding_of_images
from tiny_models import make_pipeline
from torch import nn

from onelora_diffusion import export_lora, route_adapters
from onelora_diffusion.families import family_of
from onelora_diffusion.families.noises import find_switch
from onelora_diffusion.families.record import Record
from onelora_diffusion.families.recording import _between_devices
from onelora_diffusion.sampling import SamplerSettings, image_generators
from onelora_diffusion.sampling.drawing import EncodedConditions, denoised_latents
from onelora_diffusion.sampling.guidance import ImageRequest

PROMPTS, FRAMES, SIDE, STEPS = ["a dog runs", "", "a violet triangle turns"], 5, 64, 2


@functools.cache
def stock():
    pipeline = make_pipeline("ltx2")
    return pipeline, family_of(pipeline)


def inputs(pipeline, prompts=PROMPTS, frames=FRAMES):
    family, generator = family_of(pipeline), torch.Generator().manual_seed(0)
    latents = torch.randn(len(prompts), *family.latent_shape(pipeline, SIDE, SIDE, frames), generator=generator)
    with torch.no_grad():
        return latents, family.encode_conditions(pipeline, prompts)


def drawn(pipeline, latents, **settings):
    """The clip and the sound of the stock pipeline from this noise, which it packs and scales."""
    vae = pipeline.vae
    latents = pipeline._denormalize_latents(latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
    given = {"height": SIDE, "width": SIDE, "num_frames": latents.shape[2], "num_inference_steps": STEPS}
    given |= {"generator": torch.Generator().manual_seed(0), "output_type": "pt", "return_dict": False}
    return pipeline("a dog runs", latents=latents, **given | settings)


@torch.no_grad()
def test_a_clip_is_that_of_the_stock_pipeline_whose_transformer_keeps_sound_apart():
    pipeline, family = stock()
    assert family.record.others == ["audio_hidden_states"] and family.record.switched == {"isolate_modalities": True}
    encoded, calls = EncodedConditions(pipeline), []
    request = ImageRequest(
        condition=encoded["a dog runs"],
        empty=encoded[None],
        generator=image_generators(0, [0])[0],
        guidance_scale=3.0,
    )
    shape = family.latent_shape(pipeline, SIDE, SIDE, FRAMES)
    settings = SamplerSettings(num_inference_steps=STEPS)
    found = family.decode(pipeline.vae, denoised_latents(pipeline, family, [request], settings, shape))[0]
    noise = torch.randn(1, *shape, generator=image_generators(0, [0])[0])

    def isolated(transformer, args, kwargs):
        calls.append(kwargs)
        return args, kwargs | {"isolate_modalities": True}

    with pipeline.transformer.register_forward_pre_hook(isolated, with_kwargs=True):
        clip, _ = drawn(pipeline, noise, **family.record.guided)
    tolerance = rounding_of_images(pipeline, STEPS) * 2 * 3
    torch.testing.assert_close((found / 2 + 0.5).clamp(0, 1), clip[0].transpose(0, 1), rtol=0, atol=tolerance)
    assert len(calls) == STEPS and clip.shape == (1, FRAMES, 3, SIDE, SIDE) and clip.std(1).mean() > 0.001
    with_sound, _ = drawn(pipeline, noise, **family.record.guided)
    assert (with_sound - clip).abs().max() > 100 * tolerance


def test_an_adapter_learns_clips_without_layers_of_sound_and_serves_with_it(tmp_path):
    pipeline, untouched = make_pipeline("ltx2"), make_pipeline("ltx2")
    family, model = family_of(pipeline), pipeline.transformer
    assert all("attn1" in name or "attn2" in name or ".ff." in name for name in family.targets)
    assert not any("audio" in name for name in family.targets)
    latents, conditions = inputs(pipeline, ["a dog runs", "a cat"])
    noisy, times = learn_a_batch(pipeline, latents, conditions)
    with torch.no_grad():
        adapted = family.predict(model, noisy, times, conditions)
        with route_adapters(model, ["default", None]):
            routed = family.predict(model, noisy, times, conditions)
        with route_adapters(model, [None, None]):
            base = family.predict(model, noisy, times, conditions)
    assert_rounded(routed[:1], adapted[:1], model)
    assert_rounded(routed[1:], base[1:], model)
    assert (adapted - base).abs().max() > 1e-3
    export_lora(model, tmp_path / "lora.safetensors")
    own, sound = drawn(pipeline, latents[:1], modality_scale=1.0, stg_scale=0.0)
    before, _ = drawn(untouched, latents[:1], modality_scale=1.0, stg_scale=0.0)
    untouched.load_lora_weights(tmp_path / "lora.safetensors")
    exported, exported_sound = drawn(untouched, latents[:1], modality_scale=1.0, stg_scale=0.0)
    tolerance = rounding_of_images(untouched, STEPS) * 10
    torch.testing.assert_close(exported, own, rtol=0, atol=tolerance)
    torch.testing.assert_close(exported_sound, sound, rtol=0, atol=1e-4)
    assert (before - own).abs().max() > 10 * tolerance


@torch.no_grad()
def test_each_clip_of_a_batch_and_a_picture_are_predicted_as_alone():
    pipeline, family = stock()
    for frames in (FRAMES, 1):
        latents, conditions = inputs(pipeline, frames=frames)
        times = torch.tensor([100.0, 500.0, 900.0])
        together = family.predict(pipeline.transformer, latents, times, conditions)
        for row, prompt in enumerate(PROMPTS):
            alone, own = family.encode_conditions(pipeline, [prompt]), slice(row, row + 1)
            one = family.predict(pipeline.transformer, latents[own], times[own], alone)
            assert_rounded(together[own], one, pipeline.transformer)


class Joined(nn.Module):
    """A denoiser that adds its second noise to its output, unless that is None or `switch` is on."""

    def __init__(self, needs: bool):
        super().__init__()
        self.needs = needs

    def forward(self, noise, sound, double: bool = False, switch: bool = False, return_dict: bool = True):
        if self.needs and sound is None:
            raise TypeError("sound is needed")
        return ((1 + double) * noise if sound is None or switch else noise + sound,)


class Mixed(nn.Module):
    def forward(self, noise, sound, double: bool = False):
        return ((1 + double) * (noise + sound),)


@pytest.mark.parametrize("denoiser, switched", [(Joined(True), {"switch": True}), (Joined(False), {"sound": None})])
def test_what_keeps_a_second_noise_apart_is_found_by_trying(denoiser, switched):
    recorder = recorder_of(denoiser)
    find_switch(recorder, {"noise": torch.ones(1, 2), "sound": torch.zeros(1, 3)[:, :2], "switch": False})
    assert recorder.record.switched == switched


def recorder_of(denoiser):
    return SimpleNamespace(
        denoiser=denoiser,
        record=Record(noisy="noise", others=["sound"]),
        answered=lambda call: denoiser(**call)[0],
        refusal=lambda what: ValueError(f"It cannot be recorded: {what}"),
    )


def test_a_second_noise_that_nothing_keeps_apart_is_refused():
    message = "sound is drawn at random beside noise, .* has no switch that keeps them apart, of double"
    with pytest.raises(ValueError, match=message):
        find_switch(recorder_of(Mixed()), {"noise": torch.ones(1, 2), "sound": torch.zeros(1, 2)})


def test_a_model_that_takes_part_may_be_on_another_device():
    device = torch.device("meta")
    called = _between_devices(nn.Linear(2, 2, device=device), device)
    assert called(torch.ones(1, 2)).device == device
