"""Images with captions, from a folder with captions, a folder with one prompt for all images, or the Hugging Face hub.

The default is scikit-learn's handwritten digits with captions such as "a handwritten seven", which need no files.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from onelora_diffusion.data import digits
from onelora_diffusion.data.buckets import Buckets, nearest_buckets, with_frames
from onelora_diffusion.data.clips import Clips, check_bytes, is_video, items_of
from onelora_diffusion.data.decoding import BrokenImageError, of_readable, opened
from onelora_diffusion.data.from_hub import column_of_type, hub_rows
from onelora_diffusion.data.identity import file_digest
from onelora_diffusion.data.images import Pictures, SizedImages, crop_to
from onelora_diffusion.data.latents import FlippableImages
from onelora_diffusion.data.listing import Listing, list_images
from onelora_diffusion.data.masks import Masks, is_mask_of_clip, masks_beside
from onelora_diffusion.data.metadata import FILE_COLUMN, METADATA, Table
from onelora_diffusion.data.references import FirstFrame, ReferenceImage, reference_image
from onelora_diffusion.data.repeats import checked_repeats, numbered_folder, repeats_by_folder
from onelora_diffusion.families.family import check_multiple
from onelora_diffusion.files import printable

DIGITS = digits.CAPTIONED
CAPTION_ENDINGS = (".caption", ".txt")  # the former is kohya's; where both are beside an image, the latter is read
MOST_CHARACTERS = 10_000  # most characters of a caption, twenty times what the longest text encoder reads


@dataclass
class CaptionSettings:
    """Which images and captions are read, for command lines."""

    images: str | None = None
    """What to learn: a folder of images with metadata.jsonl or .csv or a .txt beside each, or with --prompt; or
    hf:NAME."""
    prompt: str | None = None
    """The caption of all images, such as 'a photo of sks dog'. With --subjects, {subject} in it, in --trigger and in
    validation prompts stands for the name of each."""
    image_column: str | None = None
    """Column of image paths in the metadata, or of images on the hub. Default: file_name, or the only such column."""
    caption_column: str = "text"
    """Column of captions in the metadata or on the hub."""
    reference_column: tuple[str, ...] = ()
    """Column of the metadata with the path of the image that the caption says how to edit, for bases that edit
    (FLUX.1 Kontext, Qwen-Image-Edit, FLUX.2); several columns, for bases that take several images. Of bases that draw
    clips from a picture: that picture. Default there: each clip's own first frame."""
    mask_column: str | None = None
    """Column of masks in the metadata (their paths) or on the hub: white where an image is learned, black where it is
    not. Default: the mask of NAME.jpg is NAME.mask.png beside it, if it is there."""
    repeats_column: str | None = None
    """Column of the number of times that each image counts in an epoch."""
    repeats_by_folder: bool = False
    """Images in a folder that is named like 3_cats count three times in an epoch, as for kohya's scripts."""
    aspect_buckets: bool = False
    """Crop each image to the nearest of several shapes with about as many pixels."""
    frames: int = 1
    """Of bases that draw clips, the frames that are learned of each: the first ones of video files (PyAV), of animated
    images, and of subfolders of frames; the caption of clip/ is clip.txt. Images beside them are learned as single
    frames."""


@dataclass(eq=False)
class CaptionedImages(FlippableImages):
    """`[index, flip] -> (image, caption index)`: uint8 (3, height, width), or a clip (3, frames, height, width)."""

    dataset: Dataset  # `[index] -> (image, caption index)`: the images as they are stored and, once loaded, cropped
    captions: list[str]  # one for each image; one that replaces an unreadable image comes with its own caption
    masks: Masks | None = None  # of the images, if there are any or a column of them was asked for
    repeats: list[int] | None = None  # how often each image counts, if it was asked for
    references: list[tuple[ReferenceImage | FirstFrame, ...]] = field(default_factory=list)  # of edits, those of each
    notes: list[str] = field(default_factory=list)  # what a user should know about the data, a line each


class BucketedImages(SizedImages):
    """`[index] -> (image, index)`: uint8 (3, height, width), or a clip (3, frames, height, width), of its bucket."""

    def __init__(self, name: str, source: Pictures, buckets: Buckets, broken: str = "fatal"):
        super().__init__(name, source, broken)
        self.buckets = buckets

    def in_place_of(self, index: int) -> Iterator[int]:
        """An image is replaced by the next one of its bucket."""
        bucket_of = self.buckets.of_image
        return (other for other in super().in_place_of(index) if bucket_of[other] == bucket_of[index])

    def size_of(self, index: int) -> tuple[int, int]:
        return self.buckets.sizes[self.buckets.of_image[index]][-2:]

    def decoded(self, index: int) -> tuple[np.ndarray, int]:
        if len(self.buckets.sizes[self.buckets.of_image[index]]) == 2:
            return super().decoded(index)
        size = self.size_of(index)
        return np.stack([np.array(crop_to(frame, *size)) for frame in self.source.frames(index)]), index


