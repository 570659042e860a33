"""A checkpoint of version 0.1 goes on as it would have there.

`tests/fixtures/checkpoint-0.1` was written by version 0.1 with `RUN`'s settings, on the base and the images beside it;
`six-steps.safetensors` is what the checkpoint of step 6 held, and metrics.jsonl its lines.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from onelora_diffusion.cli.train_dit import main
from onelora_diffusion.training.settings import Settings

FIXTURE = Path(__file__).parents[1] / "fixtures" / "checkpoint-0.1"
RUN = dict(
    base="base",
    dataset="imagefolder",
    data_root="images",
    eval_features="pixels",
    targets=("ff.net.2", "proj_out_1"),
    max_steps=6,
    batch_size=4,
    learning_rate=1e-2,
    ema_decay=(0.9, 0.99),
    log_every=2,
    checkpoint_every=3,
    sample_every=0,
    eval_every=2,
    eval_images=4,
    eval_steps=2,
)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_checkpoint_of_the_version_before_goes_on_as_it_did_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(FIXTURE)  # the base and the images are named as they were there
    run = tmp_path / "run"
    shutil.copytree(FIXTURE / "step-00000003", run / "checkpoints/step-00000003")
    shutil.copy(FIXTURE / "metrics.jsonl", run)
    assert main(Settings(output_dir=run, **RUN)) == 0
    assert "step-00000003 does not say which data it was trained on: it goes on with 12 images of" in (
        capsys.readouterr().out
    )

    found, expected = (
        load_file(run / "checkpoints/step-00000006.safetensors"),
        load_file(FIXTURE / "six-steps.safetensors"),
    )
    assert found.keys() == expected.keys()
    for name in expected:
        # Adam moves a value by 0.01 an update, whatever the size of its gradient; the rest is another machine's sums.
        assert torch.allclose(found[name], expected[name], rtol=1e-3, atol=1e-4), name
    ours, theirs = lines_of(run / "metrics.jsonl"), lines_of(FIXTURE / "metrics.jsonl")
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == [2, 2, 4, 4, 6, 6]
    for our, their in zip(ours, theirs, strict=True):
        for name in {"loss", "mse", "vb", "distance"} & their.keys():
            assert our[name] == pytest.approx(their[name], rel=1e-3)
    seconds_before = json.loads((FIXTURE / "step-00000003/state.json").read_text())["seconds"]
    assert seconds_before < ours[-1]["seconds"] < seconds_before + 600
