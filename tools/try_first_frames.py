"""Record small pipelines of diffusers that draw clips from their first frame, and print what was found: a table.

    python -m tools.try_first_frames DIFFUSERS   # a checkout of diffusers' repository; two minutes on one core
    python -m tools.try_first_frames DIFFUSERS LTXImageToVideoPipeline   # of these classes alone

A pipeline is the real class, as diffusers' own tests make it, or `tests/first_frame_pipelines.py` does. Columns:
`given clean`: the latents that the denoiser is given without noise, of how many; they have no loss. `replayed`: the
largest difference between what the stock pipeline's denoiser puts out in a step and what the recording makes of the
same; `batch`: that of three clips with different first frames and prompts together from each alone; `drawn`: that of
the clip that is drawn here, guided as by default, from the stock pipeline's own. Each is relative to the largest
number in it, of pictures to white. `loss`: before and after four updates by all vectors, each of which has a gradient.
Exits with 1 if a difference is more than rounding, a loss does not fall, or a vector has no gradient.
"""

import argparse
import inspect
import sys
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import diffusers
import torch

from benchmarks.rounding import rounding
from onelora_diffusion.denoisers import autoencoder_of, choose_denoiser, denoiser_of, denoisers_in
from onelora_diffusion.families import Edit, Recorded, choose_references, draws_from_first_frame, family_of
from onelora_diffusion.families.recording import FRAMES
from onelora_diffusion.families.references import REFERENCES
from onelora_diffusion.sampling import SamplerSettings
from onelora_diffusion.sampling.drawing import EncodedConditions
from onelora_diffusion.sampling.guidance import ImageRequest
from onelora_diffusion.sampling.trajectory import RunningBatch
from tools.stock_calls import (
    Picture,
    batched,
    failed,
    guidance_in_words,
    refused,
    steps_apart,
    stock_call,
    times_in_words,
    told,
    walk,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # where the small pipelines are made
from families.learning import losses_of
from first_frame_pipelines import FIRST_FRAMES
from tiny_models import make_pipeline

from tools.diffusers_tests import pipelines_in

PROMPTS = ["a dog runs", "", "a violet triangle turns"]
COLUMNS = "pipeline", "noise", "time", "of the prompt and the picture", "given clean", "guidance"
COLUMNS += "replayed / batch / drawn", "loss"


def edits_of(family: Recorded) -> list[Edit]:
    """A prompt and a first frame for each of three clips."""
    side = family.recorder.square
    pictures = [Picture(side), Picture(side, turned=True), Picture((side[0] // 2, side[1]))]
    pairs = zip(PROMPTS, pictures, strict=True)
    return [Edit(prompt, (picture,), side, family.record.frames) for prompt, picture in pairs]


def drawn(pipeline, family: Recorded, edit: Edit) -> float:
    """The difference of a clip that is drawn here from the stock pipeline's, from its first sample on."""
    record, scale, place = family.record, family.guidance_scale(pipeline), family.place(*edit.side, edit.frames)
    guided = record.guided if family.is_guided and record.offset is not None else record.off
    asked = guided | ({record.guide: scale - record.offset} if guided == record.guided and record.guided else {})
    call = stock_call(pipeline, family, edit, **asked)
    expected, first = call.returned[0][0], call.steps[0][2][place.order[place.order >= 0]].float() / record.spread
    encoded = EncodedConditions(pipeline)
    request = ImageRequest(
        condition=encoded[edit],
        empty=encoded[Edit("", edit.references, edit.side, edit.frames)],
        generator=torch.Generator().manual_seed(0),
        guidance_scale=scale if guided == record.guided or record.told else 1.0,
    )
    with closing(RunningBatch(pipeline, family)) as batch:
        trajectory = batch.start([request], SamplerSettings(num_inference_steps=2), place.shape)
        trajectory.latents[(place.order >= 0).reshape(1, *place.shape)] = first
        while not trajectory.is_done:
            batch.step([trajectory])
    latents = family.completed(trajectory.latents, encoded[edit])
    found = (family.decode(autoencoder_of(pipeline), latents)[0] / 2 + 0.5).clamp(0, 1).transpose(0, 1)
    return float((found[-len(expected) :] - expected).abs().max())  # HunyuanVideo drops the first frames of a kind


def learned(pipeline, family: Recorded, edits: list[Edit]) -> list[float]:
    """The losses of two clips before each of five updates."""
    conditions = family.encode_conditions(pipeline, edits[:2])
    shape = family.latent_shape(pipeline, *edits[0].side, edits[0].frames)
    latents, noise = torch.randn(2, 2, *shape, generator=torch.Generator().manual_seed(1))
    share = family.timestep_range(family.training_scheduler(pipeline))
    timesteps = torch.tensor([share[len(share) // 3], share[2 * len(share) // 3]])
    return losses_of(pipeline, latents, noise, timesteps, conditions, updates=5)


def row_of(make: Callable, title: str) -> tuple[str, str]:
    """The row of what `make` makes, and whether it works, is refused, or is wrong."""

    try:
        pipeline = make()
        if not draws_from_first_frame(pipeline):
            return "", ""
    except Exception as error:
        return failed(title, error, "not made")
    try:
        choose_references(pipeline, 1)
        choose_denoiser(pipeline, "transformer" if len(denoisers_in(pipeline)) > 1 else None)
        with torch.no_grad():
            family = family_of(pipeline)
    except ValueError as error:
        return refused(title, error)
    try:
        edits, record, place = edits_of(family), family.record, family.place(*family.recorder.square)
        with torch.no_grad():
            replayed = steps_apart(pipeline, family, edits[0], stock_call(pipeline, family, edits[0], **record.off))
            differences = replayed, batched(pipeline, family, edits), drawn(pipeline, family, edits[0])
        before, *_, after = learned(pipeline, family, edits)
    except Exception as error:
        return failed(title, error)
    frames = f"{int(place.given[0, :, 0, 0].sum())} of {place.shape[1]} frames" if place.given.any() else "none"
    is_right = max(differences) < 10 * rounding(denoiser_of(pipeline))
    cells = (
        title,
        f"`{record.noisy}`",
        times_in_words(family),
        ", ".join(f"`{name}`" for name in dict.fromkeys((*record.prompted, *record.pictured))),
        frames,
        guidance_in_words(family),
        " / ".join(f"{each:.0e}" for each in differences),
        f"{before:.3f} → {after:.3f}",
    )
    return f"| {' | '.join(cells)} |", "work" if is_right else "wrong"


def classes() -> list[str]:
    """The pipeline classes of the installed diffusers that draw clips by a prompt and a picture, and by no more."""
    found = []
    for name in dir(diffusers):
        cls = getattr(diffusers, name, None)
        if name.endswith("Pipeline") and isinstance(cls, type):
            given = inspect.signature(cls.__call__).parameters.keys()
            if "prompt" in given and given & {*REFERENCES} and given & {*FRAMES}:
                found.append(name)
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("diffusers", type=Path, nargs="?", help="a checkout of diffusers' repository")
    parser.add_argument("classes", nargs="*", help="class names of pipelines; default: all")
    asked = parser.parse_args(arguments)
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    made = {} if asked.classes else {name: type(make_pipeline(name)).__name__ for name in FIRST_FRAMES}
    wanted = asked.classes or {*classes()} - {*made.values()}
    rows = [(f"`{cls}`, {name}", partial(make_pipeline, name)) for name, cls in made.items()]
    theirs = dict(pipelines_in(asked.diffusers)) if asked.diffusers else {}
    rows += [(f"`{name}`", make) for name, make in theirs.items() if name in wanted]
    print(told(verdicts := walk(rows, row_of, len(COLUMNS))))
    return 1 if "wrong" in verdicts else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
