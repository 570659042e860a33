"""The meta device as a stand-in for a GPU: a tensor left on the host, or a value to wait for, is an error there.

Copies from the host are none on the meta device, but a GPU's work is waited for at each: they are counted here.
"""

import contextlib
import copy
import functools
from contextlib import nullcontext
from types import SimpleNamespace

import edit_pipelines  # noqa: F401  which adds to the small pipelines
import first_frame_pipelines  # noqa: F401
import pytest
import scheduled_pipelines  # noqa: F401
import tiny_models
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, FlowMatchEulerDiscreteScheduler
from tiny_models import make_dit
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from benchmarks.sampled import sample_latents
from benchmarks.update import Update
from onelora_diffusion import AdapterConfig, adapter_state_dict, inject_adapter, route_adapters, set_adapters
from onelora_diffusion.config import METHODS
from onelora_diffusion.denoisers import choose_denoiser, denoiser_of, denoisers_in, guides_in
from onelora_diffusion.diffusion import prediction_of
from onelora_diffusion.families import Edit, choose_references, family_of
from onelora_diffusion.families.family import joined
from onelora_diffusion.sampling import SamplerSettings, generate_images, image_generators
from onelora_diffusion.sampling.guidance import GuidedDenoiser, ImageRequest, first_weight
from onelora_diffusion.sampling.schedulers import fitting_samplers
from onelora_diffusion.training.randomness import draw_step
from onelora_diffusion.training.task import Task
from tools.stock_calls import Picture

META = torch.device("meta")
NAMES = [name for name in METHODS if not name.startswith("peft:")]
PRECISIONS = [torch.float32, torch.bfloat16, torch.float16]


class CopiesByOperators(TorchDispatchMode):
    def __init__(self, copies: list[str]):
        super().__init__()
        self.copies = copies

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        tensors = [each for each in tree_iter((args, kwargs, result)) if isinstance(each, torch.Tensor)]
        is_copy = operator in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        is_left_to_run = is_copy and any(each is True for each in (*args, (kwargs or {}).get("non_blocking")))
        # A single number on the host is handed over with an operator's call, but not with a copy.
        on_host = any(not tensor.is_meta and (is_copy or tensor.ndim) for tensor in tensors)
        if on_host and any(tensor.is_meta for tensor in tensors) and not is_left_to_run:
            self.copies.append(str(operator))
        return result


class CopiesByConstructors(TorchFunctionMode):
    def __init__(self, copies: list[str]):
        super().__init__()
        self.copies = copies

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.tensor, torch.as_tensor) and result.is_meta:
            self.copies.append(function.__name__)
        return result


@contextlib.contextmanager
def copies_from_host():
    """Context manager: inside, the list grows by each copy that a GPU's work is waited for."""
    copies = []
    with CopiesByOperators(copies), CopiesByConstructors(copies):
        yield copies


def copies_of_second(step):
    """The copies that a step makes again: its first time fills tables."""
    step()
    with copies_from_host() as copies:
        step()
    return copies


def on_meta(*configs, dtype=torch.float32, model=None):
    """Adapters named a, b, ..., the last of them serving, on a base held in `dtype`."""
    model = make_dit() if model is None else model
    for name, config in zip("abcdefg", configs, strict=False):
        if config.method == "full":  # what it puts in the base's place cannot move there: it is made there
            model = model.to(META)
        inject_adapter(model, config, name)
    return nn.Module.to(model, META, dtype)


def batch(size):
    with META:
        labels = torch.empty(size, dtype=torch.long)
        return {"hidden_states": torch.empty(size, 4, 8, 8), "timestep": labels, "class_labels": labels}


# ---------------------------------------------------------------------------------------------------
# The stand-in itself


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: bool(x.isfinite().all()),
        lambda x: x + torch.zeros(4),
        lambda x: torch.where(torch.zeros(4) > 0, x, 0.0),
    ],
)
def test_what_waits_or_stays_behind_is_an_error_there(wait):
    with pytest.raises((RuntimeError, NotImplementedError)):
        wait(torch.empty(2, 4, device=META))


