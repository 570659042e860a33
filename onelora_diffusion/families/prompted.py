"""What the recorded calls of a stock pipeline say of its prompts: which arguments follow them, and how in a batch."""

import torch
from torch import Tensor

from onelora_diffusion.families.arguments import batch_kind, described, near, same
from onelora_diffusion.families.pictured import call_of_two
from onelora_diffusion.families.record import Prompted
from onelora_diffusion.families.recording import LONG, SHORT, NotTakenError, Recorder

LONGEST = " ".join([LONG] * 99)  # some pipelines pad prompts, to multiples of dozens of tokens


def find_conditions(recorder: Recorder) -> None:
    """Which arguments follow the prompt, how they are batched, and which follow the size."""
    record, parameters = recorder.record, recorder.parameters
    short, both = recorder.call(SHORT), call_of_two(recorder)
    for name in both:
        shapes = [call.shape if isinstance(call := each.get(name), Tensor) else () for each in (short, both)]
        sizes = list(zip(*shapes, strict=False))
        if len(shapes[0]) == len(shapes[1]) and (1, 2) in sizes[1:] and sizes[0] != (1, 2):
            record.arrangement.dims[name] = sizes.index((1, 2))
    if record.arrangement.dims:
        short, both = recorder.call(SHORT), call_of_two(recorder)
    long = recorder.call(LONG)
    longest = long | {name: value for name, value in _longest(recorder).items() if value is not None}
    most = parameters["max_sequence_length"].default if "max_sequence_length" in parameters else None
    fewer = recorder.call(max_sequence_length=most // 2) if most else short
    # Edits are encoded for each size of their references anyway.
    anew, side = record.encoded if record.references else None, (record.side, 2 * record.side)
    wide, replayed = (recorder.call(side=side, encoded=encoded) for encoded in (anew, record.encoded))
    for name in dict.fromkeys((*short, *both)):
        if name == record.noisy or name in record.times:
            record.batched[name] = True
            continue
        values = (short.get(name), long.get(name), both.get(name))
        kind = batch_kind(values[0], values[2])
        is_prompted = not all(same(values[0], call.get(name)) for call in (long, longest, fewer))
        # or what is encoded follows the size, and that of another size is not to be had once the encoders are gone
        is_prompted |= name in record.pictured or not same(wide.get(name), replayed.get(name))
        is_prompted |= recorder.component in recorder.guides and isinstance(values[0], Tensor)
        if not same(values[0], wide.get(name)):
            (record.together if is_prompted else record.sized).append(name)
        if is_prompted:
            record.prompted[name] = (kind, *values, longest.get(name))
        elif values[0] is None and isinstance(values[2], Tensor):
            record.masks[name] = values[2]
        elif kind is None:
            raise recorder.refusal(
                f"{name} is {described(values[0])} for one prompt, and {described(values[2])} for two"
            )
        record.batched[name] = kind in ("rows", "list")
    if not record.prompted:
        raise recorder.refusal("no argument of its denoiser follows the prompt")
    record.prompted = {name: _prompted_as(recorder, name, *how) for name, how in record.prompted.items()}
    ragged = {name: how.ragged for name, how in record.prompted.items() if how.ragged is not None}
    if record.references and record.together:
        raise recorder.refusal(
            f"{record.together[0]} follows the prompt and the size together, and there are reference images"
        )
    if record.together:
        return  # prompts are as long as they are, and those of one length and size are computed together
    lengths = [call[name][0].shape[dim] for call in (short, long) for name, dim in [*ragged.items()][:1]]
    is_told = any(
        # the mask of a prompt's tokens, or their number
        how == Prompted("rows", 0)
        and short[name][0].ndim == 1
        or [_numbers(call[name]) for call in (short, long)] == lengths
        for name, how in record.prompted.items()
    )
    expected = torch.arange(max(lengths, default=0)) < torch.tensor(lengths or [0])[:, None]
    if not all(mask.shape == expected.shape and mask.bool().cpu().equal(expected) for mask in record.masks.values()):
        record.masks, is_told = {}, False  # of other tokens as well: prompts of one length need none
    record.pads = (bool(record.masks) or is_told) and is_padded(recorder, short, both)


def _longest(recorder: Recorder) -> dict:
    """The arguments for a prompt of a hundred words, or for the longer one of two words, if no more are taken."""
    try:
        return recorder.call(LONGEST)
    except NotTakenError:
        return recorder.call(LONG)


def is_padded(recorder: Recorder, alone: dict, both: dict) -> bool:
    """Whether the denoiser answers to the first of two prompts as to it alone, though they may differ in length."""
    record = recorder.record
    if record.references:
        return True  # prompts are as long as they are then
    noise = alone[record.noisy]
    pair = noise * 2 if record.takes_lists else torch.cat([noise, noise])
    answers = (recorder.answered(call) for call in (alone, both | {record.noisy: pair}))
    return near(*([answer[0]] for answer in answers))


def _numbers(value) -> float | None:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else None


def _prompted_as(recorder: Recorder, name: str, kind: str | None, short, long, both, longest) -> Prompted:
    if kind is None or not all(isinstance(value[0], Tensor) for value in (short, long, longest)):
        raise recorder.refusal(f"{name} follows the prompt as {described(short)}, and is {described(both)} for two")
    shapes = [value.shape if kind == "shared" else value[0].shape for value in (short, long, longest)]
    ragged = [dim for dim, sizes in enumerate(zip(*shapes, strict=False)) if len({*sizes}) > 1]
    if recorder.record.together:
        return Prompted(kind, None)
    if len({*map(len, shapes)}) > 1 or len(ragged) > 1:
        raise recorder.refusal(f"{name} is {described(short)} for one prompt and {described(long)} for another")
    return Prompted(kind, ragged[0] if ragged else None)
