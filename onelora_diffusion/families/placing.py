"""What a pipeline says of images of one size: how it packs, scales and decodes their latents.

Numbered values go in one side, digit by digit; where they come out of the other is a permutation of them, or refused.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import ceil, log

import torch
from torch import Tensor

from onelora_diffusion.diffusion import prediction_of
from onelora_diffusion.families.coordinates import Steps, measured, odds_of, sign_of, times_of, unmixed
from onelora_diffusion.families.family import longest
from onelora_diffusion.families.given import scaled_as_others, still_in
from onelora_diffusion.families.record import Place, Run
from onelora_diffusion.families.recording import Recorder, fresh
from onelora_diffusion.families.references import blank

# Numbers are sent through a pipeline digit by digit: bfloat16 has the digits exactly, and they count up to 2^28.
BASE, DIGITS = 128, 4
FINE_BASE, COARSE = 16, 256.0  # digits of what bfloat16 has scaled and shifted, and a number to see by what
NO_PICTURE = "asked for one frame it draws {}, of a clip: a base that draws no picture is not recorded, take another"


def place_at(
    recorder: Recorder, side: tuple[int, int], sizes: Sequence = (), frames: int = 1, length: int | None = None
) -> tuple[Place, Run]:
    """What the pipeline says of images of this size, or of clips of so many frames, and the run that says it.

    Args:
        sizes: width and height of each reference image. (): those of probes.
        length: the number of tokens of prompts. None: the pipeline's own.
    """
    record = recorder.record
    answer = recorder.answering(lambda number, elements: digit(number, elements) + 1)
    call = partial(recorder.alone, side, answer=answer, references=blank(sizes), frames=frames, **longest(length))
    run, own = call(steps=DIGITS + 1, step=_numbered), None
    seen = run
    if record.steps in ("flow", "image"):
        own = measured(recorder, side, DIGITS + 1, frames)
        seen = call(steps=DIGITS + 1, step=_numbered, precise=True)
    count, argument = run.samples[0].numel(), tuple(seen.calls[0][record.noisy][0].shape)
    packed = _packing(recorder, seen, own, count)
    outputs = [output.round() for output in unmixed(seen, own)] if own else run.outputs
    sign, unpacked = _unpacking(recorder, outputs[:DIGITS], count, record.output_shape(argument))
    is_clip = max(frames, record.frames) > 1
    moves = packed >= 0
    scale, shift, order = _Decoding(recorder, call, run, packed[moves].sort().values, is_clip).found()
    latent_at = torch.empty(count, dtype=torch.long)
    latent_at[order[order >= 0]] = (order >= 0).nonzero().flatten()
    packed[moves], packed[~moves] = latent_at[packed[moves]], len(order) + torch.arange(int((~moves).sum()))
    check_schedule(recorder, run)
    if record.steps == "flow":
        sign = sign_of(own)
    elif not 0.8 < run.spread < 1.2:  # a statistic, where a pipeline draws other numbers before its noise
        if prediction_of(recorder.pipeline.scheduler.config) != "flow":
            raise recorder.refusal(f"its noise is {run.spread:g} times that of its scheduler")
        record.spread = record.unit = round(run.spread, 5)
    run.times = times_of(recorder, own) if own else run.times
    scale, given = (scale * record.unit).cpu(), (order < 0).reshape(scale.shape)
    if given.any():
        scale, shift = (scaled_as_others(moment, given) for moment in (scale, shift.cpu()))
        if scale is None or shift is None:
            raise recorder.refusal("some of its latents are given clean, and the others are not scaled alike")
    return Place(
        odds=odds_of(recorder, own) if record.steps == "flow" else 1.0,
        shape=tuple(scale.shape),
        argument=argument,
        order=order,
        packed=packed,
        unpacked=unpacked[order.clamp(min=0)],
        sign=sign,
        scale=scale,
        shift=shift.cpu(),
        frames=run.decoded.ndim == 5,
        decoding=run.decoding,
        constants=run.calls[0],
        still=still_in(run.calls, record.noisy),
    ), run


def _packing(recorder: Recorder, run: Run, own: Steps | None, count: int) -> Tensor:
    """For each place of the noisy argument, the number of the scheduler's sample that stands there; -1: none."""
    values = torch.stack([call[recorder.record.noisy][0].flatten().cpu() for call in run.calls[: DIGITS + 1]])
    if own:
        values = values / own.scale[:, None]
    moves = (values != values[0]).any(0)  # all others are constant, or of reference images
    numbers = _from_digits(list(values[1:, moves].round()))
    found, is_whole = numbers.sort().values, len(numbers) == count
    is_part = len(found) > 0 and bool((found.diff() > 0).all()) and 0 <= found[0] and found[-1] < count
    if not is_part or not (is_whole or recorder.record.references):
        raise recorder.refusal(f"{recorder.record.noisy} is no permutation of the scheduler's sample")
    packed = torch.full(moves.shape, -1)
    packed[moves] = numbers
    return packed


def _unpacking(recorder: Recorder, outputs: list[Tensor], count: int, shape: tuple[int, ...]) -> tuple[int, Tensor]:
    """The sign of the denoiser's output in what the scheduler steps by, and for each value of that its place there."""
    signs = torch.cat([output.flatten() for output in outputs]).sign().unique().tolist()
    unpacked = _from_digits([output * signs[0] - 1 for output in outputs])
    if len(unpacked) == 2 * count and "learned" in str(recorder.pipeline.scheduler.config.get("variance_type")):
        unpacked = unpacked[:count]  # after which the scheduler is given the variance
    is_part = len(unpacked) == count == len(unpacked.unique())
    if signs not in ([1], [-1]) or not is_part or unpacked.min() < 0 or unpacked.max() >= torch.Size(shape).numel():
        raise recorder.refusal("what its scheduler steps by is no permutation of the denoiser's output")
    return int(signs[0]), unpacked


