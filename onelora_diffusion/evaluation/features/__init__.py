"""The table of features by which images are compared: their pixels, or what a network makes of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from onelora_diffusion.evaluation.features.base import INCEPTION_SHA256, UNTOLD, Features
from onelora_diffusion.evaluation.features.clip import CLIP, CLIP_LARGE, load_clip
from onelora_diffusion.evaluation.features.dino import DINO, load_dino
from onelora_diffusion.evaluation.features.dinov2 import DINOV2, load_dinov2
from onelora_diffusion.evaluation.features.fashion import FashionFeatures
from onelora_diffusion.evaluation.features.inception import inception_2015
from onelora_diffusion.evaluation.features.pixels import PixelFeatures


@dataclass(frozen=True)
class FeatureKind:
    """One kind of features: a row of `FEATURES`."""

    load: Callable[[int, str | Path | None], Features]  # from the resolution of images, and the path of weights
    weights: str | None = None  # the field of eval_fid.py's settings with that path; None where none are to be given
    published: tuple[str, ...] = ()  # the extractors of the published weights
    # What numbers of these are called, by the name of the number: FID for FD. All others are called `FD(features)`.
    names: Mapping[str, str] = field(default_factory=dict)
    # Of the published network: a file of another tool, which does not say, is taken for the kind of its width.
    width: int | None = None


OF_INCEPTION = ("KID", "precision", "recall", "density", "coverage", "Inception Score")
FEATURES = {
    "pixels": FeatureKind(lambda resolution, weights: PixelFeatures(resolution)),
    "inception": FeatureKind(
        lambda resolution, weights: inception_2015(weights),
        "inception_weights",
        (INCEPTION_SHA256, UNTOLD),
        {"FD": "FID", "sFD": "sFID", **dict(zip(OF_INCEPTION, OF_INCEPTION, strict=True))},
        width=2048,
    ),
    "dinov2": FeatureKind(load_dinov2, "dinov2_weights", (DINOV2.extractor,), {"FD": "FD-DINOv2"}, width=1024),
    "dino": FeatureKind(load_dino, "dino_weights", (DINO.extractor,), {"similarity": "DINO-I"}),
    "clip": FeatureKind(
        lambda resolution, weights: load_clip(CLIP, "clip", weights),
        "clip_weights",
        (CLIP.extractor,),
        {"similarity": "CLIP-I", "prompt similarity": "CLIP-T"},
    ),
    "clip-large": FeatureKind(
        lambda resolution, weights: load_clip(CLIP_LARGE, "clip-large", weights),
        "clip_large_weights",
        (CLIP_LARGE.extractor,),
        {"MMD": "CMMD"},
    ),
    "fashion-mnist": FeatureKind(lambda resolution, weights: FashionFeatures(weights), "fashion_weights"),
}


def load_features(name: str, resolution: int, weights: str | Path | None = None) -> Features:
    """A frozen module that turns uint8 images (batch, 3, R, R) into float64 features (batch, num_features).

    `weights` is for `inception` the file of torch-fidelity's release (None: its cache, else its download); for
    `fashion-mnist` the file of its classifier; for others a folder in the layout of transformers (None: the published
    ones, from the hub's cache or the hub). ValueError for an unknown name or weights that are not what they should be
    or cannot be fetched, FileNotFoundError if there are none.
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


UNKNOWN_KIND = "unknown-"  # before the number of features in a file that does not say what they are


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
