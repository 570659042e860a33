import pytest
import torch
from rounding import assert_rounded
from tiny_models import dit_inputs, make_dit, randomize

from onelora_diffusion import (
    AdapterConfig,
    adapter_state_dict,
    count_trainable,
    inject_adapter,
    load_adapter,
    save_adapter,
)
from onelora_diffusion.adapters.compressions import leading_directions


def test_leading_directions_by_hand():
    """Of diag(1, 2) the start is (1, 2), and each of six rounds multiplies it by 1 and 2² and scales it."""
    weight = torch.diag(torch.tensor([1.0, 2.0]))
    first = torch.tensor([1.0, 2.0**13])
    torch.testing.assert_close(leading_directions(weight, 1), (first / first.norm())[None])
    assert leading_directions(torch.zeros(3, 4), 2).isfinite().all()


def test_leading_directions_span_what_a_layer_amplifies_most_and_follow_its_rounding():
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, 16))[0] for size in (24, 20))
    weight = left @ torch.diag(torch.tensor([9.0, 8.0, 7.0] + [1.0] * 13)) @ right.T
    found = leading_directions(weight, 3)
    torch.testing.assert_close(found @ found.T, torch.eye(3))
    torch.testing.assert_close((found @ right[:, :3]).square().sum(), torch.tensor(3.0), atol=1e-4, rtol=0)
    step = weight.abs().max() / 127
    moved = leading_directions((weight / step).round() * step, 3) - found
    assert moved.norm(dim=1).max() < 0.05


def test_a_model_that_comes_from_the_meta_device_has_directions_of_its_weights():
    layer, expected = torch.nn.Sequential(torch.nn.Linear(5, 4)), torch.nn.Linear(5, 4)
    model = inject_adapter(layer.to("meta"), AdapterConfig(compression="singular", rank=2, targets=("0",)))
    assert count_trainable(model) == 2 * 4
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(layer[0], name).copy_(getattr(expected, name))
    randomize(model)
    x, b = torch.randn(3, 5), adapter_state_dict(model)["0.onelora_b"]
    directions = leading_directions(expected.weight, 2)
    assert_rounded(model(x), expected(x) + x @ directions.T @ b, terms=20)


def test_directions_of_another_base_are_refused_and_those_of_a_rounded_one_serve(tmp_path):
    """No file stores them: its sketch tells how far they are from where the adapter was trained."""
    model, inputs = randomize(inject_adapter(make_dit(), AdapterConfig(compression="singular", rank=2))), dit_inputs()
    path, expected = save_adapter(model, tmp_path), model(**inputs).sample
    rounded, other = make_dit().bfloat16(), make_dit()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn_like(parameter) * parameter.std())
        before = other(**inputs).sample
        with pytest.raises(ValueError, match=r"trained along the leading directions of other weights.* 1\.\d\d away"):
            load_adapter(other, path)
        assert torch.equal(other(**inputs).sample, before)
        inputs["hidden_states"] = inputs["hidden_states"].bfloat16()
        assert_rounded(load_adapter(rounded, path)(**inputs).sample, expected, rounded)


def test_directions_of_the_miniature_move_as_its_weights_are_rounded():
    """docs/methods.md: the distance of four directions of a layer, in the root mean square."""
    from onelora_diffusion.injection.layers import target_layers
    from onelora_diffusion.pipelines.base import load_base

    def quantised(weight, steps, group):
        groups = weight.reshape(len(weight), -1, group)
        step = groups.abs().amax(-1, keepdim=True) / steps
        return ((groups / step).round() * step).reshape(weight.shape)

    weights = [layer.weight.detach() for layer in target_layers(load_base(None).transformer, None).values()]
    rounded = {
        "bfloat16": (lambda weight: weight.bfloat16().float(), 0.02),
        "int8": (lambda weight: quantised(weight, 127, weight.shape[1]), 0.03),
        "int4": (lambda weight: quantised(weight, 7, 32), 0.23),
    }
    for name, (change, documented) in rounded.items():
        moved = [(leading_directions(change(weight), 4) - leading_directions(weight, 4)).norm() for weight in weights]
        distance = torch.stack(moved).square().mean().sqrt().item() / 2  # of four directions of length 1
        assert distance == pytest.approx(documented, rel=0.5), name
