"""The content of an adapter file: check that it fits a model, and attach it."""

import contextlib
from dataclasses import dataclass, field, replace
from importlib.metadata import version

import torch
from torch import nn

from onelora_diffusion.adapters.base_layer import weights_present
from onelora_diffusion.adapters.compressions import compression_of, random_directions
from onelora_diffusion.adapters.contract import LayerAdapter
from onelora_diffusion.config import AdapterConfig
from onelora_diffusion.denoisers import DENOISERS, TwoDenoisers
from onelora_diffusion.injection.attaching import (
    attach_adapter,
    build_for_values,
    build_with_values,
    check_shapes,
    state_dict_of,
)
from onelora_diffusion.injection.book import AdapterBook, adapters_of, disable_adapter, fingerprint, unwrapped
from onelora_diffusion.injection.layers import untuned

PAIR = DENOISERS[:2]


@dataclass(frozen=True)
class AdapterFile:
    """The content of an adapter file, or of both denoisers' adapters, the names of whose tensors begin with theirs."""

    config: AdapterConfig
    tensors: dict[str, torch.Tensor]  # name (without the file's prefix `transformer.`) -> values, fp32 or bf16
    # Of the base's parameter names and shapes, of two denoisers joined by a plus sign; None if the file has none.
    fingerprint: str | None
    base: str | None = None  # hub id or folder of the base model, if known
    id2label: dict[int, str] = field(default_factory=dict)
    training: dict = field(default_factory=dict)  # the training summary
    version: str = field(default_factory=lambda: version("onelora-diffusion"))  # that wrote the file
    sketch: list[float] | None = None  # of the directions that it was trained along (`sketch_of`); None if of none
    digest: str | None = None  # SHA-256 of settings and values, which tells files apart; None if not read from a file

    @property
    def is_of_two(self) -> bool:
        """Whether it is an adapter of both denoisers of a pipeline."""
        return "+" in (self.fingerprint or "")

    @property
    def origin(self) -> dict:
        """What the model keeps about the file."""
        return {"id2label": self.id2label, "base": self.base, "training": self.training}


def check_fits(model: nn.Module, file: AdapterFile, source: str) -> None:
    """ValueError unless every key and shape of an adapter, and its base, fit a model; nothing is allocated."""
    if file.is_of_two != isinstance(model, TwoDenoisers):
        raise ValueError(
            f"{source}: is for {' and '.join(PAIR)} of one pipeline: load it by the pipeline's load_lora_weights"
            if file.is_of_two
            else f"{source}: is for one of a pipeline's two transformers, and both are to be adapted"
        )
    expected = build_for_values(model, file.config, file.tensors, source, as_shapes=True)
    if expected is not None:
        check_shapes(state_dict_of(expected), file.tensors, source)
        _check_base(model, file, source)


def part_of(file: AdapterFile, component: str | None) -> AdapterFile:
    """The adapter of one of two denoisers; the same if it is of one alone, or None is asked for."""
    if not file.is_of_two or component is None:
        return file
    number = PAIR.index(component)
    own = [{k: t for k, t in file.tensors.items() if k.startswith(f"{name}.")} for name in PAIR]
    sketch, targets = file.sketch, file.config.targets
    if sketch is not None:  # its numbers are in the order of the paths, and as many for each layer
        middle = len(sketch) * len(own[0]) // len(file.tensors)
        sketch = (sketch[:middle], sketch[middle:])[number]
    if targets is not None:
        targets = tuple(t.removeprefix(f"{component}.") for t in targets if not t.startswith(f"{PAIR[1 - number]}."))
    return replace(
        file,
        config=replace(file.config, targets=targets),
        tensors={name.removeprefix(f"{component}."): tensor for name, tensor in own[number].items()},
        fingerprint=file.fingerprint.split("+")[number],
        sketch=sketch,
    )


def check_whole(tensors: dict[str, torch.Tensor]) -> None:
    """ValueError for a tensor of which each process has a share (FSDP2)."""
    for name, tensor in tensors.items():
        if hasattr(tensor, "full_tensor"):
            raise ValueError(
                f"{name} is shared out over processes: gather adapter_state_dict(model) on all of them, with "
                "full_tensor() of each, and give that to save_adapter as state_dict"
            )


