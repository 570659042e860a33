"""PEFT's settings of an adapter in a file: those that are understood here; the others are refused by name."""

import re

import torch

from onelora_diffusion.files import printable
from onelora_diffusion.storage.opening import MAX_TEXT, MAX_VALUE

# Settings of PEFT that may have any value, since they are read here or do not affect what the tensors compute.
READ = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"),
    *("exclude_modules", "layers_pattern", "layers_to_transform", "target_modules"),  # told by the tensors' names
    *("alpha_pattern", "lora_alpha", "r", "rank_pattern", "use_rslora"),
    *("lora_bias", "use_dora"),  # told by the tensors
    *("lora_dropout", "miss_dropout"),  # used in training alone
    *("init_weights", "mini_r"),  # checked with the shape of MiSS
    *("alpha", "decompose_both", "decompose_factor"),  # of LoKr
    *("module_dropout", "rank_dropout", "rank_dropout_scale"),  # used in training alone
    *("megatron_core", "qalora_group_size", "runtime_config"),  # without effect unless they are used
}
VALUES = {
    "peft_type": ("LORA", "MISS", "LOKR", None),
    "bias": ("none", None),
    # Other initialisations change the base, or have to be computed again when the adapter is loaded.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal"),
}
NEUTRAL = (None, False, "", [], {}, "none")  # values of a setting that is not set


def _check_known(settings: dict, source: str) -> None:
    """ValueError for a setting of PEFT that may change what the tensors or the base compute."""
    for name, value in settings.items():
        is_known = name in READ or value in VALUES.get(name, NEUTRAL)
        if not is_known and not (name not in VALUES and _is_default(name, value)):
            raise ValueError(
                f"{source}: its {printable(str(name), 40)} is {printable(repr(value), 80)}, and it is not known here "
                "what an adapter with that computes; have it saved as a plain LoRA"
            )


def _is_default(name: str, value) -> bool:
    """Whether this value is the installed PEFT's default of a setting."""
    try:
        from peft import LoraConfig, MissConfig
    except ImportError:
        return False
    return any(name in own and own[name] == value for own in (LoraConfig().to_dict(), MissConfig().to_dict()))


def check_settings(settings: dict, source: str) -> None:
    """ValueError for settings that are not understood or of the wrong type."""
    _check_known(settings, source)
    if type(settings.get("use_rslora") or False) is not bool:
        raise ValueError(f"{source}: its use_rslora is {printable(str(settings['use_rslora']), 80)}; give a bool")
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str | None) or len(base or "") > MAX_TEXT:
        raise ValueError(f"{source}: its base_model_name_or_path is no name; remove it from the settings")


def alpha_among(tensors: dict[str, torch.Tensor], path: str, source: str) -> float | None:
    """The alpha among a layer's tensors, or None; ValueError if it is not one number."""
    if "alpha" not in tensors:
        return None
    if tensors["alpha"].numel() != 1:
        raise ValueError(f"{source}: alpha of {path} has shape {tuple(tensors['alpha'].shape)}; it is one number")
    return tensors["alpha"].item()


def of_layer(path: str, settings: dict, name: str, patterns: str, default: float, source: str) -> float:
    """The number `name` among the settings, or that of the first pattern in `patterns` which names the layer.

    ValueError if it is no finite number, or a pattern is a regular expression, which is never compiled here.
    """
    value = settings.get(name, default)
    if not isinstance(by_pattern := settings.get(patterns) or {}, dict):
        raise ValueError(f"{source}: its {patterns} is {type(by_pattern).__name__}; it must be numbers by layer")
    for pattern in reversed(by_pattern):
        layer = pattern.removeprefix("^").removesuffix("$").replace(r"\.", ".")
        if not re.fullmatch(r"[\w.-]{1,512}", layer):
            raise ValueError(
                f"{source}: its {patterns} has {printable(pattern, 80)!r}, a regular expression; name layers in it"
            )
        if path == layer or not pattern.startswith("^") and path.endswith(f".{layer}"):
            value = by_pattern[pattern]
    if type(value) not in (int, float) or not abs(value) <= MAX_VALUE:
        raise ValueError(f"{source}: its {name} of {path} is {printable(str(value), 80)}; it must be a finite number")
    return value
