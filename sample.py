"""Generate images from an adapter and its base model.

    python sample.py                                       # runs/digits -> runs/digits/sample.png, a row a class
    python sample.py --adapter runs/food101 --classes pizza sushi --output pizza-and-sushi.png
    python sample.py --adapter runs/food101 --num-images 50000 --guidance-scale 1.5 --sampler ddpm \\
        --num-inference-steps 250 --output samples.npz     # for ADM's evaluator
    accelerate launch --num_processes 2 sample.py --num-images 1000 --output pngs

Image i is of class i modulo the number of classes and depends on --seed and i alone: not on the batch size, nor on
the number of processes, which share one file system. With --images-at-once that is so to the bit; without, the last
bits of a sum depend on how many images are made together.
"""

import difflib
import math
import shutil
import textwrap
import time
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from PIL import Image, ImageDraw
from torchvision.utils import make_grid

from onelora_diffusion.command_line import one_line_errors, quieten
from onelora_diffusion.data.defaults import defaults_of
from onelora_diffusion.devices import ComputeSettings, in_words
from onelora_diffusion.files import printable, written_beside
from onelora_diffusion.launch import start_all_processes
from onelora_diffusion.pipelines.base import load_base
from onelora_diffusion.sampling import SamplerSettings, adapters_folded_in, generate_images, progress_bar
from onelora_diffusion.storage.adapter_file import load_adapter, read_adapter

SMALLEST_TILE = 64  # pixels; smaller images are enlarged in a grid


@dataclass(frozen=True, kw_only=True)
class Settings(SamplerSettings, ComputeSettings):
    """Generate images from an adapter and its base model."""

    adapter: Path = Path("runs/digits")
    """Adapter file, or the folder of a training run."""
    base: str | None = None
    """Base model: a folder or a hub id. None: the one the adapter was trained on."""
    output: Path | None = None
    """A .png (a grid, a row a class), an .npz (ADM's arr_0, labels in arr_1), or a new folder of PNG files.
    None: sample.png beside the adapter."""
    classes: tuple[str, ...] = ()
    """Names of classes, or their numbers. None given: all."""
    per_class: int = 10
    """Images of each class."""
    num_images: int | None = None
    """Images in total, classes taking turns; replaces --per-class."""
    guidance_scale: float | None = None
    """Strength of the guidance; 1 is none. None: 2 for an adapter of digits, else 4."""
    seed: int = 0
    """Of all noise."""
    batch_size: int = 32
    """Images that each process hands on at a time; no image depends on it."""
    images_at_once: int | None = None
    """Run the networks on just so many images, the last ones padded: an image is then the same to the bit in any
    company and in any number of processes. None: on as many as there are, at most 16."""


@one_line_errors("sample.py")
def main(settings: Settings) -> None:
    start = time.monotonic()
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    with one_line_errors("sample.py", same_everywhere=True):
        output = check_settings(settings)
        pipeline, labels, dataset = load(settings)
        if settings.guidance_scale is None:
            settings = replace(settings, guidance_scale=defaults_of(dataset).guidance_scale)
        classes = find_classes(settings.classes, labels)
        names = {label: name for name, label in reversed(labels.items())}
        num_images = settings.num_images or settings.per_class * len(classes)
        class_of = [classes[index % len(classes)] for index in range(num_images)]
        share = range(accelerator.process_index, num_images, accelerator.num_processes)
        settings.place(pipeline, accelerator.device)
        settings.check(pipeline.transformer, pipeline.scheduler.config)
        images_folder = output.with_name(f".{output.name}.part")  # every process writes its share here
        if accelerator.is_main_process:
            shutil.rmtree(images_folder, ignore_errors=True)
            images_folder.mkdir(parents=True)
        accelerator.wait_for_everyone()

    listing = ", ".join(f"{label} {names[label]}" for label in classes)
    accelerator.print(textwrap.fill(f"classes: {listing}", width=80, max_lines=4))
    accelerator.print(in_words(settings.report(accelerator.device)))
    try:
        with (
            adapters_folded_in(pipeline.transformer, settings),
            progress_bar(len(share), disable=not accelerator.is_main_process) as progress,
        ):
            batches = generate_images(
                pipeline,
                [class_of[index] for index in share],
                settings.seed,
                share,
                settings,
                images_at_once=settings.images_at_once,
                batch_size=settings.batch_size,
                progress=progress.update,
            )
            for indices, images in batches:
                for index, image in zip(indices, images.permute(0, 2, 3, 1).cpu().numpy(), strict=True):
                    Image.fromarray(image).save(images_folder / f"{index:06d}.png")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            files = [images_folder / f"{index:06d}.png" for index in range(num_images)]
            if output.suffix == ".png":
                write_grid(output, files, [printable(names[label], 60) for label in classes])
            elif output.suffix == ".npz":
                write_npz(output, files, class_of)
            else:
                images_folder.rename(output)
            print(f"{num_images} images of {len(classes)} classes in {time.monotonic() - start:.1f} s: {output}")
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(images_folder, ignore_errors=True)


