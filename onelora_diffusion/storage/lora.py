"""Convert between 1LoRA and LoRA: 1LoRA, like MiSS, is a LoRA whose fixed A has ones where inputs are summed up."""

import json
import logging
import math
import os
import re
from pathlib import Path

import torch
from torch import nn

from onelora_diffusion.adapters.base_layer import is_pointwise
from onelora_diffusion.adapters.compressions import groups
from onelora_diffusion.config import AdapterConfig
from onelora_diffusion.denoisers import TwoDenoisers
from onelora_diffusion.files import printable, write_bytes, write_tensors
from onelora_diffusion.injection.attaching import state_dict_of
from onelora_diffusion.injection.book import AdapterBook, adapters_of
from onelora_diffusion.injection.layers import FUSED, is_servable, target_layers
from onelora_diffusion.storage.attaching import PAIR, AdapterFile, check_whole
from onelora_diffusion.storage.lokr import read_lokr
from onelora_diffusion.storage.naming import (
    ALL_NAMINGS,
    COMFYUI,
    ExportedPath,
    LoraLayer,
    Naming,
    by_diffusers_paths,
    named_for,
)
from onelora_diffusion.storage.peft_settings import alpha_among, check_settings, of_layer

logger = logging.getLogger(__name__)

DIFFUSERS_LORA = "pytorch_lora_weights.safetensors"
PEFT_LORA = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"

FOREIGN_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<name>.+?)\."
    r"(?P<part>lora_A|lora_B|lora[._]down|lora[._]up|lora_magnitude_vector|dora_scale|alpha|miss_block"
    r"|lokr_w[12](?:_[ab])?|diff_b)"
    r"(?:\.[^.]+?)??(?:\.(?P<kind>weight|bias))?"  # PEFT's state dicts have the adapter's name in their keys
)
TEXT_ENCODER_KEY = re.compile(r"(text_encoders?(_\d+)?\.|lora_te\d?_).+")
BIASES = ("beta", "lora_B.bias")

# Kinds of adapters that are not read, by a pattern of their keys.
OTHER_KINDS = {
    r".+\.lokr_t2": "a LoKr of convolutions",
    r".+\.hada_(w[12]_[ab]|t[12])": "LoHa",
    r".+\.(oft_.+|boft_.+)": "OFT or BOFT",
    r".+\.(on_input|ia3_l(\..+)?)": "IA3",
    r".+\.(lora_mid|lora[._]mid)\.weight": "a LoRA of convolutions (LoCon)",
    r".+\.(diff|w_norm|b_norm|set_weight)": "changes of whole weights beside a LoRA",
    r".+\.(a1|a2|b1|b2|bm)\.weight": "GLoRA",
    r".+\.(vera_lambda|hra_u|fourierft|randlora|shira|road|c3a|waveft|delora|lora_E).*": "another tuner",
    r"(emb_params|clip_[lg]|string_to_param.*)": "a textual inversion",
}
PARTS = {"lora_down": "lora_A", "lora_up": "lora_B", "lora.down": "lora_A", "lora.up": "lora_B"}
PARTS["dora_scale"] = "lora_magnitude_vector"  # the name of LyCORIS, which writes a column


