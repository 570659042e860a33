"""Train an adapter on a frozen diffusion transformer (DiT).

    onelora train-dit                                    # the embedded job: minutes on two cores, no network
    onelora train-dit --dataset food101 --data-root data --download
    onelora train-dit --dataset imagefolder --data-root photos --max-train-time 2h
    onelora train-dit --config mine.yaml --learning-rate 3e-3   # flags override the recipe
    accelerate launch --num_processes 2 -m onelora_diffusion.cli.train_dit --dataset food101   # two GPUs
    accelerate launch --num_processes 2 --cpu -m onelora_diffusion.cli.train_dit              # two processes on CPUs

The same command again resumes a run that was interrupted. `--dataset NAME --help` shows that data set's recipe.
"""

import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from onelora_diffusion.data import load_dataset
from onelora_diffusion.data.identity import data_identity
from onelora_diffusion.families import family_of
from onelora_diffusion.launch import begin, started
from onelora_diffusion.pipelines.base import load_base
from onelora_diffusion.processes import first_on_each_machine
from onelora_diffusion.training.loop import start
from onelora_diffusion.training.samples import shown_classes
from onelora_diffusion.training.settings import Settings, parse_command_line
from onelora_diffusion.training.task import Task, TrainingData

RECIPES = Path(__file__).parent / "recipes"


def prepare_task(settings: Settings, accelerator: Accelerator, pipeline=None) -> Task:
    """A DiT, or that of a task before, and the data set whose classes its adapter learns."""
    pipeline = pipeline or load_base(settings.base)
    resolution, transformer = family_of(pipeline).resolution(pipeline), pipeline.transformer
    with first_on_each_machine(accelerator) if settings.download else nullcontext():
        dataset, *held = (
            load_dataset(
                settings.dataset,
                settings.data_root,
                split,
                resolution,
                download=settings.download,
                broken=settings.broken_images,
                image_column=settings.image_column,
                label_column=settings.label_column,
            )
            for split in ("train", settings.validation_split)
            if split is not None
        )
    for other in held:
        if other.id2label != dataset.id2label:
            raise ValueError(f"split {settings.validation_split} of {settings.dataset} has other classes than train")
    if settings.method != "full" and settings.mixed_precision != "no":
        # The frozen base is kept in the precision it computes in: autocast would cast it anew at every product.
        transformer.to(torch.float16 if settings.mixed_precision == "fp16" else torch.bfloat16)
    data, *held = (
        TrainingData(
            images=each,
            conditions=range(each.num_classes),
            shown=shown_classes(each.id2label),
            identity=data_identity(each),
            resolution=resolution,
            described=f"{settings.dataset}: {len(each):,} images of {each.num_classes} classes",
            facts={"dataset": settings.dataset} | settings.guidance_facts,
            id2label=each.id2label,
        )
        for each in (dataset, *held)
    )
    data = replace(data, held=held[0] if held else None)
    return Task(settings, accelerator, pipeline, settings.adapter_config(dataset.num_classes), data)


def main(settings: Settings, since: float | None = None) -> int:
    """Trains, or says in one line why not; returns the exit code. The budget counts since that `time.monotonic()`."""
    return start(settings, prepare_task, since)


def run(arguments: list[str]) -> int:
    return main(begin("train_dit.py", lambda: parse_command_line(arguments, RECIPES)), started())


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
