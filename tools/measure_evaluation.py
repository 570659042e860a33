"""Time and peak memory of eval_fid.py on the miniature as the number of images grows, and the bias of few images.

    OMP_NUM_THREADS=1 python tools/measure_evaluation.py          # a few minutes on one thread

`ref` reads up to 10,000 images from an .npz, `gen` draws up to 2,000 from the miniature; each is a process of its own,
whose largest resident set the system reports. Then `calc --metrics limit` compares real images with other real
ones: the distance it should find is 0, and what it finds is the bias of their number.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from onelora_diffusion.data import load_dataset
from onelora_diffusion.evaluation.report import format_table
from onelora_diffusion.sampling import as_uint8

EVAL_FID = Path(__file__).parents[1] / "eval_fid.py"


@dataclass
class Settings:
    """Measure eval_fid.py on the miniature."""

    num_reference: tuple[int, ...] = (2500, 5000, 10000)
    """Numbers of real images."""
    num_images: tuple[int, ...] = (500, 1000, 2000)
    """Numbers of generated images."""
    num_inference_steps: int = 10
    """Steps of the sampler; they take time, not memory."""


def main(settings: Settings) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        measured = {}
        for count in settings.num_reference:
            write_digits(folder / f"{count}.npz", count)
            command = ["ref", "--images", folder / f"{count}.npz", "--output", folder / f"{count}.safetensors"]
            measured[f"ref, {count:,} images"] = run(command)
        reference = folder / f"{max(settings.num_reference)}.safetensors"
        for count in settings.num_images:
            command = ["gen", "--adapter", "None", "--reference", reference, "--num-images", count]
            command += ["--num-inference-steps", settings.num_inference_steps, "--guidance-scale", 1.5]
            command += ["--output", folder / "gen.json"]
            measured[f"gen, {count:,} images"] = run(command)
        rows = {name: [f"{seconds:.0f}", f"{size / 1e6:,.0f} MB"] for name, (seconds, size) in measured.items()}
        threads = torch.get_num_threads()
        title = f"eval_fid.py on the miniature, {settings.num_inference_steps} steps, {threads} thread(s) each"
        print(format_table(title, ["seconds", "peak memory"], rows))

        write_digits(folder / "others.npz", 2000, seed=1)
        command = ["calc", "--images", folder / "others.npz", "--reference", reference, "--metrics", "limit"]
        run([*command, "--output", folder / "calc.json"])
        (found,) = json.loads((folder / "calc.json").read_text())["results"].values()
        limit = found["limit"]
        rows = {
            f"N = {count:,}": [f"{distance:.4f}"]
            for count, distance in zip(limit["counts"], limit["distances"], strict=True)
        }
        rows |= {"N -> infinity": [f"{limit['limit']:.4f}"], "R2 of its fit": [f"{limit['r_squared']:.4f}"]}
        print(format_table("real images against other real ones", ["FD(pixels)"], rows))


def write_digits(path: Path, count: int, seed: int = 0) -> None:
    """Real digits 0-9, 16 by 16, each moved by up to two pixels and of another brightness: `count` of them."""
    dataset = load_dataset("digits", split="all", resolution=16)
    generator = torch.Generator().manual_seed(seed)
    images = np.empty((count, 16, 16, 3), dtype=np.uint8)
    for index in range(count):
        chosen = int(torch.randint(len(dataset), (), generator=generator))
        shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
        bright = 0.5 + 0.5 * torch.rand((), generator=generator)
        image = torch.roll((dataset[chosen][0] + 1) * bright - 1, shift, dims=(1, 2))
        images[index] = as_uint8(image).permute(1, 2, 0).numpy()
    np.savez(path, images)


def run(arguments: list) -> tuple[float, int]:
    """Seconds and largest resident set (bytes) of one command."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, EVAL_FID, *map(str, arguments)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"eval_fid.py {arguments[0]} ended with {status}")
    return time.monotonic() - start, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main(tyro.cli(Settings))
