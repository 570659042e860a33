"""1LoRA for diffusion transformers: y = W0 x + bias + b · Σᵢ xᵢ, one trained vector per linear layer."""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING

from onelora_diffusion.adapters import methods as methods  # the table that settings are checked against
from onelora_diffusion.config import AdapterConfig
from onelora_diffusion.injection.book import disable_adapter
from onelora_diffusion.injection.combining import combine_adapters
from onelora_diffusion.injection.listing import list_adapters
from onelora_diffusion.injection.merging import merge_adapter, stock_state_dict, unmerge_adapter
from onelora_diffusion.injection.routing import route_adapters
from onelora_diffusion.injection.verbs import (
    adapter_state_dict,
    count_trainable,
    inject_adapter,
    set_adapters,
    train_adapters,
    trainable_parts,
    unload_adapter,
)
from onelora_diffusion.pipelines.base import miniature_path
from onelora_diffusion.storage.adapter_file import read_adapter, save_adapter
from onelora_diffusion.storage.hub import push_to_hub
from onelora_diffusion.storage.lora import export_lora
from onelora_diffusion.storage.reading import load_adapter

__version__ = version("onelora-diffusion")  # the version in pyproject.toml

__all__ = [
    "AdapterConfig",
    "OneLoRADiTPipeline",
    "OneLoRALoaderMixin",
    "adapter_state_dict",
    "combine_adapters",
    "count_trainable",
    "disable_adapter",
    "export_lora",
    "inject_adapter",
    "list_adapters",
    "load_adapter",
    "merge_adapter",
    "miniature_path",
    "push_to_hub",
    "read_adapter",
    "route_adapters",
    "save_adapter",
    "set_adapters",
    "stock_state_dict",
    "train_adapters",
    "trainable_parts",
    "unload_adapter",
    "unmerge_adapter",
]

# These two are imported on first use, since importing diffusers' pipelines takes seconds.
_PIPELINES = {
    "OneLoRADiTPipeline": "onelora_diffusion.pipelines.dit",
    "OneLoRALoaderMixin": "onelora_diffusion.pipelines.loaders",
}


if TYPE_CHECKING:
    from onelora_diffusion.pipelines.dit import OneLoRADiTPipeline
    from onelora_diffusion.pipelines.loaders import OneLoRALoaderMixin


def __getattr__(name: str):
    if name not in _PIPELINES:
        raise AttributeError(f"module 'onelora_diffusion' has no attribute '{name}'")
    return getattr(importlib.import_module(_PIPELINES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PIPELINES})
