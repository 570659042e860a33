"""A frozen adapter that serves while another trains, such as one that undoes the distillation of a fast base.

The trained adapter's file does not hold it, and samples are drawn without it, as they will be later.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from onelora_diffusion.denoisers import denoiser_name, denoiser_of
from onelora_diffusion.files import digest
from onelora_diffusion.injection.book import adapters_of, disable_adapter
from onelora_diffusion.injection.verbs import adapter_state_dict, set_adapters
from onelora_diffusion.pipelines.loaders import OneLoRALoaderMixin

NAME = "training-adapter"


def load_training_adapter(pipeline, path: str) -> str:
    """Load it into the denoiser from any file that `load_lora_weights` reads, whose errors it has; return its hash."""
    is_second = denoiser_name(pipeline) == "transformer_2"
    OneLoRALoaderMixin.from_pipe(pipeline).load_lora_weights(path, NAME, load_into_transformer_2=is_second)
    return digest(adapter_state_dict(denoiser_of(pipeline), NAME))


@contextmanager
def serving_alone(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Context manager in which a model computes with one of its adapters, and afterwards with those of before."""
    before = dict(adapters_of(model).serving)
    set_adapters(model, adapter_name)
    try:
        yield
    finally:
        set_adapters(model, list(before), list(before.values()))


def base_in_training(model: nn.Module):
    """Context manager in which a model computes as it was before training: its base, with the training adapter."""
    is_there = NAME in adapters_of(model).adapters
    return serving_alone(model, NAME) if is_there else disable_adapter(model)
