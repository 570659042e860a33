"""DINOv2's features, which agree with people better than Inception's do (Stein et al., NeurIPS 2023)."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.transforms.v2.functional import InterpolationMode, normalize, resize

from onelora_diffusion.evaluation.features.base import DINOV2_HUB_ID, DINOV2_PUBLISHED, DINOV2_REVISION, Features

SIDE = 224


class DinoV2Features(Features):
    """DINOv2's class token: uint8 (batch, 3, R, R) -> float64 (batch, width).

    Images are resized as PIL does it (bicubic, antialiased, rounded to bytes), to within a grey level, and scaled by
    ImageNet's mean and deviation: the published protocol of FD-DINOv2.

    Args:
        network: transformers' `Dinov2Model`.
    """

    resize = f"bicubic to {SIDE}x{SIDE}, antialias=True, in bytes"

    def __init__(self, network: nn.Module, name: str, extractor: str):
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        self.num_features = network.config.hidden_size
        self.name, self.extractor = name, extractor
        embeddings = network.embeddings
        positions = positions_at(embeddings.position_embeddings, SIDE // network.config.patch_size)
        embeddings.position_embeddings = nn.Parameter(positions, requires_grad=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        images = resize(images, [SIDE, SIDE], InterpolationMode.BICUBIC, antialias=True)
        images = normalize(images.float() / 255, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
        return self.network(images).last_hidden_state[:, 0].double()


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


def dinov2_published() -> DinoV2Features:
    """ViT-L/14 with the released weights, from the hub or its cache: what FD-DINOv2 is defined on.

    Raises:
        FileNotFoundError: they are not in the cache and cannot be fetched.
    """
    pinned = {"revision": DINOV2_REVISION, "use_safetensors": True}
    try:
        network = _model_class().from_pretrained(DINOV2_HUB_ID, local_files_only=True, **pinned)
    except OSError:
        try:
            network = _model_class().from_pretrained(DINOV2_HUB_ID, **pinned)
        except OSError as error:
            raise FileNotFoundError(
                f"no DINOv2 weights: {DINOV2_HUB_ID} is not in the hub's cache and cannot be fetched "
                f"({type(error).__name__}); give a copy by --dinov2-weights, or choose other --features"
            ) from error
    return DinoV2Features(network, "dinov2", DINOV2_PUBLISHED)


def dinov2_in(folder: str | Path) -> DinoV2Features:
    """The DINOv2 of a folder with config.json and model.safetensors, in the layout of transformers.

    Which weights these are is not known, so its distance is not called FD-DINOv2.
    """
    weights = Path(folder) / "model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(
            f"no DINOv2 weights at '{folder}': --dinov2-weights takes a folder of config.json and model.safetensors"
        )
    network = _model_class().from_pretrained(folder, use_safetensors=True, local_files_only=True)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    return DinoV2Features(network, f"dinov2-{network.config.hidden_size}", digest)


def load_dinov2(resolution: int, weights: str | Path | None = None) -> DinoV2Features:
    return dinov2_published() if weights is None else dinov2_in(weights)


def _model_class() -> type:
    try:
        from transformers import Dinov2Model
    except ImportError:
        raise ValueError("--features dinov2 needs a package that is missing: pip install transformers") from None
    return Dinov2Model
