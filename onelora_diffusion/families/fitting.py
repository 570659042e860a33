"""Sizes of images and numbers of frames that a recorded pipeline's models do not take."""

import torch
from accelerate.utils.operations import recursively_apply
from torch import Tensor

from onelora_diffusion.denoisers import autoencoder_of
from onelora_diffusion.files import first_line

NEIGHBOURS = 4  # numbers of frames below and above one that is not taken, which are tried


@torch.no_grad()
def check_sides(family, height: int, width: int) -> None:
    """ValueError for a size that a recorded family's denoiser refuses, as one without places for so many tokens.

    It is asked by shapes alone, on the meta device; one that needs values for its answer is not. Another of the same
    configuration is asked: some keep what they have computed, as Z-Image's does, and a thread may be drawing.
    """
    own, call = family.recorder.denoiser, recursively_apply(_shape_of, family.place(height, width).constants)
    with torch.device("meta"):
        denoiser = type(own).from_config(own.config).to("meta")
    try:
        denoiser(**family.record.arrangement.nested(call))
    except ValueError as error:
        raise ValueError(f"{family.name} does not take {height} by {width} pixels: {first_line(error)}") from error
    except Exception:  # whatever operations raise that have no answer by shapes
        return


def _shape_of(value: Tensor) -> Tensor:
    return value.to("meta", torch.float32 if value.is_floating_point() else value.dtype)


def check_frames(family, frames: int) -> None:
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
        family.recorder.answered(family.recorder.call(side=(side, side), frames=frames))
    except Exception as error:  # whatever a model refuses a number by
        return f"{type(error).__name__}: {first_line(error)}"
    return None