def export_lora(
    model: nn.Module,
    path: str | os.PathLike,
    adapter_name: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    naming: Naming = "diffusers",
) -> Path:
    """Write a 1LoRA adapter as an ordinary LoRA of the same rank, which loads without this library.

        b · Σᵢ xᵢ = B A x,  A = (1 … 1), B = b

    For a higher rank or another compression, A is the compression as a matrix.

    Args:
        path: a `.safetensors` file, which the `load_lora_weights` of diffusers' pipelines reads; or a folder, which
            gets that file (`pytorch_lora_weights.safetensors`) and files that PEFT's `PeftModel.from_pretrained`
            reads, for models that diffusers has no LoRA verbs for, such as DiT.
        adapter_name: None takes the active adapter.
        dtype: dtype of the written tensors.
        naming: the program that reads the file: "diffusers", "kohya" (kohya's sd-scripts) or "comfyui" (ComfyUI, which
            reads β as well). Layers have that program's names and are fused as its layers are; a folder gets
            `kohya_lora.safetensors` or `comfyui_lora.safetensors`.

    An adapter of two transformers is two LoRAs, in the folders `transformer` and `transformer_2` of `path`.

    Returns:
        `path`. Its attribute `left_out` names the layers that the program does not read; a warning names them too.

    Raises:
        ValueError: the adapter has parts that a LoRA cannot have (a class table, β, γ or norms), is of another
            method, or that program's names for this model are not known. Nothing is written. To keep all parts,
            merge the adapter and call `save_pretrained`.
    """
    book, path = adapters_of(model), Path(path)
    if naming not in ALL_NAMINGS:
        raise ValueError(f"unknown naming '{naming}': choose one of {', '.join(ALL_NAMINGS)}")
    adapter_name = book.choose(adapter_name)
    is_folder, is_of_two = path.suffix != ".safetensors", isinstance(book.model, TwoDenoisers)
    if is_folder and path.is_file() or is_of_two and not is_folder:
        raise ValueError(f"'{path}' is a file: give a folder{', or a name ending in .safetensors' * (not is_of_two)}")
    parts = {name: path / name for name in PAIR} if is_of_two else {None: path}
    left_out = [
        layer
        for part, folder in parts.items()
        for layer in _write_named(book, folder, adapter_name, dtype, naming, part)
    ]
    exported = ExportedPath(path)
    exported.left_out = tuple(left_out)
    return exported


def _write_named(
    book: AdapterBook, path: Path, adapter_name: str, dtype: torch.dtype, naming: Naming, part: str | None
) -> tuple[str, ...]:
    """Write the LoRA of a model, or of a part of it; the layers that are left out."""
    tensors, left_out = renamed_lora(book.model, adapter_name, naming, part)
    tensors = {name: tensor.to(dtype).clone() for name, tensor in tensors.items()}
    is_folder = path.suffix != ".safetensors"
    if naming == "diffusers":
        component = "unet" if type(book.model).__name__.startswith("UNet") else "transformer"
        rank, targets = len(next(iter(tensors.values()))), list(_paths_in(book.adapters[adapter_name], part))
        settings = {"r": rank, "lora_alpha": rank, "target_modules": targets, "bias": "none"}
        settings |= {"rank_pattern": {}, "alpha_pattern": {}}  # diffusers up to 0.39 fails without them
        write_lora(path / DIFFUSERS_LORA if is_folder else path, {component: tensors}, {component: settings})
        if is_folder:
            base = book.origins.get(adapter_name, {}).get("base")
            settings |= {"peft_type": "LORA", "base_model_name_or_path": base, "inference_mode": True}
            write_tensors(path / PEFT_LORA, {f"base_model.model.{name}": t for name, t in tensors.items()})
            write_bytes(path / PEFT_CONFIG, (json.dumps(settings, indent=2) + "\n").encode())
    else:
        file = path / f"{naming}_lora.safetensors" if is_folder else path
        write_tensors(file, tensors, {"format": "pt"})
        if left_out:
            logger.warning(
                "%s: %s does not take %d of %d layers, which are left out: %s",
                *(file, naming, len(left_out), len(book.adapters[adapter_name]), ", ".join(left_out)),
            )
    return left_out


def _paths_in(layers: dict, part: str | None) -> dict:
    """What a part of a model has by the paths of its layers, by their paths in the part; all if it is None."""
    prefix = "" if part is None else f"{part}."
    return {path.removeprefix(prefix): value for path, value in layers.items() if path.startswith(prefix)}


def check_export(model: nn.Module, adapter_name: str, naming: Naming) -> None:
    """ValueError if `export_lora` would raise one."""
    for part in PAIR if isinstance(adapters_of(model).model, TwoDenoisers) else (None,):
        renamed_lora(model, adapter_name, naming, part)


