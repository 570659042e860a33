"""Clips that begin with a reference image: what the denoiser is given of it, what is learned, and what is drawn."""

import functools
from functools import partial

import numpy as np
import pytest
import torch
from rounding import assert_rounded
from tiny_models import make_pipeline

from onelora_diffusion.denoisers import denoiser_of
from onelora_diffusion.families import Edit, choose_references, draws_from_first_frame, family_of
from tools.stock_calls import Picture
from tools.try_first_frames import PROMPTS, row_of

FRAMES = 5


@functools.cache
def stock(name):
    pipeline = make_pipeline(name)
    choose_references(pipeline, 1)
    return pipeline, family_of(pipeline)


def edit_of(family, number=0, frames=FRAMES):
    side = family.recorder.square
    return Edit(PROMPTS[number], (Picture(side, turned=bool(number)),), side, frames)


def test_steps_batches_and_clips_are_those_of_the_stock_pipeline():
    row, verdict = row_of(partial(make_pipeline, "ltx_i2v"), "ltx")  # others are in tools/try_first_frames.py
    assert verdict == "work" and "| 1 of 3 frames |" in row, row


@torch.no_grad()
def test_the_first_frame_is_given_clean_at_time_zero_and_is_not_learned(monkeypatch):
    pipeline, family = stock("wan_ti2v_i2v")
    side = family.recorder.square
    shape, edit = family.latent_shape(pipeline, *side, FRAMES), edit_of(family)
    encoded, calls = family.encode_conditions(pipeline, [edit]), []
    forward = pipeline.transformer.forward
    monkeypatch.setattr(pipeline.transformer, "forward", lambda **given: calls.append(given) or forward(**given))
    latents = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    found = family.predict(pipeline.transformer, latents, torch.tensor([700.0]), encoded)
    other = latents.clone()
    other[:, :, 0] = 9.0
    assert torch.equal(found, family.predict(pipeline.transformer, other, torch.tensor([700.0]), encoded))
    clip = torch.zeros(1, 3, FRAMES, *side)
    picture = edit.references[0].image()
    clip[:, :, 0] = torch.from_numpy(np.array(picture)).movedim(-1, 0) / 127.5 - 1
    clean = family.encode_images(pipeline.vae, clip)[:, 0, :, 0]  # whose first latent sees no other frame
    assert_rounded(calls[0]["hidden_states"][:, :, 0], clean, pipeline.vae.encoder)
    assert torch.equal(calls[0]["hidden_states"][:, :, 1:], latents[:, :, 1:])
    times = calls[0]["timestep"].reshape(shape[1], -1)
    assert not times[0].any() and (times[1:] == 700).all()
    mask = family.learned(shape)
    assert mask.shape == (1, 1, *shape[1:]) and not mask[:, :, 0].any() and mask[:, :, 1:].all()
    assert not found[:, :, 0].any()
    drawn = family.completed(latents, encoded)
    assert_rounded(drawn[:, :, 0], clean, pipeline.vae.encoder)
    assert torch.equal(drawn[:, :, 1:], latents[:, :, 1:])
    beside_larger = torch.nn.functional.pad(encoded["references.clean"], (0, 7))  # as rows of a cache are
    assert torch.equal(family.completed(latents, {"references.clean": beside_larger}), drawn)


def test_a_clip_needs_its_first_frame():
    assert draws_from_first_frame(make_pipeline("ltx_i2v")) and not draws_from_first_frame(make_pipeline("wan"))
    with pytest.raises(
        ValueError, match="its call needs image, a picture .*, or are the first frames of clips of --fr"
    ):
        family_of(make_pipeline("wan_i2v"))
    pipeline, family = stock("wan_ti2v_i2v")
    with pytest.raises(
        ValueError, match="WanImageToVideo draws clips that begin with their reference image: give --f"
    ):
        family.check_frames(1)
    with pytest.raises(ValueError, match="4 k \\+ 1 frames, not of 6: give 5 or 9"):
        family.check_frames(6)
    encoded = family.encode_conditions(pipeline, [edit_of(family, frames=9)])
    with pytest.raises(ValueError, match="a clip of 9 frames is asked for 5"):
        latents = torch.zeros(1, *family.latent_shape(pipeline, *family.recorder.square, FRAMES))
        family.predict(denoiser_of(pipeline), latents, torch.tensor([1.0]), encoded)
