"""What `benchmark.py compare` shows: a table like the paper's Table S8, bubbles like its Figure 5, curves, samples."""

import math
import statistics
from pathlib import Path

import numpy as np

from benchmarks.compare_run import run_file
from onelora_diffusion.evaluation.report import write_json
from onelora_diffusion.files import write_bytes
from onelora_diffusion.training.stopping import parse_duration

NAMES = {
    "1lora": "1LoRA",
    "bitfit": "BitFit",
    "difffit": "DiffFit",
    "mora1": "MoRA 1",
    "mora6": "MoRA 6",
    "lora": "LoRA",
    "dora": "DoRA",
    "vera": "VeRA",
    "full": "all weights",
    "1lora (sum False)": "class table alone",
    "1lora (sum False, scale True)": "γ",
    "1lora (bias True)": "1LoRA, β",
    "1lora (scale True)": "1LoRA, γ",
    "1lora (bias True, scale True)": "1LoRA, β, γ",
    "1lora (rates_by_sum True)": "1LoRA, rates by sum",
    "1lora (compression random)": "1LoRA, at random",
    "1lora (compression outputs, rates_by_sum True)": "1LoRA, outputs",
    "1lora (compression singular, rank 4, rates_by_sum True)": "1LoRA, four of W0",
    "peft:miss": "MiSS r=1",
    "peft:fourierft": "FourierFT",
    "peft:waveft": "WaveFT",
    "peft:road": "RoAd",
    "peft:ia3": "IA³",
    "peft:unilora": "UniLoRA",
    "peft:tinylora": "TinyLoRA",
}


def name_of(method: str) -> str:
    """A method's label as it is printed; PEFT's tuners go without their settings, which are in the JSON."""
    tuner = method.split(" ")[0] if method.startswith("peft:") else method
    return NAMES.get(tuner, method)


