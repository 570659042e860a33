"""Pictures of prompts: each is that of its single run, by its own adapters, in every family."""

from dataclasses import replace

import pytest
import torch
from rounding import rounding_of_images
from serving.servers import draw, serving
from tiny_models import RESOLUTION, make_pipeline, randomize

from onelora_diffusion import AdapterConfig, inject_adapter, save_adapter, set_adapters, unload_adapter
from onelora_diffusion.sampling import SamplerSettings, generate_images, image_generators
from onelora_diffusion.serving.drawing import Drawing, picture_of
from onelora_diffusion.serving.request import Request

STEPS = 2


def request(prompt: str, seed: int, guidance: str = "cfg", **adapters: float) -> Request:
    scale = 5.0 - seed
    return Request(
        subject=prompt,
        adapters=tuple(adapters.items()),
        guidance=guidance,
        guidance_scale=scale,
        num_inference_steps=STEPS,
        seed=seed,
    )


REQUESTS = [
    request("a red cube", 1),
    request("a red cube", 1, food=1.0),
    request("a long story of a violet triangle", 2, birds=0.7, food=-0.5),
    request("a red cube", 1, "domain", food=1.0),
]


def adapted(name: str) -> Drawing:
    """The family's small pipeline with two adapters in it."""
    pipeline = make_pipeline(name)
    drawing = Drawing(pipeline, 50)
    for seed, adapter in enumerate(("food", "birds")):
        inject_adapter(pipeline.transformer, AdapterConfig(targets=drawing.family.targets), adapter)
        randomize(pipeline.transformer, 0.3, seed)
    return drawing


@pytest.mark.parametrize("name", ["pixart", "sd3", "flux", "sana"])
def test_each_picture_is_that_of_its_single_run_and_of_the_pipeline_with_its_adapters_set(name):
    drawing = adapted(name)
    requests = [r for r in REQUESTS if drawing.family.is_guided or r.guidance == "cfg"]
    requests = [replace(r, size=RESOLUTION[name]) for r in requests]
    mixtures = [dict(r.adapters) for r in requests]
    together = draw(drawing, requests, mixtures)
    pictures = []
    for one, mixture in zip(requests, mixtures, strict=True):
        (alone,) = draw(drawing, [one], [mixture])
        set_adapters(drawing.transformer, *zip(*(mixture or {"food": 0.0}).items(), strict=True))
        settings = SamplerSettings(num_inference_steps=STEPS, guidance_scale=one.guidance_scale, guidance=one.guidance)
        [(_, (expected,))] = generate_images(drawing.pipeline, [one.subject], one.seed, [0], settings, size=one.size)
        assert (picture_of(alone).permute(2, 0, 1).int() - expected.int()).abs().max() <= 1
        pictures.append(alone)
    torch.testing.assert_close(together, torch.stack(pictures), rtol=0, atol=1e-5)
    gaps = torch.cdist(together.flatten(1), together.flatten(1)) + torch.eye(len(together))
    assert gaps.min() > 1e-3


@torch.no_grad()
def test_a_negative_prompt_is_that_of_the_stock_pipeline():
    pipeline, text = make_pipeline("sd3"), "a green ball"
    drawing, size = Drawing(pipeline, 50), RESOLUTION["sd3"]
    asked = [replace(REQUESTS[0], size=size, negative_prompt=away) for away in (None, "", text)]
    drawn = draw(drawing, [drawing.completed(one, []) for one in asked], [{}] * 3)
    torch.testing.assert_close(drawn[0], drawn[1], rtol=0, atol=1e-5)
    generator = image_generators(asked[2].seed, [0])
    expected = pipeline(
        asked[2].subject,
        negative_prompt=text,
        guidance_scale=asked[2].guidance_scale,
        height=size,
        width=size,
        num_inference_steps=STEPS,
        generator=generator,
        output_type="pt",
    ).images[0]
    tolerance = rounding_of_images(pipeline, STEPS) * asked[2].guidance_scale
    torch.testing.assert_close((drawn[2] / 2 + 0.5).clamp(0, 1), expected, rtol=0, atol=tolerance)
    assert (drawn[2] - drawn[0]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="negative_prompt is 'a green ball'; this base is not guided from a prompt"):
        Drawing(make_pipeline("flux"), 50).completed(asked[2], [])


def test_a_server_of_prompts_draws_from_files_and_refuses_in_one_line(tmp_path):
    pipeline = make_pipeline("pixart")
    drawing = Drawing(pipeline, 50)
    inject_adapter(pipeline.transformer, AdapterConfig(targets=drawing.family.targets))
    randomize(pipeline.transformer, 0.3)
    save_adapter(
        pipeline.transformer, tmp_path / "food.safetensors", training={"prompt": "a sks dog", "trigger": "sks"}
    )
    unload_adapter(pipeline.transformer).requires_grad_(False)
    with serving(pipeline, tmp_path, drawing=drawing, max_batch=4) as batcher:
        assert batcher.library.entry("food").prompt == "a sks dog"
        asked = [replace(r, size=16) for r in REQUESTS if set(dict(r.adapters)) <= {"food"}]
        tickets = batcher.submit_all(asked)
        assert [ticket.picture.result(60).shape for ticket in tickets] == [(16, 16, 3)] * 3
        assert batcher.state()["batch_sizes"] == {"3": STEPS}
        named = batcher.submit(replace(asked[1], subject="a {trigger} dog", negative_prompt="[trigger]")).request
        assert (named.subject, named.negative_prompt) == ("a sks dog", "sks")
        wrong = {
            "has {trigger}, and no adapter here has a trigger word": replace(asked[0], subject="a {trigger} dog"),
            "this base draws a prompt": replace(REQUESTS[0], subject=3),
            "have their pipeline's own": replace(REQUESTS[0], sampler="ddim"),
            "no multiple of": replace(REQUESTS[0], size=15),
            f"{drawing.size}, the base's own, is the most": replace(REQUESTS[0], size=4097),
            "50 is the most here": replace(REQUESTS[0], num_inference_steps=51),
        }
        for said, one in wrong.items():
            with pytest.raises(ValueError, match=said):
                batcher.submit(one)
    with pytest.raises(ValueError, match="leads from the empty prompt, from which Flux is not guided"):
        Drawing(make_pipeline("flux"), 50).completed(REQUESTS[3], [])
