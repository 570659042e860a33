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
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import diffusers
import torch

from benchmarks.rounding import rounding
from onelora_diffusion.denoisers import autoencoder_of, denoiser_of
from onelora_diffusion.families.recorded import Recorded
from onelora_diffusion.families.recording import FRAMES
from onelora_diffusion.families.references import REFERENCES, choose_references
from tools.stock_calls import (
    PROMPTS,
    batched,
    conditions_of,
    failed,
    guidance_in_words,
    largest,
    refused,
    steps_apart,
    stock_call,
    times_in_words,
    told,
    walk,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # where the small pipelines are made
import clip_pipelines  # noqa: F401  which adds to those, as the next ones do
import modular_pipelines  # noqa: F401
import scheduled_pipelines  # noqa: F401
from edit_pipelines import EDITS, EDITS_TOO
from tiny_models import PIPELINES, make_pipeline

from tools.diffusers_tests import pipelines_in

ASKED_FOR = {"prompt", "height", "width", "num_inference_steps"}
MORE = {"image", "video", "images", "mask_image", "control_image", "control_video", "strength", "audio"}
MORE |= {"conditioning_frames"}
COLUMNS = "noise, sign of the output", "time", "of the prompt", "of the size", "guidance", "replayed / batch"


def replayed(pipeline, family: Recorded) -> float:
    """The relative difference from the stock pipeline's own steps, without guidance, and from its picture."""
    (condition,) = conditions_of(family, PROMPTS[:1])
    call = stock_call(pipeline, family, condition, generator=None, **family.record.off)
    place = family.place(*family.recorder.square)
    drawn = call.last[place.order].reshape(1, *place.shape)
    found = family.decode(autoencoder_of(pipeline), drawn / family.record.unit)
    expected = call.decoded[0][0] if call.decoded else drawn  # of pixels
    expected = expected.flatten()[-found.numel() :]  # the last one, where reference images are decoded, too
    return max(largest(found.flatten() - expected, found), steps_apart(pipeline, family, condition, call))


@torch.no_grad()
def row_of(pipeline, title: str) -> tuple[str, str]:
    """The row of a pipeline, and whether those work, are refused, or are wrong by more than rounding."""
    try:
        family = Recorded(pipeline)
    except ValueError as error:
        return refused(title, error)
    record = family.record
    sign = "−" if family.place(*family.recorder.square).sign < 0 else "+"
    prompted = ", ".join(f"`{name}`" for name in record.prompted)
    sized = ", ".join(f"`{name}`" for name in (*record.sized, *record.together)) or "–"
    pictured = [", ".join(f"`{name}`" for name in record.pictured)] if record.references else []
    differences = replayed(pipeline, family), batched(pipeline, family, conditions_of(family))
    # The time of half the pipelines is rounded once more on its way, and counts thousandfold in its sines.
    is_rounding = max(differences) < 10 * rounding(denoiser_of(pipeline))
    cells = (
        title,
        f"`{record.noisy}` {sign}",
        times_in_words(family),
        prompted,
        sized,
        *pictured,
        guidance_in_words(family),
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
    rows = pipelines_of(asked.names, asked.diffusers_tests, asked.edits)
    verdicts = walk(rows, partial(tried, references=int(asked.edits)), len(columns) + 1)
    if not asked.names and not asked.edits:
        print("\nNot tried, for they draw from other than a prompt alone, or no pictures of a size:", end=" ")
        print(", ".join(f"{count} {what}" for what, count in others().most_common()), end=".\n")
    print(told(verdicts))
    return 1 if verdicts["wrong"] else 0


def tried(make: Callable, title: str, references: int) -> tuple[str, str]:
    """The row of what `make` makes, and its verdict, whatever a denoiser does to what it has not been tried with."""
    try:
        choose_references(pipeline := make(), references)
        return row_of(pipeline, title)
    except Exception as error:
        return failed(title, error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
