"""A family that is recorded from its pipeline, against the stock pipeline."""

import functools
import gc
import weakref

import diffusers
import pytest
import torch
from diffusers import CogVideoXDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from families.learning import assert_routed, learn_a_batch
from rounding import assert_rounded, rounding_of_images
from tiny_models import (
    NAMED,
    UNET,
    make_clip,
    make_pipeline,
    make_tokenizer,
    make_vae,
    randomize,
)
from torch import nn

from onelora_diffusion import AdapterConfig, inject_adapter, route_adapters
from onelora_diffusion.denoisers import choose_denoiser, denoiser_of, repeated_blocks
from onelora_diffusion.families import Recorded, family_of
from onelora_diffusion.families.arguments import Arrangement, is_meta, tensors_in
from onelora_diffusion.families.kept import kept
from onelora_diffusion.families.placing import place_at
from onelora_diffusion.families.probing import line_of
from onelora_diffusion.families.recording import ASKED, Recorder, _StandIn
from onelora_diffusion.families.targets import targets_in
from onelora_diffusion.injection.layers import target_layers
from onelora_diffusion.sampling import SamplerSettings, draw, image_generators
from onelora_diffusion.sampling.drawing import EncodedConditions
from onelora_diffusion.sampling.guidance import ImageRequest

LENGTH = 24  # tokens of a prompt
DRAWN = [
    *NAMED,
    "ltx",
    "wan22",
    "wan_ti2v",
    "hidream",
]  # two denoisers; a time for each token; one size, layers before images
PROMPTS = ["a bold Q", "", "a violet triangle, upside down"]
STOCK = [
    "sd15",
    "sdxl",
    "qwen_image",
    "z_image",
    "wan",
    "krea2",
    "ernie_image",
    "ideogram4",
    "ldm",
]  # UNets; a mask; lists; frames; both; lengths; both, and another model guides; no `encode_prompt`


@functools.cache
def stock(name):
    pipeline = make_pipeline(name)
    return pipeline, family_of(pipeline)


def inputs(family, pipeline, prompts=PROMPTS, seed=0, **settings):
    generator = torch.Generator().manual_seed(seed)
    shape = family.latent_shape(pipeline, 64, 64)
    latents = torch.randn(len(prompts), *shape, generator=generator)
    times = torch.tensor([100.0, 500.0, 900.0])[: len(prompts)]
    with torch.no_grad():
        return latents, times, family.encode_conditions(pipeline, prompts, **settings)


