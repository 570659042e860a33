"""The methods that PEFT computes are PEFT's own, weight for weight."""

import sys

import peft
import pytest
import torch
from rounding import assert_rounded, assert_rounded_together
from tiny_models import make_dit, randomize

from onelora_diffusion import AdapterConfig, adapter_state_dict, inject_adapter, merge_adapter
from onelora_diffusion.injection.layers import target_layers


def adapted_layers(model):
    return [module for module in model.modules() if hasattr(module, "onelora") and isinstance(module, torch.nn.Linear)]


def peft_twin(base, config):
    """The same base with PEFT used directly."""
    targets = list(target_layers(base, None))
    settings = {
        "lora": lambda: peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets),
        "dora": lambda: peft.LoraConfig(r=2, lora_alpha=2, use_dora=True, target_modules=targets),
        "vera": lambda: peft.VeraConfig(r=2, projection_prng_key=7, target_modules=targets),
        "peft:ia3": lambda: peft.IA3Config(
            target_modules=targets, feedforward_modules=[t for t in targets if "ff.net.2" in t]
        ),
        "peft:hra": lambda: peft.HRAConfig(r=2, target_modules=targets),
    }
    return peft.get_peft_model(base, settings[config.method]())


CONFIGS = [
    AdapterConfig("lora", rank=2, seed=7),
    AdapterConfig("dora", rank=2, seed=7),
    AdapterConfig("vera", rank=2, seed=7),
    AdapterConfig("peft:ia3", peft_config={"feedforward_modules": r".*ff\.net\.2"}),  # changes its layer's input
    AdapterConfig("peft:hra", peft_config={"r": 2}),  # changes its layer's weight
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.method)
def test_equals_peft_used_directly(inputs, config, dtype):
    inputs["hidden_states"] = inputs["hidden_states"].to(dtype)
    model = randomize(inject_adapter(make_dit().to(dtype), config))
    twin = peft_twin(make_dit().to(dtype), config)
    theirs = {
        name.removeprefix("base_model.model.").replace(".default", ""): p
        for name, p in twin.named_parameters()
        if p.requires_grad
    }
    own = {name.replace(".onelora_", "."): p for name, p in adapter_state_dict(model).items()}
    assert own.keys() == theirs.keys()
    with torch.no_grad():
        for name, p in theirs.items():
            p.copy_(own[name])

    out, expected = model(**inputs).sample, twin(**inputs).sample
    assert_rounded(out, expected, model)
    assert torch.equal(out, expected) or dtype != torch.float32
    out.float().square().mean().backward()
    expected.float().square().mean().backward()
    assert_rounded_together([own[name].grad for name in theirs], [p.grad for p in theirs.values()], model)


@pytest.mark.parametrize("method", ["lora", "vera"])
def test_the_start_is_drawn_from_the_seed_alone(method):
    starts = []
    for seed, drawn_before in ((0, 1), (0, 2), (3, 1)):
        torch.manual_seed(drawn_before)
        tuner = inject_adapter(make_dit(), AdapterConfig(method, seed=seed)).proj_out_1.onelora["default"].tuner
        starts.append(tuner.vera_A["default"] if method == "vera" else tuner.lora_A["default"].weight)
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


def test_injection_draws_nothing_from_the_global_generator():
    model = make_dit()
    state = torch.get_rng_state()
    inject_adapter(model, AdapterConfig("lora"))
    assert torch.equal(torch.get_rng_state(), state)


def test_vera_shares_one_frozen_pair():
    model = inject_adapter(make_dit(), AdapterConfig("vera"))
    tuners = [layer.onelora["default"].tuner for layer in adapted_layers(model)]
    assert len({id(tuner.vera_A["default"]) for tuner in tuners}) == 1
    assert tuners[0].vera_A["default"].shape == (1, 128) and tuners[0].vera_B["default"].shape == (192, 1)


def test_dora_reads_the_base_that_it_serves(inputs):
    """Its norms are those of the layer's weights as they are now, not of a copy."""
    model = randomize(inject_adapter(make_dit(), AdapterConfig("dora")))
    before = model(**inputs).sample
    with torch.no_grad():
        for layer in adapted_layers(model):
            layer.weight.mul_(2)
            layer.bias.mul_(2)
        doubled = model(**inputs).sample
    assert not torch.allclose(doubled, before)
    tuner = model.proj_out_2.onelora["default"].tuner
    assert tuner.base_layer.weight is model.proj_out_2.weight


def test_settings_are_passed_through():
    config = AdapterConfig("lora", rank=4, peft_config={"lora_alpha": 8})
    tuner = inject_adapter(make_dit(), config).proj_out_1.onelora["default"].tuner
    assert (tuner.r["default"], tuner.scaling["default"]) == (4, 2.0)
    assert AdapterConfig.from_json(config.to_json()) == config


@pytest.mark.skipif("LILY" not in peft.PeftType.__members__, reason="no tuner of this PEFT refuses to merge")
def test_a_tuner_that_cannot_merge():
    lily = inject_adapter(make_dit(), AdapterConfig("peft:lily"))
    with pytest.raises(ValueError, match="PEFT's lily cannot be merged"):
        merge_adapter(lily)


def test_errors(monkeypatch):
    dit = make_dit()
    for config, message in (
        (AdapterConfig("peft:lorra"), "no tuner of linear layers named 'lorra': it has .*fourierft.*vblora"),
        (AdapterConfig("peft:ia3", peft_config={"colour": 1}), "peft_config of 'peft:ia3': .*colour"),
        (AdapterConfig("peft:prompt_tuning"), "no tuner of linear layers named 'prompt_tuning'"),
    ):
        with pytest.raises(ValueError, match=message):
            inject_adapter(dit, config)
    with pytest.raises(ValueError, match="peft_config goes with lora, dora, vera and peft:<tuner>, not 'mora1'"):
        AdapterConfig("mora1", peft_config={"r": 1})
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"pip install onelora-diffusion\[peft\]"):
        inject_adapter(dit, AdapterConfig("lora"))
    assert not hasattr(dit, "_onelora")
