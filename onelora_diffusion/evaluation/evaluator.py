"""Measure sets of images, generated or read: their statistics, recognition, and all metrics."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed
from tqdm import tqdm

from onelora_diffusion.command_line import typed_as
from onelora_diffusion.evaluation.features.base import Features
from onelora_diffusion.evaluation.images import Source
from onelora_diffusion.evaluation.metrics import (
    DISTANCE,
    GENERATED,
    LOGITS,
    METRICS,
    REAL,
    SPATIAL,
    MetricSettings,
    needed,
)
from onelora_diffusion.evaluation.recognition import Recognition
from onelora_diffusion.evaluation.statistics import Measured, Origin, RunningStatistics

Batches = Iterable[tuple[list[int], Tensor]]


@dataclass(frozen=True)
class MeasuredImages:
    """The statistics of a set of images by each kind of features, and the share that a classifier recognises."""

    measured: list[Measured]
    recognition: float | None = None


def measure_images(
    batches: Batches,
    source: Source,
    features: Sequence[Features],
    *,
    keep: bool = False,
    spatial: bool = False,
    recognition: Recognition | None = None,
    labels: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> MeasuredImages:
    """Compute the statistics of a set of images, and the share that a classifier recognises, in one pass.

    Each process passes its share of the images; all processes get the result for the whole set.

    Args:
        batches: (indices of the images in the set, uint8 (batch, 3, R, R)).
        source: a description of the set; sets of `evaluation.images` have one.
        keep: keep all features in memory; otherwise memory does not grow with the number of images.
        spatial: also gather spatial features, from features that have them.
        recognition: a classifier.
        labels: the labels of all images of the set, for the classifier; None for image i of class i mod their number.
    """
    running = [RunningStatistics(each, device, keep, spatial and each.num_spatial > 0) for each in features]
    recognized = torch.zeros((), dtype=torch.int64, device=device)
    for indices, images in batches:
        for each in running:
            each.update(indices, images)
        if recognition:
            asked = [labels[index] if labels else index % len(recognition.numbers) for index in indices]
            recognized += recognition.count(images, asked)
    if distributed.is_initialized():
        distributed.all_reduce(recognized)
    measured = [
        Measured(
            each.reduce(),
            Origin.of(each.features, source),
            each.gather_kept() if keep else None,
            each.reduce_spatial() if each.spatial_sums else None,
            source.notes,
        )
        for each in running
    ]
    return MeasuredImages(measured, int(recognized) / measured[0].statistics.count if recognition else None)


class Evaluator:
    """Compares generated images with real ones: the distance, further metrics and recognition, by name.

    Args:
        features: modules of `evaluation.features`.
        references: the real images, measured by each of them.
        settings: the further metrics.
        recognition: a classifier of the images, or None.

    Raises:
        ValueError: a metric needs other features, or the images of references that are statistics.
    """

    def __init__(
        self,
        features: Sequence[Features],
        references: Sequence[Measured],
        settings: MetricSettings = MetricSettings(),  # noqa: B008 (frozen)
        recognition: Recognition | None = None,
        device: torch.device | str = "cpu",
    ):
        settings.check_metrics()
        self.metrics = metrics_of_each(settings.metrics, features)
        for ours, reference in zip(self.metrics, references, strict=True):
            check_material(ours, reference, "reference")
        self.features, self.references, self.settings = features, references, settings
        self.recognition, self.device = recognition, device

    def measure(self, batches: Batches, source: Source, labels: Sequence[int] | None = None) -> MeasuredImages:
        """Measure the images of all processes; `labels` are those of all images, or None if the classes alternate."""
        needs = needed(self.settings.metrics)
        return measure_images(
            batches,
            source,
            self.features,
            keep=GENERATED in needs,
            spatial=SPATIAL in needs,
            recognition=self.recognition,
            labels=labels,
            device=self.device,
        )

    def compare(self, found: MeasuredImages) -> list[dict]:
        """The results for each kind of features: `distance`, the other metrics, and `recognition`."""
        recognition = {} if found.recognition is None else {"recognition": found.recognition}
        parts = zip(found.measured, self.references, self.metrics, self.features, strict=True)
        return [{**compare(*part, self.settings), **recognition} for part in parts]


def metrics_of_each(metrics: Sequence[str], features: Sequence[Features | None]) -> list[list[str]]:
    """The metrics that each kind of features allows; None stands for a file's. ValueError if none allows one."""

    def has(each: Features | None, metric: str) -> bool:
        needs = METRICS[metric].needs if each else ()
        return not (SPATIAL in needs and each.num_spatial == 0 or LOGITS in needs and not hasattr(each, "logits"))

    found = [[metric for metric in metrics if has(each, metric)] for each in features]
    for metric in metrics:
        if not any(metric in each for each in found):
            names = " and ".join(each.name for each in features)
            raise ValueError(f"--metrics {metric} needs --features inception, not {names}")
    return found


def check_material(metrics: Sequence[str], measured: Measured, role: str) -> None:
    """ValueError if a set of images lacks what a metric needs. `role` is `images` or `reference`."""
    name, one_by_one = measured.origin.dataset, REAL if role == "reference" else GENERATED
    if (needing := [metric for metric in metrics if one_by_one in METRICS[metric].needs]) and measured.kept is None:
        raise ValueError(
            f"'{name}' is given as statistics: --metrics {needing[0]} needs the images, or `ref --keep-features`"
        )
    if SPATIAL in needed(metrics) and measured.spatial is None:
        raise ValueError(
            f"'{name}' has no spatial statistics (mu_s): make it again by `{typed_as('eval_fid.py')} ref "
            "--features inception`"
        )


def compare(
    measured: Measured,
    reference: Measured,
    metrics: Sequence[str],
    features: Features | None,
    settings: MetricSettings,
) -> dict:
    """The distance and all other metrics of a set of images, by the keys of their numbers."""
    results = {}
    for metric in (DISTANCE, *(METRICS[name] for name in METRICS if name in metrics)):
        results |= metric.compute(measured, reference, features, settings)
    return results


def with_progress(batches: Batches, total: int, name: str, show: bool, leave: bool = True) -> Iterator:
    """Yield the batches with a progress bar that counts images."""
    with tqdm(total=total, desc=name, unit="image", disable=not show, leave=leave) as progress:
        for indices, images in batches:
            yield indices, images
            progress.update(len(indices))
