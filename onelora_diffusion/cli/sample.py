"""Generate images from an adapter and its base model.

    onelora sample                                       # runs/digits -> runs/digits/sample.png, a row a class
    onelora sample --adapter runs/food101 --classes pizza sushi --output pizza-and-sushi.png
    onelora sample --adapter runs/text-to-image --prompts "a bold Q" "a violet triangle" --per-class 4
    onelora sample --adapter runs/food101 --num-images 50000 --guidance-scale 1.5 --sampler ddpm \\
        --num-inference-steps 250 --output samples.npz     # for ADM's evaluator
    accelerate launch --num_processes 2 -m onelora_diffusion.cli.sample --num-images 1000 --output pngs

Image i is of class, or prompt, i modulo their number and depends on --seed and i alone: not on the batch size, nor on
the number of processes, which share one file system. With --images-at-once that is so to the bit; without, the last
bits of a sum depend on how many images are made together. A run that ends early keeps its images, and the same command
goes on from them.
"""

import json
import os
import sys
import textwrap
import time
import zipfile
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import gather_object
from filelock import FileLock, Timeout
from PIL import Image, ImageSequence

from onelora_diffusion import export_lora
from onelora_diffusion.command_line import one_line_errors, typed_as
from onelora_diffusion.data.clips import write_frames
from onelora_diffusion.data.identity import file_digest
from onelora_diffusion.devices import ComputeSettings, in_words
from onelora_diffusion.evaluation.sheets import write_sheet
from onelora_diffusion.files import check_writable, digest, printable, write_bytes, written_beside
from onelora_diffusion.launch import begin, precision_asked_by_launcher
from onelora_diffusion.processes import told_by_main
from onelora_diffusion.sampling import SamplerSettings, progress_bar
from onelora_diffusion.sampling.adapted import AdaptedPipeline, load_adapted
from onelora_diffusion.storage.adapter_file import read_adapter
from onelora_diffusion.storage.attaching import AdapterFile
from onelora_diffusion.storage.lora import check_export
from onelora_diffusion.storage.naming import Naming, namings_of


@dataclass(frozen=True, kw_only=True)
class Settings(SamplerSettings, ComputeSettings):
    """Generate images from an adapter and its base model."""

    adapter: Path = Path("runs/digits")
    """Adapter file, or the folder of a training run."""
    base: str | None = None
    """Base model: a folder or a hub id. Default: the one the adapter was trained on."""
    output: Path | None = None
    """A .png (a grid, a row a class), an .npz (ADM's arr_0, labels in arr_1), or a new or empty folder for PNG files.
    Default: sample.png beside the adapter."""
    classes: tuple[str, ...] = ()
    """Names or numbers of the classes to draw. Default: all."""
    prompts: tuple[str, ...] = ()
    """Prompts for a text-to-image adapter, drawn by its pipeline's own sampler. Default: the captions of the embedded
    job, for its adapter."""
    reference: tuple[Path, ...] = ()
    """Images that the prompts edit, or with which their clips begin, for bases and adapters of these kinds: one for
    all prompts or one for each, or as many as the adapter learnt with."""
    resolution: int | None = None
    """Side in pixels of the images of prompts. Default: that of training."""
    height: int | None = None
    """Height in pixels of images of prompts that are not square, with --width."""
    width: int | None = None
    """Their width."""
    frames: int | None = None
    """Frames of the clips of prompts, which are saved as animated PNG files. Default: those of training."""
    beside_base: bool = False
    """Put images of the base alone beside each row of a grid, from the same noise: its own classes, in their order."""
    per_class: int = 10
    """Images of each class or prompt."""
    num_images: int | None = None
    """Images in total, classes taking turns; replaces --per-class."""
    guidance_scale: float | None = None
    """Strength of the guidance; 1 is none. Default: 1 if guidance is trained into the adapter, 2 for one of digits,
    the pipeline's own for other prompts, or 4."""
    seed: int = 0
    """Seed of all noise."""
    batch_size: int = 32
    """Number of images that each process draws and saves at a time; no image depends on it."""
    export_lora: tuple[Naming, ...] | None = None
    """Also write lora/ beside the adapter: it as a LoRA, as diffusers and PEFT read it; or as kohya's scripts or
    ComfyUI do: `--export-lora kohya comfyui`."""
    images_at_once: int | None = None
    """Number of images in each batch of the networks; the last batch is padded. Each image is then the same, bit for
    bit, whatever the other images of its batch and the number of processes. Default: as many as there are, at most
    16, without padding."""


@one_line_errors("sample.py")
def main(settings: Settings) -> None:
    start = time.monotonic()
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    with ExitStack() as held:
        with one_line_errors("sample.py", same_everywhere=True):
            output = check_settings(settings)
            adapter = read_adapter(settings.adapter)
            pictures = held.enter_context(Pictures(output, settings, adapter, accelerator))
            settings, drawn = load(settings, accelerator.device, output)
            for naming in namings_of(settings.export_lora):
                folder = settings.adapter if settings.adapter.is_dir() else settings.adapter.parent
                check_export(drawn.denoiser, "default", naming)
                if accelerator.is_main_process:
                    path = export_lora(drawn.denoiser, folder / "lora", naming=naming)
                    print(f"LoRA by {naming}'s names: {path}")
        draw(settings, drawn, pictures, accelerator)
        if accelerator.is_main_process:
            print(f"{pictures.described} in {time.monotonic() - start:.1f} s: {output}")


