"""Four published families against their stock pipelines: what the transformer is told, how pictures are decoded."""

import functools
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxPipeline
from rounding import assert_rounded
from tiny_models import NAMED, RESOLUTION, make_pipeline
from torch import nn

from onelora_diffusion.denoisers import repeated_blocks
from onelora_diffusion.diffusion import prediction_of
from onelora_diffusion.families import family_of
from onelora_diffusion.injection.layers import target_layers

LENGTH = 24  # tokens of a prompt


@pytest.fixture(params=list(NAMED))
def name(request):
    return request.param


@functools.cache
def made(name):
    pipeline = make_pipeline(name)
    family_of(pipeline)  # recorded once
    return pipeline


@pytest.fixture
def pipeline(name):
    return made(name)


def draw(pipeline, name, **changes):
    """(C, H, W) latents, and what the stock pipeline called its transformer with, and got, at each step."""
    calls, forward = [], pipeline.transformer.forward

    def recorded(*args, **kwargs):
        output = forward(*args, **kwargs)
        hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        calls.append((hidden_states, kwargs["timestep"], output[0]))
        return output

    pipeline.transformer.forward = recorded
    arguments = dict(height=RESOLUTION[name], width=RESOLUTION[name], num_inference_steps=2, output_type="latent")
    arguments |= dict(generator=torch.manual_seed(0), max_sequence_length=LENGTH)
    if name in ("pixart", "sana"):
        arguments["use_resolution_binning"] = False
    if name == "pixart":
        arguments["clean_caption"] = False
    latents = pipeline(**arguments | changes).images
    pipeline.transformer.forward = forward
    return latents, calls


def with_other_transformer(pipeline, **changes):
    config = {key: value for key, value in pipeline.transformer.config.items() if key != "_use_default_values"}
    torch.manual_seed(1)
    pipeline.register_modules(transformer=type(pipeline.transformer).from_config(config | changes))


def unpacked(name, tokens):
    size = RESOLUTION[name]
    return FluxPipeline._unpack_latents(tokens, size, size, vae_scale_factor=2) if name == "flux" else tokens


@torch.no_grad()
def test_the_transformer_is_told_what_the_stock_pipeline_tells_it(pipeline, name):
    family, prompts = family_of(pipeline), ["a bold Q", "a violet triangle, upside down"]
    encoded = family.encode_conditions(pipeline, prompts, LENGTH)
    _, calls = draw(pipeline, name, prompt=prompts, guidance_scale=3.5 if name == "flux" else 1.0)
    scale = {"flux": 1000, "sana": 1 / pipeline.transformer.config.get("timestep_scale", 1)}.get(name, 1)
    for hidden_states, timesteps, output in calls:
        found = family.predict(pipeline.transformer, unpacked(name, hidden_states), timesteps * scale, encoded)
        assert_rounded(found, unpacked(name, output), pipeline.transformer)
    assert len(calls) == 2 and calls[0][2].std() > 0.01


@torch.no_grad()
def test_a_transformer_that_is_wrapped_for_several_processes_is_called_alike(pipeline, name):
    family, encoded = family_of(pipeline), family_of(pipeline).encode_conditions(pipeline, ["a bold Q"], LENGTH)
    latents = torch.randn(1, *family.latent_shape(pipeline, 64, 64))
    found = [
        family.predict(model, latents, torch.tensor([500.0]), encoded)
        for model in (pipeline.transformer, nn.DataParallel(pipeline.transformer))
    ]
    assert torch.equal(*found)


@torch.no_grad()
def test_pictures_are_guided_from_the_empty_prompt(pipeline, name):
    family = family_of(pipeline)
    assert family.is_guided == (name != "flux")
    if not family.is_guided:
        return
    encoded = family.encode_conditions(pipeline, ["", "a bold Q"], LENGTH)
    _, calls = draw(pipeline, name, prompt="a bold Q", guidance_scale=4.0)
    for hidden_states, timesteps, output in calls:
        timesteps = timesteps / pipeline.transformer.config.get("timestep_scale", 1)
        assert_rounded(
            family.predict(pipeline.transformer, hidden_states, timesteps, encoded), output, pipeline.transformer
        )


def test_prompts_are_rows_that_do_not_depend_on_each_other(pipeline):
    family = family_of(pipeline)
    prompts = ["a bold Q", "", "7"]
    together = family.encode_conditions(pipeline, prompts, LENGTH)
    assert all(len(tensor) == 3 for tensor in together.values())
    for row, prompt in enumerate(prompts):
        for key, alone in family.encode_conditions(pipeline, [prompt], LENGTH).items():
            assert_rounded(together[key][row].float(), alone[0].float(), terms=1000)
    assert not torch.equal(*together["encoder_hidden_states"][:2])


@torch.no_grad()
def test_pictures_are_decoded_as_the_pipeline_does(pipeline, name):
    latents, _ = draw(pipeline, name, prompt="a bold Q")
    picture, _ = draw(pipeline, name, prompt="a bold Q", output_type="pt")
    found = family_of(pipeline).decode(pipeline.vae, unpacked(name, latents)) / 2 + 0.5
    assert_rounded(found.clamp(0, 1), picture, pipeline.vae)


@torch.no_grad()
def test_a_distilled_flux_is_told_the_guidance_that_it_draws_with():
    pipeline = make_pipeline("flux")
    with_other_transformer(pipeline, guidance_embeds=True)
    assert pipeline.transformer.config.guidance_embeds
    encoded = family_of(pipeline).encode_conditions(pipeline, ["a bold Q"], LENGTH)
    _, calls = draw(pipeline, "flux", prompt="a bold Q")
    for hidden_states, timesteps, output in calls:
        latents = unpacked("flux", hidden_states)
        found = family_of(pipeline).predict(pipeline.transformer, latents, timesteps * 1000, encoded)
        assert_rounded(found, unpacked("flux", output), pipeline.transformer)


TARGETS = {  # linear layers of a block, times blocks; counted by hand
    "pixart": 2 * (4 + 4 + 2),  # self- and cross-attention, the MLP
    "sd3": (2 + 4 + 4 + 2 + 2) + (2 + 4 + 2 + 2),  # the last block has no MLP, output and queries for the prompt
    "flux": (2 + 4 + 4 + 2 + 2) + (1 + 3 + 2),  # one double and one single block
    "sana": 1 * (4 + 4),  # its MLP is of convolutions
}


def test_targets_are_the_layers_of_the_blocks(pipeline, name):
    found = target_layers(pipeline.transformer, family_of(pipeline).targets)
    assert len(found) == TARGETS[name]
    blocks = repeated_blocks(pipeline.transformer)
    linears = [path for path, module in pipeline.transformer.named_modules() if isinstance(module, nn.Linear)]
    dropped = {"sd3": ["transformer_blocks.1.attn.add_q_proj"]}.get(name, [])  # its tokens are computed and not read
    assert list(found) == [path for path in linears if path.split(".")[0] in blocks and path not in dropped]


def test_what_each_predicts_is_said_by_its_scheduler(pipeline, name):
    assert prediction_of(pipeline.scheduler.config) == ("epsilon" if name == "pixart" else "flow")


def test_what_is_no_pipeline_that_denoises_is_an_error():
    with pytest.raises(
        ValueError, match="SimpleNamespace has a Linear and no scheduler: give a pipeline of diffusers"
    ):
        family_of(SimpleNamespace(transformer=nn.Linear(1, 1)))
    with pytest.raises(ValueError, match="has neither a transformer nor a unet"):
        family_of(SimpleNamespace())
