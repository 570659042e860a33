"""Which layers an adapter serves; attach, detach, activate, freeze, count."""

import contextlib
import fnmatch
import hashlib
import itertools
import logging
import math
import types
from collections.abc import Iterator

import torch
from torch import nn

from onelora_diffusion.adapters.layer import LayerAdapters, Weight, adapter_hook, weight_at
from onelora_diffusion.adapters.mora import MoraAdapter
from onelora_diffusion.adapters.peft import PeftAdapter, build_peft_adapters
from onelora_diffusion.adapters.swap import SwapAdapter, SwappedParameters
from onelora_diffusion.adapters.vector import VectorAdapter
from onelora_diffusion.attention import OneLoRAAttnProcessor
from onelora_diffusion.conditioning import ClassTable, DiTConditioning, equal_copies
from onelora_diffusion.config import AdapterConfig

logger = logging.getLogger(__name__)

CLASS_TABLE = "class_embedding"
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


# ---------------------------------------------------------------------------------------------------
# Public verbs


def inject_adapter(model: nn.Module, config: AdapterConfig, adapter_name: str = "default") -> nn.Module:
    """Freeze a base model and add a trainable adapter, which leaves its output as it was.

    Base layers stay where and what they are; an adapter is a child, `onelora`, of the layer it serves.
    Earlier adapters of the model stay, frozen and inactive. Works on the meta device.

    Args:
        model: `DiTTransformer2DModel`, or any module with linear layers; changed in place.
        config: what is trained, and where.
        adapter_name: a new name without dots.

    Returns:
        `model`; its parameters that require gradients are exactly the adapter's, in fp32.

    Raises:
        ValueError: the name is in use, a target matches no layer, or a class table is asked of a model
            without class embeddings. The model is left as it was.
    """
    check_name(model, adapter_name)
    attach_adapter(model, config, adapter_name, build_adapter(model, config))
    return model


def unload_adapter(model: nn.Module, adapter_name: str | None = None) -> nn.Module:
    """Remove an adapter, or every one; after the last the model is the plain base, bit for bit.

    Merged weights are unmerged first.
    """
    book = adapters_of(model)
    names = list(book.adapters) if adapter_name is None else [book.known(adapter_name)]
    if book.merged is not None:
        from onelora_diffusion.merging import unmerge_adapter

        unmerge_adapter(model)
    remaining = {name: weight for name, weight in book.weights.items() if name not in names}
    book.activate(remaining)
    for name in names:
        book.detach(name)
    if not book.adapters:
        book.restore()
        del model._onelora, model.save_pretrained
    return model


def set_adapters(
    model: nn.Module, adapter_names: str | list[str], weights: Weight | list[Weight] | None = None
) -> nn.Module:
    """Let the named adapters serve together: their vectors are summed with these weights.

    A weighted sum of 1LoRA adapters is a 1LoRA adapter, so that n of them cost what one costs. Class tables are
    not summed: the last named adapter that brought one and weighs other than 0 serves its classes.

    Args:
        weights: one for all or one for each: a number, or numbers by block, such as
            `{"transformer_blocks.3": 0.5, "*.attn1": 0.0}`, where the longest key that fits counts and 1 is
            the weight of all that no key names.

    Raises:
        ValueError: an unknown name or block, a weight that is no finite number, or as many weights as there are
            not names. Nothing is changed then.
    """
    book = adapters_of(model)
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    weights = [1.0 if weights is None else weights] * len(names) if not isinstance(weights, list) else weights
    if len(weights) != len(names):
        raise ValueError(f"{len(names)} adapter names ({', '.join(names)}) but {len(weights)} weights were given")
    if book.merged is not None:
        raise ValueError(f"adapters {', '.join(book.merged)} are merged: unmerge them before others are set")
    book.activate({book.known(name): book.checked(weight, name) for name, weight in zip(names, weights, strict=True)})
    return model


@contextlib.contextmanager
def disable_adapter(model: nn.Module):
    """Context manager: inside, the model computes what its base computes."""
    book = adapters_of(model)
    if book.merged is not None:
        raise ValueError(f"adapters {', '.join(book.merged)} are merged: unmerge them to reach the base")
    weights = book.weights
    book.activate({})
    try:
        yield model
    finally:
        book.activate(weights)


