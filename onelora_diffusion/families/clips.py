"""Clips as an autoencoder takes them."""

from torch import Tensor

from onelora_diffusion.families.record import Place


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
