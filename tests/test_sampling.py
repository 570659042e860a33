"""Samplers against models whose samples are known by hand, stock diffusers and DiT's own code."""

import gc
import io
import math
import weakref
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from rounding import assert_rounded, rounding
from tiny_models import make_dit, make_dit_pipeline, randomize
from torch import nn

from benchmarks.sampled import sample_latents
from onelora_diffusion import AdapterConfig, inject_adapter
from onelora_diffusion.families.autoencoder import decode_latents
from onelora_diffusion.families.dit import DiT
from onelora_diffusion.sampling import (
    IMAGES_AT_ONCE,
    SamplerSettings,
    adapters_merged,
    as_uint8,
    drawing,
    generate_images,
    image_generators,
    progress_bar,
    schedulers,
)
from onelora_diffusion.sampling.guidance import ImageRequest
from onelora_diffusion.sampling.schedulers import dynamic_shift, fitting_samplers
from onelora_diffusion.sampling.trajectory import RunningBatch

SCHEDULER = DDIMScheduler(beta_schedule="linear", clip_sample=False)
FLOW = FlowMatchEulerDiscreteScheduler(shift=3.0)
NOISE_SAMPLERS, FLOW_SAMPLERS = (fitting_samplers(scheduler.config) for scheduler in (SCHEDULER, FLOW))
ALPHAS_CUMPROD = torch.cumprod(1 - SCHEDULER.betas.double(), 0)
MEANS = torch.tensor([[-1.5, 0.5, 2.0, 3.0], [1.0, -2.0, 0.25, -0.5], [0.5, 0.1, -0.4, 1.0]])  # null last
NULL_LABEL, STEPS = 2, 20


class Analytic(nn.Module):
    """A transformer whose noise is `predict(x, timestep, labels)`; it remembers the labels it was given."""

    def __init__(self, predict, out_channels=8):
        super().__init__()
        self.config = SimpleNamespace(in_channels=4, out_channels=out_channels, sample_size=4, patch_size=2)
        self.predict, self.labels = predict, []
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x, timestep, class_labels):
        self.labels.append(class_labels.tolist())
        return SimpleNamespace(sample=self.predict(x, timestep, class_labels))


def point_noise(x, timestep, labels):
    """ε of a distribution with all its mass on MEANS[label]: every sampler must end there."""
    alpha_bar = ALPHAS_CUMPROD[timestep].view(-1, 1, 1, 1)
    noise = (x - alpha_bar.sqrt() * MEANS[labels][:, :, None, None]) / (1 - alpha_bar).sqrt()
    return torch.cat([noise, torch.zeros_like(x)], dim=1).float()


def point_flow(x, timestep, labels):
    """ε - x_0 of the same distribution; x_t = (1 - σ) x_0 + σ ε."""
    flow = (x - MEANS[labels][:, :, None, None]) / (timestep / 1000).view(-1, 1, 1, 1)
    return torch.cat([flow, torch.zeros_like(x)], dim=1).float()


# What the model predicts, and a sampler of it.
SAMPLERS = [*((point_noise, sampler) for sampler in NOISE_SAMPLERS), *((point_flow, s) for s in FLOW_SAMPLERS)]


def scheduler_of(predict):
    return FLOW if predict is point_flow else SCHEDULER


def sample_points(predict, sampler, **settings):
    labels = torch.tensor([0, 1, 0])
    generators = image_generators(0, range(3))
    settings = SamplerSettings(sampler=sampler, num_inference_steps=STEPS, **settings)
    config = scheduler_of(predict).config
    latents = sample_latents(Analytic(predict), config, labels, generators, settings, null_label=NULL_LABEL)
    return latents, MEANS[labels]


# A step from pure noise divides by √ᾱ what rounding left in a noise of size 4.
FROM_NOISE = rounding(terms=1) * 4 / ALPHAS_CUMPROD[-1].sqrt().item()


