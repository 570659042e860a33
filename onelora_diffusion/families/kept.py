"""The record of a pipeline in a file, so that a pipeline is probed once."""

import hashlib
import json
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from onelora_diffusion.families.arguments import Arrangement
from onelora_diffusion.families.modular import Modular
from onelora_diffusion.families.record import Place, Prompted, Record
from onelora_diffusion.families.recording import Recorder
from onelora_diffusion.files import first_line, written_beside

FORMAT = 6  # to be raised when a record means something else
CLASSES = {cls.__name__: cls for cls in (Arrangement, Place, Prompted, Record)}
SEQUENCES = {cls.__name__: cls for cls in (list, tuple, set)}


def path_of(folder: Path, recorder: Recorder) -> Path:
    """The file in a folder for pipelines of a class, with components of these configurations, in this diffusers."""
    pipeline = recorder.pipeline
    parts = {name: getattr(part, "config", type(part).__name__) for name, part in pipeline.components.items()}
    configs = {name: part if isinstance(part, dict | str) else part.to_dict() for name, part in parts.items()}
    key = [
        FORMAT,
        [version(package) for package in ("diffusers", "transformers")],
        str(recorder.denoiser.dtype),
        recorder.component,
        recorder.record.references,
        {name: value for name, value in pipeline.config.items() if name not in pipeline.components},
        configs,
        *([type(pipeline._blocks).__name__] if isinstance(pipeline, Modular) else []),
    ]
    text = json.dumps(_public(key), sort_keys=True, default=str)
    return folder / f"record-{type(pipeline).__name__}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.safetensors"


def _public(value):
    """Settings without those that say where they come from."""
    if isinstance(value, dict):
        return {str(name): _public(entry) for name, entry in value.items() if not str(name).startswith("_")}
    return [_public(entry) for entry in value] if isinstance(value, list | tuple) else value


def keep(path: Path, record: Record, place: Place) -> None:
    """Write a record and the place at its size; nothing where they hold what a file cannot."""
    tensors: dict[str, Tensor] = {}
    try:
        text = json.dumps(_encoded([record, place], tensors))
    except TypeError:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as part:
        save_file(tensors, part, {"record": text})


def kept(path: Path) -> tuple[Record, Place] | None:
    """The record and the place in a file; None if there is no such file, or it is damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            record, place = _decoded(json.loads(file.metadata()["record"]), tensors)
    except Exception as error:  # whatever a damaged file is read by
        print(f"{path}: is read no more ({first_line(error)}); the pipeline is recorded anew", flush=True)
        return None
    return record, place


def _encoded(value, tensors: dict[str, Tensor]):
    """A value as JSON; its tensors are added to `tensors`, by number."""
    if isinstance(value, Tensor) and value.is_meta:
        return {"shape": [str(value.dtype).removeprefix("torch."), *value.shape]}
    if isinstance(value, Tensor) and (sizes := _kept_of(value)) != [*value.shape]:
        return {"expanded": [_encoded(value[tuple(map(slice, sizes))], tensors)["tensor"], *value.shape]}
    if isinstance(value, Tensor):
        tensors[str(len(tensors))] = value.detach().cpu().contiguous().clone()
        return {"tensor": str(len(tensors) - 1)}
    if is_dataclass(value):
        named = {field.name: getattr(value, field.name) for field in fields(value)}
        return {type(value).__name__: _encoded(named, tensors)}
    if type(value) is dict:
        return {"dict": [[_encoded(name, tensors), _encoded(entry, tensors)] for name, entry in value.items()]}
    if type(value).__name__ in SEQUENCES or isinstance(value, torch.Size):
        kind = "tuple" if isinstance(value, tuple) else type(value).__name__
        return {kind: [_encoded(entry, tensors) for entry in value]}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"a {type(value).__name__} has no form in a file")


def _kept_of(tensor: Tensor) -> list[int]:
    """The sizes of the part of a tensor that its memory has once."""
    return [size if step else min(size, 1) for size, step in zip(tensor.shape, tensor.stride(), strict=True)]


def _decoded(value, tensors: dict[str, Tensor]):
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "expanded":
        return tensors[content[0]].expand(content[1:])
    if kind == "shape":
        return torch.empty(content[1:], dtype=getattr(torch, content[0]), device="meta")
    if kind == "dict":
        return {_decoded(name, tensors): _decoded(entry, tensors) for name, entry in content}
    if kind in CLASSES:
        return CLASSES[kind](**_decoded(content, tensors))
    return SEQUENCES[kind](_decoded(entry, tensors) for entry in content)
