"""Build an adapter without changing the model, check it, and then attach it."""

import contextlib
import logging
from collections.abc import Iterable

import torch
from torch import nn

from onelora_diffusion.adapters.base_layer import offload_hook
from onelora_diffusion.adapters.class_table import CLASS_TABLE, ClassTable
from onelora_diffusion.adapters.contract import LayerAdapter
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
MAX_UNSEEN_SIZE = 256  # largest size of anything that a file's settings build before its shapes are known


@torch.inference_mode(False)  # tensors made in inference mode cannot be trained
def build_adapter(
    model: nn.Module, config: AdapterConfig, as_shapes: bool = False, named: Iterable[str] = ()
) -> dict[str, LayerAdapter]:
    """Build the layer adapters of a new adapter, by the path of the layer that each adapts; the model is not changed.

    `as_shapes` builds on the meta device, where tensors take no memory; `named` is as in `target_layers`.
    """
    served = stand_ins if as_shapes else dict
    if config.fuse_qkv and not is_dit(model):
        raise ValueError(f"fuse_qkv goes with DiTTransformer2DModel, not with {type(model).__name__}")
    table = None if config.num_classes is None else _base_table(model, config)
    # A new adapter starts from the base's tensors, not from trained ones that replace them.
    with disable_adapter(model) if hasattr(model, "_onelora") else contextlib.nullcontext():
        layers = served(_layers_of(model, config, named))
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
    """The class table that `config` replaces; it is the same one for all adapters of a model."""
    path = class_table_paths(model, config.class_table)[0]
    seat = model._onelora.class_tables if hasattr(model, "_onelora") else None
    if seat is not None and path != seat.path:
        raise ValueError(f"class_table='{path}': other adapters have theirs at {seat.path}: unload those first")
    return model.get_submodule(path)


def _layers_of(model: nn.Module, config: AdapterConfig, named: Iterable[str]) -> dict[str, nn.Module]:
    if config.recipe.is_whole:
        return full_layers(model, config)
    if config.recipe.parts and not (config.sum or config.bias or config.scale):
        return {}
    layers = target_layers(model, config.targets, named)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear layer to adapt")
    return fused_layers(model, layers) if config.fuse_qkv and config.recipe.serves_fused else layers


def attach_adapter(
    model: nn.Module,
    config: AdapterConfig,
    adapter_name: str,
    adapter: dict[str, LayerAdapter],
    is_to_train: bool = True,
) -> None:
    """Attach the layer adapters of `build_adapter` as the only active adapter, and as the only one that trains.

    Without `is_to_train` the adapters that train stay the same.
    """
    is_first = not hasattr(model, "_onelora")
    if is_first:
        model._onelora = AdapterBook(model)
        take_over(model)
    book = model._onelora
    with book.lock:
        book.activate({})
        if is_first or is_to_train:
            book.freeze()
        book.attach(adapter_name, config, adapter)
        if is_to_train:
            book.train([adapter_name])
        book.activate({adapter_name: 1.0})


def state_dict_of(adapter: dict[str, LayerAdapter]) -> dict[str, nn.Parameter]:
    """The trained tensors by their names in an adapter file; a tensor that layers share is named by the first."""
    tensors = {f"{path}.{name}": p for path, module in adapter.items() for name, p in module.trained_tensors().items()}
    first = {id(parameter): name for name, parameter in reversed(tensors.items())}
    return {name: parameter for name, parameter in tensors.items() if first[id(parameter)] == name}


def build_with_values(
    model: nn.Module, config: AdapterConfig, values: dict[str, torch.Tensor], source: str, is_whole: bool = True
) -> dict[str, LayerAdapter]:
    """Build the layer adapters of a new adapter with given values, on the devices on which the model's layers compute.

    Unless `is_whole`, tensors that are not given stay as they start, which changes no output. ValueError, which names
    `source`, if the settings build no adapter or a tensor is missing, unknown or misshapen.
    """
    adapter = build_for_values(model, config, values, source)
    device = _execution_device(model)
    for module in adapter.values():  # with sequential offloading the base is on the meta device between calls
        if any(parameter.is_meta for parameter in module.parameters()):
            module.to_empty(device="cpu")
        if device is not None:
            module.to(device)
    own = state_dict_of(adapter)
    check_shapes(own, values if is_whole else own | values, source)
    with torch.no_grad():
        for name, tensor in values.items():
            own[name].copy_(tensor)
    return adapter


def build_for_values(
    model: nn.Module, config: AdapterConfig, values: dict[str, torch.Tensor], source: str, as_shapes: bool = False
) -> dict[str, LayerAdapter] | None:
    """`build_adapter` for given values; None for a tuner whose shapes are known only after computing."""
    try:
        return build_adapter(model, config, as_shapes, values)
    except ValueError as error:
        raise ValueError(f"{source}: {first_line(error)}") from error
    except Exception as error:  # PEFT's tuners may raise any error
        sizes = [value for value in (config.peft_config or {}).values() if isinstance(value, int)]
        is_unseen = as_shapes and isinstance(error, RuntimeError)  # as NotImplementedError is
        if is_unseen and max([config.rank, *sizes]) <= MAX_UNSEEN_SIZE:
            return None
        raise ValueError(
            f"{source}: its settings build no adapter ({type(error).__name__}: {first_line(error)})"
        ) from error


def _execution_device(model: nn.Module) -> torch.device | None:
    """The device to which accelerate loads offloaded weights, and where adapters stay; None without offloading."""
    hooks = filter(None, (offload_hook(module) for _, module in base_modules(model)))
    return next((hook.execution_device for hook in hooks), None)


def check_shapes(own: dict[str, torch.Tensor], values: dict[str, torch.Tensor], source: str) -> None:
    """ValueError for the first tensor that is missing, unknown or of another shape."""
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
