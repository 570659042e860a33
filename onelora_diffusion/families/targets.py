"""The layers that a recorded family adapts by default."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def targets_in(denoiser: nn.Module, blocks: tuple[str, ...], predict: Callable[[], Tensor | list]) -> tuple[str, ...]:
    """Patterns of the linear layers in lists of blocks that a prediction depends on.

    The last block of some transformers computes tokens of the prompt that nobody reads.

    Args:
        predict: calls the denoiser, twice in all.
    """
    inside = {
        path: module
        for path, module in denoiser.named_modules()
        if isinstance(module, nn.Linear) and any(path.startswith(f"{block}.") for block in blocks)
    }
    # The graph alone is asked: nothing is kept for a backward pass.
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda kept: None):
        added, outputs = _with_added(inside, predict)
    reached = _leaves_of(outputs)
    used = [path for path, value in added.items() if id(value) in reached]
    last = tuple(f"{block}.{len(denoiser.get_submodule(block)) - 1}." for block in blocks)
    dropped = _without_gradient({path: inside[path] for path in used if path.startswith(last)}, predict)
    used = [path for path in used if path not in dropped]

    def patterns(prefix: str, entries: Iterable[str] = ()) -> list[str]:
        own, mine = ([path for path in paths if path.startswith(f"{prefix}.")] for paths in (inside, used))
        if mine == own:
            return [f"{prefix}.*"]
        return [pattern for entry in entries for pattern in patterns(entry)] or mine

    return tuple(
        pattern
        for block in blocks
        for pattern in patterns(block, [f"{block}.{i}" for i in range(len(denoiser.get_submodule(block)))])
    )


def _with_added(
    layers: dict[str, nn.Module], predict: Callable[[], Tensor | list]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """A zero for each layer, by path, and a prediction in which it was added to the layer's output.

    It is not where a layer is called by the names of its arguments (AnimateDiff's motion modules): PEFT's take no such
    call, and a LoRA of them would not serve in the stock pipeline.
    """
    added = {path: torch.zeros((), device=layer.weight.device, requires_grad=True) for path, layer in layers.items()}
    hooks = [
        layer.register_forward_hook(
            lambda module, args, output, path=path: output + added[path].to(output.dtype) if args else output
        )
        for path, layer in layers.items()
    ]
    try:
        with torch.enable_grad():
            outputs = predict()
    finally:
        for hook in hooks:
            hook.remove()
    return added, outputs if isinstance(outputs, list) else [outputs]


def _without_gradient(layers: dict[str, nn.Module], predict: Callable[[], Tensor | list]) -> list[str]:
    """Paths of the layers of which the outputs are computed with, and then dropped.

    Such are queries of tokens that nobody reads. The gradient of the prediction is set to NaN, which spreads to all
    that it depends on, also through gates that are zero; theirs stays zero.
    """
    added, outputs = _with_added(layers, predict)
    spread = [torch.full_like(output, torch.nan) for output in outputs]
    gradients = torch.autograd.grad(outputs, list(added.values()), spread, allow_unused=True) if added else ()
    return [path for path, found in zip(added, gradients, strict=True) if found is None or found == 0]


def _leaves_of(outputs: list[Tensor]) -> set[int]:
    """The identities of the leaves of tensors' graphs."""
    leaves, nodes = set(), [output.grad_fn for output in outputs]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        following = {child for child, _ in node.next_functions if child is not None} - seen
        seen |= following
        nodes.extend(following)
    return leaves
