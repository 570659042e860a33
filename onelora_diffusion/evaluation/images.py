"""Sets of images to measure: a folder of PNGs, an ADM .npz, a data set; uint8, batch by batch, shared by processes."""

import zipfile
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.v2.functional import pil_to_tensor

from onelora_diffusion.data.decoding import decoded, opened
from onelora_diffusion.data.images import crop_to
from onelora_diffusion.data.listing import Listing, labels_of, list_images
from onelora_diffusion.evaluation.npz import read_header, read_headers
from onelora_diffusion.files import printable
from onelora_diffusion.sampling import as_uint8

LARGEST = 4096  # most pixels along a side: no model here draws larger images, and damaged files may claim any size
PIXELS_AT_ONCE = LARGEST**2  # most pixels of a batch: 50 MB


@dataclass(frozen=True)
class Source:
    """Describes a set of images. The classes below have the same attributes."""

    name: str
    resolution: int  # R of the images (3, R, R)
    split: str = ""
    crop: str = "none"  # how the images were cropped to R
    notes: tuple[str, ...] = ()  # sentences for the report
    groups: Sequence[str] | None = None  # of each image, such as its class; images are compared within their group
    prompts: Sequence[str] | None = None


class ImageSet(Dataset):
    """Images uint8 (3, R, R) by index, with the attributes of `Source`."""

    split, crop, notes, groups, prompts = "", "none", (), None, None

    def batches(self, indices: Sequence[int], batch_size: int) -> Iterator[tuple[list[int], Tensor]]:
        batch_size = _at_once(batch_size, self.resolution)
        loader = DataLoader(Subset(self, indices), batch_size=batch_size)
        for number, batch in enumerate(loader):
            yield list(indices[number * batch_size : (number + 1) * batch_size]), batch


class CroppedImages(ImageSet):
    """Image files of any kind and size, cropped to R by R as for training; `groups` has the group of each."""

    crop = "ADM centre crop"

    def __init__(self, name: str, files: Sequence[Path], resolution: int, groups: Sequence[str] | None = None):
        self.name, self.files, self.resolution, self.groups = name, files, resolution, groups

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        with opened(self.files[index], f"'{printable(str(self.files[index]))}'") as image:
            return pil_to_tensor(crop_to(decoded(image), self.resolution, self.resolution))


class FolderImages(CroppedImages):
    """The PNG files of a folder, sorted by name, as uint8 (3, R, R), decoded in the same way as for training.

    Other files are ignored and counted in `notes`. ValueError or FileNotFoundError, at once, if there are no images,
    or if one is unreadable, not square, or of another size than the first.
    """

    crop = "none"

    def __init__(self, folder: str | Path):
        self.name = str(folder)
        listing = list_images(folder)
        names = [name for name in listing.images if "/" not in name and name.lower().endswith(".png")]
        self.files = [Path(folder) / name for name in names]
        self.notes = _passed_over(folder, listing, names)
        if not self.files:
            raise FileNotFoundError(f"no .png in '{folder}': give a folder of PNG files, an .npz or statistics")
        self.resolution = _png_size(self.files[0])
        for file in self.files:
            if (size := _png_size(file)) != self.resolution:
                raise ValueError(
                    f"'{file}' is {size}x{size}, but '{self.files[0].name}' is {self.resolution}x{self.resolution}: "
                    "bring all images to one size first, as the reference was"
                )


class NpzImages(ImageSet):
    """The array `arr_0` of an .npz, uint8 (images, R, R, 3) as ADM writes them; ValueError for any other."""

    def __init__(self, path: str | Path):
        self.name, self.path = str(path), Path(path)
        header = read_headers(self.path).get("arr_0")
        if header is None:
            raise ValueError(f"'{path}' has no arr_0: save the images by numpy.savez(path, images)")
        self.shape = shape = header.shape
        if header.dtype != np.uint8 or header.by_columns or len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2]:
            raise ValueError(f"'{path}': arr_0 is {header.dtype} {shape}, not uint8 (images, R, R, 3) in C order")
        self.resolution = shape[1]
        _check_size(path, *shape[1:3])

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, indices: Sequence[int], batch_size: int) -> Iterator[tuple[list[int], Tensor]]:
        """Yield images of increasing indices, read frame by frame; the others of the file are skipped."""
        frame, batch_size = self.resolution**2 * 3, _at_once(batch_size, self.resolution)
        at = 0
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as member:
            read_header(member)
            for first in range(0, len(indices), batch_size):
                batch, frames = list(indices[first : first + batch_size]), []
                for index in batch:
                    try:
                        while at <= index:
                            pixels, at = member.read(frame), at + 1
                    except (zipfile.BadZipFile, OSError) as error:
                        raise ValueError(f"'{self.path}' is damaged at image {at}: {error}") from error
                    frames.append(pixels)
                array = np.frombuffer(b"".join(frames), dtype=np.uint8).reshape(-1, *self.shape[1:])
                yield batch, torch.from_numpy(array.copy()).permute(0, 3, 1, 2)


class DatasetImages(ImageSet):
    """The images of a data set of `onelora_diffusion.data`, converted from [-1, 1] to uint8 with rounding."""

    def __init__(self, dataset: Dataset, resolution: int):
        self.dataset, self.resolution = dataset, resolution
        self.name, self.split, self.crop = dataset.name, dataset.split, dataset.crop
        if (labels := labels_of(dataset)) is not None:
            self.groups = [dataset.id2label[label] for label in map(int, labels)]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tensor:
        return as_uint8(self.dataset[index][0])


def open_images(path: str | Path) -> FolderImages | NpzImages:
    path = Path(path)
    if path.is_dir():
        return FolderImages(path)
    if path.suffix == ".npz" or path.is_file():
        return NpzImages(path)
    raise FileNotFoundError(f"no images at '{path}': give a folder of PNG files or an .npz")


def share(num_images: int, process_index: int, num_processes: int) -> range:
    """The indices of the images that a process measures; each image belongs to exactly one process."""
    return range(process_index, num_images, num_processes)


def _at_once(batch_size: int, resolution: int) -> int:
    """The number of images to read at a time: the batch size, or fewer if large images would fill the memory."""
    return max(1, min(batch_size, PIXELS_AT_ONCE // resolution**2))


def _passed_over(folder: str | Path, listing: Listing, measured: Collection[str]) -> tuple[str, ...]:
    """A sentence that counts the ignored files of a folder by kind; () if there are none."""
    rest = sorted({*listing.images, *listing.others} - set(measured))
    kinds = Counter("in folders" if "/" in name else Path(name).suffix or "without ending" for name in rest)
    counts = [f"{count:,} {kind}" for kind, count in (kinds + listing.left_out).most_common()]
    found = printable(", ".join(counts), 400)
    return (f"Passed over in '{folder}', of which the PNG files are measured: {found}.",) if counts else ()


def _check_size(path: str | Path, width: int, height: int) -> None:
    if not 1 <= min(width, height) <= max(width, height) <= LARGEST:
        raise ValueError(f"'{path}' has images of {width}x{height} pixels: 1 to {LARGEST} a side can be measured")


def _png_size(file: Path) -> int:
    with opened(file, f"'{file}'") as image:
        width, height = image.size
    if width != height:
        raise ValueError(f"'{file}' is {width}x{height}, not square: crop all images the way the reference was")
    _check_size(file, width, height)
    return width
