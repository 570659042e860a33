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
from safetensors.torch import load, save

from onelora_diffusion.training.checkpoints import STATE as STATE_FILE
from onelora_diffusion.training.checkpoints import TENSORS, checksum, read_checkpoint, save_checkpoint
from onelora_diffusion.training.run import STATE
from onelora_diffusion.training.settings import Settings
from onelora_diffusion.training.state import check_same_adapter

SHAPES = {"a.onelora_b": (5,), "class_embedding.weight": (4, 2)}
SETTINGS = Settings(ema_decay=(0.9,), eval_every=2, class_learning_rate=1e-2)


@pytest.fixture
def original(accelerator, tmp_path):
    """A checkpoint's folder, and its files by name."""
    run = run_of(accelerator, SETTINGS, SHAPES)
    for _ in range(3):
        update(run)
    path = save_checkpoint(tmp_path, run.step, *run.state(), keep=1)
    return path, {name: (path / name).read_bytes() for name in (TENSORS, STATE_FILE)}


def sealed(tensors: bytes, state) -> dict[str, bytes]:
    """The files of a checkpoint, with a checksum that fits."""
    text = json.dumps(state | {"sha256": "0" * 64} if isinstance(state, dict) else state).encode()
    return {TENSORS: tensors, STATE_FILE: text.replace(b"0" * 64, checksum(tensors, text).encode(), 1)}


def write(path: Path, content: dict[str, bytes]) -> None:
    for name, part in content.items():
        (path / name).write_bytes(part)


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
    path, content = original
    name = data.draw(st.sampled_from(list(content)))
    write(path, content | {name: changed_bytes(data, content[name])})
    try_to_resume(accelerator, path)


@fuzz
@given(data=st.data())
def test_a_state_that_changed(original, accelerator, data):
    """Any value at any place of the state."""
    path, content = original
    state = json.loads(content[STATE_FILE])
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(list(places_of(state))[:200]))
        state = put(state, place, data.draw(VALUES))
    write(path, sealed(content[TENSORS], state))
    try_to_resume(accelerator, path)


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (("window", 1, "loss"), 1e308, "loss 1 of its window is not finite"),  # in float32
        (("seconds",), 10**400, "int too large to convert to float"),
    ],
)
def test_numbers_too_large_to_go_on_with(original, accelerator, place, value, reason):
    path, content = original
    write(path, sealed(content[TENSORS], put(json.loads(content[STATE_FILE]), place, value)))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is no record of a run .*{reason}"):
        run_of(accelerator, SETTINGS, SHAPES).restore(read_checkpoint(path, STATE))


@fuzz
@given(data=st.data())
def test_tensors_that_changed(original, accelerator, data):
    """Tensors that are missing, and others of any shape and type."""
    path, content = original
    tensors, names = load(content[TENSORS]), st.sampled_from([*load(content[TENSORS]), "best.x", "nothing", "a.b"])
    for name in data.draw(st.lists(names, min_size=1, max_size=3)):
        tensors.pop(name, None)
        if data.draw(st.booleans()):
            shape = data.draw(st.lists(st.integers(0, 5), max_size=3))
            tensors[name] = torch.ones(shape).to(data.draw(st.sampled_from([torch.float32, torch.int64, torch.bool])))
    write(path, sealed(save(tensors), json.loads(content[STATE_FILE])))
    try_to_resume(accelerator, path)
