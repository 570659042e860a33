"""This library's adapter file: one .safetensors whose header describes the adapter, checked strictly when read."""

import contextlib
import dataclasses
import json
import logging
import math
import os
from importlib.metadata import version
from numbers import Integral
from pathlib import Path

import torch
from packaging.version import InvalidVersion, Version
from torch import nn

from onelora_diffusion.adapters.class_table import CLASS_TABLE
from onelora_diffusion.config import AdapterConfig
from onelora_diffusion.denoisers import TwoDenoisers
from onelora_diffusion.files import digest, printable, write_tensors
from onelora_diffusion.injection.attaching import PREFIX, state_dict_of
from onelora_diffusion.injection.book import adapters_of
from onelora_diffusion.storage.attaching import AdapterFile, check_fits, check_whole, part_of, sketch_of
from onelora_diffusion.storage.opening import MAX_TEXT, OpenFile, check_values, opened, strict_json

logger = logging.getLogger(__name__)

# The entries of a header and their types.
HEADER = {
    "config": dict,
    "fingerprint": str | None,
    "base": str | None,
    "id2label": dict,
    "training": dict,
    "version": str,
    "sketch": list | None,
}
FORMAT = 2  # since format 2 files have a checksum; files of format 1 have no entry `format`

WEIGHTS_NAME = "onelora_weights.safetensors"


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike,
    adapter_name: str | None = None,
    *,
    state_dict: dict[str, torch.Tensor] | None = None,
    id2label: dict[int, str] | None = None,
    base: str | None = None,
    training: dict | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write an adapter as one self-contained file, and return its path.

    Keys are `transformer.<path of the layer>.onelora_b` (`_beta`, `_gamma`, …) and
    `transformer.class_embedding.weight`; those of the second of two transformers begin with `transformer_2.`. The file
    is written under a temporary name, flushed and renamed.

    Args:
        path: a `.safetensors` file, or a folder that will hold `onelora_weights.safetensors`.
        adapter_name: None takes the active adapter.
        state_dict: values to write instead of the adapter's, by the same names, such as their moving average.
        id2label: class names by label, 0 to num_classes - 1.
        base: hub id or folder of the base model.
        training: a summary of the training that can be written as JSON.
        dtype: `torch.float32` or `torch.bfloat16`.

    Raises:
        TypeError, ValueError: `id2label` is no dict, or has labels outside the adapter's classes.
        OSError: the disk is full; an older file at `path` is kept.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"an adapter file is float32 or bfloat16, not {dtype}")
    book = adapters_of(model)
    adapter_name = book.choose(adapter_name)
    _check_labels(id2label, book.configs[adapter_name].num_classes)
    own = state_dict_of(book.adapters[adapter_name])
    values = own if state_dict is None else state_dict
    if set(values) != set(own):
        raise ValueError(f"state_dict differs from the adapter in {sorted(set(values) ^ set(own))[0]}")
    check_whole(values)
    prefix = "" if isinstance(book.model, TwoDenoisers) else PREFIX
    tensors = {prefix + name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in values.items()}
    header = {
        "format": FORMAT,
        "config": dataclasses.asdict(book.configs[adapter_name]),
        "fingerprint": book.fingerprint,
        "base": base,
        "id2label": {str(label): name for label, name in (id2label or {}).items()},
        "training": training or {},
        "version": LIBRARY_VERSION,
    }
    if (sketch := sketch_of(model, book.adapters[adapter_name])) is not None:
        header["sketch"] = sketch
    text = json.dumps(header)
    path = file_of(path)
    _described(strict_json(text, str(path)), own)  # raises if the file could not be read again
    metadata = {"onelora": text, "sha256": digest(tensors, text)}
    write_tensors(path, tensors, metadata)
    return path


def _check_labels(id2label: dict[int, str] | None, num_classes: int | None) -> None:
    if not isinstance(id2label, dict | None):
        kind = type(id2label).__name__
        raise TypeError(f"id2label must be a dict of names by label, as in {{0: 'pizza'}}, and this is a {kind}")
    for label in id2label or {}:
        if not (isinstance(label, Integral) and 0 <= label < (num_classes or math.inf)):
            labels = f"0 to {num_classes - 1}" if num_classes else "whole numbers from 0 on"
            raise ValueError(f"id2label names {label!r} '{id2label[label]}', and this adapter's labels are {labels}")


def read_adapter(path: str | os.PathLike) -> AdapterFile:
    """Read an adapter file, or the adapter file in a folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, not an adapter of this library, of a newer format, or holds NaN or infinity.
    """
    with opened(file_of(path)) as file:
        return read_opened(file)


def describe_adapter(path: str | os.PathLike) -> AdapterFile:
    """Read the header of an adapter file and check it against the tensors' shapes; these are on the meta device.

    FileNotFoundError or ValueError as for `read_adapter`, except that values are not read.
    """
    with opened(file_of(path)) as file:
        return _describe_opened(file)[0]


