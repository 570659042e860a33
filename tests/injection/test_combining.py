import pytest
import torch
from rounding import assert_rounded
from tiny_models import dit_inputs, make_dit, randomize

from onelora_diffusion import (
    AdapterConfig,
    adapter_state_dict,
    combine_adapters,
    inject_adapter,
    load_adapter,
    save_adapter,
    set_adapters,
)

CONFIGS = {
    "sum": {"targets": ("to_q", "ff.net.2")},
    "every": {"method": "difffit", "sum": True, "norms": False},
    "food": {"num_classes": 3},
    "more_food": {"num_classes": 3},
    "birds": {"num_classes": 4},
    "random": {"compression": "random", "seed": 3},
    "two": {"rank": 2},
    "two_more": {"rank": 2, "bias": True, "targets": ("to_k",)},
    "outputs": {"compression": "outputs", "rank": 2},
    "singular": {"compression": "singular", "rank": 2},
    "more_singular": {"compression": "singular", "rank": 2, "bias": True},
    "lora": {"method": "lora"},
}


@pytest.fixture
def model():
    model = make_dit()
    for seed, (name, config) in enumerate(CONFIGS.items()):
        randomize(inject_adapter(model, AdapterConfig(**config), name), seed=seed)
    return model


@pytest.mark.parametrize(
    "names, weights",
    [
        (["sum", "every", "food"], [0.5, -1.5, 2.0]),
        (["food"], [-1.0]),
        (["sum", "every"], [{"transformer_blocks.0": 0.25}, 0.5]),
        (["random"], [0.5]),
        (["two", "two_more"], [0.5, -1.0]),
        (["outputs"], [-0.5]),
        (["singular", "more_singular"], [0.5, -1.0]),
    ],
)
def test_the_sum_is_an_adapter_that_computes_what_its_parts_do(model, tmp_path, names, weights):
    inputs = dit_inputs()
    with torch.no_grad():
        expected = set_adapters(model, names, weights)(**inputs).sample
        combine_adapters(model, names, weights, "new")
        assert model._onelora.weights == {"new": 1.0}
        assert_rounded(model(**inputs).sample, expected, model)
        loaded = load_adapter(make_dit(), save_adapter(model, tmp_path, "new"))
        assert torch.equal(loaded(**inputs).sample, model(**inputs).sample)


def test_interpolation_takes_the_class_table_along(model):
    combine_adapters(model, ["food", "more_food"], [0.25, 0.75], "between")
    a, b, c = (adapter_state_dict(model, name) for name in ("food", "more_food", "between"))
    for key in c:
        assert_rounded(c[key], 0.25 * a[key] + 0.75 * b[key], terms=2)
    assert a.keys() == c.keys() and "class_embedding.weight" in c


@pytest.mark.parametrize(
    "names, weights, message",
    [
        (["food", "more_food"], [1.0, 1.0], "can only be averaged: .* weights that sum to 1, not 2"),
        (["food", "birds"], [0.5, 0.5], "can only be averaged: give adapters of the same classes"),
        (["sum", "random"], [0.5, 0.5], "compress in different ways"),
        (["sum", "two"], [0.5, 0.5], "compress in different ways"),
        (["two", "outputs"], [0.5, 0.5], "compress in different ways"),
        (["sum", "lora"], [0.5, 0.5], "'lora' trains more than vectors"),
        (["sum", "fish"], [0.5, 0.5], "'fish' is not in the list"),
        (["sum"], [0.5, 0.5], "1 adapter names .* but 2 weights"),
    ],
)
def test_sums_that_are_no_adapters_are_refused(model, names, weights, message):
    expected = model(**dit_inputs()).sample
    with pytest.raises(ValueError, match=message):
        combine_adapters(model, names, weights, "new")
    with pytest.raises(ValueError, match="'food' is already in use"):
        combine_adapters(model, ["food"], [1.0], "food")
    assert "new" not in model._onelora.adapters
    assert torch.equal(model(**dit_inputs()).sample, expected)
