"""Measure sets of images, generated or read: their statistics, recognition, and all metrics."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from onelora_diffusion.command_line import typed_as
from onelora_diffusion.evaluation.features.base import Features
from onelora_diffusion.evaluation.images import Source
from onelora_diffusion.evaluation.metrics import (
    FEATURES_WITH,
    GENERATED,
    LOGITS,
    METRICS,
    REAL,
    REFERENCE,
    SPATIAL,
    TEXT,
    UNRELATED,
    MetricSettings,
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
        keep: keep all features in memory; otherwise memory does not grow with the number of images.
        spatial: also gather spatial features, from features that have them.
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
            each.reduce(spatial=True) if each.spatial_sums else None,
            source.notes,
            source.groups,
            source.prompts,
        )
        for each in running
    ]
    return MeasuredImages(measured, int(recognized) / measured[0].statistics.count if recognition else None)


class Evaluator:
    """Compares generated images with real ones: all metrics and recognition, by the keys of their numbers.

    `references` are the real images, measured by each module of features; or None, for metrics that need none.
    ValueError if a metric is unknown, needs other features, or the images of references that are statistics.
    """

    def __init__(
        self,
        features: Sequence[Features],
        references: Sequence[Measured | None],
        settings: MetricSettings = MetricSettings(metrics=("fd",)),  # noqa: B008 (frozen)
        recognition: Recognition | None = None,
        device: torch.device | str = "cpu",
    ):
        self.metrics = metrics_of_each(settings, features)
        for ours, reference in zip(self.metrics, references, strict=True):
            check_material(ours, reference, "reference")
        self.features, self.references, self.settings = features, references, settings
        self.recognition, self.device = recognition, device

    def measure(self, batches: Batches, source: Source, labels: Sequence[int] | None = None) -> MeasuredImages:
        """Measure the images of all processes; `labels` are those of all images, or None if the classes alternate."""
        needs = self.settings.needs
        kept = {"keep": GENERATED in needs, "spatial": SPATIAL in needs, "device": self.device}
        return measure_images(batches, source, self.features, recognition=self.recognition, labels=labels, **kept)

    def compare(
        self,
        found: MeasuredImages,
        unrelated: Sequence[Measured] | None = None,
        unrelated_of_base: Sequence[Measured] | None = None,
    ) -> list[dict]:
        """The results for each kind of features: the numbers of all its metrics, and `recognition`."""
        recognition = {} if found.recognition is None else {"recognition": found.recognition}
        nothing, results = [None] * len(self.features), []
        sets = zip(found.measured, self.references, unrelated or nothing, unrelated_of_base or nothing, strict=True)
        for metrics, features, (*compared, adapted, base) in zip(self.metrics, self.features, sets, strict=True):
            numbers = {}
            for metric in map(METRICS.get, metrics):
                pair = (adapted, base) if UNRELATED in metric.needs else compared
                numbers |= metric.compute(*pair, features, self.settings)
            results.append(numbers | recognition)
        return results


def metrics_of_each(settings: MetricSettings, features: Sequence[Features | None]) -> list[list[str]]:
    """The metrics of each kind of features (None: a file's), in the order of the table; ValueError for one of none."""

    def has(each: Features | None, metric: str, kind: str | None) -> bool:
        needs = METRICS[metric].needs if each else ()
        lacks = {SPATIAL: not each or each.num_spatial == 0, LOGITS: not hasattr(each, "logits")}
        lacks[TEXT] = not hasattr(each, "embed_text")
        return (kind is None or each is None or each.kind == kind) and not any(lacks.get(need) for need in needs)

    asked = settings.asked
    for metric, kind in asked:
        if not any(has(each, metric, kind) for each in features):
            needed_kind = kind or next(FEATURES_WITH[need] for need in METRICS[metric].needs if need in FEATURES_WITH)
            names = " and ".join(each.name for each in features)
            raise ValueError(f"--metrics {metric} needs --features {needed_kind}, not {names}")
    return [
        [row for row in METRICS if any(metric == row and has(each, metric, kind) for metric, kind in asked)]
        for each in features
    ]


def check_material(metrics: Sequence[str], measured: Measured | None, role: str) -> None:
    """ValueError if a set of images, `images` or `reference`, or there being none, lacks what a metric needs."""
    is_reference = role == "reference"
    for metric in metrics:
        needs = METRICS[metric].needs
        if measured is None:
            if {REFERENCE, REAL} & {*needs}:
                raise ValueError(
                    f"--metrics {metric} compares with real images: give them by --reference or --dataset, or in a "
                    "column image of the --prompts"
                )
            continue
        name = measured.origin.dataset
        if not is_reference and (UNRELATED in needs or TEXT in needs and measured.prompts is None):
            raise ValueError(f"--metrics {metric} is for images that are generated from prompts, not for '{name}'")
        if (REAL if is_reference else GENERATED) in needs and measured.kept is None:
            raise ValueError(
                f"'{name}' is given as statistics: --metrics {metric} needs the images, or `ref --keep-features`"
            )
        if SPATIAL in needs and measured.spatial is None:
            raise ValueError(
                f"'{name}' has no spatial statistics (mu_s): make it again by `{typed_as('eval_fid.py')} ref "
                "--features inception`"
            )
        if REFERENCE in needs and measured.statistics.count == 1:
            raise ValueError(f"'{name}' is 1 image: a distance between sets needs two or more")
