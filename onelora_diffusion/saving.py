"""Adapter files: one self-describing .safetensors, strictly checked."""

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from onelora_diffusion.config import AdapterConfig
from onelora_diffusion.files import written_beside
from onelora_diffusion.injection import (
    adapters_of,
    attach_adapter,
    build_adapter,
    check_name,
    fingerprint,
    state_dict_of,
)

WEIGHTS_NAME = "onelora_weights.safetensors"
PREFIX = "transformer."


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter file holds.

    Attributes:
        config: the adapter's settings.
        tensors: name (without the file's prefix `transformer.`) -> values, fp32 or bf16.
        fingerprint: of the base's parameter names and shapes; None for an adapter that came without.
        base: hub id or folder of the base model, if it was known.
        id2label: class names by label.
        training: the training summary.
        version: of onelora-diffusion, that wrote the file.
    """

    config: AdapterConfig
    tensors: dict[str, torch.Tensor]
    fingerprint: str | None
    base: str | None = None
    id2label: dict[int, str] = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    version: str = field(default_factory=lambda: version("onelora-diffusion"))


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike,
    adapter_name: str = "default",
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
        state_dict: other values for the same names, such as their moving average.
        id2label: class names by label.
        base: hub id or folder of the base model.
        training: a summary of the training that can be written as JSON.
        dtype: `torch.float32` or `torch.bfloat16`.

    Raises:
        OSError: the disk is full; an older file at `path` is still there.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"an adapter file is float32 or bfloat16, not {dtype}")
    book = adapters_of(model)
    own = state_dict_of(book.adapters[book.known(adapter_name)])
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


def attach_adapter_file(model: nn.Module, file: AdapterFile, adapter_name: str, source: str) -> None:
    """Check every key and shape of an adapter against a model, and only then attach it."""
    adapter = build_adapter(model, file.config)
    for module in adapter.values():  # under sequential offload the base is on the meta device between calls
        if any(parameter.is_meta for parameter in module.parameters()):
            module.to_empty(device="cpu")
    own = state_dict_of(adapter)
    for name in sorted(set(own) | set(file.tensors)):
        if name not in file.tensors:
            raise ValueError(f"{source}: {PREFIX}{name} is missing; this base needs it with {_shape(own[name])}")
        if name not in own:
            raise ValueError(f"{source}: {PREFIX}{name} with {_shape(file.tensors[name])} fits nothing in this base")
        if own[name].shape != file.tensors[name].shape:
            raise ValueError(
                f"{source}: {PREFIX}{name} has {_shape(file.tensors[name])}, but this base needs {_shape(own[name])}"
            )
    base = model._onelora.fingerprint if hasattr(model, "_onelora") else fingerprint(model)
    if file.fingerprint not in (base, None):
        raise ValueError(
            f"{source}: was made for another base ({file.base or 'unnamed'}): every adapted layer fits, but the names "
            f"or shapes of other parameters differ (fingerprint {file.fingerprint[:12]}, this model's {base[:12]})"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(file.tensors[name])
    attach_adapter(model, file.config, adapter_name, adapter)
    origin = {"id2label": file.id2label, "base": file.base, "training": file.training}
    adapters_of(model).origins[adapter_name] = origin


def _file_of(path: str | os.PathLike) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / WEIGHTS_NAME


def _shape(tensor: torch.Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"
