"""A family that nobody wrote: what a stock pipeline's own call says of it, recorded once and used for training.

`families/probing.py` says what is looked for, and what is refused.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from onelora_diffusion.denoisers import TwoDenoisers, autoencoder_name, denoiser_of, denoisers_in
from onelora_diffusion.diffusion import model_timesteps
from onelora_diffusion.families.arguments import on, output_of, same
from onelora_diffusion.families.autoencoder import moments_of
from onelora_diffusion.families.clips import from_autoencoder, to_autoencoder
from onelora_diffusion.families.coordinates import Translated, measured, times_of, training_scheduler
from onelora_diffusion.families.family import Condition, Conditions, Edit, Family, Sized, longest, padded, sides_of
from onelora_diffusion.families.fitting import check_frames, check_sides
from onelora_diffusion.families.given import clean_latents
from onelora_diffusion.families.guided import empty_row, guided_run, unpadded
from onelora_diffusion.families.guides import probed_guide
from onelora_diffusion.families.kept import keep, kept, path_of
from onelora_diffusion.families.probing import place_at, probed
from onelora_diffusion.families.record import Place
from onelora_diffusion.families.recording import SHORT, Recorder
from onelora_diffusion.families.sized import row_of, rows_in, shapes_in
from onelora_diffusion.files import digest
from onelora_diffusion.injection.book import unwrapped

ON_CPU = (".length", ".frames", ".sizes", ".shape", ".digest")  # endings of conditions that say how others are used
GUIDE, GUIDED = "guide.", "guided.digest"  # beginnings of what another model is given; whether it computes a row
ROOM = 512  # tokens of a prompt that are kept where the pipeline names no number
PLACES = 64  # sizes of images, with those of their reference images, of which what was recorded is kept in memory


class Recorded(Family):
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
        self._first = place
        self._places: dict[tuple, Place] = {(*self.recorder.square, self.record.frames): place}
        self._of_guide: dict[tuple, Conditions] = {}
        self._last_shared: dict[str, tuple[Tensor, Tensor]] = {}  # by argument, on the host and on the device
        self.is_guided, self.targets = bool(self.record.guided), self.record.targets
        self.guide = Recorded(pipeline, records, self) if self.record.guiding else None
        self.is_sized = bool(self.record.together or self.guide and self.guide.record.together)

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
        if key not in self._places:
            with torch.no_grad():
                place, _ = place_at(self.recorder, (height, width), sizes, frames, length)
            for name, how in self.record.prompted.items():
                rows = place.constants.get(name)
                if how.kind == "rows" and not same(rows, rows[:1].expand_as(rows)):
                    raise ValueError(f"{self.name} tells its denoiser another {name} of each frame")
            self._places[key] = place.leave_out(self.record.together)
            while len(self._places) > PLACES:
                self._places.pop([*self._places][1])  # all but that of the recorded size
        return self._places[key]

    @property
    def frame_rate(self) -> float | None:
        return self.recorder.frame_rate

    @frame_rate.setter
    def frame_rate(self, rate: float | None) -> None:
        self.recorder.frame_rate = rate
        self._places = {size: place for size, place in self._places.items() if size[2] == 1}

    def _size_of(self, latents: Tensor) -> tuple[int, int, int]:
        """Height and width in pixels, and the number of frames."""
        height, width = (side * self.record.pixels for side in latents.shape[-2:])
        return height, width, 1 + (latents.shape[2] - 1) * self.record.stride if latents.ndim == 5 else 1

    # -----------------------------------------------------------------------------------------------
    # Conditions

    def encode_conditions(self, pipeline, conditions: list[Condition], max_length: int | None = None) -> Conditions:
        settings = longest(max_length)
        if "max_sequence_length" not in self.recorder.parameters:
            settings = {}  # the pipeline does not shorten prompts, and a longer one is an error
        with torch.no_grad():
            encode = self._encoded_edit if self.record.references else self._encoded_prompt
            rows = [encode(condition, max_length, settings) for condition in conditions]
        return {name: padded([row[name] for row in rows]) for name in rows[0]}

    def encoders(self, pipeline) -> dict[str, object]:
        """None where the pipeline's call alone encodes, which needs them for other sizes, too."""
        return super().encoders(pipeline) if self.recorder.encoding else {}

    def conditioners(self, pipeline) -> dict[str, object]:
        own = super().encoders(pipeline)
        others = {
            *own,
            *denoisers_in(pipeline),
            *([] if self.record.references else [autoencoder_name(pipeline)]),
        }
        others |= {*getattr(pipeline, "_exclude_from_cpu_offload", ())}  # such as a safety checker
        modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
        found = {name: part for name, part in modules.items() if name not in others}
        return found if self.recorder.encoding else own | found

    def at_size(self, condition: Condition, size: int | tuple[int, int], frames: int = 1) -> Condition:
        is_sized = self.is_sized and not isinstance(condition, Edit | Sized)
        return Sized(condition, sides_of(size), frames) if is_sized else condition

    @property
    def guides_itself(self) -> bool:
        return self.is_guided and self.guide is None

    def _encoded_prompt(self, condition: str | Sized | None, max_length: int | None, settings: dict) -> dict:
        if not self.is_sized:
            return self._encoded_row(condition or "", max_length, settings)
        asked, length = self.at_size(condition, self.recorder.square), settings.get("max_sequence_length")
        row = self._encoded_row(asked.prompt or "", max_length, settings, asked.side, frames=asked.frames)
        row["asked.shape"] = torch.tensor([[*asked.side, asked.frames, length or 0]])
        if self.guide:  # what computes a row is a part of it, so that rows have one form
            key = replace(asked, prompt=""), length
            if key not in self._of_guide:
                own = self.guide._encoded_prompt(key[0], max_length, settings)
                self._of_guide = {key: {f"{GUIDE}{name}": value for name, value in own.items()}}
            row |= self._of_guide[key] | {GUIDED: torch.tensor([asked.prompt is None])}
        return row

    def _encoded_edit(self, edit: Edit | str | None, max_length: int | None, settings: dict) -> dict[str, Tensor]:
        if not isinstance(edit, Edit):
            raise ValueError(f"{self.name} edits reference images here, and a prompt has none")
        images = [reference.image() for reference in edit.references]
        if len(images) != self.record.references:
            raise ValueError(f"{self.name} is given {len(images)} reference images, not {self.record.references}")
        sizes = [image.size for image in images]
        row = self._encoded_row(
            edit.prompt, max_length, settings, edit.side, sizes, references=images, frames=edit.frames
        )
        row["references.sizes"] = torch.tensor([[edit.side, *sizes]])
        return row | ({"references.frames": torch.tensor([edit.frames])} if edit.frames > 1 else {})

    def _encoded_row(
        self, prompt: str, max_length: int | None, settings: dict, side=None, sizes=(), frames=1, **given
    ) -> dict[str, Tensor]:
        recorder, record, settings = self.recorder, self.record, settings | given | {"frames": frames}
        side = side or recorder.square
        length = settings.get("max_sequence_length") if self.is_sized else None
        place = self.place(*side, frames, sizes, length)
        whole = {"answer": recorder.answering(lambda number, elements: torch.zeros(elements))}
        whole |= {"step": lambda number, sample: sample}
        run = recorder.run(prompt, side, **record.off | settings | (whole if place.given.any() else {}))
        call = run.calls[0]
        if self.guides_itself and not prompt:  # as the pipeline encodes what it guides from, which may be another way
            guided, _ = guided_run(recorder, side, **record.guided | settings)
            _, empty = empty_row(recorder, guided, recorder.call(side=side, **settings))
            call = call | (empty if record.together else unpadded(recorder, guided, empty, call))
        row = self._padded(call, max_length, place)
        return row | ({"references.clean": clean_latents(place, run.decoded)} if place.given.any() else {})

    def _padded(self, call: dict, max_length: int | None, place: Place) -> dict[str, Tensor]:
        """The prompt's arguments of a call, (1, ...) each, with their lengths where those of prompts differ.

        With reference images, also what of them is in the noisy argument, and all else, which may follow their sizes
        through the tokens that a prompt has for them; and prompts are as long as they are.
        """
        record, constants = self.record, place.constants
        own = {name: value for name, value in call.items() if record.references and isinstance(value, Tensor)}
        for name in (record.noisy, *record.times, *record.prompted):
            own.pop(name, None)
        for name in call.keys() - {*record.prompted, *record.times, *own, record.noisy}:
            device = call[name].device if isinstance(call[name], Tensor) else "cpu"
            if not same(call[name], send_to_device(constants.get(name), device)):
                raise ValueError(f"{self.name} tells its denoiser another {name} of this prompt than of others")
        row = {}
        if record.references:
            row |= {f"references.{name}": value[None] for name, value in own.items()}
            row |= {f"references.{name}.shape": torch.tensor([[*value.shape]]) for name, value in own.items()}
            row["references.digest"] = torch.tensor([int(digest(own)[:15], 16)])
            given = call[record.noisy][0].flatten()
            row["references"] = given[on(place.beside, given.device)][None]
        for name, how in record.prompted.items():
            if call[name] is None:  # a mask that is left out where it has every token (Nucleus)
                tokens = next(
                    call[other].shape[:2] for other in record.prompted if getattr(call[other], "ndim", 0) == 3
                )
                call = call | {name: constants[name].new_ones(tokens)}
            value = call[name][None] if how.kind == "shared" else call[name][0][None]
            if record.together:
                row |= row_of(name, value[0])
                continue
            if how.ragged is not None:
                own, length = self.recorder.parameters.get("max_sequence_length"), value.shape[how.ragged + 1]
                most = length if record.references else max_length or own and own.default or ROOM
                if length > most:
                    raise ValueError(
                        f"{self.name} has {length} tokens of a prompt in {name}, more than the {most} asked for"
                    )
                missing = list(value.shape)
                missing[how.ragged + 1] = most - length
                value = torch.cat([value, value.new_zeros(missing)], how.ragged + 1)
                row[f"{name}.length"] = torch.tensor([length])
            elif record.references:
                row[f"{name}.shape"] = torch.tensor([[*value.shape[1:]]])
            row[name] = value
        return row

    def on_device(self, conditions: Conditions, device: torch.device) -> Conditions:
        kinds = {name: how.kind for name, how in self.record.prompted.items()}
        stay = [name for name in conditions if name.endswith(ON_CPU)]
        stay += [name for name in conditions if kinds.get(name) == "shared"]  # as a batch is arranged by these
        moved = {name: value for name, value in conditions.items() if name not in stay}
        return super().on_device(moved, device) | {name: conditions[name] for name in stay}

    @torch.inference_mode(False)  # tensors of inference mode cannot be saved for a backward
    def _moved(self, name: str, value, device: torch.device):
        """An argument of a batch on the device, where one that is the same as in the last call still is."""
        if self.record.prompted[name].kind != "shared" or value.device == device:
            return value
        last = self._last_shared.get(name, (None, None))
        if last[0] is None or last[1].device != device or not same(last[0], value):
            last = self._last_shared[name] = (value, value.to(device, non_blocking=True))
        return last[1]

    def _groups(self, times: Tensor, conditions: Conditions) -> list[Tensor]:
        """The images of a batch that are computed together.

        They are of one denoiser, of reference images of the same sizes, and, where the denoiser takes one alone, of
        one length of their prompts; where prompts are encoded for a size, of arguments of one shape.
        """
        record = self.record
        names = [n for n, how in record.prompted.items() if how.ragged is not None and how.kind != "list"]
        names = [] if record.pads or record.together else names
        keys = [conditions[f"{name}.length"] for name in names]
        keys.extend(shapes_in(record.prompted if record.together else (), conditions))
        if self.guide:
            keys.append(conditions[GUIDED])
        if record.share != (-inf, inf):
            keys.append(self._is_mine(times).cpu())
        if record.references:
            keys.extend(conditions["references.sizes"].flatten(1).unbind(1))
            keys.append(conditions["references.digest"])
        if not keys:
            return []
        _, group = torch.stack(keys, dim=1).unique(dim=0, return_inverse=True)
        return [(group == number).nonzero().flatten() for number in group.unique()]

    def _is_mine(self, times: Tensor) -> Tensor:
        """Whether each time is in the recorded denoiser's share, (batch,) int64."""
        lowest, highest = self.record.share
        return ((times >= lowest) & (times < highest)).long()

    def _of_prompts(self, conditions: Conditions, place: Place, device) -> dict:
        """Arguments of the denoiser that follow the prompt, cut to the longest of the batch."""
        record, unequal = self.record, None
        arguments = {}
        for name, how in record.prompted.items():
            rows, lengths = conditions[name], [0]
            if record.together:
                arguments[name] = rows = rows_in(name, conditions)
                if how.kind == "list":
                    continue
                rows = torch.stack(rows)
            elif how.ragged is not None:
                lengths = conditions[f"{name}.length"].tolist()
                if how.kind == "list":
                    arguments[name] = [row.narrow(how.ragged, 0, n) for row, n in zip(rows, lengths, strict=True)]
                    continue
                rows = rows.narrow(how.ragged + 1, 0, max(lengths))
            elif f"{name}.shape" in conditions:  # it follows the sizes of reference images, which are one here
                rows = rows[(slice(None), *map(slice, conditions[f"{name}.shape"][0].tolist()))]
            if len(set(lengths)) > 1:
                unequal = lengths
            if how.kind == "rows":  # some have one for each frame
                arguments[name] = rows.repeat_interleave(len(place.constants[name]), 0)
            else:
                arguments[name] = self._moved(name, self._joined(name, rows), device)
        for name, mask in record.masks.items():
            if unequal:
                valid = torch.arange(max(unequal)) < torch.tensor(unequal)[:, None]
                arguments[name] = valid.to(device, mask.dtype, non_blocking=True)
        return arguments

    def _joined(self, name: str, values: Tensor) -> Tensor:
        """The argument that all images of a batch have, of those of single images."""
        if not all(same(value, values[0]) for value in values):
            raise ValueError(
                f"{self.name} has one {name} for a batch, and its prompts differ in it: make batches of one"
            )
        return values[0]

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
        denoiser = self._denoiser_at(times, denoiser)
        record, device, batch = self.record, latents.device, len(latents)
        latents = latents * record.spread
        place, values = self._place_of(conditions, self._size_of(latents)), latents.flatten(1)
        if record.references:
            place, references = self._referred(conditions, self._size_of(latents))
            values = torch.cat([values, references.to(values.dtype)], dim=1)
        here = place.on(device, record.noisy)
        if here.beside is not None and not record.references:
            values = torch.cat([values, here.beside.to(values.dtype).expand(batch, -1)], dim=1)
        packed = values[:, here.packed].reshape(batch, *place.argument).to(here.constants[record.noisy][0].dtype)
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
            given[record.told[0]] = self._told(conditions["guidance"])
        output = output_of(denoiser(**record.arrangement.nested(given)))
        output = torch.stack(output) if isinstance(output, list) else output
        expected = record.output_shape(place.argument)
        if tuple(output.shape[1:]) != expected:
            raise ValueError(
                f"{self.name}'s transformer puts out {tuple(output.shape[1:])} here, recorded were {expected}"
            )
        is_plain = place.sign > 0 and record.steps != "image" and record.spread == 1
        if is_plain and here.unpacked is None and output.shape[-2:] == latents.shape[-2:]:
            return output.reshape(batch, -1, *latents.shape[2:])  # with its variance, if there is one
        output = output.flatten(1)
        output = output[:, : latents[0].numel()] if here.unpacked is None else output[:, here.unpacked]
        own = place.sign * output.reshape(latents.shape)
        if record.steps == "image":
            sigma = times / self._training_scheduler.config.num_train_timesteps
            own = (latents - own) / sigma.clamp(min=record.least).view(-1, *[1] * (latents.ndim - 1))
        own = own / record.spread
        return own if here.given is None else own.masked_fill(here.given, 0)  # of which nothing is predicted

    def completed(self, latents: Tensor, conditions: Conditions) -> Tensor:
        given = self.place(*self._size_of(latents)).given
        if not given.any():
            return latents
        whole, clean = latents.clone(), conditions["references.clean"].to(latents)
        whole[:, given.to(latents.device)] = clean[:, : int(given.sum())]  # rows of other sizes may be larger
        return whole

    def _place_of(self, conditions: Conditions, size: tuple[int, int, int]) -> Place:
        """What the pipeline says of images of this size, with a group's prompts."""
        if not self.is_sized:
            return self.place(*size)
        *asked, length = conditions["asked.shape"][0].tolist()
        if tuple(asked) != size:
            was, wanted = ("{} by {} pixels in {} frames".format(*each) for each in (asked, size))
            raise ValueError(f"{self.name} encodes prompts for a size: one for {was} is asked for {wanted}")
        return self.place(*size, length=length or None)

    def _referred(self, conditions: Conditions, size: tuple[int, int, int]) -> tuple[Place, Tensor]:
        """What the pipeline says of a group's images with their references, and what of these is given, (batch, n)."""
        asked, *sizes = map(tuple, conditions["references.sizes"][0].tolist())
        if asked != size[:2]:
            raise ValueError(f"an edit of {asked[0]} by {asked[1]} pixels is asked for {size[0]} by {size[1]}")
        frames = int(conditions["references.frames"][0]) if "references.frames" in conditions else 1
        if frames != size[2]:
            raise ValueError(f"a clip of {frames} frames is asked for {size[2]}")
        place = self.place(*size, sizes)
        return place, conditions["references"][:, : int(place.beside.sum())]

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
                own = {name: condition[rows] for name, condition in conditions.items()}
                outputs.append(self._predicted(denoiser, latents[rows], times[rows], own))
        return torch.cat(outputs)[torch.cat(groups).argsort()]

    def _told(self, scales: Tensor) -> Tensor:
        """What the denoiser is told of strengths of guidance, (batch, ...)."""
        name, by, start = self.record.told
        if by is not None:
            return by * scales + start
        encoded = self.record.encoded
        rows = [self.recorder.call(encoded=encoded, guidance_scale=scale)[name] for scale in scales.tolist()]
        return torch.cat(rows).to(scales.device)

    def _constant(self, name: str, value, batch: int):
        """A constant argument for so many images."""
        if isinstance(value, Tensor):
            return _rows_for(value, batch) if self.record.batched.get(name) else value
        return list(value) * batch if self.record.batched.get(name) and isinstance(value, list | tuple) else value

    def learned(self, latents: tuple[int, ...]) -> Tensor | None:
        size = (*(side * self.record.pixels for side in latents[-2:]), 1 + (latents[1] - 1) * self.record.stride)
        given = self.place(*size).given if self.record.frames > 1 else torch.zeros(())
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
        given = {"encoded": record.encoded, "frames": frames, **record.off}
        run = steps.run if is_other else recorder.run(SHORT, side, num_inference_steps, **given)
        for name, value in run.attributes.items():
            setattr(scheduler, name, value)
        scheduler.set_timesteps(**run.schedule)
        for name, value in run.changed.items():
            setattr(scheduler, name, value)
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
        place = self.place(*self._size_of(latents))
        latents = latents.float() * on(place.scale, latents.device) + on(place.shift, latents.device)
        given, more = to_autoencoder(latents, place).to(vae.dtype), send_to_device(place.decoding, latents.device)
        with torch.no_grad():
            each = 1 if place.frames else latents.shape[2] if latents.ndim == 5 else len(given)
            parts = [vae.decode(part, *more["args"], **more["kwargs"]).sample for part in given.split(each)]
        return from_autoencoder(torch.cat(parts).float(), latents, place)

    def latent_shape(self, pipeline, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        return self.place(height, width, frames).shape

    def latent_channels(self, transformer: nn.Module) -> int:
        return self.place(*self.recorder.square).shape[0]

    def pixels_of_latent(self, pipeline) -> int:
        return self.record.pixels

    def patch_size(self, transformer: nn.Module) -> int:
        return self.record.multiple // self.record.pixels

    def resolution(self, pipeline) -> int:
        own = None if self.recorder.takes_size else denoiser_of(pipeline).config.get("sample_size")
        if own:  # else that of its reference image
            return own * self.record.pixels
        if not hasattr(self, "_own_side"):
            answer = self.recorder.answering(lambda number, elements: torch.zeros(elements))
            run = self.recorder.run(
                answer=answer, step=lambda number, sample: sample, encoded=self.record.encoded, **self.record.off
            )
            self._own_side = run.decoded.shape[-2] * self.record.pixels
        return self._own_side

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


def _rows_for(value, batch: int):
    """An argument for one image, or for the frames of one clip, for so many."""
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    # As a pipeline gives it: one row after the other in memory, which some denoisers count on.
    return value.expand(batch, *value.shape).flatten(0, 1).contiguous()


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
