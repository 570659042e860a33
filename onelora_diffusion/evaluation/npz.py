"""Read the headers of arrays in an untrusted .npz, before any values are read."""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Header:
    """Shape and dtype of one array, whether its columns come first, and how many bytes of numbers follow."""

    shape: tuple[int, ...]
    dtype: np.dtype
    by_columns: bool
    num_bytes: int


def read_headers(path: Path) -> dict[str, Header]:
    """The headers of all arrays in a file, by name; FileNotFoundError without it, ValueError for no whole .npz."""
    if not path.is_file():
        raise FileNotFoundError(f"no file '{path}'")
    headers = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                with archive.open(info) as member:
                    shape, by_columns, dtype = read_header(member)
                    num_bytes = info.file_size - member.tell()
                headers[info.filename.removesuffix(".npy")] = Header(shape, dtype, by_columns, num_bytes)
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise ValueError(f"'{path}' is damaged or no .npz: {error}") from error
    for name, header in headers.items():
        num_bytes = int(np.prod(header.shape, dtype=object)) * header.dtype.itemsize
        if not header.dtype.hasobject and num_bytes != header.num_bytes:
            raise ValueError(f"'{path}' is damaged: {name} is {header.shape}, but has {header.num_bytes} bytes")
    return headers


def read_header(member) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether columns come first, dtype) of an .npy stream, which is left at its first value."""
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(member)