def draw(settings: Settings, drawn: AdaptedPipeline, pictures: "Pictures", accelerator: Accelerator) -> None:
    """Draw the images that are missing, and make a file of all where one is asked for."""
    conditions, names, output = drawn.conditions, drawn.names, pictures.output
    labels = [c if isinstance(c, int) else number for number, c in enumerate(conditions)]
    num_images = settings.num_images or settings.per_class * len(names)
    share = range(accelerator.process_index, num_images, accelerator.num_processes)
    sides = {"": False} | ({"base-": True} if settings.beside_base else {})  # the files' prefix: are they the base's
    at_once = settings.images_at_once
    pictures.described = f"{num_images} images of {len(names)} {drawn.kind}"
    listing = ", ".join(f"{label} {printable(name, 60)}" for label, name in zip(labels, names, strict=True))
    accelerator.print(textwrap.fill(f"{drawn.kind}: {listing}", width=80, max_lines=4))
    for file in drawn.adapters.values():
        if trigger := file.training.get("trigger"):
            accelerator.print(f"the adapter's trigger word: {printable(str(trigger), 60)}")
    accelerator.print(in_words(settings.report(accelerator.device)))
    with progress_bar(len(share) * len(sides), disable=not accelerator.is_main_process) as progress:
        for side, of_base in sides.items():
            missing = [index for index in share if not pictures.has(f"{side}{index:06d}")]
            progress.update(len(share) - len(missing))
            batches = drawn.draw(
                [conditions[index % len(conditions)] for index in missing],
                settings.seed,
                missing,
                settings,
                of_base=of_base,
                images_at_once=at_once,
                batch_size=min(settings.batch_size, at_once or drawn.family.images_at_once),
                progress=progress.update,
            )
            for indices, images in batches:
                for index, image in zip(indices, images.movedim(1, -1).cpu().numpy(), strict=True):
                    pictures.keep(f"{side}{index:06d}", image, drawn.family.frame_rate)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        files, *of_base = ([pictures.file(f"{side}{i:06d}") for i in range(num_images)] for side in sides)
        if output.suffix == ".png":
            shown = {"with the adapter, from the same noise": files} | ({"the base": of_base[0]} if of_base else {})
            blocks = {title: [as_tensor(file) for file in each] for title, each in shown.items()}
            write_sheet(output, blocks, names, "the base" if of_base else None, drawn.family.frame_rate)
        elif output.suffix == ".npz":
            write_npz(output, files, [labels[index % len(names)] for index in range(num_images)])
        pictures.finish()


class Pictures(AbstractContextManager):
    """Context manager: the folder of the images of all processes, which is this run's alone until the end.

    It is --output itself, where that is a folder; for a file it lies beside, until all images are in the file. Each
    image is whole or not there. OSError or ValueError, on every process, if the folder has something else in it,
    another process writes there, it cannot be written, or not all processes see it.
    """

    def __init__(self, output: Path, settings: Settings, adapter: AdapterFile, accelerator: Accelerator):
        self.output, self.accelerator, self.described = output, accelerator, "images"  # in a few words, what is drawn
        self.is_beside = output.suffix in (".png", ".npz")
        self.folder = output.with_name(f".{output.name}.part") if self.is_beside else output
        self.record, self.lock = self.folder / ".sampling.json", FileLock(self.folder / ".lock", timeout=0)
        drawn_by = asdict(settings) | {"adapter": [digest(adapter.tensors), adapter.base]}
        drawn_by["reference"] = [(path, file_digest(path, times=False).hex()) for path in settings.reference]
        del drawn_by["output"], drawn_by["batch_size"]
        self.drawn_by = json.loads(json.dumps(drawn_by, default=str))
        told_by_main(accelerator, self._take)
        sees = gather_object([self.record.exists()])
        if not all(sees):
            self.__exit__()
            raise ValueError(f"process {sees.index(False)} does not see '{self.folder}': all must have one disk")

    def _take(self) -> None:
        self.made = [each for each in (self.folder, *self.folder.parents) if not each.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire()
        except Timeout:
            raise BlockingIOError(f"--output '{self.output}' is being written by another process") from None
        try:
            self._begin()
        except ValueError:
            self._release()
            raise

    def _begin(self) -> None:
        """Leaves a record of what the images are drawn by, unless the folder has something else in it."""
        there = {path.name for path in self.folder.iterdir()} - {".lock", "lost+found"}  # the latter of a new disk
        drawn_by = json.loads(self.record.read_text()) if self.record.exists() else None
        if there and drawn_by != self.drawn_by:
            if self.output.suffix == ".png" or self.is_beside and drawn_by is None:
                self._empty()  # of a grid, which is a look at a few images
            elif drawn_by is None:
                raise ValueError(f"--output '{self.output}' exists already; give a new folder")
            else:
                changed = [name for name in self.drawn_by if drawn_by.get(name) != self.drawn_by[name]]
                raise ValueError(
                    f"'{self.folder}' keeps images of a run that ended early, with another {', '.join(changed)}: "
                    "repeat its command, remove that folder, or give another --output"
                )
        write_bytes(self.record, json.dumps(self.drawn_by).encode())

    def __exit__(self, *exception) -> None:
        if not self.lock.is_locked:
            return
        if num_images := len(list(self.folder.glob("*.png"))):
            where = f"{num_images} images are in '{self.folder}'"
            print(f"{typed_as('sample.py')}: {where}; the same command goes on from there", file=sys.stderr)
            self._release()
        else:
            self._leave()

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.png"

    def has(self, name: str) -> bool:
        """Whether an image is there, and whole."""
        try:
            return read_image(self.file(name)).size > 0
        except (OSError, SyntaxError):
            return False

    def keep(self, name: str, image: np.ndarray, frame_rate: float | None = None) -> None:
        """Writes an image, (R, R, 3) uint8, or a clip, (frames, R, R, 3); OSError names its file."""
        part, file = self.folder / f".{name}.part", self.file(name)
        try:
            frames = [Image.fromarray(frame) for frame in (image if image.ndim == 4 else [image])]
            write_frames(part, frames, frame_rate)
            os.replace(part, file)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(file)) from error

    def finish(self) -> None:
        """Leaves the images, where the folder is the output, and nothing else."""
        if self.is_beside:
            self._empty()
        self._leave()

    def _empty(self) -> None:
        for path in {*self.folder.iterdir()} - {Path(self.lock.lock_file)}:
            path.unlink()

    def _leave(self) -> None:
        """Gives the folder up, and removes it if it is empty and was not there before."""
        self.record.unlink(missing_ok=True)
        self._release()
        for folder in [*([self.folder] if self.is_beside else []), *self.made]:
            with suppress(OSError):
                folder.rmdir()

    def _release(self) -> None:
        with suppress(OSError):  # not every system removes a file that is open
            Path(self.lock.lock_file).unlink()
        self.lock.release()


