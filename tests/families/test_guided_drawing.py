"""What is drawn of each family's prompts: what its stock pipeline draws, each image with its own guidance and time."""

import pytest
import torch
from rounding import assert_rounded, rounding_of_images
from tiny_models import NAMED, RESOLUTION, make_pipeline

from onelora_diffusion.families import family_of
from onelora_diffusion.families.family import joined
from onelora_diffusion.sampling import SamplerSettings, draw, image_generators
from onelora_diffusion.sampling.drawing import EncodedConditions
from onelora_diffusion.sampling.guidance import GuidedDenoiser, ImageRequest

LENGTH, STEPS = 24, 3
PROMPTS, SCALES = ["a bold Q", "a violet triangle", "7"], [1.0, 4.0, 2.5]


@pytest.fixture(params=list(NAMED))
def name(request):
    return request.param


def requests_of(pipeline):
    encoded = EncodedConditions(pipeline, LENGTH)
    return [
        ImageRequest(condition=encoded[prompt], empty=encoded[None], generator=generator, guidance_scale=scale)
        for prompt, scale, generator in zip(PROMPTS, SCALES, image_generators(0, range(3)), strict=True)
    ]


@torch.no_grad()
def test_each_image_of_a_batch_is_that_of_the_stock_pipeline_with_its_own_guidance(name):
    pipeline = make_pipeline(name)
    if name == "flux":  # a distilled one, which is told its guidance
        config = {key: value for key, value in pipeline.transformer.config.items() if key != "_use_default_values"}
        transformer = type(pipeline.transformer).from_config(config | {"guidance_embeds": True})
        pipeline.register_modules(transformer=transformer.eval())
    size, shares = RESOLUTION[name], []
    found = draw(
        pipeline, requests_of(pipeline), SamplerSettings(num_inference_steps=STEPS), size, on_step=shares.append
    )
    assert shares == [1 / STEPS] * STEPS
    arguments = {"use_resolution_binning": False} if name in ("pixart", "sana") else {}
    for number, (prompt, scale) in enumerate(zip(PROMPTS, SCALES, strict=True)):
        expected = pipeline(
            prompt,
            guidance_scale=scale,
            height=size,
            width=size,
            num_inference_steps=STEPS,
            generator=image_generators(0, [number]),
            max_sequence_length=LENGTH,
            output_type="pt",
            **arguments,
        ).images[0]
        tolerance = rounding_of_images(pipeline, STEPS) * max(1, scale)
        torch.testing.assert_close((found[number] / 2 + 0.5).clamp(0, 1), expected, rtol=0, atol=tolerance)
    assert (found[0] - found[1]).abs().mean() > 1e-2


@torch.no_grad()
def test_each_image_of_a_batch_is_denoised_at_its_own_time(name):
    pipeline = make_pipeline(name)
    requests, times = requests_of(pipeline), [100.0, 450.0, 900.0]
    family, model = family_of(pipeline), pipeline.transformer
    shape = family.latent_shape(pipeline, RESOLUTION[name], RESOLUTION[name])
    latents = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    found = GuidedDenoiser(family, model, requests, interval=(200, 600))(latents, torch.tensor(times))
    for row, (request, time) in enumerate(zip(requests, times, strict=True)):

        def predicted(condition, noisy=latents[row : row + 1], time=time):
            return family.predict(model, noisy, torch.tensor([time]), condition)

        scale = request.guidance_scale
        expected = predicted(request.condition | {"guidance": torch.tensor([scale])})
        if family.is_guided and scale > 1 and 200 <= time <= 600:
            empty, channels = predicted(request.empty), latents.shape[1]
            expected[:, :channels] = (empty + scale * (expected - empty))[:, :channels]
        assert_rounded(found[row : row + 1], expected, model, size=max(1.0, scale) * expected.abs().max().item())
    alone = GuidedDenoiser(family, model, requests, interval=(200, 600))(
        latents, torch.full((3,), 100.0)
    )  # guides none
    without = joined([request.condition for request in requests]) | {"guidance": torch.tensor(SCALES)}
    assert torch.equal(alone, family.predict(model, latents, torch.full((3,), 100.0), without))
