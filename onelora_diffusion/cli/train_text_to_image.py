"""Train an adapter on a frozen text-to-image transformer of diffusers: FLUX.1, Stable Diffusion 3, Qwen-Image, ...

    onelora train-text-to-image                          # the embedded job: minutes on two cores, no network
    onelora train-text-to-image --base stabilityai/stable-diffusion-3.5-medium --images dog --prompt "a sks dog"
    onelora train-text-to-image --base black-forest-labs/FLUX.1-dev --base-precision nf4 --gradient-checkpointing \\
        --images signs --resolution 512 --validation-prompt "a bold Q" "a violet triangle"
    onelora train-text-to-image --config signs.yaml --learning-rate 2e-3   # flags override the recipe
    accelerate launch --num_processes 2 -m onelora_diffusion.cli.train_text_to_image --base ... --images hf:NAME

Images and captions are encoded once, to disk; then the text encoders leave memory, and the autoencoder leaves the
GPU. The same command again resumes a run that was interrupted.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator

from onelora_diffusion.data.buckets import side_and_frames
from onelora_diffusion.data.caption_texts import filled, tag_orders, with_trigger
from onelora_diffusion.data.captions import load_captioned
from onelora_diffusion.data.identity import data_identity
from onelora_diffusion.data.listing import counted
from onelora_diffusion.data.references import edits_of
from onelora_diffusion.denoisers import choose_denoiser
from onelora_diffusion.families import (
    Edit,
    Family,
    Recorded,
    choose_references,
    draws_from_first_frame,
    family_of,
    references_of,
)
from onelora_diffusion.launch import begin, started
from onelora_diffusion.pipelines.base import load_base
from onelora_diffusion.training.loop import start
from onelora_diffusion.training.prompt_settings import PromptSettings, parse_command_line
from onelora_diffusion.training.randomness import TAG_ORDERS, keyed_generator
from onelora_diffusion.training.settings import refuse
from onelora_diffusion.training.task import Task, TrainingData

EMBEDDED = Path(__file__).parent / "recipes" / "digit_words.yaml"


def prepare_task(settings: PromptSettings, accelerator: Accelerator, pipeline=None) -> Task:
    """A text-to-image transformer, or that of a task before, and the captioned images that its adapter learns."""
    is_new = pipeline is None
    pipeline = pipeline or load_base(settings.base, condition=str, precision=settings.base_precision)
    choose_denoiser(pipeline, settings.denoisers)
    number = len(settings.reference_column)
    if settings.frames > 1 and not number and draws_from_first_frame(pipeline):
        refuse({"--flip": settings.flip, "--prior-weight": settings.prior_weight}, "a base that draws from a picture")
        number = 1
    choose_references(pipeline, number)
    family = family_of(pipeline, settings.caches)
    if is_new and isinstance(family, Recorded):
        accelerator.print(family)
    if settings.caption_drop and family.is_guided and not family.guides_itself:
        raise ValueError(f"{family.name} is guided by another model, which is not trained: leave --caption-drop out")
    resolution = settings.resolution or family.resolution(pipeline)
    family.check_resolution(pipeline, resolution)
    if settings.sample_size:
        family.check_resolution(pipeline, *settings.sample_size)
    family.check_frames(settings.frames)
    family.try_frames(settings.frames)
    if settings.frames > 1:
        family.frame_rate = settings.frame_rate or family.frame_rate
    data = captioned_data(settings, family, pipeline, resolution)
    if (held := settings.of_validation()) is not None:
        data = replace(data, held=captioned_data(held, family, pipeline, resolution, held.validation_split or "train"))
    return Task(settings, accelerator, pipeline, settings.adapter_config(targets=family.targets), data)


def captioned_data(
    settings: PromptSettings, family: Family, pipeline, resolution: int, split: str = "train"
) -> TrainingData:
    """The images of a split with their captions, and with their masks on the grid of their latents."""
    multiple, broken, number = family.multiple(pipeline), settings.broken_images, references_of(pipeline)
    first_frames = number > len(settings.reference_column)
    captioned = load_captioned(settings, resolution, multiple, split, broken, family.frame_rate, first_frames)

    def grid(height: int, width: int) -> tuple[int, int]:
        return family.latent_shape(pipeline, height, width)[-2:]

    masks = captioned.masks.on_grid(captioned.dataset, grid) if captioned.masks else {}
    digests = [[each.digest for each in own] for own in captioned.references]
    more = [each for each in (captioned.masks, captioned.repeats, digests) if each]
    prompts, each = trained_prompts(captioned.captions, settings), 1 + settings.caption_shuffles
    named = [filled(prompt, settings.trigger) for prompt in settings.validation_prompt]
    shown = [family.at_size(prompt, settings.sample_size or resolution, settings.frames) for prompt in named]
    images = [index for index in range(len(captioned)) for _ in range(each)]
    if captioned.references:
        sides, references = captioned.dataset.size_of, captioned.references
        frames, files = settings.frames, settings.validation_reference
        prompts = [Edit(prompt, references[i], sides(i), frames) for i, prompt in zip(images, prompts, strict=True)]
        size = settings.sample_size or resolution
        shown = edits_of(named, files, number, size, "--validation-reference", frames)
    elif settings.validation_reference:
        raise ValueError("--validation-reference is not used: the base draws from no picture")
    else:
        buckets = captioned.dataset.buckets
        sizes = map(side_and_frames, (buckets.sizes[buckets.of_image[i]] for i in images))
        prompts = [family.at_size(prompt, *size) for prompt, size in zip(prompts, sizes, strict=True)]
    clips = {"frames": settings.frames, "frame_rate": family.frame_rate} if settings.frames > 1 else {}
    return TrainingData(
        images=captioned.dataset,
        conditions=prompts,
        conditions_each=each,
        shown=list(zip(shown, named, strict=True)),
        identity=data_identity(captioned.dataset, captioned.captions, *more),
        resolution=resolution,
        described=f"{captioned.dataset.name}: {counted(captioned.dataset)}",
        facts={
            "dataset": captioned.dataset.name,
            "family": family.name,
            "prompt": settings.prompt and with_trigger(settings.prompt, settings.trigger),
            "base_precision": settings.base_precision,
            "resolution": resolution,
            "max_sequence_length": settings.max_sequence_length,
        }
        | clips
        | ({"denoiser": settings.denoisers} if settings.denoisers else {})
        | ({"trigger": settings.trigger} if settings.trigger else {})
        | ({"training_adapter": Path(settings.training_adapter).name} if settings.training_adapter else {})
        | ({"references": number} if number else {}),
        buckets=captioned.dataset.buckets,
        frames=settings.frames,
        shown_size=settings.sample_size,
        masks=masks,
        repeats=captioned.repeats,
        notes=captioned.notes,
    )


def trained_prompts(captions: Sequence[str], settings: PromptSettings) -> list[str]:
    """The prompts of captions, one after the other: with the trigger word, and with their tags in several orders."""
    number, keep = settings.caption_shuffles, settings.keep_tags
    if number and all(caption.count(",") < keep + 1 for caption in captions):
        raise ValueError(f"--caption-shuffles {number} changes nothing: no caption has {keep + 2} tags, with commas")
    return [
        with_trigger(prompt, settings.trigger)
        for image, caption in enumerate(captions)
        for prompt in tag_orders(caption, number, keep, keyed_generator(settings.seed, TAG_ORDERS, image))
    ]


def main(settings: PromptSettings, since: float | None = None) -> int:
    """Trains, or says in one line why not; returns the exit code. The budget counts since that `time.monotonic()`."""
    return start(settings, prepare_task, since)


def run(arguments: list[str]) -> int:
    return main(begin("train_text_to_image.py", lambda: parse_command_line(arguments, EMBEDDED)), started())


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