@torch.no_grad()
def test_a_distilled_base_is_told_its_guidance():
    pipeline = make_pipeline("flux")
    config = {key: value for key, value in pipeline.transformer.config.items() if key != "_use_default_values"}
    transformer = type(pipeline.transformer).from_config(config | {"guidance_embeds": True})
    pipeline.register_modules(transformer=randomize(transformer).eval())
    family = family_of(pipeline)
    assert not family.is_guided and family.guidance_scale(pipeline) == 3.5
    latents, times, conditions = inputs(family, pipeline, max_length=LENGTH)
    scales = torch.tensor([1.0, 2.5, 4.0])
    found = family.predict(transformer, latents, times, conditions | {"guidance": scales})
    tokens = pipeline._pack_latents(latents, *latents.shape)
    expected = transformer(
        hidden_states=tokens,
        timestep=times / 1000,
        guidance=scales,
        pooled_projections=conditions["pooled_projections"],
        encoder_hidden_states=conditions["encoder_hidden_states"],
        txt_ids=torch.zeros(LENGTH, 3),
        img_ids=pipeline._prepare_latent_image_ids(
            len(latents), *(side // 2 for side in latents.shape[2:]), "cpu", torch.float32
        ),
    ).sample
    expected = pipeline._unpack_latents(expected, 64, 64, pipeline.vae_scale_factor)
    assert_rounded(found, expected, transformer)
    defaults = family.predict(transformer, latents, times, conditions)
    assert_rounded(
        defaults,
        family.predict(transformer, latents, times, conditions | {"guidance": torch.full((3,), 3.5)}),
        transformer,
    )


@pytest.mark.parametrize("name", [*STOCK, *DRAWN])
@torch.no_grad()
def test_each_image_of_a_batch_is_predicted_as_alone_at_its_own_time(name):
    pipeline, family = stock(name)
    latents, times, conditions = inputs(family, pipeline)
    together = family.predict(denoiser_of(pipeline), latents, times, conditions)
    assert together[:, : latents.shape[1]].shape == latents.shape and together.std() > 0.01  # before a variance
    for row in range(len(PROMPTS)):
        alone = family.encode_conditions(pipeline, [PROMPTS[row]])
        one = family.predict(denoiser_of(pipeline), latents[row : row + 1], times[row : row + 1], alone)
        assert_rounded(together[row : row + 1], one, denoiser_of(pipeline))


@pytest.mark.parametrize("name", [*STOCK, *DRAWN])
@torch.no_grad()
def test_pictures_are_those_of_the_stock_pipeline(name):
    pipeline, family = stock(name)
    encoded, steps = EncodedConditions(pipeline), 3
    plain = name not in ("qwen_image", "ldm")  # which guide in a way of their own, and not by default
    scale = 3.0 if plain else 1.0
    request = ImageRequest(
        condition=encoded["a bold Q"],
        empty=encoded[None],
        generator=image_generators(0, [0])[0],
        guidance_scale=scale + (1 if name in ("z_image", "krea2") else 0),
    )
    found = draw(pipeline, [request], SamplerSettings(num_inference_steps=steps), 64)
    asked = {key: value for key, value in ASKED.items() if key in family.recorder.parameters}
    asked |= dict.fromkeys(family.recorder.schedules)
    told = family.record.guided | {family.record.guide or "guidance_scale": scale} if plain else {}
    latents = image_generators(0, [0])[0]
    noise = torch.randn(1, *family.latent_shape(pipeline, 64, 64), generator=latents)
    place = family.place(64, 64)
    sample = torch.empty(noise.numel())
    sample[place.order] = noise.flatten()
    sample = sample.reshape(place_at(family.recorder, (64, 64))[1].samples[0].shape)
    picture = pipeline("a bold Q", height=64, width=64, num_inference_steps=steps, latents=sample, **asked, **told)[0]
    picture = picture[:, 0] if picture.ndim == 5 else picture
    tolerance = rounding_of_images(pipeline, steps) * 2 * scale
    torch.testing.assert_close((found / 2 + 0.5).clamp(0, 1), picture, rtol=0, atol=tolerance)
    assert picture.std() > 0.01


@pytest.mark.parametrize("name", STOCK)
def test_an_adapter_learns_and_samples_have_adapters_of_their_own(name):
    pipeline = make_pipeline(name)
    family, model = family_of(pipeline), denoiser_of(pipeline)
    latents, _, conditions = inputs(family, pipeline, ["a bold Q", "a bold O"])
    noisy, times = learn_a_batch(pipeline, latents, conditions)
    if name == "ernie_image":  # whose layers have the tokens first, and the images second
        with pytest.raises(ValueError, match="does not keep samples apart"), route_adapters(model, ["default", None]):
            family.predict(model, noisy, times, conditions)
        return
    assert_routed(family, model, noisy, times, conditions)


def test_prompts_of_unequal_length_are_predicted_length_by_length_where_there_is_no_mask():
    pipeline, family = stock("cogview4")
    prompts = ["a bold Q", "a violet triangle, upside down", "seven"]
    latents, times, conditions = inputs(family, pipeline, prompts)
    assert conditions["encoder_hidden_states.length"].tolist() == [16, 32, 16]
    with torch.no_grad():
        together = family.predict(denoiser_of(pipeline), latents, times, conditions)
        alone = [
            family.predict(denoiser_of(pipeline), latents[i : i + 1], times[i : i + 1], one)
            for i, one in enumerate(family.encode_conditions(pipeline, [prompt]) for prompt in prompts)
        ]
    assert_rounded(together, torch.cat(alone), denoiser_of(pipeline))
    model = randomize(inject_adapter(denoiser_of(pipeline), AdapterConfig(targets=family.targets)), 0.2)
    with torch.no_grad():
        adapted = family.predict(model, latents, times, conditions)
        with route_adapters(model, ["default", None, None]):
            routed = family.predict(model, latents, times, conditions)
            again = family.predict(model, latents, times, conditions)
    assert torch.equal(routed, again) and (adapted - together).abs().max() > 1e-3
    assert_rounded(routed, torch.cat([adapted[:1], together[1:]]), model)
    with pytest.raises(ValueError, match="by the lengths of its prompts"), route_adapters(model, [None] * 3):
        family.predict(model, latents, times, conditions)


def test_what_has_no_place_in_a_recording_is_refused():
    for name, scheduler in (
        ("pixart", EulerDiscreteScheduler(interpolation_type="log_linear")),  # times of other noise than it steps by
        ("sd3", DPMSolverMultistepScheduler(prediction_type="flow_prediction")),  # the noise of a diffusion
    ):
        pipeline = make_pipeline(name)
        pipeline.scheduler = scheduler
        with pytest.raises(ValueError, match=f"{type(pipeline).__name__} cannot be recorded: (given exact|what its)"):
            Recorded(pipeline)
    pipeline = make_pipeline("sd3")
    times = torch.tensor([900.0, 500.0, 100.0], dtype=torch.float64)
    assert line_of(times, times**2, torch.float32) is None
    assert line_of(times, 1 - times / 1000, torch.float32) == (-1e-3, 1.0)
    pipeline.text_encoder = pipeline.text_encoder_2 = None
    with pytest.raises(ValueError, match="StableDiffusion3Pipeline cannot be recorded: its own call for .* fails: "):
        Recorded(pipeline)
    pipeline.vae = None
    with pytest.raises(ValueError, match="StableDiffusion3Pipeline cannot be recorded: it has no vae"):
        Recorded(pipeline)
    with pytest.raises(ValueError, match="HiDreamImage draws 96 by 96 pixels when asked for a resolution of 192"):
        stock("hidream")[1].check_resolution(stock("hidream")[0], 192)
    pipeline = make_pipeline("pixart")
    pipeline.scheduler = CogVideoXDPMScheduler()
    message = (
        "its CogVideoXDPMScheduler steps by old_pred_original_sample and timestep_back, too: give its base another"
    )
    with pytest.raises(ValueError, match=message):
        Recorded(pipeline)

    class Animated(type(pipeline)):
        def __call__(self, image, prompt, height, width, num_inference_steps): ...

    pipeline.__class__ = Animated
    with pytest.raises(ValueError, match="its call needs image, a picture to draw from: pictures are named by"):
        Recorded(pipeline)
    pipeline = make_pipeline("sd3")
    pipeline.transformer_2 = denoiser_of(pipeline)
    with pytest.raises(ValueError, match="it has transformer and transformer_2, and no boundary_ratio between them"):
        Recorded(pipeline)


@pytest.mark.parametrize("name, share", [("transformer", range(249, 1000)), ("transformer_2", range(249))])
@torch.no_grad()
def test_of_two_denoisers_the_chosen_one_is_called_at_its_share_of_the_times(name, share):
    """The boundary is at half of the noise: σ = 3s / (1 + 2s) is 0.5 where s, timestep + 1 of 1000, is 0.25."""
    pipeline = make_pipeline("wan22")
    with pytest.raises(ValueError, match="WanPipeline has transformer and transformer_2: choose one, or both, by"):
        choose_denoiser(pipeline, None)
    with pytest.raises(ValueError, match="WanPipeline has no unet; it has transformer and transformer_2"):
        choose_denoiser(pipeline, "unet")
    choose_denoiser(pipeline, name)
    family, model = family_of(pipeline), getattr(pipeline, name)
    assert denoiser_of(pipeline) is family.denoiser is model and family.timestep_range(pipeline.scheduler) == share
    latents, times, conditions = inputs(family, pipeline)
    before = family.predict(model, latents, times, conditions)
    randomize(inject_adapter(model, AdapterConfig(targets=family.targets)), 0.2)
    changed = (family.predict(model, latents, times, conditions) != before).flatten(1).any(1)
    assert changed.tolist() == [bool(time >= 500) == (name == "transformer") for time in times]
    with route_adapters(model, ["default", None, "default"]):
        routed = (family.predict(model, latents, times, conditions) != before).flatten(1).any(1)
    assert routed.tolist() == [own and row != 1 for row, own in enumerate(changed.tolist())]


def test_two_denoisers_as_one_train_each_by_the_images_at_its_times(caplog):
    apart, pipeline = make_pipeline("wan22"), make_pipeline("wan22")
    choose_denoiser(apart, "transformer")
    choose_denoiser(pipeline, "both")
    family, model = family_of(pipeline), denoiser_of(pipeline).requires_grad_(False)
    assert family.timestep_range(pipeline.scheduler) == range(1000)
    latents, times, conditions = inputs(family, pipeline)
    with torch.no_grad():
        expected = family_of(apart).predict(denoiser_of(apart), latents, times, conditions)
        base = family.predict(model, latents, times, conditions)
    assert torch.equal(base, expected)
    inject_adapter(model, AdapterConfig(targets=family.targets))
    vectors = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(vectors) == 2 * len(target_layers(pipeline.transformer, family.targets))
    for rows, trained in (
        (slice(0, 1), "transformer_2."),
        (slice(1, 3), "transformer."),
        (slice(0, 3), "transformer"),
    ):
        own = {name: condition[rows] for name, condition in conditions.items()}
        family.predict(model, latents[rows], times[rows], own).square().sum().backward()
        assert {name for name, v in vectors.items() if v.grad.any()} == {n for n in vectors if n.startswith(trained)}
        for vector in vectors.values():
            vector.grad = None
    randomize(model, 0.2)
    with torch.no_grad(), route_adapters(model, ["default", None, "default"]):
        routed = (family.predict(model, latents, times, conditions) != base).flatten(1).any(1)
    assert routed.tolist() == [True, False, True] and not caplog.records  # such as that layers took no part


@pytest.mark.parametrize("name, time", [("z_image", {"t": (-1e-3, 1.0)}), ("ernie_image", {"timestep": (1.0, 0.0)})])
def test_a_pipeline_in_half_precision_is_recorded_by_the_same_numbers(name, time):
    whole, pipeline = stock(name)[1].place(64, 64), make_pipeline(name).to(dtype=torch.bfloat16)
    family = Recorded(pipeline)
    half = family.place(64, 64)
    assert family.record.times == time and family.targets == stock(name)[1].targets
    assert all(torch.equal(getattr(half, part), getattr(whole, part)) for part in ("order", "packed", "unpacked"))
    assert_rounded(half.scale.bfloat16(), whole.scale.bfloat16(), 1)


@pytest.mark.parametrize("name", ["krea2", "wan22"])
@torch.no_grad()
def test_a_pipeline_is_probed_once_by_few_calls_of_its_denoiser(name, tmp_path, capsys, monkeypatch):
    """And kept without what it was probed by: a prompt, of which large ones are gigabytes."""
    monkeypatch.setattr("onelora_diffusion.families.arguments.LARGE", 0)

    def recorded():
        pipeline, calls = make_pipeline(name), []
        with denoiser_of(pipeline).register_forward_pre_hook(lambda *args: calls.append(args)):
            family = Recorded(pipeline, tmp_path)
        family.keep()
        return family, len(calls)

    (first, probes), (second, none) = recorded(), recorded()
    assert 0 < probes < 10 and none == 0
    assert str(second) == str(first) and second.targets == first.targets
    inputs_of = inputs(first, first.pipeline)
    expected = first.predict(first.denoiser, *inputs_of)
    assert torch.equal(second.predict(second.denoiser, *inputs(second, second.pipeline)), expected)
    (path,) = tmp_path.iterdir()
    record, place = kept(path)
    prompts = [tensor for tensor in tensors_in(record.encoded) if tensor.is_floating_point()]
    assert prompts and all(tensor.stride(-2) == 0 < tensor.std() for tensor in prompts)
    assert all(is_meta(place.constants[name]) for name in record.prompted)
    assert not place.on(torch.device("meta"), record.noisy).constants.keys() & {record.noisy, *record.prompted}
    path.write_bytes(path.read_bytes()[:1000])
    assert recorded()[1] == probes and "is recorded anew" in capsys.readouterr().out
    assert recorded()[1] == 0


@torch.no_grad()
def test_whether_a_size_is_taken_is_asked_without_a_trace_in_the_denoiser():
    """Z-Image's keeps the positions that it has computed."""
    pipeline, family = stock("z_image")
    latents, times, conditions = inputs(family, pipeline, ["a bold Q"])
    denoiser_of(pipeline).rope_embedder.freqs_cis = None  # as before its first call
    family.check_resolution(pipeline, 96)
    found = family.predict(denoiser_of(pipeline), latents, times, conditions)
    family.check_resolution(pipeline, 96)
    assert torch.equal(family.predict(denoiser_of(pipeline), latents, times, conditions), found)


@pytest.mark.parametrize("name", ["sd15", "krea2"])
def test_a_pipeline_draws_in_the_middle_of_its_recording(name):
    """As a server's does, whose other threads ask for pictures of another size."""
    pipeline, family = stock(name)
    drawn = []

    def draw_stock(number, sample):
        call = {"height": 64, "width": 64, "num_inference_steps": 1, "output_type": "pt"}
        drawn.append(pipeline("a bold Q", generator=torch.Generator().manual_seed(0), **call).images)

    draw_stock(0, None)
    family.recorder.run(side=(96, 96), answer=family.recorder.answering_all(0.0), step=draw_stock)
    assert len(drawn) == 2 and torch.equal(*drawn)


def test_a_recorded_call_keeps_no_model_alive():
    """Text encoders leave the device's memory at once, not when Python looks for cycles."""
    pipeline = make_pipeline("sd15")
    gc.disable()
    try:
        Recorder(pipeline).run(side=(64, 64))
        encoder = weakref.ref(pipeline.text_encoder)
        pipeline.register_modules(text_encoder=None)
        assert encoder() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_a_mask_that_is_left_out_where_it_has_every_token_is_one_of_these():
    """As Nucleus' pipeline does, and PixArt's here."""
    pipeline, letters = make_pipeline("pixart"), LENGTH - 2
    family, own = family_of(pipeline), pipeline.encode_prompt
    pipeline.encode_prompt = lambda *args, **kwargs: tuple(
        None if value is not None and value.ndim == 2 and value.all() else value for value in own(*args, **kwargs)
    )
    prompts = ["a bold Q", "q" * letters, ""]
    latents, times, conditions = inputs(family, pipeline, prompts, max_length=LENGTH)
    assert conditions["encoder_attention_mask"].sum(1).tolist() == [len(prompt) + 2 for prompt in prompts]
    expected = pipeline.transformer(
        latents[1:2],
        encoder_hidden_states=conditions["encoder_hidden_states"][1:2],
        timestep=times[1:2],
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    ).sample
    assert_rounded(
        family.predict(pipeline.transformer, latents, times, conditions)[1:2], expected, pipeline.transformer
    )


def test_a_layer_that_is_called_by_the_name_of_its_argument_is_no_default_target():
    """PEFT's cannot be called so, and a LoRA of AnimateDiff's `proj_in` would not serve in the stock pipeline."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.named = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.named(input=self.own(x))

    blocks = nn.ModuleList([Block(), Block()])
    model = nn.ModuleDict({"blocks": blocks})
    found = targets_in(model, ("blocks",), lambda: blocks[1](blocks[0](torch.ones(1, 2))))
    assert found == ("blocks.0.own", "blocks.1.own")


def test_arguments_have_the_images_of_a_batch_first_in_each_tensor():
    arrangement = Arrangement({"layers"}, {"layers.1": 1})
    first, second = torch.arange(6).reshape(2, 3), torch.arange(12).reshape(3, 2, 2)
    arguments = {"a": None, "layers": [first, second], "b": {"c": 1, "d": {}}}
    named = dict(arrangement.named(arguments))
    assert list(named) == ["a", "layers.0", "layers.1", "b.c", "b.d"]
    assert torch.equal(named["layers.1"], second.transpose(0, 1))
    again = arrangement.nested(named)
    assert again.keys() == arguments.keys() and again["b"] == arguments["b"]
    assert all(map(torch.equal, again["layers"], arguments["layers"]))


def test_a_pipeline_that_takes_one_prompt_a_call_is_recorded_like_one_that_takes_two():
    """Wan VACE's is such a one."""

    class OneByOne(diffusers.StableDiffusionPipeline):
        @functools.wraps(diffusers.StableDiffusionPipeline.__call__)
        def __call__(self, prompt, *args, **kwargs):
            if isinstance(prompt, list):
                raise ValueError("a list of prompts is not taken")
            return super().__call__(prompt, *args, **kwargs)

    pipeline, (_, expected) = make_pipeline("sd15"), stock("sd15")
    pipeline.__class__ = OneByOne
    found = Recorded(pipeline).record
    assert (found.prompted, found.batched, found.targets) == (
        expected.record.prompted,
        expected.record.batched,
        expected.targets,
    )


def test_a_part_that_is_stood_in_for_is_of_its_own_class():
    """SANA-Video's pipeline scales latents by the class of its autoencoder."""
    vae = make_vae(4)
    stand_in = _StandIn(vae, device="another")
    assert isinstance(stand_in, type(vae)) and stand_in.device == "another" and stand_in.config is vae.config


def test_blocks_are_found_by_their_structure():
    class Block(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)]))

    model = nn.Module()
    model.layers, model.refiner = nn.ModuleList([Block(), Block()]), nn.ModuleList([nn.LayerNorm(2)])
    model.mixed = nn.ModuleList([Block(), nn.Linear(2, 2), nn.Sequential(nn.ModuleList([Block()]))])
    assert repeated_blocks(model) == ("layers", "mixed.2.0")


