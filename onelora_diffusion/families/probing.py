"""What the recorded calls of a stock pipeline say: how it packs, scales, times, prompts, sizes and guides.

Numbered values that go in one side and come out of the other say how latents are packed and normalised; arguments that
follow the timestep are the time; what differs between two prompts is of the prompt. An answer that this method has no
place for is refused, never guessed.
"""

import inspect
from collections.abc import Sequence
from math import ceil, inf, log, prod

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from onelora_diffusion.denoisers import autoencoder_of, denoisers_in
from onelora_diffusion.diffusion import prediction_of
from onelora_diffusion.families.arguments import output_of, same, scale_of, tensors_in
from onelora_diffusion.families.autoencoder import moments_of
from onelora_diffusion.families.coordinates import (
    check_drawn,
    find_steps,
    measured,
    odds_of,
    precise_run,
    sign_of,
    times_of,
    unmixed,
)
from onelora_diffusion.families.family import longest
from onelora_diffusion.families.given import (
    PROBED_FRAMES,
    drawn_at_random,
    draws_from_first_frame,
    scaled_as_others,
    still_in,
)
from onelora_diffusion.families.guided import find_guidance
from onelora_diffusion.families.noises import find_others, find_switch
from onelora_diffusion.families.pictured import find_pictured
from onelora_diffusion.families.prompted import find_conditions
from onelora_diffusion.families.record import Place, Run
from onelora_diffusion.families.recording import SHORT, NotTakenError, Recorder, fresh
from onelora_diffusion.families.references import blank
from onelora_diffusion.families.targets import targets_in
from onelora_diffusion.files import first_line

SIDES = (64, 128, 256, 512, 1024, 32, 16)  # pixels: the first that a pipeline takes is what it is recorded at
# Numbers are sent through a pipeline digit by digit: bfloat16 has the digits exactly, and they count up to 2^28.
BASE, DIGITS = 128, 4
FINE_BASE, COARSE = 16, 256.0  # digits of what bfloat16 has scaled and shifted, and a number to see by what
OFF = ({}, {"guidance_scale": 1.0}, {"guidance_scale": 0.0}, {"true_cfg_scale": 1.0})
STEPPED = ("model_output", "timestep", "sample", "args", "kwargs")  # what the steps of schedulers need
NO_PICTURE = "asked for one frame it draws {}, of a clip: a base that draws no picture is not recorded, take another"
TRIED_FRAMES = 25  # one and 24 more, which every number of frames a latent that autoencoders have divides


def probed(recorder: Recorder) -> Place:
    """Fill a recorder's record by some twenty calls, and return what was found at the recorded size.

    Raises:
        ValueError: the pipeline does what has no place in a record, with the argument that it does it to.
    """
    try:
        with torch.no_grad():
            return _probed(recorder)
    except ValueError:
        raise
    except Exception as error:  # whatever a part of the pipeline raises for what no probe expects
        raise recorder.refusal(f"{type(error).__name__}: {first_line(error)}") from error