# diffusers' DPM-Solver tells a model of flow matching whole timesteps: 50.3 of the last step is 50.
WHOLE_STEPS = 0.02


def atol_of(predict, sampler):
    return WHOLE_STEPS if predict is point_flow and sampler == "dpm-solver++" else FROM_NOISE


def assert_flat(latents, expected, atol=FROM_NOISE):
    torch.testing.assert_close(latents, expected[:, :, None, None].expand(-1, -1, 4, 4), rtol=0, atol=atol)


@pytest.mark.parametrize("predict, sampler", SAMPLERS)
def test_samples_the_class_without_guidance(predict, sampler):
    latents, means = sample_points(predict, sampler, guidance_scale=1.0)
    assert_flat(latents, means, atol_of(predict, sampler))


@pytest.mark.parametrize("predict, sampler", SAMPLERS)
def test_guidance_extrapolates_from_the_null_class(predict, sampler):
    latents, means = sample_points(predict, sampler, guidance_scale=3.0)
    assert_flat(latents, MEANS[2] + 3 * (means - MEANS[2]), atol_of(predict, sampler))


@pytest.mark.parametrize("predict, sampler", SAMPLERS)
def test_guidance_on_three_channels_leaves_the_fourth_to_the_class(predict, sampler):
    latents, means = sample_points(predict, sampler, guidance_scale=3.0, guidance_channels=3)
    atol = atol_of(predict, sampler)
    assert_flat(latents[:, :3], (MEANS[2] + 3 * (means - MEANS[2]))[:, :3], atol)
    assert_flat(latents[:, 3:], means[:, 3:], atol)


@pytest.mark.parametrize("sampler, atol", [("ddim", 5e-3), ("ddpm", FROM_NOISE)])
def test_guidance_interval_includes_both_ends(sampler, atol):
    # The last step (timestep 0) goes to whatever it predicts, so it alone decides here. From that far away
    # diffusers' float32 schedule is good for three digits, which our ancestral sampler does not accept.
    latents, means = sample_points(point_noise, sampler, guidance_scale=3.0, guidance_interval=(1, 999))
    assert_flat(latents, means, atol)
    latents, means = sample_points(point_noise, sampler, guidance_scale=3.0, guidance_interval=(0, 0))
    assert_flat(latents, MEANS[2] + 3 * (means - MEANS[2]), atol)


@pytest.mark.parametrize("scale, labels", [(1.0, [[0, 1]]), (1.5, [[0, 1, 2, 2]])])
def test_guidance_is_one_batch_and_only_where_it_guides(scale, labels):
    model = Analytic(point_noise)
    settings, labels_asked = SamplerSettings(guidance_scale=scale, num_inference_steps=1), torch.tensor([0, 1])
    sample_latents(model, SCHEDULER.config, labels_asked, image_generators(0, [0, 1]), settings, null_label=2)
    assert model.labels == labels


