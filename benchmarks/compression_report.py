"""The report of `benchmark.py compression`: a table, its numbers, and two pictures."""

import io
import itertools
import json
import math
import statistics
from pathlib import Path

from benchmarks.compare_report import mean_and_deviation, spread
from onelora_diffusion.evaluation.report import write_json
from onelora_diffusion.files import write_bytes

# Kinds of variants: colour, and name in the pictures.
KINDS = {
    "inputs": ("tab:blue", "sums of inputs"),
    "outputs": ("tab:orange", "sums of the layer's outputs"),
    "singular": ("tab:green", "leading directions of W0"),
    "other": ("tab:gray", "other fixed directions"),
    "lora": ("tab:red", "LoRA, directions learned"),
    "tuner": ("tab:purple", "other methods"),
}
LINES = {  # of which kinds the variants of several numbers are joined in the picture
    "sum": "inputs",
    "outputs": "outputs",
    "singular": "singular",
    "lora": "lora",
}


def write_report(results: dict, others: list[dict], folder: Path) -> list[Path]:
    """compression.md, .json and .png, and compression-numbers.png, where `others` are drawn too."""
    folder.mkdir(parents=True, exist_ok=True)
    table, numbers, picture = (folder / f"compression.{suffix}" for suffix in ("md", "json", "png"))
    against = folder / "compression-numbers.png"
    write_bytes(table, markdown(results).encode())
    write_json(numbers, results)
    plot(results, picture)
    plot_against_numbers([*others, results], against)
    return [table, numbers, picture, against]


def markdown(results: dict) -> str:
    settings, variants = results["settings"], results["variants"]
    first = _first(variants)
    head = ["direction", results["distance_name"], f"x {first['label']}", "recognised"]
    head += ["trained beside the table", "learning rate", "rates tried"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * 6]
    for variant in variants.values():
        runs = variant["runs"]
        cells = [
            spread(mean_and_deviation([run["distance"] for run in runs]), 1, 2),
            spread(_ratio(variant, first), 1, 2),
            spread(mean_and_deviation([run["recognition"] for run in runs]), 100, 1) + " %",
            f"{runs[0]['trained']:,}",
            f"{variant['learning_rate']:g}",
            ", ".join(f"{rate}: {run['distance']:.2f}" for rate, run in variant["sweep"].items()),
        ]
        lines.append(f"| {variant['label']} | " + " | ".join(cells) + " |")
    frozen = {each["label"]: each["runs"][0]["share_of_gradient"] for each in variants.values()}
    frozen = {label: shares for label, shares in frozen.items() if shares}
    if frozen:
        lines += ["", "Share of the first gradient's squared norm along the frozen directions:", ""]
        kinds = list(next(iter(frozen.values())))
        lines += ["| directions | " + " | ".join(kinds) + " |", "|---|" + "---:|" * len(kinds)]
        for label, shares in frozen.items():
            lines.append(f"| {label} | " + " | ".join(f"{shares[kind]:.0%}" for kind in kinds) + " |")
    seeds = ", ".join(map(str, settings["seeds"]))
    sampled = first["runs"][0]["made_with"]["job"]
    runs = [run for each in variants.values() for run in (*each["sweep"].values(), *each["runs"])]
    jobs = {json.dumps(run["made_with"]["job"]): run["seconds"] for run in runs}
    lines += [
        "",
        f"{settings['steps']} updates of {sampled['batch_size']} images ({settings['preset']}), cosine schedule, "
        f"seeds {seeds}, mean ± standard deviation; each at the best of its learning rates on the first seed. Frozen "
        f"directions are scaled by {settings['scale']}. {sampled['num_images']} samples (DDIM, "
        f"{sampled['num_inference_steps']} steps, guidance {sampled['guidance_scale']:g}) against the real images. "
        f"{len(jobs)} runs, {sum(jobs.values()) / 60:.0f} minutes of one thread.",
        "",
    ]
    return "\n".join(lines)


def plot(results: dict, picture: Path) -> None:
    """A dot a seed and a line at their mean, for both measures; colours by kind."""
    from matplotlib.figure import Figure

    variants = results["variants"]
    names, places = [variant["label"] for variant in variants.values()], range(len(variants))
    figure = Figure(figsize=(9, 1.2 + 0.42 * len(names)), layout="constrained", dpi=130)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, key, factor, label in (
        (left, "distance", 1, f"{results['distance_name']}: less is better"),
        (right, "recognition", 100, "recognised [%]: more is better"),
    ):
        for place, variant in zip(places, variants.values(), strict=True):
            values = [factor * run[key] for run in variant["runs"]]
            colour = KINDS[variant["kind"]][0]
            axes.plot(values, [place] * len(values), "o", color=colour, ms=5, alpha=0.7)
            axes.plot([statistics.mean(values)] * 2, [place - 0.3, place + 0.3], color=colour, lw=2.5)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3, axis="x")
    left.set_yticks(list(places), names)
    left.invert_yaxis()
    figure.legend(
        handles=_legend([results], set(KINDS)), loc="outside lower center", ncols=3, fontsize=9, frameon=False
    )
    figure.suptitle("What a layer's input is read along: a dot a seed, a bar at their mean", fontsize=11)
    _write(figure, picture)


