"""DINOv2's features, which agree with people better than Inception's do (Stein et al., NeurIPS 2023)."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torchvision.transforms.functional import normalize

from onelora_diffusion.evaluation.features.base import Features


class DinoV2Features(Features):
    """DINOv2's class token: uint8 (batch, 3, R, R) -> float64 (batch, width).

    Images are brought to 224 by 224 as in torch-fidelity, bilinearly and without antialiasing.

    Args:
        folder: `config.json` and `model.safetensors` in the layout of transformers, such as a copy of
            `facebook/dinov2-large`.
    """

    resize = "TF1 bilinear to 224x224, antialias=False"

    def __init__(self, folder: str | Path | None):
        super().__init__()
        if folder is None or not (Path(folder) / "model.safetensors").is_file():
            raise FileNotFoundError(
                f"no DINOv2 weights at '{folder}': give a folder with config.json and model.safetensors, a copy of "
                "facebook/dinov2-large on the hub, by --dinov2-weights"
            )
        from transformers import Dinov2Model

        self.network = Dinov2Model.from_pretrained(folder, use_safetensors=True, local_files_only=True)
        self.network.requires_grad_(False).eval()
        self.num_features = self.network.config.hidden_size
        self.name = f"dinov2-{self.num_features}"
        self.extractor = hashlib.sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        images = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(224, 224), align_corners=False)
        images = normalize(images / 255, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
        return self.network(images).last_hidden_state[:, 0].double()
