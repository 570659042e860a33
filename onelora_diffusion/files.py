"""Write files atomically: they are complete or not there."""

import contextlib
import errno
import glob
import hashlib
import os
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Context manager that yields a temporary file to write; at the end it is flushed and renamed to `path`.

    A link is followed. A file that is a mount point cannot be replaced, and is overwritten instead. OSError names
    `path` if the disk is full; an older file is kept, and the temporary one is removed.
    """
    path = path.resolve() if path.is_symlink() else path
    with beside(path) as part:
        part.touch()
        mode = part.stat().st_mode
        yield part
        part.chmod(mode)  # safetensors' own writer gives access to the owner alone
        flush_to_disk(part)
        try:
            os.replace(part, path)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            shutil.copyfile(part, path)
            flush_to_disk(path)


def check_writable(path: Path) -> None:
    """OSError, before long work, if `written_beside` will not be able to write this file, as far as can be known."""
    if path.exists() and not path.is_file():
        raise OSError(f"'{path}' is no file that can be replaced: give another name")
    folder = next(each for each in path.resolve().parents if each.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OSError(f"'{path}' cannot be written, for '{folder}' is no folder that can be: give another place")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: see `written_beside`."""
    with written_beside(path) as part:
        part.write_bytes(content)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically, in a folder that is created if it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as part:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata)


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Context manager that yields a temporary name in the folder of `path`, unique to this process, and removes it.

    Temporary files of killed processes are removed as well: their names contain process ids that are not in use on
    this machine or, in a container, in the container.
    """
    machine = f"{platform.node()}-{process_space()}"
    for left in path.parent.glob(f".*.{glob.escape(machine)}.*.part"):
        process = left.name.split(".")[-2]
        if process.isdigit() and not psutil.pid_exists(int(process)):
            _remove(left)
    part = path.with_name(f".{path.name}.{machine}.{os.getpid()}.part")
    _remove(part)
    try:
        yield part
    except SafetensorError as error:  # the error of safetensors' own writer on a full disk
        raise OSError(f"{path} was not written: {error}") from error
    except OSError as error:
        # The error of a full disk names no file, and other errors name the temporary one, so `path` is named here.
        if error.errno and str(error.filename or part).startswith(str(part)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        _remove(part)


def process_space() -> int:
    """The number of this process's PID namespace on Linux, 0 elsewhere. Process ids are unique only within it.

    It differs between containers, and outside of containers it is the same after every start of the machine.
    """
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def _remove(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    is_folder = path.is_dir()
    if is_folder and sys.platform == "win32":  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """SHA-256 of a text and of the names, dtypes, shapes and bytes of tensors, sorted by name."""
    sha256 = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        sha256.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha256.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha256.hexdigest()


def first_line(error: Exception, limit: int = 400) -> str:
    """The first line of an error's message, made `printable`; its type if the message is empty."""
    return printable(str(error).strip().split("\n")[0], limit) or type(error).__name__


def keys_once(pairs: list[tuple[str, object]]) -> dict:
    """The `object_pairs_hook` of `json.loads` that refuses a key which is there twice; ValueError names it."""
    values = dict(pairs)
    if len(values) < len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"'{printable(key, 60)}' is there twice")
    return values


def printable(value, limit: int | None = None):
    """Remove control characters from a text, or from all texts in a JSON value, and cut it at `limit` characters.

    A terminal obeys control characters of untrusted texts, which can clear or overwrite what it shows.
    """
    if isinstance(value, str):
        text = "".join(character if character.isprintable() else " " for character in value)
        return text if limit is None or len(text) <= limit else text[: limit - 1] + "…"
    if isinstance(value, list):
        return [printable(item, limit) for item in value]
    if isinstance(value, dict):
        return {printable(key, limit): printable(item, limit) for key, item in value.items()}
    return value
