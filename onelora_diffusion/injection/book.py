"""What is attached to a model, and which of it serves."""

import contextlib
import hashlib
import itertools
import math

from torch import nn

from onelora_diffusion.adapters.class_table import CLASS_TABLE
from onelora_diffusion.adapters.peft import PeftAdapter
from onelora_diffusion.adapters.swap import SwapAdapter
from onelora_diffusion.adapters.weights import Weight, weight_at
from onelora_diffusion.config import AdapterConfig
from onelora_diffusion.injection.attention import OneLoRAAttnProcessor
from onelora_diffusion.injection.conditioning import DiTConditioning
from onelora_diffusion.injection.layers import base_modules, is_dit
from onelora_diffusion.injection.linear import LayerAdapters, adapter_hook
from onelora_diffusion.injection.swapped import SwappedParameters


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

    def chosen(self, adapter_name: str | None) -> str:
        """The name of a present adapter; of None the one that is active, or the only one there is."""
        if adapter_name is not None:
            return self.known(adapter_name)
        names = list(self.merged or self.weights or self.adapters)
        if len(names) > 1:
            raise ValueError(f"adapters {', '.join(names)} are there to choose from: give the adapter_name")
        return names[0]

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


def check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        parts = [name for name in ("transformer", "unet") if isinstance(getattr(model, name, None), nn.Module)]
        hint = f": give its {parts[0]}, as in pipe.{parts[0]}" if parts else ""
        raise TypeError(f"the model is a {type(model).__name__}, which is no torch.nn.Module{hint}")


def adapters_of(model: nn.Module) -> AdapterBook:
    check_model(model)
    if not hasattr(model, "_onelora"):
        raise ValueError(f"{type(model).__name__} has no adapter: inject or load one first")
    return model._onelora


def check_name(model: nn.Module, adapter_name: str) -> None:
    check_model(model)
    if not adapter_name or "." in adapter_name:
        raise ValueError(f"adapter name '{adapter_name}' must not be empty or contain a dot")
    if hasattr(model, "_onelora") and adapter_name in model._onelora.adapters:
        raise ValueError(f"adapter name '{adapter_name}' is already in use: unload_adapter removes that adapter")
    if hasattr(model, "_onelora") and model._onelora.merged is not None:
        raise ValueError(f"adapters {', '.join(model._onelora.merged)} are merged: unmerge them before adding another")


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


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the base's parameter names and shapes: which bases an adapter fits."""
    lines = [f"{name} {tuple(p.shape)}" for name, p in model.named_parameters(remove_duplicate=False)]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def refuse_merged(book: AdapterBook, action: str) -> None:
    if book.merged is not None:
        raise ValueError(f"adapters {', '.join(book.merged)} are fused, and cannot be {action}: unfuse_lora() first")
