import json
import sys
from pathlib import Path

import pytest
import torch

from onelora_diffusion.training.metrics import (
    LossWatch,
    LossWindow,
    MetricsFile,
    NonFiniteError,
    append_line,
    check_finite,
    cut_lines_after,
)
from onelora_diffusion.training.outputs import diverged
from onelora_diffusion.training.settings import RunSettings
from onelora_diffusion.training.stopping import Clock


def window_of(*losses):
    window = LossWindow()
    for loss in losses:
        window.add({"loss": torch.tensor(loss), "mse": torch.tensor(loss) / 2})
    return window


def test_a_window_gives_its_steps_and_can_be_stored_and_restored(accelerator):
    rows = window_of(2.0, 4.0).read(accelerator, step=9)
    assert rows == [{"loss": 2.0, "mse": 1.0}, {"loss": 4.0, "mse": 2.0}]
    restored = LossWindow(json.loads(json.dumps(rows)))
    restored.add({"loss": torch.tensor(6.0), "mse": torch.tensor(3.0)})
    assert restored.read(accelerator, step=10) == [*rows, {"loss": 6.0, "mse": 3.0}]
    restored.clear()
    assert restored.read(accelerator, step=10) == []


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_the_first_step_whose_loss_is_not_finite_is_named(accelerator, loss):
    with pytest.raises(NonFiniteError, match=f"loss is {loss} at step 18") as caught:
        window_of(1.0, loss, 1.0, loss).read(accelerator, step=20)
    assert caught.value.step == 18


def test_a_value_that_is_not_finite_is_named():
    tensors = {"trained.a": torch.zeros(2), "trained.b": torch.tensor([0.0, float("inf")])}
    check_finite({"trained.a": tensors["trained.a"]}, step=3)
    with pytest.raises(NonFiniteError, match="trained.b is not finite at step 3"):
        check_finite(tensors, step=3)


def test_lines_after_a_step_and_half_lines_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    cut_lines_after(path, 0)
    assert not path.exists()
    for step in (10, 20, 30):
        append_line(path, {"step": step, "loss": 0.5})
    path.write_text(path.read_text() + '{"step": 4')
    cut_lines_after(path, 30)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20, 30]
    cut_lines_after(path, 25)
    assert path.read_text().splitlines()[-1] == '{"step": 20, "loss": 0.5}'
    if sys.platform == "linux":
        with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
            append_line(Path("/dev/full"), {"step": 40})


def test_a_loss_that_has_risen_far_above_what_it_was_is_told_once():
    watch = LossWatch()
    falling = [watch.add(1 / (1 + line), 20) for line in range(10)]  # the last five: 1/6 to 1/10, 0.129 in the mean
    single_lines = [watch.add(loss, 20) for loss in (0.5, 0.12, 0.12, 0.12, 0.12)]  # the noise of one line
    assert falling + single_lines == [None] * 15
    assert [watch.add(1.0, 20) for _ in range(2)] == [pytest.approx(1.48 / 5 / (0.6456 / 5), rel=1e-3), None]
    wrong_at_once = LossWatch()
    assert [wrong_at_once.add(loss, 20) for loss in (0.5, 5, 3, 300, 20)] == [None] * 4 + [pytest.approx(131.4)]


def test_a_resumed_run_knows_the_loss_it_had(accelerator, tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    for step in (20, 40, 60, 80, 100):
        append_line(path, {"step": step, "loss": 0.1})
    append_line(path, {"step": 100, "FD(pixels)": 5.0})
    file = MetricsFile(path, accelerator, batch_size=4, step=100, clock=Clock(None))
    for step in (120, 140):
        file.write_losses(window_of(*[0.5] * 20), step, learning_rate=0.1)
    out = capsys.readouterr()
    assert out.out.count("the loss is 2.6 times its lowest, at step 140: where it stays there, start over") == 1


def test_a_loss_that_is_not_finite_before_any_update_is_the_bases(tmp_path):
    settings = RunSettings(output_dir=tmp_path)
    first, second = (diverged(NonFiniteError("loss is nan", step), settings) for step in (1, 2))
    assert "of the base alone" in first and "lower" not in first
    assert "lower" in diverged(NonFiniteError("a trained value is nan", 1), settings)
    assert second.endswith("none. Start over with --fresh and a lower --learning-rate")
