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
from pathlib import Path

import torch
from accelerate import Accelerator

from onelora_diffusion.command_line import one_line_errors, quieten
from onelora_diffusion.data import load_dataset
from onelora_diffusion.data.identity import data_identity
from onelora_diffusion.families import family_of
from onelora_diffusion.launch import start_all_processes, started
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
        dataset = load_dataset(
            settings.dataset,
            settings.data_root,
            "train",
            resolution,
            download=settings.download,
            broken=settings.broken_images,
            image_column=settings.image_column,
            label_column=settings.label_column,
        )
    if settings.method != "full" and settings.mixed_precision != "no":
        # The frozen base is kept in the precision it computes in: autocast would cast it anew at every product.
        transformer.to(torch.float16 if settings.mixed_precision == "fp16" else torch.bfloat16)
    data = TrainingData(
        images=dataset,
        conditions=range(dataset.num_classes),
        shown=shown_classes(dataset.id2label),
        identity=data_identity(dataset),
        resolution=resolution,
        described=f"{settings.dataset}: {len(dataset):,} images of {dataset.num_classes} classes",
        facts={"dataset": settings.dataset},
        id2label=dataset.id2label,
    )
    return Task(settings, accelerator, pipeline, settings.adapter_config(dataset.num_classes), data)


def main(settings: Settings, since: float | None = None) -> int:
    """Trains, or says in one line why not; returns the exit code. The budget counts since that `time.monotonic()`."""
    return start(settings, prepare_task, since)


def run(arguments: list[str]) -> int:
    """What the command does, with the words that follow it; returns the exit code."""
    start_all_processes()
    quieten()
    with one_line_errors("train_dit.py", same_everywhere=True):
        settings = parse_command_line(arguments, RECIPES)
    return main(settings, started())


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
