"""The table of features by which images are compared: their pixels, or what a network makes of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from onelora_diffusion.evaluation.features.base import INCEPTION_SHA256, UNTOLD, Features
from onelora_diffusion.evaluation.features.clip import CLIP, CLIP_LARGE, load_clip, load_clip_large
from onelora_diffusion.evaluation.features.dino import DINO, load_dino
from onelora_diffusion.evaluation.features.dinov2 import DINOV2, load_dinov2
from onelora_diffusion.evaluation.features.fashion import load_fashion
from onelora_diffusion.evaluation.features.inception import load_inception
from onelora_diffusion.evaluation.features.pixels import load_pixels


@dataclass(frozen=True)
class FeatureKind:
    """One kind of features: a row of `FEATURES`.

    Attributes:
        load: function from the resolution of the images to come and the path of the weights (or None) to the module.
        weights: the field of eval_fid.py's settings that holds this path; None where there are no weights to give.
        published: the extractors of the published weights.
        names: what numbers of these are called, by the name of the number: FID for FD. All others are called by the
            features: `FD(name)`.
        width: how many features the published network has. A file of another tool, which does not say what its
            numbers are of, is taken for the kind with as many.
    """

    load: Callable[[int, str | Path | None], Features]
    weights: str | None = None
    published: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    width: int | None = None


OF_INCEPTION = ("KID", "precision", "recall", "density", "coverage", "Inception Score")
FEATURES = {
    "pixels": FeatureKind(load_pixels),
    "inception": FeatureKind(
        load_inception,
        "inception_weights",
        (INCEPTION_SHA256, UNTOLD),
        {"FD": "FID", "sFD": "sFID", **dict(zip(OF_INCEPTION, OF_INCEPTION, strict=True))},
        width=2048,
    ),
    "dinov2": FeatureKind(load_dinov2, "dinov2_weights", (DINOV2.extractor,), {"FD": "FD-DINOv2"}, width=1024),
    "dino": FeatureKind(load_dino, "dino_weights", (DINO.extractor,), {"similarity": "DINO-I"}),
    "clip": FeatureKind(
        load_clip, "clip_weights", (CLIP.extractor,), {"similarity": "CLIP-I", "prompt similarity": "CLIP-T"}
    ),
    "clip-large": FeatureKind(load_clip_large, "clip_large_weights", (CLIP_LARGE.extractor,), {"MMD": "CMMD"}),
    "fashion-mnist": FeatureKind(load_fashion, "fashion_weights"),
}


def load_features(name: str, resolution: int, weights: str | Path | None = None) -> Features:
    """A frozen module that turns uint8 images (batch, 3, R, R) into float64 features (batch, num_features).

    Args:
        name: one of `FEATURES`.
        resolution: R, of the images to come.
        weights: for `inception` the file of torch-fidelity's release (None: its cache, else its download); for
            `fashion-mnist` the file of its classifier; for others a folder in the layout of transformers (None: the
            published ones, from the hub's cache or the hub).

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
    features = FEATURES[name].load(resolution, weights)
    features.kind = name
    return features


def name_of(number: str, features: str, extractor: str) -> str:
    """The name of a number of these features: the published one (FID) for the published weights, else `FD(features)`.

    Statistics of 2,048 features in an .npz of another tool are taken for Inception's; a report tells.
    """
    kind = FEATURES.get(features)
    is_published = kind is not None and extractor in kind.published
    return kind.names.get(number, f"{number}({features})") if is_published else f"{number}({features})"


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