@pytest.mark.parametrize(
    "copy, number",
    [
        (lambda x: torch.zeros(4).to(META), 1),
        (lambda x: torch.tensor([1.0, 2.0], device=META), 1),
        (lambda x: torch.tensor(1.0, device=META), 1),
        (lambda x: torch.tensor(1.0).to(META), 1),
        (lambda x: x.copy_(torch.zeros(2, 4)), 1),
        (lambda x: x[torch.tensor([0, 1])], 1),
        (lambda x: x.index_fill(0, torch.tensor([1]).to(META), 2.0), 1),
        (lambda x: torch.zeros(4).to(META, non_blocking=True), 0),
        (lambda x: x.copy_(torch.zeros(2, 4), non_blocking=True), 0),
        (lambda x: x * torch.tensor(3.0), 0),
        (lambda x: torch.full_like(x, 2.0) + torch.arange(4, device=META), 0),
        (lambda x: x.to(torch.bfloat16), 0),
        (lambda x: torch.zeros(4).to(torch.bfloat16), 0),
    ],
)
def test_copies_that_are_waited_for_are_counted(copy, number):
    with copies_from_host() as copies:
        copy(torch.empty(2, 4, device=META))
    assert len(copies) == number


# ---------------------------------------------------------------------------------------------------
# Training


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize(
    "method, dtype", [(name, torch.float32) for name in NAMES] + [("1lora", dtype) for dtype in PRECISIONS[1:]]
)
def test_an_update_waits_for_nothing(method, dtype):
    """Draws, losses, backward, clipping, optimiser and averages."""
    model = on_meta(AdapterConfig(method, num_classes=3), dtype=dtype).train()
    update = Update(model, META)
    for group in update.optimizer.param_groups:
        group["fused"] = False  # which is for CPUs and GPUs alone
    assert copies_of_second(update) == []
    assert trained(model) and all(parameter.is_meta for parameter in trained(model))


@pytest.mark.parametrize(
    "config",
    [
        AdapterConfig(fuse_qkv=True),
        AdapterConfig(compression="random"),
        AdapterConfig(compression="singular", rank=2),
        AdapterConfig(sum=True, bias=True, scale=True),
        AdapterConfig("lora", rank=4, fuse_qkv=True),
        AdapterConfig("mora6", fuse_qkv=True),
    ],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_other_ways_through_a_model_wait_for_nothing(config, checkpointing):
    model = on_meta(config).train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    assert copies_of_second(functools.partial(backward, model, batch(2))) == []
    assert all(parameter.grad.is_meta for parameter in trained(model))


def forward(model, inputs):
    assert model(**inputs).sample.is_meta


def backward(model, inputs):
    model(**inputs).sample.mean().backward()


# ---------------------------------------------------------------------------------------------------
# Sampling


NOISE, FLOW = DDIMScheduler().config, FlowMatchEulerDiscreteScheduler().config
GUIDED = [("cfg", 1.0), ("cfg", 4.0), ("domain", 4.0)]
CASES = [(sampler, NOISE, *guided) for sampler in fitting_samplers(NOISE) for guided in GUIDED]
CASES += [(sampler, FLOW, *GUIDED[1]) for sampler in fitting_samplers(FLOW)]


@pytest.mark.parametrize(
    "sampler, config, guidance, scale, dtype",
    [(*case, torch.float32) for case in CASES] + [(*CASES[1], dtype) for dtype in PRECISIONS[1:]],
)
def test_a_step_of_a_sampler_waits_for_nothing(sampler, config, guidance, scale, dtype):
    """But for ancestral sampling, whose noise the images' own generators draw on the CPU: one copy a step."""
    model = on_meta(AdapterConfig(num_classes=3), dtype=dtype)
    options = {"guidance": guidance, "guidance_scale": scale, "guidance_channels": 3}
    settings = SamplerSettings(sampler=sampler, num_inference_steps=5, **options)
    labels, generators = torch.tensor([0, 2]), image_generators(0, range(2))
    with copies_from_host() as copies:
        at_step = []
        latents = sample_latents(
            model, config, labels, generators, settings, on_step=lambda share: at_step.append(len(copies))
        )
    assert latents.is_meta and latents.shape == (2, 4, 8, 8) and latents.dtype == torch.float32
    after_first = [after - before for before, after in zip(at_step, at_step[1:], strict=False)]
    assert len(after_first) == (8 if sampler == "heun" else 4)
    assert after_first == ([1, 1, 1, 0] if sampler == "ddpm" else [0] * len(after_first))  # the last draws none


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_images_are_decoded_without_waiting(dtype):
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=4)
    pipeline = DiTPipeline(on_meta(AdapterConfig(), dtype=dtype), vae.to(META, dtype), DDIMScheduler())
    settings = SamplerSettings(num_inference_steps=1)
    with copies_from_host() as copies:
        ((_, images),) = generate_images(pipeline, [0, 1], 0, [0, 1], settings, images_at_once=None)
    assert images.is_meta and images.shape == (2, 3, 8, 8) and images.dtype == torch.uint8
    assert len(copies) == 1  # the first noise


