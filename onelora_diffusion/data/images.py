"""Photographs cropped to a size: Food-101, folders with one folder for each class, and other sources of PIL images."""

import os
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from onelora_diffusion.data.decoding import UNREADABLE, BrokenImageError, decoded, read_image, upright_size
from onelora_diffusion.data.listing import Listing, list_images
from onelora_diffusion.files import printable

MOST_PIXELS = 2**27  # most pixels of an image while it is resized: 400 MB
# Names of folders that are splits of a data set and not classes.
SPLITS = ("train", "val", "validation", "test")


class SizedImages(Dataset):
    """Crops the images of a source of (PIL image, label) to a size.

    `broken` is what to do about an unreadable image: `fatal` raises a BrokenImageError; `skip` names it on stderr and
    replaces it by the next readable one, so that an index stands for the same image in every run.
    """

    def __init__(self, name: str, source: Dataset, broken: str = "fatal"):
        self.name, self.source = name, source
        self.skips = broken == "skip"
        # (images,) those that were found unreadable; loader processes share it.
        self.broken = torch.zeros(len(source), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.source)

    def in_place_of(self, index: int) -> Iterator[int]:
        """The index of an image, then those of the images that may replace it, in this order."""
        return chain(range(index, len(self)), range(index))

    def size_of(self, index: int) -> tuple[int, int]:
        """The (height, width) to which an image is cropped."""
        raise NotImplementedError

    def decoded(self, index: int) -> tuple[np.ndarray, int]:
        """(pixels uint8 (height, width, 3), label) of an image; raises one of `UNREADABLE` if it cannot be read."""
        image, label = self.source[index]
        return np.array(crop_to(decoded(image), *self.size_of(index))), int(label)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """(pixels uint8 (3, height, width), or (3, frames, height, width), label) of an image or its replacement."""
        for candidate in self.in_place_of(index):
            try:
                pixels, label = self.decoded(candidate)
            except UNREADABLE as error:
                named = isinstance(error, BrokenImageError)
                message = str(error) if named else f"image {candidate} of {self.name} is not readable: {error}"
                if not self.skips:
                    raise BrokenImageError(message) from error
                if not self.broken[candidate]:
                    self.broken[candidate] = True
                    tqdm.write(f"skipped: {message}")
            else:
                return torch.from_numpy(pixels).movedim(-1, 0), label
        raise BrokenImageError(f"none of the {len(list(self.in_place_of(index)))} images of {self.name} can be read")


class Pictures(Dataset):
    """`[index] -> (image, index)`: PIL images, rotated as their metadata say; `size` does not decode pixels."""

    def named(self, index: int) -> str:
        """An image in messages: its path, or its place in a data set."""
        raise NotImplementedError

    def opened(self, index: int):
        """Context manager that opens an image with PIL; BrokenImageError names an unreadable one."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with self.opened(index) as image:
            return decoded(image), index

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        with self.opened(index) as image:
            return upright_size(image)


class ClassifiedImages(SizedImages):
    """Crops the images of a source of (PIL image, label) to squares in [-1, 1], and has the names of the classes."""

    crop = "ADM centre crop"

    def __init__(
        self,
        name: str,
        source: Dataset,
        class_names: Sequence[str],
        resolution: int,
        broken: str = "fatal",
        split: str = "",
    ):
        super().__init__(name, source, broken)
        self.split, self.resolution = split, resolution
        self.id2label = dict(enumerate(map(printable, class_names)))
        self.num_classes = len(class_names)

    def size_of(self, index: int) -> tuple[int, int]:
        return self.resolution, self.resolution

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels, label = super().__getitem__(index)
        return pixels.float() / 127.5 - 1, label


def food101(asked) -> ClassifiedImages:
    """Food-101 (Bossard et al., ECCV 2014) in torchvision's layout; class names with spaces for underscores."""
    from torchvision.datasets import Food101

    root, split = Path(asked.root or "data"), asked.split
    if root.name == "food-101" and (root / "meta").is_dir():  # `root` is food-101 itself and not its parent
        root = root.parent
    folder = root / "food-101"
    if not asked.download and not ((folder / "meta" / f"{split}.json").is_file() and (folder / "images").is_dir()):
        raise FileNotFoundError(
            f"no Food-101 in {folder}: download it (--download, 5 GB), or give the folder that holds "
            "food-101/ (--data-root)"
        )
    source = Food101(root.absolute(), split=split, loader=read_image, download=asked.download)
    names = [name.replace("_", " ") for name in source.classes]
    return ClassifiedImages("food101", source, names, asked.resolution, asked.broken, split)


