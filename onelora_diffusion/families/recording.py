"""Calls of a stock pipeline with recorders in the place of its parts."""

import copy
import functools
import inspect
import logging
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from types import SimpleNamespace

import torch
from accelerate.utils import convert_to_fp32, send_to_device
from PIL import Image
from torch import Tensor, nn

from onelora_diffusion.denoisers import (
    autoencoder_name,
    autoencoder_of,
    denoiser_name,
    denoisers_in,
    guides_in,
    repeated_blocks,
)
from onelora_diffusion.families.arguments import copied, output_of, same
from onelora_diffusion.families.family import encodes_prompts
from onelora_diffusion.families.record import Record, Run
from onelora_diffusion.families.references import BLANK, blank, references_of, taken_by
from onelora_diffusion.files import first_line
from onelora_diffusion.injection.book import unwrapped

SHORT, LONG = "dog", "violet triangle"  # two prompts of different length and beginning
# Images are encoded to exactly the size that is asked for, captions as they are written; no attention is perturbed.
ASKED = {"use_resolution_binning": False, "clean_caption": False, "output_type": "pt", "pag_scale": 0.0}
ASKED |= {"image_guidance_scale": 1.0}  # guided is from the empty prompt with the image, and not from neither
FRAMES, RATES = ("num_frames", "frames", "video_length"), ("frame_rate", "fps")  # names of these in calls
ASKED |= dict.fromkeys(FRAMES, 1) | {"decode_chunk_size": 2**16}  # frames that are decoded one by one, in one call


class _Stop(BaseException):
    """Ends a recorded call, once it has said what was asked; blocks of modular pipelines report an `Exception`."""


class NotTakenError(ValueError):
    """A stock pipeline's own call fails, as it does for sizes that it does not draw."""


class _Answer(tuple):
    """What a denoiser or a scheduler returns, in each of the ways that pipelines read it."""

    sample = prev_sample = property(lambda self: self[0])


class _StandIn:
    """A component of a pipeline with some of its attributes replaced, which leaves the component as it is."""

    def __init__(self, part, called: Callable | None = None, **replaced):
        vars(self).update(replaced, _part=part, _called=called)

    @property
    def __class__(self):  # pipelines ask of which class a part is
        return type(self._part)

    def __getattr__(self, name: str):
        return getattr(self._part, name)

    def __call__(self, *args, **kwargs):
        return self._called(*args, **kwargs)


