"""The table of data sets: each name with the function that loads the data and its default settings, which all commands
share."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import Dataset

from onelora_diffusion.data.digits import CAPTIONED, CAPTIONS, CaptionedDigits, Digits
from onelora_diffusion.data.fashion import CLASSES, FashionMNIST
from onelora_diffusion.data.from_hub import hub_images
from onelora_diffusion.data.from_torchvision import class_of, torchvision_images
from onelora_diffusion.data.images import food101, image_folder


@dataclass(frozen=True)
class Defaults:
    """The default settings of a data set; the values given here suit photographs."""

    recipe: str = "food101.yaml"  # the training recipe, a file in cli/recipes/
    resolution: int = 256  # side of the real images in pixels
    features: str = "inception"  # by which generated and real images are compared
    guidance_scale: float | None = 4.0  # of sample pictures; None is the pipeline's own
    eval_guidance_scale: float | None = 1.5  # of images to measure: distances want less guidance than people do
    eval_images: int | None = 10_000  # number of images to measure; None is four for each prompt
    eval_steps: int = 50
    compares_base: bool = False  # whether the base is measured in addition to the adapter
    has_distance: bool = True  # whether the distance of all generated and real images is measured, whatever else is
    metrics: tuple[str, ...] = ()  # the further metrics if none are asked for
    images_at_once: int | None = None  # in each batch of the networks, in evaluations; None is the family's default


@dataclass(frozen=True)
class Request:
    """The arguments of `load_dataset`; `name` is the part after the colon, as in `hf:NAME`."""

    name: str
    root: Path | str | None
    split: str
    resolution: int
    classes: tuple[int, ...] | None
    download: bool
    broken: str
    image_column: str | None
    label_column: str | None


@dataclass(frozen=True)
class DatasetKind:
    """A row of `DATASETS`."""

    load: Callable[[Request], Dataset]
    defaults: Defaults = Defaults()
    classes: tuple[str, ...] = ()  # the names of all classes, if some of them can be chosen by number
    has_columns: bool = False  # whether the columns of images and labels can be chosen
    of_many: str = ""  # for a row that stands for many data sets, a word for the part of the name after the colon
    check_name: Callable[[str], object] = lambda name: None  # ValueError if that part is known to be wrong


DATASETS = {
    "digits": DatasetKind(
        lambda asked: Digits(asked.split, asked.resolution, asked.classes),
        Defaults("digits.yaml", 16, "pixels", 2.0, 2.0, 500, 25, compares_base=True),
        classes=tuple("0123456789"),
    ),
    CAPTIONED: DatasetKind(
        lambda asked: CaptionedDigits(asked.split, asked.resolution, asked.classes),
        Defaults("digits.yaml", 16, "pixels", 2.0, 2.0, 200, 20, True, True, ("similarity", "nearest"), 16),
        classes=CAPTIONS,
    ),
    "fashion-mnist": DatasetKind(
        lambda asked: FashionMNIST(asked.root, asked.split, asked.resolution, asked.classes, asked.download),
        Defaults("fashion_mnist.yaml"),
        classes=CLASSES,
    ),
    "food101": DatasetKind(food101),
    "imagefolder": DatasetKind(image_folder),
    "torchvision": DatasetKind(torchvision_images, of_many="CLASS", check_name=class_of),
    "hf": DatasetKind(hub_images, has_columns=True, of_many="NAME"),
}
EMBEDDED = "digits"  # the default data set of all commands, which needs no files
# The defaults for prompts, of which few are measured, each for itself.
OF_PROMPTS = Defaults(
    features="dino",
    guidance_scale=None,
    eval_guidance_scale=None,
    eval_images=None,
    eval_steps=28,
    compares_base=True,
    has_distance=False,
    metrics=("DINO-I", "CLIP-I", "CLIP-T", "nearest"),
)


def defaults_of(dataset: str | None, kind: str = "classes") -> Defaults:
    """The default settings of a data set, or of what an adapter draws after it: `classes` or `prompts`."""
    if kind == "prompts" and dataset != CAPTIONED:  # any folder or hub data set with captions
        return OF_PROMPTS
    row = DATASETS.get((dataset or "").partition(":")[0])
    return row.defaults if row else Defaults()


def kind_of(name: str) -> tuple[DatasetKind, str]:
    """(the row of a data set, the part of its name after the colon); ValueError if there is no such data set."""
    row, _, rest = name.partition(":")
    kind = DATASETS.get(row)
    if kind is None or bool(rest) != bool(kind.of_many):
        near = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        known = ", ".join(f"{row}:{kind.of_many}" if kind.of_many else row for row, kind in DATASETS.items())
        raise ValueError(f"unknown dataset {name!r}: choose one of {known}{hint}")
    kind.check_name(rest)
    return kind, rest


def check_columns(name: str, image_column: str | None, label_column: str | None) -> None:
    """ValueError if columns are chosen for a data set without columns."""
    if not kind_of(name)[0].has_columns and (image_column or label_column):
        flag = f"--image-column {image_column}" if image_column else f"--label-column {label_column}"
        raise ValueError(f"{flag} is for hf:NAME, not for {name}")


def classes_of(name: str) -> tuple[str, ...]:
    """The names of all classes of a data set whose classes can be chosen; () for any other."""
    return DATASETS[name].classes if name in DATASETS else ()
