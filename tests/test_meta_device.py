"""The meta device as a stand-in for a GPU: a tensor left on the host, or a value to wait for, is an error there."""

import contextlib

import pytest
import torch
from conftest import make_dit
from diffusers import DDIMScheduler
from torch import nn

from onelora_diffusion import AdapterConfig, inject_adapter, route_adapters
from onelora_diffusion.diffusion import training_losses
from onelora_diffusion.injection.routing import route_beside_base
from onelora_diffusion.sampling import SamplerSettings, guided_denoiser

METHODS = ["1lora", "bitfit", "difffit", "mora1", "mora6", "lora", "dora", "vera", "full"]
SCHEDULER = DDIMScheduler(clip_sample=False)


def on_meta(*configs, dtype=torch.float32):
    """Adapters named a, b, ..., the last of them serving, on a base held in `dtype`."""
    model = make_dit()
    for name, config in zip("ab", configs, strict=False):
        inject_adapter(model, config, name)
    return nn.Module.to(model, "meta", dtype)


def batch(size, dtype=torch.float32):
    with torch.device("meta"):
        return torch.empty(size, 4, 8, 8, dtype=dtype), torch.empty(size, dtype=torch.long)


def test_what_waits_or_stays_behind_is_an_error_there():
    latents, labels = batch(2)
    with pytest.raises((RuntimeError, NotImplementedError)):
        latents.sum().item()
    with pytest.raises((RuntimeError, NotImplementedError)):
        latents[latents > 0]
    with pytest.raises((RuntimeError, NotImplementedError)):
        on_meta()(torch.zeros(2, 4, 8, 8), timestep=labels, class_labels=labels)


@pytest.mark.parametrize(
    "method, dtype",
    [(method, torch.float32) for method in METHODS]
    + [(method, torch.bfloat16) for method in METHODS if method != "full"],  # which trains float32 alone
)
def test_a_training_step_waits_for_nothing(method, dtype):
    config = AdapterConfig(method, num_classes=3)
    # What full fine-tuning puts in the base's place does not move to this device: it is made there.
    model = inject_adapter(make_dit().to("meta"), config) if method == "full" else on_meta(config, dtype=dtype)
    model.train()
    latents, labels = batch(2, dtype)
    output = model(latents, timestep=labels, class_labels=labels).sample
    losses = training_losses(output, latents, torch.empty_like(latents), labels, SCHEDULER)
    losses["loss"].mean().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained and all(parameter.grad.is_meta for parameter in trained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("guidance", ["none", "cfg", "domain"])
def test_a_guided_step_waits_for_nothing(guidance, dtype):
    model = on_meta(AdapterConfig(num_classes=3), dtype=dtype)
    latents, labels = batch(2)
    settings = SamplerSettings(guidance_scale=1.0 if guidance == "none" else 4.0, guidance_channels=3)
    denoise = guided_denoiser(model, labels, settings, null_label=3)
    route = route_beside_base(model, 2) if guidance == "domain" else contextlib.nullcontext()
    with torch.no_grad(), route:
        output = denoise(latents, 500)
    assert output.is_meta and output.shape == (2, 8, 8, 8) and output.dtype == torch.float32


@pytest.mark.parametrize("methods", [("1lora", "bitfit"), ("lora", "difffit"), ("mora6", "1lora")])
@pytest.mark.parametrize("grad", [False, True])
def test_a_routed_forward_waits_for_nothing(methods, grad):
    model = on_meta(*(AdapterConfig(method, num_classes=3) for method in methods))
    latents, labels = batch(6)
    with torch.set_grad_enabled(grad), route_adapters(model, ["a", None, {"a": 0.5, "b": 0.5}]):
        output = model(latents, timestep=labels, class_labels=labels).sample
        if grad:
            output.mean().backward()
    assert output.is_meta
