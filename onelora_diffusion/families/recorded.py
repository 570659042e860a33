"""A family that nobody wrote: what a stock pipeline's own call says of it, recorded and replayed.

The call runs with a recorder in the place of the denoiser, of the scheduler's `set_timesteps` and `step`, of
`vae.decode` and of `encode_prompt`. Numbered values that go in one side and come out of the other say how latents are
packed and normalised; arguments that follow the timestep are the time; what differs between two prompts is of the
prompt. An answer that this method has no place for is refused, never guessed.
"""

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from onelora_diffusion.families.autoencoder import in_range
from onelora_diffusion.families.family import Condition, Conditions, Family, longest
from onelora_diffusion.files import first_line
from onelora_diffusion.injection.book import unwrapped

SIDES = (64, 128, 256, 512, 1024)  # pixels: the first that a pipeline takes is what it is recorded at
SHORT, LONG = "dog", "violet triangle"  # of different length and beginning
BASE = 128  # of the numbers that are sent through a pipeline digit by digit: bfloat16 has them exactly
# Images are encoded to exactly the size that is asked for, and captions are encoded as they are written.
ASKED = {"use_resolution_binning": False, "clean_caption": False, "num_frames": 1, "output_type": "pt"}
OFF = ({}, {"guidance_scale": 1.0}, {"guidance_scale": 0.0}, {"true_cfg_scale": 1.0})
TRIED_SCALE = 3.0
ROOM = 512  # tokens of a prompt that are kept where the pipeline names no number


class _Stop(Exception):
    """Ends a recorded call, once it has said what was asked."""


class _NotTaken(ValueError):
    """A stock pipeline's own call fails, as it does for sizes that it does not draw."""


class _Answer(tuple):
    """What a denoiser or a scheduler returns, in each of the ways that pipelines read it."""

    sample = prev_sample = property(lambda self: self[0])


class _StandIn:
    """A component of a pipeline with some of its attributes replaced, which leaves the component as it is."""

    def __init__(self, part, called: Callable | None = None, **replaced):
        vars(self).update(replaced, _part=part, _called=called)

    def __getattr__(self, name: str):
        return getattr(self._part, name)

    def __call__(self, *args, **kwargs):
        return self._called(*args, **kwargs)


@dataclass
class _Run:
    """What one call of a stock pipeline has shown.

    Attributes:
        calls: arguments of the denoiser by name, those in dictionaries as `dictionary.name`.
        times, outputs, samples: what `scheduler.step` got.
        schedule: arguments of `scheduler.set_timesteps`.
        attributes: what the pipeline set on the scheduler before that.
        encoded: what each call of `encode_prompt` returned.
        decoded: what `vae.decode` got.
    """

    calls: list[dict] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    samples: list[Tensor] = field(default_factory=list)
    schedule: dict = field(default_factory=dict)
    attributes: dict = field(default_factory=dict)
    encoded: list = field(default_factory=list)
    decoded: Tensor | None = None


@dataclass(frozen=True)
class _Prompted:
    """An argument that follows the prompt.

    Attributes:
        kind: `rows` with a row for each image, `list` with an entry for each, `shared` by all images of a batch.
        ragged: the dimension of a row that is as long as the prompt; None: all are of one shape.
    """

    kind: str
    ragged: int | None


@dataclass(frozen=True, eq=False)
class _Place:
    """What the pipeline says of images of one size.

    Attributes:
        shape: of their latents, (C, h, w).
        argument: the shape of the noisy argument, without the batch.
        order: for each latent, its place in the scheduler's sample.
        packed: for each place of the noisy argument, the latent that stands there.
        unpacked: for each latent, its place in the denoiser's output.
        sign: of the output, by which it is a prediction.
        scale, shift: latents of the autoencoder are `scale · latents + shift`, (C, h, w).
        frames: whether the autoencoder has a dimension of frames.
        constants: all arguments that follow neither noise, time nor prompt.
        run: of the call, at the size that the pipeline is recorded at.
    """

    shape: tuple[int, ...]
    argument: tuple[int, ...]
    order: Tensor
    packed: Tensor
    unpacked: Tensor
    sign: int
    scale: Tensor
    shift: Tensor
    frames: bool
    constants: dict
    run: _Run | None