def adapter_state_dict(model: nn.Module, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """The trained tensors of an adapter, live, by their names in an adapter file (without its prefix)."""
    book = adapters_of(model)
    return state_dict_of(book.adapters[book.known(adapter_name)])


def count_trainable(model: nn.Module) -> int:
    """The number of weights that require gradients; each shared one counts once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


# ---------------------------------------------------------------------------------------------------
# Which layers


def is_dit(model: nn.Module) -> bool:
    """Whether this is diffusers' DiT, told without importing diffusers."""
    return any(cls.__name__ == "DiTTransformer2DModel" for cls in type(model).__mro__)


def target_layers(model: nn.Module, targets: tuple[str, ...] | None) -> dict[str, nn.Linear]:
    """The linear layers that an adapter serves, by path.

    `targets=None` on a DiT is the paper's set, found from its parameter counts: per block adaLN, q, k, v,
    attention output and both MLP linears, and both output linears; the timestep embedder is left out.
    Elsewhere it is every linear but the output head.
    """
    linears = {path: module for path, module in base_modules(model) if isinstance(module, nn.Linear)}
    if targets is None and is_dit(model):
        return {path: linear for path, linear in linears.items() if ".norm1.emb." not in path}
    if targets is None:
        return {path: linear for path, linear in linears.items() if not _is_output_head(path)}

    chosen = {path for target in targets for path in linears if _matches(path, target)}
    for target in targets:
        if not any(_matches(path, target) for path in linears):
            kinds = sorted({path.split(".")[-1] for path in linears if not path.split(".")[-1].isdigit()})
            raise ValueError(
                f"target '{target}' matches no linear layer of {type(model).__name__}; its linear layers are named "
                f"{', '.join(kinds)}"
            )
    return _without_copies(model, {path: linear for path, linear in linears.items() if path in chosen})


def _without_copies(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """`layers` with the first only of a DiT's timestep and class embeddings, where it will serve all blocks."""
    copies = {path for path in layers if ".norm1.emb." in path and not path.startswith("transformer_blocks.0.")}
    if not copies or not is_dit(model) or not equal_copies([block.norm1.emb for block in model.transformer_blocks]):
        return layers
    return {path: module for path, module in layers.items() if path not in copies}


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` without adapters, however many there are, and without the `to_qkv` made for them."""
    seen = set()

    def walk(module, path):
        if module in seen:
            return
        seen.add(module)
        yield path, module
        for name, child in module._modules.items():
            if child is not None and name not in ("onelora", "onelora_swap", "to_qkv"):
                yield from walk(child, f"{path}.{name}" if path else name)

    return walk(model, "")


def _is_output_head(path: str) -> bool:
    """By its name, unless it is in a list of blocks: Flux calls a linear layer of each single block `proj_out` too."""
    *parents, name = path.split(".")
    return name in OUTPUT_HEADS and not any(parent.isdigit() for parent in parents)


def _matches(path: str, target: str) -> bool:
    """Whole components only: 'proj' is the end of 'ff.net.0.proj', not of 'linear_proj'."""
    return fnmatch.fnmatchcase(path, target) or fnmatch.fnmatchcase(path, f"*.{target}")


def fused_layers(model: nn.Module, layers: dict[str, nn.Linear]) -> dict[str, nn.Linear]:
    """`layers` with one layer, `to_qkv`, in the place of an attention's q, k and v; made here where it is not yet.

    Raises:
        ValueError: only one or two of an attention's three are among the layers.
    """
    fused = {}
    for path, linear in layers.items():
        parent, _, name = path.rpartition(".")
        if name not in ("to_q", "to_k", "to_v"):
            fused[path] = linear
        elif not all(f"{parent}.{name}" in layers for name in ("to_q", "to_k", "to_v")):
            raise ValueError(f"fuse_qkv makes one layer of q, k and v, but of {parent} the targets have not all three")
        elif f"{parent}.to_qkv" not in fused:
            attn = model.get_submodule(parent)
            fused[f"{parent}.to_qkv"] = attn.to_qkv if hasattr(attn, "to_qkv") else _joined(attn)
    return fused


def _joined(attn: nn.Module) -> nn.Linear:
    linears = (attn.to_q, attn.to_k, attn.to_v)
    with torch.device("meta"):
        joined = nn.Linear(attn.to_q.in_features, sum(linear.out_features for linear in linears), bias=False)
    joined.weight = nn.Parameter(torch.cat([linear.weight.detach() for linear in linears]), requires_grad=False)
    return joined


def full_layers(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    """What full fine-tuning trains: the targets, or every module with parameters of its own, by path.

    The timestep and class embedding counts once where a DiT's blocks hold equal copies, which are shared; its
    class table is left out where a new one is trained.
    """
    low = {parameter.dtype for parameter in model.parameters()} & {torch.float16, torch.bfloat16}
    if low:
        raise ValueError(f"full trains the base in float32, but this one is {low.pop()}: load it in float32, autocast")
    if config.targets is not None:
        return dict(target_layers(model, config.targets))
    layers = {
        path: module for path, module in base_modules(model) if any(True for _ in module.parameters(recurse=False))
    }
    if is_dit(model):
        layers = _without_copies(model, layers)
        if config.num_classes is not None:
            layers = {path: m for path, m in layers.items() if not path.endswith(".class_embedder.embedding_table")}
    return layers


def norm_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The normalisation layers that have weights of their own, by path. A DiT's have none."""
    return {
        path: module
        for path, module in base_modules(model)
        if "Norm" in type(module).__name__ and any(True for _ in module.parameters(recurse=False))
    }


# ---------------------------------------------------------------------------------------------------
# Build an adapter beside the model, then attach it


def build_adapter(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    """The modules of a new adapter by the path of the layer each serves; the model is not touched."""
    if config.fuse_qkv and not is_dit(model):
        raise ValueError(f"fuse_qkv goes with DiTTransformer2DModel, not with {type(model).__name__}")
    if config.num_classes is not None and not is_dit(model):
        raise ValueError(f"num_classes={config.num_classes}: {type(model).__name__} has no class embedding")
    # Trained tensors that are in the base's place are no start for a new adapter.
    is_swapped = hasattr(model, "_onelora") and model._onelora.swapped
    with disable_adapter(model) if is_swapped else contextlib.nullcontext():
        if config.method == "full":
            copies = {}
            adapter = {path: SwapAdapter(module, copies) for path, module in full_layers(model, config).items()}
        else:
            adapter = _linear_adapters(model, config)
        if config.norms:
            norms = norm_layers(model)
            if not norms:
                logger.warning("%s: no norm has weights of its own; `norms` trains nothing", type(model).__name__)
            for path, norm in norms.items():
                adapter[path] = SwapAdapter(norm)
        if config.num_classes is not None:
            table = model.transformer_blocks[0].norm1.emb.class_embedder.embedding_table
            adapter[CLASS_TABLE] = ClassTable(table, config)
    return adapter


def _linear_adapters(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    if config.is_vector and not (config.sum or config.bias or config.scale):
        return {}
    layers = target_layers(model, config.targets)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear layer to adapt")
    if config.is_vector:
        return {path: VectorAdapter(linear, config) for path, linear in layers.items()}
    if config.fuse_qkv:
        layers = fused_layers(model, layers)
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


def check_name(model: nn.Module, adapter_name: str) -> None:
    if not adapter_name or "." in adapter_name:
        raise ValueError(f"adapter name '{adapter_name}' must not be empty or contain a dot")
    if hasattr(model, "_onelora") and adapter_name in model._onelora.adapters:
        raise ValueError(f"adapter name '{adapter_name}' is already in use")
    if hasattr(model, "_onelora") and model._onelora.merged is not None:
        raise ValueError(f"adapters {', '.join(model._onelora.merged)} are merged: unmerge them before adding another")


class AdapterBook:
    """What is attached to a model: its adapters, which of them serve, and what to put back after the last.

    Attributes:
        adapters: name -> path of the served layer -> the adapter's module.
        configs: name -> the adapter's settings.
        weights: name -> weight of the adapters that serve.
        merged: the weights that are folded into the base, or None.
        origins: name -> what its file said of it (`id2label`, `base`, `training`).
        paused, before_merging: the weights to bring back when a pipeline enables or unfuses its adapters.
        served, swapped: path -> layer with `LayerAdapters`, path -> module with `SwappedParameters`.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.fingerprint = fingerprint(model)
        self.adapters: dict[str, dict[str, nn.Module]] = {}
        self.configs: dict[str, AdapterConfig] = {}
        self.weights: dict[str, Weight] = {}
        self.merged: dict[str, Weight] | None = None
        self.origins: dict[str, dict] = {}
        self.paused: dict[str, Weight] = {}
        self.before_merging: dict[str, Weight] = {}
        self.served: dict[str, nn.Linear] = {}
        self.swapped: dict[str, nn.Module] = {}
        self.originals: dict = {}
        self.hooks: dict = {}
        self.stock_processors: dict = {}
        self.conditioning = DiTConditioning(model) if is_dit(model) else None

    def known(self, adapter_name: str) -> str:
        if adapter_name not in self.adapters:
            raise ValueError(
                f"adapter '{adapter_name}' is not in the list of present adapters: {', '.join(self.adapters)}"
            )
        return adapter_name

    def checked(self, weight: Weight, adapter_name: str) -> Weight:
        """A weight to give to `activate`; refuses what is no finite number and blocks that do not exist."""
        if isinstance(weight, dict):
            for block in weight:
                if not any(weight_at({block: 0.0}, path) == 0 for path in self.adapters[adapter_name]):
                    raise ValueError(
                        f"adapter '{adapter_name}' serves no layer in '{block}', which was given a weight"
                    )
            return {block: self.checked(value, adapter_name) for block, value in weight.items()}
        if not math.isfinite(weight):
            raise ValueError(f"the weight of adapter '{adapter_name}' is {weight}; it must be a finite number")
        return float(weight)

    def served_layers(self) -> dict[str, nn.Linear]:
        """`served`; a fused q, k, v comes before the three that are its parts."""
        return dict(sorted(self.served.items(), key=lambda item: not item[0].endswith(".to_qkv")))

    def freeze(self) -> None:
        """Nothing requires gradients any more: no tensor of the base in its place, and none of an adapter."""
        adapters = (module for adapter in self.adapters.values() for module in adapter.values())
        for module in itertools.chain([self.model], adapters):
            for _, part in base_modules(module):
                for parameter in part._parameters.values():
                    if parameter is not None and parameter.requires_grad:
                        parameter.requires_grad_(False)

    def attach(self, adapter_name: str, config: AdapterConfig, adapter: dict[str, nn.Module]) -> None:
        if config.fuse_qkv:
            self.fuse_qkv()
        for path, module in adapter.items():
            if path == CLASS_TABLE:
                self.conditioning.tables[adapter_name] = module
                continue
            if isinstance(module, SwapAdapter):
                if path not in self.swapped:
                    layer = self.swapped[path] = self.model.get_submodule(path)
                    layer.onelora_swap = SwappedParameters(layer)
                self.swapped[path].onelora_swap[adapter_name] = module
                continue
            if path not in self.served:
                self.served[path] = self.model.get_submodule(path)
                self.served[path].onelora = LayerAdapters()
            layer = self.served[path]
            layer.onelora[adapter_name] = module
            if isinstance(module, PeftAdapter):
                module.serve(layer)
        self.adapters[adapter_name], self.configs[adapter_name] = adapter, config
        self.add_hooks()

    def detach(self, adapter_name: str) -> None:
        for path, module in self.adapters.pop(adapter_name).items():
            if path == CLASS_TABLE:
                del self.conditioning.tables[adapter_name]
                continue
            is_swap = isinstance(module, SwapAdapter)
            layers, child = (self.swapped, "onelora_swap") if is_swap else (self.served, "onelora")
            adapters = getattr(layers[path], child)
            del adapters[adapter_name]
            if not len(adapters):
                delattr(layers.pop(path), child)
                if not is_swap and path in self.hooks:
                    self.hooks.pop(path).remove()
        del self.configs[adapter_name]
        self.origins.pop(adapter_name, None)

    def activate(self, weights: dict[str, Weight]) -> None:
        full = [name for name in weights if self.configs[name].method == "full"]
        fused = [name for name in weights if self.configs[name].fuse_qkv and not self.configs[name].is_vector]
        if full and fused:
            raise ValueError(
                f"'{full[0]}' trains q, k and v, which '{fused[0]}' adapts as one: they cannot serve together"
            )
        for path, layer in self.served.items():
            layer.onelora.set_active({name: weight_at(weight, path) for name, weight in weights.items()})
        for path, layer in self.swapped.items():
            layer.onelora_swap.set_active(layer, {name: weight_at(weight, path) for name, weight in weights.items()})
        if is_dit(self.model):
            for attn in self.attentions().values():
                if hasattr(attn, "to_qkv"):  # it holds the base's q, k and v, whatever is in their place
                    attn.fused_projections = not full
        if self.conditioning is not None:
            self.conditioning.set_active({name: weight_at(weight, CLASS_TABLE) for name, weight in weights.items()})
        self.weights = weights

    def add_hooks(self) -> None:
        for path, layer in self.served.items():
            if path not in self.hooks:
                self.hooks[path] = layer.register_forward_hook(adapter_hook)
        if is_dit(self.model):
            for path, attn in self.attentions().items():
                if path not in self.stock_processors:
                    self.stock_processors[path] = attn.processor
                    attn.set_processor(OneLoRAAttnProcessor())

    def remove_hooks(self) -> None:
        while self.hooks:
            self.hooks.popitem()[1].remove()
        while self.stock_processors:
            path, processor = self.stock_processors.popitem()
            self.model.get_submodule(path).set_processor(processor)

    def restore(self) -> None:
        """Put back all that `attach` replaced for every adapter together."""
        self.remove_hooks()
        if self.conditioning is not None:
            self.conditioning.restore()
            for attn in self.attentions().values():
                if hasattr(attn, "to_qkv"):  # q, k and v keep the matrix alive as its views
                    del attn.to_qkv
                    attn.fused_projections = False

    def attentions(self) -> dict[str, nn.Module]:
        return {
            f"transformer_blocks.{index}.attn1": block.attn1
            for index, block in enumerate(self.model.transformer_blocks)
        }

    def fuse_qkv(self) -> None:
        """Lay q, k and v into one matrix, of which the three stay views: no weight is held twice."""
        for attn in self.attentions().values():
            if hasattr(attn, "to_qkv"):
                continue
            attn.fuse_projections()
            attn.to_qkv.requires_grad_(False)
            linears = (attn.to_q, attn.to_k, attn.to_v)
            for linear, weight in zip(linears, attn.to_qkv.weight.data.chunk(3), strict=True):
                linear.weight.data = weight
            if attn.to_qkv.bias is not None:
                for linear, bias in zip(linears, attn.to_qkv.bias.data.chunk(3), strict=True):
                    linear.bias.data = bias


def adapters_of(model: nn.Module) -> AdapterBook:
    if not hasattr(model, "_onelora"):
        raise ValueError(f"{type(model).__name__} has no adapter: inject or load one first")
    return model._onelora


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the base's parameter names and shapes: which bases an adapter fits."""
    lines = [f"{name} {tuple(p.shape)}" for name, p in model.named_parameters(remove_duplicate=False)]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _save_base(model: nn.Module, save_directory, *args, **kwargs):
    """`save_pretrained` of a model with adapters: writes a plain diffusers model, in the stock layout."""
    from onelora_diffusion.merging import stock_state_dict

    def stock(module, state_dict, prefix, local_metadata):
        clean = stock_state_dict(module, state_dict)
        state_dict.clear()
        state_dict.update(clean)

    hook = model.register_state_dict_post_hook(stock)
    try:
        return type(model).save_pretrained(model, save_directory, *args, **kwargs)
    finally:
        hook.remove()
