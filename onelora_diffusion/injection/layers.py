"""Which layers an adapter serves."""

import fnmatch
import logging
from collections.abc import Iterator

import torch
from torch import nn

from onelora_diffusion.adapters.base_layer import weights_present
from onelora_diffusion.config import AdapterConfig

logger = logging.getLogger(__name__)

UNREACHED = "torch.nn.MultiheadAttention reads the weight of its output projection and never calls the layer"
OUTPUT_HEADS = (
    "lm_head",
    "classifier",
    "score",
    "head",
    "proj_out",
    "proj_out_1",
    "proj_out_2",
    "final_layer",
)


def is_dit(model: nn.Module) -> bool:
    """Whether this is diffusers' DiT, told without importing diffusers."""
    return any(cls.__name__ == "DiTTransformer2DModel" for cls in type(model).__mro__)


def is_modulated(model: nn.Module) -> bool:
    """Whether this is built as Meta's DiT, and SiT, REPA, LightningDiT, DDT and RAE after it.

    Told by the names all of them have: `blocks` and a `final_layer`, each with an `adaLN_modulation`.
    """
    places = [path.split(".") for path, _ in base_modules(model) if path.endswith(".adaLN_modulation")]
    return all(any(part in place for place in places) for part in ("blocks", "final_layer"))


def class_table_paths(model: nn.Module, name: str | None = None) -> list[str]:
    """Where a model has its table of classes, whose last row stands for none: in a DiT, one in each block.

    Args:
        name: of the table, or the last components of its path; None: `embedding_table`, as in Meta's `y_embedder`.

    Raises:
        ValueError: there is none, or another than the one that is meant, or it has no row for no class.
    """
    kind = type(model).__name__
    tables = {path: m for path, m in base_modules(model, remove_duplicate=False) if isinstance(m, nn.Embedding)}
    found = [path for path in tables if f".{path}".endswith(f".{name or 'embedding_table'}")]
    if not found or len(found) > 1 and not is_dit(model):
        there = f"its tables are {', '.join(tables)}" if tables else "it has no nn.Embedding"
        wanted = f"class_table='{name}' is not one of {kind}" if name else f"{kind} has no class embedding to be found"
        raise ValueError(f"{wanted}: name the table of its classes by class_table; {there}")
    for path in found:
        owner = model.get_submodule(path.rpartition(".")[0])
        if getattr(owner, "dropout_prob", None) == 0 and tables[path].num_embeddings == owner.num_classes:
            raise ValueError(
                f"{path} has {owner.num_classes} rows, for its classes and none for no class: build the model with "
                "label dropout, whose last row that is"
            )
    return found


def added_paths(model: nn.Module) -> set[str]:
    """What diffusers puts into a model beside the base's own modules: an IP-Adapter's, which comes and goes."""
    tops = [path for path, module in base_modules(model) if "IPAdapter" in type(module).__name__]
    return (
        {p for p, _ in base_modules(model) if any(p == top or p.startswith(f"{top}.") for top in tops)}
        if tops
        else set()
    )


def target_layers(model: nn.Module, targets: tuple[str, ...] | None) -> dict[str, nn.Linear]:
    """The linear layers that an adapter serves, by path.

    `targets=None` on a DiT, diffusers' or one in its authors' code, is the paper's set, found from its parameter
    counts: per block adaLN, q, k, v, attention output and both MLP linears, and both output linears; the timestep
    embedder is left out. Elsewhere it is every linear but the output head, and an IP-Adapter's.
    """
    unused = unused_layers(model)
    linears = {path: m for path, m in outer_modules(model) if is_linear(m) and not (is_dit(model) and path in unused)}
    unreached = {
        f"{path}.out_proj" for path, module in base_modules(model) if isinstance(module, nn.MultiheadAttention)
    }
    if targets is None:
        if unreached:
            logger.warning("%s and the like are left out: %s", min(unreached), UNREACHED)
        is_target = _is_conditioned if is_dit(model) else _is_modulated if is_modulated(model) else _is_no_head
        left_out = unreached | unused | added_paths(model)
        return {path: linear for path, linear in linears.items() if path not in left_out and is_target(path)}

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
    if unreachable := sorted(chosen & unreached):
        raise ValueError(f"{unreachable[0]} cannot be adapted: {UNREACHED}")
    return _without_copies(model, {path: linear for path, linear in linears.items() if path in chosen})


