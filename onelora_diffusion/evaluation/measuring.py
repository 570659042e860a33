"""From sets of images to numbers: which features, what they are compared with, and every metric of eval_fid.py."""

import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from onelora_diffusion.data import load_dataset
from onelora_diffusion.evaluation.companions import extrapolate, inception_score, kernel_distance, precision_recall
from onelora_diffusion.evaluation.features import default_features, load_features
from onelora_diffusion.evaluation.frechet import frechet_distance
from onelora_diffusion.evaluation.images import DatasetImages, open_images, share
from onelora_diffusion.evaluation.settings import FeatureSettings
from onelora_diffusion.evaluation.statistics import FeatureStatistics, Origin, RunningStatistics, load_statistics


@dataclass(frozen=True)
class Measured:
    """A set of images, as the metrics see it; `kept` are its features one by one, if a metric needs them."""

    statistics: FeatureStatistics
    origin: Origin
    kept: Tensor | None = None


def is_statistics(path: Path | None) -> bool:
    return path is not None and path.suffix == ".safetensors"


def features_of(settings: FeatureSettings, dataset: str, resolution: int, accelerator: Accelerator) -> nn.Module:
    """The feature module; the main process goes first, since it may download."""
    name = settings.features or default_features(dataset)
    weights = {
        "inception": settings.inception_weights,
        "dinov2": settings.dinov2_weights,
        "fashion-mnist": settings.fashion_weights,
    }
    with accelerator.main_process_first():
        return load_features(name, resolution, weights.get(name))


def real_images(settings, images: Path | None, dataset: str, resolution: int, classes: tuple[int, ...] | None = None):
    """Images on disk where a path is given, else the data set (some classes of it); and the name of their split."""
    if images:
        return open_images(images), ""
    real = load_dataset(dataset, settings.data_root, settings.split, resolution, classes=classes)
    return DatasetImages(real, resolution), settings.split


def reference_of(settings, dataset, features, resolution, classes, accelerator) -> Measured:
    """What to compare with: a file of statistics, images on disk, or the data set."""
    if is_statistics(settings.reference):
        reference = Measured(*load_statistics(settings.reference))
        if features:
            Origin.of(features, resolution, "these images").check_comparable(reference.origin)
        return reference
    images, split = real_images(settings, settings.reference, dataset, resolution, classes)
    if features.name == "pixels" and images.resolution != resolution:
        raise ValueError(f"pixels compare at one resolution only, not {resolution} with {images.resolution}")
    return measure(images, split, features, settings.batch_size, accelerator, keep=bool(settings.metrics))


def measure(images, split: str, features, batch_size: int, accelerator: Accelerator, keep: bool = False) -> Measured:
    """Statistics of images that exist; each process reads its share."""
    origin = Origin.of(features, images.resolution, images.name, split, images.crop)
    indices = share(len(images), accelerator.process_index, accelerator.num_processes)
    running = RunningStatistics(features, accelerator.device, keep)
    name = Path(origin.dataset).name
    with tqdm(total=len(indices), desc=name, unit="image", disable=not accelerator.is_main_process) as progress:
        for batch, pixels in images.batches(indices, batch_size):
            running.update(batch, pixels)
            progress.update(len(batch))
    return finish(running, origin)


def finish(running: RunningStatistics, origin: Origin) -> Measured:
    """The sums of all processes."""
    return Measured(running.reduce(), origin, running.gather_kept() if running.kept is not None else None)


def check_metrics(
    metrics: tuple[str, ...], features: nn.Module | None, reference: Measured, measured: Measured | None = None
) -> None:
    """ValueError if a metric needs other features, or images where `reference` or `measured` is statistics only."""
    of_both = [metric for metric in metrics if metric in ("kid", "precision-recall")]
    for each, needing in ((measured, metrics), (reference, of_both)):
        if each and needing and each.kept is None:
            raise ValueError(
                f"'{each.origin.dataset}' is given as statistics: --metrics {needing[0]} needs the images"
            )
    if "inception-score" in metrics and not features.name.startswith("inception"):
        raise ValueError(f"--metrics inception-score needs --features inception, not {features.name}")


def compare(measured: Measured, reference: Measured, metrics: tuple[str, ...], features: nn.Module | None) -> dict:
    """All metrics of one set of images, by name."""
    results = {"distance": frechet_distance(measured.statistics, reference.statistics)}
    if "kid" in metrics:
        results["kid"], results["kid_spread"] = kernel_distance(measured.kept, reference.kept)
    if "precision-recall" in metrics:
        results["precision"], results["recall"] = precision_recall(measured.kept, reference.kept)
    if "inception-score" in metrics:
        score = inception_score(features.logits(measured.kept))
        results["inception_score"], results["inception_score_spread"] = score
    if "limit" in metrics:
        results["limit"] = asdict(extrapolate(measured.kept, reference.statistics))
    return results


def peak_memory_bytes() -> int:
    """Of the device where there is one, else the largest resident set of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024
