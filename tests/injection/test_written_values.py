"""Sums of adapters follow their values, whoever writes them and in whatever mode."""

import contextlib

import numpy as np
import pytest
import torch
from rounding import assert_rounded
from tiny_models import dit_inputs, make_dit, randomize
from torch import nn

from onelora_diffusion import (
    AdapterConfig,
    adapter_state_dict,
    inject_adapter,
    load_adapter,
    merge_adapter,
    route_adapters,
    save_adapter,
    set_adapters,
)

WEIGHTS = {"a": 0.7, "b": -0.3}


@pytest.fixture
def x():
    return torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0))


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6))


@pytest.fixture
def model():
    model = make()
    for seed, name in enumerate(WEIGHTS):
        randomize(inject_adapter(model, AdapterConfig(), name), 1.0, seed)
    return set_adapters(model, list(WEIGHTS), list(WEIGHTS.values()))


def vector(model, name: str) -> nn.Parameter:
    return adapter_state_dict(model, name)["0.onelora_b"]


def by_hand(model, x, weights=WEIGHTS) -> torch.Tensor:
    with torch.no_grad():
        out = nn.functional.linear(x, model[0].weight, model[0].bias)
        return out + sum(weight * vector(model, name) for name, weight in weights.items()) * x.sum(-1, keepdim=True)


def by_data(parameter):
    parameter.data.mul_(2)


def by_other_data(parameter):
    parameter.data = 3 * parameter.data


def by_numpy(parameter):
    values = parameter.detach().numpy()
    values += np.arange(6, dtype=np.float32)


def by_an_average(parameter):
    """diffusers' moving average, which writes `.data` without a trace."""
    from diffusers.training_utils import EMAModel

    average = EMAModel([parameter])
    average.shadow_params[0].mul_(0.2)
    average.copy_to([parameter])


@pytest.mark.parametrize("write", [by_data, by_other_data, by_numpy, by_an_average])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
def test_a_sum_follows_what_is_written(model, x, write, mode):
    for name in WEIGHTS:
        with mode():
            before = model(x)
        assert_rounded(before, by_hand(model, x), 8)
        write(vector(model, name))
        with mode():
            after = model(x)
        assert not torch.allclose(before, after, atol=0.1)
        assert_rounded(after, by_hand(model, x), 8)


@pytest.mark.parametrize("write", [by_data, by_numpy])
def test_an_open_route_follows_what_is_written(model, x, write):
    entries = ["a", {"a": 0.5, "b": 2.0}, None, "b"]
    mixtures = [{"a": 1.0}, {"a": 0.5, "b": 2.0}, {"a": 0.0}, {"b": 1.0}]
    with torch.no_grad(), route_adapters(model, entries):
        for name in ("a", "b", "a"):
            expected = [by_hand(model, sample, mixture) for sample, mixture in zip(x, mixtures, strict=True)]
            assert_rounded(model(x), torch.stack(expected), 8)
            write(vector(model, name))


def test_an_open_route_of_tables_follows_what_is_written():
    model, inputs = make_dit(), dit_inputs(2)
    for seed, name in enumerate("ab"):
        randomize(inject_adapter(model, AdapterConfig(num_classes=3), name), 1.0, seed)
    with torch.no_grad():
        with route_adapters(model, ["a", "b"]):
            model(**inputs)
            adapter_state_dict(model, "b")["class_embedding.weight"].data.mul_(-1)
            found = model(**inputs).sample
        with route_adapters(model, ["a", "b"]):
            assert torch.equal(found, model(**inputs).sample)


@pytest.mark.parametrize("loaded_inside", [False, True])
@pytest.mark.parametrize("served_in", [torch.inference_mode, torch.no_grad, contextlib.nullcontext])
def test_loaded_and_served_in_inference_mode(model, x, tmp_path, loaded_inside, served_in):
    files = {name: save_adapter(model, tmp_path / name, adapter_name=name) for name in WEIGHTS}
    other = make()
    with torch.inference_mode(loaded_inside):
        for name, file in files.items():
            load_adapter(other, file, name)
    with served_in():
        for weights in (WEIGHTS, {"a": 0.5}, {"b": 1.0}):
            set_adapters(other, list(weights), list(weights.values()))
            assert_rounded(other(x), by_hand(model, x, weights), 8)
            merge_adapter(other)
            assert_rounded(other(x), by_hand(model, x, weights), 8)
            other._onelora.unmerge()
    set_adapters(other, "b")
    trained = vector(other, "b").requires_grad_()
    other(x).sum().backward()
    assert_rounded(trained.grad, x.sum().expand(6), x.numel(), x.abs().sum().item())


@pytest.mark.parametrize("options", [{"method": "mora6"}, {"compression": "random", "seed": 987}])
def test_constants_first_used_in_inference_mode_serve_training_too(options, x):
    model = randomize(inject_adapter(make(), AdapterConfig(**options)))
    with torch.inference_mode():
        expected = model(x[:, :, :])
    out = model(x)
    out.sum().backward()
    assert torch.equal(out, expected)
    assert all(p.grad.any() for p in adapter_state_dict(model).values())


def test_merging_into_weights_made_in_inference_mode_is_refused_outside_of_it(x):
    with torch.inference_mode():
        model = make()
    randomize(inject_adapter(model, AdapterConfig()))
    with torch.no_grad():
        expected = model(x)
        with pytest.raises(ValueError, match="0 was made under torch.inference_mode.*nothing was merged"):
            merge_adapter(model)
        assert torch.equal(model(x), expected)
    with torch.inference_mode():
        merge_adapter(model)
        assert_rounded(model(x), expected, model)


# ---------------------------------------------------------------------------------------------------
# Training and evaluating: dropout


DROPOUT = AdapterConfig("lora", rank=4, peft_config={"lora_dropout": 0.5})


def test_adapters_evaluate_in_a_model_that_does_however_they_come(x, tmp_path):
    trained = randomize(inject_adapter(make().eval(), DROPOUT))
    assert torch.equal(trained(x), trained(x))  # injected
    expected, file = trained(x), save_adapter(trained, tmp_path)
    loaded = load_adapter(make().eval(), file)
    assert torch.equal(loaded(x), expected) and torch.equal(loaded(x), expected)
    assert not any(module.training for module in loaded.modules())
    with torch.no_grad(), route_adapters(loaded, ["default", None, "default", None]):
        assert_rounded(loaded(x)[::2], expected[::2], 8)
    trains = load_adapter(make().train(), file)
    assert not torch.equal(trains(x), trains(x))
    assert torch.equal(trains.eval()(x), expected)
    assert not torch.equal(loaded.train()(x), loaded(x))