# ---------------------------------------------------------------------------------------------------
# Several adapters


PAIRS = [("bitfit", "1lora"), ("difffit", "mora6"), ("lora", "1lora"), ("dora", "vera"), ("mora1", "lora")]


@pytest.mark.parametrize("methods", PAIRS)
def test_a_route_waits_for_nothing(methods):
    model = on_meta(*(AdapterConfig(method, num_classes=3) for method in methods))
    with route_adapters(model, ["a", None, {"a": 0.5, "b": 0.5}]):
        assert copies_of_second(functools.partial(backward, model, batch(6))) == []
        with torch.no_grad():
            assert copies_of_second(functools.partial(forward, model, batch(3))) == []


@pytest.mark.parametrize("methods", PAIRS)
def test_a_weighted_sum_waits_for_nothing(methods):
    model = on_meta(*(AdapterConfig(method) for method in methods))
    set_adapters(model, ["a", "b"], [0.5, {"transformer_blocks.0": 2.0}])
    assert copies_of_second(functools.partial(backward, model, batch(2))) == []
    with torch.no_grad():
        assert copies_of_second(functools.partial(forward, model, batch(2))) == []


# ---------------------------------------------------------------------------------------------------
# Families


@functools.cache
def recorded(name, dtype):
    """(the family of a small pipeline, two encoded prompts)."""
    pipeline = tiny_models.make_pipeline(name).to(dtype)
    with torch.no_grad():
        return family_of(pipeline), family_of(pipeline).encode_conditions(pipeline, ["a bold Q", "7"])


def called(name, dtype=torch.float32):
    """A small model, and what gives its losses on the meta device, as the family of its pipeline calls it."""
    family, prompts = recorded(name, dtype)
    return copy.deepcopy(family.denoiser), losses_of(family, prompts, family.latent_shape(family.pipeline, 64, 64))


def losses_of(family, prompts, shape):
    """What gives a model's losses of two samples, as a step of training computes them, at a high and a low noise."""
    is_flow = prediction_of(family.training_scheduler(family.pipeline).config) == "flow"
    weighting = {"snr_gamma": None, "loss_weighting": "cosmap"} if is_flow else {"snr_gamma": 5.0}
    task = SimpleNamespace(family=family, pipeline=family.pipeline, accelerator=SimpleNamespace(autocast=nullcontext))
    task.settings = SimpleNamespace(**{"prior_weight": 0, "loss_weighting": "none"} | weighting)
    moments = torch.empty(2, 2, *shape, device=META)

    def losses(model):
        drawn = draw_step(0, 0, 2, shape, 1000, label_drop=0.1)._replace(timesteps=torch.tensor([50, 900]))
        given, draws = family.on_device(prompts, META), drawn.rows(slice(2), META)
        return Task.losses(task, model, moments.to(first_weight(model).dtype), given, draws)["loss"]

    return losses