def _probed(recorder: Recorder) -> Place:
    blocks = recorder.blocks
    if not blocks:
        raise recorder.refusal("its denoiser has no list of blocks of one class")
    sizes = () if recorder.record.references else ("height", "width")
    for name in ("prompt", *sizes, "num_inference_steps"):
        if name not in recorder.parameters:
            raise recorder.refusal(f"its call takes no {name}")
    takes = recorder.takes
    if takes and recorder.parameters[takes].default is inspect.Parameter.empty and not recorder.record.references:
        clips = ", or are the first frames of clips of --frames" if recorder.counts else ""
        raise recorder.refusal(
            f"its call needs {takes}, a picture to draw from: pictures are named by --reference-column{clips}"
        )
    if recorder.record.references and draws_from_first_frame(recorder.pipeline):
        recorder.record.frames = PROBED_FRAMES
    for name in ("scheduler", *{"vae"} & recorder.pipeline.components.keys()):
        if getattr(recorder.pipeline, name, None) is None:
            raise recorder.refusal(f"it has no {name}")
    scheduler = type(recorder.pipeline.scheduler)
    own = list(inspect.signature(scheduler.step).parameters.values())[1:]
    more = [each.name for each in own if each.default is each.empty and each.name not in STEPPED]
    if more:
        raise recorder.refusal(
            f"its {scheduler.__name__} steps by {' and '.join(more)}, too: give its base another one"
        )
    if len(recorder.guides) > (len(recorder.counted) == 1):
        raise recorder.refusal(f"beside {' and '.join(recorder.counted)} it has {' and '.join(recorder.guides)}")
    find_noise(recorder)
    find_steps(recorder)
    place, run = place_at(recorder, recorder.square)
    record, drawn = recorder.record, drawn_side(recorder, place)
    if drawn != record.side:  # it makes another size of the one that it is asked for: that is asked for then
        record.side, asked = drawn, record.side
        try:
            place, run = place_at(recorder, recorder.square)
        except NotTakenError as error:
            raise recorder.refusal(
                f"asked for {asked} by {asked} pixels it draws latents of {place.shape[-2]} by {place.shape[-1]}, of "
                f"which its autoencoder makes images of {drawn} by {drawn}, and those it does not draw"
            ) from error
    check_drawn(recorder, place, run.times)
    find_times(recorder, run, place)
    find_share(recorder, run)
    find_pictured(recorder, place)
    find_conditions(recorder)
    for name, dim in record.arrangement.dims.items():  # which were not known yet when the place was recorded
        place.constants[name] = place.constants[name].movedim(dim, 0)
    find_sizes(recorder, place, run.samples[0].numel())
    find_guidance(recorder, place)
    place.leave_out(record.together)
    call = recorder.call(encoded=record.encoded)
    record.targets = targets_in(recorder.denoiser, blocks, lambda: recorder.answered(call))
    return place


def find_noise(recorder: Recorder) -> None:
    """The smallest size that is taken, the setting without guidance, and the argument that has the noise."""
    failures = []
    for side in SIDES:
        recorder.record.side = side
        try:
            return find_noise_at(recorder)
        except NotTakenError as error:
            failures.append(error)
    raise failures[0]


def find_noise_at(recorder: Recorder) -> None:
    record, outputs, run, failure, tried, known = recorder.record, [], None, None, {}, {}

    def real(number, arguments):
        shapes = tuple(tensor.shape for tensor in tensors_in([*arguments.values()]))
        if shapes not in known:
            known[shapes] = output_of(recorder.denoiser(**arguments))
        outputs.append(known[shapes])
        return outputs[-1]

    scales = {name: 0.0 for name, each in recorder.parameters.items() if name.endswith("scale") and each.default}
    for off in (*OFF, scales):  # a pipeline may guide in several ways at once
        if not off.keys() <= recorder.parameters.keys():
            continue
        outputs.clear()
        try:
            run = recorder.run(SHORT, recorder.square, answer=real, **off)
        except NotTakenError as error:  # guided by default, some need a prompt to guide from
            failure = error
            continue
        if not run.calls:
            raise recorder.refusal(f"its call does not call its {recorder.component}")
        record.arrangement.lists |= {n for n, value in run.calls[0].items() if "." not in n and _is_of_layers(value)}
        if not run.samples:
            raise recorder.refusal("its call ends before a step of its scheduler")
        found = [name for name, value in run.calls[0].items() if scale_of(value, run.samples[0])]
        found = found or record.frames > 1 and drawn_at_random(recorder, off) or []
        tried = off
        if len(run.calls) == 1 and len(found) == 1:
            break
    else:
        if not record.others and find_others(recorder):
            return find_noise_at(recorder)
        if run is None:
            raise failure
        if len(run.calls) == 1 and not found:
            given = [value for value in run.calls[0].values() if isinstance(value, Tensor) and value.ndim]
            if rows := [len(value) for value in given if scale_of(value[:1], run.samples[0])]:
                raise recorder.refusal(f"its denoiser is given {rows[0]} rows for an image, also without guidance")
            raise recorder.refusal("what its denoiser is given is not its scheduler's sample, but computed from it")
        raise recorder.refusal(
            f"with {tried or 'its own settings'} its denoiser is called {len(run.calls)} times in a step, and of its "
            f"arguments {', '.join(found) or 'none'} has the scheduler's sample in it"
        )
    for what, values in (("the prompt's encoding", run.encoded), ("the output of its denoiser", outputs)):
        if any(tensor.isnan().any() for tensor in tensors_in(values)):
            raise recorder.refusal(f"{what} is not finite: check the weights that compute it")
    (name,) = found
    given, output = run.calls[0][name], outputs[0]
    before, after = given[0].shape, output[0].shape
    uneven = [1 for a, b in zip(after, before, strict=False) if a % b and b % a]
    if len(before) != len(after) or len(uneven) > 1:  # one: of channels, of which some are no noise
        raise recorder.refusal(f"{name} is {tuple(before)}, and the output {tuple(after)}")
    record.factors = tuple(a / b for a, b in zip(after, before, strict=True))
    record.off, record.noisy, record.encoded = off, name, send_to_device(run.encoded, "cpu")
    record.takes_lists, record.gives_lists = isinstance(given, list), isinstance(output, list)
    if record.others:
        find_switch(recorder, run.calls[0])


