"""A pipeline that is given masks for prompts of unequal length alone, of the picture's tokens as well."""

import functools

import diffusers
import pytest
import torch
from families.learning import learn_a_batch
from rounding import assert_rounded, rounding_of_images
from tiny_models import (
    AXES,
    HEADS,
    LAYERS,
    PIPELINES,
    TOKENS,
    make_encoder,
    make_pipeline,
    make_tokenizer,
    make_wan_vae,
)
from tiny_models import flow_matching as scheduler

from onelora_diffusion import route_adapters
from onelora_diffusion.families import family_of
from onelora_diffusion.families.guided import check_empty
from onelora_diffusion.sampling import SamplerSettings, draw, image_generators
from onelora_diffusion.sampling.drawing import EncodedConditions
from onelora_diffusion.sampling.guidance import ImageRequest

EMPTY = 128000  # the token that this pipeline has for the empty prompt
LAYER = {"hidden_size": 8, "num_hidden_layers": 1}
PROMPTS, SIDE, STEPS = ["a bold Q", "", "a violet triangle, upside down"], 32, 3


def make_fibo():
    make = getattr(diffusers, "BriaFiboTransformer2DModel", None) or pytest.skip("diffusers has no BRIA-FIBO")
    pipeline = diffusers.BriaFiboPipeline(
        transformer=make(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=16,
            text_encoder_dim=8,
            pooled_projection_dim=None,
            **HEADS,
            **AXES,
        ),
        vae=make_wan_vae(),
        scheduler=scheduler(use_dynamic_shifting=True),
        text_encoder=make_encoder("SmolLM3ForCausalLM", **TOKENS | {"vocab_size": EMPTY + 1}, **LAYERS | LAYER),
        tokenizer=make_tokenizer(128),
    )
    pipeline.vae_scale_factor = 4
    return pipeline


PIPELINES["fibo"] = make_fibo


@functools.cache
def stock():
    pipeline = make_pipeline("fibo")
    return pipeline, family_of(pipeline)


@torch.no_grad()
def test_a_picture_is_that_of_the_stock_pipeline_which_pads_the_empty_prompt():
    pipeline, family = stock()
    encoded = EncodedConditions(pipeline)
    request = ImageRequest(
        condition=encoded["a bold Q"],
        empty=encoded[None],
        generator=image_generators(0, [0])[0],
        guidance_scale=3.0,
    )
    found = draw(pipeline, [request], SamplerSettings(num_inference_steps=STEPS), SIDE)
    noise = torch.randn(1, *family.latent_shape(pipeline, SIDE, SIDE), generator=image_generators(0, [0])[0])
    latents = noise.flatten(2).transpose(1, 2)
    given = {"height": SIDE, "width": SIDE, "num_inference_steps": STEPS, "guidance_scale": 3.0}
    (picture,) = pipeline("a bold Q", latents=latents, output_type="pt", **given).images
    tolerance = rounding_of_images(pipeline, STEPS) * 2 * 3
    torch.testing.assert_close((found[0] / 2 + 0.5).clamp(0, 1), picture, rtol=0, atol=tolerance)
    assert picture.std() > 0.01 and encoded[None]["encoder_hidden_states.length"].tolist() == [1]


def test_prompts_of_unequal_length_are_predicted_as_alone_and_learned():
    pipeline = make_pipeline("fibo")
    family, model = family_of(pipeline), pipeline.transformer
    latents = torch.randn(3, *family.latent_shape(pipeline, SIDE, SIDE), generator=torch.Generator().manual_seed(0))
    times, conditions = torch.tensor([100.0, 500.0, 900.0]), family.encode_conditions(pipeline, PROMPTS)
    with torch.no_grad():
        together = family.predict(model, latents, times, conditions)
        for row, prompt in enumerate(PROMPTS):
            alone, own = family.encode_conditions(pipeline, [prompt]), slice(row, row + 1)
            assert_rounded(together[own], family.predict(model, latents[own], times[own], alone), model)
    two = family.encode_conditions(pipeline, PROMPTS[::2])
    noisy, times = learn_a_batch(pipeline, latents[:2], two)
    with torch.no_grad():
        adapted = family.predict(model, noisy, times, two)
        with route_adapters(model, ["default", None]):
            routed = family.predict(model, noisy, times, two)
        with route_adapters(model, [None, None]):
            base = family.predict(model, noisy, times, two)
    assert_rounded(routed[:1], adapted[:1], model)
    assert_rounded(routed[1:], base[1:], model)


def test_an_empty_prompt_that_is_encoded_in_another_way_is_refused():
    recorder = stock()[1].recorder
    own = torch.ones(1, 2)
    check_empty(recorder, {"a": own}, {"a": own})
    with pytest.raises(ValueError, match="BriaFiboPipeline encodes the empty prompt in another way"):
        check_empty(recorder, {"a": own}, {"a": 2 * own})
