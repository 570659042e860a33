"""The report of eval_fid.py: each number with its features, reference and sampler, and notes on its reliability."""

import itertools
from collections.abc import Iterable
from dataclasses import asdict

from onelora_diffusion.devices import in_words
from onelora_diffusion.evaluation.metrics import METRICS, all_shown
from onelora_diffusion.evaluation.report import format_bytes, format_note, format_table, format_tables
from onelora_diffusion.evaluation.statistics import Measured, Origin, shortage

LABELS = {"turns": "", "random": ", random labels", "dataset": ", labels as frequent as in the data set"}


def section(measured: Measured, reference: Measured | None, results: dict[str, dict]) -> dict:
    """The numbers by one kind of features, the compared sets, and notes that limit what the numbers mean."""
    origin, compared = measured.origin, {"generated": measured, "reference": reference}
    sets = {name: each for name, each in compared.items() if each}
    notes = [note for each in sets.values() for note in each.notes]
    for metric, result in itertools.product(METRICS.values(), results.values()):
        if metric.shown.keys() <= result.keys() and (note := metric.note_of(result)):
            notes.append(note)
    sizes = [each.origin.resolution for each in sets.values() if each.origin.resolution]
    if len(set(sizes)) > 1:
        notes.append(
            f"The images have {sizes[0]}x{sizes[0]} pixels, those of the reference {sizes[1]}x{sizes[1]}: the "
            "distance is also one between sharper and blurrier images."
        )
    if any("distance" in result for result in results.values()):
        notes += [note for name, each in sets.items() if (note := shortage(each.statistics, name))]
    notes = list(dict.fromkeys(notes))
    return {
        "distance_name": origin.distance_name,
        "features": {
            "name": origin.features,
            "num_features": measured.statistics.num_features,
            "extractor": origin.extractor,
            "resize": origin.resize,
            "antialias": "antialias=True" in origin.resize,
        },
        "resolution": origin.resolution,
        "reference": reference and {**asdict(reference.origin), "count": reference.statistics.count},
        "notes": notes,
        "results": results,
    }


def in_sections(sections: Iterable[dict]) -> dict:
    """Put sections into a report: the first one at the top level, and those of further features under `further`."""
    first, *further = sections
    return {**first, "further": further} if further else first


def describe(origin: Origin, count: int | None) -> str:
    if not origin.is_told:
        return f"{origin.dataset}, mean and covariance as another tool wrote them: images, crop, resize are not told"
    split, side = f"{origin.split} split" if origin.split else "no split", origin.resolution
    return f"{origin.dataset}, {split}, {count:,} images of {side}x{side}, crop: {origin.crop}"


def print_report(report: dict) -> None:
    """Print the table and the notes that are needed to judge it."""
    results, count = report["results"], report["num_images"]
    title = "images of a file" if count is None else f"{count:,} images"
    if "sampler" in report:
        title += f" each, {report['sampler'] or 'own sampler'}, {report['num_inference_steps']} steps"
        title += f", {describe_guidance(report)}, seed {report['seed']}" + LABELS[report["labels"]]
    rows = {name: row for each in sections_of(report) for name, row in result_rows(each).items()}
    if report.get("adapter"):
        blank = [""] * (len(results) - 1)
        rows["num_trainable_params"] = [*blank, f"{report['num_trainable_params']:,}"]
        rows["adapter file"] = [*blank, format_bytes(report["adapter_bytes"])]
    if adapters := report.get("adapters", {}):
        sizes = {name: f"{each['num_trainable_params']:,}" for name, each in adapters.items()}
        rows["trained"] = [sizes.get(name, "") for name in results]

    notes = notes_of(report)
    if classifier := report.get("classifier"):
        notes.append(f"Recognition: the share read as the class asked for, by a {classifier['description']}.")
    if "images_at_once" in report:
        notes.append(f"Generated in {in_words(report)}, {report['images_at_once']} images at once.")
    if len(results) > 1 and (num_base := report.get("num_base_classes")):
        notes.append(f"The base knows its own {num_base} classes: asked for class i, it draws i mod {num_base}.")
    table = format_tables(title, list(results), rows) if adapters else format_table(title, list(results), rows)
    print(f"\n{table}")
    print_notes(report, notes)


def print_notes(report: dict, notes: list[str]) -> None:
    """Print notes, those that limit what the numbers mean, and how long they took."""
    on_worth = dict.fromkeys(note for each in sections_of(report) for note in each["notes"])
    for note in [*notes, *on_worth]:
        print(format_note(note))
    print(f"{report['seconds']:.0f} s, {format_bytes(report['peak_memory_bytes'])} of memory at most.")


def sections_of(report: dict) -> list[dict]:
    return [report, *report.get("further", [])]


def notes_of(report: dict) -> list[str]:
    """The reference and the settings of each kind of features."""
    notes = []
    for each in sections_of(report):
        kind, reference = each["features"], dict(each["reference"] or {})
        if reference:
            count = reference.pop("count")
            notes.append(f"Reference: {describe(Origin(**reference), count)}.")
        notes.append(f"Features: {kind['name']}, {kind['num_features']} of them, resize: {kind['resize']}.")
    return list(dict.fromkeys(notes))


def describe_guidance(report: dict) -> str:
    domain = "domain " if report["guidance"] == "domain" else ""
    channels = f" of {report['guidance_channels']} channels" if report["guidance_channels"] else ""
    interval = " from step {} to {}".format(*report["guidance_interval"]) if report["guidance_interval"] else ""
    return f"{domain}guidance {report['guidance_scale']:g}{channels}{interval}"


def names_of(part: dict) -> dict[str, str]:
    """The name in tables of each number of a section's results, by its key."""
    first = next(iter(part["results"].values()))
    names = part["features"]["name"], part["features"]["extractor"]
    return {key: shown.titled(*names) for key, shown in all_shown().items() if key in first}


def result_rows(part: dict) -> dict[str, list[str]]:
    """The table rows of a section, with a value for each set of images."""
    results, shown = list(part["results"].values()), all_shown()
    rows = {name: [shown[key].format.format(**result) for result in results] for key, name in names_of(part).items()}
    for metric in METRICS.values():
        rows |= metric.rows(results, part["distance_name"])
    return rows
