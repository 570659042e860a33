"""Files and folders that are whole or not there at all."""

import contextlib
import glob
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
from safetensors import SafetensorError


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Context manager: a file beside `path` to write, which is flushed at the end and only then put there.

    Raises:
        OSError: the disk is full; it names `path`. What was there is still there, and nothing is left beside it.
    """
    with _beside(path) as part:
        part.touch()
        mode = part.stat().st_mode
        yield part
        part.chmod(mode)  # safetensors' own writer leaves a file to its owner alone
        flush_to_disk(part)
        os.replace(part, path)


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces a file in one go, or leaves it as it was: see `written_beside`."""
    with written_beside(path) as part:
        part.write_bytes(content)


@contextlib.contextmanager
def folder_written_beside(path: Path) -> Iterator[Path]:
    """Context manager: an empty folder beside `path` to fill, flushed at the end, which then replaces the one there.

    Raises:
        OSError: as `written_beside`.
    """
    with _beside(path) as part:
        part.mkdir(parents=True)
        yield part
        for written in (*part.rglob("*"), part):
            flush_to_disk(written)
        shutil.rmtree(path, ignore_errors=True)
        os.rename(part, path)
        flush_to_disk(path.parent)


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A name beside `path` that no other process takes; what has it at the end is removed.

    So is what processes that were killed left in that folder: on this machine, their numbers are nobody's.
    """
    machine = platform.node()
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