class ClassFolders(Dataset):
    """(PIL image, label) of all images below `listing.root/<class>/`; FileNotFoundError if a class has none."""

    def __init__(self, listing: Listing, part: str = ""):
        self.root, self.listing = str(listing.root / part), listing
        prefix = f"{part}/" if part else ""
        inside = [name.removeprefix(prefix) for name in listing.images if name.startswith(prefix)]
        names = [name for name in inside if "/" in name]
        names.sort(key=lambda name: (name.split("/")[0], *os.path.split(name)))
        folders = [name.removeprefix(prefix) for name in listing.folders if name.startswith(prefix)]
        self.classes = sorted(name for name in folders if "/" not in name)
        label_of = {name: label for label, name in enumerate(self.classes)}
        self.labels = [label_of[name.split("/")[0]] for name in names]
        self.samples = [os.path.join(self.root, name) for name in names]
        if not names:
            raise FileNotFoundError(f"no images in {self.root}/<class>/: give a folder with one folder for each class")
        if empty := sorted(set(range(len(self.classes))) - set(self.labels)):
            folder = printable(os.path.join(self.root, self.classes[empty[0]]))
            raise FileNotFoundError(f"no images in {folder}: a class needs some, or take the folder out")
        if len(inside) > len(names):
            listing.left_out["images in no folder of a class"] += len(inside) - len(names)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return read_image(self.samples[index]), self.labels[index]


def image_folder(asked) -> ClassifiedImages:
    """Load the images in `root/<split>/<class>/`, or in `root/<class>/` if there are no splits; that is all `train`.

    There are splits if all folders with images in `root` are named as splits: `train` beside `bus` is a class.
    FileNotFoundError if there are no images, the split is missing, or a class has no images.
    """
    root, split = asked.root, asked.split
    if root is None:
        raise ValueError("imagefolder needs a data root: a folder with one folder of images for each class")
    if not Path(root).is_dir():
        raise FileNotFoundError(f"no images in {root}: there is no such folder")
    listing = list_images(root)
    parts = sorted({name.split("/")[0] for name in listing.images if "/" in name})
    has_parts = bool(parts) and set(parts) <= set(SPLITS)
    if has_parts and split not in parts:
        raise FileNotFoundError(f"no split '{split}' in {root}: there is {', '.join(parts)}")
    if not has_parts and split != "train":
        raise FileNotFoundError(f"{root} has no split '{split}', nor any other: leave --split out to take all of it")
    part = split if has_parts else ""
    source = ClassFolders(listing, part)
    return ClassifiedImages("imagefolder", source, source.classes, asked.resolution, asked.broken, part)


def crop_to(image: Image.Image, height: int, width: int) -> Image.Image:
    """Crop the largest central part of an image that has the given shape, and resize it, as ADM and DiT do.

    The image is halved with a box filter while both sides are at least twice the size, resized with a bicubic filter
    until it just covers the size, and cropped. ValueError for a long strip, which would take too much memory.
    """
    scale = max(height / image.height, width / image.width)
    if image.height * image.width * scale**2 > MOST_PIXELS:  # pixels of the whole image before cropping
        raise ValueError(
            f"{image.width}x{image.height} pixels are too long a strip to be cropped to {width}x{height}: cut it first"
        )
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
