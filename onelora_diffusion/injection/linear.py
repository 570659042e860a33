"""The seat beside a linear layer: its layer adapters, and the hook that adds their terms to its output."""

import sys
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack as function_modes
from torch.utils._device import DeviceContext
from torch.utils.checkpoint import CheckpointFunction

from onelora_diffusion.adapters.base_layer import LINEAR_FORWARD, offload_group, weights_present, why_not_its_product
from onelora_diffusion.adapters.compressions import Compression
from onelora_diffusion.adapters.contract import LayerAdapter
from onelora_diffusion.adapters.vector import Vectors
from onelora_diffusion.adapters.weights import Weight, weight_at
from onelora_diffusion.injection.compiled import anything_is_compiled
from onelora_diffusion.injection.route import Route
from onelora_diffusion.injection.seat import Seat


class Reached(set):
    """The paths of the adapted layers that a model's forward has called."""

    takes_gradients = False  # whether gradients were enabled at the start of the forward


class LinearSeat(Seat):
    """The adapters of one linear layer, its child module `onelora`; each call adds its path to `reached`."""

    def __init__(self, layer: nn.Linear, places: list[str], reached: Reached):
        super().__init__(layer, places)
        self.reached = reached
        self._serves = False
        self._others: list[tuple[LayerAdapter, float]] = []  # active adapters that are not vectors
        self.open_route: _LinearRoute | None = None
        self.original: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self.layer.onelora = self
        self.hook()

    def forward(self, x: torch.Tensor, out: torch.Tensor, sums: dict | None = None) -> torch.Tensor:
        """The base layer's output (..., out_features) for x (..., in_features), with the active adapters' terms.

        `out` is changed in place if no other code can have kept it. `sums` are the feature sums of x by compression;
        new ones are added, so that layers with the same x share them.
        """
        if not torch.compiler.is_compiling():
            self.reached.add(self.path)
            if self.reached.takes_gradients and not torch.is_grad_enabled():
                self._check_recomputed()
            if self._is_replica:
                self._list_adapters()
            if self.is_in_use and not makes_new_memory(self.layer):
                out = out.clone(memory_format=torch.contiguous_format)
        if self.open_route is not None:
            return self.open_route.serve(x, out, sums)
        if not self._serves:
            return out
        base = out
        for adapter, weight in self._others:
            adapted = adapter(x, base)  # this is new memory, which the vectors' terms below may change
            out = adapted if out is base and weight == 1 else out + weight * (adapted - base)
        return self.vectors().serve(x, out, base, sums)

    def vectors(self) -> Vectors:
        """The weighted sum of the active vector adapters, computed from their current values."""
        if self._alone is not None:
            return self._alone.vectors()
        return Vectors.combined([(adapter.vectors(), weight) for adapter, weight in self._weighted])

    def of_bias(self, compression: Compression, kept: torch.Tensor) -> torch.Tensor:
        """`compression.of_bias` for the bias with which the layer computes now.

        `kept` is that for the layer's own bias, from when it could be read: an offloaded one cannot.
        """
        if not self.layer.bias.is_meta and offload_group(self.layer) is None:
            return compression.of_bias(self.layer.bias)
        lent = self.layer._modules.get("onelora_swap")  # the adapters' own biases, which are not offloaded
        return kept if lent is None or not lent.is_in_use else lent.of_lent("bias", compression.of_bias, kept)

    def hook(self) -> None:
        self._hooks = self._hooks or [self.layer.register_forward_hook(adapter_hook, with_kwargs=True)]

    @property
    def is_in_use(self) -> bool:
        return self._serves or self.open_route is not None

    @property
    def has_new_bias(self) -> bool:
        return self.original is not None and self.original[1] is None and self.layer.bias is not None

    @property
    def taken_by(self) -> str | None:
        """The offloading function that moved the adapters where their values cannot be read, or None."""
        adapters = self._adapters_in_use()
        on_disk = getattr(offload_group(self.layer), "tensor_to_key", ())
        if on_disk and any(parameter in on_disk for adapter in adapters for parameter in adapter.parameters()):
            return "enable_group_offload"
        for adapter in adapters:
            # accelerate loads an adapter's tensors when its forward is called, which vector adapters do not do.
            if "_hf_hook" in adapter.__dict__ and adapter.vectors() is not None:
                if any(parameter.is_meta for parameter in adapter.parameters()):
                    return "accelerate's dispatch_model or enable_sequential_cpu_offload"
        return None

    def _adapters_in_use(self) -> list[LayerAdapter]:
        if self.open_route is not None:
            return self.open_route.adapters
        return [self._modules[name] for name in self.active]

    def _check_recomputed(self) -> None:
        """ValueError if reentrant checkpointing would compute no gradients for the adapters of this layer."""
        if not any(p.requires_grad for adapter in self._adapters_in_use() for p in adapter.parameters()):
            return
        frame = sys._getframe()
        while frame is not None and frame.f_code is not CheckpointFunction.forward.__code__:
            frame = frame.f_back
        if frame is not None and not any(frame.f_locals["ctx"].needs_input_grad):
            raise ValueError(
                f"{self.path} would get no gradients: reentrant checkpointing takes them only where an input of the "
                "block requires one: pass use_reentrant=False to torch.utils.checkpoint.checkpoint, or call "
                "requires_grad_() on the block's input"
            )

    def add(self, name: str, adapter: LayerAdapter) -> None:
        with weights_present(self.layer):
            adapter.serve(self.layer)
        super().add(name, adapter)

    def leave(self) -> None:
        self.unhook()
        del self.layer.onelora

    def activate(self, weights: dict[str, float]) -> None:
        super().activate(weights)
        self._serves = bool(self.active)

    def _keep(self, adapters: list[tuple[LayerAdapter, float]]) -> None:
        self._others = [(adapter, weight) for adapter, weight in adapters if adapter.vectors() is None]
        super()._keep([(adapter, weight) for adapter, weight in adapters if adapter.vectors() is not None])

    @torch.no_grad()
    def merged_tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's fp32 weight (out, in) and bias (out,) with the active adapters merged in, as new tensors.

        W = γ ⊙ (W0 + ΔW + b 1ᵀ), bias = γ ⊙ (bias0 + β), where ΔW is the sum over all other methods.
        """
        weight = self.layer.weight.float().flatten(1)
        bias = weight.new_zeros(len(weight)) if self.layer.bias is None else self.layer.bias.float()
        base = weight, bias
        with torch.autocast(weight.device.type, enabled=False):  # autocast would round the products
            for adapter, scale in self._others:
                adapted = adapter.merged(*base)
                weight, bias = weight + scale * (adapted[0] - base[0]), bias + scale * (adapted[1] - base[1])
            return self.vectors().merged(weight, bias, base[0])

    def why_not_mergeable(self, users: dict[tuple, list[str]]) -> str | None:
        weight = self.layer._parameters.get("weight")
        if not self.active:
            return None
        if weight is None:
            return "has a weight that is computed from others (weight_norm, spectral_norm): remove that first"
        shared = [path for path in users.get(memory_of(weight), ()) if path != self.path]
        if f"{self.path}.base_layer" in shared:
            return "has an adapter of PEFT's as well: merge or unload that first"
        if reason := why_not_writable(self.layer):
            return reason
        if shared:
            return f"shares its weight with {shared[0]}, which would change with it: serve adapters unmerged"
        reason = why_not_its_product(self.layer)
        return reason and f"{reason}: serve adapters unmerged"

    def merge(self, check: bool) -> None:
        if not self.active:
            return
        weight, bias = self.merged_tensors()
        if check and not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
            raise ValueError(f"merging {', '.join(self.active)} into {self.path} gives NaN or infinity")
        layer = self.layer
        own_bias = None if layer.bias is None else layer.bias.detach().cpu().clone()
        self.original = layer.weight.detach().cpu().clone(), own_bias
        with torch.no_grad():
            layer.weight.copy_(weight.view_as(layer.weight))
            if layer.bias is not None:
                layer.bias.copy_(bias)
            elif bias.any():
                layer.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=False)
        self._serves = False

    def unmerge(self) -> None:
        if self.original is None:
            return
        weight, bias = self.original
        with torch.no_grad():
            self.layer.weight.copy_(weight)
            if bias is None:
                self.layer.bias = None
            else:
                self.layer.bias.copy_(bias)
        self.original = None

    def route(self, route: Route | None) -> None:
        if self.open_route is None or self.open_route.route is not route:
            self.open_route = None if route is None else _LinearRoute(self, route)
        if self.open_route is not None:
            self.open_route.update()


class _LinearRoute:
    """Applies to each sample of a batch its own weighted sum of a layer's adapters."""

    def __init__(self, seat: LinearSeat, route: Route):
        self.seat, self.path, self.route = seat, seat.path, route
        self.parts: dict[str, list[tuple[LayerAdapter, Vectors | None, float]]] = {}

    def update(self) -> None:
        """Read the route's mixtures; of adapters in those that the route had before, the vectors are known."""
        self.parts = {key: self.parts.get(key) or self._parts(mix) for key, mix in self.route.mixtures.items()}
        mixtures = list(self.parts.values())
        self.adapters = [adapter for parts in mixtures for adapter, _, _ in parts]
        self.vectors = [[(v, weight) for _, v, weight in parts if v is not None] for parts in mixtures]
        # The weights in each mixture of the adapters that are not vectors.
        others = dict.fromkeys(adapter for parts in mixtures for adapter, vectors, _ in parts if vectors is None)
        self.others = {other: [sum(w for a, _, w in parts if a is other) for parts in mixtures] for other in others}
        self.kept = None
        if anything_is_compiled():  # compiled code would be compiled again for each number of mixtures
            self.trains = any(vectors.require_grad for mixture in self.vectors for vectors, _ in mixture)
            with torch.no_grad():
                self.kept = self.stacks()

    def _parts(self, mixture: Mapping[str, Weight]) -> list[tuple[LayerAdapter, Vectors | None, float]]:
        """The adapters of this layer in a mixture, their vectors if they have any, and their weights."""
        present = {self.seat[name]: weight for name, weight in mixture.items() if name in self.seat}
        return [(adapter, adapter.vectors(), weight_at(weight, self.path)) for adapter, weight in present.items()]

    def serve(self, x: torch.Tensor, out: torch.Tensor, sums: dict | None) -> torch.Tensor:
        if len(out) != len(self.route.batch):
            raise ValueError(
                f"{self.path} is given {len(out)} rows for a batch of {len(self.route.batch)} samples: its layer does "
                "not keep samples apart, and cannot be routed"
            )
        base = out
        for adapter, weights in self.others.items():
            out = self.add_other(adapter, weights, x, base, out)
        is_kept = torch.compiler.is_compiling() and self.kept is not None
        stacks = self.stacks() if not is_kept or self.trains and torch.is_grad_enabled() else self.kept
        of_samples = stacks.map(lambda stack: stack[self.route.index(stack.device)].to(out.device))
        return of_samples.serve(x, out, base, sums)

    def stacks(self) -> Vectors:
        """The vectors b, β and γ of all K mixtures, each (K, ..., out_features)."""
        return Vectors.stacked([Vectors.weighted_sum(mix) for mix in self.vectors])

    def add_other(self, adapter: LayerAdapter, weights: list[float], x, base, out) -> torch.Tensor:
        """Call the forward of an adapter that is no vector (such as LoRA) for the samples that use it."""
        samples = [sample for sample, mixture in enumerate(self.route.batch) if weights[mixture]]
        if not samples:
            return out
        index = self.route.copied(samples, torch.long, out.device)
        of_samples = [weights[self.route.batch[sample]] for sample in samples]
        scale = self.route.copied(of_samples, torch.float32, out.device)
        term = adapter(x[index], base[index]) - base[index]
        return out.index_add(0, index, (scale.view(-1, *[1] * (out.ndim - 1)) * term).to(out.dtype))


