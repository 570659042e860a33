"""What the recorded calls of a stock pipeline say: how it packs, scales, times, prompts, sizes and guides.

Arguments that follow the timestep are the time; what differs between two prompts is of the prompt; `placing.py` says
how latents are packed and normalised. An answer that this method has no place for is refused, never guessed.
"""

import inspect
from math import inf, prod

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from onelora_diffusion.denoisers import autoencoder_of, denoisers_in
from onelora_diffusion.families.arguments import output_of, same, scale_of, tensors_in
from onelora_diffusion.families.autoencoder import moments_of
from onelora_diffusion.families.coordinates import check_drawn, find_steps
from onelora_diffusion.families.given import PROBED_FRAMES, draws_from_first_frame
from onelora_diffusion.families.guided import find_guidance
from onelora_diffusion.families.noises import drawn_at_random, find_others, find_switch
from onelora_diffusion.families.pictured import find_pictured
from onelora_diffusion.families.placing import digit, place_at
from onelora_diffusion.families.prompted import find_conditions
from onelora_diffusion.families.record import Place, Run
from onelora_diffusion.families.recording import SHORT, NotTakenError, Recorder
from onelora_diffusion.families.targets import targets_in
from onelora_diffusion.files import first_line

SIDES = (64, 128, 256, 512, 1024, 32, 16)  # pixels: the first that a pipeline takes is what it is recorded at
OFF = ({}, {"guidance_scale": 1.0}, {"guidance_scale": 0.0}, {"true_cfg_scale": 1.0})
STEPPED = ("model_output", "timestep", "sample", "args", "kwargs")  # what the steps of schedulers need
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
    check_call(recorder)
    if recorder.record.references and draws_from_first_frame(recorder.pipeline):
        recorder.record.frames = PROBED_FRAMES
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
    call = recorder.call(encoded=record.encoded)
    record.targets = targets_in(recorder.denoiser, recorder.blocks, lambda: recorder.answered(call))
    return place


def check_call(recorder: Recorder) -> None:
    """ValueError for a pipeline whose call or parts are not those that are recorded."""
    pipeline, record, takes = recorder.pipeline, recorder.record, recorder.takes
    if not recorder.blocks:
        raise recorder.refusal("its denoiser has no list of blocks of one class")
    for name in ("prompt", *(() if record.references else ("height", "width")), "num_inference_steps"):
        if name not in recorder.parameters:
            raise recorder.refusal(f"its call takes no {name}")
    if takes and recorder.parameters[takes].default is inspect.Parameter.empty and not record.references:
        clips = ", or are the first frames of clips of --frames" if recorder.counts else ""
        raise recorder.refusal(
            f"its call needs {takes}, a picture to draw from: pictures are named by --reference-column{clips}"
        )
    for name in ("scheduler", *{"vae"} & pipeline.components.keys()):
        if getattr(pipeline, name, None) is None:
            raise recorder.refusal(f"it has no {name}")
    own = [*inspect.signature(type(pipeline.scheduler).step).parameters.values()][1:]
    if more := [each.name for each in own if each.default is each.empty and each.name not in STEPPED]:
        raise recorder.refusal(
            f"its {type(pipeline.scheduler).__name__} steps by {' and '.join(more)}, too: give its base another one"
        )
    if len(recorder.guides) > (len(recorder.counted) == 1):
        raise recorder.refusal(f"beside {' and '.join(recorder.counted)} it has {' and '.join(recorder.guides)}")


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
        if not found and record.frames > 1:
            found = [name for name in drawn_at_random(recorder, **off) if len(run.calls[0][name]) == 1]
        tried = off
        if len(run.calls) == 1 and len(found) == 1:
            break
    else:
        if not record.others and find_others(recorder):
            return find_noise_at(recorder)
        if run is None:
            raise failure
        raise recorder.refusal(_without_noise(run, found, tried))
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


def _without_noise(run: Run, found: list[str], off: dict) -> str:
    """Why no argument is the noise: of those that are found there is not one, in one call."""
    if len(run.calls) > 1 or found:
        return (
            f"with {off or 'its own settings'} its denoiser is called {len(run.calls)} times in a step, and of its "
            f"arguments {', '.join(found) or 'none'} has the scheduler's sample in it"
        )
    given = [value for value in run.calls[0].values() if isinstance(value, Tensor) and value.ndim]
    if rows := [len(value) for value in given if scale_of(value[:1], run.samples[0])]:
        return f"its denoiser is given {rows[0]} rows for an image, also without guidance"
    return "what its denoiser is given is not its scheduler's sample, but computed from it"


def _is_of_layers(value) -> bool:
    """Whether an argument for one image is a list of tensors that each have a dimension of images."""
    is_list = isinstance(value, list | tuple) and len(value) > 1
    return is_list and all(isinstance(entry, Tensor) and entry.ndim > 1 and len(entry) == 1 for entry in value)


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
        answer, step = recorder.answering(digit), lambda number, sample: sample
        run = recorder.alone(answer=answer, step=step, frames=TRIED_FRAMES)
    except NotTakenError:
        return 0
    of_frame = place.shape[0] * prod(place.shape[-2:])
    more = run.decoded.numel() // of_frame - 1
    return (TRIED_FRAMES - 1) // more if more > 0 and (TRIED_FRAMES - 1) % more == 0 else 0


def _takes(recorder: Recorder, height: int, count: int) -> bool:
    """Whether the pipeline draws images of this height, and its denoiser the tokens of it."""
    record = recorder.record
    try:
        encoded = None if record.together else record.encoded
        run = recorder.alone((height, record.side), answer=recorder.answering(digit), encoded=encoded)
        if run.samples[0].numel() * record.side != count * height:
            return False
        output = recorder.answered(run.calls[0])
    except Exception:  # whatever a denoiser refuses a size by
        return False
    return tuple(output[0].shape) == record.output_shape(tuple(run.calls[0][record.noisy][0].shape))
