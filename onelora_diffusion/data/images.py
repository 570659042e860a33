"""Photographs of a size: Food-101, any folder of one folder a class, and whatever else gives (PIL image, label)."""

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

from onelora_diffusion.data.decoding import UNREADABLE, BrokenImageError, decoded, read_image
from onelora_diffusion.data.listing import Listing, list_images
from onelora_diffusion.files import printable

MOST_PIXELS = 2**27  # of an image on its way to its size: 400 MB in bytes
# Folders that are parts of a data set, not classes of it.
SPLITS = ("train", "val", "validation", "test")


class SizedImages(Dataset):
    """A source of (PIL image, label), each image brought to a size, and what is done about those that cannot be read.

    Args:
        broken: `fatal`, an unreadable image is a BrokenImageError; or `skip`, it is named on stderr, and the next
            readable one is in its place, so that an index means the same image in every run.

    Attributes:
        broken: (images,) bool, which images were found unreadable; loader processes share it.
    """

    def __init__(self, name: str, source: Dataset, broken: str = "fatal"):
        self.name, self.source = name, source
        self.skips = broken == "skip"
        self.broken = torch.zeros(len(source), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.source)

    def in_place_of(self, index: int) -> Iterator[int]:
        """An image, and then the others in the order in which they may stand for it."""
        return chain(range(index, len(self)), range(index))

    def size_of(self, index: int) -> tuple[int, int]:
        """Height and width that an image is brought to."""
        raise NotImplementedError

    def decoded(self, index: int) -> tuple[np.ndarray, int]:
        """Pixels uint8 (height, width, 3) of an image, and its label; one of `UNREADABLE` if it cannot be read."""
        image, label = self.source[index]
        return np.array(crop_to(decoded(image), *self.size_of(index))), int(label)

    def can_be_read(self, index: int) -> bool:
        """Whether an image can be read now."""
        try:
            self.decoded(index)
        except UNREADABLE:
            return False
        return True

    def read(self, index: int) -> tuple[Tensor, int]:
        """Pixels uint8 (3, height, width) of an image, and its label; or of the next that can be read."""
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
                return torch.from_numpy(pixels).permute(2, 0, 1), label
        raise BrokenImageError(f"none of the {len(list(self.in_place_of(index)))} images of {self.name} can be read")


class ClassifiedImages(SizedImages):
    """A source of (PIL image, label), cropped to squares and scaled to [-1, 1], with its class names."""

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
        self.split = split
        self.resolution = resolution
        self.id2label = dict(enumerate(map(printable, class_names)))
        self.num_classes = len(class_names)

    def size_of(self, index: int) -> tuple[int, int]:
        return self.resolution, self.resolution

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels, label = self.read(index)
        return pixels.float() / 127.5 - 1, label


def food101(
    root: str | Path, split: str, resolution: int, download: bool = False, broken: str = "fatal"
) -> ClassifiedImages:
    """Food-101 (Bossard et al., ECCV 2014) in torchvision's layout; class names with spaces for underscores."""
    from torchvision.datasets import Food101

    root = Path(root)
    if root.name == "food-101" and (root / "meta").is_dir():  # the folder itself, not the one it lies in
        root = root.parent
    folder = root / "food-101"
    if not download and not ((folder / "meta" / f"{split}.json").is_file() and (folder / "images").is_dir()):
        raise FileNotFoundError(
            f"no Food-101 in {folder}: download it (--download, 5 GB), or give the folder that holds "
            "food-101/ (--data-root)"
        )
    source = Food101(root.absolute(), split=split, loader=read_image, download=download)
    names = [name.replace("_", " ") for name in source.classes]
    return ClassifiedImages("food101", source, names, resolution, broken, split)


class ClassFolders(Dataset):
    """(PIL image, label) of the images in `listing.root/<class>/`, however deep.

    Raises:
        FileNotFoundError: there are none, or a class has none.
    """

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
        empty = sorted(set(range(len(self.classes))) - set(self.labels))
        if empty:
            raise FileNotFoundError(
                f"no images in {printable(os.path.join(self.root, self.classes[empty[0]]))}: a class needs some, or "
                "take the folder out"
            )
        if len(inside) > len(names):
            listing.left_out["images in no folder of a class"] += len(inside) - len(names)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return read_image(self.samples[index]), self.labels[index]


def image_folder(root: str | Path, split: str, resolution: int, broken: str = "fatal") -> ClassifiedImages:
    """Images in `root/<split>/<class>/`; or in `root/<class>/`, a set without parts, which is all for `train`.

    A folder has parts if all folders with images in it have names of parts: `train` beside `bus` is a class.

    Raises:
        FileNotFoundError: there are no images, not this split, or a class has none.
    """
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
    return ClassifiedImages("imagefolder", source, source.classes, resolution, broken, part)


def center_crop(image: Image.Image, resolution: int) -> Image.Image:
    """The central square of an image at the given resolution, as ADM and DiT crop (Dhariwal & Nichol, 2021)."""
    return crop_to(image, resolution, resolution)


def crop_to(image: Image.Image, height: int, width: int) -> Image.Image:
    """The centre of an image at a size: the largest part of it that has this shape.

    The image is halved by box filtering while it is at least twice the size both ways, scaled until it just covers the
    size by bicubic filtering, and cut. ValueError for a strip that would take all memory on the way.
    """
    scale = max(height / image.height, width / image.width)
    if image.height * image.width * scale**2 > MOST_PIXELS:  # pixels of the whole image, before it is cut
        raise ValueError(
            f"{image.width}x{image.height} pixels are too long a strip to be brought to {width}x{height}: cut it first"
        )
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
