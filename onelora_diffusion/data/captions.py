"""Images with captions, from a folder with captions, a folder with one prompt for all images, or the Hugging Face hub.

The default is scikit-learn's handwritten digits with captions such as "a handwritten seven", which need no files.
"""

import csv
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from onelora_diffusion.data import digits
from onelora_diffusion.data.buckets import Buckets, nearest_buckets, one_bucket
from onelora_diffusion.data.decoding import BrokenImageError, decoded, opened, upright_size
from onelora_diffusion.data.from_hub import column_of_type, hub_rows
from onelora_diffusion.data.images import SizedImages
from onelora_diffusion.data.latents import FlippableImages
from onelora_diffusion.data.listing import Listing, list_images
from onelora_diffusion.files import printable

METADATA = ("metadata.jsonl", "metadata.csv")
FILE_COLUMN = "file_name"
DIGITS = digits.CAPTIONED
MOST_CHARACTERS = 10_000  # most characters of a caption, twenty times what the longest text encoder reads


class CaptionedImages(FlippableImages):
    """`[index, flip] -> (image, caption index)`: image uint8 (3, height, width), mirrored if `flip`.

    Attributes:
        captions: one for each image. An image that replaces an unreadable one comes with its own caption.
        dataset: the images without captions, `[index] -> (image, caption index)`, on which the latents depend.
    """

    def __init__(self, dataset: "BucketedImages", captions: list[str]):
        super().__init__(dataset)
        self.captions = captions
        self.name, self.buckets, self.broken = dataset.name, dataset.buckets, dataset.broken


class BucketedImages(SizedImages):
    """`[index] -> (image, index)`: image uint8 (3, height, width), with the size of its bucket.

    Unless unreadable images are fatal, one is replaced by the next image of its bucket.
    """

    def __init__(self, name: str, source: "Pictures", buckets: Buckets, broken: str = "fatal"):
        super().__init__(name, source, broken)
        self.buckets = buckets

    def in_place_of(self, index: int) -> Iterator[int]:
        bucket_of = self.buckets.of_image
        return (other for other in super().in_place_of(index) if bucket_of[other] == bucket_of[index])

    def size_of(self, index: int) -> tuple[int, int]:
        return self.buckets.sizes[self.buckets.of_image[index]]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.read(index)


def load_captioned(
    source: str | Path | None,
    prompt: str | None = None,
    image_column: str | None = None,
    caption_column: str = "text",
    resolution: int = 512,
    aspect_buckets: bool = False,
    *,
    multiple: int = 16,
    root: str | Path | None = None,
    split: str = "train",
    broken: str = "fatal",
) -> CaptionedImages:
    """Load images and their captions from a folder or the hub.

    Args:
        source: a folder of images, which are also looked for in its subfolders; or `hf:NAME`, see `data.from_hub`.
            None takes the handwritten digits with captions.
        prompt: a caption for all images, instead of those in the data. None reads captions from `metadata.jsonl` or
            `metadata.csv`, as Hugging Face's image folders have them, or from a text file beside each image.
        image_column: the column of the metadata with the paths of images (None: `file_name`), or the column of the hub
            data set with the images (None: its only column of images).
        caption_column: the column of the metadata or hub data set with the captions.
        resolution: side of the square in pixels to which images are cropped.
        aspect_buckets: crop each image to the nearest of several shapes with about as many pixels; see `data.buckets`.
        multiple: number of pixels per token along one side; the sides of images must be multiples of it.
        root: for `hf:NAME` alone, the folder of downloads.
        split: for `hf:NAME` and the digits; a folder has `train` alone.
        broken: what to do about an unreadable image: `fatal` or `skip` (see `data.images.SizedImages`).

    Raises:
        FileNotFoundError: the folder, all images, or an image that the metadata names is missing.
        ValueError: captions are missing, empty, too long or given twice, or `resolution` is no multiple of `multiple`.
        BrokenImageError: with `aspect_buckets`, an image whose size cannot be read.
    """
    if resolution < 1 or resolution % multiple:
        raise ValueError(f"a resolution of {resolution} is no multiple of {multiple}, which the model needs")
    if prompt is not None:
        prompt = checked(prompt, "the prompt")
    kind, _, name = str(source).partition(":")
    if source is None:
        named, pictures = DIGITS, WrittenDigits(digits.Digits(split, resolution))
        captions = [digits.CAPTIONS[digit] if prompt is None else prompt for digit in pictures.digits]
    elif kind == "hf" and name:
        named = str(source)
        pictures, captions = _of_hub(name, root, split, prompt, image_column, caption_column)
    elif split != "train":
        raise ValueError(f"a folder has no split '{split}': leave --validation-split out to hold out its own images")
    else:
        named = Path(source).resolve().name
        pictures, captions = _of_folder(Path(source), prompt, image_column or FILE_COLUMN, caption_column)
    if aspect_buckets:
        buckets = bucketed(pictures, resolution, multiple, broken)
    else:
        buckets = one_bucket(len(pictures), resolution)
    return CaptionedImages(BucketedImages(named, pictures, buckets, broken), captions)


