"""Mean and covariance of the features of a set of images, computed in constant memory and summed over processes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from onelora_diffusion import __version__
from onelora_diffusion.evaluation.features import UNTOLD, kind_of, name_of, what_widths_are
from onelora_diffusion.evaluation.features.base import Features
from onelora_diffusion.evaluation.images import Source


@dataclass(frozen=True)
class Origin:
    """Describes a set of images and its features; only sets of equal `extractor` and `resize` can be compared."""

    features: str
    extractor: str
    resize: str
    resolution: int | None  # R of the images (3, R, R) before `resize`; None if a file does not contain it
    dataset: str  # or the folder or file of images
    split: str = ""
    crop: str = "none"
    version: str = __version__

    @classmethod
    def of(cls, features: Features, source: Source) -> "Origin":
        made_by = features.name, features.extractor, features.resize
        return cls(*made_by, source.resolution, source.name, source.split, source.crop)

    @property
    def distance_name(self) -> str:
        return name_of("FD", self.features, self.extractor)

    @property
    def is_told(self) -> bool:
        return self.extractor != UNTOLD

    def check_comparable(self, other: "Origin") -> None:
        """ValueError unless both sets have the same features; only their names count for files without a hash."""
        if not (self.is_told and other.is_told):
            if kind_of(self.features) != kind_of(other.features):
                untold = other if self.is_told else self
                raise ValueError(
                    f"'{self.dataset}' has features {self.features}, but '{other.dataset}' {other.features} "
                    f"({what_widths_are()}): choose --features {untold.features}"
                )
            return
        if (self.extractor, self.resize) != (other.extractor, other.resize):
            ours, theirs = (
                f"'{it.dataset}' has features {it.features} (extractor {it.extractor[:12]}, resize: {it.resize})"
                for it in (self, other)
            )
            raise ValueError(f"{ours}, but {theirs}: make the statistics again with the same --features")


@dataclass(frozen=True)
class FeatureStatistics:
    """Moments of the features of a set of images, in float64 on the CPU."""

    mean: Tensor  # (d,)
    covariance: Tensor  # (d, d), unbiased
    count: int | None  # of the images; None if a file does not contain it

    @property
    def num_features(self) -> int:
        return len(self.mean)


@dataclass(frozen=True)
class Measured:
    """The statistics of a set of images by one kind of features."""

    statistics: FeatureStatistics
    origin: Origin
    kept: Tensor | None = None  # the features of all images, (images, d) float32, if a metric needs them
    spatial: FeatureStatistics | None = None  # of the spatial features, if sFID needs them
    notes: tuple[str, ...] = ()  # sentences about the images for the report
    groups: Sequence[str] | None = None  # of each image; see `images.Source`
    prompts: Sequence[str] | None = None


class RunningStatistics:
    """The sums behind `FeatureStatistics`, in float64 by torchmetrics' FID metric, on the device of the features.

    It needs memory for two d by d matrices, whatever the number of images, and for two further ones with `spatial`.
    With `keep` all features (float32) are kept as well, for metrics that compare single images.
    """

    def __init__(
        self, features: Features, device: torch.device | str = "cpu", keep: bool = False, spatial: bool = False
    ):
        self.features = features.to(device)
        self.sums = _sums(features.num_features, device)
        self.spatial_sums = _sums(features.num_spatial, device) if spatial else None
        self.kept: list[tuple[int, Tensor]] | None = [] if keep else None

    @torch.no_grad()
    def update(self, indices: list[int], images: Tensor) -> None:
        """Add a batch of uint8 images (batch, 3, R, R) and their indices in the whole set."""
        device = self.sums.device
        with torch.autocast(device.type, enabled=False):  # images are measured without autocast
            if self.spatial_sums is None:
                features = self.features(images.to(device))
            else:
                features, spatial = self.features.with_spatial(images.to(device))
                self.spatial_sums.update(spatial, real=False)
        self.sums.update(features, real=False)
        if self.kept is not None:
            self.kept += zip(indices, features.float().cpu(), strict=True)

    def reduce(self, spatial: bool = False) -> FeatureStatistics:
        """The statistics of the images of all processes; the covariance of one image is not a number."""
        sums = self.spatial_sums if spatial else self.sums
        parts = sums.fake_features_sum, sums.fake_features_cov_sum, sums.fake_features_num_samples
        parts = [value.clone() for value in parts]
        if distributed.is_initialized():
            for value in parts:
                distributed.all_reduce(value)
        total, products, count = (value.cpu() for value in parts)
        mean = total / count
        covariance = (products - count * torch.outer(mean, mean)) / (count - 1)
        return FeatureStatistics(mean, covariance, int(count))

    def gather_kept(self) -> Tensor:
        """The kept features (images, d) of all processes, in the order of the images."""
        rows = self.kept
        if distributed.is_initialized():
            everyone = [None] * distributed.get_world_size()
            distributed.all_gather_object(everyone, rows)
            rows = [row for each in everyone for row in each]
        return torch.stack([features for _, features in sorted(rows, key=lambda row: row[0])])


def _sums(num_features: int, device: torch.device | str) -> FrechetInceptionDistance:
    given = nn.Identity()  # it is updated with features instead of images
    given.num_features = num_features
    return FrechetInceptionDistance(given).to(device)


def shortage(statistics: FeatureStatistics, what: str) -> str | None:
    """A sentence if there are too few images for a covariance of full rank, else None."""
    if statistics.count is None or statistics.count > statistics.num_features:
        return None
    return (
        f"{statistics.count} {what} images for {statistics.num_features} features: too few for a covariance of full "
        "rank, so the distance is biased upwards; compare it only at equal counts."
    )
