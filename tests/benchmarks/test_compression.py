"""benchmark.py compression: its directions, what they add, and all of it on a micro scale."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks.compression import (
    NAMES,
    CompressionSettings,
    FrozenDirections,
    compression,
    directions,
    share_of_gradient,
)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_directions_are_what_their_rules_say_and_of_one_scale(generator):
    # Inputs along e1 (RMS 2) and e2 (RMS 1); a gradient along e2 and, weaker, e3, where the inputs' RMS is 1/2.
    moments = torch.diag(torch.tensor([4.0, 1.0, 0.25, 0.25]))
    gradient = torch.zeros(3, 4)
    gradient[0, 1], gradient[1, 2] = 3.0, 1.0
    scale = 4**0.25
    found = {
        rule: directions(moments, gradient, rule, count, generator)
        for rule, count in (("sum", 1), ("inputs", 1), ("gradient", 2), ("random", 3))
    }
    torch.testing.assert_close(found["sum"], torch.full((1, 4), scale / 5.5**0.5))
    torch.testing.assert_close(found["inputs"].abs(), torch.tensor([[scale / 2, 0, 0, 0]]))
    torch.testing.assert_close(found["gradient"].abs(), torch.tensor([[0, scale, 0, 0], [0, 0, 2 * scale, 0]]))
    for chosen in found.values():
        rms = (chosen @ moments @ chosen.T).diagonal().sqrt()
        torch.testing.assert_close(rms, torch.full_like(rms, scale))
    shares = share_of_gradient(
        {
            "transformer_blocks.0.ff": (gradient, found["gradient"][:1]),
            "transformer_blocks.1.ff": (gradient, found["gradient"]),
            "out": (gradient, found["sum"]),
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


def test_all_of_it_and_again(tmp_path, capsys):
    settings = CompressionSettings(
        variants=("sum", "gradient-2", "lora-scaled", "difffit-scaled"),
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
    assert all(f"| {NAMES[name]} |" in capsys.readouterr().out for name in ["sum"])
    assert np.asarray(Image.open(tmp_path / "docs/compression.png")).std() > 5
    one, two = (first["variants"][name]["runs"][0] for name in ("sum", "gradient-2"))
    assert two["trained"] == 2 * one["trained"]
    assert all(two["share_of_gradient"][kind] > 0 for kind in one["share_of_gradient"])

    settings.steps = 3
    with pytest.raises(ValueError, match="was made with another steps: choose another --output-dir"):
        compression(settings)
    settings.variants = ("summ",)
    with pytest.raises(ValueError, match="--variants summ: choose of sum, sum-plain, gradient"):
        compression(settings)