def plot_against_numbers(reports: list[dict], picture: Path) -> None:
    """Distance against trained numbers, both in those of the sum: a panel a report, a line a rule, a dot a count, a
    square another method."""
    from matplotlib.figure import Figure

    rows = math.ceil(len(reports) / 2)
    figure = Figure(figsize=(6.2 * min(2, len(reports)), 0.5 + 4.5 * rows), layout="constrained", dpi=130)
    panels = figure.subplots(rows, min(2, len(reports)), squeeze=False, sharey=True).flat
    for axes, report in itertools.zip_longest(panels, reports):
        _plot_report(axes, report) if report else axes.set_axis_off()
    figure.legend(
        handles=_legend(reports, {*LINES.values(), "tuner"}),
        loc="outside lower center",
        ncols=3,
        fontsize=9,
        frameon=False,
    )
    figure.suptitle(
        "Further down is closer to the real images, further left is smaller.\n"
        "In a dot: how many directions a layer's input is read along"
    )
    figure.supylabel("distance, x that of one sum of inputs (1LoRA)", fontsize=10)
    _write(figure, picture)


def _plot_report(axes, report: dict) -> None:
    variants, labels = report["variants"], []
    first = _first(variants)

    def numbers(variant: dict) -> float:
        return variant["runs"][0]["trained"] / first["runs"][0]["trained"]

    for rule, kind in LINES.items():
        counts = {f"{rule}-{n}" if n > 1 else rule: n for n in (1, 2, 4, 8)}
        counts = {name: n for name, n in counts.items() if name in variants}
        colour = KINDS[kind][0]
        points = [(numbers(variants[name]), *_ratio(variants[name], first)) for name in counts]
        for (x, y, deviation), n in zip(points, counts.values(), strict=True):
            axes.errorbar(x, y, deviation, color=colour, marker="o", ms=12, capsize=3)
            axes.annotate(str(n), (x, y), ha="center", va="center", color="white", fontsize=8, weight="bold", zorder=9)
        axes.plot(*zip(*[point[:2] for point in points], strict=True), color=colour, lw=1.8)
    for name in [name for name, variant in variants.items() if variant["kind"] == "tuner"]:
        colour = KINDS["tuner"][0]
        at = numbers(variants[name]), _ratio(variants[name], first)[0]
        axes.plot(*at, "s", color=colour, ms=5)
        labels.append((*reversed(at), variants[name]["label"], colour))
    height = -math.inf
    for y, x, label, colour in sorted(labels):  # each above the one before
        height = max(y, height + 0.022)
        axes.annotate(label, (x * 1.05, height), fontsize=6.5, color=colour, va="center")
    axes.axhline(1, color="black", lw=0.8, ls=":")
    axes.set_xscale("log", base=2)
    axes.set_xlim(0.8, 20 if labels else 12)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(f"trained numbers, x those of one sum ({first['runs'][0]['trained']:,})")
    settings, seeds = report["settings"], len(report["settings"]["seeds"])
    title = f"{settings['preset']}, {settings['steps']:,} updates, {seeds} seed{'s' * (seeds > 1)}"
    axes.set_title(f"{title}, {report['distance_name']}", fontsize=11)
    axes.grid(alpha=0.3)


def _legend(reports: list[dict], drawn: set[str]) -> list:
    from matplotlib.lines import Line2D

    shown = {variant["kind"] for report in reports for variant in report["variants"].values()}
    return [
        Line2D([], [], color=colour, marker="o", lw=2.5, label=label)
        for kind, (colour, label) in KINDS.items()
        if kind in shown & drawn
    ]


def _first(variants: dict) -> dict:
    """What the others are compared with."""
    return variants.get("sum") or next(iter(variants.values()))


def _ratio(variant: dict, first: dict) -> tuple[float, float | None]:
    """Mean and deviation of the ratio of distances, seed by seed: the same batches and sample noise."""
    pairs = zip(variant["runs"], first["runs"], strict=True)
    return mean_and_deviation([run["distance"] / its["distance"] for run, its in pairs])


def _write(figure, picture: Path) -> None:
    png = io.BytesIO()
    figure.savefig(png, format="png")
    write_bytes(picture, png.getvalue())
