"""Record small pipelines of diffusers' classes, and print what each recording says: a table in Markdown.

    python -m tools.try_families              # the table of docs/text_to_image.md; a minute on one core
    python -m tools.try_families z_image wan  # of these alone
    python -m tools.try_families --diffusers-tests ../diffusers  # and every other class of which its tests make one
    python -m tools.try_families --edits      # the table of those that edit reference images, with one each

A pipeline is the real class with random parts a few numbers wide, of `tests/tiny_models.py`.
`replayed` is the largest difference between what the stock pipeline's denoiser puts out in a step, or its autoencoder
in the end, and what the recording makes of the same, over the largest number in it; `batch` is that between three
images of a batch, each with its own prompt and time, and the same ones alone. Exits with 1 if one is more than
rounding. Without names, the other classes of diffusers that draw from a prompt are tried as its tests make them, if
there is a checkout of its repository, and those that nothing makes are listed.
"""

import argparse
import inspect
import multiprocessing
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import diffusers
import torch
from PIL import Image

from benchmarks.rounding import rounding
from onelora_diffusion.denoisers import autoencoder_of, denoiser_of
from onelora_diffusion.families.coordinates import Translated
from onelora_diffusion.families.family import Edit
from onelora_diffusion.families.recorded import Recorded, line_in_words
from onelora_diffusion.families.recording import ASKED, FRAMES
from onelora_diffusion.families.references import REFERENCES, choose_references
from onelora_diffusion.files import first_line
from onelora_diffusion.sampling.settings import SamplerSettings
from onelora_diffusion.sampling.trajectory import scheduler_of

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # where the small pipelines are made
import clip_pipelines  # noqa: F401  which adds to those, as the next ones do
import modular_pipelines  # noqa: F401
import scheduled_pipelines  # noqa: F401
from edit_pipelines import EDITS, EDITS_TOO
from tiny_models import PIPELINES, make_pipeline

from tools.diffusers_tests import NotMadeError, pipelines_in

SECONDS = 600  # for one class
ASKED_FOR = {"prompt", "height", "width", "num_inference_steps"}
MORE = {"image", "video", "images", "mask_image", "control_image", "control_video", "strength", "audio"}
MORE |= {"conditioning_frames"}
COLUMNS = "noise, sign of the output", "time", "of the prompt", "of the size", "guidance", "replayed / batch"
PROMPTS = ["a bold Q", "", "a violet triangle"]


@dataclass(frozen=True)
class Picture:
    """A reference image: dark on one side and light on the other."""

    size: tuple[int, int]
    turned: bool = False

    def image(self) -> Image.Image:
        return Image.linear_gradient("L").rotate(180 * self.turned).resize(self.size).convert("RGB")


def conditions_of(family: Recorded, prompts: list[str]) -> list[str | Edit]:
    """The prompts, each with a reference image if the family edits, of two shapes."""
    sizes, side = [(64, 96), (96, 64), (64, 96)], family.recorder.square
    pictures = (Picture(size, number == 2) for number, size in enumerate(sizes))
    edits = [Edit(prompt, (picture,), side) for prompt, picture in zip(prompts, pictures, strict=False)]
    return edits if family.record.references else prompts


def largest(difference: torch.Tensor, of: torch.Tensor) -> float:
    return float(difference.abs().max() / of.abs().max())