class _Decoding:
    """What a pipeline's autoencoder is given to decode of the scheduler's last sample.

    Args:
        call: the pipeline, for images of one size.
        run: its call in which the last sample is 0, 1, 2, ...
        numbers: of that those that are noise, in order.
    """

    def __init__(self, recorder: Recorder, call: Callable[..., Run], run: Run, numbers: Tensor, is_clip: bool):
        self.recorder, self.call, self.run, self.numbers, self.is_clip = recorder, call, run, numbers, is_clip
        self.count = run.samples[0].numel()

    def found(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scale and shift of the shape of latents, and the order of these in the sample; see `Place`."""
        recorder, frames = self.recorder, self.recorder.record.frames
        grey, white = (self.call(step=_all_of(value, torch.float32)) for value in (0.0, 1.0))
        check_pixels(recorder, grey, white)
        given = 0 if self.run.decoded is None else self.latents(self.run).numel() - len(self.numbers)  # in each step
        if given < 0 and not self.is_clip and recorder.counts:
            raise recorder.refusal(NO_PICTURE.format("more latents than its autoencoder decodes"))
        if self.run.decoded is None or given and frames == 1:
            raise recorder.refusal("what its autoencoder decodes are not the latents of its scheduler")
        shift = self.latents(grey)
        scale, latents = self.latents(white) - shift, shift.shape[1:]
        is_given = (scale == 0).flatten().cpu() if given else torch.zeros(scale.numel(), dtype=torch.bool)
        order = self.order(self.run, scale, shift)
        if not self.is_whole(order[~is_given]):
            scale, order = self.fine(shift)
        if not self.is_whole(order[~is_given]):
            raise recorder.refusal("what its autoencoder decodes is no affine permutation of its scheduler's sample")
        if len(latents) == 4 and latents[1] != 1 and not self.is_clip or len(latents) not in (3, 4):
            raise recorder.refusal(NO_PICTURE.format(f"latents {tuple(latents)}"))
        shape = latents if self.is_clip else (latents[0], *latents[-2:])
        return scale.reshape(shape), shift.reshape(shape), torch.where(is_given, -1.0, order).round().long()

    def latents(self, run: Run) -> Tensor:
        """What was to be decoded, (1, C, ...) in float32, without what is of reference images."""
        latents = run.decoded.float()
        if len(latents) * len(self.numbers) == self.count and not self.is_clip:  # beside those of reference images
            latents = latents[int(self.numbers[0]) // len(self.numbers)][None]
        is_batch = latents.ndim == 4 and self.is_clip  # of an autoencoder of images, which has the frames as a batch
        return latents.transpose(0, 1)[None] if is_batch else latents

    def order(self, run: Run, scale: Tensor, shift: Tensor) -> Tensor:
        return ((self.latents(run) - shift) / scale).flatten().cpu()

    def is_whole(self, order: Tensor) -> bool:
        found = torch.equal(order.round().long().sort().values, self.numbers)
        return found and bool((order - order.round()).abs().max() <= 0.25)

    def fine(self, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and order where a few bits are left of numbers, and of what they are scaled and shifted by."""
        below, above = (self.latents(self.call(step=_all_of(value))) for value in (-COARSE, COARSE))
        scale = (above - below) / (2 * COARSE)
        places = range(ceil(log(self.count + 1, FINE_BASE)))
        digits = (self.order(self.call(step=partial(_fine_digit, place)), scale, shift).round() for place in places)
        return scale, sum(digit * FINE_BASE**place for place, digit in enumerate(digits))


def check_pixels(recorder: Recorder, *runs: Run) -> None:
    """Where there is no autoencoder, what is drawn are pixels from -1 to 1."""
    shown = [tuple(run.images.unique().tolist()) for run in runs if run.images is not None]
    if shown not in ([], [(0.0,), (1.0,)], [(0.5,), (1.0,)]):
        raise recorder.refusal("it has no autoencoder, and of samples from -1 to 1 it makes no pictures as they are")


def check_schedule(recorder: Recorder, run: Run) -> None:
    """Its times are those of its scheduler."""
    scheduler = fresh(recorder.pipeline.scheduler)
    run.set_timesteps(scheduler)
    if scheduler.timesteps[: len(run.times)].tolist() != run.times:
        raise recorder.refusal("it steps at other times than its scheduler's set_timesteps has set")


def _all_of(value: float, dtype: torch.dtype | None = None) -> Callable[[int, Tensor], Tensor]:
    return lambda number, sample: torch.full_like(sample, value, dtype=dtype)


def _numbered(number: int, sample: Tensor) -> Tensor:
    """The digits of the sample's places in the first steps, and these themselves in the last."""
    count = sample.numel()
    values = torch.arange(count, dtype=torch.float32) if number >= DIGITS else digit(number, count)
    return values.reshape(sample.shape).to(sample.device)


def _fine_digit(place: int, number: int, sample: Tensor) -> Tensor:
    """That digit of the sample's places, to the base `FINE_BASE`."""
    numbers = torch.arange(sample.numel(), device=sample.device) // FINE_BASE**place % FINE_BASE
    return numbers.reshape(sample.shape).to(sample.dtype)


def digit(number: int, count: int) -> Tensor:
    """That digit of 0, 1, 2, ..., the lowest first."""
    return (torch.arange(count) // BASE**number % BASE).float()


def _from_digits(digits: list[Tensor]) -> Tensor:
    # Rounded where a pipeline has computed with them, as one that guides by the sample that it predicts.
    return sum(digit.flatten().cpu().double().round() * BASE**place for place, digit in enumerate(digits)).long()
