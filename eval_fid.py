"""Measure how close images are to real ones: FID, or a Fréchet distance on other features, named with the number.

    python eval_fid.py                                     # runs/digits beside its base; writes evaluation.json
    python eval_fid.py gen --adapter runs/food101 --num-images 10000 --reference food101.safetensors
    python eval_fid.py ref --dataset food101 --data-root data --split test --output food101.safetensors
    python eval_fid.py calc --images samples.npz --reference food101.safetensors
    accelerate launch --num_processes 2 eval_fid.py gen --num-images 2000

`gen` (also without its name) generates and measures on the fly, nothing on disk; `ref` writes statistics of real
images; `calc` measures a folder of PNG files, an .npz or statistics. Image i depends on --seed and i alone, not on
the number of processes or the batch size. The protocol is in docs/evaluation.md.
"""

import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from onelora_diffusion import count_trainable, disable_adapter, load_adapter, read_adapter
from onelora_diffusion.command_line import one_line_errors, quieten
from onelora_diffusion.data.defaults import EMBEDDED, defaults_of
from onelora_diffusion.devices import peak_memory_bytes
from onelora_diffusion.evaluation.images import Source, open_images, share
from onelora_diffusion.evaluation.judge import (
    Judge,
    check_material,
    compare,
    metrics_of_each,
    needs,
)
from onelora_diffusion.evaluation.measuring import (
    default_for,
    features_of,
    measure,
    real_images,
    references_of,
    statistics_in,
)
from onelora_diffusion.evaluation.recognition import class_numbers, recognition_of
from onelora_diffusion.evaluation.report import format_note, write_json
from onelora_diffusion.evaluation.settings import Calculate, Generate, Reference, Sweep, parse
from onelora_diffusion.evaluation.statistics import Origin
from onelora_diffusion.evaluation.statistics_file import is_statistics, load_statistics, save_statistics
from onelora_diffusion.evaluation.summary import describe, in_sections, print_report, section
from onelora_diffusion.evaluation.sweep import best_scales, plot_sweep, print_sweep
from onelora_diffusion.files import check_place
from onelora_diffusion.launch import start_all_processes
from onelora_diffusion.pipelines.base import load_base, resolution_of
from onelora_diffusion.sampling import SamplerSettings, adapters_folded_in, generate_images, progress_bar
from onelora_diffusion.storage.adapter_file import WEIGHTS_NAME


@one_line_errors("eval_fid.py")
def main(settings: Generate | Calculate | Reference) -> None:
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    with one_line_errors("eval_fid.py", same_everywhere=True):
        for output in settings.output if isinstance(settings, Reference) else filter(None, [settings.output]):
            check_place(output)
    if isinstance(settings, Generate):
        generate(settings, accelerator)
    elif isinstance(settings, Calculate):
        calculate(settings, accelerator)
    else:
        write_reference(settings, accelerator)


