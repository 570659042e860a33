"""Pixels as features: for tiny images, where no network says more."""

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from onelora_diffusion.evaluation.features.base import Features

LARGEST = 16  # pixels a side: 768 features, whose distance takes a second on two cores


class PixelFeatures(Features):
    """All pixels of an image as one vector: uint8 (batch, 3, R, R) -> float64 (batch, 3·r·r) in [0, 1].

    r is R up to 16; larger images are averaged down to 16 by 16 pixels, which `resize` says.
    """

    name = "pixels"

    def __init__(self, resolution: int):
        super().__init__()
        self.side = min(resolution, LARGEST)
        self.num_features = 3 * self.side**2
        averaged = resolution > LARGEST
        self.resize = f"{'averaged to' if averaged else 'none,'} {self.side}x{self.side} pixels"
        self.extractor = f"pixels-{self.side}"

    def forward(self, images: Tensor) -> Tensor:
        return adaptive_avg_pool2d(images.double(), self.side).flatten(1) / 255
