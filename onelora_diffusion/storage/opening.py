"""Open a safetensors file from an untrusted source: everything is checked before it is used.

Every error is `FILE: what is wrong; what to do`.
"""

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from onelora_diffusion.files import keys_once, printable

MAX_HEADER_BYTES = 4 << 20  # enough for 20,000 tensors or class names
MAX_DIMENSIONS = 8
MAX_TEXT = 1000  # characters of a name of a class or base
MAX_VALUE = torch.finfo(torch.float16).max  # larger values are infinite in fp16; trained ones are far smaller
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64, "I32": torch.int32}
INTEGER = re.compile(r".+\.alpha")  # the alpha of a LoRA is one number, which some programs write as an integer
NAME = re.compile(r"[!-~]{1,512}")  # visible ASCII


@dataclass(frozen=True)
class OpenFile:
    """An open file with a checked header, whose tensors are not read yet.

    The file is read and never mapped: a process that uses a mapped file is ended by SIGBUS when another one, such as
    `cp`, cuts the file short.
    """

    source: str  # the path, for errors
    metadata: dict[str, str]
    shapes: dict[str, torch.Tensor]  # the tensors by name without their values, on the meta device
    file: BinaryIO = field(repr=False)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name. The caller runs `check_values`."""
        values = load(self._content())
        return {name: values[name] for name in self.shapes}

    def digest(self) -> str:
        """The checksum that the header gives, which `read_opened` compares; the SHA-256 of a file without one."""
        return self.metadata.get("sha256") or hashlib.sha256(self._content()).hexdigest()

    def _content(self) -> bytes:
        self.file.seek(0)
        return self.file.read()


@contextlib.contextmanager
def opened(path: Path, content: bytes | None = None) -> Iterator[OpenFile]:
    """Context manager that opens a safetensors file, or the `content` that it will have, and checks its header.

    FileNotFoundError if there is no such file; ValueError if it is damaged, or its header is not that of weights.
    """
    source = str(path)
    if content is None and not path.is_file():
        raise FileNotFoundError(f"no adapter at '{source}'")
    try:
        with path.open("rb") if content is None else BytesIO(content) as file:
            metadata, shapes = _header(file, source)
            yield OpenFile(source, metadata, shapes, file)
    except (SafetensorError, OSError) as error:
        raise _damaged(source, error) from error


def check_state_dict(tensors: dict[str, torch.Tensor], source: str) -> None:
    """ValueError unless all names and values could be those of a file of weights."""
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{source}: {name!r} is no name of a tensor, but {type(tensor).__name__}; give tensors")
        _check_entry(name, tensor.dtype, tensor.shape, source)
        check_values(name, tensor, source)


def check_values(name: str, tensor: torch.Tensor, source: str) -> None:
    smallest, largest = (value.item() for value in torch.aminmax(tensor.detach()))
    if not (math.isfinite(smallest) and math.isfinite(largest)):
        raise ValueError(f"{source}: {name} holds NaN or infinity; its training went wrong, or it is damaged")
    if max(-smallest, largest) > MAX_VALUE:
        raise ValueError(
            f"{source}: {name} holds {max(smallest, largest, key=abs):g}, and no weight is beyond {MAX_VALUE:g}; its "
            "training went wrong, or it is damaged"
        )


def strict_json(text: str | bytes, source: str):
    """Parse a JSON text and remove control characters from its strings.

    ValueError if it is no JSON, gives a key twice, has NaN or infinity, or is nested too deeply.
    """
    try:
        return printable(json.loads(text, object_pairs_hook=keys_once, parse_constant=_number, parse_float=_number))
    except (ValueError, RecursionError) as error:
        raise _damaged(source, error) from error


def read_bytes(path: Path) -> bytes:
    """Read a file of settings; ValueError if it is larger than a header may be."""
    if (size := path.stat().st_size) > MAX_HEADER_BYTES:
        raise ValueError(f"{path}: has {size:,} bytes, and settings have at most {MAX_HEADER_BYTES:,}; remove it")
    return path.read_bytes()


def _number(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text} is no number")
    return float(text)


def _header(file: BinaryIO, source: str) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """(the texts in the header of a safetensors file, its tensors on the meta device), checked against its size."""
    size = int.from_bytes(file.read(8), "little")
    if size > MAX_HEADER_BYTES:
        raise _damaged(source, f"its header has {size:,} bytes, and {MAX_HEADER_BYTES:,} is the most")
    header, shapes, num_bytes = strict_json(file.read(size), source), {}, 8 + size
    try:
        metadata = header.pop("__metadata__", {})
        for name, text in metadata.items():
            if not isinstance(text, str):
                raise _damaged(source, f"{name} in its header is {type(text).__name__}, and no text")
        for name, entry in header.items():
            dtype, shape = DTYPES.get(entry["dtype"], entry["dtype"]), entry["shape"]
            _check_entry(name, dtype, shape, source)
            num_bytes += math.prod(shape) * dtype.itemsize
            shapes[name] = (shape, dtype)
    except (AttributeError, KeyError, TypeError) as error:
        raise _damaged(source, "its header does not describe tensors") from error
    if (found := file.seek(0, os.SEEK_END)) != num_bytes:
        raise _damaged(source, f"it has {found:,} bytes, and {num_bytes:,} by its header")
    return metadata, {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in shapes.items()}


def _check_entry(name: str, dtype: torch.dtype | str, shape, source: str) -> None:
    if not NAME.fullmatch(name):
        raise ValueError(f"{source}: '{printable(name, 40)}' is no name of a tensor; rename it in plain ASCII")
    if not all(type(size) is int and size > 0 for size in shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(
            f"{source}: {name} has shape {printable(str(tuple(shape)), 80)}, which no weight has; remove it"
        )
    is_weight = dtype in DTYPES.values() and dtype.is_floating_point
    if not is_weight and not (dtype in DTYPES.values() and INTEGER.fullmatch(name) and math.prod(shape) == 1):
        raise ValueError(
            f"{source}: {name} is {printable(str(dtype).removeprefix('torch.'), 20)}, and weights are float32, "
            "bfloat16 or float16; convert it"
        )


def _damaged(source: str, reason: Exception | str) -> ValueError:
    reason = printable(str(reason), 200)
    return ValueError(f"{source}: is damaged or no safetensors file ({reason}); copy or download it again")
