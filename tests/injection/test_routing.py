import pytest
import torch
from rounding import assert_rounded, assert_rounded_together
from tiny_models import dit_inputs, make_dit, randomize
from torch import nn

from onelora_diffusion import AdapterConfig, inject_adapter, merge_adapter, set_adapters, unload_adapter
from onelora_diffusion.injection.routing import reroute_adapters, route_adapters, route_beside_base

CONFIGS = {
    "food": {"num_classes": 3},
    "birds": {"method": "difffit", "sum": True, "num_classes": 5},
    "bias": {"method": "bitfit"},
    "random": {"compression": "random", "seed": 7},
    "lora": {"method": "lora", "rank": 2},
    "three": {"rank": 3},
    "outputs": {"compression": "outputs", "rank": 2, "bias": True},
    "singular": {"compression": "singular", "rank": 2},
}
NAMES = ["food", "birds", None, "bias", "lora", "random", "three", "outputs", "singular"]


def make_routed(equal_copies=True, fuse_qkv=False):
    model = make_dit(equal_copies)
    for seed, (name, config) in enumerate(CONFIGS.items()):
        randomize(inject_adapter(model, AdapterConfig(**config, fuse_qkv=fuse_qkv), name), seed=seed)
    return model


def run_alone(model, name, **inputs):
    """What one adapter, or the base, computes."""
    set_adapters(model, [] if name is None else [name])
    return model(**inputs).sample


def sample_of(inputs, i):
    return {key: value[i : i + 1] for key, value in inputs.items()}