def adapter_hook(linear: nn.Module, args: tuple, kwargs: dict, out: torch.Tensor) -> torch.Tensor:
    """Forward hook of an adapted linear layer."""
    x = args[0] if args else next(iter(kwargs.values()))
    if isinstance(linear, nn.Conv2d):  # of 1 x 1: its channels are the features of each position
        return linear.onelora(x.movedim(-3, -1), out.movedim(-3, -1)).movedim(-1, -3)
    return linear.onelora(x, out)


def makes_new_memory(layer: nn.Module) -> bool:
    """Whether a layer's output is new memory that no other code can have kept before its adapters get it.

    That is known only for PyTorch's own linear layer without a replaced `forward` (diffusers' step caches and
    offloading), an earlier hook, a hook on all modules, or a mode of PyTorch's dispatcher (selective checkpointing
    keeps products). Other layers may return a tensor that they keep or that their backward reads.
    """
    return (
        type(layer).forward is LINEAR_FORWARD
        and "forward" not in layer.__dict__
        and not torch_module._global_forward_hooks
        and next(iter(layer._forward_hooks.values()), adapter_hook) is adapter_hook
        and torch._C._len_torch_dispatch_stack() == 0
        and (torch._C._len_torch_function_stack() == 0 or all(isinstance(m, DeviceContext) for m in function_modes()))
    )


