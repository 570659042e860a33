"""Measure how close images are to real ones: FID, or a Fréchet distance on other features, named with the number.

    onelora eval-fid                                     # runs/digits beside its base; writes evaluation.json
    onelora eval-fid gen --adapter runs/food101 --num-images 10000 --reference food101.safetensors
    onelora eval-fid ref --dataset food101 --data-root data --split test --output food101.safetensors
    onelora eval-fid calc --images samples.npz --reference food101.safetensors
    accelerate launch --num_processes 2 -m onelora_diffusion.cli.eval_fid gen --num-images 2000

`gen` (also without its name) generates and measures on the fly, nothing on disk; `ref` writes statistics of real
images; `calc` measures a folder of PNG files, an .npz or statistics. Image i depends on --seed and i alone, not on
the number of processes or the batch size. The protocol is in docs/evaluation.md.
"""

import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from onelora_diffusion import OneLoRADiTPipeline, count_trainable, disable_adapter, load_adapter, read_adapter
from onelora_diffusion.command_line import one_line_errors, quieten
from onelora_diffusion.data.defaults import EMBEDDED, defaults_of
from onelora_diffusion.data.table import classes_of
from onelora_diffusion.denoisers import denoiser_of
from onelora_diffusion.devices import peak_memory_bytes
from onelora_diffusion.evaluation.evaluator import Evaluator, check_material, compare, metrics_of_each
from onelora_diffusion.evaluation.images import Source, open_images, share
from onelora_diffusion.evaluation.labels import class_frequencies, draw_labels
from onelora_diffusion.evaluation.measuring import (
    default_for,
    features_of,
    measure,
    real_images,
    references_of,
    statistics_in,
)
from onelora_diffusion.evaluation.metrics import GENERATED, REAL, SPATIAL, needed
from onelora_diffusion.evaluation.recognition import class_numbers, recognition_of
from onelora_diffusion.evaluation.report import format_note, write_json
from onelora_diffusion.evaluation.settings import Calculate, Command, Generate, Reference, Sweep, parse
from onelora_diffusion.evaluation.statistics import Measured, Origin
from onelora_diffusion.evaluation.statistics_file import is_statistics, load_statistics, save_statistics
from onelora_diffusion.evaluation.summary import describe, in_sections, print_report, section
from onelora_diffusion.evaluation.sweep import best_scales, plot_sweep, print_sweep
from onelora_diffusion.families import family_of
from onelora_diffusion.files import check_writable
from onelora_diffusion.launch import start_all_processes
from onelora_diffusion.pipelines.base import load_base, resolution_of
from onelora_diffusion.sampling import SamplerSettings, adapters_merged, generate_images, progress_bar
from onelora_diffusion.storage.adapter_file import WEIGHTS_NAME, AdapterFile


@one_line_errors("eval_fid.py")
def main(settings: Command) -> None:
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    with one_line_errors("eval_fid.py", same_everywhere=True):
        for output in settings.output if isinstance(settings, Reference) else [settings.output]:
            if output:
                check_writable(output)
            elif isinstance(settings, Generate) and settings.adapter:
                check_writable(adapter_file(settings.adapter).with_name("evaluation.json"))
    if isinstance(settings, Generate):
        generate(settings, accelerator)
    elif isinstance(settings, Calculate):
        calculate(settings, accelerator)
    else:
        write_reference(settings, accelerator)


@dataclass(frozen=True)
class Plan:
    """What is generated and with what it is measured, all of it checked.

    Attributes:
        pipeline: the base, its adapter attached and everything on its device.
        adapter: its file; None for the base alone.
        names: of the classes, by label.
        columns: what the report calls a set of images -> the model (`base` or `adapted`) and the settings it draws by.
        labels: of all images, of all processes.
        source: what the generated images are.
        evaluator: measures them.
    """

    settings: Generate
    pipeline: OneLoRADiTPipeline
    adapter: AdapterFile | None
    names: list[str]
    columns: dict[str, tuple[str, Generate]]
    labels: list[int]
    source: Source
    evaluator: Evaluator


def generate(settings: Generate, accelerator: Accelerator) -> None:
    start = time.monotonic()
    with one_line_errors("eval_fid.py", same_everywhere=True):
        plan = make_plan(settings, accelerator)
    results, measured = draw_and_measure(plan, accelerator)
    if accelerator.is_main_process:
        report = make_report(plan, results, measured, accelerator)
        report["seconds"] = time.monotonic() - start
        report["peak_memory_bytes"] = peak_memory_bytes(accelerator.device)
        write_report(plan, report)
    accelerator.wait_for_everyone()


