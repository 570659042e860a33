"""Select the tensors of a LoRA that are for a pipeline's denoiser, and convert their names to diffusers'."""

import re

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_unet_state_dict_to_peft
from torch import nn

from onelora_diffusion.storage.lora import FOREIGN_KEY, paths_by_name, refuse_other_kinds, without_text_encoders
from onelora_diffusion.storage.naming import COMFYUI, by_diffusers_paths

LORA_PART = re.compile(r".*(lora.*[._](A|B|down|up)(\.default)?(\.weight|\.bias)|\.alpha|\.lokr_w[12](_[ab])?)")
ROWS_PART = re.compile(r".*([._](B|up)(\.default)?\.weight|\.lokr_w[12](_a)?)")


def denoiser_tensors(
    pipeline_class: type[DiffusionPipeline], model: nn.Module, tensors: dict[str, torch.Tensor], source: str
) -> dict[str, torch.Tensor]:
    """The tensors for the denoiser; those for text encoders are left out with a warning.

    If no tensor names a layer of the model, the names are taken for another program's (kohya's scripts for SDXL and
    Flux, ComfyUI, XLabs) and converted by the pipeline's own `lora_state_dict`.

    ValueError if all tensors are for text encoders, or the conversion fails or would lose tensors.
    """
    own = without_text_encoders(tensors, source)
    refuse_other_kinds(own, source)
    paths = paths_by_name(model)
    names = [match["name"] for key in own if (match := FOREIGN_KEY.fullmatch(key))]
    known = [name for name in names if name in paths]
    # Native names are the same as diffusers' for some of the layers.
    is_own = len(known) == len(names) or not all(name.startswith(COMFYUI) for name in known)
    if not own or known and is_own or not hasattr(pipeline_class, "lora_state_dict"):
        return own
    if (renamed := by_diffusers_paths(model, own)) is not None:
        return renamed
    return _converted(pipeline_class, model, own, source)


def _converted(pipeline_class, model, tensors, source) -> dict[str, torch.Tensor]:
    name = pipeline_class.__name__
    for key in tensors:  # the converters drop unknown tensors, some of them silently
        if not LORA_PART.fullmatch(key):
            raise ValueError(f"{source}: {key} is no part of a LoRA that can be converted for {name}")
    try:
        converted, *rest = pipeline_class.lora_state_dict(
            dict(tensors), unet_config=model.config, return_alphas=True, return_lora_metadata=True
        )
    except Exception as error:  # converters raise KeyError, AssertionError and others for unknown names
        names, reason = next(iter(tensors)), f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"{source}: its names ({names}) cannot be converted for {name}: {reason}") from error
    if _rows(converted) != _rows(tensors):
        raise ValueError(f"{source}: not all of it can be converted for {name}")
    alphas = rest[0] if len(rest) == 2 else None
    alphas = {key: torch.as_tensor(alpha) for key, alpha in (alphas or {}).items()}
    renamed = convert_unet_state_dict_to_peft(converted | alphas)
    return {key.replace(".lora_A.weight.alpha", ".alpha"): tensor for key, tensor in renamed.items()}


def _rows(tensors: dict[str, torch.Tensor]) -> int:
    """The output features of all layers in total, which splitting fused layers does not change."""
    return sum(len(tensor) for key, tensor in tensors.items() if ROWS_PART.fullmatch(key))
