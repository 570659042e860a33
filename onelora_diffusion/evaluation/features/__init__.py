"""What of an image is compared: its pixels, or features of Inception-2015, DINOv2 or a Fashion-MNIST classifier."""

from pathlib import Path

from torch import nn

from onelora_diffusion.evaluation.features.base import DINOV2_PUBLISHED, INCEPTION_SHA256, UNTOLD

FEATURES = ("pixels", "inception", "dinov2", "fashion-mnist")


def load_features(name: str, resolution: int, weights: str | Path | None = None) -> nn.Module:
    """A frozen module that turns uint8 images (batch, 3, R, R) into float64 features (batch, num_features).

    It has the attributes `name`, `num_features`, `resize` (what is done to an image before it is looked at) and
    `extractor` (what identifies the weights: their hash).

    Args:
        name: one of `FEATURES`.
        resolution: R, of the images to come.
        weights: for `inception` the file of torch-fidelity's release (None: its cache, else its download); for
            `dinov2` a folder in the layout of transformers (None: the published ones, from the hub or its cache);
            for `fashion-mnist` the file of its classifier.

    Raises:
        ValueError: an unknown name; weights that are not what they should be, or cannot be fetched.
        FileNotFoundError: there are no such weights.
    """
    if name == "pixels":
        from onelora_diffusion.evaluation.features.pixels import PixelFeatures

        return PixelFeatures(resolution)
    if name == "inception":
        from onelora_diffusion.evaluation.features.inception import inception_2015

        return inception_2015(weights)
    if name == "dinov2":
        from onelora_diffusion.evaluation.features.dinov2 import dinov2_in, dinov2_published

        return dinov2_published() if weights is None else dinov2_in(weights)
    if name == "fashion-mnist":
        from onelora_diffusion.evaluation.features.fashion import FashionFeatures

        return FashionFeatures(weights)
    raise ValueError(f"unknown features '{name}': choose one of {', '.join(FEATURES)}")


def distance_name(features: str, extractor: str) -> str:
    """`FID` and `FD-DINOv2` for the published features and weights; for any other, `FD` with their name.

    Statistics in an .npz of another tool are taken for Inception's, as their layout says; a report tells.
    """
    published = {
        ("inception", INCEPTION_SHA256): "FID",
        ("inception", UNTOLD): "FID",
        ("dinov2", DINOV2_PUBLISHED): "FD-DINOv2",
    }
    return published.get((features, extractor), f"FD({features})")
