"""Checkpoints changed at random, their checksum made to fit: they are restored, or a ValueError names them."""

import json
import re
from pathlib import Path

import pytest
import torch
from fuzzing import VALUES, changed_bytes, fuzz, places_of, put
from hypothesis import given
from hypothesis import strategies as st
from records import run_of, update
from safetensors import safe_open
from safetensors.torch import load_file, save

from onelora_diffusion.training.checkpoints import read_checkpoint, save_checkpoint, sealed
from onelora_diffusion.training.run import STATE
from onelora_diffusion.training.settings import Settings
from onelora_diffusion.training.state import check_same_adapter

SHAPES = {"a.onelora_b": (5,), "class_embedding.weight": (4, 2)}
SETTINGS = Settings(ema_decay=(0.9,), eval_every=2, class_learning_rate=1e-2)


@pytest.fixture
def original(accelerator, tmp_path):
    """A checkpoint's path, its content, tensors and state."""
    run = run_of(accelerator, SETTINGS, SHAPES)
    for _ in range(3):
        update(run)
    path = save_checkpoint(tmp_path, run.step, *run.state(), keep=1)
    with safe_open(path, "pt") as file:
        state = json.loads(file.metadata()["state"])
    return path, path.read_bytes(), load_file(path), state


def write(path: Path, tensors: dict, state) -> None:
    """A checkpoint with a checksum that fits."""
    path.write_bytes(sealed(save(tensors, {"state": json.dumps(state), "sha256": "0" * 64})))


def try_to_resume(accelerator, path: Path) -> None:
    run = run_of(accelerator, SETTINGS, SHAPES)
    try:
        checkpoint = read_checkpoint(path, STATE)
    except ValueError:  # whoever reads it names it
        return
    try:
        check_same_adapter(checkpoint.tensors, run.trained)
        run.restore(checkpoint)
    except ValueError as error:
        assert str(path) in str(error) or "it is of another adapter" in str(error)
        assert str(error).isprintable() and len(str(error)) < len(str(path)) + 2000
    else:
        run.state()
        run.losses.clear()  # which may have other names than a model's
        update(run)


@fuzz
@given(data=st.data())
def test_bytes_that_changed(original, accelerator, data):
    path, content, _, _ = original
    path.write_bytes(sealed(changed_bytes(data, content)))
    try_to_resume(accelerator, path)


@fuzz
@given(data=st.data())
def test_a_state_that_changed(original, accelerator, data):
    """Any value at any place of the state."""
    path, _, tensors, state = original
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(list(places_of(state))[:200]))
        state = put(state, place, data.draw(VALUES))
    write(path, tensors, state)
    try_to_resume(accelerator, path)


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (("window", 1, "loss"), 1e308, "loss 1 of its window is not finite"),  # in float32
        (("seconds",), 10**400, "int too large to convert to float"),
    ],
)
def test_numbers_too_large_to_go_on_with(original, accelerator, place, value, reason):
    path, _, tensors, state = original
    write(path, tensors, put(state, place, value))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is no record of a run .*{reason}"):
        run_of(accelerator, SETTINGS, SHAPES).restore(read_checkpoint(path, STATE))


@fuzz
@given(data=st.data())
def test_tensors_that_changed(original, accelerator, data):
    """Tensors that are missing, and others of any shape and type."""
    path, _, tensors, state = original
    tensors, names = dict(tensors), st.sampled_from([*tensors, "best.x", "nothing", "a.b"])
    for name in data.draw(st.lists(names, min_size=1, max_size=3)):
        tensors.pop(name, None)
        if data.draw(st.booleans()):
            shape = data.draw(st.lists(st.integers(0, 5), max_size=3))
            tensors[name] = torch.ones(shape).to(data.draw(st.sampled_from([torch.float32, torch.int64, torch.bool])))
    write(path, tensors, state)
    try_to_resume(accelerator, path)
