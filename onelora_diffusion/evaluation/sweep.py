"""The report of several strengths of guidance: the table, the best value of each metric, and the plot."""

from pathlib import Path

from onelora_diffusion.evaluation import summary
from onelora_diffusion.evaluation.metrics import all_shown
from onelora_diffusion.evaluation.report import format_table, write_figure


def curves(report: dict) -> dict[str, tuple[str, list[float]]]:
    """(key, value at each strength) of each metric, by its name in tables."""
    return {
        name: (key, [result[key] for result in each["results"].values()])
        for each in summary.sections_of(report)
        for key, name in summary.names_of(each).items()
    }


def best_scales(report: dict) -> dict[str, float]:
    scales = list(map(float, report["results"]))
    return {
        name: scales[values.index(max(values) if all_shown()[key].more_is_better else min(values))]
        for name, (key, values) in curves(report).items()
    }


def print_sweep(report: dict) -> None:
    """Print a column for each strength, and the best strength for each metric."""
    rows = {name: row for each in summary.sections_of(report) for name, row in summary.result_rows(each).items()}
    rows = {name: [cell.split(" ±")[0] for cell in row] for name, row in rows.items()}
    title = f"{report['num_images']:,} images at each guidance, {report['sampler'] or 'own sampler'}, "
    title += f"{report['num_inference_steps']} steps, seed {report['seed']}{summary.LABELS[report['labels']]}"
    print(f"\n{format_table(title, list(report['results']), rows)}")
    best = ", ".join(f"{name} at {scale:g}" for name, scale in report["best"].items())
    summary.print_notes(report, [f"Best: {best}.", *summary.notes_of(report)])


def plot_sweep(report: dict, picture: Path) -> None:
    """Plot each metric over the strength of guidance, with its best value marked, as a PNG."""
    from matplotlib.figure import Figure

    found, scales = curves(report), list(map(float, report["results"]))
    width = min(len(found), 3)
    height = -(-len(found) // width)
    figure = Figure(figsize=(3.4 * width + 0.6, 2.7 * height + 0.3), layout="constrained")
    panels = list(figure.subplots(height, width, squeeze=False, sharex=True).flat)
    for axes, (name, (key, values)) in zip(panels, found.items(), strict=False):
        best = report["best"][name]
        axes.plot(scales, values, marker="o")
        axes.plot(best, values[scales.index(best)], marker="o", markersize=10, color="tab:red", linestyle="")
        better = "most" if all_shown()[key].more_is_better else "least"
        axes.set(title=name, ylabel=f"{better} at {best:g}")
        axes.tick_params(labelbottom=True)
        axes.grid(alpha=0.3)
    for axes in panels[len(found) :]:
        axes.axis("off")
    figure.supxlabel("guidance scale")
    write_figure(picture, figure)
