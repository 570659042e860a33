"""Checkpoints of a run: one safetensors file each, `checkpoints/step-00000500.safetensors`.

Its header holds the step, the caller's state as JSON, and a SHA-256 of the whole file. A checkpoint is written under a
temporary name, flushed to the disk and renamed, and then older ones are removed. Checkpoints of version 0.1, folders
with `tensors.safetensors` and `state.json`, are read as well.
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

from onelora_diffusion.files import write_bytes

# The checksum in a file's header or in a `state.json`, whose own digits it does not cover. Other values cannot match,
# since quotes in them are escaped.
CHECKSUM = re.compile(rb'"sha256": ?"([0-9a-f]{64})"')
NAME = re.compile(r"step-[0-9]{8,}(\.safetensors)?")


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int
    tensors: dict[str, Tensor]
    state: dict


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], state: dict, keep: int) -> Path:
    """Write `folder/step-<step>.safetensors`, then remove all but the `keep` newest up to it; return its path.

    OSError if writing failed, as on a full disk; earlier checkpoints are kept, and no part of this one.
    """
    path = checkpoint_path(folder, step)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"state": json.dumps({"step": step, **state}), "sha256": "0" * 64}
    # Python writes the bytes, since safetensors' own writer reports a full disk as another error than OSError.
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)
    write_bytes(path, sealed(content))
    for old in [p for p in checkpoint_paths(folder) if p <= path][:-keep]:
        shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink(missing_ok=True)
    return path


def sealed(content: bytes) -> bytes:
    """Insert the checksum into the bytes of a checkpoint."""
    return CHECKSUM.sub(b'"sha256":"' + checksum(content).encode() + b'"', content, count=1)


def checksum(*contents: bytes) -> str:
    """SHA-256 of the concatenated files of a checkpoint, without the digits of the checksum itself."""
    return hashlib.sha256(b"".join(CHECKSUM.sub(b"", content, count=1) for content in contents)).hexdigest()


def load_newest_checkpoint(
    folder: Path, report=print, kinds: Mapping[str, type | UnionType] = MappingProxyType({})
) -> Checkpoint | None:
    """Read the newest undamaged checkpoint, or None if there are no checkpoints; damaged ones are reported.

    The state must have values of the types in `kinds`, since version 0.1 has no checksum of the state. ValueError if
    all are damaged.
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
    """Read a checkpoint; ValueError or OSError if it is damaged, or a value is not of the type in `kinds`."""
    try:
        content, text = _contents_of_0_1(path) if path.is_dir() else _contents(path)
        state, tensors = json.loads(text), load(content)
    except (KeyError, RecursionError, SafetensorError, TypeError) as error:
        raise ValueError(str(error)) from error
    for key, kind in {"step": int, **kinds}.items():
        if not isinstance(state, dict) or key not in state:
            raise ValueError(f"its state has no {key}")
        if not isinstance(state[key], kind):
            raise ValueError(f"{key} in its state is {type(state[key]).__name__}")
        if isinstance(state[key], float) and not math.isfinite(state[key]):
            raise ValueError(f"{key} in its state is {state[key]}")
    if path.stem != checkpoint_path(path.parent, state["step"]).stem:
        raise ValueError("its state is of another step")
    state.pop("sha256", None)  # written by version 0.1
    return Checkpoint(path, state.pop("step"), tensors, state)


def _contents(path: Path) -> tuple[bytes, str]:
    """(the bytes of a checkpoint, its state as JSON)."""
    content = path.read_bytes()
    written = CHECKSUM.search(content)
    if not written or written[1].decode() != checksum(content):
        raise ValueError("it is not what was written")
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return content, header["__metadata__"]["state"]


def _contents_of_0_1(folder: Path) -> tuple[bytes, bytes]:
    content, text = (folder / "tensors.safetensors").read_bytes(), (folder / "state.json").read_bytes()
    written = CHECKSUM.search(text)
    # The first versions covered the tensors alone.
    if not written or written[1].decode() not in (checksum(content, text), hashlib.sha256(content).hexdigest()):
        raise ValueError("it is not what was written")
    return content, text


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08}.safetensors"


def checkpoint_paths(folder: Path) -> list[Path]:
    """The paths of the checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if NAME.fullmatch(path.name))
