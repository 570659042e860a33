"""The identity of a data set wherever it is stored: class names, number of images, a fingerprint of the contents."""

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

BLOCK = 2**14  # bytes that are read at the start of a file, and at its end
# Errors of the file itself. All others come from the system (too many open files, a failing network disk), and a later
# attempt may succeed.
OF_THE_FILE = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}


class DataIdentity(NamedTuple):
    """Identifies a data set. Copies of it have the same identity on every machine."""

    name: str
    images: int
    classes: list[str] | None  # the names in the order of their labels; None for images with captions
    fingerprint: str  # sha256 of names, labels or captions, and of the files (see the function `fingerprint`)

    def describe(self) -> str:
        """The number of images, with the data set's name or the first few class names."""
        if self.classes is None:
            return f"{self.images:,} images of {self.name}"
        more = f" and {len(self.classes) - 6} more" if len(self.classes) > 6 else ""
        return f"{self.images:,} images of {', '.join(self.classes[:6])}{more}"


def data_identity(dataset: Dataset, captions: Sequence[str] | None = None, *more: Dataset | Sequence) -> DataIdentity:
    """The identity of a data set of `onelora_diffusion.data`; OSError names a file that could not be read now.

    Args:
        captions: the captions of a data set without classes, one for each image.
        more: what else is trained on, such as masks.
    """
    classes = [dataset.id2label[label] for label in range(dataset.num_classes)] if captions is None else None
    source = getattr(dataset, "source", dataset)
    parts = json.dumps([classes, captions]) + "".join(fingerprint(each, times=False) for each in (source, *more))
    return DataIdentity(dataset.name, len(dataset), classes, hashlib.sha256(parts.encode()).hexdigest())


def fingerprint(dataset: Dataset, times: bool = True) -> str:
    """sha256 of the contents of a data set: its files, arrays, labels and settings.

    Of each file it covers the name relative to the root, the size, the first and last 16 KiB and, with `times`, the
    time of the last change. So it misses a change only in the middle of a file of more than 32 KiB whose size (and,
    with `times`, time) stays the same. OSError names a file that could not be read now.
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
        elif hasattr(value, "_fingerprint"):  # a `datasets.Dataset`
            sha256.update(value._fingerprint.encode())
        else:
            sha256.update(type(value).__qualname__.encode())
            if isinstance(value, Dataset):
                parts = vars(value)
                root = os.fspath(parts["root"]).rstrip(os.sep) if "root" in parts else root
                add({name: part for name, part in sorted(parts.items()) if name not in ("broken", "root")}, root)

    add(dataset, None)
    with ThreadPoolExecutor(16) as threads:  # most of the time is spent waiting for a disk or network
        for digest in threads.map(lambda file: file_digest(file, times), files):
            sha256.update(digest)
    return sha256.hexdigest()


def file_digest(path: str, times: bool) -> bytes:
    """sha256 of a file for `fingerprint`; of a folder and of a missing file, only the name counts."""
    try:
        status = os.stat(path)
        content = _ends(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    except ValueError:  # the name contains a null character
        return b""
    except OSError as error:
        if error.errno not in OF_THE_FILE:
            raise
        return b""
    time = status.st_mtime_ns if times else ""
    return hashlib.sha256(f"{status.st_size} {time}".encode() + content).digest()


@cache  # a run needs it for the identity, and again for the keys of caches
def _ends(path: str, size: int, *status: int) -> bytes:
    """sha256 of the first and the last block of a file; size and status are part of the cache's key."""
    with open(path, "rb") as file:
        sha256 = hashlib.sha256(file.read(BLOCK))
        file.seek(max(BLOCK, size - BLOCK))
        sha256.update(file.read(BLOCK))
        return sha256.digest()
