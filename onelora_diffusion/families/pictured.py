"""What the recorded calls of a stock pipeline say of its reference images."""

import torch
from PIL import Image
from torch import Tensor

from onelora_diffusion.families.arguments import on, same
from onelora_diffusion.families.record import Place
from onelora_diffusion.families.recording import LONG, SHORT, NotTakenError, Recorder
from onelora_diffusion.families.references import BLANK, blank


def find_pictured(recorder: Recorder, place: Place) -> None:
    """Which arguments follow what is in the reference images; none may be drawn at random in each call."""
    record = recorder.record

    def called(**settings) -> dict:
        call = recorder.call(**settings)
        given = call[record.noisy][0].flatten()
        return call | {record.noisy: given[on(place.beside, given.device)]}

    first = called(encoded=record.encoded)
    again = called(encoded=record.encoded, generator=torch.Generator().manual_seed(1))
    if drawn := [name for name in first if not same(first[name], again.get(name))]:
        raise recorder.refusal(f"{drawn[0]} is drawn at random in each of its calls")
    if not record.references:
        if not same(first[record.noisy], called(prompt=LONG)[record.noisy]):
            raise recorder.refusal(f"what {record.noisy} has beside the noise follows the prompt")
        return
    picture = Image.linear_gradient("L").resize(BLANK).convert("RGB")
    own, other = called(), called(references=[picture] * record.references)
    record.pictured = [name for name in own if not same(own[name], other.get(name))]
    if not record.pictured:
        raise recorder.refusal(f"nothing that its denoiser is given follows the reference images in {recorder.takes}")


def call_of_two(recorder: Recorder) -> dict:
    """The arguments of a call for two prompts, with the same reference images if there are any."""
    pair, references = [SHORT, LONG], blank([BLANK] * recorder.record.references)
    for images in (references, references * 2):  # for all prompts of a call, or for one each
        try:
            return recorder.call(pair, references=images)
        except NotTakenError:
            continue
    return {name: _twice(value) for name, value in recorder.call().items()}  # it takes one prompt a call


def _twice(value):
    """An argument for one image as that for two is."""
    if isinstance(value, Tensor):
        return torch.cat([value, value]) if value.ndim and len(value) == 1 else value
    return value * 2 if isinstance(value, list | tuple) and len(value) == 1 else value
