"""Mean and covariance of the features of a set of images: gathered in fixed memory, summed over processes, filed."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, distributed, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from onelora_diffusion import __version__
from onelora_diffusion.evaluation.features import distance_name
from onelora_diffusion.evaluation.features.base import Features
from onelora_diffusion.evaluation.images import Source
from onelora_diffusion.files import write_bytes


@dataclass(frozen=True)
class Origin:
    """What a set of images is and how its features were made; it travels with the numbers.

    Attributes:
        features, extractor, resize: of the feature module; two sets compare only if these are equal.
        dataset: name of the data set, or of the folder or file of images.
        split, crop: of the data set, and how its images came to their resolution.
        resolution: R of the images (3, R, R) before `resize`.
    """

    features: str
    extractor: str
    resize: str
    resolution: int
    dataset: str
    split: str = ""
    crop: str = "none"
    version: str = __version__

    @classmethod
    def of(cls, features: Features, source: Source) -> "Origin":
        return cls(
            features.name,
            features.extractor,
            features.resize,
            source.resolution,
            source.name,
            source.split,
            source.crop,
        )

    @property
    def distance_name(self) -> str:
        return distance_name(self.features, self.extractor)

    def check_comparable(self, other: "Origin") -> None:
        """ValueError unless both sets have the same features."""
        if (self.extractor, self.resize) != (other.extractor, other.resize):
            ours, theirs = (
                f"'{it.dataset}' has features {it.features} (extractor {it.extractor[:12]}, resize: {it.resize})"
                for it in (self, other)
            )
            raise ValueError(f"{ours}, but {theirs}: make the statistics again with the same --features")


@dataclass(frozen=True)
class FeatureStatistics:
    """Moments of the features of `count` images: mean (d,), unbiased covariance (d, d), float64, on the CPU."""

    mean: Tensor
    covariance: Tensor
    count: int

    @property
    def num_features(self) -> int:
        return len(self.mean)


class GivenFeatures(nn.Module):
    """The feature module of a torchmetrics metric that is updated with features instead of images."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


class RunningStatistics:
    """The sums behind `FeatureStatistics`, in float64 by torchmetrics' FID metric.

    Memory is two d by d matrices, whatever the number of images, unless `keep` holds every feature (float32) as
    well, for the metrics that compare images one by one.

    Args:
        features: a module of `evaluation.features`; its device is where the sums are.
    """

    def __init__(self, features: Features, device: torch.device | str = "cpu", keep: bool = False):
        self.features = features.to(device)
        self.metric = FrechetInceptionDistance(GivenFeatures(features.num_features)).to(device)
        self.kept: list[tuple[int, Tensor]] | None = [] if keep else None

    @torch.no_grad()
    def update(self, indices: list[int], images: Tensor) -> None:
        """Add a batch: uint8 images (batch, 3, R, R), and which images of the whole set they are."""
        device = self.metric.device
        with torch.autocast(device.type, enabled=False):  # images may be generated under autocast, not measured
            features = self.features(images.to(device))
        self.metric.update(features, real=False)
        if self.kept is not None:
            self.kept += zip(indices, features.float().cpu(), strict=True)

    def reduce(self) -> FeatureStatistics:
        """The statistics over all processes, each of which has seen other images. ValueError if they are under 2."""
        sums = [
            self.metric.fake_features_sum,
            self.metric.fake_features_cov_sum,
            self.metric.fake_features_num_samples,
        ]
        sums = [value.clone() for value in sums]
        if distributed.is_initialized():
            for value in sums:
                distributed.all_reduce(value)
        total, products, count = (value.cpu() for value in sums)
        if count < 2:
            raise ValueError(f"{int(count)} image: a distance between sets needs two or more")
        mean = total / count
        covariance = (products - count * torch.outer(mean, mean)) / (count - 1)
        return FeatureStatistics(mean, covariance, int(count))

    def gather_kept(self) -> Tensor:
        """All kept features (images, d), over all processes, in the order of the images."""
        rows = self.kept
        if distributed.is_initialized():
            everyone = [None] * distributed.get_world_size()
            distributed.all_gather_object(everyone, rows)
            rows = [row for each in everyone for row in each]
        return torch.stack([features for _, features in sorted(rows, key=lambda row: row[0])])


def save_statistics(path: str | Path, statistics: FeatureStatistics, origin: Origin) -> Path:
    """Write statistics and their origin as one .safetensors, beside, flushed and renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        "mean": statistics.mean.contiguous(),
        "covariance": statistics.covariance.contiguous(),
        "count": torch.tensor(statistics.count),
    }
    write_bytes(path, save(tensors, metadata={"statistics": json.dumps(dataclasses.asdict(origin))}))
    return path


def load_statistics(path: str | Path) -> tuple[FeatureStatistics, Origin]:
    """Read statistics and their origin.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or not a file of statistics.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no statistics at '{path}': make them by `eval_fid.py ref --output {path}`")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("statistics")
            if header is None:
                raise ValueError(f"'{path}' holds no feature statistics: make them by `eval_fid.py ref`")
            origin = Origin(**json.loads(header))
            mean, covariance, count = (file.get_tensor(name) for name in ("mean", "covariance", "count"))
    except (SafetensorError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"'{path}' is damaged or no file of statistics: {error}") from error
    return FeatureStatistics(mean, covariance, int(count)), origin


def shortage(statistics: FeatureStatistics, what: str) -> str | None:
    """A sentence where there are too few images for their covariance to have full rank, else None."""
    if statistics.count > statistics.num_features:
        return None
    return (
        f"{statistics.count} {what} images for {statistics.num_features} features: too few for a covariance of full "
        "rank, so the distance is biased upwards; compare it only at equal counts."
    )