def make_unclip():
    """Its denoiser is given the prompt's image embedding with noise on it."""
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    width, tokens = 8, 24
    return diffusers.StableUnCLIPPipeline(
        prior_tokenizer=make_tokenizer(tokens),
        prior_text_encoder=make_clip(projection=width),
        prior=diffusers.PriorTransformer(
            num_attention_heads=2, attention_head_dim=4, embedding_dim=width, num_layers=1, num_embeddings=tokens
        ),
        prior_scheduler=diffusers.DDPMScheduler(prediction_type="sample"),
        image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=width),
        image_noising_scheduler=diffusers.DDPMScheduler(),
        tokenizer=make_tokenizer(tokens),
        text_encoder=make_clip(),
        unet=diffusers.UNet2DConditionModel(
            cross_attention_dim=8,
            attention_head_dim=4,
            class_embed_type="projection",
            projection_class_embeddings_input_dim=2 * width,
            **UNET,
        ),
        scheduler=diffusers.DDIMScheduler(),
        vae=make_vae(4, shift_factor=None),
    )


def test_an_argument_that_is_drawn_at_random_in_each_call_is_refused():
    message = "StableUnCLIPPipeline cannot be recorded: class_labels is drawn at random in each of its calls"
    with pytest.raises(ValueError, match=message):
        Recorded(make_unclip())


