"""Layers that look like ours and are the base's, and layers of PEFT's that are there already."""

import copy
import logging

import pytest
import torch
from rounding import assert_rounded
from tiny_models import dit_inputs, flux, make_dit, randomize
from torch import nn

from onelora_diffusion import (
    AdapterConfig,
    adapter_state_dict,
    inject_adapter,
    load_adapter,
    merge_adapter,
    save_adapter,
    stock_state_dict,
    unload_adapter,
)
from onelora_diffusion.injection.book import fingerprint


class Attention(nn.Module):
    """As Stable Audio 3's: one layer for q, k and v from the start, under the name that fusing gives to its copy."""

    def __init__(self):
        super().__init__()
        self.to_qkv, self.to_out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        query, key, value = self.to_qkv(x).chunk(3, -1)
        return self.to_out(nn.functional.scaled_dot_product_attention(query, key, value))


def folded(model, adapted):
    """`model` with the vectors of `adapted` in its weights, by the formula W + b 1ᵀ."""
    for name, b in adapter_state_dict(adapted).items():
        model.get_submodule(name.removesuffix(".onelora_b")).weight.data += b.detach().unsqueeze(1)
    return model


def test_a_base_that_has_a_layer_called_to_qkv(tmp_path):
    torch.manual_seed(0)
    base, x = nn.Sequential(Attention(), Attention()), torch.randn(2, 5, 8)
    model = randomize(inject_adapter(copy.deepcopy(base), AdapterConfig()))
    trained = adapter_state_dict(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{path}.onelora.default.b" for path in ("0.to_qkv", "0.to_out", "1.to_qkv", "1.to_out")
    }
    assert set(trained) == {f"{path}.onelora_b" for path in ("0.to_qkv", "0.to_out", "1.to_qkv", "1.to_out")}
    expected = folded(copy.deepcopy(base), model)
    assert_rounded(model(x), expected(x), expected)
    again = load_adapter(copy.deepcopy(base), save_adapter(model, tmp_path))
    assert torch.equal(again(x), model(x))
    assert stock_state_dict(model).keys() == base.state_dict().keys()
    merge_adapter(model)
    stock = stock_state_dict(model)
    assert all(torch.equal(tensor, expected.state_dict()[key]) for key, tensor in stock.items())
    assert stock.keys() == base.state_dict().keys()
    unload_adapter(model)
    assert all(torch.equal(tensor, base.state_dict()[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("method", ["1lora", "full"])
def test_a_base_that_was_fused_before(method, caplog):
    torch.manual_seed(0)
    base, inputs = flux()
    plain = fingerprint(base)
    base.fuse_qkv_projections()
    model = randomize(inject_adapter(copy.deepcopy(base), AdapterConfig(method)), scale=0.01)
    assert model._onelora.fingerprint == plain
    attn = "transformer_blocks.0.attn"
    names = {name.rpartition(".")[0] for name in adapter_state_dict(model)}
    assert {f"{attn}.to_qkv", f"{attn}.to_added_qkv", "single_transformer_blocks.0.attn.to_qkv"} <= names
    assert names.isdisjoint({f"{attn}.{name}" for name in ("to_q", "to_k", "to_v", "add_q_proj")})
    with caplog.at_level(logging.WARNING):
        model(**inputs).sample.square().mean().backward()
    assert not caplog.records
    assert all(p.grad is not None for p in adapter_state_dict(model).values())
    assert not any(p.requires_grad for name, p in base.named_parameters() if "onelora" in name)
    if method == "1lora":
        expected = folded(copy.deepcopy(base), model)
        assert_rounded(model(**inputs).sample, expected(**inputs).sample, expected)
        with pytest.raises(ValueError, match=r"to_qkv was copied into a fused projection: unfuse_qkv_projections\(\)"):
            merge_adapter(model)
        model.unfuse_qkv_projections()
        with pytest.raises(ValueError, match="to_added_qkv|to_qkv"):
            model(**inputs)


def test_layers_that_a_fused_copy_computes_for_are_no_targets():
    model, _ = flux()
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"to_q takes no part while q, k and v are fused: unfuse_qkv_projections\(\)"):
        inject_adapter(model, AdapterConfig(targets=("to_q",)))
    inject_adapter(model, AdapterConfig(targets=("transformer_blocks.*",)))
    assert not any(name.endswith(".to_k.onelora_b") for name in adapter_state_dict(model))


@pytest.mark.parametrize("config", [AdapterConfig(), AdapterConfig("lora", fuse_qkv=True)])
def test_a_dit_that_was_fused_before_keeps_its_copy(config, tmp_path):
    """Its q, k and v are served on the parts of the fused product, so that a file is the same either way."""
    inputs, base = dit_inputs(), make_dit()
    file = save_adapter(randomize(inject_adapter(make_dit(), config)), tmp_path)
    expected = load_adapter(make_dit(), file)(**inputs).sample
    for block in base.transformer_blocks:
        block.attn1.fuse_projections()
    before = base.state_dict().keys()
    load_adapter(base, file)
    assert not any(p.requires_grad for name, p in base.named_parameters() if "onelora" not in name)
    assert_rounded(base(**inputs).sample, expected, base)
    unload_adapter(base)
    assert base.state_dict().keys() == before
    assert base.transformer_blocks[0].attn1.fused_projections


def with_peft(model, names):
    from peft import LoraConfig, inject_adapter_in_model

    return inject_adapter_in_model(LoraConfig(r=2, target_modules=names, init_lora_weights=False), model, "style")


@pytest.mark.parametrize("method", ["1lora", "lora", "mora6"])
def test_layers_of_peft_are_served_as_the_layers_they_are_around(method, tmp_path):
    torch.manual_seed(0)
    base, inputs = flux()
    file = save_adapter(randomize(inject_adapter(copy.deepcopy(base), AdapterConfig(method))), tmp_path)
    styled = with_peft(base, ["to_q", "to_k"])
    expected = copy.deepcopy(styled)
    load_adapter(styled, file)
    paths = {name.partition(".onelora_")[0] for name in adapter_state_dict(styled)}
    assert not any("base_layer" in path or "lora_" in path for path in paths)
    q, k = (f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k"))
    assert {q, k} <= paths
    assert not any(
        p.requires_grad for name, p in styled.named_parameters() if ".lora_" in name and "onelora" not in name
    )
    if method == "1lora":
        for name, b in adapter_state_dict(styled).items():
            layer = expected.get_submodule(name.removesuffix(".onelora_b"))
            getattr(layer, "base_layer", layer).weight.data += b.detach().unsqueeze(1)
        assert_rounded(styled(**inputs).sample, expected(**inputs).sample, expected)
    with pytest.raises(ValueError, match="to_q has an adapter of PEFT's as well: merge or unload that first"):
        merge_adapter(styled)
    new = inject_adapter(styled, AdapterConfig(method), "new")
    assert {name.partition(".onelora_")[0] for name in adapter_state_dict(new, "new")} == paths
    with pytest.raises(ValueError, match="full trains the base's own layers, but PEFT has an adapter at"):
        inject_adapter(styled, AdapterConfig("full"), "full")


def test_a_lora_of_diffusers_is_read_beside_peft_layers(tmp_path):
    from safetensors.torch import load_file

    from onelora_diffusion import export_lora
    from onelora_diffusion.storage.lora import import_foreign

    torch.manual_seed(0)
    base, _ = flux()
    own = randomize(inject_adapter(copy.deepcopy(base), AdapterConfig()))
    export_lora(own, tmp_path)
    read = import_foreign(
        with_peft(base, ["to_q"]), load_file(tmp_path / "pytorch_lora_weights.safetensors"), {}, "file"
    )
    for name, b in adapter_state_dict(own).items():
        assert torch.equal(read.tensors[name], b)


def test_fusing_for_an_adapter_would_pass_over_one_of_peft():
    model = with_peft(make_dit(), ["to_q"])
    with pytest.raises(ValueError, match="fuse_qkv would pass over PEFT's adapter in transformer_blocks.0.attn1"):
        inject_adapter(model, AdapterConfig("lora", fuse_qkv=True))
