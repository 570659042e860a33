"""Build an adapter beside the model, check it, then attach it."""

import contextlib
import logging

import torch
from torch import nn

from onelora_diffusion.adapters.class_table import CLASS_TABLE, ClassTable
from onelora_diffusion.adapters.contract import Adapter
from onelora_diffusion.adapters.swap import build_copies
from onelora_diffusion.config import AdapterConfig
from onelora_diffusion.files import first_line
from onelora_diffusion.injection.attention import fused_layers
from onelora_diffusion.injection.book import AdapterBook, disable_adapter
from onelora_diffusion.injection.layers import (
    base_modules,
    class_table_paths,
    full_layers,
    is_dit,
    norm_layers,
    stand_ins,
    target_layers,
)
from onelora_diffusion.injection.model_verbs import take_over

logger = logging.getLogger(__name__)

PREFIX = "transformer."
MAX_UNSEEN_SIZE = 256  # of what is built by a file's settings without its shapes being known before


@torch.inference_mode(False)  # tensors that are made inside of it cannot train outside
def build_adapter(
    model: nn.Module, config: AdapterConfig, as_shapes: bool = False, own: set[str] | None = None
) -> dict[str, Adapter]:
    """The modules of a new adapter by the path of the layer each serves; the model is not touched.

    Args:
        as_shapes: on the meta device, where tensors take no memory.
        own: paths of what a file has tensors for: the layers of a vector adapter that names no targets, of those
            that there are by now.
    """
    served = stand_ins if as_shapes else dict
    if config.fuse_qkv and not is_dit(model):
        raise ValueError(f"fuse_qkv goes with DiTTransformer2DModel, not with {type(model).__name__}")
    table = None if config.num_classes is None else _base_table(model, config)
    # Trained tensors that are in the base's place are no start for a new adapter.
    with disable_adapter(model) if hasattr(model, "_onelora") else contextlib.nullcontext():
        layers = _layers_of(model, config)
        if own is not None and config.targets is None and config.recipe.parts:
            layers = {path: layer for path, layer in layers.items() if path in own}
        layers = served(layers)
        with torch.device("meta") if as_shapes else contextlib.nullcontext():
            adapter = dict(config.recipe.build(layers, config))
        if config.norms:
            norms = norm_layers(model)
            if not norms and not as_shapes:
                logger.warning("%s: no norm has weights of its own; `norms` trains nothing", type(model).__name__)
            adapter |= build_copies(served(norms), config)
        if table is not None:
            adapter[CLASS_TABLE] = ClassTable(table, config)
    return adapter


def _base_table(model: nn.Module, config: AdapterConfig) -> nn.Embedding:
    """The table that `config` brings new classes for; a model's adapters bring theirs for one and the same."""
    path = class_table_paths(model, config.class_table)[0]
    seat = model._onelora.class_tables if hasattr(model, "_onelora") else None
    if seat is not None and path != seat.paths[0]:
        raise ValueError(f"class_table='{path}': other adapters have theirs at {seat.paths[0]}: unload those first")
    return model.get_submodule(path)


def _layers_of(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    """The layers that the method of `config` serves, by path."""
    if config.recipe.is_whole:
        return full_layers(model, config)
    if config.recipe.parts and not (config.sum or config.bias or config.scale):
        return {}
    layers = target_layers(model, config.targets)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear layer to adapt")
    return fused_layers(model, layers) if config.fuse_qkv and config.recipe.serves_fused else layers


def attach_adapter(
    model: nn.Module,
    config: AdapterConfig,
    adapter_name: str,
    adapter: dict[str, Adapter],
    is_to_train: bool = True,
) -> None:
    """Attach the modules of `build_adapter`, and make them the only ones that are active.

    Args:
        is_to_train: they are the only ones that train, as well. Otherwise what trains stays as it was chosen.
    """
    is_first = not hasattr(model, "_onelora")
    if not hasattr(model, "_onelora"):
        model._onelora = AdapterBook(model)
        take_over(model)
    book = model._onelora
    with book.turn:
        book.activate({})
        if is_first or is_to_train:
            book.freeze()
        book.attach(adapter_name, config, adapter)
        if is_to_train:
            book.train([adapter_name])
        book.activate({adapter_name: 1.0})


def state_dict_of(adapter: dict[str, Adapter]) -> dict[str, nn.Parameter]:
    """The trained tensors by their names in an adapter file; one that several layers share has the first's name."""
    tensors = {f"{path}.{name}": p for path, module in adapter.items() for name, p in module.trained_tensors().items()}
    first = {id(parameter): name for name, parameter in reversed(tensors.items())}
    return {name: parameter for name, parameter in tensors.items() if first[id(parameter)] == name}


def build_with_values(
    model: nn.Module, config: AdapterConfig, values: dict[str, torch.Tensor], source: str
) -> dict[str, Adapter]:
    """The modules of a new adapter with these values in them, where the model's layers compute.

    Args:
        values: the trained tensors by their names in an adapter file.
        source: what errors call them.

    Raises:
        ValueError: the settings build nothing, or a tensor is missing, fits nothing, or has another shape.
    """
    adapter = build_for_values(model, config, values, source)
    device = _execution_device(model)
    for module in adapter.values():  # under sequential offload the base is on the meta device between calls
        if any(parameter.is_meta for parameter in module.parameters()):
            module.to_empty(device="cpu")
        if device is not None:
            module.to(device)
    own = state_dict_of(adapter)
    check_shapes(own, values, source)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(values[name])
    return adapter


def build_for_values(
    model: nn.Module, config: AdapterConfig, values: dict[str, torch.Tensor], source: str, as_shapes: bool = False
) -> dict[str, Adapter] | None:
    """`build_adapter` for given values; None for a tuner without shapes but by computing."""
    try:
        return build_adapter(model, config, as_shapes, {name.split(".onelora_")[0] for name in values})
    except (NotImplementedError, RuntimeError) as error:
        sizes = [value for value in (config.peft_config or {}).values() if isinstance(value, int)]
        if as_shapes and max([config.rank, *sizes]) <= MAX_UNSEEN_SIZE:
            return None
        raise ValueError(f"{source}: its settings build no adapter ({first_line(error)})") from error
    except ValueError as error:
        raise ValueError(f"{source}: {first_line(error)}") from error
    except Exception as error:  # PEFT's tuners raise whatever they come upon
        raise ValueError(
            f"{source}: its settings build no adapter ({type(error).__name__}: {first_line(error)})"
        ) from error


def _execution_device(model: nn.Module) -> torch.device | None:
    """Where accelerate brings each layer's weights for its forward, and the adapters stay; None if it does not."""
    hooks = (getattr(module, "_hf_hook", None) for _, module in base_modules(model))
    return next((hook.execution_device for hook in hooks if getattr(hook, "offload", False)), None)


def check_shapes(own: dict[str, torch.Tensor], values: dict[str, torch.Tensor], source: str) -> None:
    """ValueError for the first tensor that is missing, fits nothing, or has another shape."""
    for name in sorted(set(own) | set(values)):
        if name not in values:
            raise ValueError(f"{source}: {PREFIX}{name} is missing; this base needs it with {_shape(own[name])}")
        if name not in own:
            raise ValueError(f"{source}: {PREFIX}{name} with {_shape(values[name])} fits nothing in this base")
        if own[name].shape != values[name].shape:
            raise ValueError(
                f"{source}: {PREFIX}{name} has {_shape(values[name])}, but this base needs {_shape(own[name])}"
            )


def _shape(tensor: torch.Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"