def bucketed(pictures: "Pictures", resolution: int, multiple: int, broken: str) -> Buckets:
    """The bucket of each image. Unless fatal, an image of unreadable size gets the bucket of the next one."""
    sizes: list[tuple[int, int]] = []
    unread = 0
    for index in range(len(pictures)):
        try:
            size = pictures.size(index)
        except BrokenImageError:
            if broken == "fatal":
                raise
            unread += 1
        else:
            sizes += [size] * (unread + 1)
            unread = 0
    if not sizes:
        raise BrokenImageError(f"none of the {len(pictures)} images can be read")
    return nearest_buckets(sizes + [sizes[0]] * unread, resolution, multiple)


def checked(caption: str, named: str) -> str:
    """Strip a caption of surrounding space; ValueError if it is no text, empty or too long."""
    if not isinstance(caption, str) or not caption.strip():
        raise ValueError(f"{named} is {printable(repr(caption), 40)}: write some words")
    if len(caption) > MOST_CHARACTERS:
        raise ValueError(f"{named} has {len(caption)} characters: {MOST_CHARACTERS} are the most")
    try:
        caption.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can contain
        raise ValueError(f"{named} is no text: {printable(caption, 40)}") from None
    return caption.strip()


class Pictures(Dataset):
    """`[index] -> (image, index)`: PIL images, rotated as their metadata say; `size` does not decode pixels."""

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


class Files(Pictures):
    """The images of a folder, by their names in its listing."""

    def __init__(self, listing: Listing, names: list[str]):
        self.root, self.listing = listing.root, listing
        self.paths = [listing.root / name for name in names]

    def __len__(self) -> int:
        return len(self.paths)

    def opened(self, index: int):
        return opened(self.paths[index], printable(str(self.paths[index])))


class WrittenDigits(Pictures):
    """The images of `data.digits`, each with its digit."""

    def __init__(self, dataset: digits.Digits):
        self.images = ((dataset.images + 1) * 127.5).round().to(torch.uint8)
        self.digits = dataset.labels

    def __len__(self) -> int:
        return len(self.images)

    @contextmanager
    def opened(self, index: int) -> Iterator[Image.Image]:
        yield Image.fromarray(self.images[index].permute(1, 2, 0).numpy())


class HubPictures(Pictures):
    """A column of undecoded images of a `datasets.Dataset`."""

    def __init__(self, name: str, rows, column: str):
        self.name, self.rows, self.column = name, rows, column

    def __len__(self) -> int:
        return len(self.rows)

    def opened(self, index: int):
        stored = self.rows[index][self.column]
        named = f"image {index} of hf:{self.name}"
        if stored is None:
            raise BrokenImageError(f"{named} is missing: its row has none")
        return opened(stored["path"] if stored["bytes"] is None else BytesIO(stored["bytes"]), named)


def _of_hub(name: str, root, split: str, prompt: str | None, image_column: str | None, caption_column: str):
    rows = hub_rows(name, root, split)
    image_column = column_of_type(name, rows, "Image", image_column, "--image-column")
    if prompt is None and caption_column not in rows.features:
        raise ValueError(f"hf:{name} has no column {caption_column!r}: it has {printable(', '.join(rows.features))}")
    if not len(rows):
        raise ValueError(f"hf:{name}, split {split}, has no rows")
    captions = [prompt] * len(rows) if prompt is not None else rows[caption_column]
    captions = [checked(text, f"the caption in row {row} of hf:{name}") for row, text in enumerate(captions)]
    import datasets

    return HubPictures(name, rows.cast_column(image_column, datasets.Image(decode=False)), image_column), captions


