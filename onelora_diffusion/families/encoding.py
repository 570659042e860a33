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
from onelora_diffusion.families.record import Place, Record
from onelora_diffusion.families.recording import Recorder
from onelora_diffusion.families.sized import row_of, rows_in, shapes_in
from onelora_diffusion.files import digest

ON_CPU = (".length", ".frames", ".sizes", ".shape", ".digest")  # endings of conditions that say how others are used
GUIDE, GUIDED = "guide.", "guided.digest"  # beginnings of what another model is given; whether it computes a row
ROOM = 512  # tokens of a prompt that are kept where the pipeline names no number


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
        # As a batch is arranged by these, or a strength of guidance is looked up.
        stay += [name for name in conditions if kinds.get(name) == "shared" or name == "guidance"]
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
