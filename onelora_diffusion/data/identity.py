"""Which data a data set holds, wherever it lies: class names, number of images, and a fingerprint of the contents."""

import errno
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

BLOCK = 2**14  # bytes of a file that are read at its start, and as many at its end
# Errors that belong to the file itself. All others are the system's (too many open files, a failing network disk) and
# may be gone at the next try.
OF_THE_FILE = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}


class DataIdentity(NamedTuple):
    """What tells one data set from another. Copies of one data set have the same identity on every machine."""

    name: str
    images: int
    classes: list[str] | None
    """Names in the order of the labels; None where images have captions."""
    fingerprint: str
    """sha256 of names, labels or captions, and of the files as `fingerprint` reads them."""

    def __str__(self) -> str:
        """One line that is equal for equal data."""
        return json.dumps(self)

    def describe(self) -> str:
        """The name, the number of images, and the first few class names."""
        if self.classes is None:
            return f"{self.images:,} images of {self.name}"
        more = f" and {len(self.classes) - 6} more" if len(self.classes) > 6 else ""
        return f"{self.images:,} images of {', '.join(self.classes[:6])}{more}"


def data_identity(dataset: Dataset, captions: Sequence[str] | None = None) -> DataIdentity:
    """The identity of a data set of `onelora_diffusion.data`.

    Args:
        captions: one for each image, of a data set without classes.

    Raises:
        OSError: the system could not read a file now; it names the file.
    """
    classes = [dataset.id2label[label] for label in range(dataset.num_classes)] if captions is None else None
    source = getattr(dataset, "source", dataset)
    parts = json.dumps([classes, captions]) + fingerprint(source, times=False)
    return DataIdentity(dataset.name, len(dataset), classes, hashlib.sha256(parts.encode()).hexdigest())


def fingerprint(dataset: Dataset, times: bool = True) -> str:
    """sha256 of all that a data set is made of: its files, arrays, labels and settings.

    A file counts by its name below the data set's root, its size, its first and its last 16 KiB and, with `times`, the
    time of its last change. So a change is noticed unless it lies in the middle of a file of more than 32 KiB and
    keeps both the size and, with `times`, the time.

    Raises:
        OSError: the system could not read a file now; it names the file.
    """
    sha256 = hashlib.sha256()
    files: list[str] = []

    def add(value, root: str | None) -> None:
        if isinstance(value, str | os.PathLike):
            text = os.fspath(value)
            is_below = root is not None and text.startswith(root + os.sep)
            sha256.update(os.fsencode(text.removeprefix(root + os.sep) if is_below else text))
            if is_below:
                files.append(text)
        elif isinstance(value, dict):
            add([part for pair in value.items() for part in pair], root)
        elif isinstance(value, list | tuple):
            sha256.update(f"{len(value)}".encode())
            for part in value:
                add(part, root)
        elif isinstance(value, set | frozenset):
            add(sorted(map(str, value)), root)
        elif isinstance(value, np.ndarray | Tensor):
            array = np.ascontiguousarray(value)
            sha256.update(f"{array.dtype} {array.shape}".encode())
            sha256.update(array.tobytes())
        elif value is None or isinstance(value, bool | int | float):
            sha256.update(repr(value).encode())
        elif hasattr(value, "_fingerprint"):  # of Hugging Face's library
            sha256.update(value._fingerprint.encode())
        else:
            sha256.update(type(value).__qualname__.encode())
            if isinstance(value, Dataset):
                parts = vars(value)
                root = os.fspath(parts["root"]).rstrip(os.sep) if "root" in parts else root
                add({name: part for name, part in sorted(parts.items()) if name not in ("broken", "root")}, root)

    add(dataset, None)
    with ThreadPoolExecutor(16) as threads:  # the time goes into waiting for a disk or a network
        for digest in threads.map(lambda file: _file_digest(file, times), files):
            sha256.update(digest)
    return sha256.hexdigest()


def _file_digest(path: str, times: bool) -> bytes:
    """sha256 of a file as `fingerprint` counts it; a folder, and a file that is not there, count by their names."""
    try:
        status = os.stat(path)
        content = _ends(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    except ValueError:  # a name with a zero in it
        return b""
    except OSError as error:
        if error.errno not in OF_THE_FILE:
            raise
        return b""
    time = status.st_mtime_ns if times else ""
    return hashlib.sha256(f"{status.st_size} {time}".encode() + content).digest()


@cache  # a run asks for the identity, and then for the keys of caches
def _ends(path: str, size: int, *status: int) -> bytes:
    """The sha256 of a file's first and last block, of a file of this state."""
    with open(path, "rb") as file:
        sha256 = hashlib.sha256(file.read(BLOCK))
        file.seek(max(BLOCK, size - BLOCK))
        sha256.update(file.read(BLOCK))
        return sha256.digest()
