"""Features for Fashion-MNIST: those of a small classifier of its ten classes (benchmarks/fashion_classifier.py)."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn.functional import interpolate

from onelora_diffusion.evaluation.features.base import Features
from onelora_diffusion.files import first_line

SIDE = 32


class FashionNetwork(nn.Module):
    """Three strided convolutions and two linear layers; 64 features between the last two."""

    num_features = 64

    def __init__(self):
        super().__init__()
        widths = (1, 16, 32, 64)
        layers = []
        for before, after in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * (SIDE // 8) ** 2, self.num_features))
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(self.num_features, 10))

    def forward(self, grey: Tensor) -> Tensor:
        return self.head(self.trunk(grey))


class FashionFeatures(Features):
    """The classifier's 64 features: uint8 (batch, 3, R, R) -> float64 (batch, 64); an error for other weights."""

    name = "fashion-mnist"
    num_features = FashionNetwork.num_features
    resize = f"mean of the channels, bilinear to {SIDE}x{SIDE}"

    def __init__(self, weights: str | Path | None):
        super().__init__()
        if weights is None or not Path(weights).is_file():
            raise FileNotFoundError(f"no weights of the Fashion-MNIST classifier at '{weights}'")
        content = Path(weights).read_bytes()
        self.network = FashionNetwork()
        try:
            self.network.load_state_dict(load(content))
            with safe_open(weights, framework="pt") as file:
                self.accuracy = json.loads(file.metadata()["classifier"])["accuracy"]
        except (SafetensorError, RuntimeError, TypeError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"'{weights}' is no Fashion-MNIST classifier: {first_line(error)}") from error
        self.network.requires_grad_(False).eval()
        self.extractor = hashlib.sha256(content).hexdigest()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.network.trunk(grey_images(images)).double()

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """The class (0..9) of each uint8 image (batch, 3, R, R): (batch,) int64."""
        return self.network(grey_images(images.to(self.network.head[1].weight.device))).argmax(1)

    def describe(self) -> str:
        return f"convolutional classifier of the ten classes, {self.accuracy:.1%} right on the test split"


def grey_images(images: Tensor) -> Tensor:
    """uint8 (batch, 3, R, R) -> float32 (batch, 1, 32, 32) in [0, 1]."""
    grey = images.float().mean(1, keepdim=True) / 255
    if grey.shape[-1] == SIDE:
        return grey
    return interpolate(grey, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
