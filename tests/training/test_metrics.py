import json

import pytest
import torch

from onelora_diffusion.training.metrics import LossWindow, NonFiniteError, append_line, check_finite, cut_lines_after


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
