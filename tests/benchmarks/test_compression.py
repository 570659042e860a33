"""benchmark.py compression: its directions, what they add, and all of it on a micro scale."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks.compression import VARIANTS, CompressionSettings, compression
from benchmarks.directions import FrozenDirections, PrincipalStart, Seen, directions, share_of_gradient
from onelora_diffusion.adapters.compressions import groups


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_directions_are_what_their_rules_say_and_of_one_scale(generator):
    # Inputs along e1 (RMS 2) and e2 (RMS 1); a gradient along e2 and, weaker, e3, where the inputs' RMS is 1/2.
    moments = torch.diag(torch.tensor([4.0, 1.0, 0.25, 0.25]))
    gradient = torch.zeros(3, 4)
    gradient[0, 1], gradient[1, 2] = 3.0, 1.0
    weight = torch.diag(torch.tensor([1.0, 2.0, 3.0, 9.0]))[:3]  # its singular vectors are the axes
    seen, scale = Seen(weight, moments, gradient, generator), 4**0.25

    def found_by(rule, count, scale="rms"):
        return directions(seen, rule, count, scale)

    rules = {"inputs' sums": 1, "inputs": 1, "gradient": 2, "random": 3, "singular vectors": 2, "outputs' sums": 2}
    found = {rule: found_by(rule, count) for rule, count in rules.items()}
    e1, e2, e3 = scale / 2 * torch.eye(4)[0], scale * torch.eye(4)[1], 2 * scale * torch.eye(4)[2]  # of that RMS
    torch.testing.assert_close(found["inputs' sums"], torch.full((1, 4), scale / 5.5**0.5))
    torch.testing.assert_close(found["inputs"].abs(), e1[None])
    torch.testing.assert_close(found["gradient"].abs(), torch.stack([e2, e3]))
    torch.testing.assert_close(found["singular vectors"].abs(), torch.stack([e3, e2]))
    torch.testing.assert_close(found["outputs' sums"][1], e2)
    for chosen in found.values():
        rms = (chosen @ moments @ chosen.T).diagonal().sqrt()
        torch.testing.assert_close(rms, torch.full_like(rms, scale))
    torch.testing.assert_close(found_by("outputs' sums", 2, "none"), groups(2, 3, weight.device) @ weight)
    torch.testing.assert_close(found_by("singular vectors", 2, "sigma").abs().sum(1), torch.tensor([3.0, 2.0]))
    together = found_by("gradient", 2, "layer")  # their squares are 1 and 1/4 before
    torch.testing.assert_close(together[0].norm(), together[1].norm())
    torch.testing.assert_close((together @ moments @ together.T).diagonal().mean().sqrt(), torch.tensor(scale))
    shares = share_of_gradient(
        {
            "transformer_blocks.0.ff": (gradient, found["gradient"][:1]),
            "transformer_blocks.1.ff": (gradient, found["gradient"]),
            "out": (gradient, found["inputs' sums"]),
        }
    )
    assert shares == {"ff": pytest.approx((0.9 + 1) / 2), "out": pytest.approx(0.25)}


def test_frozen_directions_add_what_they_read(generator):
    linear = nn.Linear(4, 3)
    x = torch.randn(2, 5, 4, generator=generator)
    frozen = FrozenDirections(linear, 2)
    frozen.directions.copy_(torch.tensor([[1.0, 1, 1, 1], [0, 2, 0, 0]]))
    assert torch.equal(frozen(x, linear(x)), linear(x))
    with torch.no_grad():
        frozen.b.copy_(torch.tensor([[1.0, 0], [0, 1], [0, 0]]))
    expected = linear(x) + torch.stack([x.sum(-1), 2 * x[..., 1], torch.zeros(2, 5)], -1)
    torch.testing.assert_close(frozen(x, linear(x)), expected)
    weight, bias = frozen.merged(linear.weight, linear.bias)
    torch.testing.assert_close(nn.functional.linear(x, weight, bias), expected)


def test_pissa_starts_at_the_base_and_trains_its_leading_part(generator):
    linear, x = nn.Linear(4, 3), torch.randn(2, 5, 4, generator=generator)
    adapter = PrincipalStart(linear, 1)
    torch.testing.assert_close(adapter(x, linear(x)), linear(x))
    with torch.no_grad():
        adapter.b.zero_()  # what is left is W0 without its largest singular value
    weight, bias = adapter.merged(linear.weight, linear.bias)
    torch.testing.assert_close(adapter(x, linear(x)), nn.functional.linear(x, weight, bias))
    left = torch.linalg.svdvals(weight.detach())
    torch.testing.assert_close(left[:2], torch.linalg.svdvals(linear.weight.detach())[1:])


def test_all_of_it_and_again(tmp_path, capsys):
    settings = CompressionSettings(
        variants=("sum", "gradient-2", "singular-2", "lora-scaled", "lora-fa-4", "difffit-scaled"),
        seeds=(0, 1),
        steps=2,
        rates=(1e-3,),
        measured_batches=1,
        num_images=4,
        output_dir=tmp_path / "runs",
        report_dir=tmp_path / "docs",
        cache_dir=tmp_path / "cache",
    )
    first = compression(settings)
    assert compression(settings)["variants"] == first["variants"]  # nothing is run again
    assert json.loads((tmp_path / "docs/compression.json").read_text())["variants"] == first["variants"]
    assert all(f"| {VARIANTS[name].label} |" in capsys.readouterr().out for name in ["sum"])
    assert np.asarray(Image.open(tmp_path / "docs/compression.png")).std() > 5
    one, two = (first["variants"][name]["runs"][0] for name in ("sum", "gradient-2"))
    assert two["trained"] == 2 * one["trained"]
    assert all(two["share_of_gradient"][kind] > 0 for kind in one["share_of_gradient"])

    settings.steps = 3
    with pytest.raises(ValueError, match="was made with another steps: choose another --output-dir"):
        compression(settings)
    settings.variants = ("summ",)
    with pytest.raises(ValueError, match="--variants summ: choose of kinds, base, or of sum, sum-plain, sum-2"):
        compression(settings)
