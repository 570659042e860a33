"""What the recorded calls of a stock pipeline say of its guidance."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from onelora_diffusion.families.arguments import near, same
from onelora_diffusion.families.coordinates import measured, unmixed
from onelora_diffusion.families.record import Place, Run
from onelora_diffusion.families.recording import SHORT, NotTakenError, Recorder

TRIED_SCALE = 3.0


def find_guidance(recorder: Recorder, place: Place) -> None:
    """By which argument pictures are guided, from what, and by which formula; or what the denoiser is told."""
    record = recorder.record
    # Guided is what is guided by default, some given a prompt to guide from; others are told a scale instead.
    names = [name for name in ("true_cfg_scale", "guidance_scale") if (recorder.default_of(name) or 0) > 1]
    own = [guider for guider in recorder.guiders.values() if guider.num_conditions > 1]
    for name in ["guider"] if own else names:
        alone = {name: TRIED_SCALE} | {other: scale for other, scale in record.off.items() if other != name}
        for guided in (alone, alone | {"negative_prompt": ""}):
            try:
                run, answers = guided_run(recorder, **guided)
            except NotTakenError:
                if guided != alone:
                    raise
                continue
            if beside := {*run.beside}:
                (record.guiding,) = beside
                record.guided = guided
                return
            rows = sum(len(call[record.noisy]) for call in run.calls)
            if rows == 2 or rows == 3 and record.references:
                numbers, _ = empty_row(recorder, run, recorder.call())
                is_known = len(alone) == 1 and (not own or type(own[0]).__name__ == "ClassifierFreeGuidance")
                offset = offset_of(recorder, run, [answers[number] for number in numbers], [place, place])
                record.guided, record.offset = guided, offset if is_known else None
                return
            if rows != 1:
                raise recorder.refusal(f"with {name}={TRIED_SCALE} its denoiser has {rows} rows for an image")
    if "guidance_scale" in recorder.parameters:
        find_told(recorder)


def find_told(recorder: Recorder) -> None:
    """The argument of the denoiser that is told a strength of guidance."""
    record, low, high = recorder.record, 2.0, 3.0
    try:
        first, second = (recorder.call(encoded=record.encoded, guidance_scale=scale) for scale in (low, high))
    except NotTakenError:  # it would guide from another prompt, and does not by default
        return
    changed = [name for name in first if not same(first[name], second[name])]
    if len(changed) > 1:
        raise recorder.refusal(f"guidance_scale changes {', '.join(changed)} of its denoiser's arguments")
    for name in changed:
        start, end = (torch.as_tensor(values[name]) for values in (first, second))
        by = None if start.numel() > 1 else float(end) - float(start)  # else the pipeline makes an embedding of each
        record.told = (name, by, None if by is None else float(start) - low * by)


def guided_run(recorder: Recorder, side: tuple[int, int] | None = None, **guided) -> tuple[Run, list[Tensor]]:
    """A guided step, at the recorded size by default, and what the denoiser answered: a row for each image."""
    answers = []
    generator = torch.Generator().manual_seed(0)
    random = recorder.answering(lambda number, elements: torch.randn(elements, generator=generator))

    def answer(number, arguments):
        answers.extend(value := random(number, arguments))
        return value

    return recorder.run(SHORT, side or recorder.square, 2, answer, **guided), answers


def empty_row(recorder: Recorder, run: Run, alone: dict) -> tuple[list[int], dict]:
    """The numbers of the rows of a guided step with the prompt and without, and the arguments of the latter.

    Args:
        alone: the prompt's own call. Of three rows one has no reference images either, and is passed over.
    """
    rows, noisy = list(_rows_of(recorder, run)), recorder.record.noisy
    given = [number for number, row in enumerate(rows) if len(rows) == 2 or near(row[noisy], alone[noisy])]
    prompted = [name for name in rows[0] if name != noisy]
    own = [number for number in given if all(near(rows[number][name], alone[name]) for name in prompted)]
    if len(given) != 2 or len(own) != 1:
        raise recorder.refusal(f"of {len(rows)} rows of a guided step {len(own)} have the prompt")
    (empty,) = {*given} - {*own}
    return [*own, empty], {name: rows[empty][name] for name in prompted}


def _rows_of(recorder: Recorder, run: Run) -> Iterator[dict]:
    """The noisy argument and the prompt's of each row of a guided step, as those of a call alone."""
    for call in run.calls:
        for row in range(len(call[recorder.record.noisy])):
            yield {recorder.record.noisy: call[recorder.record.noisy][row : row + 1]} | {
                name: call.get(name) if call.get(name) is None or how.kind == "shared" else call[name][row : row + 1]
                for name, how in recorder.record.prompted.items()
            }


def unpadded(recorder: Recorder, run: Run, empty: dict, alone: dict) -> dict:
    """The arguments of the empty prompt as in its own call, where a guided step pads them and is given a mask of that.

    ValueError if they are others then.
    """
    if not any(isinstance(value, Tensor) and alone.get(name) is None for name, value in run.calls[0].items()):
        return empty
    for name, how in recorder.record.prompted.items():
        if how.ragged is not None and isinstance(empty[name], Tensor):
            dim = how.ragged + (how.kind == "rows")
            empty[name] = empty[name].narrow(dim, 0, min(empty[name].shape[dim], alone[name].shape[dim]))
    check_empty(recorder, empty, alone)
    return empty


def check_empty(recorder: Recorder, empty: dict, alone: dict) -> None:
    """ValueError if the arguments of the empty prompt are others in a guided step than in its own call."""
    if not all(near(empty[name], alone[name]) for name in empty):
        name = type(recorder.pipeline).__name__
        raise ValueError(f"{name} encodes the empty prompt in another way where it is guided from it")


def offset_of(recorder: Recorder, run: Run, answers: Sequence[Tensor], places: Sequence[Place]) -> int | None:
    """What is added to the pipeline's scale in ε(∅) + w (ε(y) − ε(∅)); None if it guides by another formula.

    Args:
        run: a guided step, in which ε(y) and ε(∅) are of these `answers`, each at its place.
    """
    outputs, signs, order = run.outputs, [place.sign for place in places], places[0].order
    if recorder.record.steps in ("flow", "image"):
        outputs, signs = unmixed(run, measured(recorder, recorder.square, 2, recorder.record.frames)), (1, 1)
    found = outputs[0].float().flatten().cpu()[order[order >= 0]]
    own, without = (
        sign * answer.float().flatten().cpu()[place.unpacked[order >= 0]]
        for sign, answer, place in zip(signs, answers, places, strict=True)
    )
    for offset in (0, 1):
        guided = without + (TRIED_SCALE + offset) * (own - without)
        if (guided - found).abs().max() <= 0.05 * guided.abs().max():
            return offset
    return None
