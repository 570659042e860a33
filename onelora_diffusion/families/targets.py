"""The layers that a recorded family adapts by default."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def targets_in(denoiser: nn.Module, blocks: tuple[str, ...], predict: Callable[[], Tensor | list]) -> tuple[str, ...]:
    """Patterns of the linear layers in lists of blocks that a prediction depends on.

    The last block of some transformers computes tokens of the prompt that nobody reads.
    """
    inside = {
        path: module
        for path, module in denoiser.named_modules()
        if isinstance(module, nn.Linear) and any(path.startswith(f"{block}.") for block in blocks)
    }
    added = {path: torch.zeros((), device=module.weight.device, requires_grad=True) for path, module in inside.items()}
    hooks = [
        module.register_forward_hook(lambda module, args, output, path=path: output + added[path].to(output.dtype))
        for path, module in inside.items()
    ]
    try:
        # The graph alone is asked: nothing is kept for a backward pass.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda kept: None):
            outputs = predict()
    finally:
        for hook in hooks:
            hook.remove()
    reached = _leaves_of(outputs if isinstance(outputs, list) else [outputs])
    used = [path for path, value in added.items() if id(value) in reached]

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
