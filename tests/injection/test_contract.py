"""A new method takes one file and one line in a table; all verbs serve it."""

import pytest
import torch
import toy_method
from rounding import assert_rounded
from tiny_models import make_dit, randomize

from onelora_diffusion import (
    AdapterConfig,
    adapter_state_dict,
    combine_adapters,
    count_trainable,
    disable_adapter,
    export_lora,
    inject_adapter,
    load_adapter,
    merge_adapter,
    route_adapters,
    save_adapter,
    set_adapters,
    unload_adapter,
    unmerge_adapter,
)
from onelora_diffusion.config import METHODS, Method


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(METHODS, "toy", Method(toy_method.build))
    return AdapterConfig(method="toy", num_classes=5)


def test_a_toy_method_has_every_verb(toy, inputs, tmp_path):
    model = make_dit()
    base_state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    base = model(**inputs).sample
    inject_adapter(model, toy)
    linears = sum(".norm1.emb." not in path for path, m in model.named_modules() if type(m) is torch.nn.Linear)
    assert count_trainable(model) == linears + 6 * 32
    assert {name.rsplit(".", 1)[1] for name in adapter_state_dict(model)} == {"onelora_c", "weight"}
    randomize(model)
    with torch.no_grad():
        expected = model(**inputs).sample
        assert not torch.allclose(expected, base, atol=1e-3)
        with disable_adapter(model):
            assert torch.equal(model(**inputs).sample, base)
        with route_adapters(model, ["default", None, "default"]):
            routed = model(**inputs).sample
        assert_rounded(routed, torch.stack([expected[0], base[1], expected[2]]), model)
        merge_adapter(model)
        assert_rounded(model(**inputs).sample, expected, model)
        unmerge_adapter(model)
        assert torch.equal(model(**inputs).sample, expected)
    save_adapter(model, tmp_path)
    other = load_adapter(make_dit(), tmp_path)
    assert torch.equal(other(**inputs).sample, expected)
    with pytest.raises(ValueError, match="'default' trains more than vectors at .*: it cannot be summed up"):
        combine_adapters(model, ["default"], [0.5], "half")
    with pytest.raises(ValueError, match="cannot be a LoRA: it is of method 'toy', it trains more than vectors"):
        export_lora(model, tmp_path / "lora")
    unload_adapter(model)
    assert all(torch.equal(tensor, base_state[key]) for key, tensor in model.state_dict().items())


def test_a_toy_method_serves_beside_vectors(toy, inputs):
    model = make_dit()
    for seed, (name, config) in enumerate({"toy": toy, "1lora": AdapterConfig()}.items()):
        randomize(inject_adapter(model, config, name), seed=seed)
    set_adapters(model, ["toy", "1lora"], [0.5, 2.0])
    layer, x = model.transformer_blocks[0].ff.net[2], torch.randn(3, 5, 128)
    with torch.no_grad():
        c, b = layer.onelora["toy"].c, layer.onelora["1lora"].b
        expected = (1 + 0.5 * c) * torch.nn.functional.linear(x, layer.weight, layer.bias)
        assert_rounded(layer(x), expected + 2 * x.sum(-1, keepdim=True) * b, terms=2 * 128)
