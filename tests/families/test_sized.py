"""Prompts that are kept for a size of image, and a second model that guides."""

import pytest
import torch
from rounding import assert_rounded
from tiny_models import make_pipeline

from onelora_diffusion import AdapterConfig, inject_adapter
from onelora_diffusion.families import Recorded, Sized, family_of
from onelora_diffusion.families.family import emptied, padded
from onelora_diffusion.families.sized import row_of, rows_in


@pytest.fixture(scope="module")
def ideogram():
    pipeline = make_pipeline("ideogram4")
    return pipeline, family_of(pipeline)


def test_rows_are_kept_without_the_zeros_at_their_ends():
    values = [torch.zeros(7, 2), torch.arange(10.0).reshape(5, 2), torch.zeros(3, 2), torch.ones(2, 2)]
    values[0][3:5] = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    rows = [row_of("x", value) for value in values]
    assert [len(row["x"][0]) for row in rows] == [2, 5, 0, 2]
    joined = {name: padded([row[name] for row in rows]) for name in rows[0]}
    assert joined["x"].shape == (4, 5, 2)
    assert all(torch.equal(found, value) for found, value in zip(rows_in("x", joined), values, strict=True))
    for value in (torch.tensor(3.0), torch.tensor([0, 1, 0])):
        assert torch.equal(rows_in("x", row_of("x", value))[0], value)


@torch.no_grad()
def test_a_prompt_is_what_the_pipeline_gives_for_its_size(ideogram):
    pipeline, family = ideogram
    asked = family.at_size("a bold Q", (32, 64))
    assert asked == Sized("a bold Q", (32, 64)) and emptied(asked) == Sized(None, (32, 64))
    calls = []
    with pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    ):
        pipeline(
            "a bold Q",
            height=32,
            width=64,
            num_inference_steps=1,
            guidance_scale=2.0,
            guidance_schedule=None,
            max_sequence_length=96,
            output_type="latent",
        )
    row = family.encode_conditions(pipeline, [asked], 96)
    for name in ("encoder_hidden_states", "position_ids", "segment_ids", "indicator"):
        assert torch.equal(rows_in(name, row)[0], calls[0][name][0]), name
    assert row["encoder_hidden_states"].shape[1] < 60  # of 96 and 128, without padding
    with pytest.raises(ValueError, match="Ideogram4 encodes prompts for a size: one for 32 by 64 pixels"):
        family.predict(pipeline.transformer, torch.zeros(1, 4, 32, 32), torch.tensor([500.0]), row)


@torch.no_grad()
def test_padding_of_prompts_changes_nothing(ideogram):
    pipeline, family = ideogram
    latents, times = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([500.0])
    found, expected = (
        family.predict(pipeline.transformer, latents, times, family.encode_conditions(pipeline, ["dog"], length))
        for length in (64, None)
    )
    assert_rounded(found, expected, pipeline.transformer)


def test_what_guides_is_another_model_without_an_adapter(ideogram):
    pipeline, family = ideogram
    assert family.is_guided and not family.guides_itself
    assert family.guidance_scale(pipeline) == 7.0  # the first of its schedule
    pipeline = make_pipeline("ideogram4")
    family, model = family_of(pipeline), pipeline.transformer.requires_grad_(False)
    latents, times = torch.randn(2, 4, 32, 32), torch.tensor([500.0, 500.0])
    conditions = family.encode_conditions(pipeline, ["", None])
    with torch.no_grad():
        before = family.predict(model, latents, times, conditions)
        guide = pipeline.unconditional_transformer(
            hidden_states=pack(latents[1:]),
            timestep=torch.tensor([0.5]),
            **{name: rows_in(f"guide.{name}", conditions)[1][None] for name in family.guide.record.prompted},
        ).sample
    assert_rounded(pack(before[1:]), -guide, model)
    inject_adapter(model, AdapterConfig(targets=family.targets))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        after = family.predict(model, latents, times, conditions)
    assert torch.equal(after[1], before[1]) and (after[0] - before[0]).abs().max() > 1e-3


def pack(latents):
    """(1, 4, 32, 32) -> (1, 256, 16), as the pipeline has them: patches of two by two, their channels last."""
    return latents.reshape(1, 4, 16, 2, 16, 2).permute(0, 2, 4, 3, 5, 1).reshape(1, 256, 16)


def test_a_record_of_both_models_is_kept(tmp_path):
    first = Recorded(make_pipeline("ideogram4"), tmp_path)
    first.keep()
    assert len(list(tmp_path.iterdir())) == 2
    second = Recorded(make_pipeline("ideogram4"), tmp_path)
    assert second.is_kept and second.guide.is_kept and str(second) == str(first)
    assert (
        second.guide.record.prompted == first.guide.record.prompted and second.record.guiding == first.record.guiding
    )