class Recorder:
    """Calls a pipeline, its parts replaced.

    Attributes:
        component: the pipeline's attribute that is the denoiser, or the one that guides, which the argument names.
        counted: the components whose calls are recorded; `guides` are others of the denoiser's class, if any.
        blocks: paths of the lists of the denoiser's blocks.
        parameters: of the pipeline's call, by name.
        takes: the one that is the reference images; None: there is none.
        takes_size: whether the call takes a height and a width; else what it draws is as large as its reference image.
        encoding: the methods that encode prompts, by name.
        guiders: the components that guide, by name, where the call takes no scale.
        schedules: the parameters that are a scale of guidance for each step in the place of one, with their defaults.
        counts, rates: the parameters that are the number of frames, and of frames a second; None: there is none.
        record: what is known of it so far.
        frame_rate: of clips, which some pipelines are told; None: this one does not say.
    """

    def __init__(self, pipeline, component: str | None = None):
        from diffusers.guiders import BaseGuidance

        self.pipeline = pipeline
        self.component, self.guides = component or denoiser_name(pipeline), guides_in(pipeline)
        self.counted = {component} if component else denoisers_in(pipeline).keys()
        self.denoiser = unwrapped(getattr(pipeline, self.component))
        self.blocks = repeated_blocks(self.denoiser)
        self.parameters = inspect.signature(type(pipeline).__call__).parameters
        self.takes = taken_by(pipeline)
        self.takes_size = {"height", "width"} <= self.parameters.keys()
        self.encoding = [name for name in dir(type(pipeline)) if re.match("_?encode_prompt", name)]
        self.record = Record(references=references_of(pipeline))
        # What calls read of models that encode prompts, once these are freed.
        self._freed = {
            name: {"dtype": getattr(part, "dtype", None), "config": getattr(part, "config", None)}
            for name, part in pipeline.components.items()
            if isinstance(part, nn.Module) and encodes_prompts(name)
        }
        self._blank: dict[tuple[int, ...], object] = {}
        defaults = {name: each.default for name, each in self.parameters.items() if "guidance" in name}
        lists = {name: own for name, own in defaults.items() if isinstance(own, list | tuple) and own}
        # Others are numbers of blocks.
        self.schedules = {name: own for name, own in lists.items() if all(isinstance(each, float) for each in own)}
        self.counts = next((name for name in FRAMES if name in self.parameters), None)
        self.rates = next((name for name in RATES if name in self.parameters), None)
        self.frame_rate: float | None = self.parameters[self.rates].default if self.rates else None
        self.guiders = {name: part for name, part in pipeline.components.items() if isinstance(part, BaseGuidance)}

    def refusal(self, what: str) -> ValueError:
        return ValueError(f"{type(self.pipeline).__name__} cannot be recorded: {what}")

    def run(
        self,
        prompt: str | list[str] = SHORT,
        side: tuple[int, int] | None = None,
        steps: int = 2,
        answer: Callable[[int, dict], object] | None = None,
        step: Callable[[int, Tensor], Tensor | None] | None = lambda number, sample: None,
        encoded: list | None = None,
        references: Sequence[Image.Image] | None = None,
        frames: int = 1,
        guider: float = 1.0,
        times: Sequence[float] = (),
        scales: bool = False,
        precise: bool = False,
        beside: Callable[[int, dict], object] | None = None,
        **settings,
    ) -> Run:
        """Calls the pipeline.

        Args:
            side: (height, width) in pixels. None: what the pipeline draws by itself.
            answer: what the denoiser returns of its call's number and arguments. None: the first call is the last.
            step: the sample after that step; None from it: that was the last. None in its place: the scheduler's own.
            encoded: what `encode_prompt` returned before, in place of its own.
            references: the reference images. None: blank ones, where there are any.
            frames: the number of frames of the clip that is drawn; 1: that of the record.
            guider: the scale of guidance by the component that guides, where there is one; 1: none.
            times: those of the steps, of flow matching. (): as the pipeline sets them.
            scales: whether the scheduler scales what the denoiser is given, as it does in earnest and where it steps.
            precise: whether all is computed in float32, whatever the denoiser computes in.
            beside: what models that are not `counted` return. None: ones, or what they compute where that shape is
                not known yet.

        Raises:
            NotTakenError: the call fails.
        """
        # A copy's parts are replaced: another thread may draw with the pipeline itself.
        pipeline, run = copy.copy(self.pipeline), Run()
        given = self.arguments(prompt, side, steps, references, frames, **settings)
        is_replayed = encoded is not None and self.encoding
        device = torch.device("cpu") if is_replayed else pipeline._execution_device
        encoded = convert_to_fp32(encoded) if precise else encoded
        scheduler = _scheduler(pipeline.scheduler, run, step, times, scales or step is None, bool(self.record.others))
        replaced = {"scheduler": scheduler, "_progress_bar_config": {"disable": True}}
        if autoencoder := autoencoder_name(pipeline):
            own = {"decode": _decoder(run), "encode": self._image_encoder(), "device": device, "dtype": torch.float32}
            replaced[autoencoder] = _StandIn(getattr(pipeline, autoencoder), **own)
        else:
            replaced["safety_checker"] = None  # of pictures, which what is drawn here are not
        for name, part in pipeline.components.items():
            is_at_home = self.encoding and encodes_prompts(name)  # where all of its inputs are
            if isinstance(part, nn.Module) and name not in replaced and not is_at_home:
                replaced[name] = _StandIn(part, _between_devices(part, device), device=device)
        freed = [name for name in self._freed if getattr(pipeline, name) is None]
        replaced |= {name: SimpleNamespace(**self._freed[name], device=device) for name in freed}
        replaced |= {name: self._encoder(getattr(pipeline, name), run, encoded) for name in self.encoding}
        with _silence():
            replaced |= {name: own.new(guidance_scale=guider) for name, own in self.guiders.items()}
        own = {"device": device} | ({"dtype": torch.float32} if precise else {})
        for name, part in (denoisers_in(pipeline) | self.guides).items():
            is_counted = name in self.counted
            forward = self._forward(name, run, answer) if is_counted else self._beside(name, part, run, beside)
            replaced[name] = _StandIn(part, forward, **own)
        vars(pipeline).update(replaced)  # behind the back of its configuration
        with _silence():
            try:
                images = pipeline(**given)
                if not autoencoder:
                    run.decoded, run.images = run.drawn, images[0]
            except _Stop:
                pass
            except Exception as error:  # whatever a stock pipeline refuses by
                asked = f"for {side[0]} by {side[1]} pixels " if side else ""
                if self.takes:
                    asked += f"with {self.record.references or 'no'} reference images "
                raise NotTakenError(
                    f"{type(pipeline).__name__} cannot be recorded: its own call {asked}fails: "
                    f"{type(error).__name__}: {first_line(error)}"
                ) from error
            finally:
                vars(pipeline).clear()  # its own methods are in it, which would keep it, and all models, alive
        return run

    def arguments(
        self,
        prompt: str | list[str],
        side: tuple[int, int] | None,
        steps: int,
        references: Sequence[Image.Image] | None = None,
        frames: int = 1,
        **settings,
    ) -> dict:
        """Those of the pipeline's call, of settings those that it takes; see `run`."""
        frames = frames if frames > 1 else self.record.frames
        given = ASKED | {"prompt": prompt, "num_inference_steps": steps, "generator": torch.Generator().manual_seed(0)}
        given |= dict.fromkeys(self.schedules)
        given |= settings | ({"height": side[0], "width": side[1], "max_area": prod(side)} if side else {})
        given |= {self.counts: frames, self.rates: self.frame_rate} if frames > 1 else {}
        given |= {"intermediate_timesteps": None} if steps != 2 else {}  # of SANA-Sprint, which has them for two alone
        if self.record.references:
            images = references or blank([BLANK] * self.record.references)
            if side and not self.takes_size:
                images = [image.resize(side[::-1]) for image in images]
            given[self.takes] = images[0] if len(images) == 1 else list(images)
        return {name: value for name, value in given.items() if name in self.parameters}

    def _image_encoder(self) -> Callable:
        """The autoencoder's `encode` on its device and in its precision; images of one colour are encoded once."""
        vae = autoencoder_of(self.pipeline)

        def encode(images: Tensor, *args, **kwargs):
            first = images.flatten()[0]
            key = (float(first), *images.shape) if (images == first).all() else None
            if (encoded := self._blank.get(key)) is None:
                own = vae.encode(images.to(vae.device, vae.dtype), *args, **kwargs)
                encoded = {name: _moved(value, torch.zeros(())) for name, value in own.items()}
            if key:
                self._blank[key] = encoded
            return SimpleNamespace(**{name: _moved(value, images) for name, value in encoded.items()})

        return encode

    def _forward(self, name: str, run: Run, answer: Callable | None) -> Callable:
        signature = inspect.signature(self.denoiser.forward)
        variable = [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]

        def forward(*args, **kwargs):
            arguments = dict(signature.bind(*args, **kwargs).arguments)
            for more in variable:
                arguments |= arguments.pop(more, {})
            if run.is_over:
                raise _Stop
            call = dict(self.record.arrangement.named(copied(arguments)))
            others = {other: call[other] for other in self.record.others}
            zeros = {other: torch.zeros_like(value) for other, value in others.items()}
            run.calls.append(call | zeros | self.record.switched)
            run.called.append(name)
            if answer is None:
                raise _Stop
            return _Answer((answer(len(run.calls) - 1, arguments), *others.values()))

        return forward

    def _beside(self, name: str, part, run: Run, answer: Callable | None) -> Callable:
        """The forward of a model that is not counted."""
        answer = answer or self.answering_all(1.0)

        def forward(*args, **kwargs):
            run.beside.append(name)
            if not self.record.noisy:
                return part(*args, **kwargs)
            arguments = dict(inspect.signature(self.denoiser.forward).bind(*args, **kwargs).arguments)
            return _Answer((answer(0, arguments),))

        return forward

    def _encoder(self, own: Callable, run: Run, encoded: list | None) -> Callable:
        """A method that encodes prompts, what it returns recorded or replayed unless another one has called it."""

        @functools.wraps(own)
        def encode(*args, **kwargs):
            if run.encodes:
                return own(*args, **kwargs)
            if encoded is None:
                run.encodes = True
                run.encoded.append(own(*args, **kwargs))
                run.encodes = False
            else:
                run.encoded.append(encoded[len(run.encoded)])
            return run.encoded[-1]

        return encode

    def alone(self, side: tuple[int, int] | None = None, steps: int = 2, answer: Callable | None = None, **how) -> Run:
        """A call without guidance, by what was encoded before, at the recorded size by default."""
        how = {"encoded": self.record.encoded} | self.record.off | how
        return self.run(SHORT, side or self.square, steps, answer, **how)

    def call(self, prompt: str | list[str] = SHORT, side: tuple[int, int] | None = None, **settings) -> dict:
        """The arguments of the denoiser's first call, without guidance, at the recorded size."""
        return self.run(prompt, side or self.square, **{**self.record.off, **settings}).calls[0]

    def default_of(self, name: str) -> float | None:
        """The default of a scale of guidance: of a schedule in its place, that of the first step."""
        own = self.parameters[name].default if name in self.parameters else None
        first = next(iter(self.schedules.values()), (None,))[0]
        return first if own is None and name == "guidance_scale" else own

    @property
    def square(self) -> tuple[int, int]:
        return self.record.side, self.record.side

    def answering(self, value_of: Callable[[int, int], Tensor]) -> Callable[[int, dict], object]:
        """A denoiser that answers call `number`, all images together, by `value_of(number, elements)`."""
        record = self.record

        def answer(number, arguments):
            given = dict(record.arrangement.named(arguments))[record.noisy]
            shape = (len(given), *record.output_shape(tuple(given[0].shape)))
            value = value_of(number, torch.Size(shape).numel()).reshape(shape).to(given[0].device, given[0].dtype)
            return list(value) if record.gives_lists else value

        return answer

    def answering_all(self, value: float) -> Callable[[int, dict], object]:
        """A denoiser that answers this number in every place."""
        return self.answering(lambda number, elements: torch.full((elements,), value))

    def answered(self, call: dict) -> Tensor | list:
        """What the denoiser itself answers to a recorded call."""
        device = next(self.denoiser.parameters()).device
        return output_of(self.denoiser(**self.record.arrangement.nested(send_to_device(call, device))))