@pytest.mark.parametrize("sampler, steps", [("ddim", 1000), ("dpm-solver++", 100)])
def test_deterministic_samplers_follow_the_flow_of_a_gaussian(sampler, steps):
    # Data N(0, s²): the probability flow takes x_T to x_T · s / √(ᾱ_T s² + 1 - ᾱ_T).
    s = 0.5

    def noise(x, timestep, labels):
        alpha_bar = ALPHAS_CUMPROD[timestep].view(-1, 1, 1, 1)
        return ((1 - alpha_bar).sqrt() / (alpha_bar * s**2 + 1 - alpha_bar) * x).float()

    generators = image_generators(0, range(2))
    labels = torch.zeros(2, dtype=torch.long)
    settings = SamplerSettings(sampler=sampler, num_inference_steps=steps, guidance_scale=1.0)
    latents = sample_latents(Analytic(noise, 4), SCHEDULER.config, labels, generators, settings, null_label=0)
    first = torch.stack([torch.randn(4, 4, 4, generator=generator) for generator in image_generators(0, range(2))])
    expected = first * s / math.sqrt(ALPHAS_CUMPROD[-1] * s**2 + 1 - ALPHAS_CUMPROD[-1])
    torch.testing.assert_close(latents, expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("sampler, steps", [("euler", 1000), ("heun", 50), ("dpm-solver++", 100)])
def test_flow_samplers_follow_the_flow_of_a_gaussian(sampler, steps):
    # Data N(0, s²): x_σ has the variance a = (1-σ)² s² + σ², and the flow takes ε to √a ε, at σ = 0 to s ε.
    s = 0.5

    def flow(x, timestep, labels):
        sigma = (timestep.double() / 1000).view(-1, 1, 1, 1)
        return ((sigma - (1 - sigma) * s**2) / ((1 - sigma) ** 2 * s**2 + sigma**2) * x).float()

    settings = SamplerSettings(sampler=sampler, num_inference_steps=steps, guidance_scale=1.0)
    labels = torch.zeros(2, dtype=torch.long)
    generators = image_generators(0, range(2))
    latents = sample_latents(Analytic(flow, 4), FLOW.config, labels, generators, settings, null_label=0)
    first = torch.stack([torch.randn(4, 4, 4, generator=generator) for generator in image_generators(0, range(2))])
    torch.testing.assert_close(latents, first * s, rtol=0, atol=0.01)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize("shifting", [{"shift": 3.0}, {"use_dynamic_shifting": True, "base_image_seq_len": 2}])
def test_flow_samplers_step_as_their_formulas_do(sampler, shifting):
    """x += (σ' - σ) v(x, σ); Heun's takes the mean of v at both ends, but for the last step."""
    config = FlowMatchEulerDiscreteScheduler(**shifting).config
    settings = SamplerSettings(sampler=sampler, num_inference_steps=4, guidance_scale=1.0)
    model, labels = Analytic(lambda x, timestep, labels: x * torch.cos(timestep.view(-1, 1, 1, 1) / 300)), [0]
    if sampler == "heun" and config.use_dynamic_shifting:
        with pytest.raises(ValueError, match="'heun' does not fit .* shifted by the size .*: choose euler"):
            settings.check(model, config)
        return
    latents = sample_latents(model, config, torch.tensor(labels), image_generators(0, [0]), settings, null_label=0)

    # Four tokens: μ is two steps of 0.65 / 4094 beyond 0.5, and e^μ the shift. Others shift from end to end again.
    shift = math.exp(0.5 + 2 * 0.65 / 4094) if config.use_dynamic_shifting else 3.0
    last = 0.001 if config.use_dynamic_shifting else 0.003 / 1.002
    sigmas = np.linspace(1, last, 4)
    sigmas = [*(shift * sigmas / (1 + (shift - 1) * sigmas)), 0.0]
    x = torch.randn(1, 4, 4, 4, generator=image_generators(0, [0])[0]).double()
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        slope = x * math.cos(sigma * 1000 / 300)
        if sampler == "heun" and following:
            slope = (slope + (x + (following - sigma) * slope) * math.cos(following * 1000 / 300)) / 2
        x = x + (following - sigma) * slope
    assert_rounded(latents, x, terms=64)


def test_the_shift_by_size_is_that_of_diffusers_pipelines():
    config = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).config  # 0.5 at 256 tokens, 1.15 at 4096
    assert [dynamic_shift(config, tokens) for tokens in (256, 4096, 1024)] == pytest.approx([0.5, 1.15, 0.63])


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm-solver++"])
def test_a_velocity_is_sampled_as_the_noise_it_means(sampler):
    def point_velocity(x, timestep, labels):  # v = (√ᾱ x - x_0) / √(1-ᾱ)
        alpha_bar = ALPHAS_CUMPROD[timestep].view(-1, 1, 1, 1)
        velocity = (alpha_bar.sqrt() * x - MEANS[labels][:, :, None, None]) / (1 - alpha_bar).sqrt()
        return torch.cat([velocity, torch.zeros_like(x)], dim=1).float()

    config = DDIMScheduler(beta_schedule="linear", clip_sample=False, prediction_type="v_prediction").config
    settings, labels = SamplerSettings(sampler=sampler, num_inference_steps=STEPS, guidance_scale=1.0), [0, 1]
    generators = image_generators(0, labels)
    latents = sample_latents(
        Analytic(point_velocity), config, torch.tensor(labels), generators, settings, null_label=2
    )
    assert_flat(latents, MEANS[:2])