def write_report(results: dict, folder: Path, name: str) -> list[Path]:
    """Write `name`.md, .json, and as PNG the bubbles, the curves and the samples; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = summarise(results)
    pictures = []
    if any(row["failed"] is None for row in rows):
        pictures = [folder / f"{name}{suffix}.png" for suffix in ("", "-curves", "-samples")]
        plot_bubbles(rows, results, pictures[0])
        plot_curves(rows, results, pictures[1])
        plot_samples(rows, results, pictures[2])
    table, numbers = folder / f"{name}.md", folder / f"{name}.json"
    write_bytes(table, markdown(rows, results, [picture.name for picture in pictures]).encode())
    write_json(numbers, results | {"summary": rows})
    return [table, numbers, *pictures]


def summarise(results: dict) -> list[dict]:
    """A row a method, best distance first: (mean, deviation over the seeds) of each number; failures last."""
    rows, beside = [], results["runs"].get("1lora", [])
    for method, runs in results["runs"].items():
        row = {"method": method, "learning_rate": results["learning_rates"][method], "seeds": len(runs)}
        row["failed"] = next((run["failed"] for run in runs if run["failed"]), None)
        if row["failed"] is None:
            for key in (
                "distance",
                "time_to_best_s",
                "step_seconds",
                "steps",
                "memory_before_bytes",
                "peak_memory_bytes",
                "saved_bytes",
            ):
                row[key] = mean_and_deviation([run[key] for run in runs])
            if beside and not any(run["failed"] for run in beside):  # seed by seed: the same batches and sample noise
                pairs = zip(runs, beside, strict=True)
                row["ratio"] = mean_and_deviation([run["distance"] / ours["distance"] for run, ours in pairs])
            if runs[0]["recognition"] is not None:
                best = [min(run["evaluations"], key=lambda each: each["distance"]) for run in runs]
                row["recognition"] = mean_and_deviation([each["recognition"] for each in best])
            row["num_trainable_params"] = runs[0]["num_trainable_params"]
            row["adapter_bytes"] = runs[0]["adapter_bytes"]
        rows.append(row)
    return sorted(rows, key=lambda row: (row["failed"] is not None, row.get("distance", (0,))[0]))


# ---------------------------------------------------------------------------------------------------
# Table


def markdown(rows: list[dict], results: dict, pictures: list[str]) -> str:
    settings, inputs = results["settings"], results["inputs"]
    unit, seconds = time_unit(results)
    memory, bytes_ = ("GB", 1e9) if largest(rows, "peak_memory_bytes") > 3e9 else ("MB", 1e6)
    distance = inputs["distance_name"]
    recognised = any("recognition" in row for row in rows)
    digits = decimals([row["distance"][0] for row in rows if not row["failed"]])
    paired = any("ratio" in row for row in rows)
    head = ["method", f"time to best [{unit}]", distance, *["x 1LoRA"] * paired, f"peak memory [{memory}]"]
    head += ["trainable", "step [ms]"]
    head += ["steps", "kept for backward [MB]", "file [kB]", "learning rate", *(["recognition"] * recognised)]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row in rows:
        name = name_of(row["method"])
        if row["failed"]:
            cells = [name, row["failed"], *[""] * (len(head) - 2)]
        else:
            cells = [
                name,
                spread(row["time_to_best_s"], 1 / seconds, 1),
                spread(row["distance"], 1, digits),
                *([spread(row["ratio"], 1, 2)] if paired else []),
                spread(row["peak_memory_bytes"], 1 / bytes_, 1 if memory == "GB" else 0),
                f"{row['num_trainable_params']:,}",
                spread(row["step_seconds"], 1000, 1),
                f"{row['steps'][0]:,.0f}",
                f"{row['saved_bytes'][0] / 1e6:,.1f}",
                f"{row['adapter_bytes'] / 1e3:,.1f}",
                f"{row['learning_rate']:g}",
                *([spread(row["recognition"], 100, 1) + " %"] if recognised else []),
            ]
        lines.append("| " + " | ".join(cells) + " |")

    seeds = ", ".join(map(str, settings["seeds"]))
    over = "mean ± standard deviation over the seeds; " if len(settings["seeds"]) > 1 else ""
    images = f"{settings['num_images']:,}"
    machines = [run["machine"] for runs in results["runs"].values() for run in runs]
    machine, loads = machines[0], [each["load"] for each in machines]
    notes = [
        f"Budget {settings['max_train_time']} of training a run, batch {settings['batch_size']}, seeds {seeds}; {over}"
        f"evaluations every {settings['eval_every']}, not counted in the budget.",
        f"{distance} of {images} samples of the averaged adapter (DDIM, {settings['num_inference_steps']} steps, "
        f"guidance {settings['guidance_scale']:g}) to the {inputs['reference_count']:,} real images of the split "
        f"{settings['reference_split']}. Training images that went through the autoencoder alone: "
        f"{inputs['autoencoder_distance']:.{digits}f}.",
        *["x 1LoRA: distance over that of 1LoRA with the same seed: the same batches and sample noise."] * paired,
        *inputs["notes"],
        f"Machine: {machine['processor']}, {machine['cores']} cores; {settings['jobs']} runs at a time, "
        f"{machine['threads']} threads each; PyTorch {machine['torch']}; load when a run began "
        f"{min(loads):.1f} to {max(loads):.1f}.",
        "Peak memory is that of the device."
        if machine["memory_bytes"]
        else "Peak memory is the largest resident set of a process between its first step and its first evaluation; "
        f"{largest(rows, 'memory_before_bytes') / bytes_:,.{1 if memory == 'GB' else 0}f} {memory} of it at most were "
        "there before: libraries, base, data.",
        "Kept for backward: bytes that autograd holds between forward and backward, the model's own left out.",
    ]
    text = [f"# Comparison: {settings['preset']}", "", *lines, "", *(f"- {note}" for note in notes), ""]
    text += [f"![{name.removesuffix('.png')}]({name})\n" for name in pictures]
    text += sweep_table(results)
    return "\n".join(text).rstrip() + "\n"


def sweep_table(results: dict) -> list[str]:
    """Distance at the end of each short run, the rate that is taken in bold; then what decided it."""
    if not any(results["sweep"].values()):
        return [f"Learning rate {results['settings']['sweep_rates'][0]:g} for all, without a sweep."]
    found = [run["distance"] for own in results["sweep"].values() for run in own.values() if not run["failed"]]
    digits = decimals(found)
    rates = sorted({rate for own in results["sweep"].values() for rate in own}, key=float)
    lines = ["| method | " + " | ".join(rates) + " |", "|---|" + "---:|" * len(rates)]
    for method, own in results["sweep"].items():
        cells = []
        for rate in rates:
            text = ""
            if rate in own:
                text = own[rate]["failed"] and "failed" or f"{own[rate]['distance']:.{digits}f}"
            if text and float(rate) == results["learning_rates"][method]:
                text = f"**{text}**"
            cells.append(text)
        lines.append(f"| {name_of(method)} | " + " | ".join(cells) + " |")
    settings, chosen = results["settings"], results["learning_rates"]
    extra = settings["sweep_extra"]
    at_the_edge = [
        name_of(method)
        for method, own in results["sweep"].items()
        if chosen[method] in (min(map(float, own)), max(map(float, own)))
    ]
    note = f"Still at the edge of what it tried, so perhaps not at its best: {', '.join(at_the_edge)}."
    return [
        f"Learning rates: {results['inputs']['distance_name']} after {settings['sweep_time']} of training, seed "
        f"{settings['seeds'][0]}. Every method tries the same {len(settings['sweep_rates'])}; one whose best lies at "
        f"the edge tries up to {extra} further outward; in bold the one that is taken. The class table's rate is "
        + ("the method's." if (rate := settings["class_learning_rate"]) is None else f"{rate:g} in every run."),
        "",
        *lines,
        "",
        f"The same after {settings['max_train_time']}: a short run favours rates that are quick at first, so the next "
        "lower one is tried as well, and the better of the two is taken.",
        "",
        *finals_table(results, digits),
        *(["", note] if at_the_edge else []),
    ]


def finals_table(results: dict, digits: int) -> list[str]:
    """Distance of the first seed's whole runs, at the best rate of the short ones and at the next lower one."""
    lines = ["| method | next lower rate | best of the short runs |", "|---|---:|---:|"]
    for method, own in results["finals"].items():
        cells = [
            f"{rate}: {run['failed'] or format(run['distance'], f'.{digits}f')}"
            for rate, run in sorted(own.items(), key=lambda item: float(item[0]))
        ]
        lines.append(f"| {name_of(method)} | " + " | ".join([""] * (2 - len(cells)) + cells) + " |")
    return lines


