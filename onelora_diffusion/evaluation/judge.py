"""One place where images are looked at: made or read, they feed the statistics and the classifier of every caller."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, distributed
from tqdm import tqdm

from onelora_diffusion.evaluation.companions import extrapolate, inception_score, kernel_distance, precision_recall
from onelora_diffusion.evaluation.features.base import Features
from onelora_diffusion.evaluation.frechet import frechet_distance
from onelora_diffusion.evaluation.images import Source
from onelora_diffusion.evaluation.recognition import Recognition
from onelora_diffusion.evaluation.statistics import FeatureStatistics, Origin, RunningStatistics

Batches = Iterable[tuple[list[int], Tensor]]
OF_BOTH = ("kid", "precision-recall")  # metrics that compare images with images
OF_ONE = ("inception-score", "limit")  # metrics of the generated images, one by one


@dataclass(frozen=True)
class Measured:
    """A set of images, as one kind of features sees it; `kept` are the features one by one, if a metric needs them."""

    statistics: FeatureStatistics
    origin: Origin
    kept: Tensor | None = None


@dataclass(frozen=True)
class Seen:
    """A set of images, as each kind of features sees it, and the share of it that a classifier reads as asked for."""

    measured: list[Measured]
    recognition: float | None = None


def look(
    batches: Batches,
    source: Source,
    features: Sequence[Features],
    metrics: Sequence[str] = (),
    recognition: Recognition | None = None,
    device: torch.device | str = "cpu",
) -> Seen:
    """Look at a set of images once, with all that there is to see it.

    Every process looks at images of its own, and all of them learn what the whole set is.

    Args:
        batches: (which images of the set, uint8 (batch, 3, R, R)).
        source: what the images are; sets of `evaluation.images` say it themselves.
        metrics: what is to be computed later: some metrics need every feature kept.
        recognition: a classifier; the classes that it was asked for take turns.
    """
    keep = any(metric in OF_BOTH + OF_ONE for metric in metrics)
    running = [RunningStatistics(each, device, keep) for each in features]
    recognized = torch.zeros((), dtype=torch.int64, device=device)
    for indices, images in batches:
        for each in running:
            each.update(indices, images)
        if recognition:
            recognized += recognition.count(images, [index % len(recognition.numbers) for index in indices])
    if distributed.is_initialized():
        distributed.all_reduce(recognized)
    measured = [
        Measured(each.reduce(), Origin.of(each.features, source), each.gather_kept() if keep else None)
        for each in running
    ]
    return Seen(measured, int(recognized) / measured[0].statistics.count if recognition else None)


class Judge:
    """Generated images against real ones: distances, their companions and recognition, by name.

    Args:
        features: modules of `evaluation.features`.
        references: the real images, as each of them sees them.
        metrics: further ones, as eval_fid.py names them.
        recognition: a classifier of the images, where there is one.

    Raises:
        ValueError: a metric needs other features, or the images behind the references.
    """

    def __init__(
        self,
        features: Sequence[Features],
        references: Sequence[Measured],
        metrics: Sequence[str] = (),
        recognition: Recognition | None = None,
        device: torch.device | str = "cpu",
    ):
        for each, reference in zip(features, references, strict=True):
            check_metrics(metrics, each, reference)
        self.features, self.references, self.metrics = features, references, metrics
        self.recognition, self.device = recognition, device

    def look(self, batches: Batches, source: Source) -> Seen:
        """What the images are, over all processes."""
        return look(batches, source, self.features, self.metrics, self.recognition, self.device)

    def compare(self, seen: Seen) -> list[dict]:
        """For each kind of features: `distance`, the other metrics, and `recognition`."""
        recognition = {} if seen.recognition is None else {"recognition": seen.recognition}
        return [
            {**compare(measured, reference, self.metrics, features), **recognition}
            for features, measured, reference in zip(self.features, seen.measured, self.references, strict=True)
        ]


def check_metrics(
    metrics: Sequence[str], features: Features | None, reference: Measured, measured: Measured | None = None
) -> None:
    """ValueError if a metric needs other features, or images where `reference` or `measured` is statistics only."""
    of_both = [metric for metric in metrics if metric in OF_BOTH]
    for each, needing in ((measured, metrics), (reference, of_both)):
        if each and needing and each.kept is None:
            raise ValueError(
                f"'{each.origin.dataset}' is given as statistics: --metrics {needing[0]} needs the images"
            )
    if "inception-score" in metrics and not features.name.startswith("inception"):
        raise ValueError(f"--metrics inception-score needs --features inception, not {features.name}")


def compare(measured: Measured, reference: Measured, metrics: Sequence[str], features: Features | None) -> dict:
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


def with_progress(batches: Batches, total: int, name: str, show: bool, leave: bool = True) -> Iterator:
    """The same batches, with a bar that counts their images."""
    with tqdm(total=total, desc=name, unit="image", disable=not show, leave=leave) as progress:
        for indices, images in batches:
            yield indices, images
            progress.update(len(indices))