def replayed(pipeline, family: Recorded) -> float:
    """The relative difference from the stock pipeline's own steps, without guidance, and from its picture."""
    steps, scheduler, is_scaled = [], type(pipeline.scheduler), hasattr(pipeline.scheduler, "scale_model_input")
    after, pictures, autoencoder, others = [], [], autoencoder_of(pipeline), family.record.others
    own_step, own_decode = scheduler.step, autoencoder.decode

    def step(self, output, time, sample, *args, **kwargs):
        given = self.scale_model_input(sample, time) if is_scaled and not is_other else sample
        values = output.flatten(), float(time), given.flatten().clone()  # which some pipelines write over
        stepped = own_step(self, output, time, sample, *args, **kwargs)
        if self is pipeline.scheduler or not others:  # whose schedulers are copies
            steps.extend([values] if "pred_original_sample" not in kwargs else [])  # it was asked for that before
            after.append(stepped[0].flatten())
        return stepped

    def decode(*args, **kwargs):
        pictures.append(own_decode(*args, **kwargs))
        return pictures[-1]

    side, place, unit = family.record.side, family.place(*family.recorder.square), family.record.unit
    translated = scheduler_of(pipeline, family, SamplerSettings(num_inference_steps=2), place.shape)
    is_other = isinstance(translated, Translated)
    settings = {name: value for name, value in ASKED.items() if name in family.recorder.parameters}
    conditions = conditions_of(family, PROMPTS[:1])
    encoded = family.encode_conditions(pipeline, conditions)
    for name, guider in family.recorder.guiders.items():
        pipeline.register_modules(**{name: guider.new(guidance_scale=1.0)})
    given = {"height": side, "width": side, "max_area": side * side} | dict.fromkeys(family.recorder.schedules)
    given |= settings | family.record.off
    given = {name: value for name, value in given.items() if name in family.recorder.parameters}
    if family.record.references:
        picture = conditions[0].references[0].image()
        given[family.recorder.takes] = picture if family.recorder.takes_size else picture.resize((side, side))
    autoencoder.decode = decode
    means = mock.patch.object(autoencoder, "encode", mean_of(autoencoder.encode))
    switch = denoiser_of(pipeline).register_forward_pre_hook(
        lambda denoiser, args, kwargs: (args, kwargs | family.record.switched), with_kwargs=True
    )
    with mock.patch.object(scheduler, "step", step), means if family.record.references else nullcontext():
        pipeline(prompt=PROMPTS[0], num_inference_steps=2, **given)
    autoencoder.decode = own_decode
    switch.remove()
    drawn = after[-1][place.order].reshape(1, *place.shape)
    found = family.decode(autoencoder, drawn / unit)
    expected = pictures[0][0] if pictures else drawn  # of pixels
    expected = expected.flatten()[-found.numel() :]  # the last one, where reference images are decoded, too
    worst = largest(found.flatten() - expected, found)
    for number, (output, time, sample) in enumerate(steps):
        given, expected = (values[place.order].reshape(1, *place.shape).float() for values in (sample, output))
        latents = given / unit
        if is_other:
            translated.number, time = number, translated.timesteps[number]
            given = translated.scale_model_input(latents, time)
        found = family.predict(denoiser_of(pipeline), given / family.record.spread, torch.tensor([time]), encoded)
        found = found[:, : place.shape[0]]
        found = translated.output_of(found, latents) if is_other else found * family.record.spread
        worst = max(worst, largest(found - expected, expected))
    return worst


def mean_of(encode: Callable) -> Callable:
    """`vae.encode` with the mean of latents for every one that is drawn, as in recordings."""

    def encode_mean(images, *args, **kwargs):
        encoded = encode(images, *args, **kwargs)
        if hasattr(encoded, "latent_dist"):
            encoded.latent_dist = type(encoded.latent_dist)(encoded.latent_dist.parameters, deterministic=True)
        return encoded

    return encode_mean


def batched(pipeline, family: Recorded) -> float:
    """The relative difference of a batch from its images alone."""
    conditions = conditions_of(family, PROMPTS)
    encoded = family.encode_conditions(pipeline, conditions)
    latents = torch.randn(3, *family.latent_shape(pipeline, *family.recorder.square))
    times = torch.tensor([100.0, 500.0, 900.0])
    together = family.predict(denoiser_of(pipeline), latents, times, encoded)
    alone = [
        family.predict(denoiser_of(pipeline), latents[row : row + 1], times[row : row + 1], one)
        for row, one in enumerate(family.encode_conditions(pipeline, [each]) for each in conditions)
    ]
    return largest(together - torch.cat(alone), together)


@torch.no_grad()
def row_of(pipeline, title: str) -> tuple[str, str]:
    """The row of a pipeline, and whether those work, are refused, or are wrong by more than rounding."""
    try:
        family = Recorded(pipeline)
    except ValueError as error:
        reason = first_line(error).partition("cannot be recorded: ")[2] or first_line(error)
        return f"| {title} | refused: {reason} | | | | | |", "refused"
    record = family.record
    times = ", ".join(f"`{name}` {line_in_words(*line)}" for name, line in record.times.items())
    sign = "−" if family.place(*family.recorder.square).sign < 0 else "+"
    prompted = ", ".join(f"`{name}`" for name in record.prompted)
    sized = ", ".join(f"`{name}`" for name in (*record.sized, *record.together)) or "–"
    pictured = [", ".join(f"`{name}`" for name in record.pictured)] if record.references else []
    guidance = {0: "w", 1: "w − 1", None: "its own"}[record.offset] if family.is_guided else "none"
    differences = replayed(pipeline, family), batched(pipeline, family)
    # The time of half the pipelines is rounded once more on its way, and counts thousandfold in its sines.
    is_rounding = max(differences) < 10 * rounding(denoiser_of(pipeline))
    cells = (
        title,
        f"`{record.noisy}` {sign}",
        times,
        prompted,
        sized,
        *pictured,
        guidance,
        " / ".join(f"{d:.0e}" for d in differences),
    )
    return f"| {' | '.join(cells)} |", "work" if is_rounding else "wrong"