def generate(settings: Generate, accelerator: Accelerator) -> None:
    start = time.monotonic()

    # Everything that can be wrong, before any work: the models, the real images, the classifier of them.
    with one_line_errors("eval_fid.py", same_everywhere=True):
        if settings.num_images is not None and settings.num_images < 2:
            raise ValueError(f"--num-images {settings.num_images}: a distance between sets needs two or more")
        if settings.images_at_once < 1:
            raise ValueError(f"--images-at-once is {settings.images_at_once}; it must be at least 1")
        pipeline, adapter, names = load_models(settings)
        settings.place(pipeline, accelerator.device)
        dataset = settings.dataset or (adapter and adapter.training.get("dataset")) or EMBEDDED
        settings = settings.for_dataset(dataset).for_scheduler(pipeline.scheduler.config)
        models = (["base"] if settings.compare_base or not adapter else []) + (["adapted"] if adapter else [])
        indices = share(settings.num_images, accelerator.process_index, accelerator.num_processes)
        labels = {
            "base": [index % len(names) % num_base_classes(pipeline) for index in indices],
            "adapted": [index % len(names) for index in indices],
        }
        if isinstance(settings, Sweep):
            columns = {
                f"{scale:g}": (models[-1], replace(settings, guidance_scale=scale))
                for scale in sorted(set(settings.guidance_scales))
            }
        else:
            columns = {model: (model, settings) for model in models}
        for _, sampler in columns.values():
            sampler.check(pipeline.transformer, pipeline.scheduler.config)
        resolution = resolution_of(pipeline)
        default = default_for(dataset, settings.reference)
        features = features_of(settings, default, resolution, accelerator)
        numbers = class_numbers(dataset, names)
        if dataset in ("digits", "fashion-mnist") and not (numbers or settings.reference):
            raise ValueError(f"'{names[-1]}' is no class of --dataset {dataset}: give a --reference")
        origins = [Origin.of(each, Source(models[-1], resolution)) for each in features]
        references = references_of(settings, dataset, origins, features, numbers, accelerator)
        reader = next((each for each in features if each.name == dataset), features[0])
        recognition = recognition_of(dataset, names, reader, resolution)
        judge = Judge(features, references, settings.metrics, recognition, accelerator.device)

    # Base and adapted, or one guidance after the other, from the same noise; the images are made here, by batches.
    results = {}
    for name, (model, sampler) in columns.items():
        with (
            disable_adapter(pipeline.transformer)
            if adapter and model == "base"
            else adapters_folded_in(pipeline.transformer, sampler),
            progress_bar(len(indices), name, disable=not accelerator.is_main_process) as progress,
        ):
            images = generate_images(
                pipeline,
                labels[model],
                settings.seed,
                indices,
                sampler,
                images_at_once=settings.images_at_once,
                batch_size=settings.batch_size,
                progress=progress.update,
            )
            seen = judge.look(images, Source(model, resolution))
        if accelerator.is_main_process:
            results[name] = judge.compare(seen)
    accelerator.wait_for_everyone()

    if accelerator.is_main_process:
        file = settings.adapter and (
            settings.adapter if settings.adapter.suffix == ".safetensors" else settings.adapter / WEIGHTS_NAME
        )
        report = {
            **in_sections(
                section(seen.measured[k], reference, {name: found[k] for name, found in results.items()})
                for k, reference in enumerate(references)
            ),
            "adapter": str(settings.adapter) if adapter else None,
            "base": settings.base or (adapter and adapter.base) or "miniature",
            "num_classes": len(names),
            "num_base_classes": num_base_classes(pipeline),
            "num_images": settings.num_images,
            "seed": settings.seed,
            **{field.name: getattr(settings, field.name) for field in fields(SamplerSettings)},
            **settings.report(accelerator.device),
            "images_at_once": settings.images_at_once,
            "num_trainable_params": count_trainable(pipeline.transformer) if adapter else None,
            "adapter_bytes": file.stat().st_size if adapter else None,
            "classifier": recognition
            and {"description": recognition.classifier.describe(), "accuracy": recognition.classifier.accuracy},
            "seconds": time.monotonic() - start,
            "peak_memory_bytes": peak_memory_bytes(accelerator.device),
        }
        folder = file.parent if adapter else Path()
        if isinstance(settings, Sweep):
            output = settings.output or folder / "sweep.json"
            report["best"] = best_scales(report)
            print_sweep(report)
            write_json(output, report)
            plot_sweep(report, output.with_suffix(".png"))
        else:
            output = settings.output or folder / "evaluation.json"
            print_report(report)
            write_json(output, report)
        print(output)


def calculate(settings: Calculate, accelerator: Accelerator) -> None:
    start = time.monotonic()
    with one_line_errors("eval_fid.py", same_everywhere=True):
        if not (settings.reference or settings.dataset):
            raise ValueError("calc compares images with others: give them by --reference, or a data set by --dataset")
        is_filed = is_statistics(settings.images)
        images = load_statistics(settings.images).origin if is_filed else open_images(settings.images)
        default = default_for(settings.dataset, (settings.images, *settings.reference))
        if is_filed and set(settings.features) - {default}:
            raise ValueError(f"'{settings.images}' is statistics of {images.features}: leave --features out")
        both_filed = is_filed and settings.reference and all(map(is_statistics, settings.reference))
        looks = not both_filed or needs(settings.metrics)["keep"]  # at real images, or at those beside statistics
        features = features_of(settings, default, images.resolution, accelerator) if looks else [None]
        if is_filed:
            measured = [statistics_in(settings.images, features, settings, accelerator)]
            origins = [each.origin for each in measured]
        else:
            origins = [Origin.of(each, images) for each in features]
        references = references_of(settings, settings.dataset, origins, features, None, accelerator)
        metrics = metrics_of_each(settings.metrics, features)
        for asked, reference in zip(metrics, references, strict=True):
            check_material(asked, reference, "reference")
        if not is_filed:
            measured = measure(images, features, settings.batch_size, accelerator, **needs(settings.metrics))
        for asked, each in zip(metrics, measured, strict=True):
            check_material(asked, each, "images")

    if accelerator.is_main_process:
        name = Path(measured[0].origin.dataset).name
        report = {
            **in_sections(
                section(one, other, {name: compare(one, other, asked, each)})
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
    accelerator.wait_for_everyone()


def load_models(settings: Generate):
    """The base with its adapter attached, the adapter's file (None without one), and the names of the classes."""
    adapter = read_adapter(settings.adapter) if settings.adapter else None
    named_by = None if settings.base else settings.adapter
    pipeline = load_base(settings.base or (adapter and adapter.base), named_by)
    if adapter:
        load_adapter(pipeline.transformer, settings.adapter)
    names = {label: name for name, label in pipeline.labels.items()}
    if adapter and adapter.config.num_classes:
        names = adapter.id2label
    num_classes = (adapter and adapter.config.num_classes) or num_base_classes(pipeline)
    return pipeline, adapter, [names.get(label, str(label)) for label in range(num_classes)]


def num_base_classes(pipeline) -> int:
    return pipeline.transformer.config.num_embeds_ada_norm


if __name__ == "__main__":
    start_all_processes()
    quieten()
    main(parse(sys.argv[1:], __doc__))