def _without_copies(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """`layers` with the first only of a DiT's timestep and class embeddings, where it will serve all blocks."""
    copies = {path for path in layers if ".norm1.emb." in path and not path.startswith("transformer_blocks.0.")}
    if not copies or not is_dit(model) or not equal_copies([block.norm1.emb for block in model.transformer_blocks]):
        return layers
    return {path: module for path, module in layers.items() if path not in copies}


def base_modules(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` without adapters, however many there are, and without what was made for them."""
    seen = set()

    def walk(module, path):
        if remove_duplicate and module in seen:
            return
        seen.add(module)
        yield path, module
        for name, child in module._modules.items():
            if child is not None and name not in ("onelora", "onelora_swap") and not is_made_here(child):
                yield from walk(child, f"{path}.{name}" if path else name)

    return walk(model, "")


def is_made_here(module: nn.Module) -> bool:
    """Whether a module is none of the base's, but the one for q, k and v that adapters asked for."""
    return module.__dict__.get("is_made_for_adapters", False)


def outer_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`base_modules`, but of PEFT's layers that are there already themselves alone, and not what they consist of."""
    tuned = ""
    for path, module in base_modules(model):
        if not (tuned and path.startswith(tuned)):
            tuned = f"{path}." if is_tuned(module) else ""
            yield path, module


def is_tuned(module: nn.Module) -> bool:
    """Whether this is a layer of PEFT's around another, told without importing PEFT."""
    return any(cls.__name__ == "BaseTunerLayer" for cls in type(module).__mro__)


def untuned(module: nn.Module) -> nn.Module:
    """The base's own layer in one of PEFT's."""
    return module.get_base_layer() if is_tuned(module) else module


def is_linear(module: nn.Module) -> bool:
    """Whether this is a linear layer, or PEFT's around one."""
    return isinstance(untuned(module), nn.Linear)


# What diffusers' `fuse_projections` makes of an attention's layers, of which they are copies.
FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


def copies_in_use(attn: nn.Module) -> dict[str, tuple[str, ...]]:
    """name of each fused copy by which an attention computes -> the names of the layers that it was made of."""
    if not getattr(attn, "fused_projections", False):
        return {}
    return {
        copy: parts
        for copy, parts in FUSED.items()
        if copy in attn._modules and not is_made_here(attn._modules[copy]) and attn._modules.keys() >= set(parts)
    }


def unused_layers(model: nn.Module) -> set[str]:
    """The layers for which fused copies compute; of a DiT the copies, since q, k and v serve on their parts there."""
    return {
        f"{path}.{name}"
        for path, attn in base_modules(model)
        for copy, parts in copies_in_use(attn).items()
        for name in ((copy,) if is_dit(model) else parts)
    }


def stock_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules, by every path, as the model's class has them: no fused copies, and in PEFT's layers the base's."""

    def walk(module, path):
        module = untuned(module)
        yield path, module
        copies = copies_in_use(module)
        for name, child in module._modules.items():
            if child is not None and name not in copies:
                yield from walk(child, f"{path}.{name}" if path else name)

    return walk(model, "")


def _is_conditioned(path: str) -> bool:
    """Of diffusers' DiT: all but the timestep embedder in each block."""
    return ".norm1.emb." not in path


def _is_modulated(path: str) -> bool:
    """Of a DiT in its authors' code: outside is what embeds, and what compares features with another model's."""
    return not {"blocks", "final_layer"}.isdisjoint(path.split("."))


def _is_no_head(path: str) -> bool:
    """By its name, unless it is in a list of blocks: Flux calls a linear layer of each single block `proj_out` too."""
    *parents, name = path.split(".")
    return name not in OUTPUT_HEADS or any(parent.isdigit() for parent in parents)


def _matches(path: str, target: str) -> bool:
    """Whole components only: 'proj' is the end of 'ff.net.0.proj', not of 'linear_proj'."""
    return fnmatch.fnmatchcase(path, target) or fnmatch.fnmatchcase(path, f"*.{target}")


def full_layers(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    """What full fine-tuning trains: the targets, or every module with parameters of its own, by path.

    The timestep and class embedding counts once where a DiT's blocks hold equal copies, which are shared; its
    class table is left out where a new one is trained.
    """
    if tuned := next((path for path, module in base_modules(model) if is_tuned(module)), None):
        raise ValueError(f"full trains the base's own layers, but PEFT has an adapter at {tuned}: unload or merge it")
    dtypes = {parameter.dtype for parameter in model.parameters()}
    low = {dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize < 4}
    if low:
        raise ValueError(f"full trains the base in float32, but this one is {low.pop()}: load it in float32, autocast")
    if config.targets is not None:
        return dict(target_layers(model, config.targets))
    left_out = unused_layers(model) | added_paths(model)
    layers = {
        path: module
        for path, module in base_modules(model)
        if path not in left_out and any(True for _ in module.parameters(recurse=False))
    }
    if is_dit(model):
        layers = _without_copies(model, layers)
    if config.num_classes is not None:
        tables = class_table_paths(model, config.class_table)
        layers = {path: module for path, module in layers.items() if path not in tables}
    return layers


def norm_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The normalisation layers that have weights of their own, by path. A DiT's have none."""
    added = added_paths(model)
    return {
        path: module
        for path, module in outer_modules(model)
        if "Norm" in type(module).__name__
        and path not in added
        and any(True for _ in module.parameters(recurse=False))
    }


def stand_ins(layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Modules of the same shapes on the meta device, by path; what they share of the base's, they share."""
    shared: dict[int, nn.Parameter] = {}

    def stand_in(module: nn.Module) -> nn.Module:
        bare, module = nn.Module(), untuned(module)
        if isinstance(module, nn.Linear):
            bare = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        for name, parameter in module.named_parameters(recurse=False):
            empty = nn.Parameter(torch.empty(parameter.shape, device="meta"), requires_grad=False)
            bare.register_parameter(name, shared.setdefault(id(parameter), empty))
        return bare

    return {path: stand_in(module) for path, module in layers.items()}


def equal_copies(embeddings: list[nn.Module]) -> bool:
    """Whether a DiT's embeddings have the same weights, bit for bit, so that one of them can serve all blocks."""
    with weights_present(embeddings[0]):
        first = list(embeddings[0].parameters())
        if is_packed(embeddings[0]) or first[0].is_meta:  # no values to compare: each block keeps its own
            return False
        first = [_words(parameter) for parameter in first]
        return all(_have_words(embedding, first) for embedding in embeddings[1:])


def _have_words(module: nn.Module, words: list[torch.Tensor]) -> bool:
    with weights_present(module):
        return all(torch.equal(a, _words(b)) for a, b in zip(words, module.parameters(), strict=True))


def is_packed(module: nn.Module) -> bool:
    """Whether a quantisation has packed any of its weights."""
    return any(type(parameter) is not nn.Parameter for parameter in module.parameters())


def _words(parameter: nn.Parameter) -> torch.Tensor:
    """The same bits as integers of eight bytes where they fit, which compare several times faster than bf16 does."""
    data = parameter.detach()
    return data.view(torch.int64) if data.shape[-1] * data.itemsize % 8 == 0 else data