def read_opened(file: OpenFile, model: nn.Module | None = None, component: str | None = None) -> AdapterFile:
    """Read the adapter in an open file; settings are checked against shapes, these against the model, values last.

    `component` is the one of a pipeline's two transformers that `model` is.
    """
    adapter, header = _describe_opened(file)
    if model is not None:
        check_fits(model, part_of(adapter, component), file.source)
    text, tensors = file.metadata["onelora"], file.tensors()
    for name, tensor in tensors.items():
        check_values(name, tensor, file.source)
    if header.get("format", 1) > 1 and file.metadata.get("sha256") != digest(tensors, text):
        raise ValueError(f"{file.source}: is damaged, for it is not what was written; copy or download it again")
    if newer := _newer(adapter.version):
        logger.warning("%s: %s", file.source, newer)
    adapter = dataclasses.replace(adapter, tensors=_without_prefix(tensors, adapter.is_of_two))
    return part_of(adapter, component)


def _describe_opened(file: OpenFile) -> tuple[AdapterFile, dict]:
    """(the adapter that the header describes, checked against the tensors' shapes; the header)."""
    if "onelora" not in file.metadata:
        raise ValueError(f"{file.source}: is no onelora adapter, for its header has no settings; load a file of ours")
    header = strict_json(file.metadata["onelora"], file.source)
    try:
        is_of_two = isinstance(header, dict) and "+" in str(header.get("fingerprint"))
        described = _described(header, _without_prefix(file.shapes, is_of_two))
        return dataclasses.replace(described, digest=file.digest()), header
    except ValueError as error:
        raise ValueError(f"{file.source}: {printable(str(error), 400)}; {_remedy(header)}") from error


def _without_prefix(tensors: dict[str, torch.Tensor], is_of_two: bool) -> dict[str, torch.Tensor]:
    """The tensors by the paths of layers in the model, which of two denoisers begin with their components."""
    return tensors if is_of_two else {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def file_of(path: str | os.PathLike) -> Path:
    """The adapter file at a path, or in the folder at it."""
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / WEIGHTS_NAME


LIBRARY_VERSION = version("onelora-diffusion")


def _newer(written_by) -> str | None:
    """What to say of a file that a newer version has written; None of any other."""
    with contextlib.suppress(InvalidVersion, TypeError):
        if Version(written_by) > Version(LIBRARY_VERSION):
            return f"was written by onelora-diffusion {written_by[:40]}, which is newer than this {LIBRARY_VERSION}"


def _remedy(header) -> str:
    if newer := _newer(header.get("version") if isinstance(header, dict) else None):
        return f"it {newer}: pip install --upgrade onelora-diffusion"
    return "copy or download it again, or ask whoever made it"


def _described(header, tensors: dict[str, torch.Tensor]) -> AdapterFile:
    """The adapter that a header describes; ValueError if the header is invalid or contradicts the tensors."""
    if not isinstance(header, dict):
        raise ValueError("its header has no settings by name")
    written_as = header.get("format", 1)
    if type(written_as) is not int or written_as > FORMAT or written_as < 2 and "format" in header:
        raise ValueError(f"is of format {_shown(written_as)}, and this version reads formats up to {FORMAT}")
    for name, kind in HEADER.items():
        if not isinstance(header.get(name), kind):
            raise ValueError(f"its {name} is {_shown(header.get(name))}, and must be {kind}")
        if isinstance(header.get(name), str) and len(header[name]) > MAX_TEXT:
            raise ValueError(f"its {name} has {len(header[name]):,} characters, and {MAX_TEXT:,} is the most")
    config = AdapterConfig.from_json(json.dumps(header["config"]))
    if config.sum and any(name.endswith(".onelora_b") and tensor.ndim == 1 for name, tensor in tensors.items()):
        config = dataclasses.replace(config, rank=1)  # version 0.1 ignored the rank but wrote it
    _check_against(config, tensors)
    if not all(type(value) is float for value in header.get("sketch") or ()):
        raise ValueError("its sketch must be numbers")
    for label, name in header["id2label"].items():
        is_label = label.isascii() and label.isdecimal() and len(label) < 10
        if not is_label or config.num_classes is not None and int(label) > config.num_classes:
            raise ValueError(f"its id2label has the label {_shown(label)}, of {config.num_classes} classes")
        if not isinstance(name, str) or len(name) > MAX_TEXT:
            raise ValueError(
                f"its class {label} is named {_shown(name)}, and must have a name of up to {MAX_TEXT:,} characters"
            )
    return AdapterFile(
        config=config,
        tensors=tensors,
        fingerprint=header["fingerprint"],
        base=header["base"],
        id2label={int(label): name for label, name in header["id2label"].items()},
        training=header["training"],
        version=header["version"],
        sketch=header.get("sketch"),
    )


def _check_against(config: AdapterConfig, tensors: dict[str, torch.Tensor]) -> None:
    """ValueError for settings that would build more tensors than the file has."""
    if config.targets is not None and len(config.targets) > max(len(tensors), 100):
        raise ValueError(f"it names {len(config.targets):,} targets, and holds {len(tensors):,} tensors")
    table = tensors.get(f"{CLASS_TABLE}.weight")
    num_rows = 0 if table is None or table.ndim != 2 else len(table)
    if num_rows != (0 if config.num_classes is None else config.num_classes + 1):
        raise ValueError(f"its num_classes is {config.num_classes}, and its class table has {num_rows} rows")


def _shown(value) -> str:
    return printable(repr(value), 60)
