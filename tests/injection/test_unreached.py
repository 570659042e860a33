"""Layers whose forward is never called, or whose weight belongs to others as well."""

import logging

import pytest
import torch
from rounding import assert_rounded
from tiny_models import make_dit, randomize, sd3
from torch import nn

from onelora_diffusion import AdapterConfig, inject_adapter, merge_adapter, unload_adapter


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Linear(8, 8)

    def forward(self, x):
        return self.mlp(self.attention(x, x, x, need_weights=False)[0])


def test_the_output_projection_of_multihead_attention_is_left_out_and_said(caplog):
    with caplog.at_level(logging.WARNING):
        model = inject_adapter(Attending(), AdapterConfig())
    assert [name for name, _ in model.named_parameters() if "onelora" in name] == ["mlp.onelora.default.b"]
    assert "attention.out_proj" in caplog.text
    with pytest.raises(ValueError, match="attention.out_proj cannot be adapted: torch.nn.MultiheadAttention reads"):
        inject_adapter(Attending(), AdapterConfig(targets=("out_proj",)))


class Skipping(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.first(x) + x @ self.second.weight


def test_a_layer_that_takes_no_part_in_a_forward_pass_is_named_once(caplog):
    model = inject_adapter(Skipping(), AdapterConfig())
    with caplog.at_level(logging.WARNING):
        model(torch.randn(2, 4))
        model(torch.randn(2, 4))
    assert [record.getMessage() for record in caplog.records] == [
        "second took no part in this forward pass, so that the adapter which serves it has no effect there"
    ]


def test_a_compiled_block_counts_as_reached(caplog):
    model = inject_adapter(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), AdapterConfig())
    model[0].compile(backend="eager")
    with caplog.at_level(logging.WARNING):
        model(torch.randn(2, 4))
    assert not caplog.records


class Decorated(nn.Module):
    """A block whose forward is compiled by a decorator, as LightningDiT's is."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    @torch.compile(backend="eager")
    def forward(self, x):
        return self.second(self.first(x))


class DecoratedInPart(Decorated):
    @torch.compile(backend="eager")
    def half(self, x):
        return self.first(x)

    def forward(self, x):
        return self.second(self.half(x))


class Assigned(Decorated):
    def __init__(self):
        super().__init__()
        self.forward = torch.compile(self.plain, backend="eager")

    def plain(self, x):
        return self.second(self.first(x))


@pytest.mark.parametrize("block", [Decorated, DecoratedInPart, Assigned])
def test_layers_in_a_compiled_method_count_as_reached(block, caplog):
    torch.manual_seed(0)
    model, x = nn.Sequential(block()), torch.randn(2, 4)
    base = model(x)
    randomize(inject_adapter(model, AdapterConfig(targets=("first", "second"))))
    with caplog.at_level(logging.WARNING, "onelora_diffusion"):
        adapted = model(x)
    assert "took no part" not in caplog.text and not torch.equal(adapted, base)


def test_projections_that_were_fused_afterwards_are_an_error_that_names_the_layer():
    model, inputs = sd3()
    randomize(inject_adapter(model, AdapterConfig(targets=("to_q", "to_k", "to_v"))))
    expected = model(**inputs).sample
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"attn.to_q was fused with others .*unfuse_qkv_projections\(\)"):
        model(**inputs)
    with pytest.raises(ValueError, match=r"attn.to_q was copied into a fused projection: unfuse_qkv_projections\(\)"):
        merge_adapter(model)
    model.unfuse_qkv_projections()
    assert torch.equal(model(**inputs).sample, expected)


def test_a_dit_whose_projections_were_fused_afterwards_keeps_its_adapter(inputs):
    model = make_dit()
    randomize(inject_adapter(model, AdapterConfig()))
    expected = model(**inputs).sample
    for block in model.transformer_blocks:
        block.attn1.fuse_projections()
    assert_rounded(model(**inputs).sample, expected, model)
    with pytest.raises(ValueError, match="was copied into a fused projection"):
        merge_adapter(model)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.output = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, x):
        return self.output(self.embedding(x))


def test_merging_a_tied_weight_is_refused_with_nothing_changed():
    model = randomize(inject_adapter(Tied(), AdapterConfig(targets=("output",))))
    x = torch.arange(6)
    expected = model(x)
    with pytest.raises(ValueError, match="output shares its weight with embedding"):
        merge_adapter(model)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    "normalised",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.spectral_norm,
    ],
)
def test_merging_a_computed_weight_is_refused(normalised):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), normalised(nn.Linear(4, 4))).eval()
    base = model(torch.ones(2, 4))
    randomize(inject_adapter(model, AdapterConfig()))
    expected = model(torch.ones(2, 4))
    assert not torch.equal(base, expected)
    with pytest.raises(ValueError, match="1 has a weight that is computed from others"):
        merge_adapter(model)
    assert torch.equal(model(torch.ones(2, 4)), expected)
    unload_adapter(model)
    assert torch.equal(model(torch.ones(2, 4)), base)


class Activated(nn.Linear):
    """A linear layer that ends in an activation, whose backward reads the layer's output."""

    def forward(self, x):
        return super().forward(x).sigmoid()


def gradients_of(model, x, b):
    x = x.clone().requires_grad_()
    model(x).square().sum().backward()
    return x.grad, b.grad


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)])
@pytest.mark.parametrize("parts", [{}, {"sum": False, "bias": True}])
def test_gradients_behind_an_output_that_something_saved(shape, parts):
    torch.manual_seed(0)
    x, layer = torch.randn(shape), Activated(4, 5)
    model = inject_adapter(nn.Sequential(layer), AdapterConfig(targets=("0",), **parts))
    vector = randomize(model)[0].onelora["default"]
    b = vector.beta if parts else vector.b
    grad_x, grad_b = gradients_of(model, x, b)

    ours = x.clone().requires_grad_()
    free = b.detach().clone().requires_grad_()
    term = free if parts else ours.sum(-1, keepdim=True) * free
    (nn.functional.linear(ours, layer.weight, layer.bias).sigmoid() + term).square().sum().backward()
    assert_rounded(grad_x, ours.grad, terms=4 * 5 * 6)  # features in and out, and tokens
    assert_rounded(grad_b, free.grad, terms=4 * 5 * 6)


def test_gradients_beside_an_earlier_hook_that_saved_the_output():
    torch.manual_seed(0)
    model, x, kept = nn.Sequential(nn.Linear(4, 5)), torch.randn(2, 3, 4), []
    model[0].register_forward_hook(lambda module, args, out: kept.append(out.square().sum()))
    inject_adapter(model, AdapterConfig(targets=("0",)))
    b = randomize(model)[0].onelora["default"].b
    ours = x.clone().requires_grad_()
    (model(ours).sum() + kept.pop()).backward()

    plain, free = x.clone().requires_grad_(), b.detach().clone().requires_grad_()
    out = nn.functional.linear(plain, model[0].weight, model[0].bias)
    (out.square().sum() + (out + plain.sum(-1, keepdim=True) * free).sum()).backward()
    assert_rounded(ours.grad, plain.grad, terms=4 * 5 * 6)
    assert_rounded(b.grad, free.grad, terms=4 * 5 * 6)
