"""Generate images from an adapter and its base model.

    python sample.py                                       # runs/digits -> runs/digits/sample.png, a row a class
    python sample.py --adapter runs/food101 --classes pizza sushi --output pizza-and-sushi.png
    python sample.py --adapter runs/food101 --num-images 50000 --guidance-scale 1.5 --sampler ddpm \\
        --num-inference-steps 250 --output samples.npz     # for ADM's evaluator
    accelerate launch --num_processes 2 sample.py --num-images 1000 --output pngs

Image i is of class i modulo the number of classes and depends on --seed and i alone: not on the batch size, nor
on the number of processes, which share one file system.
"""

import difflib
import math
import shutil
import textwrap
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from PIL import Image, ImageDraw
from torchvision.utils import make_grid
from tqdm import tqdm

from onelora_diffusion.command_line import quieten
from onelora_diffusion.data.defaults import defaults_of
from onelora_diffusion.files import printable, written_beside
from onelora_diffusion.launch import start_all_processes
from onelora_diffusion.pipelines.base import load_base
from onelora_diffusion.sampling import SamplerSettings, generate_images
from onelora_diffusion.storage.adapter_file import load_adapter, read_adapter

SMALLEST_TILE = 64  # pixels; smaller images are enlarged in a grid


@dataclass(frozen=True, kw_only=True)
class Settings(SamplerSettings):
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


def main(settings: Settings) -> None:
    start = time.monotonic()
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    try:
        output = check_settings(settings)
        pipeline, labels, dataset = load(settings)
        if settings.guidance_scale is None:
            settings = replace(settings, guidance_scale=defaults_of(dataset).guidance_scale)
        classes = find_classes(settings.classes, labels)
        names = {label: name for name, label in reversed(labels.items())}
        num_images = settings.num_images or settings.per_class * len(classes)
        class_of = [classes[index % len(classes)] for index in range(num_images)]
        share = range(accelerator.process_index, num_images, accelerator.num_processes)
        batches = generate_images(
            pipeline.to(accelerator.device),
            [class_of[index] for index in share],
            settings.seed,
            share,
            settings,
            batch_size=settings.batch_size,
        )
        images_folder = output.with_name(f".{output.name}.part")  # every process writes its share here
        if accelerator.is_main_process:
            shutil.rmtree(images_folder, ignore_errors=True)
            images_folder.mkdir(parents=True)
        accelerator.wait_for_everyone()
    except (ValueError, OSError) as error:
        raise SystemExit(f"sample.py: {error}" if accelerator.is_main_process else 1) from error

    listing = ", ".join(f"{label} {names[label]}" for label in classes)
    accelerator.print(textwrap.fill(f"classes: {listing}", width=80, max_lines=4))
    try:
        with (
            accelerator.autocast(),
            tqdm(total=len(share), unit="image", disable=not accelerator.is_main_process) as progress,
        ):
            for indices, images in batches:
                for index, image in zip(indices, images.permute(0, 2, 3, 1).cpu().numpy(), strict=True):
                    Image.fromarray(image).save(images_folder / f"{index:06d}.png")
                progress.update(len(indices))
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
    for name in ("per_class", "num_images", "batch_size"):
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
        numbers = range(pipeline.transformer.config.num_embeds_ada_norm)
        labels = pipeline.labels or {str(label): label for label in numbers}
    else:
        names = {str(label): label for label in range(adapter.config.num_classes)}
        labels = {name: label for label, name in adapter.id2label.items()} or names
    return pipeline, labels, adapter.training.get("dataset")


def find_classes(wanted: Sequence[str], labels: dict[str, int]) -> list[int]:
    """Labels of classes given by name or number, all if none is given; a name wins over a number."""
    plain = {name.lower().replace(" ", "_"): label for name, label in labels.items()}
    found = []
    for text in wanted:
        name = text.lower().replace(" ", "_")
        if name in plain:
            found.append(plain[name])
        elif text.isdecimal() and int(text) in plain.values():
            found.append(int(text))
        else:
            near = difflib.get_close_matches(name, plain, n=5) or [*list(plain)[:5], "..."]
            raise ValueError(f"no class '{text}' among {len(set(plain.values()))}; there is {', '.join(near)}")
    return found or sorted(set(plain.values()))


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