# facebookresearch/DiT: create_diffusion(str(steps)).p_sample_loop(model, shape, noise, clip_denoised=False)
# with `learned` below as the model and the waves below in place of th.randn_like; [:, :, 1, 2] of its result.
# At 21 steps diffusers' own "linspace" spacing has one step that differs from DiT's.
ANCESTRAL = {
    21: [0.2701698, -0.3308229, -0.04497114, -0.3178297, -0.4042155, -0.2738653, -0.1803497, -0.1971078],
    250: [0.08550555, -0.1064618, 0.08101343, -0.1516808, 0.04671545, -0.07757167, -0.0826149, -0.1113719],
}


@pytest.mark.parametrize("steps", ANCESTRAL)
def test_ancestral_sampler_equals_dits_own_code(steps, monkeypatch):
    def learned(x, timestep, labels):
        sigma = 0.01 + timestep.view(-1, 1, 1, 1).float() / 1000
        return torch.cat([sigma * x + 0.1 * torch.tanh(x.flip(1)), torch.sin(3 * x)], dim=1)

    draws = iter(range(10**6))

    def wave(shape, **_):  # draws run over the images, then over the steps
        frequency = 1 + 0.618 * next(draws)
        return 1.4 * torch.sin(frequency * torch.arange(64, dtype=torch.float64)).view(shape).float()

    monkeypatch.setattr(torch, "randn", wave)
    settings = SamplerSettings(sampler="ddpm", num_inference_steps=steps, guidance_scale=1.0)
    generators, labels = image_generators(0, range(2)), torch.zeros(2, dtype=torch.long)
    latents = sample_latents(Analytic(learned), SCHEDULER.config, labels, generators, settings, null_label=0)
    # Each step rounds values of size 4, drawn noise of 1.4 among them.
    assert_rounded(latents[:, :, 1, 2].flatten(), torch.tensor(ANCESTRAL[steps]), terms=steps, size=4)


def test_a_config_of_another_scheduler_does_not_clip():
    config = DPMSolverMultistepScheduler(variance_type="learned_range").config
    for sampler in NOISE_SAMPLERS:
        labels, generators = torch.tensor([0]), image_generators(0, [0])
        settings = SamplerSettings(sampler=sampler, guidance_scale=1.0, num_inference_steps=STEPS)
        latents = sample_latents(Analytic(point_noise), config, labels, generators, settings, null_label=NULL_LABEL)
        assert_flat(latents, MEANS[labels])


def tiny_transformer(num_classes=1000):
    model = make_dit(num_classes=num_classes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)  # so that classes and steps differ visibly
    return model


def tiny_pipeline():
    pipeline = make_dit_pipeline(tiny_transformer(), levels=1)
    pipeline.register_modules(scheduler=SCHEDULER)
    return pipeline


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("sampler", ["ddim", "dpm-solver++"])
def test_equals_the_stock_pipeline(sampler, guidance_scale):
    pipeline = tiny_pipeline()
    labels, settings = [3, 999, 0], {"num_inference_steps": 5, "guidance_scale": guidance_scale}
    [(indices, images)] = generate_images(pipeline, labels, 7, [4, 5, 6], SamplerSettings(sampler=sampler, **settings))
    assert indices == [4, 5, 6] and images.shape == (3, 3, 8, 8) and images.dtype == torch.uint8

    if sampler == "dpm-solver++":
        pipeline.scheduler = DPMSolverMultistepScheduler()
    pipeline.transformer.eval()
    expected = pipeline(labels, generator=image_generators(7, [4, 5, 6]), output_type="np", **settings).images
    expected = torch.from_numpy(expected).permute(0, 3, 1, 2)
    assert images.float().std() > 5
    torch.testing.assert_close(images / 255, expected, rtol=0, atol=0.6 / 255)  # rounded to a grey level


