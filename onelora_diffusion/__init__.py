"""1LoRA for diffusion transformers: y = W0 x + bias + b · Σᵢ xᵢ, one trained vector per linear layer."""

from onelora_diffusion.config import AdapterConfig
from onelora_diffusion.injection import (
    adapter_state_dict,
    count_trainable,
    disable_adapter,
    inject_adapter,
    set_adapters,
    unload_adapter,
)
from onelora_diffusion.merging import merge_adapter, unmerge_adapter
from onelora_diffusion.saving import load_adapter, read_adapter, save_adapter

__version__ = "0.1.0"

__all__ = [
    "AdapterConfig",
    "adapter_state_dict",
    "count_trainable",
    "disable_adapter",
    "inject_adapter",
    "load_adapter",
    "merge_adapter",
    "read_adapter",
    "save_adapter",
    "set_adapters",
    "unload_adapter",
    "unmerge_adapter",
]
