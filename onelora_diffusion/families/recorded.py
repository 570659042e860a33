"""A family that nobody wrote: what a stock pipeline's own call says of it, recorded once and used for training.

`families/probing.py` says what is looked for, and what is refused.
"""

import re
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property, lru_cache, partial
from math import inf
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from onelora_diffusion.denoisers import TwoDenoisers, denoiser_of, denoisers_in
from onelora_diffusion.diffusion import model_timesteps
from onelora_diffusion.families.arguments import on, output_of, same, thinned
from onelora_diffusion.families.autoencoder import from_autoencoder, moments_of, to_autoencoder
from onelora_diffusion.families.coordinates import Translated, measured, times_of, training_scheduler
from onelora_diffusion.families.encoding import GUIDE, GUIDED, Encoding
from onelora_diffusion.families.family import Conditions
from onelora_diffusion.families.fitting import check_frames, check_sides
from onelora_diffusion.families.guides import probed_guide
from onelora_diffusion.families.kept import keep, kept, path_of
from onelora_diffusion.families.placing import place_at
from onelora_diffusion.families.probing import probed
from onelora_diffusion.families.record import Place
from onelora_diffusion.families.recording import Recorder
from onelora_diffusion.injection.book import unwrapped

PLACES = 64  # sizes of images, with those of their reference images, of which what was recorded is kept in memory


