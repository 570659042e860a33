"""Build an adapter beside the model, check it, then attach it."""

import contextlib
import logging
import types
from dataclasses import dataclass, field
from importlib.metadata import version

import torch
from torch import nn

from onelora_diffusion.adapters.class_table import CLASS_TABLE, ClassTable
from onelora_diffusion.adapters.mora import MoraAdapter
from onelora_diffusion.adapters.peft import PeftAdapter, build_peft_adapters
from onelora_diffusion.adapters.swap import SwapAdapter
from onelora_diffusion.adapters.vector import VectorAdapter
from onelora_diffusion.config import AdapterConfig
from onelora_diffusion.files import printable
from onelora_diffusion.injection.attention import fused_layers
from onelora_diffusion.injection.book import AdapterBook, adapters_of, disable_adapter, fingerprint, refuse_merged
from onelora_diffusion.injection.layers import full_layers, is_dit, norm_layers, stand_ins, target_layers
from onelora_diffusion.injection.merging import stock_state_dict

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


def build_adapter(model: nn.Module, config: AdapterConfig, as_shapes: bool = False) -> dict[str, nn.Module]:
    """The modules of a new adapter by the path of the layer each serves; the model is not touched.

    Args:
        as_shapes: on the meta device, where tensors take no memory.
    """
    if config.fuse_qkv and not is_dit(model):
        raise ValueError(f"fuse_qkv goes with DiTTransformer2DModel, not with {type(model).__name__}")
    if config.num_classes is not None and not is_dit(model):
        raise ValueError(f"num_classes={config.num_classes}: {type(model).__name__} has no class embedding")
    # Trained tensors that are in the base's place are no start for a new adapter.
    is_swapped = hasattr(model, "_onelora") and model._onelora.swapped
    with disable_adapter(model) if is_swapped else contextlib.nullcontext():
        if config.method == "full":
            copies, layers = {}, full_layers(model, config)
            layers = stand_ins(layers) if as_shapes else layers
            adapter = {path: SwapAdapter(module, copies) for path, module in layers.items()}
        else:
            with torch.device("meta") if as_shapes else contextlib.nullcontext():
                adapter = _linear_adapters(model, config, as_shapes)
        if config.norms:
            norms = norm_layers(model)
            if not norms and not as_shapes:
                logger.warning("%s: no norm has weights of its own; `norms` trains nothing", type(model).__name__)
            for path, norm in (stand_ins(norms) if as_shapes else norms).items():
                adapter[path] = SwapAdapter(norm)
        if config.num_classes is not None:
            table = model.transformer_blocks[0].norm1.emb.class_embedder.embedding_table
            adapter[CLASS_TABLE] = ClassTable(table, config)
    return adapter


def _linear_adapters(model: nn.Module, config: AdapterConfig, as_shapes: bool) -> dict[str, nn.Module]:
    if config.is_vector and not (config.sum or config.bias or config.scale):
        return {}
    layers = target_layers(model, config.targets)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear layer to adapt")
    if config.fuse_qkv and not config.is_vector:
        layers = fused_layers(model, layers)
    layers = stand_ins(layers) if as_shapes else layers
    if config.is_vector:
        return {path: VectorAdapter(linear, config) for path, linear in layers.items()}
    if config.is_peft:
        return build_peft_adapters(layers, config)
    return {path: MoraAdapter(linear, kind=int(config.method[-1])) for path, linear in layers.items()}


def attach_adapter(model: nn.Module, config: AdapterConfig, adapter_name: str, adapter: dict[str, nn.Module]) -> None:
    """Attach the modules of `build_adapter`, and make them the only ones that are active and trained."""
    if not hasattr(model, "_onelora"):
        model._onelora = AdapterBook(model)
        model.save_pretrained = types.MethodType(_save_base, model)
    model._onelora.activate({})
    model._onelora.freeze()
    model._onelora.attach(adapter_name, config, adapter)
    model._onelora.activate({adapter_name: 1.0})


def state_dict_of(adapter: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The trained tensors by their names in an adapter file; one that several layers share has the first's name."""
    tensors = {}
    for path, module in adapter.items():
        own = module.trained_tensors() if isinstance(module, PeftAdapter) else dict(module.named_parameters())
        tensors |= {
            f"{path}.{name}" if path == CLASS_TABLE else f"{path}.onelora_{name}": p for name, p in own.items()
        }
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
    for module in adapter.values():  # under sequential offload the base is on the meta device between calls
        if any(parameter.is_meta for parameter in module.parameters()):
            module.to_empty(device="cpu")
    own = state_dict_of(adapter)
    _check_shapes(own, file, source)
    _check_base(model, file, source)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(file.tensors[name])
    attach_adapter(model, file.config, adapter_name, adapter)
    origin = {"id2label": file.id2label, "base": file.base, "training": file.training}
    adapters_of(model).origins[adapter_name] = origin


def _build(model: nn.Module, file: AdapterFile, source: str, as_shapes: bool = False) -> dict[str, nn.Module] | None:
    """`build_adapter` by the settings of a file; None for a tuner without shapes but by computing."""
    try:
        return build_adapter(model, file.config, as_shapes)
    except (NotImplementedError, RuntimeError) as error:
        sizes = [value for value in (file.config.peft_config or {}).values() if isinstance(value, int)]
        if as_shapes and max([file.config.rank, *sizes]) <= MAX_UNSEEN_SIZE:
            return None
        raise ValueError(f"{source}: its settings build no adapter ({_first_line(error)})") from error
    except ValueError as error:
        raise ValueError(f"{source}: {_first_line(error)}") from error
    except Exception as error:  # PEFT's tuners raise whatever they come upon
        raise ValueError(
            f"{source}: its settings build no adapter ({type(error).__name__}: {_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    return printable(str(error).strip().split("\n")[0], 400)


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
    """Write a file's values into an adapter of the same kind, in place."""
    refuse_merged(book, "swapped")
    own = state_dict_of(book.adapters[adapter_name])
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    if file.fingerprint not in (book.fingerprint, None):
        raise ValueError(f"{source}: was made for another base ({file.base or 'unnamed'})")
    settings = [
        (c.method, c.compression, c.compression == "random" and c.seed)
        for c in (book.configs[adapter_name], file.config)
    ]
    if settings[0] != settings[1] or shapes != {name: tensor.shape for name, tensor in own.items()}:
        raise ValueError(
            f"{source} is of another kind or shape than adapter '{adapter_name}': load it without hotswap"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(file.tensors[name])
    book.origins[adapter_name] = {"id2label": file.id2label, "base": file.base, "training": file.training}
    book.activate({adapter_name: 1.0})


def _shape(tensor: torch.Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"


def _save_base(model: nn.Module, save_directory, *args, **kwargs):
    """`save_pretrained` of a model with adapters: writes a plain diffusers model, in the stock layout."""

    def stock(module, state_dict, prefix, local_metadata):
        clean = stock_state_dict(module, state_dict)
        state_dict.clear()
        state_dict.update(clean)

    hook = model.register_state_dict_post_hook(stock)
    try:
        return type(model).save_pretrained(model, save_directory, *args, **kwargs)
    finally:
        hook.remove()
