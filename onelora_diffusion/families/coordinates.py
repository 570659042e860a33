"""What a pipeline does between its scheduler and its denoiser, and so what its steps mean.

A step gives the denoiser `k` times the scheduler's sample y, and lets the scheduler step by m = c·y + d·o of its
output o, from which that knows what is denoised: D = p·y + q·m. So D = P·u + Q·o of u = k·y, what the denoiser is
given, with P = (p + q c) / k and Q = q d. Where P is one number, that is x_0 = u − σ v of u = (1-σ) x_0 + σ ε and
v = ε − x_0: flow matching, whatever the scheduler's own coordinates. Whatever was found is tried on a known picture.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from onelora_diffusion.diffusion import noise_schedule, prediction_of, target_at
from onelora_diffusion.families.record import Place, Run
from onelora_diffusion.families.recording import Recorder

STEPS = 5
TIMES = (500.0, 100.0, 50.0, 20.0, 5.0)  # at which it is seen by what σ a pipeline divides at least
LARGE = 2.0**14  # an answer beside which samples are small: where σ is small, a pipeline's own differences are rounded
FAR = 0.1  # mean distance of a picture of ±1 from itself that is no rounding, nor what noise a last step leaves


@dataclass
class Steps:
    """k, c and d of each step of a pipeline's call, (steps,) in float64, and the run that shows them."""

    scale: Tensor
    of_sample: Tensor
    of_output: Tensor
    run: Run

    @property
    def is_plain(self) -> bool:
        found = torch.stack([self.scale - 1, self.of_sample, self.of_output - self.of_output[0]])
        return float(found.abs().max()) < 0.01  # some pipelines round to the denoiser's precision all the same


def measured(
    recorder: Recorder,
    side: tuple[int, int],
    steps: int = STEPS,
    frames: int = 1,
    times: Sequence[float] = (),
    scales: bool = False,
) -> Steps:
    """k, c and d of the steps of a call, by two calls with two answers for the denoiser's.

    ValueError if they are not the same for all of the sample.
    """
    how = {"frames": frames, "times": times, "scales": scales, "precise": True}
    how["step"] = lambda number, sample: sample if number else sample / sample.std()
    answers = (recorder.answering_all(value) for value in (0.0, LARGE))
    runs = [recorder.alone(side, steps, answer, **how) for answer in answers]
    run, noisy, found = runs[0], recorder.record.noisy, []
    if len(run.calls) != len(run.times):  # a sampler of a higher order may take more
        raise recorder.refusal(
            f"its scheduler steps {len(run.times)} times where its denoiser is called {len(run.calls)} times"
        )
    for call, sample, *outputs in zip(run.calls, run.samples, *(each.outputs for each in runs), strict=False):
        own = sample.flatten().double().cpu()
        given = torch.cat([entry.flatten() for entry in call[noisy]]).double().cpu()
        is_as_it_is = torch.isin(own, given).double().mean() > 0.1 or given.numel() != own.numel()  # some is beside
        scale = torch.ones(()) if is_as_it_is else given.norm() / own.norm()
        without, whole = (output.flatten().double().cpu()[: len(own)] for output in outputs)
        of_sample = without @ own / (own @ own)
        of_output = (whole - without) / LARGE
        rest = (without - of_sample * own).abs().max() + (of_output - of_output[0]).abs().max()
        if rest > 1e-3 * (1 + own.abs().max() * of_sample.abs()):
            raise recorder.refusal("what its scheduler steps by is no sum of the sample and the denoiser's output")
        found.append(torch.stack([scale, of_sample, of_output[0]]))
    return Steps(*torch.stack(found, dim=1), run)


def find_steps(recorder: Recorder) -> None:
    """What the steps of a pipeline mean, from the kind of its scheduler and what is between them."""
    record, config = recorder.record, recorder.pipeline.scheduler.config
    steps, is_trigonometric = measured(recorder, recorder.square), config.get("prediction_type") == "trigflow"
    kind = "flow" if is_trigonometric else prediction_of(config)
    if kind != "flow":
        if not steps.is_plain:
            raise recorder.refusal("what its denoiser is given is not its scheduler's sample, but computed from it")
        record.steps = "edm" if kind == "edm" else ""
        return
    sigma, times = sigmas_of(steps), torch.tensor(steps.run.times, dtype=torch.float64)
    is_of_time = near_to(sigma * config.num_train_timesteps, times) and not config.get("invert_sigmas")
    if steps.is_plain and is_of_time and not is_trigonometric:
        return
    is_of_image = near_to(steps.of_sample, -steps.of_output) and near_to(steps.scale, torch.ones(()))
    if is_of_image and not is_trigonometric:
        record.steps, record.least = "image", _least(recorder)
        return
    of_given, of_output = _denoised(steps)
    unit, begin = float(of_given.mean()), float(steps.scale[0] * steps.run.begin / sigma[0])
    is_velocity = near_to(of_given, of_given.mean()) and unit > 0 and len(of_output.sign().unique()) == 1
    if not is_velocity or sigma.max() > 1.001 or abs(begin - 1) > 0.01:
        raise recorder.refusal("what its steps make of the denoiser's output is none of the known predictions")
    record.steps, record.unit = "flow", unit