def renamed_lora(
    model: nn.Module, adapter_name: str, naming: Naming, part: str | None = None
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """The tensors that `export_lora` writes, for diffusers without the component, and the layers left out."""
    pairs = _paths_in(lora_pairs(model, adapter_name, with_bias=naming == "comfyui"), part)
    return named_for(naming, adapters_of(model).model.get_submodule(part or ""), pairs)


def write_lora(path: Path, layers: dict[str, dict[str, torch.Tensor]], settings: dict[str, dict | None]) -> None:
    """Write a LoRA as diffusers does: tensors by component, and PEFT's settings of each component in the header."""
    tensors = {f"{part}.{key}": tensor for part, own in layers.items() for key, tensor in own.items()}
    metadata = {f"{part}.{name}": value for part, own in settings.items() for name, value in (own or {}).items()}
    of_peft = {"lora_adapter_metadata": json.dumps(metadata, default=sorted)}  # some settings of PEFT are sets
    write_tensors(path, tensors, {"format": "pt"} | (of_peft if metadata else {}))


def lora_pairs(model: nn.Module, adapter_name: str, with_bias: bool = False) -> dict[str, LoraLayer]:
    """A, B and β of each layer by its path; ValueError if the adapter has parts that a LoRA cannot have."""
    book = adapters_of(model)
    check_whole(state_dict_of(book.adapters[adapter_name]))
    pairs, reasons = {}, []
    for layer, module in book.adapters[adapter_name].items():
        try:
            change = module.lora(with_bias)
            pairs[layer] = LoraLayer(*change, (1, 1) if is_pointwise(module.layer) else ())
        except ValueError as reason:
            reasons.append(str(reason))
    if reasons:
        raise ValueError(
            f"adapter '{adapter_name}' cannot be a LoRA: it is of method '{book.configs[adapter_name].method}', "
            f"{', '.join(dict.fromkeys(reasons))}; merge_adapter and save_pretrained write all into a plain model"
        )
    return pairs


def refuse_other_kinds(tensors: dict[str, torch.Tensor], source: str) -> None:
    """ValueError for a kind of adapter that is not read; the message names the kind."""
    for key, tensor in tensors.items():
        kind = next((kind for pattern, kind in OTHER_KINDS.items() if re.fullmatch(pattern, key)), None)
        if key.endswith(".dora_scale") and (tensor.ndim != 2 or tensor.shape[1] != 1):
            kind = "a DoRA whose scale is not one number for each output, of shape (out_features, 1)"
        elif kind is None and tensor.ndim == 4 and tensor.shape[2:] != (1, 1) and FOREIGN_KEY.fullmatch(key):
            kind = "a LoRA of convolutions"
        if kind is not None:
            raise ValueError(
                f"{source}: {key} with shape {tuple(tensor.shape)} is part of {kind}; what is read is 1LoRA, "
                "LoRA, DoRA and LoKr of linear layers and of 1 x 1 convolutions, and MiSS"
            )


def without_text_encoders(tensors: dict[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
    """Leave out the tensors for text encoders, with a warning; ValueError if there are no others."""
    own = {key: tensor for key, tensor in tensors.items() if not TEXT_ENCODER_KEY.fullmatch(key)}
    if tensors and not own:
        raise ValueError(f"{source} is for text encoders only ({next(iter(tensors))}), which are not adapted here")
    if len(own) < len(tensors):
        left = len(tensors) - len(own)
        logger.warning("%s: %d of %d tensors are for text encoders, and are left out", source, left, len(tensors))
    return own


def is_foreign(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether any key is that of a LoRA, DoRA or MiSS."""
    return any(FOREIGN_KEY.fullmatch(key) for key in tensors)


def import_foreign(model: nn.Module, tensors: dict[str, torch.Tensor], settings: dict, source: str) -> AdapterFile:
    """Convert the tensors of a LoRA, DoRA, LoKr or MiSS to an adapter of this library.

    A LoRA whose A repeats one number (c … c) in each row is exactly 1LoRA with b = α/r · B c; one of rank r whose
    row j has one number at each input i with i mod r = j, and zeros elsewhere, is 1LoRA of rank r, and so is MiSS.
    Any other LoRA, DoRA or LoKr becomes an adapter of that method, which needs PEFT. A convolution of 1 x 1 is read
    as the linear layer that it is.

    `settings` are PEFT's; empty if the adapter came without any, in which case alpha is r. ValueError if a key is of
    another kind, A or B of a layer is missing, or a setting has no equivalent here.
    """
    check_settings(settings, source)
    layers = _by_layer(model, tensors, source)
    kinds = {frozenset(parts) - {"alpha", "lora_B.bias", "diff_b"} for parts in layers.values()}
    if kinds == {frozenset({"miss_block"})}:
        values = {path: {"b": _miss(model, path, p, settings, source)} for path, p in layers.items()}
    elif kinds == {frozenset()} and all(set(parts) == {"diff_b"} for parts in layers.values()):
        values = {path: {"beta": parts["diff_b"]} for path, parts in layers.items()}
    elif all(kind and all(name.startswith("lokr_") for name in kind) for kind in kinds):
        values, lokr = read_lokr(layers, settings, source)
    elif kinds <= {frozenset({"lora_A", "lora_B"}), frozenset({"lora_A", "lora_B", "lora_magnitude_vector"})}:
        values = _lora(model, layers, settings, source)
    else:
        odd = next((path for path, p in layers.items() if not {"lora_A", "lora_B"} <= {*p}), next(iter(layers), None))
        raise ValueError(
            f"{source}: {odd} has {', '.join(layers.get(odd, ()))}; every layer needs lora_A and lora_B, or "
            "miss_block alone"
        )

    targets = tuple(layers)
    names = next(iter(values.values()))  # every layer has the same names
    if set(names) == {"beta"}:
        config = AdapterConfig("bitfit", targets=targets)
    elif "b" in names:
        rank = 1 if names["b"].ndim == 1 else len(names["b"])
        config = AdapterConfig(rank=rank, bias="beta" in names, targets=targets)
    elif "lokr_w1" in names:
        config = AdapterConfig("peft:lokr", targets=targets, peft_config=lokr)
    else:
        method = "dora" if "lora_magnitude_vector.weight" in names else "lora"
        peft_config = {"lora_bias": True} if "lora_B.bias" in names else None
        config = AdapterConfig(method, len(names["lora_A.weight"]), targets, peft_config=peft_config)
    tensors = {f"{path}.onelora_{name}": t for path, parts in values.items() for name, t in parts.items()}
    if others := {path: layer for path, layer in target_layers(model, targets).items() if path not in values}:
        # Their paths only end in the path of a layer of the file; an adapter starts as one that changes nothing.
        tensors |= state_dict_of(config.recipe.build(others, config))
    return AdapterFile(config, tensors, fingerprint=None, base=settings.get("base_model_name_or_path"))


def paths_by_name(model: nn.Module) -> dict[str, str]:
    """The path of each layer of a model, by every name that LoRA files use for it."""
    names = {path: path for path, _ in model.named_modules()}
    for path in list(names):
        flat = path.replace(".", "_")  # the form that kohya's scripts and OneTrainer write
        for prefix in ("transformer.", "unet.", COMFYUI):
            names.setdefault(f"{prefix}{path}", path)
        for prefix in ("lora_transformer_", "lora_unet_", "lycoris_"):
            names.setdefault(f"{prefix}{flat}", path)
    return names


def _by_layer(model: nn.Module, tensors: dict[str, torch.Tensor], source: str) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of each layer, in fp32: path -> part (`lora_A`, `lora_B.bias`, `alpha`, …) -> tensor."""
    paths = paths_by_name(model)
    if not all(match and match["name"] in paths for match in map(FOREIGN_KEY.fullmatch, tensors)):
        tensors = by_diffusers_paths(model, tensors) or tensors
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = FOREIGN_KEY.fullmatch(key)
        part = match and PARTS.get(match["part"], match["part"]) + (".bias" if match["kind"] == "bias" else "")
        if match is None or part.endswith(".bias") and part != "lora_B.bias":
            raise ValueError(
                f"{source}: {key} with shape {tuple(tensor.shape)} is no part of a LoRA, DoRA, LoKr or MiSS"
            )
        path = paths.get(match["name"])
        layer = None if path is None else model.get_submodule(path)
        if layer is None or not is_servable(layer):
            found = "" if layer is None else f", but {path}, a {type(layer).__name__}, which no adapter here serves"
            if match["name"].rpartition(".")[2] in FUSED:
                found = "; it is for fused projections: call fuse_qkv_projections() first"
            raise ValueError(
                f"{source}: {key} serves no linear layer, nor 1 x 1 convolution, of {type(model).__name__}{found}"
            )
        if part == "diff_b" and (layer.bias is None or tensor.shape != layer.bias.shape):
            raise ValueError(
                f"{source}: {key} with shape {tuple(tensor.shape)} changes a bias that {path} has not; leave it out"
            )
        parts = layers.setdefault(path, {})
        if part in parts:
            raise ValueError(f"{source}: {key} is the {part} of {path}, which is there twice; leave one out")
        if part == "lora_magnitude_vector":
            tensor = tensor.flatten()
        parts[part] = (tensor.flatten(1) if tensor.ndim == 4 else tensor).float()
    return layers


def _miss(model: nn.Module, path: str, parts: dict[str, torch.Tensor], settings: dict, source: str) -> torch.Tensor:
    """Convert a MiSS block to b, (out_features,) or (rank, out_features); the kind `mini` repeats a narrow block."""
    block, init = parts["miss_block"], settings.get("init_weights", True)
    features = model.get_submodule(path).out_features
    is_narrow = init == "mini" and block.ndim == 2 and block.shape[1] and features % block.shape[1] == 0
    if init not in (True, False, None, "mini") or block.ndim != 2 or not (is_narrow or block.shape[1] == features):
        raise ValueError(
            f"{source}: {path} is MiSS of shape {tuple(block.shape)} (init_weights={printable(repr(init), 80)}); only "
            "the plain one and 'mini' are 1LoRA, of as many numbers as the layer has outputs"
        )
    return block.repeat(1, features // block.shape[1]).squeeze(0)


def _lora(model: nn.Module, layers: dict, settings: dict, source: str) -> dict[str, dict[str, torch.Tensor]]:
    """The values of each layer by its path, with the scale α/r multiplied into B and its bias."""
    is_dora = any("lora_magnitude_vector" in parts for parts in layers.values())
    if settings.get("use_dora") and not is_dora:
        raise ValueError(f"{source}: its use_dora is true, and it has no lora_magnitude_vector; save it again, whole")
    has_bias = any("lora_B.bias" in parts or "diff_b" in parts for parts in layers.values())
    if is_dora and has_bias:
        raise ValueError(f"{source}: its lora_bias or diff_b goes with LoRA, not with a DoRA")
    scaled = {}
    for path, parts in layers.items():
        a, b = parts["lora_A"], parts["lora_B"]
        if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
            raise ValueError(f"{source}: {path} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}: no LoRA pair")
        if is_dora and "lora_magnitude_vector" not in parts:
            raise ValueError(f"{source}: {path} has no lora_magnitude_vector, as other layers of this DoRA have")
        own = alpha_among(parts, path, source)
        alpha = of_layer(path, settings, "lora_alpha", "alpha_pattern", len(a), source)
        alpha = alpha if own is None else own
        scale = alpha / (math.sqrt(len(a)) if settings.get("use_rslora") else len(a))
        none = torch.zeros(len(b))
        bias = scale * parts.get("lora_B.bias", none) + parts.get("diff_b", none)
        scaled[path] = a, scale * b, bias
    if not is_dora and all((a == a[:, :1]).all() for a, _, _ in scaled.values()):
        values = {path: {"b": b @ a[:, 0], "beta": bias} for path, (a, b, bias) in scaled.items()}
    elif not is_dora and len({len(a) for a, _, _ in scaled.values()}) == 1 and all(map(_sums_groups, scaled.values())):
        values = {path: {"b": a.diagonal()[:, None] * b.T, "beta": bias} for path, (a, b, bias) in scaled.items()}
    else:
        rank = max(len(a) for a, _, _ in scaled.values())  # layers of a lower rank are padded with zeros
        held = sum(a.numel() + b.numel() for a, b, _ in scaled.values())
        filled = sum(rank * (a.shape[1] + len(b)) for a, b, _ in scaled.values())
        if filled > held + sum(parameter.numel() for parameter in model.parameters()):
            raise ValueError(f"{source}: one layer has rank {rank}, in which all exceed the base; resize its ranks")
        values = {
            path: {
                "lora_A.weight": nn.functional.pad(a, (0, 0, 0, rank - len(a))),
                "lora_B.weight": nn.functional.pad(b, (0, rank - len(a))),
                "lora_B.bias": bias,
            }
            for path, (a, b, bias) in scaled.items()
        }
    for path, parts in layers.items():
        if is_dora:
            values[path]["lora_magnitude_vector.weight"] = parts["lora_magnitude_vector"]
        if not has_bias:
            values[path] = {name: tensor for name, tensor in values[path].items() if name not in BIASES}
    return values


def _sums_groups(layer: tuple[torch.Tensor, ...]) -> bool:
    """Whether each row j of A has one number at the inputs i with i mod rank = j, and zeros elsewhere."""
    a = layer[0]
    rank, features = a.shape
    return rank <= features and torch.equal(a, groups(rank, features, a.device) * a.diagonal()[:, None])
