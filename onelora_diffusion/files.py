"""Files and folders that are whole or not there at all."""

import contextlib
import errno
import glob
import hashlib
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError
from torch import Tensor


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Context manager: a file beside `path` to write, which is flushed at the end and only then put there.

    A link is followed. A file that is a mount point cannot be replaced, and is written anew in its place.

    Raises:
        OSError: the disk is full; it names `path`. What was there is still there, and nothing is left beside it.
    """
    path = path.resolve() if path.is_symlink() else path
    with _beside(path) as part:
        part.touch()
        mode = part.stat().st_mode
        yield part
        part.chmod(mode)  # safetensors' own writer leaves a file to its owner alone
        flush_to_disk(part)
        try:
            os.replace(part, path)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            shutil.copyfile(part, path)
            flush_to_disk(path)


def check_place(path: Path) -> None:
    """To be asked before hours of work: whether `written_beside` can put a file there, as far as that can be known.

    Raises:
        OSError: a folder or a device has that name, or the folder cannot be written or made.
    """
    if path.exists() and not path.is_file():
        raise OSError(f"'{path}' is no file that can be replaced: give another name")
    folder = next(each for each in path.resolve().parents if each.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OSError(f"'{path}' cannot be written, for '{folder}' is no folder that can be: give another place")


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces a file in one go, or leaves it as it was: see `written_beside`."""
    with written_beside(path) as part:
        part.write_bytes(content)


@contextlib.contextmanager
def folder_written_beside(path: Path) -> Iterator[Path]:
    """Context manager: an empty folder beside `path` to fill, flushed at the end, which then replaces the one there.

    A link is followed. A folder that is a mount point stays, and what it holds is replaced.

    Raises:
        OSError: as `written_beside`.
    """
    path = path.resolve() if path.is_symlink() else path
    with _beside(path) as part:
        part.mkdir(parents=True)
        yield part
        for written in (*part.rglob("*"), part):
            flush_to_disk(written)
        shutil.rmtree(path, ignore_errors=True)
        if path.is_dir():
            for written in part.iterdir():
                shutil.move(written, path)
            flush_to_disk(path)
        else:
            os.rename(part, path)
        flush_to_disk(path.parent)


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A name beside `path` that no other process takes; what has it at the end is removed.

    So is what processes that were killed left in that folder: their numbers are nobody's among the processes that this
    one can see, which are those of this machine or, in a container, of the container.
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
    except SafetensorError as error:  # what safetensors' own writer says of a full disk
        raise OSError(f"{path} was not written: {error}") from error
    except OSError as error:
        # Of a full disk no file is named, of others one that nobody knows.
        if error.errno and str(error.filename or part).startswith(str(part)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        _remove(part)


def process_space() -> int:
    """What tells containers with one machine's name apart, each of which numbers its own processes; 0 where none can.

    It is the PID namespace of Linux, which outside of containers is the same after every start of the machine.
    """
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def _remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Returns when a file, or a folder's list of names, is on the disk."""
    is_folder = path.is_dir()
    if is_folder and sys.platform == "win32":  # which opens no folder
        return
    descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """SHA-256 of a text and of names, types, shapes and bytes of tensors, in the order of their names."""
    sha256 = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        sha256.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha256.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha256.hexdigest()


def first_line(error: Exception, limit: int = 400) -> str:
    """What an error says in its first line, cleared as by `printable`; or its type, if it says nothing."""
    return printable(str(error).strip().split("\n")[0], limit) or type(error).__name__


def printable(value, limit: int | None = None):
    """Text of a file, or all texts in a value of JSON, without control characters, cut where it is too long to show.

    A terminal takes control characters for commands: they clear it, rename it, or write over what was there.
    """
    if isinstance(value, str):
        text = "".join(character if character.isprintable() else " " for character in value)
        return text if limit is None or len(text) <= limit else text[: limit - 1] + "…"
    if isinstance(value, list):
        return [printable(item, limit) for item in value]
    if isinstance(value, dict):
        return {printable(key, limit): printable(item, limit) for key, item in value.items()}
    return value
