"""What walks over small pipelines share: calls of the stock pipeline, differences from them, rows of a table."""

import functools
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from unittest import mock

import torch
from PIL import Image
from torch import Tensor

from onelora_diffusion.denoisers import autoencoder_of, denoiser_of
from onelora_diffusion.families.coordinates import Translated
from onelora_diffusion.families.family import Edit
from onelora_diffusion.families.recorded import Recorded, line_in_words
from onelora_diffusion.files import first_line
from onelora_diffusion.sampling.settings import SamplerSettings
from onelora_diffusion.sampling.trajectory import scheduler_of


class NotMadeError(Exception):
    """A test loads a part of which nothing here makes a small one."""


SECONDS = 600  # for one class
STEPS = 2  # of a picture
PROMPTS = ["a bold Q", "", "a violet triangle"]


@dataclass(frozen=True)
class Picture:
    """A reference image: dark on one side and light on the other."""

    size: tuple[int, int]
    turned: bool = False

    def image(self) -> Image.Image:
        return Image.linear_gradient("L").rotate(180 * self.turned).resize(self.size).convert("RGB")


REFERENCES = [Picture((64, 96)), Picture((96, 64)), Picture((64, 96), turned=True)]


def conditions_of(family: Recorded, prompts: list[str] = PROMPTS) -> list[str | Edit]:
    """The prompts, each with a reference image if the family edits, of two shapes."""
    pairs = zip(prompts, REFERENCES, strict=False)
    edits = [Edit(prompt, (picture,), family.recorder.square) for prompt, picture in pairs]
    return edits if family.record.references else prompts


@dataclass
class StockCall:
    """What a stock pipeline's call has shown.

    Attributes:
        steps: what its scheduler got in each step: output, time, sample, and that as it scales it for the denoiser.
        last: the sample after the last step.
        decoded: what the autoencoder has made, each time it decoded.
        returned: what the call returned.
    """

    steps: list[tuple[Tensor, float, Tensor, Tensor]] = field(default_factory=list)
    last: Tensor | None = None
    decoded: list = field(default_factory=list)
    returned: object = None


def stock_call(pipeline, family: Recorded, condition: str | Edit, apart: bool = True, **settings) -> StockCall:
    """Let the pipeline draw with the mean of each reference's latents.

    Args:
        apart: whether noises beside that of the clip, as of sound, are kept out of its prediction.
    """
    recorder, autoencoder, scheduler = family.recorder, autoencoder_of(pipeline), pipeline.scheduler
    found = StockCall()
    own_step, own_decode = type(scheduler).step, autoencoder.decode

    @functools.wraps(own_step)  # pipelines ask what it takes
    def step(self, output, time, sample, *args, **kwargs):
        scaled = self.scale_model_input(sample, time) if hasattr(self, "scale_model_input") else sample
        # Copied, since some pipelines write over them.
        values = output.flatten(), float(time), sample.flatten().clone(), scaled.flatten().clone()
        stepped = own_step(self, output, time, sample, *args, **kwargs)
        if self is scheduler or not family.record.others:  # whose schedulers are copies
            if "pred_original_sample" not in kwargs:  # else it was asked for that before
                found.steps.append(values)
            found.last = stepped[0].flatten()
        return stepped

    def decode(*args, **kwargs):
        found.decoded.append(own_decode(*args, **kwargs))
        return found.decoded[-1]

    for name, guider in recorder.guiders.items():
        pipeline.register_modules(**{name: guider.new(guidance_scale=settings.get("guider", 1.0))})
    edit = condition if isinstance(condition, Edit) else Edit(condition, (), recorder.square)
    pictures = [reference.image() for reference in edit.references]
    given = recorder.arguments(edit.prompt, edit.side, STEPS, pictures, edit.frames, **settings)
    switch = denoiser_of(pipeline).register_forward_pre_hook(
        lambda denoiser, args, kwargs: (args, kwargs | (family.record.switched if apart else {})), with_kwargs=True
    )
    with (
        mock.patch.object(type(scheduler), "step", step),
        mock.patch.object(autoencoder, "decode", decode),
        mock.patch.object(autoencoder, "encode", mean_of(autoencoder.encode)),
    ):
        found.returned = pipeline(**given)
    switch.remove()
    return found