class Recorded(Encoding):
    """The family of one pipeline, whose call is recorded some twenty times, its denoiser running in a few of them.

    Args:
        records: the folder in which `keep` keeps the record, and from which it is read the next time.
        guided: the family whose pictures this one guides, by a model that is not trained; None: no other's.

    Raises:
        ValueError: the pipeline does what has no place in a record, with the argument that it does it to.
    """

    def __init__(self, pipeline, records: Path | None = None, guided: "Recorded | None" = None):
        self.pipeline = pipeline
        self.recorder = Recorder(pipeline, guided and guided.record.guiding)
        self.denoiser = self.recorder.denoiser if guided else unwrapped(denoiser_of(pipeline))
        self.transformer_class = type(self.recorder.denoiser).__name__
        self.name = type(pipeline).__name__.removesuffix("Pipeline")
        self.path = path_of(records, self.recorder) if records else None
        self.is_kept = self.path is not None and (found := kept(self.path)) is not None
        if self.is_kept:
            self.recorder.record, place = found
        elif guided:
            place = probed_guide(self.recorder, guided.recorder, guided.place(*guided.recorder.square))
        else:
            place = probed(self.recorder)
        self.record = self.recorder.record
        self._training_scheduler = training_scheduler(self.recorder)
        self._first = place.leave_out(self.record.prompted)
        self._places: dict[tuple, Place] = {(*self.recorder.square, self.record.frames): place}
        self._placing = threading.Lock()  # one thread at a time records a size
        self._of_guide: dict[tuple, Conditions] = {}
        self._embedded = lru_cache(PLACES)(self._embedding)
        self._last_shared: dict[str, tuple[Tensor, Tensor]] = {}  # by argument, on the host and on the device
        self.is_guided, self.targets = bool(self.record.guided), self.record.targets
        self.guide = Recorded(pipeline, records, self) if self.record.guiding else None
        self.is_sized = bool(self.record.together or self.guide and self.guide.record.together)
        self.record.encoded = thinned(self.record.encoded)

    def __str__(self) -> str:
        """What was found, in three lines."""
        record, place = self.record, self.place(*self.recorder.square)
        times = ", ".join(f"{name} = {line_in_words(*line)}" for name, line in record.times.items())
        of_one = "of each size" if record.together else "one length"
        prompted = ", ".join(
            f"{name} ({of_one if how.ragged is None else 'of each length'})" for name, how in record.prompted.items()
        )
        blocks = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", path) for path in self.recorder.blocks)
        guidance = f"told as {record.told[0]}" if record.told else "none"
        if self.is_guided:
            way = {0: "w", 1: "w - 1", None: "in a way of its own; pictures here are guided plainly by w"}
            source = f"its {record.guiding}, which is not trained" if record.guiding else "the empty prompt"
            guidance = f"{record.guide} from {source}, {way[record.offset]}"
            own = self.recorder.parameters.keys() & {"image_guidance_scale"}  # from no image, which is left out
            guidance += f", by an {own.pop()} of 1" if own else ""
        clips = f"; clips have {record.stride} k + 1 frames" if record.stride else ""
        apart = f" without {' and '.join(record.others)}" if record.others else ""
        apart += "".join(f" ({name}={value})" for name, value in record.switched.items())
        lines = (
            f"noise is {record.noisy} {place.argument} of latents {place.shape}{apart}, {times}, "
            f"the prediction is {'minus ' if place.sign < 0 else ''}the output",
            f"of the prompt: {prompted}; of the size: {', '.join(record.sized) or 'nothing'}"
            f"{'; of both: ' + ', '.join(record.together) if record.together else ''}"
            f"{'; of reference images: ' + ', '.join(record.pictured) if record.pictured else ''}",
            f"guidance: {guidance}; sides are multiples of {record.multiple}{clips}; "
            f"adapters in {', '.join(f'{path}.*' for path in blocks)}",
        )
        return "\n".join(f"{self.name}: {line}" for line in lines)

    def keep(self) -> None:
        """Write the record into its folder, if it has one and is not from there."""
        if self.path and not self.is_kept:
            keep(self.path, self.record, self._first)
        self.is_kept = True
        if self.guide:
            self.guide.keep()

    def place(
        self,
        height: int,
        width: int,
        frames: int = 1,
        sizes: Sequence[tuple[int, int]] = (),
        length: int | None = None,
    ) -> Place:
        """What the pipeline says of images of this size, or of clips of so many frames, recorded once.

        Args:
            sizes: those of reference images.
            length: the number of tokens of prompts, where these are encoded for a size. None: the pipeline's own.
        """
        frames = frames if frames > 1 else self.record.frames
        key = (height, width, frames, *sizes, *([length] if length else []))
        if found := self._places.get(key):
            return found
        with self._placing, torch.no_grad():
            place, _ = place_at(self.recorder, (height, width), sizes, frames, length)
            for name, how in self.record.prompted.items():
                rows = place.constants.get(name)
                if how.kind == "rows" and not same(rows, rows[:1].expand_as(rows)):
                    raise ValueError(f"{self.name} tells its denoiser another {name} of each frame")
            self._places[key] = found = place.leave_out(self.record.prompted)
            while len(self._places) > PLACES:
                self._places.pop([*self._places][1])  # all but that of the recorded size
        return found

    @property
    def frame_rate(self) -> float | None:
        return self.recorder.frame_rate

    @frame_rate.setter
    def frame_rate(self, rate: float | None) -> None:
        self.recorder.frame_rate = rate
        self._places = {size: place for size, place in self._places.items() if size[2] == 1}

    def _size_of(self, latents: Sequence[int]) -> tuple[int, int, int]:
        """Height and width in pixels, and the number of frames, of the shape (C, ...) of latents."""
        frames = 1 + (latents[1] - 1) * self.record.stride if len(latents) == 4 else 1
        return latents[-2] * self.record.pixels, latents[-1] * self.record.pixels, frames

    # -----------------------------------------------------------------------------------------------
    # Predictions

    def predict(self, denoiser: nn.Module, latents: Tensor, times: Tensor, conditions: Conditions) -> Tensor:
        output = self._predicted(denoiser, latents, times, conditions)
        if isinstance(self.denoiser, TwoDenoisers) and torch.is_grad_enabled():
            called = {self._component(time) for time in times[:, None]}
            idle = (part for name, part in self.denoiser.named_children() if name not in called)
            trained = [vector for part in idle for vector in part.parameters() if vector.requires_grad]
            output = output + 0 * sum(vector.sum() for vector in trained)  # whose gradient is zero then, and not none
        return output

    def _component(self, times: Tensor) -> str:
        """Of two denoisers the one that computes times, which are all in one's share."""
        (other,) = denoisers_in(self.pipeline).keys() - {self.recorder.component}
        return self.recorder.component if self._is_mine(times).all() else other

    def _denoiser_at(self, times: Tensor, denoiser: nn.Module) -> Callable:
        """What is called at times that are all in one denoiser's share, of two as one or of the one that is given."""
        if self.record.share == (-inf, inf):
            return denoiser
        name = self._component(times)
        if isinstance(self.denoiser, TwoDenoisers):
            return partial(denoiser, name)
        return denoiser if name == self.recorder.component else getattr(self.pipeline, name)

    def _predicted(self, denoiser: nn.Module, latents: Tensor, times: Tensor, conditions: Conditions) -> Tensor:
        if len(groups := self._groups(times, conditions)) > 1:
            return self._predicted_in_groups(groups, denoiser, latents, times, conditions)
        if self.guide and conditions[GUIDED][0]:
            own = {n.removeprefix(GUIDE): value for n, value in conditions.items() if n.startswith(GUIDE)}
            return self.guide.predict(getattr(self.pipeline, self.record.guiding), latents, times, own)
        chosen, times = self._denoiser_at(times, denoiser), on(times, latents.device)
        place, latents = self._place_of(conditions, self._size_of(latents.shape[1:])), latents * self.record.spread
        given = self._arguments(latents, times, conditions, place)
        output = output_of(chosen(**self.record.arrangement.nested(given)))
        output = torch.stack(output) if isinstance(output, list) else output
        expected = self.record.output_shape(place.argument)
        if tuple(output.shape[1:]) != expected:
            raise ValueError(
                f"{self.name}'s transformer puts out {tuple(output.shape[1:])} here, recorded were {expected}"
            )
        return self._prediction(output, latents, times, place)

    def _arguments(self, latents: Tensor, times: Tensor, conditions: Conditions, place: Place) -> dict:
        """The arguments of the denoiser by name for latents as the scheduler has them."""
        record, device, batch, values = self.record, latents.device, len(latents), latents.flatten(1)
        here = place.on(device, record.noisy)
        if here.beside is not None:
            own = conditions["references"][:, : len(here.beside)] if record.references else here.beside
            values = torch.cat([values, own.to(values.dtype).expand(batch, -1)], dim=1)
        packed = values[:, here.packed].reshape(batch, *place.argument).to(place.constants[record.noisy][0].dtype)
        given = self._of_prompts(conditions, place, device)
        constants = {name: value for name, value in here.constants.items() if name not in given}
        for name in (name for name in constants if f"references.{name}" in conditions):
            shape = conditions[f"references.{name}.shape"][0].tolist()  # rows of other sizes may be larger
            constants[name] = conditions[f"references.{name}"][0][tuple(map(slice, shape))]
        given |= {name: self._constant(name, value, batch) for name, value in constants.items()}
        given[record.noisy] = list(packed) if record.takes_lists else packed
        told = place.told(times, self._training_scheduler.config.num_train_timesteps)
        for name, (by, start) in record.times.items():
            given[name] = _spread(by * told + start, here.constants[name], here.still.get(name))
        if record.told and "guidance" in conditions:
            given[record.told[0]] = on(self._told(conditions["guidance"]), device)
        return given

    def _prediction(self, output: Tensor, latents: Tensor, times: Tensor, place: Place) -> Tensor:
        """What the denoiser's output predicts of latents as the scheduler has them."""
        record, here = self.record, place.on(latents.device, self.record.noisy)
        is_plain = place.sign > 0 and record.steps != "image" and record.spread == 1
        if is_plain and here.unpacked is None and output.shape[-2:] == latents.shape[-2:]:
            return output.reshape(len(latents), -1, *latents.shape[2:])  # with its variance, if there is one
        output = output.flatten(1)
        output = output[:, : latents[0].numel()] if here.unpacked is None else output[:, here.unpacked]
        own = place.sign * output.reshape(latents.shape)
        if record.steps == "image":
            sigma = times / self._training_scheduler.config.num_train_timesteps
            own = (latents - own) / sigma.clamp(min=record.least).view(-1, *[1] * (latents.ndim - 1))
        own = own / record.spread
        return own if here.given is None else own.masked_fill(here.given, 0)  # of which nothing is predicted

    def completed(self, latents: Tensor, conditions: Conditions) -> Tensor:
        given = self.place(*self._size_of(latents.shape[1:])).given
        if not given.any():
            return latents
        whole, clean = latents.clone(), conditions["references.clean"].to(latents)
        whole[:, given.to(latents.device)] = clean[:, : int(given.sum())]  # rows of other sizes may be larger
        return whole

    def _place_of(self, conditions: Conditions, size: tuple[int, int, int]) -> Place:
        """What the pipeline says of images of this size, with a group's prompts and reference images."""
        if self.record.references:
            asked, *sizes = map(tuple, conditions["references.sizes"][0].tolist())
            if asked != size[:2]:
                raise ValueError(f"an edit of {asked[0]} by {asked[1]} pixels is asked for {size[0]} by {size[1]}")
            frames = int(conditions["references.frames"][0]) if "references.frames" in conditions else 1
            if frames != size[2]:
                raise ValueError(f"a clip of {frames} frames is asked for {size[2]}")
            return self.place(*size, sizes)
        if not self.is_sized:
            return self.place(*size)
        *asked, length = conditions["asked.shape"][0].tolist()
        if tuple(asked) != size:
            was, wanted = ("{} by {} pixels in {} frames".format(*each) for each in (asked, size))
            raise ValueError(f"{self.name} encodes prompts for a size: one for {was} is asked for {wanted}")
        return self.place(*size, length=length or None)

    def _predicted_in_groups(self, groups, denoiser, latents, times, conditions) -> Tensor:
        book = getattr(unwrapped(denoiser), "_onelora", None)
        is_routed = book is not None and book.open_route is not None
        if is_routed and torch.is_grad_enabled():  # checkpointed blocks are computed again when the route is another
            raise ValueError(
                f"{self.name} computes a batch in {len(groups)} groups, by the lengths of its prompts, the sizes of "
                "its reference images or the denoisers of its times, and its images train adapters of their own: "
                "train one at a time"
            )
        outputs = []
        for rows in groups:
            with book.routed_rows(rows.tolist()) if is_routed else nullcontext():
                own = {name: _chosen(condition, rows) for name, condition in conditions.items()}
                outputs.append(self._predicted(denoiser, _chosen(latents, rows), times[rows], own))
        return _chosen(torch.cat(outputs), torch.cat(groups).argsort())

    def _told(self, scales: Tensor) -> Tensor:
        """What the denoiser is told of strengths of guidance, (batch, ...)."""
        _, by, start = self.record.told
        if by is not None:
            return by * scales + start
        return torch.cat([self._embedded(scale) for scale in scales.tolist()])

    def _embedding(self, scale: float) -> Tensor:
        """What the pipeline makes of a strength of guidance, for one image."""
        return self.recorder.call(encoded=self.record.encoded, guidance_scale=scale)[self.record.told[0]]

    def _constant(self, name: str, value, batch: int):
        """A constant argument, for one image or for the frames of one clip, for so many."""
        if not self.record.batched.get(name):
            return value
        if isinstance(value, Tensor) and value.ndim:
            # As a pipeline gives it: one row after the other in memory, which some denoisers count on.
            return value.expand(batch, *value.shape).flatten(0, 1).contiguous()
        return list(value) * batch if isinstance(value, list | tuple) else value

    def learned(self, latents: tuple[int, ...]) -> Tensor | None:
        given = self.place(*self._size_of(latents)).given if self.record.frames > 1 else torch.zeros(())
        return (~given[None, :1]).float() if given.any() else None

    def training_scheduler(self, pipeline):
        return self._training_scheduler

    def timestep_range(self, scheduler) -> range:
        if isinstance(self.denoiser, TwoDenoisers):
            return super().timestep_range(scheduler)
        times = model_timesteps(torch.arange(scheduler.config.num_train_timesteps), scheduler)
        mine = self._is_mine(times).nonzero().flatten().tolist()
        return range(mine[0], mine[-1] + 1)

    def sampling_scheduler(self, scheduler, num_inference_steps: int, num_tokens: int, frames: int = 1):
        recorder, record, of_frame = self.recorder, self.record, num_tokens // frames
        height = max(side for side in range(1, int(of_frame**0.5) + 1) if of_frame % side == 0)
        side = (height * record.multiple, of_frame // height * record.multiple)
        frames = 1 + (frames - 1) * record.stride
        steps, is_other = None, record.steps in ("flow", "edm")
        if is_other:
            steps = measured(recorder, side, num_inference_steps, frames, scales=True)
        run = steps.run if is_other else recorder.alone(side, num_inference_steps, frames=frames)
        run.set_timesteps(scheduler)
        vars(scheduler).update(run.changed)
        if not is_other:
            return scheduler
        return Translated(scheduler, steps, self.place(*side, frames).sign, record.unit, times_of(recorder, steps))

    def guidance_scale(self, pipeline) -> float:
        if self.record.guide == "guider":
            return next(iter(self.recorder.guiders.values())).guidance_scale + (self.record.offset or 0)
        own = self.recorder.default_of(self.record.guide or "guidance_scale")
        return (1.0 if own is None else own) + (self.record.offset or 0)

    # -----------------------------------------------------------------------------------------------
    # Images

    def encode_images(self, vae: nn.Module, images: Tensor) -> Tensor:
        place = self.place(*images.shape[-2:], images.shape[2] if images.ndim == 5 else 1)
        given = to_autoencoder(images, place)  # clips one by one: some autoencoders take no more, and they are large
        parts = [moments_of(vae, part) for part in given.split(1 if place.frames else len(given))]
        mean, std = (from_autoencoder(torch.cat(part), images, place) for part in zip(*parts, strict=True))
        if mean[0].numel() != place.scale.numel():
            raise ValueError(
                f"{self.name}'s autoencoder makes latents {tuple(mean.shape[1:])} of images of "
                f"{tuple(images.shape[-2:])} pixels, and its pipeline draws from {place.shape}"
            )
        mean, std = (moment.float().reshape(len(images), *place.shape) for moment in (mean, std))
        scale, shift = on(place.scale, mean.device), on(place.shift, mean.device)
        return torch.stack([(mean - shift) / scale, std / scale.abs()], dim=1)

    def decode(self, vae: nn.Module, latents: Tensor) -> Tensor:
        place = self.place(*self._size_of(latents.shape[1:]))
        latents = latents.float() * on(place.scale, latents.device) + on(place.shift, latents.device)
        given, more = to_autoencoder(latents, place).to(vae.dtype), send_to_device(place.decoding, latents.device)
        with torch.no_grad():
            each = 1 if place.frames else latents.shape[2] if latents.ndim == 5 else len(given)
            parts = [vae.decode(part, *more["args"], **more["kwargs"]).sample for part in given.split(each)]
        return from_autoencoder(torch.cat(parts).float(), latents, place)

    def latent_shape(self, pipeline, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        return self.place(height, width, frames).shape

    def pixels_of_latent(self, pipeline) -> int:
        return self.record.pixels

    def patch_size(self, transformer: nn.Module) -> int:
        return self.record.multiple // self.record.pixels

    def resolution(self, pipeline) -> int:
        own = None if self.recorder.takes_size else denoiser_of(pipeline).config.get("sample_size")
        return own * self.record.pixels if own else self._own_side  # that of its reference image

    @cached_property
    def _own_side(self) -> int:
        how = {"encoded": self.record.encoded, "step": lambda number, sample: sample, **self.record.off}
        return self.recorder.run(answer=self.recorder.answering_all(0.0), **how).decoded.shape[-2] * self.record.pixels

    def check_resolution(self, pipeline, *sides: int) -> None:
        super().check_resolution(pipeline, *sides)
        height, width = sides if len(sides) > 1 else sides * 2
        shape = self.place(height, width).shape
        if shape[-2:] != (height // self.record.pixels, width // self.record.pixels):
            raise ValueError(
                f"{self.name} draws {' by '.join(str(side * self.record.pixels) for side in shape[-2:])} pixels "
                f"when asked for a resolution of {' by '.join(map(str, sides))}"
            )
        check_sides(self, height, width)

    def check_frames(self, frames: int) -> None:
        stride = self.record.stride
        if frames == 1 and self.record.frames > 1:
            raise ValueError(f"{self.name} draws clips that begin with their reference image: give --frames")
        if frames == 1 or stride and frames > 1 and frames % stride == 1 % stride:
            return
        if not stride:
            return super().check_frames(frames)
        below = max(0, frames - 1) // stride * stride + 1
        allowed = f"{below} or {below + stride}"
        raise ValueError(f"{self.name} draws clips of {stride} k + 1 frames, not of {frames}: give {allowed}")

    def try_frames(self, frames: int) -> None:
        if frames > 1:
            check_frames(self, frames)


def _chosen(value: Tensor, rows: Tensor) -> Tensor:
    return value[on(rows, value.device)]


def _spread(times: Tensor, recorded, still: Tensor | None) -> Tensor:
    """The times of a batch in the shape of the argument of one image: one number, or one for each of its tokens.

    Those of `still` tokens, (1, ...) bool, are the recorded ones.
    """
    if not isinstance(recorded, Tensor):
        return times
    shape = recorded.shape[1:]
    spread = times.reshape(-1, *[1] * len(shape)).expand(-1, *shape)
    if recorded.is_floating_point():  # in its precision, which some denoisers do not change
        spread = spread.to(recorded.dtype)
    return spread if still is None else torch.where(still, recorded.to(spread.dtype), spread)


def line_in_words(by: float, start: float) -> str:
    return f"{by:g}·t{f' + {start:g}' if start else ''}"
