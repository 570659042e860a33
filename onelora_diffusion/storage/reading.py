"""Read an adapter of any supported kind from a file, a folder, the hub or a state dict."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from onelora_diffusion.adapters.class_table import CLASS_TABLE
from onelora_diffusion.config import AdapterConfig
from onelora_diffusion.injection.attaching import PREFIX
from onelora_diffusion.injection.book import check_name, unwrapped
from onelora_diffusion.injection.layers import norm_layers, target_layers
from onelora_diffusion.storage.adapter_file import read_opened
from onelora_diffusion.storage.attaching import PAIR, AdapterFile, attach_adapter_file
from onelora_diffusion.storage.finding import FileLocation, find_weights
from onelora_diffusion.storage.lora import (
    PEFT_CONFIG,
    TEXT_ENCODER_KEY,
    import_foreign,
    is_foreign,
    refuse_other_kinds,
    without_text_encoders,
)
from onelora_diffusion.storage.opening import check_state_dict, opened, read_bytes, strict_json

Translate = Callable[[dict[str, torch.Tensor], str], dict[str, torch.Tensor]]
ANYWHERE = FileLocation()


def load_adapter(
    model: nn.Module, path: str | os.PathLike | dict[str, torch.Tensor], adapter_name: str = "default"
) -> nn.Module:
    """Load an adapter into its base model, make it the active one, and return the model.

    It reads what a pipeline's `load_lora_weights` reads: an adapter of this library, a LoRA or DoRA of linear layers,
    or MiSS; given as a file, a folder, a hub id or a state dict. Keys must have the model's own layer names or kohya's
    form of them; only the pipeline's verb converts other programs' names. Adapters that train go on training (see
    `train_adapters`).

    Raises:
        FileNotFoundError, ValueError: as `read_adapter`, or a base, a key or a shape does not fit. The model is not
            changed then.
    """
    check_name(model, adapter_name)
    inner = unwrapped(model)
    file, shown = read_source(inner, path, without_text_encoders)
    attach_adapter_file(inner, file, adapter_name, source=shown)
    return model


def read_source(
    model: nn.Module,
    source: str | os.PathLike | dict[str, torch.Tensor],
    translate: Translate,
    location: FileLocation = ANYWHERE,
    component: str | None = None,
) -> tuple[AdapterFile, str]:
    """(the adapter in a file, a folder, a hub repository or a state dict; its name in errors).

    `component` is the one of a pipeline's two transformers that `model` is, whose part is read of a file of both.
    """
    if isinstance(source, dict):
        if any(name.startswith(f"{PAIR[1]}.") and ".onelora_" in name for name in source) and component:
            prefix = f"{component}."
            source = {name.removeprefix(prefix): tensor for name, tensor in source.items() if name.startswith(prefix)}
        return read_dict(model, source, {}, "the state dict", translate), "the state dict"
    path = find_weights(source, location)
    return read_file(model, path, translate, component), str(path)


def components_of(source: str | os.PathLike | dict[str, torch.Tensor], location: FileLocation) -> tuple[str, ...]:
    """The two denoisers that an adapter of this library is for; () if it is for one."""
    if isinstance(source, dict):
        names = source
    else:
        with opened(find_weights(source, location)) as file:
            names = file.shapes
    return PAIR if any(name.startswith(f"{PAIR[1]}.") and ".onelora_" in name for name in names) else ()


def read_file(model: nn.Module, path: Path, translate: Translate, component: str | None = None) -> AdapterFile:
    """Read the adapter in a file of any supported kind; `translate` is as in `read_dict`."""
    with opened(path) as file:
        if "onelora" in file.metadata:
            return read_opened(file, model, component)
        settings, config = {}, path.with_name(PEFT_CONFIG)
        if "lora_adapter_metadata" in file.metadata:
            given = _settings(file.metadata["lora_adapter_metadata"], file.source)
            # Pipelines write the denoiser's as `transformer.lora_alpha`, models as `lora_alpha`.
            settings = {k.split(".", 1)[-1]: v for k, v in given.items() if not TEXT_ENCODER_KEY.fullmatch(k)}
        elif config.is_file():
            settings = _settings(read_bytes(config), str(config))
        return read_dict(model, file.tensors(), settings, file.source, translate)


def read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with opened(path) as file:
        return file.tensors(), file.metadata


def _settings(text: str | bytes, source: str) -> dict:
    settings = strict_json(text, source)
    if not isinstance(settings, dict):
        raise ValueError(f"{source}: its settings are {type(settings).__name__}, and must be values by name")
    return settings


def read_dict(
    model: nn.Module, tensors: dict[str, torch.Tensor], settings: dict, source: str, translate: Translate
) -> AdapterFile:
    """Read an adapter from tensors without a header; their keys tell its kind.

    `settings` are PEFT's of a LoRA; `translate` renames the tensors to the model's layers, given their source too.
    """
    check_state_dict(tensors, source)
    own = [key for key in tensors if ".onelora_" in key or key.removeprefix(PREFIX).startswith(f"{CLASS_TABLE}.")]
    if own:
        return _read_own(model, tensors, source)
    tensors = translate(tensors, source)
    refuse_other_kinds(tensors, source)
    if not is_foreign(tensors):
        found = ", ".join(list(tensors)[:3]) or "no keys at all"
        raise ValueError(
            f"{source} holds no adapter: none of its {len(tensors)} keys is one of 1LoRA, LoRA, DoRA or MiSS ({found})"
        )
    return import_foreign(model, tensors, settings, source)


def _read_own(model: nn.Module, tensors: dict[str, torch.Tensor], source: str) -> AdapterFile:
    """Read a vector adapter of all layers, whose keys tell all its settings but a random compression."""
    values = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    parts = {tuple(key.rsplit(".onelora_", 1)) for key in values if ".onelora_" in key}
    vectors = {path for path, part in parts if part in ("b", "beta", "gamma")}
    others = {path for path, part in parts if part not in ("b", "beta", "gamma")}
    if not others <= set(norm_layers(model)):
        odd = sorted(others - set(norm_layers(model)))[0]
        raise ValueError(f"{source}: the settings of what it holds for {odd} are in its file's header: load the file")
    if vectors and (missing := sorted(set(target_layers(model, None)) - vectors)):
        raise ValueError(
            f"{source}: has nothing for {missing[0]}, and bare tensors do not say which layers they are meant for; "
            "save_adapter writes a file that does"
        )
    table = values.get(f"{CLASS_TABLE}.weight")
    names = {part for path, part in parts if path in vectors}
    return AdapterFile(
        config=AdapterConfig(
            sum="b" in names,
            bias="beta" in names,
            scale="gamma" in names,
            norms=bool(others),
            num_classes=None if table is None or table.ndim != 2 else len(table) - 1,
        ),
        tensors=values,
        fingerprint=None,
    )


def json_or_text(text: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