def _of_folder(folder: Path, prompt: str | None, file_column: str, caption_column: str):
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: give a folder of images, or hf:NAME")
    listing = list_images(folder)
    images = set(listing.images)
    found = sorted(name for name in listing.others if os.path.basename(name) in METADATA)
    metadata = [
        name for name in found if name in METADATA
    ] or found  # in the folder itself, else in a subfolder such as train/
    texts = {name.removesuffix(".txt") for name in listing.others if name.endswith(".txt")}
    texts &= {os.path.splitext(name)[0] for name in images}

    if not images and not metadata:
        raise FileNotFoundError(f"no images in {folder}")
    if prompt is not None:
        captions = dict.fromkeys(images, prompt)
    elif len(metadata) + bool(texts) > 1:
        places = " and ".join(metadata + ["text files beside images"] * bool(texts))
        raise ValueError(f"{folder} has captions in {places}: leave one of them there, or give one --prompt for all")
    elif metadata:
        captions = captions_of_metadata(folder / metadata[0], file_column, caption_column)
        inside = os.path.dirname(metadata[0])
        captions = {os.path.join(inside, name): caption for name, caption in captions.items()}
    elif texts:
        captions = {name: _text_beside(folder / name) for name in images if os.path.splitext(name)[0] in texts}
    else:
        raise ValueError(
            f"{folder} has no captions: put metadata.jsonl or metadata.csv there, with the columns {file_column} and "
            f"{caption_column}, or a .txt beside each image, or give one --prompt for all"
        )
    without = sorted(images - captions.keys())
    if without:
        more = f", nor have {len(without) - 1} more" if len(without) > 1 else ""
        raise ValueError(
            f"{printable(str(folder / without[0]))} has no caption{more}: write one, or take the image out"
        )
    names = sorted(captions)
    listing.used = {f"{name}.txt" for name in texts} | {*found, *captions}
    return Files(listing, names), [captions[name] for name in names]


def _text_beside(image: Path) -> str:
    path = image.with_suffix(".txt")
    try:
        return checked(path.read_text(encoding="utf-8-sig"), f"the caption in {printable(str(path))}")
    except UnicodeDecodeError as error:
        raise ValueError(f"{printable(str(path))} is no text in UTF-8: {error.reason}") from None


def captions_of_metadata(path: Path, file_column: str, caption_column: str) -> dict[str, str]:
    """Read the captions of a metadata.jsonl or .csv, by the path of each file relative to the folder."""
    captions: dict[str, str] = {}
    for line, row in rows_of(path):
        named = printable(f"line {line} of {path}")
        for column in (file_column, caption_column):
            if column not in row:
                listed = printable(", ".join(map(str, row)), 200) or "none"
                raise ValueError(f"{named} has no column {column!r}: it has {listed}")
        file = row[file_column]
        if not isinstance(file, str) or not file:
            raise ValueError(f"{named} names no file: {file_column} is {printable(repr(file), 40)}")
        # Only the name is checked, since links to other folders are valid, as in the hub's cache.
        name = os.path.normpath(file)
        if os.path.isabs(name) or name.split(os.sep)[0] == "..":
            raise ValueError(f"{named} leaves the folder: {printable(file, 200)}")
        if name in captions:
            raise ValueError(f"{named} names {printable(name, 200)}, which a line before it has named")
        if not os.path.isfile(path.parent / name):
            raise FileNotFoundError(f"{named} names {printable(name, 200)}, which is not in {path.parent}")
        captions[name] = checked(row[caption_column], f"the caption of {printable(name, 200)} in {named}")
    if not captions:
        raise ValueError(f"{path} is empty")
    return captions


def rows_of(path: Path) -> Iterator[tuple[int, dict]]:
    """The rows of a .jsonl or .csv file with their line numbers."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _rows_of_json(path, file) if path.suffix == ".jsonl" else _rows_of_csv(path, file)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error.reason}") from None


def _rows_of_json(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} of {path} is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} of {path} is no row of columns: {printable(line.strip(), 40)}")
        yield number, row


def _rows_of_csv(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, dict]]:
    rows = csv.DictReader(lines, strict=True)
    try:
        columns = rows.fieldnames or []
        if len(set(columns)) < len(columns):
            raise ValueError(f"{path} has two columns of one name: {printable(', '.join(columns), 200)}")
        for row in rows:
            if None in row or None in row.values():  # the row has too many or too few values
                raise ValueError(
                    f"line {rows.line_num} of {path} has not one value for each of {len(rows.fieldnames)} columns"
                )
            yield rows.line_num, row
    except csv.Error as error:
        raise ValueError(f"line {rows.reader.line_num} of {path} is no CSV: {error}") from None
