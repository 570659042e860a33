"""Select the layers that an adapter adapts."""

import fnmatch
import logging
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from onelora_diffusion.adapters.base_layer import features_of, is_pointwise, weights_present
from onelora_diffusion.config import AdapterConfig
from onelora_diffusion.denoisers import repeated_blocks
from onelora_diffusion.injection.dit_parts import FIRST, embeddings_of, is_dit, is_in_embedding

logger = logging.getLogger(__name__)

UNREACHED = "torch.nn.MultiheadAttention reads the weight of its output projection and never calls the layer"
OUTPUT_HEADS = ("lm_head", "classifier", "score", "head", "proj_out", "proj_out_1", "proj_out_2", "final_layer")


def is_of_diffusers(model: nn.Module) -> bool:
    """Whether a model is of a class of diffusers, or derived from one; diffusers is not imported."""
    return any(cls.__module__.startswith("diffusers.") for cls in type(model).__mro__)


def is_modulated(model: nn.Module) -> bool:
    """Whether this model is built like Meta's DiT, as SiT, REPA, LightningDiT, DDT and RAE are.

    It is recognised by names that all of them have: `blocks` and a `final_layer`, each with an `adaLN_modulation`.
    """
    modulated = [path.split(".") for path, _ in base_modules(model) if path.endswith(".adaLN_modulation")]
    return {"blocks", "final_layer"} <= {name for names in modulated for name in names}


def class_table_paths(model: nn.Module, name: str | None = None) -> list[str]:
    """The paths of a model's class table, whose last row is the null row; a DiT has one table in each block.

    `name` is its path or the last components of it; None takes `embedding_table`, as in Meta's `y_embedder`.
    ValueError if there is no such table, or it has no null row.
    """
    kind = type(model).__name__
    tables = {path: m for path, m in base_modules(model, remove_duplicate=False) if isinstance(m, nn.Embedding)}
    found = [path for path in tables if f".{path}".endswith(f".{name or 'embedding_table'}")]
    if not found or len(found) > 1 and not is_dit(model):
        there = f"its tables are {', '.join(tables)}" if tables else "it has no nn.Embedding"
        wanted = f"class_table='{name}' is not one of {kind}" if name else f"{kind} has no class embedding to be found"
        raise ValueError(f"{wanted}: name the table of its classes by class_table; {there}")
    for path in () if is_dit(model) else found:  # a DiT has a null row always
        owner = model.get_submodule(path.rpartition(".")[0])
        if getattr(owner, "dropout_prob", None) == 0 and tables[path].num_embeddings == owner.num_classes:
            raise ValueError(
                f"{path} has {owner.num_classes} rows, for its classes and none for no class: build the model with "
                "label dropout, whose last row that is"
            )
    return found


def added_paths(model: nn.Module) -> set[str]:
    """The paths of modules that diffusers adds to a base and removes again, those of an IP-Adapter."""
    paths = {path: type(module).__name__ for path, module in base_modules(model)}
    tops = tuple(f"{path}." for path, kind in paths.items() if "IPAdapter" in kind)
    return {path for path in paths if f"{path}.".startswith(tops)}