def test_a_base_that_was_not_frozen_keeps_no_gradient_of_its_recording():
    pipeline = make_pipeline("sd3")
    assert all(parameter.requires_grad for parameter in denoiser_of(pipeline).parameters())
    Recorded(pipeline)
    assert all(parameter.grad is None for parameter in denoiser_of(pipeline).parameters())


def test_what_was_moved_while_inference_mode_was_on_may_be_trained_with():
    pipeline = make_pipeline("flux")
    family = family_of(pipeline)
    with torch.inference_mode():
        moved = family.place(64, 64).on(torch.device("meta"), family.record.noisy)
        ids = family._shared("txt_ids", torch.zeros(1, LENGTH, 3), torch.device("meta"))
    tensors = [value for value in moved.constants.values() if isinstance(value, torch.Tensor)]
    assert tensors and not any(tensor.is_inference() for tensor in (moved.packed, ids, *tensors))


def test_a_call_that_reads_the_precision_of_a_freed_text_encoder_is_recorded_at_other_sizes():
    """As DreamLite's mobile pipeline does."""
    pipeline, given = make_pipeline("pixart"), []
    call = type(pipeline).__call__

    @functools.wraps(call)
    def reading(self, *args, **kwargs):
        given.append((self.text_encoder.dtype, self.text_encoder.config.d_model))
        return call(self, *args, **kwargs)

    pipeline.__class__ = type("Reading", (type(pipeline),), {"__call__": reading})
    family = Recorded(pipeline)
    pipeline.register_modules(text_encoder=None, tokenizer=None)
    assert family.place(64, 96).shape == (4, 32, 48) and {*given} == {given[0]}
