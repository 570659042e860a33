"""Masks of images: white where an image is learned, black where it is not, grey in between."""

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from torch.utils.data import Dataset

from onelora_diffusion.data.decoding import BrokenImageError, decoded
from onelora_diffusion.data.images import Pictures, crop_to
from onelora_diffusion.data.listing import MASK_ENDINGS, Listing, is_mask, masked_by
from onelora_diffusion.files import printable

SAME = 8  # most that the colours of a grey pixel differ, by the rounding of JPEG and of colour profiles


class Masks(Dataset):
    """The masks of some images of a data set: `of_image` has the numbers of an image and of its mask in `source`."""

    def __init__(self, source: Pictures, of_image: Sequence[tuple[int, int]]):
        self.source, self.of_image = source, list(of_image)

    def __len__(self) -> int:
        return len(self.of_image)

    def on_grid(self, images: Dataset, grid: Callable[[int, int], tuple[int, int]]) -> dict[int, Tensor]:
        """The masks (h, w) by the number of their image, float32 from 0 to 1: cropped as it is, the mean of each cell.

        `images` are `data.captions.BucketedImages`; `grid` gives the cells (h, w) of an image that is cropped to
        height by width pixels. ValueError if a mask has another size than its image, has colours, or is black;
        BrokenImageError if a mask cannot be read, or an image, unless such images are skipped.
        """
        found = {}
        for image, mask in self.of_image:
            named = self.source.named(mask)
            height, width = images.size_of(image)
            try:
                size = images.source.size(image)
            except BrokenImageError:
                if not images.skips:
                    raise
                continue
            if self.source.size(mask) != size:
                of_mask, of_image = (f"{wide}x{high}" for high, wide in (self.source.size(mask), size))
                raise ValueError(f"{named} has {of_mask} pixels, and its image {of_image}: make them equal")
            cropped = np.array(crop_to(self.grey(mask), height, width))
            if not cropped.any():
                raise ValueError(f"{named} is black within the {width}x{height} pixels to which its image is cropped")
            values = torch.from_numpy(cropped).float()[None] / 255
            found[image] = adaptive_avg_pool2d(values, grid(height, width))[0]
        return found

    def grey(self, mask: int) -> Image.Image:
        """A mask in 8-bit grey; what is transparent is black."""
        named = self.source.named(mask)
        with self.source.opened(mask) as image:
            if getattr(image, "is_animated", False):
                raise ValueError(f"{named} has {image.n_frames} frames: all frames of a clip have one mask")
            colours = decoded(image, background="black")
        values = np.asarray(colours).astype(np.int16)
        pairs = itertools.combinations(np.moveaxis(values, 2, 0), 2)
        if max(np.abs(one - other).max() for one, other in pairs) > SAME:
            raise ValueError(f"{named} has colours: a mask is white where its image is learned, and black where not")
        if values.max() < 128:
            raise ValueError(
                f"{named} is dark, {values.max()} of 255 at its brightest: a mask is white where its image is learned"
            )
        return colours.convert("L")


def is_mask_of_clip(name: str) -> bool:
    """Whether a folder or a video has the masks of frames by its name, as walk.mask/ and walk.mask.mp4 have."""
    return name.lower().endswith(MASK_ENDINGS) or is_mask(name)


def masks_beside(listing: Listing, stems: Mapping[str, str], of_table: Mapping[str, str]) -> dict[str, str]:
    """The names of masks by those of their images: those of a table, or else NAME.mask.png beside NAME.jpg.

    `stems` are the names of the images and clips that are learned, each without its ending. ValueError if a mask
    belongs to no image, an image has two masks, or a table leaves masks out.
    """
    if of_table:
        if unnamed := sorted(set(listing.masks) - set(of_table.values())):
            raise ValueError(f"{printable(str(listing.root / unnamed[0]))} is a mask that the table does not name")
        return dict(of_table)
    by_stem: dict[str, list[str]] = {}
    for image, stem in stems.items():
        by_stem.setdefault(stem, []).append(image)
    found: dict[str, str] = {}
    for mask in sorted(listing.masks):
        if masked_by(mask) not in by_stem:
            raise ValueError(
                f"{printable(str(listing.root / mask))} is the mask of no image: there is none of the name "
                f"{printable(masked_by(mask), 200)}; rename it, or take it out"
            )
        for image in by_stem[masked_by(mask)]:
            if other := found.get(image):
                raise ValueError(f"{printable(image, 200)} has two masks, {printable(f'{other} and {mask}', 400)}")
            found[image] = mask
    return found
