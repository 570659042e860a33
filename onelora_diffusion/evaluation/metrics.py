"""The table of metrics: what each needs, how it is computed, and how its numbers are shown."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import tyro

from onelora_diffusion.evaluation import formulas
from onelora_diffusion.evaluation.features import FEATURES, name_of
from onelora_diffusion.evaluation.features.base import Features
from onelora_diffusion.evaluation.statistics import Measured

SHEET_ROWS = 20  # number of the first images that a sheet of pictures shows
# What a metric may need.
GENERATED = "the features of the generated images, one by one"
REFERENCE = "the mean and covariance of real images"
REAL = "the features of real images, one by one"
SPATIAL = "spatial statistics of both sets"
LOGITS = "features that lead to the logits of classes"
TEXT = "the prompts of the images, and features that texts have as well"
UNRELATED = "images of unrelated prompts, by the adapter and by the base from the same noise, one by one"
# The features to choose for a metric that needs more of them than others have.
FEATURES_WITH = {SPATIAL: "inception", LOGITS: "inception", TEXT: "clip"}


@dataclass(frozen=True)
class Shown:
    """How a number is shown in a table."""

    name: str  # followed by that of the features if the two have no published name
    format: str  # a template for `str.format` with all numbers of the metric by their keys
    more_is_better: bool = False
    is_of_features: bool = True  # whether the number depends on the features

    def titled(self, features: str, extractor: str) -> str:
        return name_of(self.name, features, extractor) if self.is_of_features else self.name


@dataclass(frozen=True)
class Metric:
    """A row of `METRICS`."""

    needs: tuple[str, ...]  # of those above
    # Numbers by key, of the generated and real images or, of unrelated prompts, of those of the adapter and the base.
    compute: "Callable[[Measured, Measured, Features | None, MetricSettings], dict]"
    shown: Mapping[str, Shown]  # the numbers that tables and sweeps show, by key
    # Further rows of a table, of its columns' results and the distance's name; none without this metric's results.
    rows: Callable[[Sequence[dict], str], dict[str, list[str]]] = lambda results, distance_name: {}
    note_of: Callable[[dict], str | None] = lambda result: None  # a sentence for the report, of one of its results


def _of(part: str, function: Callable, *keys: str) -> Callable[..., dict]:
    """A function of this part of what was measured of generated and real images; its results get these keys."""

    def compute(generated: Measured, real: Measured, features, settings) -> dict:
        found = function(getattr(generated, part), getattr(real, part))
        return dict(zip(keys, found if isinstance(found, tuple) else (found,), strict=True))

    return compute


def _similarity(generated: Measured, real: Measured, features, settings) -> dict:
    grouped = generated.groups is not None and real.groups is not None and set(generated.groups) <= set(real.groups)
    groups = (generated.groups, real.groups) if grouped else (None, None)
    return {"similarity": formulas.similarity(generated.kept, real.kept, *groups), "similarity_by_group": grouped}


def _compared_with(result: dict) -> str:
    which = "the real images of its own group" if result["similarity_by_group"] else "all real images"
    return f"Similarity: mean cosine of each image with {which}."


def _prompt_similarity(generated: Measured, real, features, settings) -> dict:
    prompts = list(dict.fromkeys(generated.prompts))
    texts = features.embed_text(prompts)[[prompts.index(prompt) for prompt in generated.prompts]]
    return {"prompt_similarity": formulas.paired_similarity(generated.kept, texts)}


def _drift(adapted: Measured, base: Measured, features, settings) -> dict:
    change = (adapted.kept - base.kept).double().square().mean().sqrt().item()
    return {"drift": 1 - formulas.paired_similarity(adapted.kept, base.kept), "drift_rms": change}


def _nearest(generated: Measured, real: Measured, features, settings) -> dict:
    cosines, indices = formulas.nearest(generated.kept, real.kept)
    return {"nearest": cosines.mean().item(), "nearest_images": indices[:SHEET_ROWS].tolist()}


def _inception_score(generated: Measured, real: Measured, features, settings: "MetricSettings") -> dict:
    size, order = settings.inception_score_split, settings.inception_score_order
    found = formulas.inception_score(features.logits(generated.kept), size, order)
    keys = "inception_score", "inception_score_spread", "inception_score_split"
    return {**dict(zip(keys, found, strict=True)), "inception_score_order": order}


def _splits(result: dict) -> str:
    order = "in the order of the images" if result["inception_score_order"] == "given" else "shuffled"
    return f"Inception Score: mean and spread over splits of {result['inception_score_split']:,} images, {order}."


def _limit(generated: Measured, real: Measured, features, settings) -> dict:
    return {"limit": asdict(formulas.extrapolate(generated.kept, real.statistics))}


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


def _shares(*keys: str) -> dict[str, Shown]:
    return {key: Shown(key, f"{{{key}:.3f}}", more_is_better=True) for key in keys}


ONE_BY_ONE = (GENERATED, REAL)
DRIFT = "Drift: 1 - mean cosine of images of unrelated prompts, by the base and by the adapter from the same noise."
METRICS = {
    "fd": Metric(
        (REFERENCE,),
        _of("statistics", formulas.frechet_distance, "distance"),
        {"distance": Shown("FD", "{distance:.4f}")},
    ),
    "sfid": Metric(
        (REFERENCE, SPATIAL), _of("spatial", formulas.frechet_distance, "sfid"), {"sfid": Shown("sFD", "{sfid:.4f}")}
    ),
    "kid": Metric(
        ONE_BY_ONE,
        _of("kept", formulas.kernel_distance, "kid", "kid_spread"),
        {"kid": Shown("KID", "{kid:.5f} ± {kid_spread:.5f}")},
    ),
    "mmd": Metric(ONE_BY_ONE, _of("kept", formulas.gaussian_mmd, "mmd"), {"mmd": Shown("MMD", "{mmd:.4f}")}),
    "precision-recall": Metric(
        ONE_BY_ONE, _of("kept", formulas.precision_recall, "precision", "recall"), _shares("precision", "recall")
    ),
    "density-coverage": Metric(
        ONE_BY_ONE, _of("kept", formulas.density_coverage, "density", "coverage"), _shares("density", "coverage")
    ),
    "inception-score": Metric(
        (GENERATED, LOGITS),
        _inception_score,
        {"inception_score": Shown("Inception Score", "{inception_score:.3f} ± {inception_score_spread:.3f}", True)},
        note_of=_splits,
    ),
    "limit": Metric((GENERATED, REFERENCE), _limit, {}, rows=_limit_rows),
    "similarity": Metric(ONE_BY_ONE, _similarity, _shares("similarity"), note_of=_compared_with),
    "prompt-similarity": Metric(
        (GENERATED, TEXT),
        _prompt_similarity,
        {"prompt_similarity": Shown("prompt similarity", "{prompt_similarity:.3f}", more_is_better=True)},
    ),
    "nearest": Metric(ONE_BY_ONE, _nearest, {"nearest": Shown("nearest real image", "{nearest:.3f}")}),
    "authenticity": Metric(ONE_BY_ONE, _of("kept", formulas.authenticity, "authenticity"), _shares("authenticity")),
    "drift": Metric(
        (UNRELATED,),
        _drift,
        {"drift": Shown("drift", "{drift:.4f}"), "drift_rms": Shown("rms drift", "{drift_rms:.4f}")},
        note_of=lambda result: DRIFT,
    ),
}
# Published names, in lower case -> (metric, the only features that it is measured by): dino-i -> (similarity, dino).
PUBLISHED = {
    name.lower(): (metric, kind)
    for kind, features in FEATURES.items()
    for number, name in features.names.items()
    for metric, row in METRICS.items()
    if name != number and name.lower() not in METRICS and number in [shown.name for shown in row.shown.values()]
}
RECOGNITION = Shown("recognition", "{recognition:.1%}", more_is_better=True, is_of_features=False)


@dataclass(frozen=True, kw_only=True)
class MetricSettings:
    metrics: Annotated[tuple[str, ...], tyro.conf.arg(metavar=f"[{{{','.join([*METRICS, *PUBLISHED])}}} [...]]")] = ()
    """What to measure; of classes, in addition to the distance (fd). A published name such as cmmd also chooses its
    features. All but fd and sfid keep all features in memory. `limit` is the distance at several numbers of images and
    its extrapolation to infinitely many; `nearest` also shows the nearest real images."""
    inception_score_split: int | None = None
    """Number of images in each split of the Inception Score, 5000 in ADM's evaluator. Default: a tenth of them."""
    inception_score_order: Literal["shuffled", "given"] = "shuffled"
    """Order of the images in splits: random (shuffled), or unchanged as in ADM's evaluator (given)."""

    @property
    def asked(self) -> list[tuple[str, str | None]]:
        """(row of `METRICS`, its only features or None) of each metric; ValueError if unknown, or for empty splits."""
        if self.inception_score_split is not None and self.inception_score_split < 1:
            raise ValueError(f"--inception-score-split is {self.inception_score_split}; it must be at least 1")
        known = {**PUBLISHED, **{name: (name, None) for name in METRICS}}
        if unknown := [metric for metric in self.metrics if metric.lower() not in known]:
            raise ValueError(f"--metrics {unknown[0]} is unknown: choose from {', '.join([*METRICS, *PUBLISHED])}")
        return [known[metric.lower()] for metric in self.metrics]

    @property
    def needs(self) -> set[str]:
        return needed([metric for metric, _ in self.asked])


def needed(metrics: Sequence[str]) -> set[str]:
    """The union of the needs of metrics, by their rows."""
    return {need for metric in metrics for need in METRICS[metric].needs}


def all_shown() -> dict[str, Shown]:
    """All numbers that a result may contain, in the order of a table's rows."""
    return {key: shown for row in METRICS.values() for key, shown in row.shown.items()} | {"recognition": RECOGNITION}