def attach_adapter_file(model: nn.Module, file: AdapterFile, adapter_name: str, source: str) -> None:
    """Build an adapter, check all its keys and shapes against the file's, and then attach it."""
    adapter = build_with_values(model, file.config, file.tensors, source)
    _check_base(model, file, source)
    with disable_adapter(model) if hasattr(model, "_onelora") else contextlib.nullcontext():
        _check_directions(sketch_of(model, adapter), file, source)
    attach_adapter(model, file.config, adapter_name, adapter, is_to_train=False)
    adapters_of(model).origins[adapter_name] = file.origin


def swap_values(book: AdapterBook, file: AdapterFile, adapter_name: str, source: str) -> None:
    """Overwrite an adapter of the same kind with a file's values; the adapters that are active or train stay so."""
    book.require_unmerged("values are swapped")
    own = state_dict_of(book.adapters[adapter_name])
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    if file.fingerprint not in (book.fingerprint, None):
        raise ValueError(f"{source}: was made for another base ({file.base or 'unnamed'})")
    settings = [(c.method, c.sum and compression_of(c)) for c in (book.configs[adapter_name], file.config)]
    if settings[0] != settings[1] or shapes != {name: tensor.shape for name, tensor in own.items()}:
        raise ValueError(f"{source} is of another kind or shape than adapter '{adapter_name}': load without hotswap")
    _check_directions(sketch_of(book.model, book.adapters[adapter_name]), file, source)
    with book.lock, torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(file.tensors[name])
        book.origins[adapter_name] = file.origin
        if book.serving:
            book.activate(book.serving)  # sums of the old values are computed again


def _check_base(model: nn.Module, file: AdapterFile, source: str) -> None:
    base = model._onelora.fingerprint if hasattr(model, "_onelora") else fingerprint(model)
    if file.fingerprint not in (base, None):
        raise ValueError(
            f"{source}: was made for another base ({file.base or 'unnamed'}): every adapted layer fits, but the names "
            f"or shapes of other parameters differ (fingerprint {file.fingerprint[:12]}, this model's {base[:12]})"
        )


# How far directions may be from those of the base that an adapter was trained on, in the root mean square over all of
# an adapter's, which have length 1. Rounding the miniature's weights to bfloat16 or int8 moves four of a layer by
# 0.02 and 0.03, to int4 by 0.23; those of two unrelated bases are about 1.4 apart.
MAX_DISTANCE = 0.3
NUM_PROBES = 4


@torch.no_grad()
def sketch_of(model: nn.Module, adapter: dict[str, LayerAdapter]) -> list[float] | None:
    """Products of the directions that an adapter takes of its base's weights with a few fixed random vectors.

    The mean square difference of two sketches estimates the mean square distance of the directions
    (Johnson and Lindenstrauss), at a few numbers for each. None if the adapter takes no directions.
    """
    products = []
    for path in sorted(path for path, module in adapter.items() if module.takes_directions):
        layer = untuned(unwrapped(model).get_submodule(path))
        with weights_present(layer):
            directions = adapter[path].directions_of(layer)
        if not directions.is_meta:
            probes = random_directions(0, NUM_PROBES, directions.shape[1], directions.device)
            products.append((directions @ probes.T).flatten().cpu())
    return [round(value, 3) for value in torch.cat(products).tolist()] if products else None


def _check_directions(own: list[float] | None, file: AdapterFile, source: str) -> None:
    """ValueError if an adapter's directions in this base are not those that it was trained along."""
    if own is None or file.sketch is None:
        return
    if len(own) != len(file.sketch):
        raise ValueError(f"{source}: its sketch of the base has {len(file.sketch)} numbers, and this base {len(own)}")
    distance = (torch.tensor(own) - torch.tensor(file.sketch)).square().mean().sqrt().item()
    if not distance <= MAX_DISTANCE:
        raise ValueError(
            f"{source}: was trained along the leading directions of other weights ({file.base or 'an unnamed base'}): "
            f"those of this base are {distance:.2f} away, and {MAX_DISTANCE} is the most; load it into its own base, "
            "or export it from there as a LoRA (export_lora)"
        )
