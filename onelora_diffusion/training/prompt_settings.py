"""The settings of a text-to-image run, in addition to those of every run."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import tyro

from onelora_diffusion.command_line import check_flags, check_installed, command, typed_as, with_switches
from onelora_diffusion.data.caption_texts import MOST_TOKENS, with_trigger
from onelora_diffusion.data.captions import CaptionSettings
from onelora_diffusion.launch import asked_by_launcher
from onelora_diffusion.storage.naming import Naming
from onelora_diffusion.training.settings import (
    DIFFUSERS_FLAGS,
    RunSettings,
    check_settings,
    first_flags,
    read_recipe,
    refuse,
)

QUANTISERS = {"int8": "torchao", "nf4": "bitsandbytes"}  # the packages that load a base as such


@dataclass
class PromptSettings(CaptionSettings, RunSettings):
    """Fine-tune a frozen text-to-image transformer on images with captions. What accelerate's launcher asks for
    (precision, compilation, accumulation, clipping) goes before the defaults and --config, and a flag before that."""

    script: ClassVar[str] = "train_text_to_image.py"
    # The base computes in its own precision, as its pipeline does: a packed layer is not reached by autocast.
    mixed_precision: ClassVar[str] = "no"

    base: str | None = None
    """Base model: the folder or hub id of any pipeline of diffusers that draws from a prompt. Neither this nor
    --images: the embedded job, handwritten digits in words on the miniature inside the package."""
    base_precision: Literal["fp32", "bf16", "int8", "nf4"] = "bf16"
    """Precision of the frozen transformer; int8 and nf4 compute in bf16, and int8 takes less memory than bf16 with
    --gradient-checkpointing alone. Trained values stay float32."""
    training_adapter: str | None = None
    """A LoRA or adapter of the base (a file, folder or hub id) that serves frozen in training and is left out of the
    result, such as one that undoes the distillation of a base of few steps. Samples are drawn without it, and the
    validation loss is measured with it."""
    denoisers: Literal["transformer", "transformer_2", "both"] | None = None
    """Of a base with two transformers, each of which computes a share of the timesteps (Wan 2.2): the one to train. Or
    both, into one file: each image trains the one that computes its timestep, and both are in memory."""
    output_dir: Path = Path("runs/text-to-image")
    """Where the adapter, checkpoints, metrics and samples go."""

    trigger: str | None = None
    """A word for what is learned. It goes before each caption that does not have it, or in place of {trigger} or
    [trigger] in captions and validation prompts, and the adapter's file names it."""
    caption_shuffles: int = 0
    """Train each caption also with its tags, which are separated by commas, in this many random orders. All of them
    are encoded before training."""
    keep_tags: int = 0
    """Number of first tags that stay in their places."""
    resolution: int | None = None
    """Side in pixels to which images are cropped. Default: that of the base's images."""
    frame_rate: float | None = None
    """Frames a second that are taken of files. Default: the rate that the base's pipeline names, or every frame."""
    max_sequence_length: int | None = None
    """Number of tokens of a prompt. Default: that of the base's pipeline."""
    caption_drop: float | None = None
    """Share of samples that train the empty prompt. Default: 0.1, or 0 if it is not used for guidance (FLUX.1)."""
    prior_weight: float = 0.0
    """Prior preservation: weigh the squared difference from what the base alone predicts of the same noise for
    --prior-prompt. It needs no second model and no images of the class; a step takes about twice the time."""
    prior_prompt: str = ""
    """The prompt for which the base is preserved, such as 'a photo of a dog'. Default: the empty prompt."""

    max_train_time: str | None = "1h"
    """Budget of wall-clock time, over all resumes: 90s, 30m, 24h, 1h30m."""
    batch_size: int = 4
    """Images an update, over all processes and accumulation steps."""
    learning_rate: float = 1e-3
    """Learning rate of the optimiser."""

    validation_images: int | Path = 0
    """Images that are not trained on, and whose loss is measured by the same noise each time, beside the base's: their
    number, or a folder of them with captions."""
    validation_prompt: tuple[str, ...] = ()
    """Prompts of samples, which the base draws in the first row and the adapter below, from the same noise."""
    validation_reference: tuple[Path, ...] = ()
    """Images that these prompts edit, or with which their clips begin: one for all prompts, or one for each; of
    several columns, so many for each."""
    sample_size: tuple[int, int] | None = None
    """Height and width in pixels of those samples. Default: squares of --resolution."""
    sample_steps: int = 28
    """Steps of the base's own sampler."""
    guidance_scale: float | None = None
    """Guidance of those samples. Default: the pipeline's own."""
    export_lora: tuple[Naming, ...] | None = None
    """At the end also write lora/, the adapter as a LoRA, as diffusers and PEFT read it; or as kohya's scripts or
    ComfyUI do: `--export-lora kohya comfyui`."""

    def of_folder(self, folder: Path) -> "PromptSettings":
        """These settings for the images in a folder; those of validation are in a folder of the same name."""
        held = self.validation_images
        held = held / folder.name if isinstance(held, Path) else held
        return replace(self, images=str(folder), validation_images=held)

    def of_validation(self) -> "PromptSettings | None":
        """These settings for images of another source that are held out for validation, if there is one."""
        own = replace(self, repeats_column=None, repeats_by_folder=False, caption_shuffles=0, keep_tags=0)
        if isinstance(self.validation_images, Path):
            return replace(own, images=str(self.validation_images))
        return None if self.validation_split is None else own

    def condition_drop(self, is_guided: bool) -> float:
        """Share of samples that train without their condition."""
        return 0.1 * is_guided if self.caption_drop is None else self.caption_drop

    def check(self) -> None:
        """ValueError for settings that are known to be wrong before any file is read."""
        check_settings(self)
        is_embedded = self.base is None and self.images is None and self.subjects is None
        if self.base is None and not is_embedded:
            raise ValueError("no base: give the folder or hub id of a text-to-image pipeline by --base")
        if self.images is None and self.subjects is None and not is_embedded:
            raise ValueError("nothing to learn: give a folder of images, or hf:NAME, by --images")
        if self.denoisers == "both" and (self.subjects is not None or self.rates_by_sum):
            with_them = "--subjects" if self.subjects is not None else "--rates-by-sum"
            raise ValueError(f"--denoisers both trains no {with_them}: choose transformer or transformer_2")
        if self.frame_rate is not None and not (0 < self.frame_rate <= 1000 and self.frames > 1):
            raise ValueError(f"--frame-rate {self.frame_rate:g} needs --frames, and is above 0 and up to 1000")
        if self.prior_prompt and not self.prior_weight:
            raise ValueError(f"--prior-prompt {self.prior_prompt!r} is not used: give --prior-weight")
        if self.keep_tags and not self.caption_shuffles:
            raise ValueError(f"--keep-tags {self.keep_tags} is not used: give --caption-shuffles")
        if self.repeats_column is not None and self.repeats_by_folder:
            raise ValueError("--repeats-column and --repeats-by-folder say the same twice: give one of them")
        for flag, value in (("--trigger", self.trigger), ("--training-adapter", self.training_adapter)):
            if value is not None and not value.strip():
                raise ValueError(f"{flag} is {value!r}: give one, or leave it out")
        if self.max_sequence_length is not None and not 1 <= self.max_sequence_length <= MOST_TOKENS:
            raise ValueError(f"--max-sequence-length is 1 to {MOST_TOKENS:,} tokens, not {self.max_sequence_length}")
        if isinstance(self.validation_images, Path):
            self._check_folder_of_validation(self.validation_images)
        self._check_beside_others()
        package, precision = QUANTISERS.get(self.base_precision), f"--base-precision {self.base_precision}"
        check_installed(precision, package)
        if package and self.method == "full":
            raise ValueError(f"--method full trains the base itself, which {precision} packs")
        if package and self.engine == "fsdp2":
            raise ValueError(f"--engine fsdp2 cannot share out a base of {precision}")

    def _check_folder_of_validation(self, held: Path) -> None:
        if self.validation_split is not None:
            raise ValueError(f"--validation-split {self.validation_split} is for a number of --validation-images")
        one, other = held.resolve(), Path(self.images or ".").resolve()
        if self.images is not None and (one.is_relative_to(other) or other.is_relative_to(one)):
            raise ValueError(f"--validation-images {held} and --images {self.images} lie in one another: part them")

    def _check_beside_others(self) -> None:
        if self.validation_reference and not (self.validation_prompt and (self.reference_column or self.frames > 1)):
            raise ValueError(
                "--validation-reference is not used: give --validation-prompt, and --reference-column or --frames"
            )
        if self.reference_column:
            refuse({"--flip": self.flip, "--prior-weight": self.prior_weight}, "--reference-column")
        if self.training_adapter is not None:
            others = {"--subjects": self.subjects is not None, "--prior-weight": self.prior_weight}
            others |= {"--engine fsdp2": self.engine == "fsdp2", "--denoisers both": self.denoisers == "both"}
            refuse(others, "--training-adapter")

    def as_launched(self) -> "PromptSettings":
        """These settings, updated with the options of accelerate's launcher."""
        asked = asked_by_launcher()
        precision = asked.pop("mixed_precision", None)
        if precision == "fp16":
            raise ValueError("accelerate's launcher asks for mixed precision fp16: choose bf16 or no")
        if precision == "bf16" and self.base_precision == "fp32":
            asked["base_precision"] = "bf16"
        return replace(self, **asked)

    def next_steps(self, references: int = 0) -> list[str]:
        """Commands to run with the adapter of a finished run."""
        prompt = with_trigger(self.prompt or "what is to be drawn", self.trigger)
        prompts = [] if self.images is None else ["--prompts", prompt]
        pictures = ["--reference", *["IMAGE"] * references] if references else []
        return [command("sample.py", "--adapter", self.output_dir, *prompts, *pictures)]