def make_plan(settings: Generate, accelerator: Accelerator) -> Plan:
    """The models, the real images and the classifier of them. ValueError or FileNotFoundError if anything is wrong."""
    if settings.num_images is not None and settings.num_images < 2:
        raise ValueError(f"--num-images {settings.num_images}: a distance between sets needs two or more")
    if settings.images_at_once < 1:
        raise ValueError(f"--images-at-once is {settings.images_at_once}; it must be at least 1")
    settings.check_metrics()
    pipeline, adapter, names = load_models(settings)
    settings.place(pipeline, accelerator.device)
    dataset = settings.dataset or (adapter and adapter.training.get("dataset")) or EMBEDDED
    settings = settings.for_dataset(dataset).for_scheduler(pipeline.scheduler.config)
    columns = columns_of(settings, adapter)
    for _, sampler in columns.values():
        sampler.check(denoiser_of(pipeline), pipeline.scheduler.config)

    source = Source("adapted" if adapter else "base", resolution_of(pipeline))
    default = default_for(dataset, settings.reference)
    features = features_of(settings, default, source.resolution, accelerator)
    numbers = class_numbers(dataset, names)
    if classes_of(dataset) and not (numbers or settings.reference):
        raise ValueError(f"'{names[-1]}' is no class of --dataset {dataset}: give a --reference")
    frequencies = None
    if settings.labels == "dataset":
        real = settings.load(dataset, source.resolution, numbers)
        frequencies = class_frequencies(real, names)
    labels = draw_labels(settings.labels, settings.num_images, len(names), settings.seed, frequencies)
    origins = [Origin.of(each, source) for each in features]
    references = references_of(settings, dataset, origins, features, numbers, accelerator)
    reader = next((each for each in features if each.name == dataset), features[0])
    recognition = recognition_of(dataset, names, reader, source.resolution)
    evaluator = Evaluator(features, references, settings, recognition, accelerator.device)
    return Plan(settings, pipeline, adapter, names, columns, labels, source, evaluator)


def columns_of(settings: Generate, adapter: AdapterFile | None) -> dict[str, tuple[str, Generate]]:
    """Base and adapted, or one guidance after the other, all from the same noise."""
    if isinstance(settings, Sweep):
        return {
            f"{scale:g}": ("adapted" if adapter else "base", replace(settings, guidance_scale=scale))
            for scale in sorted(set(settings.guidance_scales))
        }
    models = (["base"] if settings.compare_base or not adapter else []) + (["adapted"] if adapter else [])
    return {model: (model, settings) for model in models}


def draw_and_measure(plan: Plan, accelerator: Accelerator) -> tuple[dict[str, list[dict]], list[Measured]]:
    """Each column's results by the kinds of features, on the main process; and what the last set of images is.

    Each process draws its share of the images, batch by batch.
    """
    settings, pipeline = plan.settings, plan.pipeline
    indices = share(settings.num_images, accelerator.process_index, accelerator.num_processes)
    results = {}
    family = family_of(pipeline)
    for name, (model, sampler) in plan.columns.items():
        of_base = model == "base"
        labels = [family.of_base(pipeline, label) if of_base else label for label in plan.labels]
        with (
            disable_adapter(denoiser_of(pipeline))
            if plan.adapter and of_base
            else adapters_merged(denoiser_of(pipeline), sampler),
            progress_bar(len(indices), name, disable=not accelerator.is_main_process) as progress,
        ):
            images = generate_images(
                pipeline,
                [labels[index] for index in indices],
                settings.seed,
                indices,
                sampler,
                images_at_once=settings.images_at_once,
                batch_size=settings.batch_size,
                progress=progress.update,
            )
            found = plan.evaluator.measure(images, replace(plan.source, name=model), plan.labels)
        if accelerator.is_main_process:
            results[name] = plan.evaluator.compare(found)
    return results, found.measured


def make_report(
    plan: Plan, results: dict[str, list[dict]], measured: list[Measured], accelerator: Accelerator
) -> dict:
    """All that was found, and all that it depends on."""
    settings, adapter, recognition = plan.settings, plan.adapter, plan.evaluator.recognition
    return {
        **in_sections(
            section(measured[k], reference, {name: found[k] for name, found in results.items()})
            for k, reference in enumerate(plan.evaluator.references)
        ),
        "adapter": str(settings.adapter) if adapter else None,
        "base": settings.base or (adapter and adapter.base) or "miniature",
        "num_classes": len(plan.names),
        "num_base_classes": num_base_classes(plan.pipeline),
        "num_images": settings.num_images,
        "labels": settings.labels,
        "seed": settings.seed,
        **{field.name: getattr(settings, field.name) for field in fields(SamplerSettings)},
        **settings.report(accelerator.device),
        "images_at_once": settings.images_at_once,
        "num_trainable_params": count_trainable(denoiser_of(plan.pipeline)) if adapter else None,
        "adapter_bytes": adapter_file(settings.adapter).stat().st_size if adapter else None,
        "classifier": recognition
        and {"description": recognition.classifier.describe(), "accuracy": recognition.classifier.accuracy},
    }


def write_report(plan: Plan, report: dict) -> None:
    """Print the table, and write the JSON and the plot."""
    is_sweep = isinstance(plan.settings, Sweep)
    folder = adapter_file(plan.settings.adapter).parent if plan.adapter else Path()
    output = plan.settings.output or folder / ("sweep.json" if is_sweep else "evaluation.json")
    if is_sweep:
        report["best"] = best_scales(report)
        print_sweep(report)
        write_json(output, report)
        plot_sweep(report, output.with_suffix(".png"))
    else:
        print_report(report)
        write_json(output, report)
    print(output)