@pytest.mark.parametrize("predict, sampler", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch(predict, sampler):
    # To rounding, not to the bit: a matrix product may round differently at another batch size, and `generate_images`
    # keeps to one.
    model = tiny_transformer()
    labels = torch.arange(7) * 100

    def sample(indices):
        generators = image_generators(3, indices)
        settings = SamplerSettings(sampler=sampler, num_inference_steps=10, guidance_scale=1.5)
        return sample_latents(model, scheduler_of(predict).config, labels[indices], generators, settings)

    together = sample(list(range(7)))
    for share in ([0], [1, 3, 5], [6, 2, 0, 4]):
        assert_rounded(sample(share), together[share], model)


@pytest.mark.parametrize("scheduler", [SCHEDULER, FLOW])
def test_images_of_all_samplers_join_a_running_batch_and_leave_it(scheduler):
    """Each has its own sampler, steps, guidance and adapter, and takes the steps that it takes alone."""
    model = randomize(inject_adapter(tiny_transformer(), AdapterConfig()), 0.3)
    pipeline = SimpleNamespace(transformer=model, scheduler=scheduler)
    adapters = [{}, {"default": 1.0}, {"default": -0.5}]

    def request(k):
        return ImageRequest(
            condition={"class_labels": torch.tensor([k])},
            empty={"class_labels": torch.tensor([1000])},
            generator=image_generators(3, [k])[0],
            guidance_scale=1.0 + k % 3,
            guidance=("cfg", "domain")[k == 4],
            adapters=adapters[k % 3],
        )

    samplers = fitting_samplers(scheduler.config)
    settings = [SamplerSettings(sampler=samplers[k % 3], num_inference_steps=3 + k % 4) for k in range(7)]

    def finish(waiting, most):
        """Latents by number, in a batch of at most so many images, which is filled at every step."""
        running, done, sizes = {}, {}, []
        with closing(RunningBatch(pipeline, DiT())) as batch:
            while waiting or running:
                while waiting and len(running) < most:
                    k = waiting.pop(0)
                    running[k] = batch.start([request(k)], settings[k], (4, 4, 4))
                batch.step(list(running.values()))
                sizes.append(len(running))
                done |= {k: running.pop(k).latents for k in list(running) if running[k].is_done}
            assert model._onelora.open_route is not None
        assert model._onelora.open_route is None
        return done, sizes

    alone, _ = finish(list(range(7)), 1)
    together, sizes = finish(list(range(7)), 3)
    assert sizes.count(3) >= 2 * len(sizes) / 3 and list(together) != list(
        alone
    )  # a later one with fewer steps is first
    for k in range(7):
        assert_rounded(together[k], alone[k], model, size=4 * alone[k].abs().max().item())
    assert min((alone[j] - alone[k]).abs().max() for k in range(7) for j in range(k)) > 0.1


def test_batches_cover_every_index_once():
    pipeline = tiny_pipeline()
    indices, labels = [9, 2, 4, 7, 5], [1, 2, 3, 4, 5]
    settings = SamplerSettings(num_inference_steps=2, guidance_scale=1.0)
    batches = list(generate_images(pipeline, labels, 0, indices, settings, batch_size=2))
    assert [batch for batch, _ in batches] == [[9, 2], [4, 7], [5]]
    [(_, together)] = generate_images(pipeline, labels, 0, indices, settings, batch_size=64)
    assert torch.equal(torch.cat([images for _, images in batches]), together)
    assert list(generate_images(pipeline, [], 0, [], settings)) == []
    with pytest.raises(ValueError, match="5 class labels for 4 images"):
        generate_images(pipeline, labels, 0, indices[:4], settings)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("guidance_scale", [1.0, 1.5])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_an_image_is_the_same_to_the_bit_in_any_company(sampler, guidance_scale, bf16):
    """Alone, in a set of 35 and in one of three shares of it: the place in a chunk and its other images differ."""
    pipeline = tiny_pipeline()
    settings = SamplerSettings(sampler=sampler, guidance_scale=guidance_scale, num_inference_steps=2)

    def images_of(indices, batch_size):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            labels = [7 * i for i in indices]
            batches = generate_images(pipeline, labels, 3, indices, settings, batch_size=batch_size)
            return {index: image for batch, images in batches for index, image in zip(batch, images, strict=True)}

    together = images_of(range(35), 64)
    assert len({image.numpy().tobytes() for image in together.values()}) == 35
    for indices, batch_size in ((range(1, 35, 3), 7), (range(34, -1, -2), 5), ([20], 1)):
        for index, image in images_of(indices, batch_size).items():
            assert torch.equal(image, together[index])


@pytest.mark.parametrize(
    "images_at_once, sizes",
    [(IMAGES_AT_ONCE, [IMAGES_AT_ONCE] * 3), (5, [5] * 5), (None, [1, IMAGES_AT_ONCE, 1])],
)
def test_how_many_images_the_networks_see(images_at_once, sizes):
    """Always as many, or as many as there are; of 1 and of 17 images."""
    pipeline, seen = tiny_pipeline(), {"transformer": [], "vae": []}
    pipeline.transformer.register_forward_pre_hook(lambda module, args: seen["transformer"].append(len(args[0])))
    pipeline.vae.decoder.register_forward_pre_hook(lambda module, args: seen["vae"].append(len(args[0])))
    for count in (1, 17):
        settings = SamplerSettings(num_inference_steps=1)
        batches = generate_images(
            pipeline, range(count), 0, range(count), settings, images_at_once=images_at_once, batch_size=3
        )
        assert sum(len(images) for _, images in batches) == count
    assert seen == {"transformer": [2 * size for size in sizes], "vae": sizes}


def test_progress_counts_images_in_parts_of_a_step():
    pipeline, parts = tiny_pipeline(), []
    settings = SamplerSettings(num_inference_steps=4)
    list(generate_images(pipeline, range(17), 0, range(17), settings, progress=parts.append))
    assert parts == [4.0] * 4 + [0.25] * 4  # 16 images, then one; padding counts for nothing
    with progress_bar(7, file=io.StringIO(), mininterval=0) as bar:  # ten times 0.7 is more than 7 by rounding
        for _ in range(10):
            bar.update(0.7)
        assert bar.n == 7
    with progress_bar(17, file=(shown := io.StringIO()), ascii=True, mininterval=0) as bar:
        bar.update(4.0)
    assert "4.0/17 images" in shown.getvalue()


def test_every_image_has_its_own_noise():
    def noise(seed, indices):
        return [torch.randn(3, generator=generator).tolist() for generator in image_generators(seed, indices)]

    assert noise(5, [17, 3]) == noise(5, [3, 17])[::-1]
    assert len({generator.initial_seed() for generator in image_generators(5, range(20_000))}) == 20_000
    assert not {tuple(row) for row in noise(0, range(50))} & {tuple(row) for row in noise(1, range(50))}


def test_the_model_keeps_its_mode_and_drops_no_labels():
    model = tiny_transformer().train()
    model.transformer_blocks[1].eval()
    modes = [module.training for module in model.modules()]
    settings = SamplerSettings(num_inference_steps=2, guidance_scale=1.0)
    labels, generators = torch.arange(20), image_generators(0, range(20))
    in_training = sample_latents(model, SCHEDULER.config, labels, generators, settings)
    assert [module.training for module in model.modules()] == modes
    generators = image_generators(0, range(20))
    assert torch.equal(sample_latents(model.eval(), SCHEDULER.config, labels, generators, settings), in_training)


@pytest.mark.parametrize("base_classes, new_classes", [(1000, 5), (5, 12)])
def test_the_null_label_is_the_adapters_null_row(base_classes, new_classes):
    model = inject_adapter(tiny_transformer(base_classes), AdapterConfig(num_classes=new_classes))

    def sample(null_label):
        labels, generators = torch.arange(4), image_generators(0, range(4))
        settings = SamplerSettings(num_inference_steps=3)
        return sample_latents(model, SCHEDULER.config, labels, generators, settings, null_label=null_label)

    assert torch.equal(sample(None), sample(new_classes))
    assert not torch.allclose(sample(None), sample(new_classes - 1), atol=1e-4)


def test_decoding_rounds_and_undoes_the_scaling():
    vae = nn.Module()
    vae.config, vae.dtype = SimpleNamespace(scaling_factor=0.5, shift_factor=0.25), torch.float32
    vae.decode = lambda latents: SimpleNamespace(sample=latents)
    image = torch.tensor([-7.0, -1, -0.999, -0.001, 0.0021, 0.5, 0.998, 1, 3])
    images = as_uint8(decode_latents(vae, ((image - 0.25) * 0.5).view(1, 1, 1, 9)))
    assert images.flatten().tolist() == [0, 0, 0, 127, 128, 191, 255, 255, 255]


@pytest.mark.parametrize(
    "settings, message",
    [({"sampler": "plms"}, "'plms'; choose from ddim"), ({"num_inference_steps": 0}, "0 inference steps"),
     ({"sampler": "euler"}, "'euler' does not fit this model, which predicts noise: choose ddim or dpm-solver"),
     ({"num_inference_steps": 1001}, "1 to 1000"),
     ({"guidance_channels": 5}, "5 channels asked for; the latents have 4"),
     ({"guidance_interval": (900, 100)}, "interval 900 to 100: give two timesteps from 0 to 999, the lower first"),
     ({"guidance_interval": (0, 1000)}, "interval 0 to 1000: give two timesteps from 0 to 999")],
)  # fmt: skip
def test_refuses_what_it_cannot_sample(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplerSettings(**settings).check(Analytic(point_noise), SCHEDULER.config)


def test_a_new_sampler_is_a_row_of_the_table(monkeypatch):
    def two_steps(config, num_inference_steps, learned_variance):
        return schedulers.ddim(config, 2, learned_variance)

    monkeypatch.setitem(schedulers.SAMPLERS, "two-steps", schedulers.Sampler(of_noise=two_steps))
    assert fitting_samplers(SCHEDULER.config)[-1] == "two-steps" and "two-steps" not in fitting_samplers(FLOW.config)
    model, labels = tiny_transformer(), torch.arange(2)
    found, expected = (
        sample_latents(
            model,
            SCHEDULER.config,
            labels,
            image_generators(0, range(2)),
            SamplerSettings(sampler=sampler, num_inference_steps=steps),
        )
        for sampler, steps in (("two-steps", 9), ("ddim", 2))
    )
    assert torch.equal(found, expected)


def test_a_model_of_flow_matching_takes_its_own_samplers():
    with pytest.raises(ValueError, match="'ddim' does not fit this model, .* flow matching: choose euler or heun or"):
        SamplerSettings(sampler="ddim").check(Analytic(point_flow), FLOW.config)
    chosen = [SamplerSettings().for_scheduler(scheduler.config).sampler for scheduler in (FLOW, SCHEDULER)]
    assert chosen == ["euler", "ddim"]
    assert SamplerSettings(sampler="heun").for_scheduler(FLOW.config).sampler == "heun"


@pytest.mark.parametrize(
    "adapter, labels, wrong",
    [(None, [0, 10], "label 11 is none of the model's 10 classes: give 0 to 9"), (3, [2, 3, 10], "label 4 is none")],
)
def test_draws_no_class_that_is_not_there(adapter, labels, wrong):
    """Neither by the table of the base (10 classes) nor by an adapter's; either's null label is allowed."""
    model = make_dit(num_classes=10)
    if adapter:
        inject_adapter(model, AdapterConfig(num_classes=adapter))

    def draw(label):
        settings = SamplerSettings(num_inference_steps=1)
        sample_latents(model, SCHEDULER.config, torch.tensor([label]), image_generators(0, [0]), settings)

    for label in labels:
        draw(label)
    for label in (int(wrong.split()[1]), 999_999, -1):
        with pytest.raises(ValueError, match=wrong if label >= 0 and label < 20 else f"label {label} is none"):
            draw(label)


def test_domain_guidance_equals_two_models():
    """ε_base(∅) + w · (ε_adapted(y) − ε_base(∅)), with the base as a second model."""
    scheduler = DDIMScheduler(clip_sample=False)
    adapted = randomize(inject_adapter(make_dit(num_classes=10), AdapterConfig(num_classes=3)))
    base, labels = make_dit(num_classes=10), torch.tensor([0, 2])
    settings = SamplerSettings(num_inference_steps=2, guidance="domain")
    latents = sample_latents(adapted, scheduler.config, labels, image_generators(0, [0, 1]), settings)

    expected = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in image_generators(0, [0, 1])])
    scheduler.set_timesteps(2)
    for t in scheduler.timesteps:
        timestep = t.expand(2)
        with torch.no_grad():
            null = base(expected, timestep, torch.tensor([10, 10])).sample[:, :4]
            own = adapted(expected, timestep, labels).sample[:, :4]
        expected = scheduler.step(null + 4.0 * (own - null), t, expected).prev_sample
    # Guidance multiplies by 4 what was rounded.
    assert_rounded(latents, expected, base, size=4 * expected.abs().max().item())