def mean_and_deviation(values: list[float]) -> tuple[float, float | None]:
    """Mean, and the sample standard deviation where there are two values or more."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def spread(value: tuple[float, float | None], factor: float, digits: int) -> str:
    mean, deviation = value
    text = f"{mean * factor:,.{digits}f}"
    return text if deviation is None else f"{text} ± {deviation * factor:,.{digits}f}"


def largest(rows: list[dict], key: str) -> float:
    return max((row[key][0] for row in rows if not row["failed"]), default=0.0)


def decimals(values: list[float]) -> int:
    """How many leave three significant digits of the smallest value."""
    return max(0, 2 - math.floor(math.log10(max(min(values, default=1.0), 1e-9))))


def time_unit(results: dict) -> tuple[str, float]:
    budget = parse_duration(results["settings"]["max_train_time"])
    return ("h", 3600.0) if budget > 7200 else ("min", 60.0) if budget > 600 else ("s", 1.0)


# ---------------------------------------------------------------------------------------------------
# Plots


def figure(*args, **kwargs):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(*args, layout="constrained", **kwargs)
    FigureCanvasAgg(made)
    return made


def colours(rows: list[dict]) -> dict[str, tuple]:
    """A colour a method, in the order of the settings, so that it stays the same from plot to plot."""
    import matplotlib

    palette = matplotlib.colormaps["tab10" if len(rows) <= 10 else "tab20"]
    return {method: palette(index % palette.N) for index, method in enumerate(sorted(row["method"] for row in rows))}


def plot_bubbles(rows: list[dict], results: dict, path: Path) -> None:
    """Time to best against distance, bubbles by trained parameters; memory as bars beside it."""
    shown = [row for row in rows if row["failed"] is None]
    colour, (unit, seconds) = colours(rows), time_unit(results)
    drawn = figure(figsize=(11.5, 5.2), dpi=130)
    left, right = drawn.subplots(1, 2, width_ratios=(2.6, 1))

    most = max(row["num_trainable_params"] for row in shown)
    times = np.array([row["time_to_best_s"][0] / seconds for row in shown])
    distances = np.array([row["distance"][0] for row in shown])
    for row, time, distance in zip(shown, times, distances, strict=True):
        size = max(25.0, 1500 * row["num_trainable_params"] / most)
        bars = {"xerr": row["time_to_best_s"][1], "yerr": row["distance"][1]}
        bars["xerr"] = bars["xerr"] and bars["xerr"] / seconds
        left.errorbar(time, distance, **bars, color=colour[row["method"]], alpha=0.5, lw=1, zorder=1)
        left.scatter(time, distance, s=size, color=colour[row["method"]], alpha=0.55, edgecolor="black", lw=0.6)
    # Room for the labels in a column to the right, where they cannot cover a bubble or each other.
    low, high = 0.0, 1.02 * times.max()
    left.set_xlim(low, high + 0.6 * (high - low))
    left.set_yscale("log")
    bottom, top = np.log10(left.get_ylim())
    bottom, top = bottom - 0.05 * (top - bottom), top + 0.05 * (top - bottom)
    left.set_ylim(10**bottom, 10**top)
    heights = 10 ** pushed_apart(np.log10(distances), 0.062 * (top - bottom), bottom, top)
    for row, time, distance, height in zip(shown, times, distances, heights, strict=True):
        left.annotate(
            f"{name_of(row['method'])}  ({short_count(row['num_trainable_params'])})",
            (time, distance),
            xytext=(high + 0.06 * (high - low), height),
            va="center",
            fontsize=9,
            color="black",
            arrowprops={"arrowstyle": "-", "lw": 0.7, "color": colour[row["method"]], "relpos": (0, 0.5)},
        )
    left.set_xlabel(f"training time to best [{unit}]")
    show_plain_numbers(left.yaxis)
    left.set_ylabel(f"{results['inputs']['distance_name']}, lower is better, log scale")
    left.set_title(f"{results['settings']['preset']}: area of a bubble = trained parameters", fontsize=10)
    left.grid(alpha=0.25, which="both")

    names = [name_of(row["method"]) for row in shown]
    before, peak = (
        np.array([row[key][0] / 1e6 for row in shown]) for key in ("memory_before_bytes", "peak_memory_bytes")
    )
    right.barh(names, before, color="lightgrey")
    bars = right.barh(names, peak - before, left=before, color=[colour[row["method"]] for row in shown], alpha=0.7)
    right.bar_label(bars, [f"{total:,.0f}" for total in peak], padding=3, fontsize=8)
    right.set_xlim(0, max(peak) * 1.25)
    right.invert_yaxis()
    right.set_xlabel("peak memory [MB]")
    right.set_title("grey: before training", fontsize=10)
    drawn.savefig(path)


def show_plain_numbers(axis) -> None:
    """90 instead of 9 x 10^1 along a logarithmic axis."""
    from matplotlib.ticker import StrMethodFormatter

    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(StrMethodFormatter("{x:g}"))


def pushed_apart(values: np.ndarray, gap: float, bottom: float, top: float) -> np.ndarray:
    """Heights in the order of `values` and near them, at least `gap` apart, moved inside the axis."""
    order = np.argsort(values)
    heights = values[order].astype(float)
    for _ in range(500):
        for index in range(len(heights) - 1):
            missing = gap - (heights[index + 1] - heights[index])
            if missing > 0:
                heights[index] -= missing / 2
                heights[index + 1] += missing / 2
    low, high = bottom + gap, top - gap
    for index in range(len(heights)):  # up from the bottom, then down from the top
        heights[index] = max(heights[index], low)
        low = heights[index] + gap
    for index in reversed(range(len(heights))):
        heights[index] = min(heights[index], high)
        high = heights[index] - gap
    placed = np.empty_like(heights)
    placed[order] = heights
    return placed


def plot_curves(rows: list[dict], results: dict, path: Path) -> None:
    """Distance against training time: the mean of the seeds, with the range of them as a band."""
    colour, (unit, seconds) = colours(rows), time_unit(results)
    drawn = figure(figsize=(8.5, 5), dpi=130)
    axes = drawn.subplots()
    top = 0.0
    for row in (row for row in rows if row["failed"] is None):
        runs = [run["evaluations"] for run in results["runs"][row["method"]]]
        runs = [evaluations[: min(map(len, runs))] for evaluations in runs]
        times = np.mean([[each["seconds"] for each in evaluations] for evaluations in runs], axis=0) / seconds
        values = np.array([[each["distance"] for each in evaluations] for evaluations in runs])
        name, top = name_of(row["method"]), max(top, values[:, 0].max())
        axes.plot(times, values.mean(0), marker="o", ms=3, color=colour[row["method"]], label=name)
        axes.fill_between(times, values.min(0), values.max(0), color=colour[row["method"]], alpha=0.15, lw=0)
    axes.set_yscale("log")
    axes.set_ylim(top=1.2 * top)  # a run that goes astray leaves the plot and does not squeeze the others
    show_plain_numbers(axes.yaxis)
    axes.set_xlabel(f"training time [{unit}]")
    axes.set_ylabel(f"{results['inputs']['distance_name']}, log scale")
    axes.grid(alpha=0.25, which="both")
    drawn.legend(loc="outside right upper", fontsize=9, title="best first")
    drawn.savefig(path)


def plot_samples(rows: list[dict], results: dict, path: Path) -> None:
    """The first samples of every method's best evaluation, from the same noise, seed by seed the first."""
    from PIL import Image

    runs, seed = Path(results["settings"]["output_dir"]), results["settings"]["seeds"][0]
    shown = [row for row in rows if row["failed"] is None]
    drawn = figure(figsize=(9, 0.82 * len(shown)), dpi=130)
    for axes, row in zip(np.atleast_1d(drawn.subplots(len(shown), 1)), shown, strict=True):
        picture = run_file(runs, row["method"], row["learning_rate"], seed).with_suffix(".png")
        axes.imshow(Image.open(picture), interpolation="nearest")
        axes.set_axis_off()
        axes.text(-0.02, 0.5, name_of(row["method"]), transform=axes.transAxes, ha="right", va="center")
    drawn.savefig(path)


def short_count(number: int) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.2f}{letter}"
    return str(number)
