"""Checkpoints of a run: tensors in safetensors, all else in JSON, whole or not there at all.

    checkpoints/step-00000500/
        tensors.safetensors
        state.json             step, sha256 of the tensors' file, and what the caller gave

A checkpoint is written into a folder beside, flushed to the disk and renamed; older ones are removed afterwards.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

from onelora_diffusion.files import flush_to_disk, write_bytes

TENSORS, STATE = "tensors.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int
    tensors: dict[str, Tensor]
    state: dict


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], state: dict, keep: int) -> Path:
    """Writes `folder/step-<step>`, then removes all but the `keep` newest up to it; returns its path.

    OSError (a full disk, for one) leaves the checkpoints that were there, and no rest of this one.
    """
    path = checkpoint_path(folder, step)
    partial = folder / f".{path.name}.partial"
    # Bytes written by Python: safetensors' own writer hides a full disk in an error that is no OSError.
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    state = {"step": step, "sha256": hashlib.sha256(content).hexdigest(), **state}
    state_text = json.dumps(state, indent=2) + "\n"
    if (path / TENSORS).exists() and (path / TENSORS).read_bytes() == content:  # only time has passed
        write_bytes(path / STATE, state_text.encode())
        return path
    for leftover in folder.glob(".step-*.partial"):  # of a run that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        (partial / TENSORS).write_bytes(content)
        (partial / STATE).write_text(state_text)
        for written in (partial / TENSORS, partial / STATE, partial):
            flush_to_disk(written)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(path, ignore_errors=True)  # a damaged one that the run has come by again
    os.rename(partial, path)
    flush_to_disk(folder)
    for old in [p for p in checkpoint_paths(folder) if p <= path][:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def load_newest_checkpoint(folder: Path, report=print) -> Checkpoint | None:
    """The newest whole checkpoint, or None if there is none; each damaged one is reported and passed over.

    ValueError if there are checkpoints and none of them is whole.
    """
    paths = checkpoint_paths(folder)
    for path in reversed(paths):
        try:
            return read_checkpoint(path)
        except (OSError, ValueError) as error:
            report(f"{path} is damaged ({error}): using the one before it")
    if paths:
        raise ValueError(f"none of the {len(paths)} checkpoints in {folder} can be read: start over with --fresh")
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """ValueError or OSError if anything in it is missing, cut or changed."""
    state = json.loads((path / STATE).read_text())
    content = (path / TENSORS).read_bytes()
    if hashlib.sha256(content).hexdigest() != state.pop("sha256", None):
        raise ValueError(f"{TENSORS} is not what was written")
    return Checkpoint(path, state.pop("step"), load(content), state)


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08}"


def checkpoint_paths(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(folder.glob("step-*"))