def has_foreign_hooks(layer: nn.Module) -> bool:
    """Whether the layer has hooks other than that of its adapters."""
    return bool(
        layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_backward_pre_hooks
        or torch_module._global_backward_hooks
        or any(hook is not adapter_hook for hook in layer._forward_hooks.values())
    )


def why_not_writable(layer: nn.Module) -> str | None:
    """Why a layer's weight cannot be overwritten, or None if it can."""
    weight = layer.weight
    if hasattr(weight, "full_tensor"):
        return "is shared out over processes: merge where the model is whole"
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        return "is quantised: serve adapters unmerged, or merge into the unquantised base and quantise that"
    if weight.dtype.itemsize == 1:
        return f"holds its weight in {weight.dtype}, whose rounding is larger than an adapter: serve adapters unmerged"
    if weight.is_inference() and not torch.is_inference_mode_enabled():
        return "was made under torch.inference_mode(): merge there too"
    if weight.is_meta:
        return "and other weights are offloaded: fuse before enable_sequential_cpu_offload"
    if offload_group(layer) is not None:  # between calls the weight is a copy, or on the disk
        return "and other weights are offloaded: fuse before enable_group_offload"
    return None


def memory_of(parameter: nn.Parameter) -> tuple:
    """A key that is equal for tied parameters, and differs between all others that exist at the same time."""
    if type(parameter) is nn.Parameter and not parameter.is_meta:
        return parameter.data_ptr(), tuple(parameter.shape)
    return (id(parameter),)
