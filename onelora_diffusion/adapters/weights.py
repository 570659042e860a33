"""An adapter's weight at a layer, and the precision that its trained values keep."""

import fnmatch

import torch

UNET_BLOCKS = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}

Weight = float | dict[str, float]  # of an adapter: one number, or numbers by block


def weight_at(weight: Weight, path: str) -> float:
    """An adapter's weight at one layer: that of the longest key that names the layer or a block around it, else 1.

    `transformer_blocks.3` is the block and all in it; `*` and `?` match as in a shell (`*.attn1`). Of equally long
    keys that with fewer of these counts: `transformer_blocks.3` rather than `transformer_blocks.*`.
    """
    if not isinstance(weight, dict):
        return weight
    keys = [key for key in weight if fnmatch.fnmatchcase(path, key) or fnmatch.fnmatchcase(path, f"{key}.*")]
    return weight[max(keys, key=lambda key: (len(key), -sum(map(key.count, "*?["))))] if keys else 1.0


def by_path(weights: dict | list, prefix: str = "") -> dict[str, float]:
    """diffusers' nested weights of a UNet by path: `{"up": {"block_0": 0.2}}` -> `{"up_blocks.0": 0.2}`."""
    flat = {}
    items = enumerate(weights) if isinstance(weights, list) else weights.items()
    for key, value in items:
        key = f"attentions.{key}" if isinstance(weights, list) else UNET_BLOCKS.get(key, key).removeprefix("block_")
        path = f"{prefix}.{key}" if prefix else key
        flat |= by_path(value, path) if isinstance(value, dict | list) else {path: value}
    return flat


def scaled(weight: Weight, scale: float) -> Weight:
    if isinstance(weight, dict):
        # "*" is what no other key names, which weighs 1.
        return {"*": scale} | {block: value * scale for block, value in weight.items()}
    return weight * scale


def as_tensor(weight: float) -> torch.Tensor:
    """A tensor of its own: compiled code would take it for unchanging that two weights are one object."""
    with torch.inference_mode(False):  # autograd may have to keep it
        return torch.tensor(weight, dtype=torch.float32, device="cpu")


def keeping_precision(fn):
    """`fn` of `Module._apply`, but that it moves tensors only: `model.half()` would ruin trained values."""

    def apply(tensor):
        moved = fn(tensor)
        return tensor.to(moved.device) if moved.dtype.itemsize < tensor.dtype.itemsize else moved

    return apply