def _is_of_layers(value) -> bool:
    """Whether an argument for one image is a list of tensors that each have a dimension of images."""
    is_list = isinstance(value, list | tuple) and len(value) > 1
    return is_list and all(isinstance(entry, Tensor) and entry.ndim > 1 and len(entry) == 1 for entry in value)


def place_at(
    recorder: Recorder, side: tuple[int, int], sizes: Sequence = (), frames: int = 1, length: int | None = None
) -> tuple[Place, Run]:
    """What the pipeline says of images of this size, or of clips of so many frames, and the run that says it.

    Args:
        sizes: width and height of each reference image. (): those of probes.
        length: the number of tokens of prompts. None: the pipeline's own.
    """
    record, steps = recorder.record, DIGITS + 1
    settings = record.off | longest(length)
    answer = recorder.answering(lambda number, elements: _digit(number, elements) + 1)

    def numbered(number, sample):
        count = sample.numel()
        values = torch.arange(count, dtype=torch.float32) if number >= DIGITS else _digit(number, count)
        return values.reshape(sample.shape).to(sample.device)

    def run_of(steps: int, step) -> Run:
        return recorder.run(SHORT, side, steps, answer, step, record.encoded, blank(sizes), frames=frames, **settings)

    run, own = run_of(steps, numbered), None
    seen = run
    if record.steps in ("flow", "image"):
        own = measured(recorder, side, steps, frames)
        seen = precise_run(recorder, side, steps, answer, frames, step=numbered, references=blank(sizes))
    count, taken = run.samples[0].numel(), [call[record.noisy] for call in seen.calls]
    values = torch.stack([value[0].flatten().cpu() for value in taken[:steps]])
    if own:
        values = values / own.scale[:, None]
    moves = (values != values[0]).any(0)  # all others are constant, or of reference images
    packed = torch.empty(len(moves), dtype=torch.long)
    packed[moves] = _from_digits(list(values[1:, moves].round()))
    numbers = packed[moves].sort().values
    if not (_is_permutation(numbers, count) or record.references and _are_some(numbers, count)):
        raise recorder.refusal(f"{record.noisy} is no permutation of the scheduler's sample")
    outputs = [output.round() for output in unmixed(seen, own)[:DIGITS]] if own else run.outputs[:DIGITS]
    signs = {int(value.sign().unique()) if len(value.sign().unique()) == 1 else 0 for value in outputs}
    sign = signs.pop()
    unpacked = _from_digits([value * sign - 1 for value in outputs])
    elements = torch.Size(record.output_shape(tuple(taken[0][0].shape))).numel()
    if len(unpacked) == 2 * count and "learned" in str(recorder.pipeline.scheduler.config.get("variance_type")):
        unpacked = unpacked[:count]  # after which the scheduler is given the variance
    is_part = len(unpacked) == count == len(unpacked.unique()) and 0 <= unpacked.min() and unpacked.max() < elements
    if signs or not sign or not is_part:
        raise recorder.refusal("what its scheduler steps by is no permutation of the denoiser's output")
    grey, white = (
        run_of(2, lambda number, sample, value=value: torch.full(sample.shape, value, device=sample.device))
        for value in (0.0, 1.0)
    )
    check_pixels(recorder, grey, white)
    is_clip = max(frames, record.frames) > 1

    def decoded_of(run: Run) -> Tensor:
        latents = run.decoded.float()
        if len(latents) * len(numbers) == count and not is_clip:  # beside those of reference images
            latents = latents[int(numbers[0]) // len(numbers)][None]
        is_batch = latents.ndim == 4 and is_clip  # of an autoencoder of images, which has the frames as a batch
        return latents.transpose(0, 1)[None] if is_batch else latents

    given = 0 if run.decoded is None else decoded_of(run).numel() - len(numbers)  # clean in each step
    if given < 0 and frames == record.frames == 1 and recorder.counts:
        raise recorder.refusal(NO_PICTURE.format("more latents than its autoencoder decodes"))
    if run.decoded is None or given and record.frames == 1:
        raise recorder.refusal("what its autoencoder decodes are not the latents of its scheduler")

    def order_by(run: Run) -> Tensor:
        return ((decoded_of(run) - shift) / scale).flatten().cpu()

    shift, scale, latents = decoded_of(grey), decoded_of(white) - decoded_of(grey), decoded_of(run).shape[1:]
    is_given = (scale == 0).flatten().cpu() if given else torch.zeros(scale.numel(), dtype=torch.bool)

    def is_whole(order: Tensor) -> bool:
        own = order[~is_given]
        found = torch.equal(own.round().long().sort().values, numbers)
        return found and bool((own - own.round()).abs().max() <= 0.25)

    order = order_by(run)
    if not is_whole(order):  # a few bits may be left of numbers, and of what they are scaled and shifted by
        ends = (
            run_of(2, lambda number, sample, value=value: torch.full_like(sample, value))
            for value in (-COARSE, COARSE)
        )
        below, above = map(decoded_of, ends)
        scale = (above - below) / (2 * COARSE)
        places = range(ceil(log(count + 1, FINE_BASE)))
        runs = (run_of(2, lambda number, sample, place=place: _digit_of(sample, place)) for place in places)
        order = sum(order_by(each).round() * FINE_BASE**place for place, each in enumerate(runs))
    if not is_whole(order):
        raise recorder.refusal("what its autoencoder decodes is no affine permutation of its scheduler's sample")
    order = torch.where(is_given, -1.0, order).round().long()
    if len(latents) == 4 and latents[1] != 1 and not is_clip or len(latents) not in (3, 4):
        raise recorder.refusal(NO_PICTURE.format(f"latents {tuple(latents)}"))
    shape = tuple(latents) if is_clip else (latents[0], *latents[-2:])
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
    scale, shift = (scale * record.unit).reshape(shape).cpu(), shift.reshape(shape).cpu()
    if given:
        scale, shift = (scaled_as_others(moment, (order < 0).reshape(shape)) for moment in (scale, shift))
        if scale is None or shift is None:
            raise recorder.refusal("some of its latents are given clean, and the others are not scaled alike")
    return Place(
        odds=odds_of(recorder, own) if record.steps == "flow" else 1.0,
        shape=shape,
        argument=tuple(taken[0][0].shape),
        order=order,
        packed=packed,
        unpacked=unpacked[order.clamp(min=0)],
        sign=sign,
        scale=scale,
        shift=shift,
        frames=run.decoded.ndim == 5,
        decoding=run.decoding,
        constants=run.calls[0],
        still=still_in(run.calls, record.noisy),
    ), run


def check_pixels(recorder: Recorder, *runs: Run) -> None:
    """Where there is no autoencoder, what is drawn are pixels from -1 to 1."""
    shown = [tuple(run.images.unique().tolist()) for run in runs if run.images is not None]
    if shown not in ([], [(0.0,), (1.0,)], [(0.5,), (1.0,)]):
        raise recorder.refusal("it has no autoencoder, and of samples from -1 to 1 it makes no pictures as they are")


def check_schedule(recorder: Recorder, run: Run) -> None:
    """Its times are those of its scheduler."""
    scheduler = fresh(recorder.pipeline.scheduler)
    for name, value in run.attributes.items():
        setattr(scheduler, name, value)
    scheduler.set_timesteps(**run.schedule)
    if scheduler.timesteps[: len(run.times)].tolist() != run.times:
        raise recorder.refusal("it steps at other times than its scheduler's set_timesteps has set")


def find_times(recorder: Recorder, run: Run, place: Place) -> None:
    """The arguments that change from step to step, as lines over the scheduler's timestep."""
    most = recorder.pipeline.scheduler.config.num_train_timesteps
    times = place.told(torch.tensor(run.times, dtype=torch.float64), most)
    for name in run.calls[0]:
        values = [call.get(name) for call in run.calls]
        if name == recorder.record.noisy or all(same(value, values[0]) for value in values):
            continue
        values = [torch.as_tensor(value).flatten() for value in values]
        values = [value[values[0] != values[1]] for value in values]  # others are of what is given clean
        if any(not torch.equal(value, value[:1].expand_as(value)) for value in values):
            raise recorder.refusal(f"{name} changes from step to step, and is not one time for each image")
        line = line_of(times, torch.stack([value[0].double() for value in values]), values[0].dtype)
        if line is None:
            raise recorder.refusal(f"{name} changes from step to step, and is no a·t + b of the time t")
        recorder.record.times[name] = line
    if not recorder.record.times:
        raise recorder.refusal("no argument of its denoiser follows the time")


def find_share(recorder: Recorder, run: Run) -> None:
    """The times at which the chosen one of two denoisers computes."""
    pipeline, record = recorder.pipeline, recorder.record
    if len(denoisers_in(pipeline)) < 2:
        return
    ratio = pipeline.config.get("boundary_ratio")
    if ratio is None:
        raise recorder.refusal(f"it has {' and '.join(denoisers_in(pipeline))}, and no boundary_ratio between them")
    boundary = ratio * pipeline.scheduler.config.num_train_timesteps
    shares = {"transformer": (boundary, inf), "transformer_2": (-inf, boundary)}
    if [t >= boundary for t in run.times] != [name == "transformer" for name in run.called]:
        raise recorder.refusal(f"it does not change from one denoiser to the other at the time {boundary:g}")
    record.share = shares[recorder.component]


def line_of(at: Tensor, values: Tensor, dtype: torch.dtype) -> tuple[float, float] | None:
    """a and b of a·t + b, which a pipeline has computed in a precision; None if values are on no line.

    a and b are plain numbers where they are near one: 1 or a thousandth, and 0, 1 or 1000.
    """
    by = (values[-1] - values[0]) / (at[-1] - at[0])
    precision = 4 * (torch.finfo(dtype).eps if dtype.is_floating_point else 2**-23)
    plain = min((sign * size for sign in (1, -1) for size in (1, 1e-3)), key=lambda plain: abs(plain - by))
    by = float(plain if abs(plain - by) <= precision * abs(plain) or precision > 1e-3 else by)
    start = float((values - by * at).mean())
    tolerance = precision * values.abs().max().clamp(min=1)
    start = next((float(plain) for plain in (0, 1, 1000) if abs(start - plain) <= tolerance), start)
    return (by, start) if (by * at + start - values).abs().max() <= tolerance else None


def drawn_side(recorder: Recorder, place: Place) -> int:
    """Side in pixels of the images that the pipeline draws when asked for the recorded size; it sets `pixels`."""
    record, vae, side = recorder.record, autoencoder_of(recorder.pipeline), recorder.record.side
    image = torch.zeros(1, 3, *[1] * place.frames, side, side, device=vae.device, dtype=vae.dtype)
    try:
        encoded = moments_of(vae, image)[0]
    except Exception as error:  # whatever an autoencoder refuses an image by
        raise recorder.refusal(
            f"its autoencoder does not take an image of {side} by {side} pixels: {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error
    record.pixels = max(1, side // encoded.shape[-1])
    return place.shape[-1] * record.pixels


def find_sizes(recorder: Recorder, place: Place, count: int) -> None:
    """The multiple of pixels that sides are taken in; the own side of a pipeline that draws one size alone."""
    record, side = recorder.record, recorder.record.side
    if place.shape[-2:] != (side // record.pixels,) * 2:
        drawn = " by ".join(map(str, place.shape[-2:]))
        raise recorder.refusal(f"asked for {side} by {side} pixels it draws another size, of {drawn} latents")
    multiples = (record.pixels * 2**power for power in range(12))
    taken = (each for each in multiples if each < side and _takes(recorder, side + each, count))
    record.multiple = next(taken, side)
    if recorder.counts:
        record.stride = _stride(recorder, place)
        if record.frames > 1 and 1 + (place.shape[1] - 1) * record.stride != record.frames:
            raise recorder.refusal(f"it draws clips of other numbers of frames than its {recorder.counts}")


def _stride(recorder: Recorder, place: Place) -> int:
    """Frames of a clip for each of its latents after the first; 0 if the pipeline draws no clips of such numbers."""
    try:
        answer = recorder.answering(_digit)
        encoded, off = recorder.record.encoded, recorder.record.off
        run = recorder.run(SHORT, recorder.square, 2, answer, lambda number, x: x, encoded, frames=TRIED_FRAMES, **off)
    except NotTakenError:
        return 0
    of_frame = place.shape[0] * prod(place.shape[-2:])
    more = run.decoded.numel() // of_frame - 1
    return (TRIED_FRAMES - 1) // more if more > 0 and (TRIED_FRAMES - 1) % more == 0 else 0


def _takes(recorder: Recorder, height: int, count: int) -> bool:
    """Whether the pipeline draws images of this height, and its denoiser the tokens of it."""
    record = recorder.record
    try:
        run = recorder.run(
            SHORT,
            (height, record.side),
            2,
            recorder.answering(_digit),
            encoded=None if record.together else record.encoded,
            **record.off,
        )
        if run.samples[0].numel() * record.side != count * height:
            return False
        output = recorder.answered(run.calls[0])
    except Exception:  # whatever a denoiser refuses a size by
        return False
    return tuple(output[0].shape) == record.output_shape(tuple(run.calls[0][record.noisy][0].shape))


def _digit_of(sample: Tensor, place: int) -> Tensor:
    """That digit of the numbers of a sample's values, to the base `FINE_BASE`."""
    numbers = torch.arange(sample.numel(), device=sample.device) // FINE_BASE**place % FINE_BASE
    return numbers.reshape(sample.shape).to(sample.dtype)


def _digit(number: int, count: int) -> Tensor:
    """That digit of 0, 1, 2, ..., the lowest first."""
    return (torch.arange(count) // BASE**number % BASE).float()


def _from_digits(digits: list[Tensor]) -> Tensor:
    # Rounded where a pipeline has computed with them, as one that guides by the sample that it predicts.
    return sum(digit.flatten().cpu().double().round() * BASE**place for place, digit in enumerate(digits)).long()


def _are_some(numbers: Tensor, count: int) -> bool:
    """Whether these are different ones of 0, 1, ..., count - 1, in order."""
    return len(numbers) > 0 and bool((numbers.diff() > 0).all() and numbers[0] >= 0 and numbers[-1] < count)


def _is_permutation(order: Tensor, count: int) -> bool:
    return len(order) == count and torch.equal(order.sort().values, torch.arange(count))
