"""Adapters on bases whose weights a quantisation has packed: torchao, quanto, bitsandbytes, GGUF."""

import itertools

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
    save_adapter,
    unload_adapter,
)
from onelora_diffusion.adapters.compressions import leading_directions


def package(name):
    """A quantisation's package, or a skip: `make test-quantised` installs them all."""
    return pytest.importorskip(name, reason=f"{name} is not installed: make test-quantised")


def replace_linears(model, quantised):
    """Puts `quantised(linear)` in the place of every linear layer."""
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, quantised(module))
    return model


def torchao_int8(model):
    torchao = package("torchao.quantization")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model


def quanto_int8(model):
    quanto = package("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    return model


def bitsandbytes_int8(model):
    bitsandbytes = package("bitsandbytes")

    def quantised(linear):
        layer = bitsandbytes.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
        layer.weight = bitsandbytes.nn.Int8Params(
            linear.weight.detach().clone(), requires_grad=False, has_fp16_weights=False
        )
        layer.bias = linear.bias
        return layer

    return replace_linears(model, quantised).to("cpu")


def bitsandbytes_nf4(model):
    bitsandbytes = package("bitsandbytes")

    def quantised(linear):
        layer = bitsandbytes.nn.Linear4bit(linear.in_features, linear.out_features, quant_type="nf4")
        layer.weight = bitsandbytes.nn.Params4bit(
            linear.weight.detach().clone(), requires_grad=False, quant_type="nf4"
        )
        layer.bias = linear.bias
        return layer

    return replace_linears(model, quantised).to("cpu")


def gguf_q8(model):
    gguf = package("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType.Q8_0

    def quantised(linear):
        layer = GGUFLinear(linear.in_features, linear.out_features, compute_dtype=torch.float32)
        packed = torch.from_numpy(gguf.quants.quantize(linear.weight.detach().numpy(), kind))
        layer.weight, layer.bias = GGUFParameter(packed, quant_type=kind), linear.bias
        return layer

    return replace_linears(model, quantised)


QUANTISATIONS = [torchao_int8, quanto_int8, bitsandbytes_int8, bitsandbytes_nf4, gguf_q8]
quantisations = pytest.mark.parametrize("quantised", QUANTISATIONS)


COMPRESSED = {  # C x, of a layer's input, of its output without bias, and of its weight as it computes with it
    "sum": lambda x, out, weight: x.sum(-1, keepdim=True),
    "outputs": lambda x, out, weight: out.sum(-1, keepdim=True),
    "singular": lambda x, out, weight: x @ leading_directions(weight, 1).T,
}


@quantisations
@pytest.mark.parametrize("compression", COMPRESSED)
def test_trains_and_serves_beside_the_packed_weights(quantised, compression, inputs):
    model = quantised(make_dit()).requires_grad_(False)
    layer = model.transformer_blocks[0].ff.net[2]
    x = torch.randn(3, 5, layer.in_features)
    base, base_layer, weight = model(**inputs).sample, layer(x), (layer(torch.eye(layer.in_features)) - layer.bias).T
    inject_adapter(model, AdapterConfig(num_classes=5, compression=compression))
    b = randomize(model).get_parameter("transformer_blocks.0.ff.net.2.onelora.default.b")
    added = COMPRESSED[compression](x, base_layer - layer.bias, weight) * b
    assert_rounded(layer(x), base_layer + added, terms=2 * 128)
    model(**inputs).sample.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in adapter_state_dict(model).values())
    unload_adapter(model)
    assert torch.equal(model(**inputs).sample, base)


@quantisations
def test_an_adapter_fits_the_base_and_its_quantised_self_alike(quantised, tmp_path):
    full, packed = make_dit(), quantised(make_dit())
    configs = AdapterConfig(num_classes=5), AdapterConfig(compression="singular", rank=2)
    for (here, there), config in itertools.product(((full, packed), (packed, full)), configs):
        randomize(inject_adapter(here, config))
        save_adapter(here, tmp_path)
        load_adapter(there, tmp_path)
        for name, tensor in adapter_state_dict(here).items():
            assert torch.equal(tensor, adapter_state_dict(there)[name])
        unload_adapter(here)
        unload_adapter(there)


@quantisations
def test_merging_is_refused_with_what_to_do(quantised, inputs):
    model = quantised(make_dit()).requires_grad_(False)
    randomize(inject_adapter(model, AdapterConfig(), "a"))
    with torch.no_grad():
        expected = model(**inputs).sample
        with pytest.raises(ValueError, match="is quantised: serve adapters unmerged, or merge into the unq"):
            merge_adapter(model)
        assert torch.equal(model(**inputs).sample, expected)


@pytest.mark.parametrize("quantised", QUANTISATIONS[1:])
def test_quantising_after_injection_is_said_at_the_next_call(quantised):
    model = inject_adapter(make_dit(), AdapterConfig())
    quantised(model)
    with pytest.raises(ValueError, match="was replaced after its adapter was attached"):
        model(**dit_inputs())
    unload_adapter(model)
    model(**dit_inputs())  # a base that runs


def test_torchao_quantises_in_place_and_keeps_adapters():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
    randomize(inject_adapter(model, AdapterConfig(targets=("0", "2"))))
    x = torch.randn(4, 32)
    with torch.no_grad():
        b = model[0].onelora["default"].b
        weight = model[0].weight.clone()
        adapted = nn.functional.linear(x, weight, model[0].bias) + x.sum(1, keepdim=True) * b
        torchao_int8(model)
        # Each weight is off by half a step, of 127 up to its row's largest; 1 % more for the rounding of sums.
        off = x.abs().sum(1, keepdim=True) * weight.abs().amax(1) / 127 / 2
        assert ((model[0](x) - adapted).abs() <= 1.01 * off).all()