def target_layers(
    model: nn.Module, targets: tuple[str, ...] | None, named: Iterable[str] = ()
) -> dict[str, nn.Linear]:
    """The linear layers to adapt, by path.

    `targets=None` on a DiT, in diffusers' or its authors' code, takes the paper's set, which follows from its
    parameter counts: adaLN, q, k, v, attention output and both MLP linears of each block, and both output linears,
    without the timestep embedder. On other models of diffusers it takes every linear layer of the repeated blocks,
    which can be routed; on any other model, or where no blocks are repeated, every one but the output head; and none
    of an IP-Adapter. A convolution of 1 x 1 is taken if its whole path is a target.

    `named` are the tensors of an adapter that exists. If they are of layers outside the blocks, as in files that were
    written when those belonged to the default, it has every layer but the output head.
    """
    unused = unused_layers(model)
    linears = {
        path: m
        for path, m in base_modules(model, inside_peft=False)
        if (is_linear(m) and not (is_dit(model) and path in unused)) or (path in (targets or ()) and is_pointwise(m))
    }
    unreached = {f"{path}.out_proj" for path, m in base_modules(model) if isinstance(m, nn.MultiheadAttention)}
    if targets is None:
        if unreached:
            logger.warning("%s and the like are left out: %s", min(unreached), UNREACHED)
        is_left_out = is_in_embedding if is_dit(model) else _is_unmodulated if is_modulated(model) else _is_head
        left_out = unreached | unused | added_paths(model) | set(filter(is_left_out, linears))
        found = {path: linear for path, linear in linears.items() if path not in left_out}
        by_blocks = is_left_out is _is_head and is_of_diffusers(model)
        blocks = tuple(f"{path}." for path in repeated_blocks(model)) if by_blocks else ()
        others = tuple(f"{path}." for path in found if not path.startswith(blocks))
        if not blocks or any(name.startswith(others) for name in named):
            return found
        return {path: linear for path, linear in found.items() if path.startswith(blocks)}

    chosen = {path for target in targets for path in linears if _matches(path, target)} - unused
    for target in targets:
        matched = {path for path in linears if _matches(path, target)}
        if matched and matched <= unused:
            raise ValueError(
                f"{min(matched)} takes no part while q, k and v are fused: unfuse_qkv_projections() first, or name "
                "the fused layers among the targets"
            )
        if not matched:
            kinds = sorted({path.split(".")[-1] for path in linears if not path.split(".")[-1].isdigit()})
            raise ValueError(
                f"target '{target}' matches no linear layer of {type(model).__name__}; its linear layers are named "
                f"{', '.join(kinds)}"
            )
    if unreachable := chosen & unreached:
        raise ValueError(f"{min(unreachable)} cannot be adapted: {UNREACHED}")
    return _without_copies(model, {path: linear for path, linear in linears.items() if path in chosen})