# Flags of diffusers' training scripts that have another name here.
HINTS = {
    **{flag: here for flag, here in DIFFUSERS_FLAGS.items() if flag != "resolution"},
    "dataset_name": "--images hf:NAME",
    "train_data_dir": "--images FOLDER",
    "instance_data_dir": "--images FOLDER",
    "instance_prompt": "--prompt",
    "weight_dtype": "--base-precision",
    "mixed_precision": "--base-precision",
    "proportion_empty_prompts": "--caption-drop",
    **dict.fromkeys(("shuffle_caption", "shuffle_captions"), "--caption-shuffles N"),
    "keep_tokens": "--keep-tags",
    "caption_dropout_rate": "--caption-drop",
    "trigger_word": "--trigger",
    **dict.fromkeys(("masked_loss", "conditioning_data_dir"), "NAME.mask.png beside NAME.jpg, or --mask-column"),
    "cache_latents": "no need of it: latents are always cached",
}


def parse_command_line(arguments: list[str], embedded: Path) -> PromptSettings:
    """Flags over a recipe: that of --config, or that of the embedded job, `embedded`, where nothing else is asked for.

    FileNotFoundError or ValueError if there is no such recipe, a setting in it is unknown, or a flag is diffusers'.
    """
    check_flags(arguments, HINTS)
    chosen = first_flags(arguments, "config", "base", "images", "subjects")
    is_embedded = not any(chosen.values())
    recipe = embedded if is_embedded else chosen["config"]
    default = read_recipe(Path(recipe), PromptSettings) if recipe else PromptSettings()
    flags, name = with_switches(arguments, PromptSettings), typed_as(PromptSettings.script)
    return tyro.cli(PromptSettings, args=flags, default=default.as_launched(), prog=name)
