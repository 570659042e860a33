"""What eval_fid.py reports: with every number its features, its reference, its sampler, and what it is worth."""

from collections.abc import Iterable
from dataclasses import asdict

from onelora_diffusion.devices import in_words
from onelora_diffusion.evaluation.judge import Measured
from onelora_diffusion.evaluation.report import format_bytes, format_note, format_table
from onelora_diffusion.evaluation.statistics import Origin, shortage


def section(measured: Measured, reference: Measured, results: dict[str, dict]) -> dict:
    """The numbers by one kind of features, what was compared with what, and what takes from their worth."""
    origin, sets = measured.origin, {"generated": measured.statistics, "reference": reference.statistics}
    notes = [note for name, each in sets.items() if (note := shortage(each, name))]
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
        "reference": {**asdict(reference.origin), "count": reference.statistics.count},
        "notes": notes,
        "results": results,
    }


def in_sections(sections: Iterable[dict]) -> dict:
    """The sections of a report: the first is the report's own, more features than one follow as `further`."""
    first, *further = sections
    return {**first, "further": further} if further else first


def describe(origin: Origin, count: int | None) -> str:
    if not origin.is_told:
        return (
            f"{origin.dataset}, mean and covariance as another tool wrote them: images, crop and resize are not told"
        )
    split = f"{origin.split} split" if origin.split else "no split"
    images = f"{count:,} images of {origin.resolution}x{origin.resolution}"
    return f"{origin.dataset}, {split}, {images}, crop: {origin.crop}"


def print_report(report: dict) -> None:
    """The table and what one must know to believe it."""
    results, sections = report["results"], sections_of(report)
    count = report["num_images"]
    title = "images of a file" if count is None else f"{count:,} images"
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

    notes = notes_of(report)
    if report.get("classifier"):
        notes.append(
            f"Recognition: the share read as the class asked for, by a {report['classifier']['description']}."
        )
    if "images_at_once" in report:
        notes.append(f"Generated in {in_words(report)}, {report['images_at_once']} images at once.")
    if len(results) == 2:
        base_classes = report["num_base_classes"]
        notes.append(
            f"The base knows its own {base_classes} classes: asked for class i, it draws i mod {base_classes}."
        )
    print(f"\n{format_table(title, list(results), rows)}")
    for note in notes + list(dict.fromkeys(note for each in sections for note in each["notes"])):
        print(format_note(note))
    print(f"{report['seconds']:.0f} s, {format_bytes(report['peak_memory_bytes'])} of memory at most.")


def sections_of(report: dict) -> list[dict]:
    return [report, *report.get("further", [])]


def notes_of(report: dict) -> list[str]:
    """What each kind of features compared with, and how it looked."""
    notes = []
    for each in sections_of(report):
        features, reference = each["features"], dict(each["reference"])
        count = reference.pop("count")
        notes.append(f"Reference: {describe(Origin(**reference), count)}.")
        notes.append(
            f"Features: {features['name']}, {features['num_features']} of them, resize: {features['resize']}."
        )
    return list(dict.fromkeys(notes))


def describe_guidance(report: dict) -> str:
    domain = "domain " if report["guidance"] == "domain" else ""
    channels = f" of {report['guidance_channels']} channels" if report["guidance_channels"] else ""
    interval = " from step {} to {}".format(*report["guidance_interval"]) if report["guidance_interval"] else ""
    return f"{domain}guidance {report['guidance_scale']:g}{channels}{interval}"


def names_of(distance_name: str, features: str) -> dict[str, str]:
    """What a table calls each metric: all but those of Inception-2015 carry the name of their features."""
    own = "" if distance_name == "FID" else f"({features})"
    return {
        "distance": distance_name,
        "sfid": f"sF{'I' if distance_name == 'FID' else ''}D{own}",
        "kid": f"KID{own}",
        "precision": f"precision{own}",
        "recall": f"recall{own}",
        "density": f"density{own}",
        "coverage": f"coverage{own}",
        "inception_score": f"Inception Score{own}",
        "recognition": "recognition",
    }


FORMATS = {
    "distance": "{distance:.4f}",
    "sfid": "{sfid:.4f}",
    "kid": "{kid:.5f} ± {kid_spread:.5f}",
    "precision": "{precision:.3f}",
    "recall": "{recall:.3f}",
    "density": "{density:.3f}",
    "coverage": "{coverage:.3f}",
    "inception_score": "{inception_score:.3f} ± {inception_score_spread:.3f}",
    "recognition": "{recognition:.1%}",
}


def result_rows(distance_name: str, features: str, results: list[dict]) -> dict[str, list[str]]:
    """Rows of the table, a column for each set of images."""
    names = names_of(distance_name, features)
    rows = {
        names[key]: [shape.format(**result) for result in results]
        for key, shape in FORMATS.items()
        if key in results[0]
    }
    if "limit" in results[0]:
        limits = [result["limit"] for result in results]
        for k, count in enumerate(limits[0]["counts"]):
            rows[f"{distance_name}, N = {count:,}"] = [f"{limit['distances'][k]:.4f}" for limit in limits]
        rows[f"{distance_name}, N -> infinity"] = [f"{limit['limit']:.4f}" for limit in limits]
        rows["  R2 of its fit"] = [f"{limit['r_squared']:.4f}" for limit in limits]
    return rows