def mean_of(encode: Callable) -> Callable:
    """`vae.encode` with the mean of latents for every one that is drawn, as in recordings."""

    def encode_mean(images, *args, **kwargs):
        encoded = encode(images, *args, **kwargs)
        if hasattr(encoded, "latent_dist"):
            encoded.latent_dist = type(encoded.latent_dist)(encoded.latent_dist.parameters, deterministic=True)
        return encoded

    return encode_mean


def largest(difference: Tensor, of: Tensor) -> float:
    return float(difference.abs().max() / of.abs().max())


def steps_apart(pipeline, family: Recorded, condition: str | Edit, call: StockCall) -> float:
    """The relative difference of what is predicted here from what the denoiser put out in the steps of a call."""
    side, frames = (condition.side, condition.frames) if isinstance(condition, Edit) else (family.recorder.square, 1)
    place, record, worst = family.place(*side, frames), family.record, 0.0
    stepped, encoded = place.order >= 0, family.encode_conditions(pipeline, [condition])
    own = scheduler_of(pipeline, family, SamplerSettings(num_inference_steps=STEPS), place.shape)
    is_other = isinstance(own, Translated)
    for number, (output, time, sample, scaled) in enumerate(call.steps):
        latents, expected = torch.zeros(len(place.order)), output[place.order[stepped]].float()
        latents[stepped] = (sample if is_other else scaled)[place.order[stepped]].float() / record.unit
        latents = given = latents.reshape(1, *place.shape)
        if is_other:
            own.number, time = number, own.timesteps[number]
            given = own.scale_model_input(latents, time)
        found = family.predict(denoiser_of(pipeline), given, torch.tensor([time]), encoded)[:, : place.shape[0]]
        found = own.output_of(found, latents) if is_other else found * record.spread
        worst = max(worst, largest(found.flatten()[stepped] - expected, expected))
    return worst


def batched(pipeline, family: Recorded, conditions: list[str | Edit]) -> float:
    """The relative difference of a batch of three from its images alone."""
    model, encoded = denoiser_of(pipeline), family.encode_conditions(pipeline, conditions)
    latents = torch.randn(3, *family.latent_shape(pipeline, *family.recorder.square, family.record.frames))
    times = torch.tensor([100.0, 500.0, 900.0])
    together, alone = family.predict(model, latents, times, encoded), []
    for row, condition in enumerate(conditions):
        own = family.encode_conditions(pipeline, [condition])
        alone.append(family.predict(model, latents[row : row + 1], times[row : row + 1], own))
    return largest(together - torch.cat(alone), together)


def times_in_words(family: Recorded) -> str:
    return ", ".join(f"`{name}` {line_in_words(*line)}" for name, line in family.record.times.items())


def guidance_in_words(family: Recorded) -> str:
    return {0: "w", 1: "w − 1", None: "its own"}[family.record.offset] if family.is_guided else "none"


def walk(
    rows: Iterable[tuple[str, Callable]], row_of: Callable[[Callable, str], tuple[str, str]], columns: int
) -> Counter:
    """Print the row of each pipeline that has one, filled to its columns; returns how often there was each verdict.

    Args:
        rows: the title of each, and what makes the pipeline.
        row_of: the row and the verdict for these; "": it is none of those that are tried.
    """
    verdicts = Counter()
    for title, make in rows:
        row, verdict = alone(lambda make=make, title=title: row_of(make, title), title)
        if row:
            print(row + " |" * (columns + 1 - row.count("|")), flush=True)
        verdicts[verdict] += bool(verdict)
    return +verdicts


def told(verdicts: Counter) -> str:
    return f"\n{verdicts.total()} tried: {', '.join(f'{count} {verdict}' for verdict, count in verdicts.items())}."


def refused(title: str, error: Exception) -> tuple[str, str]:
    reason = first_line(error)
    return f"| {title} | refused: {reason.partition('cannot be recorded: ')[2] or reason} |", "refused"


def failed(title: str, why: str | BaseException, verdict: str = "wrong") -> tuple[str, str]:
    """The row of a pipeline that fails in a way that is no refusal, or that is not made."""
    if isinstance(why, NotMadeError):
        verdict = "not made"
    elif isinstance(why, BaseException):
        why = f"{type(why).__name__}: {first_line(why)}"
    return f"| {title} | {'fails' if verdict == 'wrong' else verdict}: {why} |", verdict


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
