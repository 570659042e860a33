"""The adapters that are attached to a model, and which of them are active."""

import contextlib
import hashlib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from onelora_diffusion.adapters.class_table import CLASS_TABLE
from onelora_diffusion.adapters.contract import AS_CLASS_TABLE, BESIDE_LINEAR, IN_PLACE, LayerAdapter
from onelora_diffusion.adapters.weights import Weight, scaled, weight_at
from onelora_diffusion.config import AdapterConfig
from onelora_diffusion.denoisers import TwoDenoisers, denoisers_in
from onelora_diffusion.injection.attention import is_fused_apart
from onelora_diffusion.injection.class_tables import TableSeat
from onelora_diffusion.injection.compiled import anything_is_compiled, forget_compiled
from onelora_diffusion.injection.conditioning import DiTParts
from onelora_diffusion.injection.layers import added_paths, base_modules, class_table_paths, stock_modules, untuned
from onelora_diffusion.injection.linear import LinearSeat, memory_of
from onelora_diffusion.injection.model_lock import ModelLock
from onelora_diffusion.injection.route import Route
from onelora_diffusion.injection.seat import Seat
from onelora_diffusion.injection.swapped import SwapSeat
from onelora_diffusion.injection.watch import Watch


class AdapterBook:
    """The adapters of a model, the seats at which they are attached, and which of them are active."""

    def __init__(self, model: nn.Module):
        self.model = model  # the base, whose attribute `_onelora` this is
        self.fingerprint = fingerprint(model)  # of the base before the first adapter
        self.adapters: dict[str, dict[str, LayerAdapter]] = {}  # name -> path of the layer -> its layer adapter
        self.configs: dict[str, AdapterConfig] = {}
        self.origins: dict[str, dict] = {}  # name -> entries of its file's header (`id2label`, `base`, `training`)
        self.seats: dict[tuple[str, str], Seat] = {}  # (kind, path) -> the seat in the model
        self.weights: dict[str, Weight] = {}  # of the active adapters, which are so again after a pause or a merge
        self.is_paused = False  # whether the base computes alone
        self.merged: dict[str, Weight] | None = None  # weights of the adapters that are merged into the base's weights
        self.chosen: tuple[str, ...] | None = None  # adapters that train; None until chosen, while the newest one does
        self.verbs: tuple[str, ...] = ()  # the methods that replace the model's own
        self.lock = ModelLock()  # held by the thread that changes or runs the model
        self.open_route: Route | None = None  # inside `routed`, the adapters of each sample
        self.watch, self.parts = Watch(self), DiTParts(model)
        if self.parts.conditioning is not None:
            self.seats[AS_CLASS_TABLE, CLASS_TABLE] = self.parts.conditioning.table_seat

    @property
    def class_tables(self) -> TableSeat | None:
        return self.seats.get((AS_CLASS_TABLE, CLASS_TABLE))

    @property
    def serving(self) -> dict[str, Weight]:
        """name -> weight of the adapters that are active now and not merged."""
        return {} if self.is_paused or self.merged is not None else self.weights

    @property
    def trained(self) -> tuple[str, ...]:
        return tuple(self.adapters)[-1:] if self.chosen is None else self.chosen

    def check_present(self, adapter_name: str) -> str:
        if adapter_name not in self.adapters:
            raise ValueError(
                f"adapter '{adapter_name}' is not in the list of present adapters: {', '.join(self.adapters)}"
            )
        return adapter_name

    def choose(self, adapter_name: str | None) -> str:
        """Check an adapter's name and return it; None stands for the active adapter, or the only one."""
        if adapter_name is not None:
            return self.check_present(adapter_name)
        names = list(self.merged or self.serving or self.adapters)
        if len(names) > 1:
            raise ValueError(f"adapters {', '.join(names)} are there to choose from: give the adapter_name")
        return names[0]

    def choose_all(self, adapter_names: str | Iterable[str] | None) -> list[str]:
        """Check one or several adapter names and return them as a list; None is resolved as by `choose`.

        A repeated name is returned once.
        """
        if adapter_names is None or isinstance(adapter_names, str):
            return [self.choose(adapter_names)]
        return list(dict.fromkeys(self.check_present(name) for name in adapter_names))

    def weighed(
        self, adapter_names: str | Iterable[str] | None, weights: Weight | Sequence[Weight] | None
    ) -> dict[str, Weight]:
        """Assign weights to names: (names as for `choose_all`, one weight for all or one for each) -> name -> weight.

        ValueError if a name is unknown, or is given twice with two weights, `check_weight` refuses a weight, or the
        numbers of names and weights differ.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        given = self.choose_all(None) if names is None else [self.check_present(name) for name in names]
        if not isinstance(weights, list | tuple):
            weights = [1.0 if weights is None else weights] * len(given)
        elif twice := next((name for name in given if given.count(name) > 1), None):
            raise ValueError(f"adapter '{twice}' is named {given.count(twice)} times: give it once, with one weight")
        if len(weights) != len(given):
            raise ValueError(f"{len(given)} adapter names ({', '.join(given)}) but {len(weights)} weights were given")
        return {name: self.check_weight(weight, name) for name, weight in zip(given, weights, strict=True)}

    def check_weight(self, weight: Weight, adapter_name: str) -> Weight:
        """Return a weight for `activate`; ValueError if it is not finite or names a block that does not exist."""
        if isinstance(weight, dict):
            for block in weight:
                if not any(weight_at({block: 0.0}, path) == 0 for path in self.adapters[adapter_name]):
                    raise ValueError(f"adapter '{adapter_name}' serves no layer in '{block}', which has a weight")
            return {block: self.check_weight(value, adapter_name) for block, value in weight.items()}
        if not math.isfinite(weight):
            raise ValueError(f"the weight of adapter '{adapter_name}' is {weight}; it must be a finite number")
        return float(weight)

    def require_unmerged(self, action: str) -> None:
        """ValueError while adapters are merged into the base; `action` is what cannot be done."""
        if self.merged is not None:
            raise ValueError(
                f"adapters {', '.join(self.merged)} are merged: unmerge them before {action} (unmerge_adapter of a "
                "model, unfuse_lora of a pipeline)"
            )

    def attach(self, adapter_name: str, config: AdapterConfig, adapter: dict[str, LayerAdapter]) -> None:
        if config.fuse_qkv:
            self.parts.fuse()
        before = len(self.seats)
        for path, module in adapter.items():
            self._seat(module.seat, path, config.class_table).add(adapter_name, module)
        if len(self.seats) > before:
            forget_compiled()
        newest = self.trained
        self.adapters[adapter_name], self.configs[adapter_name] = adapter, config
        self._let_train(newest if self.chosen is None else [adapter_name])
        self._take_part()

    def detach(self, adapter_name: str) -> None:
        before = len(self.seats)
        for path, module in self.adapters.pop(adapter_name).items():
            seat = self.seats[module.seat, path]
            seat.remove(adapter_name)
            if seat.is_empty:
                del self.seats[module.seat, path]
        if len(self.seats) < before:
            forget_compiled()
        del self.configs[adapter_name]
        self.origins.pop(adapter_name, None)
        if self.chosen is None:
            self._let_train(self.trained)
        else:
            self.chosen = tuple(name for name in self.chosen if name != adapter_name)
        self.weights = {name: weight for name, weight in self.weights.items() if name != adapter_name}

    def unload(self, adapter_names: Sequence[str]) -> None:
        """Unmerge, and remove these adapters; after the last one the model is the plain base again, bit for bit."""
        with self.lock:
            if self.merged is not None:
                self.unmerge()
            if self.serving:
                self.activate({name: weight for name, weight in self.serving.items() if name not in adapter_names})
            for name in adapter_names:
                self.detach(name)
            if not self.adapters:
                if self.parts.conditioning is None and self.class_tables is not None:
                    self.class_tables.leave()
                self._step_aside()
                self.parts.restore()
                del self.model._onelora
                for verb in self.verbs:
                    self.model.__dict__.pop(verb, None)

    def _seat(self, kind: str, path: str, class_table: str | None) -> Seat:
        """The seat of this kind at a layer, which is created if it does not exist."""
        model, reached = self.model, self.watch.reached
        make = {
            # A layer of PEFT calls the layer that it is around; both orders of attaching give the same sum.
            BESIDE_LINEAR: lambda: LinearSeat(untuned(model.get_submodule(path)), self.parts.places(path), reached),
            IN_PLACE: lambda: SwapSeat(model, self.parts.places(path), reached),
            AS_CLASS_TABLE: lambda: TableSeat(model, class_table_paths(model, class_table)),
        }
        if (kind, path) not in self.seats:
            self.seats[kind, path] = make[kind]()
        return self.seats[kind, path]

    def train(self, adapter_names: Iterable[str]) -> None:
        self.chosen = tuple(adapter_names)
        self._let_train(self.adapters)

    def _let_train(self, adapter_names: Iterable[str]) -> None:
        for name in adapter_names:
            for module in self.adapters[name].values():
                for parameter in module.trained_tensors().values():
                    parameter.requires_grad_(name in self.trained)

    def freeze(self) -> None:
        """Let no tensor of the base or of an adapter require gradients."""
        adapters = (module for adapter in self.adapters.values() for module in adapter.values())
        for module in itertools.chain([self.model], adapters):
            # There may be thousands of adapters, so that walking over all their modules would be slow.
            parts = (part for _, part in base_modules(module)) if module._modules else (module,)
            for part in parts:
                for parameter in part._parameters.values():
                    if parameter is not None and parameter.requires_grad:
                        parameter.requires_grad_(False)

    def serve(
        self, adapter_names: str | Iterable[str] | None, weights: Weight | Sequence[Weight] | None = None
    ) -> None:
        """Activate adapters; arguments are as for `weighed`."""
        with self.lock:
            self.require_unmerged("others are set")
            self.activate(self.weighed(adapter_names, weights))

    def activate(self, weights: dict[str, Weight]) -> None:
        """Activate these adapters with these weights, and no others."""
        self.parts.check_together(self.seats, weights)
        self._activate_seats(weights)
        self.weights, self.is_paused = weights, False

    def _activate_seats(self, weights: dict[str, Weight]) -> None:
        for (_, path), seat in self.seats.items():
            seat.activate({name: weight_at(weight, path) for name, weight in weights.items()})

    def pause(self) -> None:
        """Let the base compute alone until `resume` or the next `activate`."""
        self._activate_seats({})
        self.is_paused = True

    def resume(self) -> None:
        if self.is_paused:
            self.activate(self.weights)

    def _activate_as(self, weights: dict[str, Weight], is_paused: bool) -> None:
        self.activate(weights)
        if is_paused:
            self.pause()

    def merge(self, adapter_names: str | Iterable[str] | None, scale: float = 1.0, check_finite: bool = True) -> None:
        """`merge_adapter`, with the adapters' weights times `scale`; that of one that is not active is 1."""
        with self.lock:
            self.require_unmerged("others are merged")
            names = self.serving if adapter_names is None else self.choose_all(adapter_names)
            if not names:
                raise ValueError("no adapter is active: name the adapters to merge")
            weights = {name: scaled(self.serving.get(name, 1.0), scale) for name in names}
            weights = {name: self.check_weight(weight, name) for name, weight in weights.items()}
            before = self.weights, self.is_paused
            self.activate(weights)
            try:
                self._check_mergeable()
                for seat in self._in_merge_order():
                    seat.merge(check_finite)
            except ValueError as error:
                for seat in reversed(self._in_merge_order()):
                    seat.unmerge()
                self._activate_as(*before)
                raise ValueError(f"{error}: nothing was merged") from None
            self._step_aside()
            self.watch.guard_merged()
            for seat in () if anything_is_compiled() else self.seats.values():  # compiled code goes on calling them
                seat.unhook()
            (self.weights, self.is_paused), self.merged = before, weights

    def unmerge(self) -> None:
        """Restore the base's weights bit for bit, and activate the adapters that were active before the merge."""
        with self.lock:
            if self.merged is None:
                raise ValueError("no adapter is merged")
            for seat in reversed(self._in_merge_order()):
                seat.unmerge()
                seat.hook()
            self._step_aside()
            self._take_part()
            self.merged = None
            self._activate_as(self.weights, self.is_paused)

    def _in_merge_order(self) -> list:
        """The seats in the order of merging: replaced tensors first, then fused q, k, v, then the separate three."""
        order = sorted(self.seats, key=lambda seat: (seat[0] != IN_PLACE, not seat[1].endswith(".to_qkv")))
        return [self.seats[key] for key in order]

    def _check_mergeable(self) -> None:
        users: dict[tuple, list[str]] = {}
        for path, module in base_modules(self.model):
            for parameter in module._parameters.values():
                if parameter is not None:
                    users.setdefault(memory_of(parameter), []).append(path)
        for (_, path), seat in self.seats.items():
            if reason := seat.why_not_mergeable(users):
                raise ValueError(f"{path} {reason}")
            if is_fused_apart(self.model, path):
                raise ValueError(f"{path} was copied into a fused projection: unfuse_qkv_projections() first")

    @contextlib.contextmanager
    def routed(self, route: Route):
        """Context manager in which the route assigns adapters to samples."""
        is_paused, weights, outer = self.is_paused, self.weights, self.open_route
        try:
            self._route(route)
            self._activate_seats({})  # deactivates trained norms, which all samples of the batch would share
            yield
        finally:
            self._route(outer)
            if not is_paused:
                self.activate(weights)

    def reroute(self, samples: Sequence[Mapping[str, Weight]]) -> None:
        """Assign other adapters to samples, inside `routed`; those that were known before are not read again."""
        self.open_route.assign(samples)
        self._route(self.open_route)

    @contextlib.contextmanager
    def routed_rows(self, rows: Sequence[int]):
        """Context manager inside `routed`: a batch of these rows of the route's batch alone."""
        mixtures = list(self.open_route.mixtures.values())
        samples = [mixtures[number] for number in self.open_route.samples]
        self.reroute([samples[row] for row in rows])
        try:
            yield
        finally:
            self.reroute(samples)

    def _route(self, route: Route | None) -> None:
        for seat in self.seats.values():
            seat.route(route)
        self.open_route = route

    def _take_part(self) -> None:
        """Install the hooks on the model's forward, and the shared sums of a DiT's attentions."""
        self.watch.start()
        self.parts.share_sums()

    def _step_aside(self) -> None:
        """Remove the hooks, so that the model runs its own operators alone."""
        self.watch.stop()
        self.parts.stop_sharing_sums()

    def scale(self, scale: float) -> dict[str, Weight]:
        """Multiply the weights of the active adapters by `scale`, and return them; none while paused."""
        self.require_unmerged(f"they are scaled by {scale}")
        if getattr(self.model, "_hf_peft_config_loaded", False):
            raise ValueError(f"a scale of {scale} in a call of a model with PEFT's adapters beside: use set_adapters")
        if self.open_route is not None:
            raise ValueError(f"a scale of {scale} in the call of a route: give the weights in the route")
        if torch.is_grad_enabled() and getattr(self.model, "is_gradient_checkpointing", False):
            raise ValueError(
                f"a scale of {scale} in the call is gone when checkpointing computes blocks again: use set_adapters"
            )
        before = self.serving
        if before:
            self.activate({name: self.check_weight(scaled(weight, scale), name) for name, weight in before.items()})
        return before


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without the wrappers of `torch.compile` and data parallelism, whose names must not be in keys."""
    if not isinstance(model, nn.Module):
        parts = list(denoisers_in(model))
        hint = f": give its {parts[0]}, as in pipe.{parts[0]}" if parts else ""
        raise TypeError(f"the model is a {type(model).__name__}, which is no torch.nn.Module{hint}")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return unwrapped(model.module)
    return unwrapped(model._orig_mod) if "_orig_mod" in model._modules else model


def adapters_of(model: nn.Module) -> AdapterBook:
    model = unwrapped(model)
    if not hasattr(model, "_onelora"):
        raise ValueError(f"{type(model).__name__} has no adapter: inject or load one first")
    return model._onelora


def check_name(model: nn.Module, adapter_name: str) -> None:
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "add adapters before DistributedDataParallel wraps the model: it averages no gradients of later ones"
        )
    model = unwrapped(model)
    if not adapter_name or set(adapter_name) & set("./\\") or not adapter_name.isprintable():
        raise ValueError(f"adapter name {adapter_name!r} must not be empty or contain a dot, a slash or a line break")
    if hasattr(model, "_onelora"):
        if adapter_name in model._onelora.adapters:
            raise ValueError(f"adapter name '{adapter_name}' is already in use: unload_adapter removes that adapter")
        model._onelora.require_unmerged("adding another")


@contextlib.contextmanager
def disable_adapter(model: nn.Module):
    """Context manager in which the base computes alone."""
    book = adapters_of(model)
    with book.lock:
        book.require_unmerged("the base is reached")
        was_paused = book.is_paused
        book.pause()
        try:
            yield model
        finally:
            if not was_paused:
                book.resume()


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the names and shapes of the base's weights, which tells whether an adapter fits a base.

    For a linear layer its features count, so that quantisation changes nothing. An IP-Adapter is left out. Those of
    two denoisers are joined by a plus sign.
    """
    if isinstance(model, TwoDenoisers):
        return "+".join(fingerprint(part) for part in model.children())
    lines, added = [], added_paths(model)
    for path, module in stock_modules(model):
        if path in added:
            continue
        shapes = {name: tuple(p.shape) for name, p in module._parameters.items() if p is not None}
        if isinstance(module, nn.Linear) and "weight" in shapes:
            shapes["weight"] = (module.out_features, module.in_features)
            if "bias" in shapes:
                shapes["bias"] = (module.out_features,)
        lines += [f"{path}.{name} {shape}" if path else f"{name} {shape}" for name, shape in shapes.items()]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
