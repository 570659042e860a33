"""How a recorded family makes conditions of prompts and reference images, and the denoiser's arguments of them."""

from dataclasses import replace
from math import inf

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from onelora_diffusion.denoisers import autoencoder_name, denoisers_in
from onelora_diffusion.families.arguments import on, same
from onelora_diffusion.families.family import Condition, Conditions, Edit, Family, Sized, longest, padded, sides_of
from onelora_diffusion.families.given import clean_latents
from onelora_diffusion.families.guided import empty_row, guided_run, unpadded
from onelora_diffusion.families.record import Place, Prompted, Record
from onelora_diffusion.families.recording import Recorder
from onelora_diffusion.families.sized import row_of, rows_in, shapes_in
from onelora_diffusion.files import digest

ON_CPU = (".length", ".frames", ".sizes", ".shape", ".digest")  # endings of conditions that say how others are used
GUIDE, GUIDED = "guide.", "guided.digest"  # beginnings of what another model is given; whether it computes a row


class Encoding(Family):
    """The half of a recorded family that encodes; `Recorded` says what is found at a size, and predicts.

    Attributes:
        guide: the family of a second model, which guides this one's pictures; None: there is none.
        is_sized: whether prompts are encoded for a size.
    """

    name: str
    recorder: Recorder
    record: Record
    guide: "Encoding | None"
    is_sized: bool
    _of_guide: dict[tuple, Conditions]
    _last_shared: dict[str, tuple[Tensor, Tensor]]

    def place(self, height: int, width: int, *more) -> Place:
        raise NotImplementedError

    def encode_conditions(self, pipeline, conditions: list[Condition], max_length: int | None = None) -> Conditions:
        encode = self._encoded_edit if self.record.references else self._encoded_prompt
        with torch.no_grad():
            rows = [encode(condition, max_length) for condition in conditions]
        return {name: padded([row[name] for row in rows]) for name in rows[0]}

    def encoders(self, pipeline) -> dict[str, object]:
        """None where the pipeline's call alone encodes, which needs them for other sizes, too."""
        return super().encoders(pipeline) if self.recorder.encoding else {}

    def conditioners(self, pipeline) -> dict[str, object]:
        own = super().encoders(pipeline)
        others = {*own, *denoisers_in(pipeline), *([] if self.record.references else [autoencoder_name(pipeline)])}
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

    def _length(self, max_length: int | None) -> int | None:
        """The number of tokens that the pipeline is told; None: it shortens no prompts, and long ones are errors."""
        return max_length if "max_sequence_length" in self.recorder.parameters else None

    def _encoded_prompt(self, condition: str | Sized | None, max_length: int | None) -> dict[str, Tensor]:
        if not self.is_sized:
            return self._encoded_row(condition or "", max_length)
        asked, length = self.at_size(condition, self.recorder.square), self._length(max_length)
        row = self._encoded_row(asked.prompt or "", max_length, asked.side, asked.frames)
        row["asked.shape"] = torch.tensor([[*asked.side, asked.frames, length or 0]])
        if self.guide:  # what computes a row is a part of it, so that rows have one form
            key = replace(asked, prompt=""), length
            if key not in self._of_guide:
                own = self.guide._encoded_prompt(key[0], max_length)
                self._of_guide = {key: {f"{GUIDE}{name}": value for name, value in own.items()}}
            row |= self._of_guide[key] | {GUIDED: torch.tensor([asked.prompt is None])}
        return row

    def _encoded_edit(self, edit: Edit | str | None, max_length: int | None) -> dict[str, Tensor]:
        if not isinstance(edit, Edit):
            raise ValueError(f"{self.name} edits reference images here, and a prompt has none")
        images = [reference.image() for reference in edit.references]
        if len(images) != self.record.references:
            raise ValueError(f"{self.name} is given {len(images)} reference images, not {self.record.references}")
        row = self._encoded_row(edit.prompt, max_length, edit.side, edit.frames, references=images)
        row["references.sizes"] = torch.tensor([[edit.side, *(image.size for image in images)]])
        return row | ({"references.frames": torch.tensor([edit.frames])} if edit.frames > 1 else {})

    def _encoded_row(
        self, prompt: str, max_length: int | None, side: tuple[int, int] | None = None, frames: int = 1, **references
    ) -> dict[str, Tensor]:
        recorder, record, length = self.recorder, self.record, self._length(max_length)
        side, settings = side or recorder.square, longest(length) | references | {"frames": frames}
        sizes = [image.size for image in references.get("references", ())]
        place = self.place(*side, frames, sizes, length if self.is_sized else None)
        is_given = bool(place.given.any())
        whole = {"answer": recorder.answering_all(0.0), "step": lambda number, sample: sample} if is_given else {}
        run = recorder.run(prompt, side, **record.off | settings | whole)
        call = run.calls[0]
        if self.guides_itself and not prompt:  # as the pipeline encodes what it guides from, which may be another way
            guided, _ = guided_run(recorder, side, **record.guided | settings)
            _, empty = empty_row(recorder, guided, recorder.call(side=side, **settings))
            call = call | (empty if record.together else unpadded(recorder, guided, empty, call))
        self._check_constants(call, place)
        row = self._references_row(call, place) if record.references else {}
        for name, how in record.prompted.items():
            row |= self._prompt_row(name, how, call, max_length, place)
        return row | ({"references.clean": clean_latents(place, run.decoded)} if is_given else {})

    def _is_kept(self, name: str, value) -> bool:
        """Whether an argument is kept for each edit: it may follow sizes by the tokens that a prompt has of images."""
        record = self.record
        is_other = name not in (record.noisy, *record.times, *record.prompted)
        return bool(record.references) and isinstance(value, Tensor) and is_other

    def _check_constants(self, call: dict, place: Place) -> None:
        """ValueError if an argument that is not of the prompt is another one for it."""
        for name, value in call.items():
            if name in (*self.record.prompted, *self.record.times, self.record.noisy) or self._is_kept(name, value):
                continue
            device = value.device if isinstance(value, Tensor) else "cpu"
            if not same(value, send_to_device(place.constants.get(name), device)):
                raise ValueError(f"{self.name} tells its denoiser another {name} of this prompt than of others")

    def _references_row(self, call: dict, place: Place) -> dict[str, Tensor]:
        """What is kept of a call's reference images: what the noisy argument has of them, and all that is kept."""
        own = {name: value for name, value in call.items() if self._is_kept(name, value)}
        row = {f"references.{name}": value[None] for name, value in own.items()}
        row |= {f"references.{name}.shape": torch.tensor([[*value.shape]]) for name, value in own.items()}
        row["references.digest"] = torch.tensor([int(digest(own)[:15], 16)])
        given = call[self.record.noisy][0].flatten()
        return row | {"references": given[on(place.beside, given.device)][None]}

    def _prompt_row(self, name: str, how: Prompted, call: dict, max_length: int | None, place: Place) -> dict:
        """An argument of a call that follows the prompt, (1, ...), with its length where that of prompts differs."""
        record, value = self.record, call[name]
        if value is None:  # a mask that is left out where it has every token (Nucleus)
            tokens = next(call[n].shape[:2] for n in record.prompted if getattr(call[n], "ndim", 0) == 3)
            value = torch.ones(tokens, dtype=place.constants[name].dtype)
        value = value if how.kind == "shared" else value[0]
        if record.together:
            return row_of(name, value)
        if how.ragged is None:
            shape = {f"{name}.shape": torch.tensor([[*value.shape]])} if record.references else {}
            return {name: value[None]} | shape
        length = value.shape[how.ragged]
        if max_length and length > max_length and not record.references:
            raise ValueError(
                f"{self.name} has {length} tokens of a prompt in {name}, more than the {max_length} asked for"
            )
        return {name: value[None], f"{name}.length": torch.tensor([length])}

    def on_device(self, conditions: Conditions, device: torch.device) -> Conditions:
        kinds = {name: how.kind for name, how in self.record.prompted.items()}
        stay = [name for name in conditions if name.endswith(ON_CPU)]
        # As a batch is arranged by these, or a strength of guidance is looked up.
        stay += [name for name in conditions if kinds.get(name) == "shared" or name == "guidance"]
        moved = {name: value for name, value in conditions.items() if name not in stay}
        return super().on_device(moved, device) | {name: conditions[name] for name in stay}

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
            keys.append(self._is_mine(times))
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

    def _of_prompts(self, conditions: Conditions, place: Place, device: torch.device) -> dict:
        """Arguments of the denoiser that follow the prompt, cut to the longest of the batch."""
        record, unequal, arguments = self.record, None, {}
        for name, how in record.prompted.items():
            rows = conditions[name]
            if record.together:
                rows = rows_in(name, conditions)
            elif how.ragged is not None:
                lengths = conditions[f"{name}.length"].tolist()
                if how.kind == "list":
                    rows = [row.narrow(how.ragged, 0, n) for row, n in zip(rows, lengths, strict=True)]
                else:
                    rows = rows.narrow(how.ragged + 1, 0, max(lengths))
                    unequal = lengths if len(set(lengths)) > 1 else unequal
            elif f"{name}.shape" in conditions:  # it follows the sizes of reference images, which are one here
                rows = rows[(slice(None), *map(slice, conditions[f"{name}.shape"][0].tolist()))]
            if how.kind == "list":
                arguments[name] = [*rows]
            elif how.kind == "shared":
                arguments[name] = self._shared(name, rows, device)
            else:  # some have one for each frame
                rows = torch.stack(rows) if record.together else rows
                arguments[name] = rows.repeat_interleave(len(place.constants[name]), 0)
        if unequal:
            valid = torch.arange(max(unequal)) < torch.tensor(unequal)[:, None]
            masks = record.masks.items()
            arguments |= {name: valid.to(device, mask.dtype, non_blocking=True) for name, mask in masks}
        return arguments

    @torch.inference_mode(False)  # tensors of inference mode cannot be saved for a backward
    def _shared(self, name: str, values: Tensor | list[Tensor], device: torch.device) -> Tensor:
        """The argument that all images of a batch have, on the device, where that of the last call still is."""
        if not all(same(value, values[0]) for value in values):
            raise ValueError(
                f"{self.name} has one {name} for a batch, and its prompts differ in it: make batches of one"
            )
        if values[0].device == device:
            return values[0]
        own, moved = self._last_shared.get(name, (None, None))
        if not same(own, values[0]) or moved.device != device:
            own, moved = self._last_shared[name] = values[0], values[0].to(device, non_blocking=True)
        return moved
