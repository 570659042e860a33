"""To LoRA and back: 1LoRA is the LoRA of rank 1 whose A is all ones, and MiSS of rank 1."""

import json
import math
import os
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from onelora_diffusion.adapters.class_table import CLASS_TABLE
from onelora_diffusion.config import AdapterConfig
from onelora_diffusion.files import written_beside
from onelora_diffusion.injection.attaching import AdapterFile
from onelora_diffusion.injection.book import adapters_of
from onelora_diffusion.injection.layers import target_layers

DIFFUSERS_LORA = "pytorch_lora_weights.safetensors"
PEFT_LORA = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"

FOREIGN_KEY = re.compile(
    r"(?P<path>.+?)\.(?P<part>lora_A|lora_B|lora[._]down|lora[._]up|lora_magnitude_vector|alpha|miss_block)"
    r"(?:\.default)?(?:\.weight)?"
)
PARTS = {"lora_down": "lora_A", "lora_up": "lora_B", "lora.down": "lora_A", "lora.up": "lora_B"}


# ---------------------------------------------------------------------------------------------------
# To LoRA


def export_lora(
    model: nn.Module, path: str | os.PathLike, adapter_name: str = "default", *, dtype: torch.dtype = torch.float32
) -> Path:
    """Write a 1LoRA adapter as an ordinary LoRA of rank 1, which needs nothing of this library to load.

        b · Σᵢ xᵢ = B A x,  A = (1 … 1), B = b

    Args:
        path: a `.safetensors` file for the `load_lora_weights` of diffusers' pipelines, or a folder that holds
            that file (`pytorch_lora_weights.safetensors`) and the same as PEFT's `PeftModel.from_pretrained`
            has it, which also serves models without LoRA verbs in diffusers, such as DiT.
        dtype: of the tensors written.

    Returns:
        `path`.

    Raises:
        ValueError: the adapter holds what a LoRA cannot carry: a class table, β, γ, norms, a random compression,
            or it is of another method. To keep these, merge and `save_pretrained`. Nothing is written.
    """
    book = adapters_of(model)
    adapter, config = book.adapters[book.known(adapter_name)], book.configs[adapter_name]
    reasons = {
        f"it is of method '{config.method}'": not config.is_vector,
        "it trains a class table": CLASS_TABLE in adapter,
        "it trains biases (β)": config.bias,
        "it trains scales (γ)": config.scale,
        "it trains norms": any(not hasattr(m, "b") for p, m in adapter.items() if p != CLASS_TABLE),
        "its compression is random, not the sum": config.compression != "sum",
        "it has no sum part (b)": config.is_vector and not config.sum,
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise ValueError(
            f"adapter '{adapter_name}' cannot be a LoRA: {', '.join(found)}; merge_adapter and save_pretrained write "
            "all of it into a plain model"
        )

    component = "unet" if type(model).__name__.startswith("UNet") else "transformer"
    lora = {}
    for layer, module in adapter.items():
        in_features = model.get_submodule(layer).in_features
        lora[f"{layer}.lora_A.weight"] = torch.ones(1, in_features, dtype=dtype)
        lora[f"{layer}.lora_B.weight"] = module.b.detach().to("cpu", dtype).unsqueeze(1).clone()
    settings = {"r": 1, "lora_alpha": 1, "target_modules": list(adapter), "bias": "none"}
    settings |= {"rank_pattern": {}, "alpha_pattern": {}}  # diffusers up to 0.39 reads them without asking
    path = Path(path)
    if path.suffix == ".safetensors":
        _write_diffusers(path, lora, settings, component)
        return path
    if path.is_file():
        raise ValueError(f"'{path}' is a file: give a folder, or a name that ends in .safetensors")
    base = book.origins.get(adapter_name, {}).get("base")
    peft_settings = {"peft_type": "LORA", "base_model_name_or_path": base, "inference_mode": True} | settings
    path.mkdir(parents=True, exist_ok=True)
    _write_diffusers(path / DIFFUSERS_LORA, lora, settings, component)
    with written_beside(path / PEFT_LORA) as part:
        save_file({f"base_model.model.{k}": t for k, t in lora.items()}, part)
    with written_beside(path / PEFT_CONFIG) as part:
        part.write_text(json.dumps(peft_settings, indent=2) + "\n")
    return path


def _write_diffusers(path: Path, lora: dict[str, torch.Tensor], settings: dict, component: str) -> None:
    metadata = {f"{component}.{name}": value for name, value in settings.items()}
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(metadata)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as part:
        save_file({f"{component}.{k}": t for k, t in lora.items()}, part, header)


# ---------------------------------------------------------------------------------------------------
# From LoRA, DoRA and MiSS


def is_foreign(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether any key is one of LoRA's, DoRA's or MiSS's."""
    return any(FOREIGN_KEY.fullmatch(key) for key in tensors)


def import_foreign(model: nn.Module, tensors: dict[str, torch.Tensor], settings: dict, source: str) -> AdapterFile:
    """An adapter of this library from the tensors of a LoRA, DoRA or MiSS.

    A LoRA whose A repeats one number (c … c) in each row is exactly 1LoRA with b = α/r · B c, and so is MiSS of
    rank 1; any other LoRA or DoRA becomes an adapter of that method, which needs PEFT.

    Args:
        settings: PEFT's settings of the adapter; empty where none came with it, alpha being r then.
        source: named in errors.

    Raises:
        ValueError: a key of another kind, tensors that do not pair up, or settings that cannot be kept.
    """
    layers = _by_layer(model, tensors, source)
    kept = {"bias": (None, "none"), "modules_to_save": (None, []), "layer_replication": (None, [])}
    for name, neutral in kept.items():
        if settings.get(name) not in neutral:
            raise ValueError(f"{source}: its {name} is {settings[name]!r}, which an adapter here cannot carry")

    kinds = {frozenset(parts) - {"alpha"} for parts in layers.values()}
    if kinds == {frozenset({"miss_block"})}:
        method, values = "1lora", {path: {"b": _miss(path, p, settings, source)} for path, p in layers.items()}
    elif kinds <= {frozenset({"lora_A", "lora_B"}), frozenset({"lora_A", "lora_B", "lora_magnitude_vector"})}:
        method, values = _lora(layers, settings, source)
    else:
        odd = next(path for path, p in layers.items() if not {"lora_A", "lora_B"} <= set(p) and "miss_block" not in p)
        raise ValueError(f"{source}: {odd} has {', '.join(layers[odd])} without the rest of it")

    targets = tuple(layers)
    if set(target_layers(model, targets)) != set(layers):  # a path that is also the end of another one
        values |= {path: _neutral(model, path, values) for path in target_layers(model, targets) if path not in values}
    rank = 1 if method == "1lora" else len(next(iter(values.values()))["lora_A.weight"])
    return AdapterFile(
        config=AdapterConfig(method=method, rank=rank, targets=targets),
        tensors={f"{path}.onelora_{name}": t for path, parts in values.items() for name, t in parts.items()},
        fingerprint=None,
        base=settings.get("base_model_name_or_path"),
    )


def _by_layer(model: nn.Module, tensors: dict[str, torch.Tensor], source: str) -> dict[str, dict[str, torch.Tensor]]:
    """path of a layer -> part (`lora_A`, `alpha`, …) -> tensor, in fp32."""
    known = dict(model.named_modules())
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = FOREIGN_KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{source}: {key} with shape {tuple(tensor.shape)} is no part of a LoRA, DoRA or MiSS")
        path = match["path"].removeprefix("base_model.model.")
        for prefix in ("transformer.", "unet."):
            path = path if path in known else path.removeprefix(prefix)
        if not isinstance(known.get(path), nn.Linear):
            what = "layer" if path not in known else "linear layer"
            raise ValueError(f"{source}: {key} serves '{path}', and {type(model).__name__} has no such {what}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{source}: {key} holds NaN or infinity")
        layers.setdefault(path, {})[PARTS.get(match["part"], match["part"])] = tensor.float()
    return layers


def _miss(path: str, parts: dict[str, torch.Tensor], settings: dict, source: str) -> torch.Tensor:
    block, init = parts["miss_block"], settings.get("init_weights", True)
    if block.ndim != 2 or len(block) != 1 or init in ("bat", "mini"):
        raise ValueError(
            f"{source}: {path} is MiSS of shape {tuple(block.shape)} (init_weights={init!r}); only the plain one of "
            "rank 1 is 1LoRA"
        )
    return block[0].clone()


def _lora(layers: dict, settings: dict, source: str) -> tuple[str, dict[str, dict[str, torch.Tensor]]]:
    """(method, values by path); the scale α/r is multiplied into B."""
    is_dora = any("lora_magnitude_vector" in parts for parts in layers.values())
    scaled = {}
    for path, parts in layers.items():
        a, b = parts["lora_A"], parts["lora_B"]
        if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
            raise ValueError(f"{source}: {path} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}: no LoRA pair")
        if is_dora and "lora_magnitude_vector" not in parts:
            raise ValueError(f"{source}: {path} has no lora_magnitude_vector, as other layers of this DoRA have")
        alpha = parts["alpha"].item() if "alpha" in parts else _alpha(path, len(a), settings)
        scaled[path] = a, b * (alpha / (math.sqrt(len(a)) if settings.get("use_rslora") else len(a)))
    if not is_dora and all((a == a[:, :1]).all() for a, _ in scaled.values()):
        return "1lora", {path: {"b": b @ a[:, 0]} for path, (a, b) in scaled.items()}

    rank = max(len(a) for a, _ in scaled.values())  # layers of a lower rank are filled up with zeros
    values = {
        path: {
            "lora_A.weight": nn.functional.pad(a, (0, 0, 0, rank - len(a))),
            "lora_B.weight": nn.functional.pad(b, (0, rank - len(a))),
        }
        for path, (a, b) in scaled.items()
    }
    for path, parts in layers.items():
        if is_dora:
            values[path]["lora_magnitude_vector.weight"] = parts["lora_magnitude_vector"]
    return "dora" if is_dora else "lora", values


def _alpha(path: str, rank: int, settings: dict) -> float:
    for pattern, alpha in (settings.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", path):
            return alpha
    return settings.get("lora_alpha", rank)


def _neutral(model: nn.Module, path: str, values: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Values that leave a layer as it is, for one that only shares its name with a layer of the file."""
    parts, linear = next(iter(values.values())), model.get_submodule(path)
    if "b" in parts:
        return {"b": torch.zeros(linear.out_features)}
    rank = len(parts["lora_A.weight"])
    neutral = {
        "lora_A.weight": torch.zeros(rank, linear.in_features),
        "lora_B.weight": torch.zeros(linear.out_features, rank),
    }
    if "lora_magnitude_vector.weight" in parts:
        neutral["lora_magnitude_vector.weight"] = linear.weight.detach().float().norm(dim=1)
    return neutral