def _between_devices(part: nn.Module, device: torch.device) -> Callable:
    """A model that takes part in encoding prompts, which may be on another device than the call."""

    def called(*args, **kwargs):
        own = next((parameter.device for parameter in part.parameters()), device)
        return send_to_device(part(*send_to_device(args, own), **send_to_device(kwargs, own)), device)

    return called


def _moved(value, images: Tensor):
    """A tensor, or a distribution of latents of which the mean is drawn, as images are on a device in a precision."""
    if isinstance(value, Tensor):
        return value.to(images)
    is_mean = [True] * hasattr(value, "deterministic")  # of one that has a deviation
    return type(value)(value.parameters.to(images), *is_mean)


def fresh(scheduler):
    """A new scheduler of the same configuration, of which a pipeline may have more than its class knows."""
    with _silence():
        return type(scheduler).from_config(scheduler.config)


def _scheduler(own, run: Run, step: Callable | None, times: Sequence[float], scales: bool, has_others: bool):
    """A scheduler like the pipeline's that records how it is used.

    It gives the denoiser its sample as it is, unless it `scales`, and steps by `step`, or by itself if that is None.
    Its copies record as well; where there are other noises, they are those of these, and do not.
    """
    scheduler = fresh(own)
    before, after = dict(vars(scheduler)), {}
    set_timesteps, own_step = scheduler.set_timesteps, scheduler.step
    # Some pipelines ask it for what is denoised, turn it back, and step by that.
    denoises = "pred_original_sample" in inspect.signature(own_step).parameters

    @functools.wraps(set_timesteps)
    def recorded_set_timesteps(*args, **kwargs):
        arguments = inspect.signature(set_timesteps).bind(*args, **kwargs).arguments
        run.schedule = {name: value for name, value in arguments.items() if name != "device"}
        own = {name: value for name, value in vars(scheduler).items() if name not in recording}
        run.attributes = {name: value for name, value in own.items() if not same(value, before.get(name))}
        set_timesteps(*args, **kwargs)
        if times:
            scheduler.timesteps = torch.tensor(times, dtype=torch.float32)
            scheduler.sigmas = torch.tensor([*times, 0.0]) / scheduler.config.num_train_timesteps
        after.update({name: copied(value) for name, value in vars(scheduler).items() if isinstance(value, Tensor)})

    @functools.wraps(own_step)
    def recorded_step(model_output, timestep, sample, *args, **kwargs):
        if denoises and run.stepped == len(run.calls):  # it was turned back
            for steps in (run.times, run.outputs, run.samples):
                steps.pop()
        run.stepped = len(run.calls)
        run.times.append(float(torch.as_tensor(timestep).flatten()[0]))
        run.outputs.append(model_output)
        run.samples.append(sample.clone())  # some step in place
        if len(run.samples) == 1:
            noise = torch.randn(sample.numel(), generator=torch.Generator().manual_seed(0))  # that of the call
            run.begin = float(sample.float().std() / noise.std())
            run.spread = run.begin / getattr(scheduler, "init_noise_sigma", 1.0)
            now = vars(scheduler)
            run.changed = {name: now[name] for name, value in after.items() if not same(now[name], value)}
            run.scheduler = scheduler
        if step is None:
            stepped = own_step(model_output, timestep, sample, *args, **kwargs)
            run.drawn = stepped[0]
            return stepped
        found = step(len(run.times) - 1, sample)
        if found is None and not denoises:
            raise _Stop
        run.is_over, found = found is None, sample if found is None else found
        run.drawn = found
        scheduler._step_index = (getattr(scheduler, "_step_index", None) or 0) + 1  # which some pipelines turn back
        return _Answer((found, model_output if denoises else found))  # some read what is denoised as well

    def copied_scheduler(memo):
        copied = fresh(own)
        vars(copied).update({name: value for name, value in vars(scheduler).items() if name not in recording})
        return copied

    recording = {"set_timesteps": recorded_set_timesteps, "step": recorded_step}
    recording |= {} if scales else {"scale_model_input": lambda sample, timestep=None: sample}
    recording |= {"__deepcopy__": copied_scheduler} if has_others else {}
    vars(scheduler).update(recording)
    return scheduler


def _decoder(run: Run) -> Callable:
    def decode(latents, *args, **kwargs):
        run.decoded = latents
        more = {name: value for name, value in kwargs.items() if name not in ("return_dict", "generator")}
        run.decoding = {"args": list(args), "kwargs": more}
        raise _Stop

    return decode


_SILENCE = threading.RLock()  # warnings and their loggers belong to the process


@contextmanager
def _silence() -> Iterator[None]:
    """Context manager: diffusers and transformers do not warn of what is asked of them to see whether they take it.

    One thread at a time is inside.
    """
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    with _SILENCE, warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        levels = [logger.level for logger in loggers]
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
