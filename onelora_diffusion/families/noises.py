"""A denoiser of several noises, such as that of sound beside a clip: the first is learned, the others are left out."""

import inspect
from itertools import chain

import torch

from onelora_diffusion.families.arguments import same
from onelora_diffusion.families.recording import Recorder


def drawn_at_random(recorder: Recorder, **settings) -> list[str]:
    """The arguments of the denoiser that are others by another generator."""
    generators = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    first, other = (recorder.run(side=recorder.square, generator=own, **settings).calls[0] for own in generators)
    return [name for name, value in first.items() if not same(value, other.get(name))]


def find_others(recorder: Recorder) -> bool:
    """Whether a pipeline draws more than one of its denoiser's arguments at random: all but the first are others."""
    recorder.record.others = drawn_at_random(recorder)[1:]
    return bool(recorder.record.others)


def find_switch(recorder: Recorder, call: dict) -> None:
    """What keeps other noises out of the denoiser's prediction: nothing, that they may be None, or a switch of it."""
    record = recorder.record
    other = call | {name: torch.randn_like(call[name]) for name in record.others}
    own = inspect.signature(recorder.denoiser.forward).parameters.values()
    given = {each.name: call.get(each.name, each.default) for each in own if each.name != "return_dict"}
    switches = [{name: not value} for name, value in given.items() if isinstance(value, bool)]
    for switched in ({}, dict.fromkeys(record.others), *switches):
        try:
            first, second = (recorder.answered(each | switched) for each in (call, other))
        except Exception:  # whatever a denoiser refuses None by
            continue
        if same(first, second):
            record.switched = switched
            return
    raise recorder.refusal(
        f"{' and '.join(record.others)} is drawn at random beside {record.noisy}, as sound beside a clip is, and its "
        f"denoiser has no switch that keeps them apart{switches and ', of ' + ', '.join(chain(*switches)) or ''}"
    )
