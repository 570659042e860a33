"""Measure how close the images of adapters are to real ones and to their prompts, and how far from the base's.

    onelora eval-fid                                     # runs/digits beside its base; writes evaluation.json
    onelora eval-fid --adapter runs/dog --prompts dog.csv --unrelated-prompts others.txt   # DINO-I, CLIP-T, drift
    onelora eval-fid --adapter runs/dog runs/dog-longer --prompts dog.csv --metrics dino-i cmmd   # a row an adapter
    onelora eval-fid gen --adapter runs/food101 --num-images 10000 --reference food101.safetensors
    onelora eval-fid ref --dataset food101 --data-root data --split test --output food101.safetensors
    onelora eval-fid calc --images samples.npz --reference food101.safetensors
    accelerate launch --num_processes 2 -m onelora_diffusion.cli.eval_fid gen --num-images 2000

`gen` (also without its name) generates and measures on the fly, `sweep` at several strengths of the guidance; `ref`
writes statistics of real images; `calc` measures a folder of PNG files, an .npz or statistics. Image i depends on
--seed and i alone, not on the number of processes or the batch size. The protocol is in docs/evaluation.md.
"""

import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from onelora_diffusion.command_line import one_line_errors
from onelora_diffusion.data.table import EMBEDDED, defaults_of
from onelora_diffusion.devices import peak_memory_bytes
from onelora_diffusion.evaluation import measuring
from onelora_diffusion.evaluation.evaluator import Evaluator, MeasuredImages, check_material
from onelora_diffusion.evaluation.images import open_images
from onelora_diffusion.evaluation.metrics import GENERATED, REAL, SPATIAL
from onelora_diffusion.evaluation.planning import Found, Plan, draw_and_measure, make_plan
from onelora_diffusion.evaluation.report import format_note, write_json
from onelora_diffusion.evaluation.settings import Calculate, Command, Generate, Reference, Sweep, parse
from onelora_diffusion.evaluation.sheets import write_sheet
from onelora_diffusion.evaluation.statistics import Origin
from onelora_diffusion.evaluation.statistics_file import is_statistics, load_statistics, save_statistics
from onelora_diffusion.evaluation.summary import describe, in_sections, print_report, section
from onelora_diffusion.evaluation.sweep import best_scales, plot_sweep, print_sweep
from onelora_diffusion.files import check_writable
from onelora_diffusion.launch import begin
from onelora_diffusion.sampling import SamplerSettings


@one_line_errors("eval_fid.py")
def main(settings: Command) -> None:
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    with one_line_errors("eval_fid.py", same_everywhere=True):
        outputs = settings.output if isinstance(settings, Reference) else [settings.output]
        if isinstance(settings, Generate):
            outputs = [settings.report_path, settings.report_path.with_suffix(".png")]
        for output in filter(None, outputs):
            check_writable(output)
    if isinstance(settings, Generate):
        generate(settings, accelerator)
    elif isinstance(settings, Calculate):
        calculate(settings, accelerator)
    else:
        write_reference(settings, accelerator)


def generate(settings: Generate, accelerator: Accelerator) -> None:
    start = time.monotonic()
    with one_line_errors("eval_fid.py", same_everywhere=True):
        plan = make_plan(settings, accelerator)
    found = draw_and_measure(plan, accelerator)
    if accelerator.is_main_process:
        report = make_report(plan, found, accelerator)
        report["seconds"] = time.monotonic() - start
        report["peak_memory_bytes"] = peak_memory_bytes(accelerator.device)
        write_report(plan, found, report)
    accelerator.wait_for_everyone()


def make_report(plan: Plan, found: Found, accelerator: Accelerator) -> dict:
    settings, drawn, recognition = plan.settings, plan.drawn, plan.evaluator.recognition
    adapters = {
        name: {
            "adapter": str(given),
            "num_trainable_params": sum(tensor.numel() for tensor in drawn.adapters[name].tensors.values()),
            "adapter_bytes": path.stat().st_size,
        }
        for (name, path), given in zip(settings.adapter_files.items(), settings.adapter or (), strict=True)
    }
    alone = next(iter(adapters.values())) if len(adapters) == 1 else {"adapter": None, "adapters": adapters}
    return {
        **in_sections(
            section(found.measured[k], reference, {name: parts[k] for name, parts in found.results.items()})
            for k, reference in enumerate(plan.evaluator.references)
        ),
        **alone,
        "base": settings.base or next((file.base for file in drawn.adapters.values()), None) or "miniature",
        f"num_{drawn.kind}": len(drawn.names),
        "num_base_classes": drawn.num_base_classes,
        "prompts": list(drawn.names) if drawn.kind == "prompts" else None,
        "unrelated_prompts": list(plan.unrelated) or None,
        "num_images": settings.num_images,
        "labels": settings.labels,
        "seed": settings.seed,
        **{field.name: getattr(settings, field.name) for field in fields(SamplerSettings)},
        **settings.report(accelerator.device),
        "images_at_once": settings.images_at_once,
        "classifier": recognition
        and {"description": recognition.classifier.describe(), "accuracy": recognition.classifier.accuracy},
    }


