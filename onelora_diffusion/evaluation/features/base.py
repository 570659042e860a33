"""What every feature module is."""

from torch import Tensor, nn


class Features(nn.Module):
    """A frozen module: uint8 images (batch, 3, R, R) -> float64 features (batch, num_features).

    Attributes:
        name: what the distance is named after.
        extractor: what identifies the weights, such as their hash.
        resize: what is done to an image before it is looked at.
        num_spatial: how many spatial features (sFID's) it gives as well; most give none.
    """

    name: str
    extractor: str
    resize: str
    num_features: int
    num_spatial = 0

    def train(self, mode: bool = True) -> "Features":
        return super().train(False)

    def with_spatial(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and spatial features (batch, num_spatial) of one pass, of modules that have both."""
        raise NotImplementedError(f"{self.name} has no spatial features")
