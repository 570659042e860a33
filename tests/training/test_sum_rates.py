"""Learning rates by the scale of the sum: what is measured, what Adam makes of it, and that a resume keeps it."""

import pytest
import torch
from tiny_models import make_dit
from torch import nn

from onelora_diffusion import AdapterConfig, adapter_state_dict, inject_adapter
from onelora_diffusion.adapters.compressions import random_directions
from onelora_diffusion.training.optimizers import make_optimizer
from onelora_diffusion.training.sum_rates import SumScales, divide_groups


def factors_of(model, run, accelerator):
    scales = SumScales(model, adapter_state_dict(model))
    with scales.watching():
        run()
    assert not any(seat._forward_pre_hooks for seat in scales.seats.values())
    return scales.factors(accelerator)


@pytest.mark.parametrize("value, factor", [(0.25, 0.5), (-0.125, 1.0), (0.17, 2**-0.5), (0.0, 1.0)])
def test_a_factor_is_the_fourth_root_of_the_inputs_over_the_rms_of_their_sum(accelerator, value, factor):
    # Of 16 inputs, all 0.25: the sum is 4, and 16^¼ / 4 = 0.5; all 0.17: 2 / 2.72, of which the next power is 2^-½.
    model = inject_adapter(nn.Sequential(nn.Linear(16, 3)), AdapterConfig())
    found = factors_of(model, lambda: model(torch.full((2, 5, 16), value)), accelerator)
    assert found == {"0.onelora_b": pytest.approx(factor)}


def test_passes_are_averaged_and_a_random_compression_is_measured_as_it_is(accelerator):
    model = inject_adapter(nn.Sequential(nn.Linear(16, 3)), AdapterConfig(compression="random", seed=3))
    inputs = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(0))
    found = factors_of(model, lambda: [model(x) for x in inputs], accelerator)
    rms = (inputs @ random_directions(3, 1, 16, torch.device("cpu"))[0]).square().mean().sqrt()
    assert abs(torch.tensor(found["0.onelora_b"]).log2() - (2 / rms).log2()) <= 0.2501  # to the nearest half


@pytest.mark.parametrize("compiled, fuse_qkv", [(False, False), (False, True), (True, False)])
def test_every_layer_of_a_dit_is_measured_on_its_own_input(accelerator, compiled, fuse_qkv):
    model = inject_adapter(make_dit(), AdapterConfig(num_classes=3, fuse_qkv=fuse_qkv))
    inputs = {}
    attention = model.transformer_blocks[1].attn1
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.update(x=(args or [kwargs["hidden_states"]])[0]), with_kwargs=True
    )
    if compiled:
        for block in model.transformer_blocks:
            block.compile(backend="eager")
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4, 4, 8, 8, generator=generator)

    def run():
        return model(latents, timestep=torch.arange(4) * 200, class_labels=torch.arange(4))

    found = factors_of(model, run, accelerator)
    vectors = {name for name in adapter_state_dict(model) if name.endswith("onelora_b")}
    assert found.keys() == vectors and all(factor > 0 for factor in found.values())
    rms = inputs["x"].detach().sum(-1).square().mean().sqrt()
    expected = 2 ** (round(2 * float((inputs["x"].shape[-1] ** 0.25 / rms).log2())) / 2)
    names = ("to_q", "to_k", "to_v")
    assert [found[f"transformer_blocks.1.attn1.{name}.onelora_b"] for name in names] == [expected] * 3


@pytest.mark.parametrize("name", ["adamw", "schedule-free"])
def test_a_first_update_moves_each_vector_by_its_own_rate(name):
    if name == "schedule-free":
        pytest.importorskip("schedulefree")
    names = ("a.onelora_b", "b.onelora_b", "c.onelora_beta", "class_embedding.weight")
    trained = {name: nn.Parameter(torch.zeros(4)) for name in names}
    optimizer = make_optimizer(name, trained, 1e-3, 1e-1)
    divide_groups(optimizer, trained, {"a.onelora_b": 4.0, "b.onelora_b": 0.5})
    for tensor in trained.values():
        tensor.grad = torch.tensor([1.0, -2.0, 3.0, -4.0])
    optimizer.step()
    for tensor, rate in zip(trained.values(), (4e-3, 5e-4, 1e-3, 1e-1), strict=True):
        torch.testing.assert_close(tensor.detach(), -rate * torch.tensor([1.0, -1, 1, -1]), rtol=1e-5, atol=0)
    assert [group["peak_lr"] for group in optimizer.param_groups] == pytest.approx([5e-4, 1e-3, 4e-3, 1e-1])


def test_without_a_sum_nothing_is_changed_and_it_is_said(accelerator):
    model = inject_adapter(nn.Sequential(nn.Linear(16, 3)), AdapterConfig("bitfit"))
    assert factors_of(model, lambda: model(torch.ones(2, 16)), accelerator) == {}
    assert SumScales.in_words({}) == "rates by the sum: no layer has one, all learn at their plain rates"
