"""What of an image is compared: its pixels, or features of Inception-2015, DINOv2 or a Fashion-MNIST classifier."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from onelora_diffusion.evaluation.features.base import DINOV2_PUBLISHED, INCEPTION_SHA256, UNTOLD, Features
from onelora_diffusion.evaluation.features.dinov2 import load_dinov2
from onelora_diffusion.evaluation.features.fashion import load_fashion
from onelora_diffusion.evaluation.features.inception import load_inception
from onelora_diffusion.evaluation.features.pixels import load_pixels


@dataclass(frozen=True)
class FeatureKind:
    """One kind of features: a row of `FEATURES`.

    Attributes:
        load: from the resolution of the images to come and the path of the weights (or None) to the module.
        weights: the field of eval_fid.py's settings that holds this path; None where there are no weights to give.
        distance_names: what the distance is called, by the extractor of published weights; `FD(name)` by any other.
        width: how many features the published network has. A file of another tool, which does not say what its
            numbers are of, is taken for the kind with as many.
    """

    load: Callable[[int, str | Path | None], Features]
    weights: str | None = None
    distance_names: Mapping[str, str] = field(default_factory=dict)
    width: int | None = None


FEATURES = {
    "pixels": FeatureKind(load_pixels),
    "inception": FeatureKind(
        load_inception, "inception_weights", {INCEPTION_SHA256: "FID", UNTOLD: "FID"}, width=2048
    ),
    "dinov2": FeatureKind(load_dinov2, "dinov2_weights", {DINOV2_PUBLISHED: "FD-DINOv2"}, width=1024),
    "fashion-mnist": FeatureKind(load_fashion, "fashion_weights"),
}


def load_features(name: str, resolution: int, weights: str | Path | None = None) -> Features:
    """A frozen module that turns uint8 images (batch, 3, R, R) into float64 features (batch, num_features).

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
    if name.startswith(UNKNOWN_KIND):
        raise ValueError(
            f"statistics of {name.removeprefix(UNKNOWN_KIND)} features, of which their file does not tell what they "
            f"are: images cannot be compared with them ({what_widths_are()})"
        )
    if name not in FEATURES:
        raise ValueError(f"unknown features '{name}': choose from {', '.join(FEATURES)}")
    return FEATURES[name].load(resolution, weights)


def distance_name(features: str, extractor: str) -> str:
    """`FID` and `FD-DINOv2` for the published features and weights; for any other, `FD` with their name.

    Statistics of 2,048 features in an .npz of another tool are taken for Inception's; a report tells.
    """
    names = FEATURES[features].distance_names if features in FEATURES else {}
    return names.get(extractor, f"FD({features})")


# ---------------------------------------------------------------------------------------------------
# Files that do not say what their numbers are of

UNKNOWN_KIND = "unknown-"


def kind_of_width(width: int) -> str:
    """The kind that so many features are taken for, or `unknown-<width>`."""
    kinds = {kind.width: name for name, kind in reversed(FEATURES.items())}  # the first of a width
    return kinds.get(width, f"{UNKNOWN_KIND}{width}")


def kind_of(features: str) -> str:
    """The kind that features belong to by their name: `dinov2` for `dinov2-1024`, which has weights from a folder."""
    name, _, width = features.rpartition("-")
    return name if name in FEATURES and width == str(FEATURES[name].width) else features


def what_widths_are() -> str:
    kinds = [f"{kind.width:,} for {name}'s" for name, kind in FEATURES.items() if kind.width]
    return f"an .npz tells only how many there are, and is taken at {' and at '.join(kinds)}"
