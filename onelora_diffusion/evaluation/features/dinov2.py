"""DINOv2's features, which agree with people better than Inception's do (Stein et al., NeurIPS 2023)."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from onelora_diffusion.evaluation.features.networks import NetworkFeatures, Published

# ViT-L/14 as Meta released it: what FD-DINOv2 is defined on.
DINOV2 = Published(
    "facebook/dinov2-large", "47b73eefe95e8d44ec3623f8890bd894b6ea2d6c", "--dinov2-weights", is_safetensors=True
)
SIDE = 224


def load_dinov2(resolution: int, weights: str | Path | None = None) -> NetworkFeatures:
    """DINOv2's class token, by the published protocol of FD-DINOv2."""
    network, extractor = DINOV2.load("Dinov2Model", weights)
    width, embeddings = network.config.hidden_size, network.embeddings
    positions = positions_at(embeddings.position_embeddings, SIDE // network.config.patch_size)
    embeddings.position_embeddings = nn.Parameter(positions, requires_grad=False)
    return NetworkFeatures(network, "dinov2" if weights is None else f"dinov2-{width}", extractor, width, SIDE)


def positions_at(table: Tensor, side: int) -> Tensor:
    """Position embeddings (1, 1 + n², d), class token first, for `side` by `side` patches, as Meta's code has them.

    It scales by (side + 0.1) / n; transformers' own code by side / n, which gives slightly other features.
    """
    n = round((table.shape[1] - 1) ** 0.5)
    if n == side:
        return table.detach()
    grid = table[:, 1:].float().unflatten(1, (n, n)).permute(0, 3, 1, 2)
    grid = interpolate(grid, scale_factor=(side + 0.1) / n, mode="bicubic")
    return torch.cat([table[:, :1], grid.flatten(2).mT], dim=1).detach()
