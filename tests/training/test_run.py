import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from records import ScheduleFree, run_of, update
from safetensors.torch import load, save

from onelora_diffusion.training.checkpoints import Checkpoint, load_newest_checkpoint, read_checkpoint
from onelora_diffusion.training.optimizers import averaged_values
from onelora_diffusion.training.run import STATE
from onelora_diffusion.training.settings import Settings

FIXTURE = Path(__file__).parents[1] / "fixtures" / "checkpoint-0.1"


def assert_same_state(one, other):
    (tensors, facts), (other_tensors, other_facts) = one, other
    assert tensors.keys() == other_tensors.keys()
    assert all(torch.equal(tensors[name], other_tensors[name]) for name in tensors)
    assert {name: value for name, value in facts.items() if name != "seconds"} == {
        name: value for name, value in other_facts.items() if name != "seconds"
    }


@pytest.fixture(params=["adamw", "schedule-free"])
def optimizer(request, monkeypatch):
    if request.param == "schedule-free" and find_spec("schedulefree") is None:
        monkeypatch.setitem(sys.modules, "schedulefree", SimpleNamespace(AdamWScheduleFree=ScheduleFree))
    return request.param


def test_a_record_restored_from_its_state_goes_on_as_if_nothing_had_been(accelerator, optimizer):
    settings = Settings(ema_decay=(0.1, 0.9), eval_every=2, class_learning_rate=1e-2, optimizer=optimizer)
    shapes = {"a.onelora_b": (5,), "class_embedding.weight": (4, 2)}
    whole, half, again = (run_of(accelerator, settings, shapes) for _ in range(3))
    for _ in range(3):
        update(half)
    half.clock.resume(100.0)
    tensors, facts = half.state()
    tensors = load(save({name: tensor.detach().clone() for name, tensor in tensors.items()}))
    again.restore(Checkpoint(Path("somewhere"), half.step, tensors, facts))
    assert_same_state(again.state(), half.state())
    assert list(facts) == list(STATE)
    assert again.step == 3 and again.best == {"step": 2, "distance": 2.0} and 100 < again.clock.seconds < 200
    for _ in range(3):
        update(again)
    for _ in range(6):
        update(whole)
    assert_same_state(again.state(), whole.state())
    assert again.best["step"] == 4 and len(again.losses.rows) == 6
    if optimizer == "schedule-free":  # what is averaged is its own average, which is not what it trains
        with averaged_values(again.optimizer):
            average = again.trained["a.onelora_b"].clone()
        assert not torch.allclose(average, again.trained["a.onelora_b"], rtol=1e-3)
        assert again.optimizer.param_groups[0]["k"] == 6


def test_the_record_of_version_0_1_is_restored_to_the_bit(accelerator):
    checkpoint = read_checkpoint(FIXTURE / "step-00000003")
    then = checkpoint.state["settings"]
    settings = Settings(**then | {name: tuple(then[name]) for name in ("ema_decay", "targets")})
    shapes = {n.removeprefix("trained."): t.shape for n, t in checkpoint.tensors.items() if n.startswith("trained.")}
    run = run_of(accelerator, settings, shapes)
    run.restore(checkpoint)
    tensors, facts = run.state()
    assert_same_state((tensors, facts | {"settings": then}), (checkpoint.tensors, checkpoint.state))
    assert facts["seconds"] >= checkpoint.state["seconds"] > 8
    assert facts["best"]["step"] == 2 and len(facts["window"]) == 1


def test_a_damaged_record_of_version_0_1_is_named_and_the_one_before_used(tmp_path):
    for step in (2, 3):
        folder = shutil.copytree(FIXTURE / "step-00000003", tmp_path / f"step-{step:08}")
        text = (folder / "state.json").read_text().replace('"step": 3', f'"step": {step}', 1)
        (folder / "state.json").write_text(text.replace("seconds", "sec0nds", 1) if step == 3 else text)
    said = []
    assert load_newest_checkpoint(tmp_path, said.append, STATE).step == 2
    assert said == [f"{folder} is damaged (its state has no seconds): using the one before it"]


def test_the_best_is_dropped_where_nothing_is_measured_any_more(accelerator):
    checkpoint = read_checkpoint(FIXTURE / "step-00000003")
    shapes = {n.removeprefix("trained."): t.shape for n, t in checkpoint.tensors.items() if n.startswith("trained.")}
    run = run_of(accelerator, Settings(ema_decay=(0.9,), eval_every=0), shapes)
    run.restore(checkpoint)
    assert run.best is None and not run.best_values and len(run.averages) == 1
