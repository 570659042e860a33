"""A picture is that of its own adapters, class, guidance and noise, whatever it is drawn together with."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from serving import servers
from serving.servers import make_pipeline, write_adapters

from benchmarks.sampled import sample_latents
from onelora_diffusion import load_adapter, set_adapters
from onelora_diffusion.families.autoencoder import decode_latents
from onelora_diffusion.pipelines.base import class_names, model_index, transformer_class
from onelora_diffusion.sampling import SamplerSettings, image_generators
from onelora_diffusion.serving.drawing import Drawing
from onelora_diffusion.serving.library import AdapterEntry
from onelora_diffusion.serving.request import Request

STEPS = 5
REQUESTS = [
    Request(subject=3, seed=1, guidance_scale=3.0),
    Request(subject=4, seed=1, guidance_scale=1.0, adapters=(("plain", 1.0),)),
    Request(subject="owl", seed=2, guidance_scale=4.0, adapters=(("birds", 0.7),)),
    Request(subject="soup", seed=3, guidance_scale=2.0, adapters=(("plain", -0.5), ("food", 1.0)), guidance="domain"),
    Request(subject="wren", seed=4, guidance_scale=1.5, adapters=(("food", 0.4), ("birds", 0.6))),
    Request(subject=9, seed=5, guidance_scale=6.0, adapters=(("lora", 0.5), ("plain", 0.5))),
    Request(subject=9, seed=5, guidance_scale=6.0, adapters=(("lora", 0.5), ("plain", 0.5)), guidance="domain"),
    Request(subject=2, seed=2**40, guidance_scale=0.0, adapters=(("birds", 0.0),)),
]
LABELS = [3, 4, 2, 2, 1, 9, 9, 2]  # of their subjects, each in the class table that serves it


@pytest.fixture(scope="module")
def drawing(tmp_path_factory):
    """The small DiT with all its adapters in it."""
    pipeline = make_pipeline()
    folder = write_adapters(tmp_path_factory.mktemp("adapters"), pipeline.transformer)
    for path in sorted(folder.glob("*.safetensors")):
        load_adapter(pipeline.transformer, path, path.stem)
    return Drawing(pipeline, 50)


def prepared(sampler: str) -> list[Request]:
    pairs = zip(REQUESTS, LABELS, strict=True)
    return [replace(r, subject=label, sampler=sampler, num_inference_steps=STEPS, size=16) for r, label in pairs]


def draw(drawing, requests):
    return servers.draw(drawing, requests, [dict(request.adapters) for request in requests])


@pytest.mark.parametrize("sampler", ["ddim", "dpm-solver++", "ddpm"])
def test_each_picture_of_a_batch_is_that_of_its_single_run(drawing, sampler):
    requests = prepared(sampler)
    together = draw(drawing, requests)
    alone = torch.cat([draw(drawing, [request]) for request in requests])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    # Company that is other in all respects changes nothing either.
    torch.testing.assert_close(draw(drawing, requests[::-1]).flip(0), alone, rtol=0, atol=1e-5)
    # and no two of them are alike, which would hide a mix-up
    gaps = torch.cdist(alone.flatten(1), alone.flatten(1)) + torch.eye(len(alone))
    assert gaps.min() > 1e-2


@pytest.mark.parametrize("number", range(len(REQUESTS)))
def test_a_picture_is_that_of_the_sampler_with_its_adapters_set(drawing, number):
    request = prepared("ddim")[number]
    (ours,) = draw(drawing, [request])
    transformer, config = drawing.transformer, drawing.pipeline.scheduler.config
    names, weights = zip(*request.adapters, strict=True) if request.adapters else (["plain"], [0.0])
    set_adapters(transformer, list(names), list(weights))
    settings = SamplerSettings(
        sampler="ddim",
        num_inference_steps=STEPS,
        guidance=request.guidance,
        guidance_scale=request.guidance_scale,
    )
    labels, generators = torch.tensor([request.subject]), image_generators(request.seed, [0])
    expected = decode_latents(drawing.pipeline.vae, sample_latents(transformer, config, labels, generators, settings))
    torch.testing.assert_close(ours, expected[0], rtol=0, atol=1e-5)


def test_guidance_that_is_not_asked_for_is_what_all_adapters_were_trained_for(drawing):
    trained, plain = (AdapterEntry("", Path(), None, has_guidance=has) for has in (True, False))
    for entries, weights, scale in (
        ([], (), 4.0),
        ([trained], (0.7,), 1.0),
        ([trained, trained], (1.0, -1.0), 1.0),
        ([trained, plain], (1.0, 1.0), 4.0),
        ([trained, plain], (1.0, 0.0), 1.0),
        ([trained], (0.0,), 4.0),
    ):
        request = Request(subject=3, adapters={str(number): weight for number, weight in enumerate(weights)})
        assert drawing.completed(request, entries).guidance_scale == scale
        assert drawing.completed(replace(request, guidance_scale=2.5), entries).guidance_scale == 2.5


def test_only_guided_samples_run_twice(drawing):
    sizes = []
    hook = drawing.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    draw(drawing, prepared("ddim"))
    hook.remove()
    assert sizes == [len(REQUESTS) + 6] * STEPS  # two of the eight are not guided


def test_the_bare_base_is_drawn_without_an_adapter_in_the_model():
    pipeline = make_pipeline()
    request = Request(subject=3, sampler="ddim", num_inference_steps=STEPS, guidance_scale=3.0, seed=1, size=16)
    (ours,) = draw(Drawing(pipeline, 50), [request])
    settings = SamplerSettings(sampler="ddim", num_inference_steps=STEPS, guidance_scale=3.0)
    latents = sample_latents(
        pipeline.transformer, pipeline.scheduler.config, torch.tensor([3]), image_generators(1, [0]), settings
    )
    torch.testing.assert_close(ours, decode_latents(pipeline.vae, latents)[0], rtol=0, atol=1e-5)


def test_the_bases_classes_have_the_names_of_its_index():
    names = class_names(model_index(None))
    assert transformer_class(model_index(None)) == "DiTTransformer2DModel"
    pipeline = make_pipeline()
    drawing = Drawing(pipeline, 50, names)
    assert drawing.base_classes == {label: names[label] for label in range(10)}
    assert Drawing(pipeline, 50, {3: "three"}).base_classes[4] == "4"
