"""The report of `benchmark.py compression`: a table, its numbers, and two pictures."""

import io
import json
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
    first = "sum" if "sum" in variants else next(iter(variants))
    beside = variants[first]["runs"]  # seed by seed: the same batches and sample noise
    head = ["direction", results["distance_name"], f"x {variants[first]['label']}", "recognised"]
    head += ["trained beside the table", "learning rate", "rates tried"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * 6]
    for variant in variants.values():
        runs = variant["runs"]
        pairs = zip(runs, beside, strict=True)
        cells = [
            spread(mean_and_deviation([run["distance"] for run in runs]), 1, 2),
            spread(mean_and_deviation([run["distance"] / its["distance"] for run, its in pairs]), 1, 2),
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
    sampled = beside[0]["made_with"]["job"]
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
    from matplotlib.lines import Line2D

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
    shown = {variant["kind"] for variant in variants.values()}
    kinds = [
        Line2D([], [], color=colour, marker="o", lw=2.5, label=label)
        for kind, (colour, label) in KINDS.items()
        if kind in shown
    ]
    figure.legend(handles=kinds, loc="outside lower center", ncols=min(3, len(kinds)), fontsize=9, frameon=False)
    figure.suptitle("What a layer's input is read along: a dot a seed, a bar at their mean", fontsize=11)
    _write(figure, picture)


def plot_against_numbers(reports: list[dict], picture: Path) -> None:
    """Distance against trained numbers, a panel a report; counts of one rule are joined by a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2 * len(reports), 5), layout="constrained", dpi=130)
    for axes, report in zip(figure.subplots(1, len(reports), squeeze=False)[0], reports, strict=True):
        variants, joined = report["variants"], set()
        for rule, kind in LINES.items():
            names = [name for name in (rule, *(f"{rule}-{n}" for n in (2, 4, 8))) if name in variants]
            colour, label = KINDS[kind]
            points = [(variants[name]["runs"][0]["trained"], _distances(variants[name])) for name in names]
            if points:
                means = [statistics.mean(values) for _, values in points]
                deviations = [statistics.stdev(values) if len(values) > 1 else 0 for _, values in points]
                numbers = [number for number, _ in points]
                axes.errorbar(numbers, means, deviations, color=colour, marker="o", lw=2, capsize=3, label=label)
            joined |= set(names)
        for name, variant in variants.items():
            if name not in joined:
                colour = KINDS[variant["kind"]][0]
                at = variant["runs"][0]["trained"], statistics.mean(_distances(variant))
                axes.plot(*at, "s", color=colour, ms=4)
                axes.annotate(
                    variant["label"], at, xytext=(4, 2), textcoords="offset points", fontsize=6, color=colour
                )
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel("trained numbers beside the class table")
        axes.set_ylabel(f"{report['distance_name']}: less is better")
        axes.set_title(f"{report['settings']['preset']}, {report['settings']['steps']:,} updates", fontsize=11)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    _write(figure, picture)


def _distances(variant: dict) -> list[float]:
    return [run["distance"] for run in variant["runs"]]


def _write(figure, picture: Path) -> None:
    png = io.BytesIO()
    figure.savefig(png, format="png")
    write_bytes(picture, png.getvalue())