def load_captioned(
    settings: CaptionSettings,
    resolution: int = 512,
    multiple: int = 16,
    split: str = "train",
    broken: str = "fatal",
    frame_rate: float | None = None,
    first_frames: bool = False,
) -> CaptionedImages:
    """Load images and their captions from a folder or the hub; the handwritten digits if `settings.images` is None.

    FileNotFoundError if the folder, all images, or an image that the metadata names is missing. BrokenImageError, with
    `aspect_buckets`, for an image whose size cannot be read. ValueError if captions are missing, empty, too long or
    given twice, a mask belongs to no image, a number of times is none, or a clip is too short.

    Args:
        resolution: side of the square in pixels to which images are cropped; with `settings.aspect_buckets` that of a
            square with about as many pixels (see `data.buckets`).
        multiple: number of pixels per token along one side; the sides of images must be multiples of it.
        split: for `hf:NAME` and the digits; a folder has `train` alone.
        broken: what to do about an unreadable image: `fatal` or `skip` (see `data.images.SizedImages`).
        frame_rate: frames a second that are taken of videos and animated images; None takes each one.
        first_frames: whether the reference image of each clip is its own first frame.
    """
    source, frames = settings.images, settings.frames
    check_multiple(resolution, multiple)
    check_bytes(resolution, frames)
    if settings.prompt is not None:
        settings = replace(settings, prompt=checked(settings.prompt, "the prompt"))
    kind, _, name = str(source).partition(":")
    is_of_hub = kind == "hf" and name != ""
    is_folder = source is not None and not is_of_hub
    for flag, is_useless in {
        "--repeats-by-folder": settings.repeats_by_folder and not is_folder,
        "--reference-column": settings.reference_column and not is_folder,
        "--mask-column": source is None and settings.mask_column is not None,
        "--repeats-column": source is None and settings.repeats_column is not None,
    }.items():
        if is_useless:
            raise ValueError(f"{flag} is of no use for {source or DIGITS}")
    if frames > 1 and not is_folder:
        raise ValueError(f"clips of {frames} frames are read from folders, and not from {source or DIGITS}")
    if source is None:
        named, pictures = DIGITS, WrittenDigits(digits.Digits(split, resolution))
        found = CaptionedImages(pictures, [settings.prompt or digits.CAPTIONS[digit] for digit in pictures.digits])
    elif is_of_hub:
        named, found = str(source), _of_hub(name, split, settings)
    elif split != "train":
        raise ValueError(f"a folder has no split '{split}': leave --validation-split out to hold out its own images")
    else:
        named = Path(source).resolve().name
        clips = None if frames == 1 else partial(Clips, number=frames, rate=frame_rate, broken=broken)
        found = _of_folder(Path(source), settings, clips)
    pictures = found.dataset
    if found.masks is not None:
        found.notes.append(f"{len(found.masks):,} of {len(pictures):,} images have masks")
    if found.repeats:
        found.notes.append(f"by their repeats, an epoch has {sum(found.repeats):,} images")
    if settings.aspect_buckets:
        sizes = of_readable(len(pictures), pictures.size, broken, "images")
        buckets = nearest_buckets(sizes, resolution, multiple)
    else:
        buckets = Buckets([(resolution, resolution)], np.zeros(len(pictures), np.int64))
    if frames > 1:
        buckets = with_frames(buckets, frames, pictures.is_clip)
        if (first_frames or settings.reference_column) and not pictures.is_clip.all():
            still = pictures.named(int(pictures.is_clip.argmin()))
            raise ValueError(f"{still} is a single image, and clips are learned from their first frame: take it out")
    found.dataset = BucketedImages(named, pictures, buckets, broken)
    if first_frames:
        digests = (file_digest(str(paths[0]), times=False).hex() for paths in pictures.paths)
        found.notes.append("each clip is learned from its own first frame")
        found.references = [(FirstFrame(found.dataset, index, digest),) for index, digest in enumerate(digests)]
    return found


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


