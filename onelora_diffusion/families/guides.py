"""A second model of the denoiser's class, from which a pipeline guides, and which is not trained."""

from dataclasses import replace

import torch
from torch.nn import functional

from onelora_diffusion.families.guided import offset_of
from onelora_diffusion.families.placing import place_at
from onelora_diffusion.families.probing import find_times
from onelora_diffusion.families.prompted import find_conditions
from onelora_diffusion.families.record import Place
from onelora_diffusion.families.recording import Recorder

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
    own = dict(times={}, prompted={}, sized=[], together=[], masks={}, batched={}, guided={}, guiding="")
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
    guided.record.offset = _offset_of(guided, [place, here])
    return here


def _offset_of(recorder: Recorder, places: list[Place]) -> int | None:
    """What is added to the scale, as in `offset_of`, where ε(∅) is the guiding model's."""
    count, generator = int(max(place.unpacked.max() for place in places)) + 1, torch.Generator().manual_seed(0)
    numbers = torch.randn(2, count, generator=generator)
    own, guide = (
        recorder.answering(lambda number, elements, values=values: functional.pad(values, (0, elements))[:elements])
        for values in numbers
    )
    return offset_of(recorder, recorder.alone(None, 2, own, beside=guide, **recorder.record.guided), numbers, places)
