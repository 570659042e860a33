"""Files and folders that are whole or not there at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Context manager: a file beside `path` to write, which is flushed at the end and only then put there.

    Raises:
        OSError: the disk is full; an older file at `path` is still there, and nothing is left beside it.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.touch()
        mode = part.stat().st_mode
        yield part
        part.chmod(mode)  # safetensors' own writer leaves a file to its owner alone
        flush_to_disk(part)
        os.replace(part, path)
    except SafetensorError as error:  # what safetensors' own writer says of a full disk
        raise OSError(f"{path} was not written: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces a file in one go; what a killed process left beside it is overwritten by the next."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    flush_to_disk(partial)
    os.replace(partial, path)


@contextlib.contextmanager
def folder_written_beside(path: Path) -> Iterator[Path]:
    """Context manager: an empty folder beside `path` to fill, which at the end replaces the one at `path`."""
    beside = path.with_name(path.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    yield beside
    shutil.rmtree(path, ignore_errors=True)
    beside.rename(path)


def flush_to_disk(path: Path) -> None:
    """Returns when a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
