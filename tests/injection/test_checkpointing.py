"""Blocks that are computed again in the backward pass, reentrantly or not."""

import pytest
import torch
from rounding import assert_rounded
from tiny_models import randomize
from torch import nn
from torch.utils.checkpoint import checkpoint

from onelora_diffusion import AdapterConfig, adapter_state_dict, inject_adapter


class Model(nn.Module):
    def __init__(self, use_reentrant: bool | None):
        super().__init__()
        self.embedding, self.use_reentrant = nn.Linear(4, 6), use_reentrant
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.GELU()) for _ in range(2))

    def forward(self, x):
        x = self.embedding(x)
        for block in self.blocks:
            again = self.use_reentrant is not None
            x = checkpoint(block, x, use_reentrant=self.use_reentrant) if again else block(x)
        return x


def make_model(use_reentrant, targets=None):
    torch.manual_seed(0)
    return randomize(inject_adapter(Model(use_reentrant), AdapterConfig(targets=targets)))


def gradients(model, x):
    model(x).square().sum().backward()
    return {name: b.grad for name, b in adapter_state_dict(model).items()}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_every_vector_gets_the_gradient_of_a_plain_pass(use_reentrant):
    x = torch.randn(3, 4)
    plain = gradients(make_model(None), x)
    for name, gradient in gradients(make_model(use_reentrant), x).items():
        assert_rounded(gradient, plain[name], terms=3 * 6 * 6)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_blocks_whose_inputs_need_no_gradient_are_refused():
    x, targets = torch.randn(3, 4), ("blocks.*",)
    model = make_model(True, targets)
    with pytest.raises(ValueError, match=r"blocks.0.0 would get no gradients: reentrant .* use_reentrant=False"):
        model(x)
    with torch.no_grad():
        expected = model(x)
    plain = gradients(make_model(None, targets), x)
    model.embedding.register_forward_hook(lambda module, args, out: out.requires_grad_())
    for name, gradient in gradients(model, x).items():
        assert_rounded(gradient, plain[name], terms=3 * 6 * 6)
    model.requires_grad_(False)
    assert torch.equal(model(x), expected)
