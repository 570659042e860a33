"""An adapter's weight at a layer, and the precision that its trained values keep."""

import fnmatch

import torch

UNET_BLOCKS = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}

Weight = float | dict[str, float]  # an adapter's weight: one number, or one for each block


def weight_at(weight: Weight, path: str) -> float:
    """An adapter's weight at one layer: that of the longest key that names the layer or a block around it, else 1.

    `transformer_blocks.3` is the block with all its layers; `*` and `?` match as in a shell. Of equally long keys the
    one with fewer wildcards counts: `transformer_blocks.3` before `transformer_blocks.*`.
    """
    if not isinstance(weight, dict):
        return weight
    keys = [key for key in weight if fnmatch.fnmatchcase(path, key) or fnmatch.fnmatchcase(path, f"{key}.*")]
    return weight[max(keys, key=lambda key: (len(key), -sum(map(key.count, "*?["))))] if keys else 1.0


def by_path(weights: dict | list, prefix: str = "") -> dict[str, float]:
    """diffusers' nested weights of a UNet, by path: `{"up_blocks.0": 0.2}` for `{"up": {"block_0": 0.2}}`."""
    flat = {}
    items = enumerate(weights) if isinstance(weights, list) else weights.items()
    for key, value in items:
        key = f"attentions.{key}" if isinstance(weights, list) else UNET_BLOCKS.get(key, key).removeprefix("block_")
        path = f"{prefix}.{key}" if prefix else key
        flat |= by_path(value, path) if isinstance(value, dict | list) else {path: value}
    return flat


def scaled(weight: Weight, scale: float) -> Weight:
    if isinstance(weight, dict):
        # The key "*" stands for the blocks that no other key names; their weight is 1.
        return {"*": scale} | {block: value * scale for block, value in weight.items()}
    return weight * scale


def as_tensor(weight: float) -> torch.Tensor:
    """The weight as a new tensor; shared tensors would make compiled code assume that two weights stay equal."""
    with torch.inference_mode(False):  # a tensor of inference mode cannot be saved for backward
        return torch.tensor(weight, dtype=torch.float32, device="cpu")


def keeping_precision(fn):
    """Wrap `fn` of `Module._apply` so that it moves tensors but keeps their dtype: `model.half()` would round them."""

    def apply(tensor):
        moved = fn(tensor)
        return tensor.to(moved.device) if moved.dtype.itemsize < tensor.dtype.itemsize else moved

    return apply
