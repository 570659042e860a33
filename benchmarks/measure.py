"""What a step costs: time beside others, bytes kept for backward, operators and the bytes they move."""

import gc
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_iter
from tqdm import tqdm

from onelora_diffusion.devices import peak_memory_bytes

# ---------------------------------------------------------------------------------------------------
# Time


def interleave(
    steps: dict[str, Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
    label: str = "",
) -> dict[str, np.ndarray]:
    """Seconds of every step in every round: (rounds,) for each name.

    A round runs each step once, in a new random order, so that whatever slows the machine for a while slows
    all of them, and none always follows the same neighbour.
    """
    order, seconds = random.Random(0), {name: [] for name in steps}
    gc_was_on = gc.isenabled()
    gc.collect()
    gc.freeze()  # between rounds only what the steps have made is looked at
    gc.disable()
    try:
        for index in tqdm(range(-warmup, rounds), desc=label, unit="round", leave=False):
            for name in order.sample(list(steps), len(steps)):
                synchronize()
                start = clock()
                steps[name]()
                synchronize()
                if index >= 0:
                    seconds[name].append(clock() - start)
            gc.collect()
    finally:
        gc.unfreeze()
        if gc_was_on:
            gc.enable()
    return {name: np.array(values) for name, values in seconds.items()}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(seconds: np.ndarray, reference: np.ndarray) -> tuple[float, float, float]:
    """Median and quartiles (0.5, 0.25, 0.75) of the ratios of two steps, taken round by round."""
    return tuple(float(q) for q in np.quantile(seconds / reference, (0.5, 0.25, 0.75)))


# ---------------------------------------------------------------------------------------------------
# Memory


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the memory behind some tensors; memory that two of them share counts once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def resident_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers."""
    return storage_bytes(memory_of([*model.parameters(), *model.buffers()]))


def memory_of(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The tensors that hold memory: those inside a packed one, which tells the size of what it stands for."""
    for tensor in tensors:
        if is_traceable_wrapper_subclass(tensor):
            yield from memory_of(getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        else:
            yield tensor


def saved_bytes(model: nn.Module, forward: Callable[[], torch.Tensor]) -> int:
    """Bytes that autograd keeps after a forward pass, the model's own parameters and buffers left out."""
    saved = []

    def pack(tensor):
        saved.append(tensor.detach())  # a node that kept its own output, graph and all, would never be freed
        return saved[-1]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()  # noqa: F841  keeps the graph, and by it the memory, alive while it is counted
    own = {t.untyped_storage()._cdata for t in memory_of([*model.parameters(), *model.buffers()])}
    return storage_bytes(tensor for tensor in memory_of(saved) if tensor.untyped_storage()._cdata not in own)


# ---------------------------------------------------------------------------------------------------
# Operators


@dataclass
class Work:
    """What operators did.

    Attributes:
        operators: calls that compute; views, and memory that is only reserved, are none.
        flops: of products of matrices and of convolutions, two a multiply-add.
        bytes_moved: read and written, were no operator to keep anything in a cache.
    """

    each: list[tuple[str, int, int]] = field(default_factory=list)
    """(name, flops, bytes) of every call in its order."""

    @property
    def operators(self) -> int:
        return len(self.each)

    @property
    def flops(self) -> int:
        return sum(flops for _, flops, _ in self.each)

    @property
    def bytes_moved(self) -> int:
        return sum(moved for _, _, moved in self.each)


class CountWork(TorchDispatchMode):
    """Context manager: counts in `work` what the operators inside do, forward and backward."""

    def __init__(self):
        super().__init__()
        self.work = Work()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func._schema.name not in _NO_WORK:
            name = func._schema.name.removeprefix("aten::")
            inputs = {id(t): t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
            outputs = [t for t in tree_iter(result) if isinstance(t, torch.Tensor)]
            moved = sum(map(_touched_bytes, inputs.values())) + sum(map(_touched_bytes, outputs))
            self.work.each.append((name, _flops(name, list(inputs.values()), outputs), moved))
        return result


_NO_WORK = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"} | {
    "aten::_unsafe_view",
    "aten::_local_scalar_dense",
    "aten::detach",
    "aten::lift_fresh",
}


def _touched_bytes(tensor: torch.Tensor) -> int:
    """An expanded dimension is read from the same place again."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size)
    return math.prod(sizes) * tensor.element_size()


def _flops(name: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> int:
    if name in ("mm", "bmm", "mv"):
        return 2 * outputs[0].numel() * inputs[0].shape[-1]
    if name == "addmm":
        return 2 * outputs[0].numel() * inputs[1].shape[-1]
    if name in ("addr", "addr_"):
        return 2 * outputs[0].numel()
    if name == "convolution":
        return 2 * outputs[0].numel() * inputs[1][0].numel()
    if name == "convolution_backward":  # of the weight, and here never of the input
        return 2 * inputs[0].numel() * inputs[2][0].numel()
    if name.startswith("_scaled_dot_product"):
        backward = "backward" in name
        query, key = inputs[backward : backward + 2]
        return (10 if backward else 4) * query.numel() * key.shape[-2]
    return 0


# ---------------------------------------------------------------------------------------------------
# Report


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table with aligned columns; the first is a name, the others are numbers."""
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]

    def line(cells):
        numbers = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join([cells[0].ljust(widths[0]), *numbers])} |"

    rule = f"|{'-' * (widths[0] + 2)}|{'|'.join('-' * (width + 1) + ':' for width in widths[1:])}|"
    return [line(header), rule, *map(line, rows)]


def reset_peak_memory(device: torch.device) -> int:
    """Reset the peak to the memory that is in use now, and return that in bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        gc.collect()
        with suppress(OSError):  # only Linux can reset it; elsewhere the peak covers the whole process
            Path("/proc/self/clear_refs").write_text("5")
    return peak_memory_bytes(device)