def _without_copies(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """`layers` with only the first timestep and class embedding of a DiT, if all blocks will share it."""
    copies = {path for path in layers if is_in_embedding(path) and not path.startswith(FIRST)}
    if not copies or not is_dit(model) or not equal_copies(embeddings_of(model)):
        return layers
    return {path: module for path, module in layers.items() if path not in copies}


def base_modules(
    model: nn.Module, remove_duplicate: bool = True, inside_peft: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` without adapters and the modules made for them; the number of adapters costs no time.

    With `inside_peft` also those inside layers of PEFT.
    """
    seen, ahead = set(), [("", model)]
    while ahead:
        path, module = ahead.pop()
        if remove_duplicate and module in seen:
            continue
        seen.add(module)
        yield path, module
        for name, child in reversed(module._modules.items()) if inside_peft or not is_tuned(module) else ():
            if child is not None and name not in ("onelora", "onelora_swap") and not is_made_here(child):
                ahead.append((f"{path}.{name}" if path else name, child))


def is_made_here(module: nn.Module) -> bool:
    """Whether a module is the fused q, k, v layer that was made for adapters, and not part of the base."""
    return module.__dict__.get("is_made_for_adapters", False)


def is_tuned(module: nn.Module) -> bool:
    """Whether this is a layer of PEFT around another layer; PEFT is not imported."""
    return any(cls.__name__ == "BaseTunerLayer" for cls in type(module).__mro__)


def untuned(module: nn.Module) -> nn.Module:
    """The base's own layer inside a layer of PEFT, or the module itself."""
    return module.get_base_layer() if is_tuned(module) else module


def is_linear(module: nn.Module) -> bool:
    """Whether this is a linear layer, or a layer of PEFT around one."""
    return isinstance(untuned(module), nn.Linear)


def is_servable(module: nn.Module) -> bool:
    """Whether an adapter can serve this module: a linear layer, or a convolution of 1 x 1."""
    return is_linear(module) or is_pointwise(module)


# The fused copies that diffusers' `fuse_projections` makes of an attention's layers.
FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


def copies_in_use(attn: nn.Module) -> dict[str, tuple[str, ...]]:
    """name of each fused copy with which an attention computes -> the names of the layers that it copies."""
    if not getattr(attn, "fused_projections", False):
        return {}
    return {
        copy: parts
        for copy, parts in FUSED.items()
        if copy in attn._modules and not is_made_here(attn._modules[copy]) and attn._modules.keys() >= set(parts)
    }


def unused_layers(model: nn.Module) -> set[str]:
    """The layers that fused copies replace; in a DiT these copies themselves, which are not used with adapters."""
    return {
        f"{path}.{name}"
        for path, attn in base_modules(model)
        for copy, parts in copies_in_use(attn).items()
        for name in ((copy,) if is_dit(model) else parts)
    }


def stock_modules(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All modules by all their paths as in the original model, without fused copies and layers of PEFT."""
    model = untuned(model)
    yield path, model
    copies = copies_in_use(model)
    for name, child in model._modules.items():
        if child is not None and name not in copies:
            yield from stock_modules(child, f"{path}.{name}" if path else name)


def _is_unmodulated(path: str) -> bool:
    """Whether a layer of a DiT in its authors' code is outside the paper's set: an embedder or a projector."""
    return {"blocks", "final_layer"}.isdisjoint(path.split("."))


def _is_head(path: str) -> bool:
    """Whether a layer is the output head, by its name; Flux also has a `proj_out` in each block, which is none."""
    *parents, name = path.split(".")
    return name in OUTPUT_HEADS and not any(parent.isdigit() for parent in parents)


def _matches(path: str, target: str) -> bool:
    """Whether a target matches a path or its last components; 'proj' matches 'ff.net.0.proj' and not 'linear_proj'."""
    return fnmatch.fnmatchcase(path, target) or fnmatch.fnmatchcase(path, f"*.{target}")


def full_layers(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    """The modules that full fine-tuning trains, by path: the targets, or every module with parameters of its own.

    If the blocks of a DiT have equal timestep and class embeddings, only the shared one is trained. The class table is
    left out if a new one is trained.
    """
    if tuned := next((path for path, module in base_modules(model) if is_tuned(module)), None):
        raise ValueError(f"full trains the base's own layers, but PEFT has an adapter at {tuned}: unload or merge it")
    low = {p.dtype for p in model.parameters() if p.dtype.is_floating_point and p.dtype.itemsize < 4}
    if low:
        raise ValueError(f"full trains the base in float32, but this one is {low.pop()}: load it in float32, autocast")
    if config.targets is not None:
        return dict(target_layers(model, config.targets))
    tables = [] if config.num_classes is None else class_table_paths(model, config.class_table)
    left_out = unused_layers(model) | added_paths(model) | set(tables)
    layers = {path: m for path, m in base_modules(model) if path not in left_out and _has_weights(m)}
    return _without_copies(model, layers)


def norm_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The normalisation layers with weights, by path. Those of a DiT have none."""
    modules, added = base_modules(model, inside_peft=False), added_paths(model)
    norms = {path: module for path, module in modules if "Norm" in type(module).__name__ and path not in added}
    return {path: norm for path, norm in norms.items() if _has_weights(norm)}


def _has_weights(module: nn.Module) -> bool:
    """Whether a module has parameters of its own, apart from those of its children."""
    return any(parameter is not None for parameter in module._parameters.values())


def stand_ins(layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Copies of modules on the meta device, by path; parameters that the originals share are shared."""
    shared: dict[int, nn.Parameter] = {}

    def stand_in(module: nn.Module) -> nn.Module:
        bare, module = nn.Module(), untuned(module)
        if is_servable(module):
            bare = nn.Linear(*features_of(module), bias=False, device="meta")
        for name, parameter in module.named_parameters(recurse=False):
            empty = nn.Parameter(torch.empty(parameter.shape, device="meta"), requires_grad=False)
            bare.register_parameter(name, shared.setdefault(id(parameter), empty))
        return bare

    return {path: stand_in(module) for path, module in layers.items()}


def equal_copies(embeddings: list[nn.Module]) -> bool:
    """Whether a DiT's embeddings have the same weights, bit for bit, so that all blocks can share one."""
    with weights_present(embeddings[0]):
        first = list(embeddings[0].parameters())
        if is_packed(embeddings[0]) or first[0].is_meta:  # there are no values to compare, so each block keeps its own
            return False
        first = [_words(parameter) for parameter in first]
        for embedding in embeddings[1:]:
            with weights_present(embedding):
                if not all(torch.equal(a, _words(b)) for a, b in zip(first, embedding.parameters(), strict=True)):
                    return False
    return True


def is_packed(module: nn.Module) -> bool:
    return any(type(parameter) is not nn.Parameter for parameter in module.parameters())


def _words(parameter: nn.Parameter) -> torch.Tensor:
    """The bits of a parameter as 8-byte integers if possible, which compare several times faster than bf16."""
    data = parameter.detach()
    return data.view(torch.int64) if data.shape[-1] * data.itemsize % 8 == 0 else data