def adapter_file(path: Path) -> Path:
    return path if path.suffix == ".safetensors" else path / WEIGHTS_NAME


def calculate(settings: Calculate, accelerator: Accelerator) -> None:
    start = time.monotonic()
    with one_line_errors("eval_fid.py", same_everywhere=True):
        settings.check_metrics()
        if not (settings.reference or settings.dataset):
            raise ValueError("calc compares images with others: give them by --reference, or a data set by --dataset")
        needs = needed(settings.metrics)
        is_filed = is_statistics(settings.images)
        images = load_statistics(settings.images).origin if is_filed else open_images(settings.images)
        default = default_for(settings.dataset, (settings.images, *settings.reference))
        if is_filed and set(settings.features) - {default}:
            raise ValueError(f"'{settings.images}' is statistics of {images.features}: leave --features out")
        both_filed = is_filed and settings.reference and all(map(is_statistics, settings.reference))
        measures_images = not both_filed or {GENERATED, REAL} & needs  # at real images, or at those beside statistics
        features = features_of(settings, default, images.resolution, accelerator) if measures_images else [None]
        if is_filed:
            measured = [statistics_in(settings.images, features, settings, accelerator, GENERATED)]
            origins = [each.origin for each in measured]
        else:
            origins = [Origin.of(each, images) for each in features]
        references = references_of(settings, settings.dataset, origins, features, None, accelerator)
        metrics = metrics_of_each(settings.metrics, features)
        for asked, reference in zip(metrics, references, strict=True):
            check_material(asked, reference, "reference")
        if not is_filed:
            keep, spatial = GENERATED in needs, SPATIAL in needs
            measured = measure(images, features, settings.batch_size, accelerator, keep, spatial)
        for asked, each in zip(metrics, measured, strict=True):
            check_material(asked, each, "images")

    if accelerator.is_main_process:
        name = Path(measured[0].origin.dataset).name
        report = {
            **in_sections(
                section(one, other, {name: compare(one, other, asked, each, settings)})
                for one, other, asked, each in zip(measured, references, metrics, features, strict=True)
            ),
            "num_images": measured[0].statistics.count,
            "seconds": time.monotonic() - start,
            "peak_memory_bytes": peak_memory_bytes(accelerator.device),
        }
        print_report(report)
        if settings.output:
            write_json(settings.output, report)
            print(settings.output)
    accelerator.wait_for_everyone()


def write_reference(settings: Reference, accelerator: Accelerator) -> None:
    with one_line_errors("eval_fid.py", same_everywhere=True):
        for output in settings.output:
            if output.suffix not in (".safetensors", ".npz"):
                raise ValueError(f"--output {output}: statistics are a .safetensors file, or an .npz in ADM's layout")
        dataset = settings.dataset or EMBEDDED
        resolution = settings.resolution or defaults_of(dataset).resolution
        images = real_images(settings, settings.images, dataset, resolution)
        features = features_of(settings, default_for(dataset, ()), images.resolution, accelerator)
        if len(features) != len(settings.output):
            raise ValueError(f"{len(features)} --features need as many files, not {len(settings.output)} --output")
        keep = settings.keep_features
        if keep and any(output.suffix == ".npz" for output in settings.output):
            raise ValueError(
                "--keep-features needs a .safetensors file: the .npz of ADM's evaluator has no place for them"
            )
        measured = measure(images, features, settings.batch_size, accelerator, keep=keep, spatial=True)
    if accelerator.is_main_process:
        for output, each in zip(settings.output, measured, strict=True):
            save_statistics(output, each)
            print(format_note(f"{output}: {describe(each.origin, each.statistics.count)}"))
            for note in each.notes:
                print(format_note(note))
    accelerator.wait_for_everyone()


def load_models(settings: Generate):
    """The base with its adapter attached, the adapter's file (None without one), and the names of the classes."""
    adapter = read_adapter(settings.adapter) if settings.adapter else None
    named_by = None if settings.base else settings.adapter
    pipeline = load_base(settings.base or (adapter and adapter.base), named_by)
    if adapter:
        load_adapter(denoiser_of(pipeline), settings.adapter)
    names = {label: name for name, label in pipeline.labels.items()}
    if adapter and adapter.config.num_classes:
        names = adapter.id2label
    num_classes = (adapter and adapter.config.num_classes) or num_base_classes(pipeline)
    return pipeline, adapter, [names.get(label, str(label)) for label in range(num_classes)]


def num_base_classes(pipeline) -> int:
    return pipeline.transformer.config.num_embeds_ada_norm


def run(arguments: list[str]) -> None:
    """What the command does, with the words that follow it."""
    start_all_processes()
    quieten()
    with one_line_errors("eval_fid.py", same_everywhere=True):
        settings = parse(arguments, __doc__)
    main(settings)


if __name__ == "__main__":
    run(sys.argv[1:])