def classes() -> Iterator[tuple[str, str | None]]:
    """The pipeline classes of the installed diffusers, and why each is not tried; None: it draws of a prompt alone."""
    for name in dir(diffusers):
        cls = getattr(diffusers, name, None)
        if not name.endswith("Pipeline") or not isinstance(cls, type) or ".deprecated." in cls.__module__:
            continue
        given, parts = inspect.signature(cls.__call__).parameters, inspect.signature(cls.__init__).parameters
        needed = {name for name, each in given.items() if each.default is each.empty} - {"self", "prompt"}
        if MORE & given.keys() or any("image" in name or "video" in name for name in needed):
            yield name, "with images, masks, clips or sound"
        elif not ASKED_FOR <= given.keys():
            yield name, "without a prompt" if "prompt" not in given else "without a size"
        else:
            yield name, None if {"transformer", "unet"} & parts.keys() else "without a transformer or UNet"


def others() -> Counter:
    """How many classes are not tried, by why."""
    return Counter(reason for _, reason in classes() if reason)


def editing() -> Iterator[str]:
    """The pipeline classes of the installed diffusers that edit reference images by a prompt, and draw no clips."""
    for name, _ in classes():
        cls = getattr(diffusers, name)
        given, parts = inspect.signature(cls.__call__).parameters, inspect.signature(cls.__init__).parameters
        more = given.keys() & ({*FRAMES} | MORE - {*REFERENCES}) or "controlnet" in parts
        is_edit = "prompt" in given and not given.keys().isdisjoint(REFERENCES) and not more
        if is_edit and {"transformer", "unet"} & parts.keys():
            yield name


def untried(tried: set[str], edits: bool = False) -> list[str]:
    """Other classes of the installed diffusers that draw images or clips of a prompt alone, or that edit by it."""
    found = editing() if edits else (name for name, reason in classes() if reason is None)
    return [name for name in found if name not in tried]


def pipelines_of(names: list[str], folder: Path | None, edits: bool) -> Iterator[tuple[str, Callable]]:
    """The title of each row, and what makes its pipeline: ours, then of other classes those of diffusers' tests."""
    tried, ours = set(), [*EDITS, *EDITS_TOO] if edits else [name for name in PIPELINES if name not in EDITS]
    for name in names or ours:
        cls = type(make_pipeline(name)).__name__
        yield f"`{cls}`{f', {name}' if cls in tried else ''}", partial(make_pipeline, name)
        tried.add(cls)
    if names:
        return
    for name, make in pipelines_in(folder) if folder else ():
        if name not in tried and name in untried(tried, edits):
            yield f"`{name}`", make
            tried.add(name)
    if others := untried(tried, edits):
        print(f"\nNot tried, for nothing here makes small ones of them: {', '.join(others)}.")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(PIPELINES)}")
    parser.add_argument("--diffusers-tests", type=Path, help="a checkout of diffusers' repository")
    parser.add_argument("--edits", action="store_true", help="those that edit, with one reference image")
    asked = parser.parse_args(arguments)
    columns = [*COLUMNS[:-2], *["of the reference images"] * asked.edits, *COLUMNS[-2:]]
    print(f"| pipeline | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 1) + "|")
    verdicts = Counter()
    for title, make in pipelines_of(asked.names, asked.diffusers_tests, asked.edits):
        row, verdict = alone(lambda make=make, title=title: tried(make, title, int(asked.edits)), title)
        is_short = "| refused: " in row or "| fails: " in row or "| not made: " in row
        print(row + " |" * (asked.edits and is_short), flush=True)
        verdicts[verdict] += 1
    if not asked.names and not asked.edits:
        print("\nNot tried, for they draw from other than a prompt alone, or no pictures of a size:", end=" ")
        print(", ".join(f"{count} {what}" for what, count in others().most_common()), end=".\n")
    print(f"\n{verdicts.total()} tried: {', '.join(f'{count} {verdict}' for verdict, count in verdicts.items())}.")
    return 1 if verdicts["wrong"] else 0


def tried(make: Callable, title: str, references: int) -> tuple[str, str]:
    """The row of what `make` makes, and its verdict, whatever a denoiser does to what it has not been tried with."""
    try:
        choose_references(pipeline := make(), references)
        return row_of(pipeline, title)
    except NotMadeError as error:
        return f"| {title} | not made: {error} | | | | | |", "not made"
    except Exception as error:
        return failed(title, f"{type(error).__name__}: {first_line(error)}")


def failed(title: str, how: str) -> tuple[str, str]:
    return f"| {title} | fails: {how} | | | | | |", "wrong"


def alone(work: Callable[[], tuple[str, str]], title: str) -> tuple[str, str]:
    """What `work` returns in a process of its own, which may die, or take too long, without ending the others."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def send() -> None:
        torch.set_num_threads(1)  # the threads of this process are not those of a fork
        sender.send(work())

    process = context.Process(target=send)
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(SECONDS) else failed(title, f"it takes more than {SECONDS} s")
    except EOFError:
        return failed(title, "its process died")
    finally:
        process.kill()
        process.join()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