class Files(Pictures):
    """The images of a folder, by their names in its listing."""

    def __init__(self, listing: Listing, names: list[str]):
        self.root, self.listing = listing.root, listing
        self.paths = [listing.root / name for name in names]

    def __len__(self) -> int:
        return len(self.paths)

    def named(self, index: int) -> str:
        return printable(str(self.paths[index]))

    def opened(self, index: int):
        return opened(self.paths[index], self.named(index))


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
    """A column of a `datasets.Dataset`, whose images are decoded here."""

    kind = "image"

    def __init__(self, name: str, rows, column: str):
        import datasets

        self.rows = rows.cast_column(column, datasets.Image(decode=False))
        self.name, self.column = name, column

    def __len__(self) -> int:
        return len(self.rows)

    def named(self, index: int) -> str:
        return f"{self.kind} {index} of hf:{self.name}"

    def opened(self, index: int):
        stored, named = self.rows[index][self.column], self.named(index)
        if stored is None:
            raise BrokenImageError(f"{named} is missing: its row has none")
        return opened(stored["path"] if stored["bytes"] is None else BytesIO(stored["bytes"]), named)


class HubMasks(HubPictures):
    """The same of masks."""

    kind = "mask"


def _of_hub(name: str, split: str, settings: CaptionSettings) -> CaptionedImages:
    rows, masks = hub_rows(name, None, split), None
    if settings.mask_column is not None:  # it is read without the images, and these without it
        column = column_of_type(name, rows, "Image", settings.mask_column, "--mask-column")
        source = HubMasks(name, rows.select_columns(column), column)
        masks = Masks(source, [(row, row) for row in range(len(rows)) if source.rows[row][column] is not None])
        rows = rows.remove_columns(column)
    image_column = column_of_type(name, rows, "Image", settings.image_column, "--image-column")
    captions = None if settings.prompt else settings.caption_column
    for column in (captions, settings.repeats_column):
        if column is not None and column not in rows.features:
            raise ValueError(f"hf:{name} has no column {column!r}: it has {printable(', '.join(rows.features))}")
    if not len(rows):
        raise ValueError(f"hf:{name}, split {split}, has no rows")
    captions = [settings.prompt] * len(rows) if captions is None else rows[captions]
    captions = [checked(text, f"the caption in row {row} of hf:{name}") for row, text in enumerate(captions)]
    found = CaptionedImages(HubPictures(name, rows, image_column), captions, masks)
    if settings.repeats_column is not None:
        numbers = enumerate(rows[settings.repeats_column])
        found.repeats = [checked_repeats(number, f"row {row} of hf:{name}") for row, number in numbers]
    return found


def _of_folder(folder: Path, settings: CaptionSettings, clips: Callable[..., Clips] | None) -> CaptionedImages:
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: give a folder of images, or hf:NAME")
    listing = list_images(folder)
    tables = sorted(name for name in listing.others if os.path.basename(name) in METADATA)
    listing.used.update(tables)
    # In the folder itself, else in a subfolder such as train/.
    tables = [name for name in tables if name in METADATA] or tables
    videos = [name for name in listing.others if is_video(name)]
    if not (listing.images or tables or videos and clips):
        raise FileNotFoundError(f"no images in {folder}{', but videos: give --frames' if videos else ''}")
    if clips and (many := [name for name in (*listing.folders, *videos) if is_mask_of_clip(name)]):
        raise ValueError(
            f"{printable(str(folder / many[0]))} is a mask of many frames: a clip has one for all of them, as "
            "walk.mask.png is that of walk.mp4 or of the folder walk"
        )
    table = _table_of(folder, tables, settings)
    of_table = table.files(settings.mask_column) if settings.mask_column else {}
    references = {column: table.files(column) for column in settings.reference_column}
    rows = table.rows.keys() if references else set()
    _check_references(folder, rows, references)
    edited = {file for files in references.values() for file in files.values()} - rows
    no_images = edited | set(of_table.values())
    images = set(listing.images) - no_images
    stems = {name: os.path.splitext(name)[0] for name in (*images, *(videos if clips else ()))}
    stems |= {name: name for name in listing.folders if clips}
    captions = _captions_of(listing, stems, tables, table, settings)
    items = items_of(listing, captions, no_images) if clips else {name: [name] for name in images}
    if settings.prompt is not None:
        captions = dict.fromkeys(items, settings.prompt)
    if without := sorted(items.keys() - captions.keys()):
        more = f", nor have {len(without) - 1} more" if len(without) > 1 else ""
        remedy = "write one, or take the image out"
        if table and (column := table.column_of(without[0])):
            column = printable(column, 60)
            remedy = (
                f"{table.path.name} names it in {column!r}, which is not read: give --mask-column {column} if it is a "
                f"mask, --reference-column {column} if it is what is edited"
            )
        raise ValueError(f"{printable(str(folder / without[0]))} has no caption{more}: {remedy}")
    names = sorted(captions)
    pictures = clips(listing, {name: items.get(name, [name]) for name in names}) if clips else Files(listing, names)
    found = CaptionedImages(pictures, [captions[name] for name in names])
    _check_references(folder, names, references)
    for name in names if references else ():
        own = [(folder / files[name], f"the reference image of {printable(name)}") for files in references.values()]
        found.references.append(tuple(reference_image(*each) for each in own))
    mask_of = masks_beside(listing, {name: stems.get(name, os.path.splitext(name)[0]) for name in names}, of_table)
    listing.used.update(captions, mask_of.values())
    if any({"mask", "masks"} & {*name.lower().split("/")[:-1]} for name in names):
        found.notes.append("images in a folder of masks are trained on: name these NAME.mask.png or use --mask-column")
    if mask_of or settings.mask_column:
        files = sorted(set(mask_of.values()))
        pairs = [(number, files.index(mask_of[name])) for number, name in enumerate(names) if name in mask_of]
        found.masks = Masks(Files(listing, files), pairs)
    if column := settings.repeats_column:
        rows = [table.rows.get(name, ({column: 1}, name)) for name in names]
        found.repeats = [checked_repeats(row[column], named) for row, named in rows]
    elif settings.repeats_by_folder:
        found.repeats = repeats_by_folder(names)
    elif table is not None and "repeats" in next(iter(table.rows.values()))[0]:
        found.notes.append("the column 'repeats' is not read: --repeats-column repeats has images count as often")
    elif folders := sorted({folder for folder in map(numbered_folder, names) if folder}):
        found.notes.append(
            f"images in {printable(', '.join(folders), 200)} count once: --repeats-by-folder has them count as often "
            "as the name says"
        )
    return found


