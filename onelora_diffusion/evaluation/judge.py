"""One place where images are looked at: made or read, they feed the statistics and the classifier of every caller."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, distributed
from tqdm import tqdm

from onelora_diffusion.evaluation.companions import (
    density_coverage,
    extrapolate,
    inception_score,
    kernel_distance,
    precision_recall,
)
from onelora_diffusion.evaluation.features.base import Features
from onelora_diffusion.evaluation.frechet import frechet_distance
from onelora_diffusion.evaluation.images import Source
from onelora_diffusion.evaluation.recognition import Recognition
from onelora_diffusion.evaluation.statistics import Measured, Origin, RunningStatistics

Batches = Iterable[tuple[list[int], Tensor]]
OF_BOTH = ("kid", "precision-recall", "density-coverage")  # metrics that compare images with images
OF_ONE = ("inception-score", "limit")  # metrics of the generated images, one by one


@dataclass(frozen=True)
class Seen:
    """A set of images, as each kind of features sees it, and the share of it that a classifier reads as asked for."""

    measured: list[Measured]
    recognition: float | None = None


def look(
    batches: Batches,
    source: Source,
    features: Sequence[Features],
    *,
    keep: bool = False,
    spatial: bool = False,
    recognition: Recognition | None = None,
    device: torch.device | str = "cpu",
) -> Seen:
    """Look at a set of images once, with all that there is to see it.

    Every process looks at images of its own, and all of them learn what the whole set is.

    Args:
        batches: (which images of the set, uint8 (batch, 3, R, R)).
        source: what the images are; sets of `evaluation.images` say it themselves.
        keep: hold every feature; else memory does not grow with the number of images.
        spatial: gather the spatial features of those that have some.
        recognition: a classifier; the classes that it was asked for take turns.
    """
    running = [RunningStatistics(each, device, keep, spatial and each.num_spatial > 0) for each in features]
    recognized = torch.zeros((), dtype=torch.int64, device=device)
    for indices, images in batches:
        for each in running:
            each.update(indices, images)
        if recognition:
            recognized += recognition.count(images, [index % len(recognition.numbers) for index in indices])
    if distributed.is_initialized():
        distributed.all_reduce(recognized)
    measured = [
        Measured(
            each.reduce(),
            Origin.of(each.features, source),
            each.gather_kept() if keep else None,
            each.reduce_spatial() if each.spatial_sums else None,
        )
        for each in running
    ]
    return Seen(measured, int(recognized) / measured[0].statistics.count if recognition else None)


def needs(metrics: Sequence[str]) -> dict[str, bool]:
    """What `look` has to gather for these metrics."""
    return {"keep": any(metric in OF_BOTH + OF_ONE for metric in metrics), "spatial": "sfid" in metrics}


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
        self.metrics = metrics_of_each(metrics, features)
        for ours, reference in zip(self.metrics, references, strict=True):
            check_material(ours, reference, "reference")
        self.features, self.references, self.needs = features, references, needs(metrics)
        self.recognition, self.device = recognition, device

    def look(self, batches: Batches, source: Source) -> Seen:
        """What the images are, over all processes."""
        return look(batches, source, self.features, recognition=self.recognition, device=self.device, **self.needs)

    def compare(self, seen: Seen) -> list[dict]:
        """For each kind of features: `distance`, the other metrics, and `recognition`."""
        recognition = {} if seen.recognition is None else {"recognition": seen.recognition}
        parts = zip(seen.measured, self.references, self.metrics, self.features, strict=True)
        return [{**compare(*part), **recognition} for part in parts]


def metrics_of_each(metrics: Sequence[str], features: Sequence[Features | None]) -> list[list[str]]:
    """Which metrics each kind of features has; None stands for those behind a file. ValueError if none has one."""
    only = {"sfid": lambda each: each.num_spatial > 0, "inception-score": lambda each: hasattr(each, "logits")}
    has = [[metric for metric in metrics if not (each and metric in only) or only[metric](each)] for each in features]
    for metric in metrics:
        if not any(metric in each for each in has):
            names = " and ".join(each.name for each in features)
            raise ValueError(f"--metrics {metric} needs --features inception, not {names}")
    return has


def check_material(metrics: Sequence[str], measured: Measured, role: str) -> None:
    """ValueError if a metric needs more of a set of images than there is. `role` is `images` or `reference`."""
    name = measured.origin.dataset
    of_images = OF_BOTH if role == "reference" else OF_BOTH + OF_ONE
    if (needing := [metric for metric in metrics if metric in of_images]) and measured.kept is None:
        raise ValueError(
            f"'{name}' is given as statistics: --metrics {needing[0]} needs the images, or `ref --keep-features`"
        )
    if "sfid" in metrics and measured.spatial is None:
        raise ValueError(
            f"'{name}' has no spatial statistics (mu_s): make it again by `eval_fid.py ref --features inception`"
        )


def compare(measured: Measured, reference: Measured, metrics: Sequence[str], features: Features | None) -> dict:
    """All metrics of one set of images, by name."""
    results = {"distance": frechet_distance(measured.statistics, reference.statistics)}
    if "sfid" in metrics:
        results["sfid"] = frechet_distance(measured.spatial, reference.spatial)
    if "kid" in metrics:
        results["kid"], results["kid_spread"] = kernel_distance(measured.kept, reference.kept)
    if "precision-recall" in metrics:
        results["precision"], results["recall"] = precision_recall(measured.kept, reference.kept)
    if "density-coverage" in metrics:
        results["density"], results["coverage"] = density_coverage(measured.kept, reference.kept)
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