@pytest.mark.parametrize("guidance", ["cfg", "domain"])
def test_adapters_are_merged_unless_the_base_is_beside_them(guidance):
    model = randomize(inject_adapter(make_dit(), AdapterConfig(num_classes=3)))
    weight = model.transformer_blocks[0].attn1.to_q.weight
    settings = SamplerSettings(guidance=guidance, num_inference_steps=2)

    def draw():
        return sample_latents(model, SCHEDULER.config, torch.tensor([0, 2]), image_generators(0, [0, 1]), settings)

    before, base = draw(), weight.clone()
    with adapters_merged(SimpleNamespace(transformer=model), settings):
        assert torch.equal(weight, base) == (guidance == "domain")
        torch.testing.assert_close(draw(), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(weight, base) and torch.equal(draw(), before)


def test_domain_guidance_needs_an_adapter():
    with pytest.raises(ValueError, match="domain guidance leads from the base to an adapter"):
        SamplerSettings(guidance="domain").check(make_dit(), SCHEDULER.config)


def test_encoded_conditions_are_kept_for_the_last_ones_and_freed_with_their_user(monkeypatch):
    family = SimpleNamespace(
        condition=str,
        encode_conditions=lambda pipeline, conditions, length: {"rows": torch.tensor([len(conditions[0]) + length])},
    )
    monkeypatch.setattr(drawing, "family_of", lambda pipeline: family)
    encoded = drawing.EncodedConditions(SimpleNamespace(), 10)
    first = encoded["night"]
    assert first["rows"].tolist() == [15] and encoded["night"] is first
    for number in range(drawing.KEPT_CONDITIONS - 1):
        encoded[str(number)]
    assert encoded["night"] is first
    for number in range(drawing.KEPT_CONDITIONS):
        encoded[f"another {number}"]
    assert encoded["night"] is not first
    alive, is_collected = weakref.ref(encoded["night"]["rows"]), gc.isenabled()
    gc.disable()
    try:
        del encoded
        assert alive() is None  # as nothing refers to itself, a GPU's memory waits for no collection
    finally:
        if is_collected:
            gc.enable()
