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
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import torch
from accelerate import Accelerator

from onelora_diffusion import count_trainable, disable_adapter, load_adapter, read_adapter
from onelora_diffusion.command_line import one_line_errors
from onelora_diffusion.devices import peak_memory_bytes
from onelora_diffusion.evaluation.images import Source, open_images, share
from onelora_diffusion.evaluation.judge import Judge, Measured, check_metrics, compare, with_progress
from onelora_diffusion.evaluation.measuring import features_of, is_statistics, measure, real_images, references_of
from onelora_diffusion.evaluation.recognition import class_numbers, recognition_of
from onelora_diffusion.evaluation.report import format_note, write_json
from onelora_diffusion.evaluation.settings import Calculate, Generate, Reference, parse
from onelora_diffusion.evaluation.statistics import Origin, load_statistics, save_statistics
from onelora_diffusion.evaluation.summary import describe, in_sections, print_report, section
from onelora_diffusion.launch import start_all_processes
from onelora_diffusion.pipelines.base import load_base, resolution_of
from onelora_diffusion.sampling import SamplerSettings, generate_images
from onelora_diffusion.storage.adapter_file import WEIGHTS_NAME


@one_line_errors("eval_fid.py")
def main(settings: Generate | Calculate | Reference) -> None:
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
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
        pipeline, adapter, names = load_models(settings)
        pipeline.to(accelerator.device)
        dataset = settings.dataset or (adapter and adapter.training.get("dataset")) or "digits"
        settings = settings.for_dataset(dataset)
        compare_base = settings.compare_base if settings.compare_base is not None else dataset == "digits"
        models = (["base"] if compare_base or not adapter else []) + (["adapted"] if adapter else [])
        indices = share(settings.num_images, accelerator.process_index, accelerator.num_processes)
        labels = {
            "base": [index % len(names) % num_base_classes(pipeline) for index in indices],
            "adapted": [index % len(names) for index in indices],
        }
        images_of = {
            model: generate_images(
                pipeline,
                labels[model],
                settings.seed,
                indices,
                settings,
                batch_size=settings.batch_size,
            )
            for model in models
        }
        resolution = resolution_of(pipeline)
        features = features_of(settings, dataset, resolution, accelerator)
        numbers = class_numbers(dataset, names)
        if dataset in ("digits", "fashion-mnist") and not (numbers or settings.reference):
            raise ValueError(f"'{names[-1]}' is no class of --dataset {dataset}: give a --reference")
        origins = [Origin.of(each, Source(models[-1], resolution)) for each in features]
        references = references_of(settings, dataset, origins, features, numbers, accelerator)
        recognition = recognition_of(dataset, names, features[0], resolution)
        judge = Judge(features, references, settings.metrics, recognition, accelerator.device)

    # Base and adapted, from the same noise; the images are made here, batch by batch.
    seen, results = {}, {}
    for model in models:
        batches = with_progress(images_of[model], len(indices), model, accelerator.is_main_process)
        with (
            disable_adapter(pipeline.transformer) if adapter and model == "base" else nullcontext(),
            accelerator.autocast(),
        ):
            seen[model] = judge.look(batches, Source(model, resolution))
        if accelerator.is_main_process:
            results[model] = judge.compare(seen[model])
    accelerator.wait_for_everyone()

    if accelerator.is_main_process:
        file = settings.adapter and (
            settings.adapter if settings.adapter.suffix == ".safetensors" else settings.adapter / WEIGHTS_NAME
        )
        report = {
            **in_sections(
                section(seen[models[-1]].measured[k], reference, {model: results[model][k] for model in models})
                for k, reference in enumerate(references)
            ),
            "adapter": str(settings.adapter) if adapter else None,
            "base": settings.base or (adapter and adapter.base) or "miniature",
            "num_classes": len(names),
            "num_base_classes": num_base_classes(pipeline),
            "num_images": settings.num_images,
            "seed": settings.seed,
            **{field.name: getattr(settings, field.name) for field in fields(SamplerSettings)},
            "num_trainable_params": count_trainable(pipeline.transformer) if adapter else None,
            "adapter_bytes": file.stat().st_size if adapter else None,
            "classifier": recognition
            and {"description": recognition.classifier.describe(), "accuracy": recognition.classifier.accuracy},
            "seconds": time.monotonic() - start,
            "peak_memory_bytes": peak_memory_bytes(accelerator.device),
        }
        print_report(report)
        output = settings.output or (file.parent if adapter else Path()) / "evaluation.json"
        write_json(output, report)
        print(output)


def calculate(settings: Calculate, accelerator: Accelerator) -> None:
    start = time.monotonic()
    with one_line_errors("eval_fid.py", same_everywhere=True):
        dataset = settings.dataset or "digits"
        filed = [Measured(*load_statistics(settings.images))] if is_statistics(settings.images) else None
        images = None if filed else open_images(settings.images)
        resolution = filed[0].origin.resolution if filed else images.resolution
        both_filed = filed and any(map(is_statistics, settings.reference))
        features = [None] if both_filed else features_of(settings, dataset, resolution, accelerator)
        origins = [each.origin for each in filed] if filed else [Origin.of(each, images) for each in features]
        references = references_of(settings, dataset, origins, features, None, accelerator)
        for k, each in enumerate(features):
            check_metrics(settings.metrics, each, references[k], filed and filed[k])
        measured = filed or measure(images, features, settings.metrics, settings.batch_size, accelerator)

    if accelerator.is_main_process:
        name = Path(measured[0].origin.dataset).name
        report = {
            **in_sections(
                section(one, other, {name: compare(one, other, settings.metrics, each)})
                for one, other, each in zip(measured, references, features, strict=True)
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
        if not is_statistics(settings.output):
            raise ValueError(f"--output {settings.output}: statistics are a .safetensors file")
        dataset = settings.dataset or "digits"
        resolution = settings.resolution or (16 if dataset == "digits" else 256)
        images = real_images(settings, settings.images, dataset, resolution)
        features = features_of(settings, dataset, images.resolution, accelerator)
        (measured,) = measure(images, features, (), settings.batch_size, accelerator)
    if accelerator.is_main_process:
        save_statistics(settings.output, measured.statistics, measured.origin)
        print(format_note(f"{settings.output}: {describe(measured.origin, measured.statistics.count)}"))
    accelerator.wait_for_everyone()


def load_models(settings: Generate):
    """The base with its adapter attached, the adapter's file (None without one), and the names of the classes."""
    adapter = read_adapter(settings.adapter) if settings.adapter else None
    pipeline = load_base(settings.base or (adapter and adapter.base))
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
    main(parse(sys.argv[1:], __doc__))