def load(settings: Settings, device: torch.device, output: Path) -> tuple[Settings, AdaptedPipeline]:
    """The base with its adapter on its device, and the settings with their defaults; an error for what do not fit."""
    drawn = load_adapted(
        settings.base,
        {"default": settings.adapter},
        classes=settings.classes,
        prompts=settings.prompts,
        references=settings.reference,
        resolution=(settings.height, settings.width) if settings.height else settings.resolution,
        mixed_precision=settings.mixed_precision,
        frames=settings.frames,
    )
    if drawn.frames > 1 and output.suffix == ".npz":
        raise ValueError(f"--output '{output}' has images: give a .png or a folder for clips, or --frames 1")
    if settings.guidance_scale is None:
        settings = replace(settings, guidance_scale=drawn.default_guidance(drawn.defaults.guidance_scale))
    settings.check_family(drawn.family)
    settings.check(drawn.denoiser, drawn.family.training_scheduler(drawn.pipeline).config)
    drawn.place(settings, device)
    return settings, drawn


def check_settings(settings: Settings) -> Path:
    """Where the images go; an error for what can be known to be wrong before a model is loaded."""
    for name in ("per_class", "num_images", "batch_size", "images_at_once", "frames", "resolution", "height", "width"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if (settings.height is None) != (settings.width is None) or settings.height and settings.resolution:
        raise ValueError("--height and --width are given together, and in place of --resolution")
    if not settings.adapter.exists():
        train = typed_as("train_dit.py")
        raise FileNotFoundError(f"no adapter at '{settings.adapter}': run {train} first, or give --adapter")
    folder = settings.adapter if settings.adapter.is_dir() else settings.adapter.parent
    output = settings.output or folder / "sample.png"
    if output.suffix in (".png", ".npz"):
        if output.is_dir():
            raise ValueError(f"--output '{output}' is a folder, not a {output.suffix} file")
        check_writable(output)
    elif output.suffix in Image.registered_extensions():
        raise ValueError(f"--output '{output}': give a .png (a grid), an .npz or a folder")
    elif settings.beside_base and output.suffix != ".png":
        raise ValueError(f"--output '{output}': --beside-base makes a grid, a .png")
    elif output.is_file():
        raise ValueError(f"--output '{output}' exists already; give a new folder")
    return output


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


def as_tensor(path: Path) -> torch.Tensor:
    """An image file as uint8 (3, R, R), or of a clip (3, frames, R, R)."""
    with Image.open(path) as image:
        frames = [torch.from_numpy(np.array(frame)).permute(2, 0, 1) for frame in ImageSequence.Iterator(image)]
    return frames[0] if len(frames) == 1 else torch.stack(frames, dim=1)


def read_image(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def parse(arguments: list[str]) -> Settings:
    asked = Settings(**precision_asked_by_launcher())
    return tyro.cli(Settings, args=arguments, default=asked, prog=typed_as("sample.py"))


def run(arguments: list[str]) -> None:
    main(begin("sample.py", lambda: parse(arguments)))


if __name__ == "__main__":
    run(sys.argv[1:])