class Recorded(Family):
    """The family of one pipeline, whose call is recorded a dozen times, its transformer running in a few of them.

    Raises:
        ValueError: the pipeline does what has no place here, with the argument that it does it to.
    """

    def __init__(self, pipeline):
        self.pipeline = pipeline
        self.transformer = unwrapped(pipeline.transformer)
        self.transformer_class = type(self.transformer).__name__
        self.name = type(pipeline).__name__.removesuffix("Pipeline")
        if getattr(pipeline, "transformer_2", None) is not None:
            raise self._refusal("it has two transformers, and here one is trained")
        self.blocks = repeated_blocks(self.transformer)
        if not self.blocks:
            raise self._refusal("its transformer has no list of blocks of one class")
        self._parameters = inspect.signature(type(pipeline).__call__).parameters
        for name in ("prompt", "height", "width", "num_inference_steps"):
            if name not in self._parameters:
                raise self._refusal(f"its call takes no {name}")
        if not hasattr(pipeline, "encode_prompt"):
            raise self._refusal("it has no encode_prompt, by which its prompts are encoded")
        self._places: dict[tuple[int, int], _Place] = {}
        with torch.no_grad():
            self._find_noise()
            self._find_times()
            self._find_conditions()
            self._find_sizes()
            self._find_guidance()
            self.targets = targets_in(
                self.transformer, self.blocks, lambda: self._answered(self._at(self.side, self.side).constants)
            )

    def __str__(self) -> str:
        """What was found, in three lines."""
        place = self._at(self.side, self.side)
        times = ", ".join(
            f"{name} = {by:g}·t{f' + {start:g}' if start else ''}" for name, (by, start) in self._times.items()
        )
        prompted = ", ".join(
            f"{name} ({'one length' if how.ragged is None else 'of each length'})"
            for name, how in self._prompted.items()
        )
        if not self.is_guided:
            guidance = f"told as {self._told[0]}" if self._told else "none"
        else:
            way = {0: "w", 1: "w - 1", None: "in a way of its own; pictures here are guided plainly by w"}
            guidance = f"{self._guide} from the empty prompt, {way[self._offset]}"
        sign = "minus the" if place.sign < 0 else "the"
        return (
            f"{self.name}: noise is {self._noisy} {place.argument} of latents {place.shape}, {times}, "
            f"the prediction is {sign} output\n"
            f"{self.name}: of the prompt: {prompted}; of the size: {', '.join(self._sized) or 'nothing'}"
            f"{'; of both: ' + ', '.join(self._together) if self._together else ''}\n"
            f"{self.name}: guidance: {guidance}; sides are multiples of {self._multiple}; "
            f"adapters in {', '.join(f'{path}.*' for path in self.blocks)}"
        )

    def _refusal(self, what: str) -> ValueError:
        return ValueError(f"{type(self.pipeline).__name__} cannot be recorded: {what}")

    # -----------------------------------------------------------------------------------------------
    # Recording

    def _run(
        self,
        prompt: str | list[str],
        side: tuple[int, int] | None,
        steps: int = 2,
        answer: Callable[[int, dict], object] | None = None,
        step: Callable[[int, Tensor], Tensor | None] = lambda number, sample: None,
        encoded: list | None = None,
        **settings,
    ) -> _Run:
        """Calls the pipeline, its parts replaced.

        Args:
            side: (height, width) in pixels. None: what the pipeline draws by itself.
            answer: what the denoiser returns of its call's number and arguments. None: the first call is the last.
            step: the sample after that step. None: it is the last.
            encoded: what `encode_prompt` returned before, in place of its own.
        """
        pipeline, run = self.pipeline, _Run()
        signature = inspect.signature(self.transformer.forward)
        variable = [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
        device = pipeline._execution_device if encoded is None else torch.device("cpu")

        def forward(*args, **kwargs):
            arguments = dict(signature.bind(*args, **kwargs).arguments)
            for name in variable:
                arguments |= arguments.pop(name, {})
            run.calls.append(dict(_leaves(_copied(arguments))))
            if answer is None:
                raise _Stop
            return _Answer((answer(len(run.calls) - 1, arguments),))

        own = pipeline.scheduler
        scheduler = type(own).from_config(own.config)
        before = dict(vars(scheduler))
        set_timesteps = scheduler.set_timesteps

        @functools.wraps(set_timesteps)
        def recorded_set_timesteps(*args, **kwargs):
            arguments = dict(inspect.signature(set_timesteps).bind(*args, **kwargs).arguments)
            run.schedule = {name: value for name, value in arguments.items() if name != "device"}
            run.attributes = {
                name: value
                for name, value in vars(scheduler).items()
                if name not in ("set_timesteps", "step") and not _same(value, before.get(name))
            }
            return set_timesteps(*args, **kwargs)

        @functools.wraps(scheduler.step)
        def recorded_step(model_output, timestep, sample, *args, **kwargs):
            run.times.append(float(timestep))
            run.outputs.append(model_output)
            run.samples.append(sample)
            after = step(len(run.times) - 1, sample)
            if after is None:
                raise _Stop
            return _Answer((after,))

        def decode(latents, *args, **kwargs):
            run.decoded = latents
            raise _Stop

        def encode_prompt(*args, **kwargs):
            if encoded is None:
                run.encoded.append(type(pipeline).encode_prompt(pipeline, *args, **kwargs))
            else:
                run.encoded.append(encoded[len(run.encoded)])
            return run.encoded[-1]

        scheduler.set_timesteps, scheduler.step = recorded_set_timesteps, recorded_step
        given = ASKED | {"prompt": prompt, "num_inference_steps": steps, "generator": torch.Generator().manual_seed(0)}
        given |= settings | ({"height": side[0], "width": side[1]} if side else {})
        replaced = {
            "transformer": _StandIn(self.transformer, forward, device=device),
            "vae": _StandIn(pipeline.vae, decode=decode, device=device, dtype=torch.float32),
            "scheduler": scheduler,
            "encode_prompt": functools.wraps(pipeline.encode_prompt)(encode_prompt),
            "_progress_bar_config": {"disable": True},
        }
        with _replaced(pipeline, replaced), _silence():
            try:
                pipeline(**{name: value for name, value in given.items() if name in self._parameters})
            except _Stop:
                pass
            except Exception as error:  # whatever a stock pipeline refuses by
                asked = f"for {side[0]} by {side[1]} pixels " if side else ""
                raise _NotTaken(
                    f"{type(pipeline).__name__} cannot be recorded: its own call {asked}fails: "
                    f"{type(error).__name__}: {first_line(error)}"
                ) from error
        return run

    def _call(self, *args, **settings) -> dict:
        """The arguments of the denoiser's first call, without a guided one."""
        return self._run(*args, **{**self._off, **settings}).calls[0]

    def _find_noise(self) -> None:
        """The smallest size that is taken, the setting without guidance, and the argument that has the noise."""
        for self.side in SIDES:
            try:
                return self._find_noise_at((self.side, self.side))
            except _NotTaken as error:
                failure = error
        raise failure

    def _find_noise_at(self, side: tuple[int, int]) -> None:
        for self._off in (off for off in OFF if off.keys() <= self._parameters.keys()):
            outputs = []

            def real(number, arguments, outputs=outputs):
                outputs.append(_output(self.transformer(**arguments)))
                return outputs[-1]

            run = self._run(SHORT, side, answer=real, **self._off)
            if not run.samples:
                raise self._refusal("its call ends before a step of its scheduler")
            found = [name for name, value in run.calls[0].items() if _holds(value, run.samples[0])]
            if len(run.calls) == 1 and len(found) == 1:
                self._noisy, self._lists = found[0], isinstance(run.calls[0][found[0]], list)
                self._set_factors(_row(run.calls[0][found[0]]), outputs[0])
                self._encoded = send_to_device(run.encoded, "cpu")
                self._count = run.samples[0].numel()
                return
        raise self._refusal(
            f"with {self._off or 'its own settings'} its transformer is called {len(run.calls)} times in a step, and "
            f"of its arguments {', '.join(found) or 'none'} is the scheduler's sample in another order"
        )

    def _set_factors(self, given: Tensor, output: Tensor | list) -> None:
        self._gives_lists = isinstance(output, list)
        output = _row(output)
        if output.ndim != given.ndim or any(a % b for a, b in zip(output.shape, given.shape, strict=True)):
            raise self._refusal(f"{self._noisy} is {tuple(given.shape)}, and the output {tuple(output.shape)}")
        self._factors = [a // b for a, b in zip(output.shape, given.shape, strict=True)]

    def _output_shape(self, argument: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(size * factor for size, factor in zip(argument, self._factors, strict=True))

    def _answering(self, value_of: Callable[[int, int], Tensor]) -> Callable[[int, dict], object]:
        """A denoiser of which row `row` of call `number` is `value_of(number, elements)`."""

        def answer(number, arguments):
            given = dict(_leaves(arguments))[self._noisy]
            rows = len(given)
            shape = self._output_shape(tuple(given[0].shape))
            elements = torch.Size(shape).numel()
            first = given[0]
            values = [value_of(number, elements * rows)[elements * row : elements * (row + 1)] for row in range(rows)]
            values = [value.reshape(shape).to(first.device, first.dtype) for value in values]
            return values if self._gives_lists else torch.stack(values)

        return answer

    def _at(self, height: int, width: int) -> _Place:
        """What the pipeline says of images of this size, recorded once."""
        if (height, width) not in self._places:
            with torch.no_grad():
                place = self._recorded_at(height, width)
            # The steps themselves are looked at where the pipeline is recorded first, and are large elsewhere.
            self._places[height, width] = replace(place, run=None) if hasattr(self, "_times") else place
        return self._places[height, width]

    def _recorded_at(self, height: int, width: int) -> _Place:
        side, count = (height, width), None

        def start(number, sample):
            nonlocal count, shape
            count, shape = sample.numel(), sample.shape
            return None

        shape = None
        answer = self._answering(lambda number, elements: _digit(number, elements) + 1)
        self._run(SHORT, side, answer=answer, step=start, encoded=self._encoded, **self._off)
        digits = _digits(count)
        steps = max(4, digits + 1)

        def numbered(number, sample):
            values = torch.arange(count, dtype=torch.float32) if number == steps - 1 else _digit(number, count)
            return values.reshape(shape).to(sample.device)

        run = self._run(SHORT, side, steps, answer, numbered, self._encoded, **self._off)
        if len(run.calls) != steps or len(run.times) != steps:
            raise self._refusal(f"in {steps} steps its transformer is called {len(run.calls)} times")
        given = [call[self._noisy] for call in run.calls]
        packed = _from_digits([_row(value) for value in given[1 : digits + 1]])
        if not _is_permutation(packed, count):
            raise self._refusal(f"{self._noisy} is no permutation of the scheduler's sample")
        signs = {int(value.sign().unique()) if len(value.sign().unique()) == 1 else 0 for value in run.outputs}
        sign = signs.pop()
        if signs or not sign:
            raise self._refusal("what its scheduler steps by is no permutation of the transformer's output")
        outputs = _from_digits([value * sign - 1 for value in run.outputs[:digits]])
        elements = torch.Size(self._output_shape(tuple(_row(given[0]).shape))).numel()
        if len(outputs) != count or len(outputs.unique()) != count or outputs.max() >= elements or outputs.min() < 0:
            raise self._refusal("what its scheduler steps by is no permutation of the transformer's output")
        zeros, ones = (
            self._run(
                SHORT,
                side,
                2,
                answer,
                lambda number, sample, value=value: torch.full(shape, value, device=sample.device),
                self._encoded,
                **self._off,
            ).decoded
            for value in (0.0, 1.0)
        )
        if run.decoded is None or run.decoded.numel() != count:
            raise self._refusal("what its autoencoder decodes are not the latents of its scheduler")
        shift, scale = zeros.float(), ones.float() - zeros.float()
        order = (run.decoded.float() - shift) / scale
        if not _is_permutation(order.round().long().flatten(), count) or (order - order.round()).abs().max() > 0.25:
            raise self._refusal("what its autoencoder decodes is no affine permutation of its scheduler's sample")
        order = order.round().long().flatten()  # for each latent of the autoencoder, its place in the sample
        places = torch.empty(count, dtype=torch.long)
        places[order.cpu()] = torch.arange(count)
        latents = run.decoded.shape[1:]
        if len(latents) == 4 and latents[1] != 1 or len(latents) not in (3, 4):
            raise self._refusal(f"its autoencoder decodes {tuple(latents)}, of more than one image")
        latents = (latents[0], *latents[-2:])
        self._check_schedule(run)
        constants = run.calls[0]
        return _Place(
            shape=latents,
            argument=tuple(_row(given[0]).shape),
            order=order.cpu(),
            packed=places[packed.cpu()],
            unpacked=outputs.cpu()[order.cpu()],
            sign=sign,
            scale=scale.reshape(latents).cpu(),
            shift=shift.reshape(latents).cpu(),
            frames=run.decoded.ndim == 5,
            constants=constants,
            run=run,
        )

    def _check_schedule(self, run: _Run) -> None:
        scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        for name, value in run.attributes.items():
            setattr(scheduler, name, value)
        scheduler.set_timesteps(**run.schedule)
        if scheduler.timesteps[: len(run.times)].tolist() != run.times:
            raise self._refusal("it steps at other times than its scheduler's set_timesteps has set")

    def _find_times(self) -> None:
        """The arguments that change from step to step, as lines over the scheduler's timestep."""
        run = self._at(self.side, self.side).run
        self._times: dict[str, tuple[float, float]] = {}
        times = torch.tensor(run.times, dtype=torch.float64)
        for name in run.calls[0]:
            values = [call.get(name) for call in run.calls]
            if name == self._noisy or all(_same(value, values[0]) for value in values):
                continue
            tensors = [torch.as_tensor(value) for value in values]
            if any(value.numel() != 1 for value in tensors):
                raise self._refusal(f"{name} changes from step to step, and is not one time for each image")
            self._times[name] = self._line(
                name, times, torch.stack([value.double().reshape(()) for value in tensors]), tensors[0].dtype
            )
        if not self._times:
            raise self._refusal("no argument of its transformer follows the time")

    def _line(self, name: str, at: Tensor, values: Tensor, dtype: torch.dtype) -> tuple[float, float]:
        by = (values[-1] - values[0]) / (at[-1] - at[0])
        # A pipeline computes in its own precision; the line that it follows has plain numbers, where it is near one.
        precision = 4 * (torch.finfo(dtype).eps if dtype.is_floating_point else 2**-23)
        plain = min((sign * size for sign in (1, -1) for size in (1, 1e-3)), key=lambda plain: abs(plain - by))
        by = float(plain if abs(plain - by) <= precision * abs(plain) or precision > 1e-3 else by)
        start = float((values - by * at).mean())
        tolerance = precision * values.abs().max().clamp(min=1)
        start = next((float(plain) for plain in (0, 1, 1000) if abs(start - plain) <= tolerance), start)
        if (by * at + start - values).abs().max() > tolerance:
            raise self._refusal(f"{name} changes from step to step, and is no a·t + b of the time t")
        return by, start

    def _find_conditions(self) -> None:
        """Which arguments follow the prompt, how they are batched, and which follow the size."""
        side = (self.side, self.side)
        short, long, both = (self._call(prompt, side) for prompt in (SHORT, LONG, [SHORT, LONG]))
        most = self._parameters["max_sequence_length"].default if "max_sequence_length" in self._parameters else None
        fewer = self._call(SHORT, side, max_sequence_length=most // 2) if most else short
        wide = self._call(SHORT, (self.side, 2 * self.side), encoded=self._encoded)
        self._prompted, self._sized, self._together, self._masks, self._batched = {}, [], [], {}, {}
        for name in dict.fromkeys((*short, *both)):
            if name == self._noisy or name in self._times:
                self._batched[name] = True
                continue
            values = (short.get(name), long.get(name), both.get(name))
            kind = _kind(values[0], values[2])
            is_prompted = not _same(values[0], values[1]) or not _same(values[0], fewer.get(name))
            is_sized = not _same(values[0], wide.get(name))
            if is_prompted and is_sized:
                self._together.append(name)
            elif is_sized:
                self._sized.append(name)
            if is_prompted:
                self._prompted[name] = self._prompted_as(name, kind, *values)
            elif values[0] is None and isinstance(values[2], Tensor):
                self._masks[name] = values[2]
            elif kind is None:
                raise self._refusal(
                    f"{name} is {_described(values[0])} for one prompt, and {_described(values[2])} for two"
                )
            self._batched[name] = kind in ("rows", "list")
        if not self._prompted:
            raise self._refusal("no argument of its transformer follows the prompt")
        ragged = [name for name, how in self._prompted.items() if how.ragged is not None]
        if ragged and self._together:
            raise self._refusal(
                f"{self._together[0]} follows the prompt and the size together, and {ragged[0]} is as long as the "
                "prompt"
            )
        # What follows prompt and size together is made anew by the pipeline, of what its `encode_prompt` returned.
        lengths = [_row(call[ragged[0]]).shape[self._prompted[ragged[0]].ragged] for call in (short, long) if ragged]
        self._pads = bool(self._masks) or any(
            name in ragged
            and _row(short[name]).ndim == 1
            or [call[name].flatten().tolist() for call in (short, long) if isinstance(call[name], Tensor)]
            == [[length] for length in lengths]
            for name in self._prompted
        )
        for name, mask in self._masks.items():
            expected = torch.arange(max(lengths, default=0)) < torch.tensor(lengths or [0])[:, None]
            if mask.shape != expected.shape or not torch.equal(mask.bool().cpu(), expected):
                raise self._refusal(f"{name} is given for two prompts alone, and is no mask of their tokens")

    def _prompted_as(self, name: str, kind: str | None, short, long, both) -> _Prompted:
        if kind is None or not all(isinstance(value, Tensor) for value in (_row(short), _row(long))):
            raise self._refusal(f"{name} follows the prompt as {_described(short)}, and is {_described(both)} for two")
        first, second = (value if kind == "shared" else _row(value) for value in (short, long))
        if first.ndim != second.ndim:
            raise self._refusal(f"{name} is {_described(short)} for one prompt and {_described(long)} for another")
        ragged = [dim for dim, (a, b) in enumerate(zip(first.shape, second.shape, strict=True)) if a != b]
        if len(ragged) > 1:
            raise self._refusal(f"{name} is {_described(short)} for one prompt and {_described(long)} for another")
        return _Prompted(kind, ragged[0] if ragged else None)

    def _find_sizes(self) -> None:
        """Pixels of a latent, and the multiple of pixels that sides are taken in."""
        place, side = self._at(self.side, self.side), self.side
        self._pixels = max(1, side // place.shape[-1])
        if place.shape[1:] != (side // self._pixels,) * 2:
            drawn = " by ".join(map(str, place.shape[1:]))
            raise self._refusal(f"asked for {side} by {side} pixels it draws another size, of {drawn} latents")
        for self._multiple in (self._pixels * 2**power for power in range(12)):
            if self._multiple > side:
                raise self._refusal(
                    f"it rounds the size that it is asked for: {side + side} pixels are not twice {side}"
                )
            if self._takes(side + self._multiple):
                return

    def _takes(self, height: int) -> bool:
        """Whether the pipeline draws images of this height, and its transformer the tokens of it."""
        side = (height, self.side)
        try:
            run = self._run(SHORT, side, 2, self._answering(_digit), encoded=self._encoded, **self._off)
            if run.samples[0].numel() * self.side != self._count * height:
                return False
            output = self._answered(run.calls[0])
        except (ValueError, RuntimeError):
            return False
        return tuple(_row(output).shape) == self._output_shape(tuple(_row(run.calls[0][self._noisy]).shape))

    def _answered(self, call: dict) -> Tensor | list:
        """What the transformer itself answers to a recorded call."""
        return _output(self.transformer(**_nested(send_to_device(call, self._device()))))

    def _device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    def _find_guidance(self) -> None:
        """By which argument pictures are guided, from what, and by which formula; or what the transformer is told."""
        self.is_guided, self._told, self._guide, self._offset = False, None, None, 0
        side = (self.side, self.side)
        # Guided is what is guided by default, given a prompt to guide from; a distilled model is told a scale instead.
        for name in ("true_cfg_scale", "guidance_scale"):
            if name in self._parameters and (self._parameters[name].default or 0) > 1:
                run, answers = self._guided_run(name, SHORT)
                rows = sum(len(call[self._noisy]) for call in run.calls)
                if rows == 2:
                    self.is_guided, self._guide = True, name
                    self._set_formula(run, answers)
                    return
                if rows != 1:
                    raise self._refusal(f"with {name}={TRIED_SCALE} its transformer has {rows} rows for an image")
        if "guidance_scale" in self._parameters:
            scales = (2.0, 3.0)
            first, second = (self._call(SHORT, side, encoded=self._encoded, guidance_scale=scale) for scale in scales)
            changed = [name for name in first if not _same(first[name], second[name])]
            if len(changed) > 1 or any(torch.as_tensor(first[name]).numel() != 1 for name in changed):
                raise self._refusal(f"guidance_scale changes {', '.join(changed)} of its transformer's arguments")
            for name in changed:
                low, high = (float(torch.as_tensor(values[name])) for values in (first, second))
                self._told = (name, high - low, low - 2 * (high - low))

    def _guided_run(self, name: str, prompt: str, **settings) -> tuple[_Run, list[Tensor]]:
        """A guided step, with what the denoiser answered: a row for each image, in the order of its calls."""
        answers = []
        generator = torch.Generator().manual_seed(0)

        def random(number, elements):
            return torch.randn(elements, generator=generator)

        answering = self._answering(random)

        def answer(number, arguments):
            value = answering(number, arguments)
            answers.extend(value)
            return value

        guided = {name: TRIED_SCALE, "negative_prompt": ""} | settings
        return self._run(prompt, (self.side, self.side), 2, answer, **guided), answers

    def _rows_of(self, run: _Run) -> list[dict]:
        """The prompt's arguments of each row of a guided step, as those of a call alone."""
        return [
            {
                name: call.get(name) if call.get(name) is None or how.kind == "shared" else call[name][row : row + 1]
                for name, how in self._prompted.items()
            }
            for call in run.calls
            for row in range(len(call[self._noisy]))
        ]

    def _empty_row(self, run: _Run, alone: dict) -> tuple[int, dict]:
        """The number of the row that has not the prompt, and its arguments."""
        rows = self._rows_of(run)
        own = [number for number, row in enumerate(rows) if all(_near(row[name], alone[name]) for name in row)]
        if len(own) != 1:
            raise self._refusal(f"of {len(rows)} rows of a guided step {len(own)} have the prompt")
        return 1 - own[0], rows[1 - own[0]]

    def _set_formula(self, run: _Run, answers: list[Tensor]) -> None:
        empty, _ = self._empty_row(run, self._call(SHORT, (self.side, self.side), encoded=None))
        place = self._at(self.side, self.side)
        found = run.outputs[0].float().flatten().cpu()[place.order]
        outputs = [answer.float().flatten().cpu() for answer in answers]
        without, own = outputs[empty], outputs[1 - empty]
        self._offset = None
        for offset in (0, 1):
            guided = place.sign * (without + (TRIED_SCALE + offset) * (own - without))[place.unpacked]
            if (guided - found).abs().max() <= 0.05 * guided.abs().max():
                self._offset = offset

    # -----------------------------------------------------------------------------------------------
    # The family

    def blocks_of(self, transformer: nn.Module) -> list[nn.Module]:
        return [block for path in self.blocks for block in transformer.get_submodule(path)]

    def encode_conditions(self, pipeline, conditions: list[Condition], max_length: int | None = None) -> Conditions:
        settings = longest(max_length)
        if "max_sequence_length" not in self._parameters:
            settings = {}  # the pipeline does not shorten prompts, and a longer one is an error
        with torch.no_grad():
            rows = [self._encoded_row(condition or "", max_length, settings) for condition in conditions]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def _encoded_row(self, prompt: str, max_length: int | None, settings: dict) -> dict[str, Tensor]:
        side = (self.side, self.side)
        run = self._run(prompt, side, **self._off | settings)
        call, is_empty = run.calls[0], self.is_guided and not prompt
        if is_empty:  # as the pipeline encodes what it guides from, which may differ from how it encodes a prompt
            guided, _ = self._guided_run(self._guide, SHORT, **settings)
            empty = self._empty_row(guided, self._call(SHORT, side, **settings))[1]
            if self._together and not all(_near(empty[name], call[name]) for name in empty):
                raise ValueError(f"{self.name} encodes the empty prompt in another way where it is guided from it")
            call = call | empty
        if self._together:
            return {f"encoded.{number}": tensor[None] for number, tensor in enumerate(_tensors(run.encoded))}
        return self._padded(call, max_length)

    def _replayed(self, conditions: Conditions, side: tuple[int, int]) -> dict:
        """Arguments of the denoiser that follow prompt and size together, as the pipeline makes them of each row."""
        rows = [send_to_device(list(row), "cpu") for row in zip(*conditions.values(), strict=True)]
        calls = [
            self._run(SHORT, side, encoded=_filled(self._encoded, iter(row)), **self._off).calls[0] for row in rows
        ]
        arguments = {}
        for name, how in self._prompted.items():
            values = [call[name] for call in calls]
            if how.kind == "rows":
                arguments[name] = torch.cat(values)
            elif how.kind == "list":
                arguments[name] = [entry for value in values for entry in value]
            else:
                self._check_shared(name, all(_same(value, values[0]) for value in values))
                arguments[name] = values[0]
        return send_to_device(arguments, next(iter(conditions.values())).device)

    def _check_shared(self, name: str, is_same: bool) -> None:
        if not is_same:
            raise ValueError(
                f"{self.name} has one {name} for a batch, and its prompts differ in it: make batches of one"
            )

    def _padded(self, call: dict, max_length: int | None) -> dict[str, Tensor]:
        """The prompt's arguments of a call, (1, ...) each, with their lengths where those of prompts differ."""
        constants = self._at(self.side, self.side).constants
        for name in call.keys() - self._prompted.keys() - self._times.keys() - {self._noisy}:
            if not _same(call[name], send_to_device(constants.get(name), _device_of(call[name]))):
                raise ValueError(f"{self.name} tells its transformer another {name} of this prompt than of others")
        row = {}
        for name, how in self._prompted.items():
            value = call[name][None] if how.kind == "shared" else _row(call[name])[None]
            if how.ragged is not None:
                own = self._parameters.get("max_sequence_length")
                most = max_length or (own.default if own else ROOM)
                length = value.shape[how.ragged + 1]
                if length > most:
                    raise ValueError(
                        f"{self.name} has {length} tokens of a prompt in {name}, more than the {most} asked for"
                    )
                missing = list(value.shape)
                missing[how.ragged + 1] = most - length
                value = torch.cat([value, value.new_zeros(missing)], how.ragged + 1)
                row[f"{name}.length"] = torch.tensor([length])
            row[name] = value
        return row

    def _groups(self, conditions: Conditions) -> list[Tensor]:
        """The images of a batch by the lengths of their prompts, where the transformer takes one length alone."""
        names = [n for n, how in self._prompted.items() if how.ragged is not None and how.kind != "list"]
        if not names or self._pads or self._together:
            return []
        lengths = torch.stack([conditions[f"{name}.length"] for name in names], dim=1)
        _, group = lengths.unique(dim=0, return_inverse=True)
        return [(group == number).nonzero().flatten() for number in group.unique()]

    def _of_prompts(self, conditions: Conditions) -> dict:
        """Arguments of the denoiser, cut to the longest prompt of the batch."""
        arguments, unequal = {}, None
        for name, how in self._prompted.items():
            rows, lengths = conditions[name], [0]
            if how.ragged is not None:
                lengths = conditions[f"{name}.length"].tolist()
                if how.kind == "list":
                    arguments[name] = [row.narrow(how.ragged, 0, n) for row, n in zip(rows, lengths, strict=True)]
                    continue
                rows = rows.narrow(how.ragged + 1, 0, max(lengths))
            if len(set(lengths)) > 1:
                unequal = lengths
            if how.kind == "shared":
                self._check_shared(name, len(rows) == 1 or bool((rows == rows[:1]).all()))
                arguments[name] = rows[0]
            else:
                arguments[name] = list(rows) if how.kind == "list" else rows
        for name, mask in self._masks.items():
            if unequal:
                valid = torch.arange(max(unequal)) < torch.tensor(unequal)[:, None]
                arguments[name] = send_to_device(valid.to(mask.dtype), next(iter(conditions.values())).device)
        return arguments

    def predict(self, denoiser: nn.Module, latents: Tensor, times: Tensor, conditions: Conditions) -> Tensor:
        place = self._at(latents.shape[-2] * self._pixels, latents.shape[-1] * self._pixels)
        device, batch = latents.device, len(latents)
        if len(groups := self._groups(conditions)) > 1:
            book = getattr(unwrapped(denoiser), "_onelora", None)
            if book is not None and book.open_route is not None:
                raise ValueError(
                    f"{self.name} takes prompts of one length in a batch, and here are {len(groups)} lengths in one "
                    "whose images have adapters of their own: draw one image at a time"
                )
            outputs = [
                self.predict(denoiser, latents[rows], times[rows], {name: c[rows] for name, c in conditions.items()})
                for rows in groups
            ]
            return torch.cat(outputs)[torch.cat(groups).argsort()]
        if self._together:
            tensors = {name: rows for name, rows in conditions.items() if name.startswith("encoded.")}
            prompted = self._replayed(tensors, (latents.shape[-2] * self._pixels, latents.shape[-1] * self._pixels))
        else:
            prompted = self._of_prompts(conditions)
        noisy = place.constants[self._noisy]
        packed = latents.flatten(1)[:, _on(place.packed, device)].reshape(batch, *place.argument)
        packed = packed.to(_row(noisy).dtype)
        given = {name: self._batch(name, value, batch, device) for name, value in place.constants.items()}
        given |= prompted
        given[self._noisy] = list(packed) if self._lists else packed
        for name, (by, start) in self._times.items():
            given[name] = by * times + start
        if self._told:
            name, by, start = self._told
            if "guidance" in conditions:
                given[name] = by * conditions["guidance"] + start
        output = _output(denoiser(**_nested(given)))
        output = torch.stack(output) if isinstance(output, list) else output
        expected = self._output_shape(place.argument)
        if tuple(output.shape[1:]) != expected:
            raise ValueError(
                f"{self.name}'s transformer puts out {tuple(output.shape[1:])} here, recorded were {expected}"
            )
        flat = output.flatten(1)
        in_order = torch.equal(place.unpacked, torch.arange(len(place.unpacked)))
        if place.sign > 0 and in_order and output.shape[-2:] == latents.shape[-2:]:
            return output.reshape(batch, -1, *latents.shape[-2:])  # with its variance, if there is one
        return place.sign * flat[:, _on(place.unpacked, device)].reshape(latents.shape)

    def _batch(self, name: str, value, batch: int, device: torch.device):
        """A constant argument for so many images."""
        if isinstance(value, Tensor):
            value = _on(value, device)
            return value.expand(batch, *value.shape[1:]) if self._batched.get(name) else value
        return list(value) * batch if self._batched.get(name) and isinstance(value, list | tuple) else value

    def encode_images(self, vae: nn.Module, images: Tensor) -> Tensor:
        place = self._at(*images.shape[-2:])
        images = in_range(images).to(vae.dtype)
        with torch.no_grad():
            encoded = vae.encode(images[:, :, None] if place.frames else images)
        if hasattr(encoded, "latent_dist"):
            mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
        else:
            mean, std = encoded.latent, torch.zeros_like(encoded.latent)
        if mean[0].numel() != place.scale.numel():
            raise ValueError(
                f"{self.name}'s autoencoder makes latents {tuple(mean.shape[1:])} of images of "
                f"{tuple(images.shape[-2:])} pixels, and its pipeline draws from {place.shape}"
            )
        mean, std = (moment.float().reshape(len(images), *place.shape) for moment in (mean, std))
        scale, shift = _on(place.scale, mean.device), _on(place.shift, mean.device)
        return torch.stack([(mean - shift) / scale, std / scale.abs()], dim=1)

    def decode(self, vae: nn.Module, latents: Tensor) -> Tensor:
        place = self._at(latents.shape[-2] * self._pixels, latents.shape[-1] * self._pixels)
        latents = latents.float() * _on(place.scale, latents.device) + _on(place.shift, latents.device)
        latents = latents[:, :, None] if place.frames else latents
        with torch.no_grad():
            images = vae.decode(latents.to(vae.dtype)).sample.float()
        return images[:, :, 0] if place.frames else images

    def latent_shape(self, pipeline, height: int, width: int) -> tuple[int, ...]:
        return self._at(height, width).shape

    def latent_channels(self, transformer: nn.Module) -> int:
        return self._at(self.side, self.side).shape[0]

    def pixels_of_latent(self, pipeline) -> int:
        return self._pixels

    def patch_size(self, transformer: nn.Module) -> int:
        return self._multiple // self._pixels

    def resolution(self, pipeline) -> int:
        if not hasattr(self, "_own_side"):
            answer = self._answering(_digit)
            run = self._run(
                SHORT, None, 2, answer, lambda number, sample: sample.float(), encoded=self._encoded, **self._off
            )
            self._own_side = run.decoded.shape[-2] * self._pixels
        return self._own_side

    def check_resolution(self, pipeline, resolution: int) -> None:
        super().check_resolution(pipeline, resolution)
        shape = self._at(resolution, resolution).shape
        if shape[1:] != (resolution // self._pixels,) * 2:
            raise ValueError(
                f"{self.name} draws latents of {shape[1]} by {shape[2]} when asked for {resolution} pixels"
            )

    def timesteps(self, scheduler, num_inference_steps: int, num_tokens: int) -> dict:
        height = max(side for side in range(1, int(num_tokens**0.5) + 1) if num_tokens % side == 0)
        side = (height * self._multiple, num_tokens // height * self._multiple)
        run = self._run(SHORT, side, num_inference_steps, encoded=self._encoded, **self._off)
        for name, value in run.attributes.items():
            setattr(scheduler, name, value)
        return run.schedule

    def guidance_scale(self, pipeline) -> float:
        name = self._guide or "guidance_scale"
        default = self._parameters[name].default if name in self._parameters else None
        return (1.0 if default is None else float(default)) + (self._offset or 0)


def repeated_blocks(transformer: nn.Module) -> tuple[str, ...]:
    """Paths of the outermost lists of a transformer's blocks: of the classes that it names, or of one class each."""
    named = set(getattr(transformer, "_repeated_blocks", None) or ())
    lists = {path: module for path, module in transformer.named_modules() if isinstance(module, nn.ModuleList)}
    found = []
    for path, module in lists.items():
        classes = {type(entry).__name__ for entry in module}
        is_one = classes <= named if named else len(classes) == 1
        is_inner = any(path.startswith(f"{outer}.") for outer in (found if named else lists))
        if classes and is_one and not is_inner and any(isinstance(part, nn.Linear) for part in module.modules()):
            found.append(path)
    return tuple(found)


def targets_in(
    transformer: nn.Module, blocks: tuple[str, ...], predict: Callable[[], Tensor | list]
) -> tuple[str, ...]:
    """Patterns of the linear layers in lists of blocks that a prediction depends on.

    The last block of some transformers computes tokens of the prompt that nobody reads.
    """
    inside = {
        path: module
        for path, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and any(path.startswith(f"{block}.") for block in blocks)
    }
    added = {path: torch.zeros((), device=module.weight.device, requires_grad=True) for path, module in inside.items()}
    hooks = [
        module.register_forward_hook(lambda module, args, output, path=path: output + added[path].to(output.dtype))
        for path, module in inside.items()
    ]
    try:
        # The graph alone is asked: nothing is kept for a backward pass.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda kept: None):
            outputs = predict()
    finally:
        for hook in hooks:
            hook.remove()
    outputs = outputs if isinstance(outputs, list) else [outputs]
    reached, nodes = set(), [output.grad_fn for output in outputs]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            reached.add(id(node.variable))
        following = {child for child, _ in node.next_functions if child is not None} - seen
        seen |= following
        nodes.extend(following)
    used = [path for path in inside if id(added[path]) in reached]

    def patterns(prefix: str, names: list[str]) -> list[str]:
        own = [path for path in inside if path.startswith(f"{prefix}.")]
        mine = [path for path in used if path.startswith(f"{prefix}.")]
        if mine == own:
            return [f"{prefix}.*"]
        return [pattern for name in names for pattern in patterns(f"{prefix}.{name}", [])] if names else mine

    return tuple(
        pattern
        for block in blocks
        for pattern in patterns(block, [str(number) for number in range(len(transformer.get_submodule(block)))])
    )


def _leaves(arguments: dict, path: str = "") -> Iterator[tuple[str, object]]:
    for name, value in arguments.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _nested(leaves: dict) -> dict:
    arguments: dict = {}
    for path, value in leaves.items():
        *parents, name = path.split(".")
        inner = arguments
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = value
    return arguments


def _copied(value):
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {name: _copied(entry) for name, entry in value.items()}
    return type(value)(map(_copied, value)) if type(value) in (list, tuple) else value


def _same(first, second) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and torch.equal(first, second)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(_same, first, second))
    if type(first) is not type(second):
        return False
    if hasattr(first, "shape"):
        return first.shape == second.shape and bool((first == second).all())
    return first is second or first == second


def _tensors(value) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors(entry)


def _filled(value, tensors: Iterator[Tensor]):
    """The same with other tensors in the places of its own."""
    if isinstance(value, Tensor):
        return next(tensors)
    return type(value)(_filled(entry, tensors) for entry in value) if isinstance(value, list | tuple) else value


def _near(first, second) -> bool:
    """Whether these are the same to rounding, as the same prompt is in another batch."""
    first, second = (_row(value) for value in (first, second))
    if first.shape != second.shape:
        return False
    if not first.is_floating_point():
        return torch.equal(first, second)
    tolerance = torch.finfo(first.dtype).eps ** 0.5
    return torch.allclose(first, second, rtol=tolerance, atol=tolerance * float(second.abs().max()))


def _kind(one, two) -> str | None:
    """How an argument for one image becomes that for two."""
    if isinstance(one, Tensor) and isinstance(two, Tensor) and one.ndim == two.ndim and one.ndim:
        if (len(one), len(two)) == (1, 2):
            return "rows"
        return "shared" if len(one) == len(two) or one.ndim > 1 else None
    if isinstance(one, list | tuple) and isinstance(two, list | tuple) and (len(one), len(two)) == (1, 2):
        return "list"
    return "shared" if _same(one, two) else None


def _holds(value, sample: Tensor) -> bool:
    """Whether an argument for one image is the sample in another order."""
    tensors = value if isinstance(value, list) else [value]
    if len(tensors) != 1 or not isinstance(tensors[0], Tensor) or not tensors[0].is_floating_point():
        return False
    (tensor,) = tensors
    if tensor.numel() != sample.numel() or not isinstance(value, list) and len(tensor) != 1:
        return False
    return torch.equal(tensor.flatten().sort().values, sample.to(tensor.dtype).flatten().sort().values)


def _row(value):
    """The first image's of an argument."""
    return value[0]


def _output(answer) -> Tensor | list:
    output = answer[0]
    return list(output) if isinstance(output, tuple) else output


def _digits(count: int) -> int:
    digits = 1
    while BASE**digits < count:
        digits += 1
    return digits


def _digit(number: int, count: int) -> Tensor:
    """That digit of 0, 1, 2, ..., the lowest first."""
    return (torch.arange(count) // BASE**number % BASE).float()


def _from_digits(digits: list[Tensor]) -> Tensor:
    return sum(digit.flatten().double() * BASE**place for place, digit in enumerate(digits)).round().long()


def _is_permutation(order: Tensor, count: int) -> bool:
    return len(order) == count and torch.equal(order.sort().values.cpu(), torch.arange(count))


def _on(value: Tensor, device: torch.device) -> Tensor:
    return value if value.device == device else value.to(device, non_blocking=True)


def _device_of(value) -> torch.device:
    return value.device if isinstance(value, Tensor) else torch.device("cpu")


def _described(value) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    return f"a list of {len(value)}" if isinstance(value, list | tuple) else repr(value)[:40]


@contextmanager
def _silence() -> Iterator[None]:
    """Context manager: diffusers and transformers do not warn of what is asked of them to see whether they take it."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _replaced(pipeline, parts: dict) -> Iterator[None]:
    """Context manager: these attributes of a pipeline are others, behind the back of its configuration."""
    kept = {name: vars(pipeline)[name] for name in parts if name in vars(pipeline)}
    vars(pipeline).update(parts)
    try:
        yield
    finally:
        for name in parts:
            vars(pipeline).pop(name)
        vars(pipeline).update(kept)