def near_to(found: Tensor, expected: Tensor) -> bool:
    return bool(((found - expected).abs() <= 1e-3 * expected.abs().max()).all())


def _denoised(steps: Steps) -> tuple[Tensor, Tensor]:
    """P and Q of what each step knows as denoised, P·u + Q·o."""
    scheduler, times = steps.run.scheduler, torch.tensor(steps.run.times, dtype=torch.float64)
    if scheduler.config.get("prediction_type") == "trigflow":
        of_sample, of_step = times.cos(), -times.sin()
    else:
        sigmas = scheduler.sigmas.double()[: len(times)]
        of_sample, of_step = torch.ones_like(times), (1.0 if scheduler.config.get("invert_sigmas") else 0.0) - sigmas
    return (of_sample + of_step * steps.of_sample) / steps.scale, of_step * steps.of_output


def sigmas_of(steps: Steps) -> Tensor:
    """σ of flow matching at each step, (steps,)."""
    of_given, of_output = _denoised(steps)
    return of_output.abs() / of_given


def sign_of(steps: Steps) -> int:
    """The sign of the denoiser's output, by which it is a velocity ε − x_0."""
    return -int(_denoised(steps)[1][0].sign())


def unmixed(run: Run, steps: Steps) -> list[Tensor]:
    """The denoiser's outputs in what the scheduler got in each step of a run."""
    mixture = zip(steps.of_sample.tolist(), steps.of_output.tolist(), strict=True)
    return [(out - a * x) / b for out, x, (a, b) in zip(run.outputs, run.samples, mixture, strict=False)]


def _least(recorder: Recorder) -> float:
    """The least σ by which a pipeline divides u − o, of an image o, to a velocity; ValueError if it does otherwise."""
    steps = measured(recorder, recorder.square, len(TIMES), times=TIMES)
    sigma = torch.tensor(TIMES, dtype=torch.float64) / recorder.pipeline.scheduler.config.num_train_timesteps
    least = float(1 / steps.of_sample.max())
    expected = 1 / sigma.clamp(min=least)
    if not near_to(steps.of_sample, expected) or not near_to(-steps.of_output, expected):
        raise recorder.refusal("what its steps make of the denoiser's output is none of the known predictions")
    return least if least > float(sigma.min()) * 1.001 else 0.0


def odds_of(recorder: Recorder, steps: Steps) -> float:
    """s of a scheduler's times T·τ, τ / (1 - τ) = σ / (1 - σ) / s; 1 where they are no such times.

    A pipeline may tell its denoiser the time as it was before it was shifted by the size of its images.
    """
    tau = torch.tensor(steps.run.times, dtype=torch.float64) / recorder.pipeline.scheduler.config.num_train_timesteps
    sigma = sigmas_of(steps)
    inside = (sigma < 0.999) & (tau < 0.999)
    odds = (sigma / (1 - sigma) / (tau / (1 - tau)))[inside]
    return float(odds.mean()) if 0 < tau.min() and tau.max() < 1.001 and near_to(odds, odds.mean()) else 1.0


def times_of(recorder: Recorder, steps: Steps) -> list[float]:
    """The times of steps by which the denoiser's arguments are known: those of the scheduler, or of σ."""
    if recorder.record.steps != "flow":
        return steps.run.times
    return (sigmas_of(steps) * recorder.pipeline.scheduler.config.num_train_timesteps).tolist()


# ---------------------------------------------------------------------------------------------------
# The same in training and sampling


