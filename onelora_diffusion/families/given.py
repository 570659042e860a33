"""Latents that a pipeline gives its denoiser clean, as those of a clip's first frame, which is its reference image.

The scheduler takes no step with them, or what it makes of them is dropped; their time stays that of a clean image.
"""

import torch
from torch import Tensor

from onelora_diffusion.families.record import Place
from onelora_diffusion.families.recording import NotTakenError, Recorder

PROBED_FRAMES = 9  # of clips that begin with a reference image: one and a multiple of what a latent has of them


def draws_from_first_frame(pipeline) -> bool:
    """Whether a pipeline draws clips, each from a reference image that it cannot do without."""
    bare = Recorder(pipeline)
    if not (bare.takes and bare.counts):
        return False
    if bare.parameters[bare.takes].default is bare.parameters[bare.takes].empty:
        return True
    bare.record.references = 0
    try:
        bare.run(frames=PROBED_FRAMES)
    except NotTakenError:
        return True
    return False


def still_in(calls: list[dict], noisy: str) -> dict[str, Tensor]:
    """The places, (1, ...) bool, that keep their numbers in arguments of which others change from step to step."""
    first, second = calls[:2]
    tensors = {name: value for name, value in first.items() if isinstance(value, Tensor) and name != noisy}
    changed = {name: value != second[name] for name, value in tensors.items() if name in second}
    return {name: ~places for name, places in changed.items() if places.any() and not places.all()}


def scaled_as_others(moment: Tensor, given: Tensor) -> Tensor | None:
    """The scale or shift (C, f, h, w) of latents with that of the last frame where latents are `given`.

    None where the others' are not those of the last frame either.
    """
    last = moment[:, -1:].expand_as(moment)
    is_one = not given[:, -1].any() and torch.allclose(moment[~given], last[~given], rtol=1e-3, atol=1e-5)
    return torch.where(given, last, moment) if is_one else None


def clean_latents(place: Place, decoded: Tensor) -> Tensor:
    """The given ones of what the autoencoder was to decode, (1, n), normalised as latents are in training."""
    given = place.given.to(decoded.device)
    values = decoded.float().reshape(1, *place.shape)
    return ((values - place.shift.to(values)) / place.scale.to(values))[:, given]
