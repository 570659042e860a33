"""Build an adapter beside the model, check it, then attach it."""

import contextlib
import logging
from dataclasses import dataclass, field
from importlib.metadata import version

import torch
from torch import nn

from onelora_diffusion.adapters.class_table import CLASS_TABLE, ClassTable
from onelora_diffusion.adapters.compressions import compression_of
from onelora_diffusion.adapters.contract import Adapter
from onelora_diffusion.adapters.swap import build_copies
from onelora_diffusion.config import AdapterConfig
from onelora_diffusion.files import first_line
from onelora_diffusion.injection.attention import fused_layers
from onelora_diffusion.injection.book import AdapterBook, adapters_of, disable_adapter, fingerprint
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


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter file holds.

    Attributes:
        config: the adapter's settings.
        tensors: name (without the file's prefix `transformer.`) -> values, fp32 or bf16.
        fingerprint: of the base's parameter names and shapes; None for an adapter that came without.
        base: hub id or folder of the base model, if it was known.
        id2label: class names by label.
        training: the training summary.
        version: of onelora-diffusion, that wrote the file.
    """

    config: AdapterConfig
    tensors: dict[str, torch.Tensor]
    fingerprint: str | None
    base: str | None = None
    id2label: dict[int, str] = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    version: str = field(default_factory=lambda: version("onelora-diffusion"))


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


def check_fits(model: nn.Module, file: AdapterFile, source: str) -> None:
    """Check every key and shape of an adapter, and its base, against a model; nothing is allocated.

    Raises:
        ValueError: it does not fit, or its settings build nothing.
    """
    if (expected := _build(model, file, source, as_shapes=True)) is not None:
        _check_shapes(state_dict_of(expected), file, source)
        _check_base(model, file, source)


def attach_adapter_file(model: nn.Module, file: AdapterFile, adapter_name: str, source: str) -> None:
    """Build an adapter, check every key and shape of it against the file's, and only then attach it."""
    adapter = _build(model, file, source)
    device = _execution_device(model)
    for module in adapter.values():  # under sequential offload the base is on the meta device between calls
        if any(parameter.is_meta for parameter in module.parameters()):
            module.to_empty(device="cpu")
        if device is not None:
            module.to(device)
    own = state_dict_of(adapter)
    _check_shapes(own, file, source)
    _check_base(model, file, source)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(file.tensors[name])
    attach_adapter(model, file.config, adapter_name, adapter, is_to_train=False)
    origin = {"id2label": file.id2label, "base": file.base, "training": file.training}
    adapters_of(model).origins[adapter_name] = origin


def _build(model: nn.Module, file: AdapterFile, source: str, as_shapes: bool = False) -> dict[str, nn.Module] | None:
    """`build_adapter` by the settings of a file; None for a tuner without shapes but by computing."""
    try:
        return build_adapter(model, file.config, as_shapes, {name.split(".onelora_")[0] for name in file.tensors})
    except (NotImplementedError, RuntimeError) as error:
        sizes = [value for value in (file.config.peft_config or {}).values() if isinstance(value, int)]
        if as_shapes and max([file.config.rank, *sizes]) <= MAX_UNSEEN_SIZE:
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


def _check_shapes(own: dict[str, torch.Tensor], file: AdapterFile, source: str) -> None:
    for name in sorted(set(own) | set(file.tensors)):
        if name not in file.tensors:
            raise ValueError(f"{source}: {PREFIX}{name} is missing; this base needs it with {_shape(own[name])}")
        if name not in own:
            raise ValueError(f"{source}: {PREFIX}{name} with {_shape(file.tensors[name])} fits nothing in this base")
        if own[name].shape != file.tensors[name].shape:
            raise ValueError(
                f"{source}: {PREFIX}{name} has {_shape(file.tensors[name])}, but this base needs {_shape(own[name])}"
            )


def _check_base(model: nn.Module, file: AdapterFile, source: str) -> None:
    base = model._onelora.fingerprint if hasattr(model, "_onelora") else fingerprint(model)
    if file.fingerprint not in (base, None):
        raise ValueError(
            f"{source}: was made for another base ({file.base or 'unnamed'}): every adapted layer fits, but the names "
            f"or shapes of other parameters differ (fingerprint {file.fingerprint[:12]}, this model's {base[:12]})"
        )


def swap_values(book: AdapterBook, file: AdapterFile, adapter_name: str, source: str) -> None:
    """Write a file's values into an adapter of the same kind, in place; what serves and what trains stays so."""
    book.require_unmerged("values are swapped")
    own = state_dict_of(book.adapters[adapter_name])
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    if file.fingerprint not in (book.fingerprint, None):
        raise ValueError(f"{source}: was made for another base ({file.base or 'unnamed'})")
    settings = [(c.method, c.sum and compression_of(c)) for c in (book.configs[adapter_name], file.config)]
    if settings[0] != settings[1] or shapes != {name: tensor.shape for name, tensor in own.items()}:
        raise ValueError(
            f"{source} is of another kind or shape than adapter '{adapter_name}': load it without hotswap"
        )
    with book.turn, torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(file.tensors[name])
        book.origins[adapter_name] = {"id2label": file.id2label, "base": file.base, "training": file.training}
        if book.serving:
            book.activate(book.serving)  # what was summed up of the old values


def _shape(tensor: torch.Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"
