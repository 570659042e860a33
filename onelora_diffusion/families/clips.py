"""Clips as an autoencoder takes them, and numbers of frames that a recorded pipeline's models do not take."""

import torch
from torch import Tensor

from onelora_diffusion.denoisers import autoencoder_of
from onelora_diffusion.families.recording import Place
from onelora_diffusion.files import first_line

NEIGHBOURS = 4  # numbers of frames below and above one that is not taken, which are tried


def to_autoencoder(images: Tensor, place: Place) -> Tensor:
    """Images or clips, or their latents, as the autoencoder takes them: as clips, or each frame as an image."""
    is_clip = images.ndim == 5
    if place.frames:
        return images if is_clip else images[:, :, None]
    return images.transpose(1, 2).flatten(0, 1) if is_clip else images


def from_autoencoder(found: Tensor, images: Tensor, place: Place) -> Tensor:
    """What the autoencoder has made of images or clips, in their shape."""
    is_clip = images.ndim == 5
    if place.frames:
        return found if is_clip else found[:, :, 0]
    return found.unflatten(0, images.shape[:3:2]).transpose(1, 2) if is_clip else found


def check_taken(family, frames: int) -> None:
    """ValueError for clips of so many frames if a recorded family's models do not take them, with those that they do.

    One clip of the recorded size goes through its autoencoder and its denoiser.
    """
    if (why := _refused(family, frames)) is None:
        return
    recorder = family.recorder
    own, steps = recorder.parameters[recorder.counts].default, range(1, NEIGHBOURS + 1)
    sides = ([frames + sign * step * family.record.stride for step in steps] for sign in (-1, 1))
    near = {next((each for each in side if each > 1 and _refused(family, each) is None), 1) for side in sides} | {1}
    if own and _refused(family, own) is None:
        near.add(own)
    raise ValueError(
        f"{family.name} takes no clips of {frames} frames, {why}: give {' or '.join(map(str, sorted(near)))}"
    )


@torch.no_grad()
def _refused(family, frames: int) -> str | None:
    """Why the models do not take clips of so many frames; None if they do."""
    side, vae = family.record.side, autoencoder_of(family.pipeline)
    try:
        place = family.place(side, side, frames)
        family.encode_images(vae, torch.zeros(1, 3, frames, side, side, device=vae.device))
        drawn = family.decode(vae, torch.zeros(1, *place.shape, device=vae.device)).shape[2]
        if drawn != frames:
            return f"of whose latents its autoencoder makes {drawn}"
        family.recorder.answered(place.constants)
    except Exception as error:  # whatever a model refuses a number by
        return f"{type(error).__name__}: {first_line(error)}"
    return None
