"""The table of further metrics: what each needs, how it is computed, and how its numbers are shown."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import tyro

from onelora_diffusion.evaluation.features.base import Features
from onelora_diffusion.evaluation.formulas import (
    density_coverage,
    extrapolate,
    inception_score,
    kernel_distance,
    precision_recall,
)
from onelora_diffusion.evaluation.frechet import frechet_distance
from onelora_diffusion.evaluation.statistics import Measured

# What a metric may need in addition to the mean and covariance of each set.
GENERATED = "the features of the generated images, one by one"
REAL = "the features of the real images, one by one"
SPATIAL = "spatial statistics of both sets"
LOGITS = "features that lead to the logits of classes"


@dataclass(frozen=True)
class Shown:
    """How a number is shown in a table.

    Attributes:
        name: the name; `{own}` is replaced by the name of the features, unless these are Inception-2015's, and
            `{distance}` by the name of the distance.
        format: a template for `str.format` with all numbers of the metric by their keys.
        more_is_better: whether the largest value is the best one.
    """

    name: str
    format: str
    more_is_better: bool = False

    def titled(self, distance_name: str, features: str) -> str:
        own = "" if distance_name == "FID" else f"({features})"
        return self.name.format(own=own, distance=distance_name)


@dataclass(frozen=True)
class Metric:
    """A row of `METRICS`.

    Attributes:
        needs: the needed ones of the four above.
        compute: function of the generated and real images, the features' module and the settings; returns numbers by
            key.
        shown: the numbers that tables and sweeps show, by key.
        rows: function of the results of a table's columns and the distance's name; returns further rows of the table,
            none if the results do not have this metric.
        note_of: function of one result; returns a sentence for the report, or None.
    """

    needs: tuple[str, ...]
    compute: "Callable[[Measured, Measured, Features | None, MetricSettings], dict]"
    shown: Mapping[str, Shown]
    rows: Callable[[Sequence[dict], str], dict[str, list[str]]] = lambda results, distance_name: {}
    note_of: Callable[[dict], str | None] = lambda result: None


def _distance(generated: Measured, real: Measured, features, settings) -> dict:
    return {"distance": frechet_distance(generated.statistics, real.statistics)}


def _sfid(generated: Measured, real: Measured, features, settings) -> dict:
    return {"sfid": frechet_distance(generated.spatial, real.spatial)}


def _kid(generated: Measured, real: Measured, features, settings) -> dict:
    return dict(zip(("kid", "kid_spread"), kernel_distance(generated.kept, real.kept), strict=True))


def _precision_recall(generated: Measured, real: Measured, features, settings) -> dict:
    return dict(zip(("precision", "recall"), precision_recall(generated.kept, real.kept), strict=True))


def _density_coverage(generated: Measured, real: Measured, features, settings) -> dict:
    return dict(zip(("density", "coverage"), density_coverage(generated.kept, real.kept), strict=True))


def _inception_score(generated: Measured, real: Measured, features, settings: "MetricSettings") -> dict:
    score, spread, size = inception_score(
        features.logits(generated.kept), settings.inception_score_split, settings.inception_score_order
    )
    return {
        "inception_score": score,
        "inception_score_spread": spread,
        "inception_score_split": size,
        "inception_score_order": settings.inception_score_order,
    }


def _splits(result: dict) -> str | None:
    if "inception_score" not in result:
        return None
    order = "in the order of the images" if result["inception_score_order"] == "given" else "shuffled"
    return f"Inception Score: mean and spread over splits of {result['inception_score_split']:,} images, {order}."


def _limit(generated: Measured, real: Measured, features, settings) -> dict:
    return {"limit": asdict(extrapolate(generated.kept, real.statistics))}


def _limit_rows(results: Sequence[dict], distance_name: str) -> dict[str, list[str]]:
    if "limit" not in results[0]:
        return {}
    limits = [result["limit"] for result in results]
    rows = {
        f"{distance_name}, N = {count:,}": [f"{limit['distances'][k]:.4f}" for limit in limits]
        for k, count in enumerate(limits[0]["counts"])
    }
    rows[f"{distance_name}, N -> infinity"] = [f"{limit['limit']:.4f}" for limit in limits]
    return rows | {"  R2 of its fit": [f"{limit['r_squared']:.4f}" for limit in limits]}


DISTANCE = Metric((), _distance, {"distance": Shown("{distance}", "{distance:.4f}")})
METRICS = {
    "sfid": Metric((SPATIAL,), _sfid, {"sfid": Shown("s{distance}", "{sfid:.4f}")}),
    "kid": Metric((GENERATED, REAL), _kid, {"kid": Shown("KID{own}", "{kid:.5f} ± {kid_spread:.5f}")}),
    "precision-recall": Metric(
        (GENERATED, REAL),
        _precision_recall,
        {key: Shown(f"{key}{{own}}", f"{{{key}:.3f}}", more_is_better=True) for key in ("precision", "recall")},
    ),
    "density-coverage": Metric(
        (GENERATED, REAL),
        _density_coverage,
        {key: Shown(f"{key}{{own}}", f"{{{key}:.3f}}", more_is_better=True) for key in ("density", "coverage")},
    ),
    "inception-score": Metric(
        (GENERATED, LOGITS),
        _inception_score,
        {
            "inception_score": Shown(
                "Inception Score{own}", "{inception_score:.3f} ± {inception_score_spread:.3f}", more_is_better=True
            )
        },
        note_of=_splits,
    ),
    "limit": Metric((GENERATED,), _limit, {}, rows=_limit_rows),
}
RECOGNITION = Shown("recognition", "{recognition:.1%}", more_is_better=True)


@dataclass(frozen=True, kw_only=True)
class MetricSettings:
    metrics: Annotated[tuple[str, ...], tyro.conf.arg(metavar=f"[{{{','.join(METRICS)}}} [...]]")] = ()
    """Further metrics; all but sfid keep all features in memory. `limit` is the distance at several numbers of images
    and its extrapolation to infinitely many."""
    inception_score_split: int | None = None
    """Number of images in each split of the Inception Score, 5000 in ADM's evaluator. Default: a tenth of them."""
    inception_score_order: Literal["shuffled", "given"] = "shuffled"
    """Order of the images in splits: random (shuffled), or unchanged as in ADM's evaluator (given)."""

    def check_metrics(self) -> None:
        """ValueError for an unknown metric or empty splits."""
        if unknown := [metric for metric in self.metrics if metric not in METRICS]:
            raise ValueError(f"--metrics {unknown[0]} is unknown: choose from {', '.join(METRICS)}")
        if self.inception_score_split is not None and self.inception_score_split < 1:
            raise ValueError(f"--inception-score-split is {self.inception_score_split}; it must be at least 1")


def needed(metrics: Sequence[str]) -> set[str]:
    """The union of the needs of these metrics."""
    return {need for metric in metrics for need in METRICS[metric].needs}


def all_shown() -> dict[str, Shown]:
    """All numbers that a result may contain, in the order of a table's rows."""
    rows = [DISTANCE, *METRICS.values()]
    return {key: shown for metric in rows for key, shown in metric.shown.items()} | {"recognition": RECOGNITION}