def training_scheduler(recorder: Recorder):
    """A scheduler whose training is the pipeline's own: its own, or one of flow matching."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    own = recorder.pipeline.scheduler
    return FlowMatchEulerDiscreteScheduler(own.config.num_train_timesteps) if recorder.record.steps == "flow" else own


class Translated:
    """A scheduler with its timesteps set, whose samples and predictions are latents and what a family predicts.

    Args:
        own: the pipeline's scheduler with its timesteps set.
        steps: of the pipeline's call.
        sign: of the denoiser's output, by which it is a prediction.
        unit: a latent's 1 in the scheduler's samples.
        times: those of the steps, as the family's `predict` takes them.
    """

    def __init__(self, own, steps: Steps, sign: int, unit: float, times: Sequence[float]):
        self.own, self.unit, self.number = own, unit, 0
        self.timesteps, self.init_noise_sigma = torch.tensor(times), steps.run.begin / unit
        self.scale, self.of_sample = steps.scale.tolist(), steps.of_sample.tolist()
        self.of_prediction = (sign * steps.of_output).tolist()
        self.takes_noise = "generator" in inspect.signature(own.step).parameters
        own.is_scale_input_called = True  # which some warn of

    def scale_model_input(self, latents: Tensor, timestep: Tensor) -> Tensor:
        return latents * (self.unit * self.scale[self.number])

    def output_of(self, prediction: Tensor, latents: Tensor) -> Tensor:
        """What the scheduler steps by."""
        return self.of_sample[self.number] * self.unit * latents + self.of_prediction[self.number] * prediction

    def step(self, prediction: Tensor, timestep: Tensor, latents: Tensor, generator=None):
        """As the scheduler's own, which returns `prev_sample`."""
        output, noise = self.output_of(prediction, latents), {"generator": generator} if self.takes_noise else {}
        stepped = self.own.step(output, self.own.timesteps[self.number], self.unit * latents, **noise)
        self.number += 1
        return SimpleNamespace(prev_sample=stepped.prev_sample / self.unit)


# ---------------------------------------------------------------------------------------------------
# A known picture


def check_drawn(recorder: Recorder, place: Place, times: Sequence[float]) -> None:
    """ValueError unless a pipeline draws a picture of which its denoiser knows everything, by its own steps.

    In each of them the noise ε is what the picture x_0 leaves of the noisy argument, as in training, and the answer
    what a denoiser that is trained on that picture alone would have learned.

    Args:
        place: at the recorded size.
        times: those of `STEPS` steps, as the family's `predict` takes them.
    """
    record, scheduler = recorder.record, training_scheduler(recorder)
    picture = torch.randn(len(place.order), generator=torch.Generator().manual_seed(1)).sign().double()
    moves, stepped = ~place.beside, place.order >= 0  # others are given clean

    def answer(number, arguments):
        given = dict(record.arrangement.named(arguments))[record.noisy]
        noisy = torch.zeros_like(picture)
        noisy[place.packed[moves]] = given[0].flatten().cpu().double()[moves] / record.spread
        level = level_at(times[number], scheduler)
        target = target_at(level, picture, (noisy - level[0] * picture) / level[1], scheduler.config)
        shape = record.output_shape(tuple(given[0].shape))
        output = torch.zeros(torch.Size(shape).numel(), dtype=torch.double)
        target = record.spread * (picture if record.steps == "image" else place.sign * target)
        output[place.unpacked[stepped]] = target[stepped]
        output = output.reshape(1, *shape).to(given[0])
        return list(output) if record.gives_lists else output

    run = recorder.alone(None, STEPS, answer, step=None, precise=True)
    drawn = run.drawn.flatten().cpu().double()[place.order[stepped]] / record.unit
    far = float((drawn - picture[stepped]).square().mean().sqrt())
    if not far < FAR:
        raise recorder.refusal(
            f"given exact predictions of {prediction_of(scheduler.config)} for a known picture, its "
            f"{type(recorder.pipeline.scheduler).__name__} draws another one: the two do not fit"
        )


def level_at(time: float, scheduler) -> Tensor:
    """The coefficients of x_0 and ε in what the denoiser is given at a time, (2,) in float64; see `noise_schedule`."""
    prediction, config = prediction_of(scheduler.config), scheduler.config
    if prediction == "flow":
        sigma = time / config.num_train_timesteps
        return torch.tensor([1 - sigma, sigma], dtype=torch.double)
    if prediction == "edm":
        sigma = math.exp(4 * time)
        return torch.tensor([1, sigma], dtype=torch.double) / math.hypot(sigma, config.sigma_data)
    table = noise_schedule(scheduler, torch.double)
    below = min(int(time), table.shape[1] - 2)
    low, high = table[:, below : below + 2].unbind(1)
    signal = low + (time - below) * (high - low)
    return signal / signal.norm()
