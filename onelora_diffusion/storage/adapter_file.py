"""Adapter files: one self-describing .safetensors, strictly checked."""

import dataclasses
import json
import math
import os
from importlib.metadata import version
from numbers import Integral
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from onelora_diffusion.config import AdapterConfig
from onelora_diffusion.files import written_beside
from onelora_diffusion.injection.attaching import PREFIX, AdapterFile, attach_adapter_file, state_dict_of
from onelora_diffusion.injection.book import adapters_of, check_name

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
    `transformer.class_embedding.weight`. The file is written beside, flushed and renamed.

    Args:
        path: a `.safetensors` file, or a folder that will hold `onelora_weights.safetensors`.
        adapter_name: None: the one that is active.
        state_dict: other values for the same names, such as their moving average.
        id2label: class names by label, 0 to num_classes - 1.
        base: hub id or folder of the base model.
        training: a summary of the training that can be written as JSON.
        dtype: `torch.float32` or `torch.bfloat16`.

    Raises:
        TypeError, ValueError: `id2label` is no dict, or has labels outside the adapter's classes.
        OSError: the disk is full; an older file at `path` is still there.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"an adapter file is float32 or bfloat16, not {dtype}")
    book = adapters_of(model)
    adapter_name = book.chosen(adapter_name)
    _check_labels(id2label, book.configs[adapter_name].num_classes)
    own = state_dict_of(book.adapters[adapter_name])
    values = own if state_dict is None else state_dict
    if set(values) != set(own):
        raise ValueError(f"state_dict differs from the adapter in {sorted(set(values) ^ set(own))[0]}")
    tensors = {PREFIX + name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in values.items()}
    header = {
        "config": dataclasses.asdict(book.configs[adapter_name]),
        "fingerprint": book.fingerprint,
        "base": base,
        "id2label": {str(label): name for label, name in (id2label or {}).items()},
        "training": training or {},
        "version": version("onelora-diffusion"),
    }
    path = _file_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as part:
        save_file(tensors, part, metadata={"onelora": json.dumps(header)})
    return path


def _check_labels(id2label: dict[int, str] | None, num_classes: int | None) -> None:
    if not isinstance(id2label, dict | None):
        kind = type(id2label).__name__
        raise TypeError(f"id2label is a dict of names by label, as in {{0: 'pizza'}}, and this is a {kind}")
    for label in id2label or {}:
        if not (isinstance(label, Integral) and 0 <= label < (num_classes or math.inf)):
            labels = f"0 to {num_classes - 1}" if num_classes else "whole numbers from 0 on"
            raise ValueError(f"id2label names {label!r} '{id2label[label]}', and this adapter's labels are {labels}")


def read_adapter(path: str | os.PathLike) -> AdapterFile:
    """Read an adapter file, or the one in a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, not an adapter of this library, or holds NaN or infinity.
    """
    path = _file_of(path)
    if not path.is_file():
        raise FileNotFoundError(f"no adapter at '{path}'")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"'{path}' is damaged or no safetensors file: {error}") from error
    if "onelora" not in metadata:
        raise ValueError(f"'{path}' is no onelora adapter: its header has no settings")
    header = json.loads(metadata["onelora"])
    for name, tensor in tensors.items():
        # A sum is finite only if every value is; one that is not may also have overflown.
        if not math.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
            raise ValueError(f"'{path}': {name} holds NaN or infinity")
    return AdapterFile(
        config=AdapterConfig.from_json(json.dumps(header["config"])),
        tensors={name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()},
        fingerprint=header["fingerprint"],
        base=header["base"],
        id2label={int(label): name for label, name in header["id2label"].items()},
        training=header["training"],
        version=header["version"],
    )


def load_adapter(model: nn.Module, path: str | os.PathLike, adapter_name: str = "default") -> nn.Module:
    """Load an adapter file into its base model, make it the active one, and return the model.

    Raises:
        FileNotFoundError, ValueError: as `read_adapter`; or a base, a key or a shape does not fit.
            The model is left exactly as it was.
    """
    check_name(model, adapter_name)
    attach_adapter_file(model, read_adapter(path), adapter_name, source=str(path))
    return model


def _file_of(path: str | os.PathLike) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / WEIGHTS_NAME
