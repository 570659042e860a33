"""DINO's features (Caron et al., ICCV 2021), by which DreamBooth compares subjects (Ruiz et al., CVPR 2023)."""

from pathlib import Path

from onelora_diffusion.evaluation.features.networks import NetworkFeatures, Published

DINO = Published("facebook/dino-vits16", "abe3b354cb6a9b6f146096b14a4a9d7eecbcb4bd", "--dino-weights")


def load_dino(resolution: int, weights: str | Path | None = None) -> NetworkFeatures:
    """The class token of ViT-S/16."""
    network, extractor = DINO.load("ViTModel", weights, add_pooling_layer=False)
    width = network.config.hidden_size
    name = "dino" if weights is None else f"dino-{width}"
    return NetworkFeatures(network, name, extractor, width, network.config.image_size)