def write_report(plan: Plan, found: Found, report: dict) -> None:
    output = plan.settings.report_path
    if isinstance(plan.settings, Sweep):
        report["best"] = best_scales(report)
        print_sweep(report)
        write_json(output, report)
        plot_sweep(report, output.with_suffix(".png"))
    else:
        print_report(report)
        write_json(output, report)
        write_sheets(plan, found, output)
    print(output)


def write_sheets(plan: Plan, found: Found, output: Path) -> None:
    """Write the first images of each class or prompt, a column a model; and each beside the nearest real image."""
    rows = min(len(plan.drawn.names), *map(len, found.shown.values()))
    names = [plan.drawn.names[label] for label in plan.labels[:rows]]
    shown = {name: images[:rows] for name, images in found.shown.items()}
    write_sheet(output.with_suffix(".png"), shown, names)
    nearest = {name: parts[0].get("nearest_images", ())[:rows] for name, parts in found.results.items()}
    if plan.real and all(nearest.values()):
        wanted = sorted({index for indices in nearest.values() for index in indices})
        images = (image for _, batch in plan.real.batches(wanted, 1) for image in batch)
        real = dict(zip(wanted, images, strict=True))
        blocks = {f"{name}, nearest": [*shown[name], *map(real.get, nearest[name])] for name in shown}
        write_sheet(output.with_name(f"{output.stem}-nearest.png"), blocks, names)


def calculate(settings: Calculate, accelerator: Accelerator) -> None:
    start = time.monotonic()
    with one_line_errors("eval_fid.py", same_everywhere=True):
        settings = replace(settings, metrics=tuple(dict.fromkeys(["fd", *settings.metrics])))
        needs = settings.needs
        if not (settings.reference or settings.dataset):
            raise ValueError("calc compares images with others: give them by --reference, or a data set by --dataset")
        is_filed = is_statistics(settings.images)
        images = load_statistics(settings.images).origin if is_filed else open_images(settings.images)
        default = measuring.default_for(defaults_of(settings.dataset), (settings.images, *settings.reference))
        if is_filed and set(settings.features) - {default}:
            raise ValueError(f"'{settings.images}' is statistics of {images.features}: leave --features out")
        both_filed = is_filed and settings.reference and all(map(is_statistics, settings.reference))
        reads_images = not both_filed or {GENERATED, REAL} & needs  # at real images, or at those beside statistics
        features = measuring.features_of(settings, default, images.resolution, accelerator) if reads_images else [None]
        if is_filed:
            measured = [measuring.statistics_in(settings.images, features, settings, accelerator, GENERATED)]
            origins = [each.origin for each in measured]
        else:
            origins = [Origin.of(each, images) for each in features]
        path, real = measuring.reference_images(settings), None
        if path or not settings.reference:
            real = measuring.real_images(settings, path, settings.dataset, origins[0].resolution)
        references = measuring.references_of(settings, real, origins, features, accelerator)
        evaluator = Evaluator(features, references, settings, device=accelerator.device)
        if not is_filed:
            keep, spatial = GENERATED in needs, SPATIAL in needs
            measured = measuring.measure(images, features, settings.batch_size, accelerator, keep, spatial)
        for asked, each in zip(evaluator.metrics, measured, strict=True):
            check_material(asked, each, "images")

    if accelerator.is_main_process:
        name, results = Path(measured[0].origin.dataset).name, evaluator.compare(MeasuredImages(measured))
        report = {
            **in_sections(
                section(one, other, {name: numbers})
                for one, other, numbers in zip(measured, references, results, strict=True)
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
        images = measuring.real_images(settings, settings.images, dataset, resolution)
        default = measuring.default_for(defaults_of(dataset), ())
        features = measuring.features_of(settings, default, images.resolution, accelerator)
        if len(features) != len(settings.output):
            raise ValueError(f"{len(features)} --features need as many files, not {len(settings.output)} --output")
        keep = settings.keep_features
        if keep and any(output.suffix == ".npz" for output in settings.output):
            raise ValueError("--keep-features needs a .safetensors file: ADM's .npz has no place for them")
        measured = measuring.measure(images, features, settings.batch_size, accelerator, keep=keep, spatial=True)
    if accelerator.is_main_process:
        for output, each in zip(settings.output, measured, strict=True):
            save_statistics(output, each)
            print(format_note(f"{output}: {describe(each.origin, each.statistics.count)}"))
            for note in each.notes:
                print(format_note(note))
    accelerator.wait_for_everyone()


def run(arguments: list[str]) -> None:
    main(begin("eval_fid.py", lambda: parse(arguments, __doc__)))


if __name__ == "__main__":
    run(sys.argv[1:])