def check_settings(settings: Settings) -> Path:
    """Where the images go; an error for what can be known to be wrong before a model is loaded."""
    for name in ("per_class", "num_images", "batch_size", "images_at_once"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if not settings.adapter.exists():
        raise FileNotFoundError(f"no adapter at '{settings.adapter}': run train_dit.py first, or give --adapter")
    folder = settings.adapter if settings.adapter.is_dir() else settings.adapter.parent
    output = settings.output or folder / "sample.png"
    if output.suffix in (".png", ".npz"):
        if output.is_dir():
            raise ValueError(f"--output '{output}' is a folder, not a {output.suffix} file")
    elif output.suffix in Image.registered_extensions():
        raise ValueError(f"--output '{output}': give a .png (a grid), an .npz or a folder")
    elif output.is_file() or output.is_dir() and any(output.iterdir()):
        raise ValueError(f"--output '{output}' exists already; give a new folder")
    return output


def load(settings: Settings):
    """The base with its adapter, the labels by class name, and the name of the data set."""
    adapter = read_adapter(settings.adapter)
    pipeline = load_base(settings.base or adapter.base, named_by=None if settings.base else settings.adapter)
    load_adapter(pipeline.transformer, settings.adapter)
    if adapter.config.num_classes is None:  # it serves the classes of its base
        labels = pipeline.labels or by_name({}, pipeline.transformer.config.num_embeds_ada_norm)
    else:
        labels = by_name(adapter.id2label, adapter.config.num_classes)
    return pipeline, labels, adapter.training.get("dataset")


def by_name(id2label: dict[int, str], num_classes: int) -> dict[str, int]:
    """Class name -> label; classes of one name are told apart by their labels, a class without one is named so."""
    names = [id2label.get(label, str(label)) for label in range(num_classes)]
    counts = Counter(map(plain, names))
    return {name if counts[plain(name)] == 1 else f"{name} ({label})": label for label, name in enumerate(names)}


def find_classes(wanted: Sequence[str], labels: dict[str, int]) -> list[int]:
    """Labels of classes given by name or number, all if none is given; a name wins over a number."""
    known = {plain(name): label for name, label in labels.items()}
    found = []
    for text in wanted:
        if plain(text) in known:
            found.append(known[plain(text)])
        elif text.isdecimal() and int(text) in known.values():
            found.append(int(text))
        else:
            near = difflib.get_close_matches(plain(text), known, n=5) or [*list(known)[:5], "..."]
            raise ValueError(f"no class '{text}' among {len(set(known.values()))}; there is {', '.join(near)}")
    return found or sorted(set(known.values()))


def plain(name: str) -> str:
    return name.lower().replace(" ", "_")


def write_grid(output: Path, files: list[Path], names: list[str]) -> None:
    """Write a row of images for each class, its name before it; image i belongs to class i mod len(names)."""
    images = torch.stack([torch.from_numpy(read_image(file)).permute(2, 0, 1) for file in files])
    rows, columns, size = len(names), math.ceil(len(files) / len(names)), images.shape[-1]
    tiles = torch.full((rows * columns, 3, size, size), 255, dtype=torch.uint8)
    for index, image in enumerate(images):
        tiles[index % rows * columns + index // rows] = image
    enlarge = math.ceil(SMALLEST_TILE / size)
    tiles = tiles.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    grid = Image.fromarray(make_grid(tiles, nrow=columns, pad_value=255).permute(1, 2, 0).numpy())

    margin = math.ceil(max(ImageDraw.Draw(grid).textlength(name) for name in names)) + 12
    picture = Image.new("RGB", (margin + grid.width, grid.height), "white")
    picture.paste(grid, (margin, 0))
    for row, name in enumerate(names):
        ImageDraw.Draw(picture).text((6, (row + 0.5) * grid.height / rows), name, fill="black", anchor="lm")
    with written_beside(output) as part:
        picture.save(part, format="PNG")


def write_npz(output: Path, files: list[Path], class_of: list[int]) -> None:
    """Write `arr_0`, (N, H, W, 3) uint8, and `arr_1`, (N,) int64 labels, one image in memory at a time."""
    with written_beside(output) as part, zipfile.ZipFile(part, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as array:
            shape = (len(files), *read_image(files[0]).shape)
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(array, header)
            for path in files:
                array.write(read_image(path).tobytes())
        with archive.open("arr_1.npy", "w") as array:
            np.lib.format.write_array(array, np.array(class_of, dtype=np.int64))


def read_image(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


if __name__ == "__main__":
    start_all_processes()
    quieten()
    main(tyro.cli(Settings))
