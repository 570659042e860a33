"""What eval_fid.py reports: with every number its features, its reference, its sampler, and what it is worth."""

from collections.abc import Iterable
from dataclasses import asdict

from onelora_diffusion.evaluation.judge import Measured
from onelora_diffusion.evaluation.report import format_bytes, format_note, format_table
from onelora_diffusion.evaluation.statistics import Origin, shortage


def section(measured: Measured, reference: Measured, results: dict[str, dict]) -> dict:
    """The numbers by one kind of features, what was compared with what, and what takes from their worth."""
    origin, sets = measured.origin, {"generated": measured.statistics, "reference": reference.statistics}
    return {
        "distance_name": origin.distance_name,
        "features": {
            "name": origin.features,
            "num_features": measured.statistics.num_features,
            "extractor": origin.extractor,
            "resize": origin.resize,
            "antialias": False,
        },
        "resolution": origin.resolution,
        "reference": {**asdict(reference.origin), "count": reference.statistics.count},
        "notes": [note for name, each in sets.items() if (note := shortage(each, name))],
        "results": results,
    }


def in_sections(sections: Iterable[dict]) -> dict:
    """The sections of a report: the first is the report's own, more features than one follow as `further`."""
    first, *further = sections
    return {**first, "further": further} if further else first


def describe(origin: Origin, count: int) -> str:
    split = f", {origin.split} split" if origin.split else ""
    return f"{origin.dataset}{split}, {count:,} images of {origin.resolution}x{origin.resolution}, crop: {origin.crop}"


def print_report(report: dict) -> None:
    """The table and what one must know to believe it."""
    results, sections = report["results"], [report, *report.get("further", [])]
    title = f"{report['num_images']:,} images"
    if "sampler" in report:
        title += f" each, {report['sampler']}, {report['num_inference_steps']} steps, {describe_guidance(report)}"
        title += f", seed {report['seed']}"
    rows = {}
    for each in sections:
        rows |= result_rows(each["distance_name"], each["features"]["name"], list(each["results"].values()))
    if report.get("adapter"):
        blank = [""] * (len(results) - 1)
        rows["num_trainable_params"] = [*blank, f"{report['num_trainable_params']:,}"]
        rows["adapter file"] = [*blank, format_bytes(report["adapter_bytes"])]

    notes = []
    for each in sections:
        features, reference = each["features"], dict(each["reference"])
        count = reference.pop("count")
        notes.append(f"Reference: {describe(Origin(**reference), count)}.")
        notes.append(
            f"Features: {features['name']}, {features['num_features']} of them, resize: {features['resize']}."
        )
    warnings = [note for each in sections for note in each["notes"]]
    if report.get("classifier"):
        notes.append(
            f"Recognition: the share read as the class asked for, by a {report['classifier']['description']}."
        )
    if len(results) == 2:
        base_classes = report["num_base_classes"]
        notes.append(
            f"The base knows its own {base_classes} classes: asked for class i, it draws i mod {base_classes}."
        )
    print(f"\n{format_table(title, list(results), rows)}")
    for note in dict.fromkeys(notes + warnings):
        print(format_note(note))
    print(f"{report['seconds']:.0f} s, {format_bytes(report['peak_memory_bytes'])} of memory at most.")


def describe_guidance(report: dict) -> str:
    domain = "domain " if report["guidance"] == "domain" else ""
    channels = f" of {report['guidance_channels']} channels" if report["guidance_channels"] else ""
    interval = " from step {} to {}".format(*report["guidance_interval"]) if report["guidance_interval"] else ""
    return f"{domain}guidance {report['guidance_scale']:g}{channels}{interval}"


def result_rows(distance_name: str, features: str, results: list[dict]) -> dict[str, list[str]]:
    """Rows of the table, a column for each set of images; every metric carries the name of its features."""
    own = "" if distance_name == "FID" else f"({features})"
    rows = {distance_name: [f"{result['distance']:.4f}" for result in results]}
    if "limit" in results[0]:
        for k, count in enumerate(results[0]["limit"]["counts"]):
            rows[f"  N = {count:,}{own}"] = [f"{result['limit']['distances'][k]:.4f}" for result in results]
        rows[f"  N -> infinity{own}"] = [f"{result['limit']['limit']:.4f}" for result in results]
        rows[f"  R2 of its fit{own}"] = [f"{result['limit']['r_squared']:.4f}" for result in results]
    if "kid" in results[0]:
        rows[f"KID{own}"] = [f"{result['kid']:.5f} ± {result['kid_spread']:.5f}" for result in results]
    if "precision" in results[0]:
        rows[f"precision{own}"] = [f"{result['precision']:.3f}" for result in results]
        rows[f"recall{own}"] = [f"{result['recall']:.3f}" for result in results]
    if "inception_score" in results[0]:
        scores = [(result["inception_score"], result["inception_score_spread"]) for result in results]
        rows[f"Inception Score{own}"] = [f"{score:.3f} ± {spread:.3f}" for score, spread in scores]
    if "recognition" in results[0]:
        rows["recognition"] = [f"{result['recognition']:.1%}" for result in results]
    return rows
