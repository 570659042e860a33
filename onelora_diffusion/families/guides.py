"""A second model of the denoiser's class, from which a pipeline guides, and which is not trained."""

from dataclasses import replace

import torch

from onelora_diffusion.families.coordinates import measured, unmixed
from onelora_diffusion.families.guided import TRIED_SCALE
from onelora_diffusion.families.probing import find_times, place_at
from onelora_diffusion.families.prompted import find_conditions
from onelora_diffusion.families.record import Place
from onelora_diffusion.families.recording import SHORT, Recorder

ALONE = (0.0, -1.0)  # scales at which a step is that of the guiding model alone


@torch.no_grad()
def probed_guide(recorder: Recorder, guided: Recorder, place: Place) -> Place:
    """Fill the record of the guiding model by calls in which it alone counts; the formula is set in the guided one's.

    Args:
        guided: the recorder of the denoiser, which has been probed.
        place: of its images at the recorded size.

    Raises:
        ValueError: the pipeline gives that model what has no place in a record, or never steps by it alone.
    """
    (scale,) = guided.record.guided
    own = {
        "times": {},
        "prompted": {},
        "sized": [],
        "together": [],
        "masks": {},
        "batched": {},
        "guided": {},
        "guiding": "",
    }
    refusals = []
    for alone in ALONE:
        recorder.record = replace(guided.record, off={**guided.record.off, scale: alone}, **own)
        try:
            here, run = place_at(recorder, recorder.square)
            break
        except ValueError as error:
            refusals.append(error)
    else:
        raise refusals[0]
    find_times(recorder, run, here)
    find_conditions(recorder)
    here.leave_out(recorder.record.together)
    guided.record.offset = _offset_of(guided, place, here)
    return here


def _offset_of(recorder: Recorder, own: Place, guide: Place) -> int | None:
    """What is added to the scale in ε(∅) + w (ε(y) − ε(∅)), ε(∅) the guiding model's; None: it is another formula."""
    count, generator = int(max(own.unpacked.max(), guide.unpacked.max())) + 1, torch.Generator().manual_seed(0)
    numbers = torch.randn(2, count, generator=generator)

    def answering(values):
        return recorder.answering(lambda number, elements: torch.nn.functional.pad(values, (0, elements))[:elements])

    run = recorder.run(
        SHORT,
        recorder.square,
        2,
        answering(numbers[0]),
        encoded=recorder.record.encoded,
        beside=answering(numbers[1]),
        **recorder.record.guided,
    )
    outputs, signs = run.outputs, (own.sign, guide.sign)
    if recorder.record.steps in ("flow", "image"):
        outputs, signs = unmixed(run, measured(recorder, recorder.square, 2, recorder.record.frames)), (1, 1)
    found = outputs[0].float().flatten().cpu()[own.order]
    places = zip((own, guide), signs, numbers, strict=True)
    with_prompt, without = (sign * values[place.unpacked] for place, sign, values in places)
    for offset in (0, 1):
        guided = without + (TRIED_SCALE + offset) * (with_prompt - without)
        if (guided - found).abs().max() <= 0.05 * guided.abs().max():
            return offset
    return None