@pytest.mark.parametrize("fuse_qkv", [False, True])
@pytest.mark.parametrize("equal_copies", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_every_sample_equals_its_own_single_run(grad, equal_copies, fuse_qkv):
    model = make_routed(equal_copies, fuse_qkv)
    inputs = dit_inputs(len(NAMES)) | {"class_labels": torch.tensor([2, 4, 9, 9, 1, 7, 0, 3, 5])}
    with torch.set_grad_enabled(grad):
        expected = [run_alone(model, name, **sample_of(inputs, i)) for i, name in enumerate(NAMES)]
        set_adapters(model, "bias")
        before = model(**inputs).sample
        with route_adapters(model, NAMES):
            out = model(**inputs).sample
        assert_rounded(out, torch.cat(expected), model)
        assert torch.equal(model(**inputs).sample, before)


def test_a_guided_batch_is_served_in_turns_and_label_1000_is_each_table_s_null_row():
    model = make_routed()
    inputs = dit_inputs(6) | {"class_labels": torch.tensor([1, 1, 1, 1000, 1000, 1000])}
    names = ["food", "birds", None]
    with torch.no_grad():
        null = {"food": 3, "birds": 5, None: 10}
        for i, name in enumerate(names * 2):
            alone = sample_of(inputs, i) | {"class_labels": torch.tensor([1 if i < 3 else null[name]])}
            with route_adapters(model, names):
                routed = model(**inputs).sample[i : i + 1]
            assert_rounded(routed, run_alone(model, name, **alone), model)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fuse_qkv", [False, True])
def test_gradients_are_those_of_the_single_runs(fuse_qkv, checkpointing):
    model = make_routed(fuse_qkv=fuse_qkv)
    if checkpointing:
        model.train().enable_gradient_checkpointing()
    names = ["food", "birds", "food", "three", "outputs"]
    adapters = {name: list(model._onelora.adapters[name].values()) for name in names}
    trained = [p.requires_grad_() for modules in adapters.values() for m in modules for p in m.parameters()]
    inputs = dit_inputs(5)

    with route_adapters(model, names):
        model(**inputs).sample.square().sum().backward()
    routed = [p.grad.clone() for p in trained]
    model.zero_grad()
    for i, name in enumerate(names):
        run_alone(model, name, **sample_of(inputs, i)).square().sum().backward()
    assert_rounded_together(routed, [p.grad for p in trained], model)


def test_an_entry_may_be_a_weighted_sum_with_weights_by_block():
    model, inputs = make_routed(), dit_inputs(3)
    by_block = {"transformer_blocks.1": 0.0, "*.attn1": 2.0}
    with torch.no_grad(), route_adapters(model, [{"food": 0.25, "birds": -0.5}, {"bias": by_block}, {}]):
        out = model(**inputs).sample
    with torch.no_grad():
        set_adapters(model, ["food", "birds"], [0.25, -0.5])
        assert_rounded(out[:1], model(**sample_of(inputs, 0)).sample, model)
        set_adapters(model, ["bias"], [by_block])
        assert_rounded(out[1:2], model(**sample_of(inputs, 1)).sample, model)
        unload_adapter(model)
        assert_rounded(out[2:], model(**sample_of(inputs, 2)).sample, model)


@pytest.mark.parametrize("names", [None, ["food", "birds", None]])
def test_beside_the_base_equals_two_models(names):
    model, base, inputs = make_routed(), make_dit(), dit_inputs(3)
    set_adapters(model, ["bias", "food"], [0.5, 1.5])
    with torch.no_grad():
        if names is None:
            expected = model(**inputs).sample
        else:
            with route_adapters(model, names):
                expected = model(**inputs).sample
        null = inputs | {"class_labels": torch.full((3,), 1000)}
        doubled = {key: torch.cat([inputs[key], null[key]]) for key in inputs}
        with route_beside_base(model, 3, names):
            adapted, unconditional = model(**doubled).sample.chunk(2)
        assert_rounded(adapted, expected, model)
        base_null = base(**inputs | {"class_labels": torch.full((3,), 10)}).sample
        assert_rounded(unconditional, base_null, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = make_routed().to(dtype)
    inputs = dit_inputs(len(NAMES))
    inputs["hidden_states"] = inputs["hidden_states"].to(dtype)
    with torch.no_grad():
        with route_adapters(model, NAMES):
            out = model(**inputs).sample
        expected = torch.cat([run_alone(model, name, **sample_of(inputs, i)) for i, name in enumerate(NAMES)])
    assert out.dtype == dtype
    assert_rounded(out, expected, model)


def test_wrong_routes_are_refused_and_change_nothing():
    model, inputs = make_routed(), dit_inputs(3)
    before = model(**inputs).sample
    for names, message in [
        (["food", "fish"], "'fish' is not in the list of present adapters"),
        ([], "a list with an adapter name or None for each sample"),
        ("food", "a list with an adapter name or None for each sample"),
        ([{"food": float("nan")}], "must be a finite number"),
        ([{"food": {"transformer_blocks.9": 1.0}}], "serves no layer in 'transformer_blocks.9'"),
    ]:
        with pytest.raises(ValueError, match=message), route_adapters(model, names):
            pass
    with (
        pytest.raises(ValueError, match="batch of 3 is no multiple of the 2 samples"),
        route_adapters(model, [None] * 2),
    ):
        model(**inputs)
    assert torch.equal(model(**inputs).sample, before)
    merge_adapter(model, "food")
    with pytest.raises(ValueError, match="adapters food are merged"), route_adapters(model, ["food"]):
        pass


def test_any_model_whose_layers_keep_samples_apart():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 4))
    randomize(inject_adapter(model, AdapterConfig(), "a"))
    x = torch.randn(2, 5, 4)
    with torch.no_grad():
        adapted = model(x)
        set_adapters(model, [])
        base = model(x)
        with route_adapters(model, ["a", None]):
            assert_rounded(model(x), torch.stack([adapted[0], base[1]]), model)
    inject_adapter(model, AdapterConfig(norms=True), "norms")
    with pytest.raises(ValueError, match="'norms' trains 1 itself"), route_adapters(model, ["norms", None]):
        pass
    randomize(model)
    with torch.no_grad(), route_adapters(model, ["a", None]):  # the trained norm that serves outside does not here
        assert_rounded(model(x), torch.stack([adapted[0], base[1]]), model)

    flat = nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 4))
    inject_adapter(flat, AdapterConfig(targets=("1",)), "a")
    with pytest.raises(ValueError, match="does not keep samples apart"), route_adapters(flat, ["a", None]):
        flat(x)


def test_a_batch_may_change_inside_a_route():
    """Samples leave, join and change their adapters; each still equals its single run, and values that are written."""
    model = make_routed()
    inputs = dit_inputs(8) | {"class_labels": torch.tensor([2, 4, 9, 9, 1, 7, 0, 3])}
    with torch.no_grad():
        alone = [run_alone(model, name, **sample_of(inputs, i)) for i, name in enumerate(NAMES[:8])]
        with route_adapters(model, NAMES[:3]):
            for samples in ([2, 1], [1, 6, 4, 2, 7], [3], [0, 1, 2, 3, 4, 5, 6, 7]):
                reroute_adapters(model, [NAMES[i] for i in samples])
                out = model(**{key: value[samples] for key, value in inputs.items()}).sample
                assert_rounded(out, torch.cat([alone[i] for i in samples]), model)
            with pytest.raises(ValueError, match="'fish' is not in the list"):
                reroute_adapters(model, ["fish"])
            reroute_adapters(model, ["bias", "food"])
            for parameter in model._onelora.adapters["bias"].values():
                parameter.beta.zero_()
            out = model(**{key: value[[3, 0]] for key, value in inputs.items()}).sample
        expected = run_alone(model, None, **sample_of(inputs, 3)), alone[0]
        assert_rounded(out, torch.cat(expected), model)
