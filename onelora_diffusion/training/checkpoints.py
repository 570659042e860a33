"""Checkpoints of a run: tensors in safetensors, all else in JSON, whole or not there at all.

    checkpoints/step-00000500/
        tensors.safetensors
        state.json             sha256 of both files, the step, and what the caller gave

A checkpoint is written into a folder beside, flushed to the disk and renamed; older ones are removed afterwards.
"""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, UnionType

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from onelora_diffusion.files import folder_written_beside, write_bytes

TENSORS, STATE = "tensors.safetensors", "state.json"
CHECKSUM = re.compile(rb'"sha256": "([0-9a-f]{64})"')


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
    # Bytes written by Python: safetensors' own writer hides a full disk in an error that is no OSError.
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    text = json.dumps({"sha256": "0" * 64, "step": step, **state}, indent=2).encode() + b"\n"
    text = text.replace(b"0" * 64, checksum(content, text).encode(), 1)
    if (path / TENSORS).exists() and (path / TENSORS).read_bytes() == content:  # only time has passed
        write_bytes(path / STATE, text)
        return path
    with folder_written_beside(path) as beside:  # `path` is there where the run comes by a damaged one again
        (beside / TENSORS).write_bytes(content)
        (beside / STATE).write_bytes(text)
    for old in [p for p in checkpoint_paths(folder) if p <= path][:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def checksum(tensors: bytes, state: bytes) -> str:
    """sha256 of both files of a checkpoint, but for the 64 digits that it takes in the state's."""
    return hashlib.sha256(tensors + CHECKSUM.sub(b"", state, count=1)).hexdigest()


def load_newest_checkpoint(
    folder: Path, report=print, kinds: Mapping[str, type | UnionType] = MappingProxyType({})
) -> Checkpoint | None:
    """The newest whole checkpoint, or None if there is none; each damaged one is reported and passed over.

    Its state must have values of these kinds: version 0.1 kept no checksum of the state.

    ValueError if there are checkpoints and none of them is whole.
    """
    paths = checkpoint_paths(folder)
    for path in reversed(paths):
        try:
            return read_checkpoint(path, kinds)
        except (OSError, ValueError) as error:
            report(f"{path} is damaged ({error}): using the one before it")
    if paths:
        raise ValueError(f"none of the {len(paths)} checkpoints in {folder} can be read: start over with --fresh")
    return None


def read_checkpoint(path: Path, kinds: Mapping[str, type | UnionType] = MappingProxyType({})) -> Checkpoint:
    """ValueError or OSError if anything in it is missing, cut or changed, or is not of these kinds."""
    content, text = (path / TENSORS).read_bytes(), (path / STATE).read_bytes()
    written = CHECKSUM.search(text)
    # Version 0.1 counted the tensors alone.
    if not written or written[1].decode() not in (checksum(content, text), hashlib.sha256(content).hexdigest()):
        raise ValueError(f"{TENSORS} and {STATE} are not what was written")
    try:
        state, tensors = json.loads(text), load(content)
    except (RecursionError, SafetensorError) as error:
        raise ValueError(str(error)) from error
    for key, kind in {"sha256": str, "step": int, **kinds}.items():
        if not isinstance(state, dict) or key not in state:
            raise ValueError(f"{STATE} has no {key}")
        if not isinstance(state[key], kind):
            raise ValueError(f"{key} in {STATE} is {type(state[key]).__name__}")
        if isinstance(state[key], float) and not math.isfinite(state[key]):
            raise ValueError(f"{key} in {STATE} is {state[key]}")
    if checkpoint_path(path.parent, state["step"]) != path:
        raise ValueError(f"{STATE} is of another step")
    del state["sha256"]
    return Checkpoint(path, state.pop("step"), tensors, state)


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08}"


def checkpoint_paths(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-[0-9]{8,}", path.name))