def _check_references(folder: Path, names: Iterable[str], files: dict[str, dict[str, str]]) -> None:
    """ValueError for an image without a file in a column; `files` are those of each column by image."""
    for column, of_column in files.items():
        if without := sorted(set(names) - of_column.keys()):
            image = printable(str(folder / without[0]))
            raise ValueError(f"{image} has no reference image: name one in {column!r}, or take the image out")


def _table_of(folder: Path, tables: list[str], settings: CaptionSettings) -> Table | None:
    """The table of a folder, if it is needed; ValueError if it is, and there is none or there are several."""
    columns = settings.mask_column, settings.repeats_column, *settings.reference_column
    wanted = [column for column in columns if column is not None]
    if wanted and len(tables) != 1:
        there = f"several, {printable(', '.join(tables), 200)}" if tables else "none"
        raise ValueError(f"{wanted[0]!r} is a column of a table, {' or '.join(METADATA)}, and {folder} has {there}")
    if len(tables) != 1 or settings.prompt and not wanted:
        return None
    captions = [] if settings.prompt else [settings.caption_column]
    return Table(folder, tables[0], settings.image_column or FILE_COLUMN, captions + wanted)


def _captions_of(
    listing: Listing, stems: Mapping[str, str], tables: list[str], table: Table | None, settings: CaptionSettings
) -> dict[str, str]:
    """The captions by the names of images and clips, of which `stems` are without their endings; {} with a prompt."""
    folder = listing.root
    stems_there, texts = {*stems.values()}, {}
    for name in sorted(listing.others, key=str.lower):
        stem, ending = os.path.splitext(name)
        if ending.lower() in CAPTION_ENDINGS and stem in stems_there:
            texts[stem] = name
    listing.used.update(texts.values())
    if settings.prompt is not None:
        return {}
    if len(tables) + bool(texts) > 1:
        places = " and ".join(tables + ["text files beside images"] * bool(texts))
        raise ValueError(f"{folder} has captions in {places}: leave one of them there, or give one --prompt for all")
    if table is not None:
        return {
            name: checked(row[settings.caption_column], f"the caption of {printable(name, 200)} in {named}")
            for name, (row, named) in table.rows.items()
        }
    if not texts:
        raise ValueError(
            f"{folder} has no captions: put metadata.jsonl or metadata.csv there, with the columns "
            f"{settings.image_column or FILE_COLUMN} and {settings.caption_column}, or a .txt or .caption beside each "
            "image, or give one --prompt for all"
        )
    return {name: _text_in(folder / texts[stem]) for name, stem in stems.items() if stem in texts}


def _text_in(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{printable(str(path))} is no text in UTF-8: {error.reason}") from None
    if path.suffix.lower() == CAPTION_ENDINGS[0]:
        text = text.partition("\n")[0]
    return checked(text, f"the caption in {printable(str(path))}")
