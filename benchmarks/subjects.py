"""What it takes to train an adapter for each of many subjects: in one run, in runs of their own, and by LoRA.

Whole runs are on the text-to-image miniature. At the full width of a published base, a step of all subjects is timed
beside a step of each.
"""

import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from benchmarks.families import BASES, FamilyStep, family_base, family_batch, family_peer
from benchmarks.measure import interleave, table
from benchmarks.peers import twin
from onelora_diffusion import AdapterConfig, inject_adapter, read_adapter, route_adapters
from onelora_diffusion.data.digits import WORDS, Digits
from onelora_diffusion.injection.verbs import train_adapters
from onelora_diffusion.pipelines.base import miniature_text_path


@dataclass
class SubjectsSettings:
    """Seconds from commands to files, on the text-to-image miniature; subjects are handwritten digits."""

    subjects: int = 16
    """Subjects, each a digit with pictures of its own."""
    images: int = 8
    """Pictures of each."""
    alone: int = 4
    """How many of the subjects are also trained in runs of their own; their mean stands for all."""
    steps: int = 300
    """Updates of each adapter."""
    batch_size: int = 4
    """Pictures of a subject in an update."""
    family: Literal["pixart", "sd3", "flux", "sana"] | None = None
    """Instead of whole runs, time steps of a few blocks of this base at its full width, a picture of each subject."""
    rounds: int = 3
    """How often those steps are timed."""
    output_dir: Path = Path("runs/subjects-benchmark")
    """Where pictures and runs go; runs that are there are trained anew."""


def subjects(settings: SubjectsSettings) -> dict[str, tuple[float, float]]:
    """Print a table, and return wall-clock and processor seconds for all subjects by the way of training them."""
    if settings.family is not None:
        return full_width(settings)
    names = write_subjects(settings.output_dir / "pictures", settings.subjects, settings.images)
    flags = (
        f"--base {miniature_text_path()} --base-precision fp32 --max-sequence-length 16 --learning-rate 1e-2 --fresh"
    )
    flags += f" --max-steps {settings.steps} --batch-size {settings.batch_size} --sample-every 0 --max-train-time None"
    pictures, share = settings.output_dir / "pictures", settings.subjects / settings.alone

    def alone(method: str) -> tuple[float, float]:
        spent = [
            seconds_of(
                f"{flags} --method {method} --images {pictures / name} --prompt".split()
                + [f"a handwritten {name}", "--output-dir", str(settings.output_dir / method / name)]
            )
            for name in names[: settings.alone]
        ]
        return tuple(share * sum(each) for each in zip(*spent, strict=True))

    at_once = f"{flags} --subjects {pictures} --subjects-at-once {settings.subjects} --prompt".split()
    found = {
        "1LoRA, one run": seconds_of(
            [*at_once, "a handwritten {subject}", "--output-dir", str(settings.output_dir / "together")]
        ),
        f"1LoRA, {settings.subjects} runs": alone("1lora"),
        f"PEFT LoRA r=1, {settings.subjects} runs": alone("lora"),
    }
    first = found["1LoRA, one run"]
    rows = [
        [name, f"{wall:.0f}", f"{first[0] / wall:.2f}", f"{processor:.0f}", f"{first[1] / processor:.2f}"]
        for name, (wall, processor) in found.items()
    ]
    print(*table(["seconds", "wall", "one run/it", "processor", "one run/it"], rows), sep="\n")
    apart = max(
        (read_adapter(settings.output_dir / "together" / name).tensors[key] - tensor).abs().max().item()
        for name in names[: settings.alone]
        for key, tensor in read_adapter(settings.output_dir / "1lora" / name).tensors.items()
    )
    print(f"the adapters of both ways differ by {apart:.1e} at most")
    return found


def full_width(settings: SubjectsSettings) -> dict[str, float]:
    """Print a table of processor seconds of an update of all subjects, one picture each, and return their medians."""
    torch.set_num_threads(1)
    depths, number = BASES[settings.family].depths, settings.subjects
    base, family = family_base(settings.family, **depths)
    batches = [family_batch(settings.family, size, 32, 32) for size in (number, 1)]
    together = twin(base)
    names = [f"subject-{each}" for each in range(number)]
    for name in names:
        inject_adapter(together, AdapterConfig(targets=family.targets), name)
    train_adapters(together, names)
    at_once = FamilyStep(together.train(), family, batches[0], "fp32")

    def one_update() -> None:
        with route_adapters(together, names):
            at_once.train()

    def updates(peer: str):
        step = FamilyStep(family_peer(peer, base, family), family, batches[1], "fp32")
        return lambda: [step.train() for _ in names]

    steps = {"1LoRA, one step of all": one_update}
    steps |= {f"{peer}, a step of each": updates(peer) for peer in ("1LoRA", "PEFT LoRA r=1")}
    seconds = interleave(steps, settings.rounds, warmup=1, clock=time.process_time)
    found = {name: float(np.median(values)) for name, values in seconds.items()}
    first = found["1LoRA, one step of all"]
    rows = [[name, f"{value:.2f}", f"{first / value:.2f}"] for name, value in found.items()]
    title = f"{BASES[settings.family].title}, {number} subjects"
    print(*table([title, "processor s", "one step/it"], rows), sep="\n")
    return found


def write_subjects(folder: Path, number: int, images: int) -> list[str]:
    """Write pictures of digits, a folder for each subject, and return the folders' names in order."""
    digits = Digits(split="train")
    labels, names = torch.tensor(digits.labels), []
    for subject in range(number):
        digit, part = subject % 10, subject // 10
        names.append(f"{WORDS[digit]}-{part + 1}" if number > 10 else WORDS[digit])
        (folder / names[-1]).mkdir(parents=True, exist_ok=True)
        for index in (labels == digit).nonzero()[part * images : (part + 1) * images, 0].tolist():
            pixels = ((digits[index][0] + 1) * 127.5).round().to(torch.uint8)
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / names[-1] / f"{index}.png")
    return sorted(names)


def seconds_of(flags: list[str]) -> tuple[float, float]:
    """Wall-clock and processor seconds of a command that trains."""
    command = [sys.executable, "-m", "onelora_diffusion.cli.train_text_to_image", *flags]
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, processor