NAMED = ["flux", "sd3", "pixart", "sana", "prx_pixel", "cosmos", "cosmos2"]


@pytest.mark.parametrize("name, dtype", [*((name, torch.float32) for name in NAMED), ("flux", torch.bfloat16)])
def test_families_wait_for_nothing(name, dtype):
    """With adapters of many methods, all of which serve at once and train; then with two of them by sample."""
    methods = ["1lora", "lora", "bitfit", "mora6", "dora", "vera"][: None if dtype == torch.float32 else 2]
    model, losses = called(name, dtype)
    model = on_meta(*(AdapterConfig(method) for method in methods), dtype=dtype, model=model)
    names = list("abcdef"[: len(methods)])
    set_adapters(model, names)
    tensors = [tensor for name in names for tensor in adapter_state_dict(model, name).values()]
    for tensor in tensors:
        tensor.requires_grad_()
    assert copies_of_second(lambda: losses(model).mean().backward()) == []
    assert all(tensor.grad.is_meta for tensor in tensors)
    with torch.no_grad(), route_adapters(model, ["a", {"a": 0.5, "b": 2.0}]):
        assert copies_of_second(lambda: losses(model)) == []


@pytest.mark.parametrize("name", NAMED)
def test_full_fine_tuning_of_families_waits_for_nothing(name):
    model, losses = called(name)
    model = on_meta(AdapterConfig("full"), model=model)
    assert copies_of_second(lambda: losses(model).mean().backward()) == []
    assert trained(model) and all(parameter.grad.is_meta for parameter in trained(model))


# Two denoisers; prompts kept for a size, and another model that guides; an embedding of the strength of guidance;
# reference images of two sizes; a clean first frame.
GROUPED = ["wan22", "ideogram4", "lcm", "kontext", "wan_ti2v_i2v"]


@pytest.mark.parametrize("name", GROUPED)
def test_what_is_computed_in_groups_waits_for_nothing(name, monkeypatch):
    """In training, and in a step of sampling where one image of two is guided."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **settings: nullcontext())  # which has no meta device
    pipeline = tiny_models.make_pipeline(name)
    is_edit, frames = name in ("kontext", "wan_ti2v_i2v"), 5 if name == "wan_ti2v_i2v" else 1
    choose_references(pipeline, int(is_edit))
    choose_denoiser(pipeline, "both" if name == "wan22" else None)
    family, model = family_of(pipeline), denoiser_of(pipeline)
    asked = ["a bold Q", "a violet triangle, upside down", ""]
    if is_edit:
        pictures = [Picture((64, 64)), Picture((96, 64))]
        asked = [Edit(prompt, (pictures[number % 2],), (64, 64), frames) for number, prompt in enumerate(asked)]
    with torch.no_grad():
        first, second, empty = (family.encode_conditions(pipeline, [family.at_size(each, 64)]) for each in asked)
    shape = family.latent_shape(pipeline, 64, 64, frames)
    for part in (denoisers_in(pipeline) | guides_in(pipeline)).values():
        nn.Module.to(part, META)
    inject_adapter(model, AdapterConfig(targets=family.targets)).to(META)
    losses = losses_of(family, joined([first, second]), shape)
    assert copies_of_second(lambda: losses(model).mean().backward()) == []
    assert all(parameter.grad.is_meta for parameter in trained(model))

    requests = [
        ImageRequest(condition=each, empty=empty, generator=None, guidance_scale=scale, adapters={"default": weight})
        for each, scale, weight in ((first, 1.0, 1.0), (second, 4.0, 0.5), (first, 4.0, 1.0))
    ]
    denoise = GuidedDenoiser(family, model, requests, interval=(200, 600))
    latents, times = torch.empty(3, *shape, device=META), torch.tensor([100.0, 300.0, 900.0])
    with torch.no_grad(), route_adapters(model, denoise.entries):
        assert copies_of_second(lambda: denoise(latents, times)) == []
