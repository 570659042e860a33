"""The settings of a text-to-image run: what train_text_to_image.py takes beside those of every run."""

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import tyro

from onelora_diffusion.command_line import check_flags, command, typed_as, with_switches
from onelora_diffusion.launch import asked_by_launcher
from onelora_diffusion.storage.naming import Naming
from onelora_diffusion.training.settings import (
    DIFFUSERS_FLAGS,
    RunSettings,
    check_settings,
    first_flags,
    read_recipe,
)

# What reads a base as int8 or nf4.
QUANTISERS = {"int8": "torchao", "nf4": "bitsandbytes"}


@dataclass
class PromptSettings(RunSettings):
    """Fine-tune a frozen text-to-image transformer on images with captions. What accelerate's launcher asks for
    (precision, compilation, accumulation, clipping) goes before the defaults and --config, and a flag before that."""

    script: ClassVar[str] = "train_text_to_image.py"
    # The base computes in its own precision, as its pipeline does: a packed layer is not reached by autocast.
    mixed_precision: ClassVar[str] = "no"

    base: str | None = None
    """Base model: a pipeline's folder or hub id, of PixArt-Σ, Stable Diffusion 3, FLUX.1 or SANA. Neither this nor
    --images: the embedded job, handwritten digits in words on the miniature inside the package."""
    base_precision: Literal["fp32", "bf16", "int8", "nf4"] = "bf16"
    """What the frozen transformer is kept in; int8 and nf4 compute in bf16, and int8 takes less memory than bf16 with
    --gradient-checkpointing alone. Trained values stay float32."""
    output_dir: Path = Path("runs/text-to-image")
    """Where the adapter, checkpoints, metrics and samples go."""

    images: str | None = None
    """What to learn: a folder of images with metadata.jsonl or .csv or a .txt beside each, or with --prompt; or
    hf:NAME."""
    prompt: str | None = None
    """The caption of all images, such as 'a photo of sks dog'."""
    image_column: str | None = None
    """Where the metadata has an image's path, or the hub the image. None: file_name, or the only column of images."""
    caption_column: str = "text"
    """Where the metadata or the hub has the caption."""
    resolution: int | None = None
    """Pixels a side that images are cropped to. None: those that the base draws."""
    aspect_buckets: bool = False
    """Crop each image to the nearest of several shapes of about as many pixels."""
    max_sequence_length: int | None = None
    """Tokens of a prompt. None: as many as the base's pipeline takes."""
    caption_drop: float | None = None
    """Share of samples that train the empty prompt. None: 0.1, or 0 where pictures are not guided from it (FLUX.1)."""

    max_train_time: str | None = "1h"
    """Budget of wall-clock time, over all resumes: 90s, 30m, 24h, 1h30m."""
    batch_size: int = 4
    """Images an update, over all processes and accumulation steps."""
    learning_rate: float = 1e-3
    """The optimiser's."""

    validation_prompt: tuple[str, ...] = ()
    """What samples are drawn of, the adapter's below the base's of the same noise."""
    sample_steps: int = 28
    """Steps of the base's own sampler."""
    guidance_scale: float | None = None
    """Guidance of those samples. None: the pipeline's own."""
    export_lora: tuple[Naming, ...] | None = None
    """At the end also write lora/, the adapter as a LoRA, as diffusers and PEFT read it; or as kohya's scripts or
    ComfyUI do: `--export-lora kohya comfyui`."""

    def condition_drop(self, is_guided: bool) -> float:
        """Share of samples that train without their condition."""
        if self.caption_drop is None:
            return 0.1 if is_guided else 0.0
        return self.caption_drop

    def check(self) -> None:
        """ValueError for what can be known to be wrong before anything is read."""
        check_settings(self)
        is_embedded = self.base is None and self.images is None
        if self.base is None and not is_embedded:
            raise ValueError("no base: give the folder or hub id of a text-to-image pipeline by --base")
        if self.images is None and not is_embedded:
            raise ValueError("nothing to learn: give a folder of images, or hf:NAME, by --images")
        if self.caption_drop is not None and not 0 <= self.caption_drop <= 1:
            raise ValueError(f"--caption-drop is a share from 0 to 1, not {self.caption_drop}")
        package = QUANTISERS.get(self.base_precision)
        if package and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"--base-precision {self.base_precision} needs a package that is missing: pip install {package}"
            )
        if package and self.method == "full":
            raise ValueError(
                f"--method full trains the base itself, which --base-precision {self.base_precision} packs"
            )
        if package and self.engine == "fsdp2":
            raise ValueError(f"--engine fsdp2 cannot share out a base of --base-precision {self.base_precision}")

    def as_launched(self) -> "PromptSettings":
        """These settings, with what accelerate's launcher asks for in their place."""
        asked = asked_by_launcher()
        precision = asked.pop("mixed_precision", None)
        if precision == "fp16":
            raise ValueError("accelerate's launcher asks for mixed precision fp16: choose bf16 or no")
        if precision == "bf16" and self.base_precision == "fp32":
            asked["base_precision"] = "bf16"
        return replace(self, **asked)

    def next_steps(self) -> list[str]:
        """Commands to be run with the adapter of a run that has ended."""
        prompts = [] if self.images is None else ["--prompts", self.prompt or "what is to be drawn"]
        return [command("sample.py", "--adapter", self.output_dir, *prompts)]


# Flags of diffusers' training scripts that are called something else here.
HINTS = {
    **{flag: here for flag, here in DIFFUSERS_FLAGS.items() if flag != "resolution"},
    "dataset_name": "--images hf:NAME",
    "train_data_dir": "--images FOLDER",
    "instance_data_dir": "--images FOLDER",
    "instance_prompt": "--prompt",
    "weight_dtype": "--base-precision",
    "mixed_precision": "--base-precision",
    "proportion_empty_prompts": "--caption-drop",
    "cache_latents": "no need of it: latents are always cached",
}


def parse_command_line(arguments: list[str], embedded: Path) -> PromptSettings:
    """Flags over a recipe: that of --config, or that of the embedded job, `embedded`, where nothing else is asked for.

    Raises:
        FileNotFoundError, ValueError: there is no such recipe, a setting in it is unknown, or a flag is diffusers'.
    """
    check_flags(arguments, HINTS)
    chosen = first_flags(arguments, "config", "base", "images")
    recipe = chosen["config"] or (None if chosen["base"] or chosen["images"] else embedded)
    default = read_recipe(Path(recipe), PromptSettings) if recipe else PromptSettings()
    flags, name = with_switches(arguments, PromptSettings), typed_as(PromptSettings.script)
    return tyro.cli(PromptSettings, args=flags, default=default.as_launched(), prog=name)
