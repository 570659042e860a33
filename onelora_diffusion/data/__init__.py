"""Data sets of images with classes or captions, and caches of their latents and prompts."""

from pathlib import Path

from torch.utils.data import Dataset

from onelora_diffusion.data.table import Request, check_columns, kind_of


def load_dataset(
    name: str,
    root: str | Path | None = None,
    split: str = "train",
    resolution: int = 256,
    classes: tuple[int, ...] | None = None,
    download: bool = False,
    broken: str = "fatal",
    image_column: str | None = None,
    label_column: str | None = None,
) -> Dataset:
    """A data set of `(image, label)`: image float32 (3, resolution, resolution) in [-1, 1], label an int.

    It has the attributes `name`, `num_classes` and `id2label: dict[int, str]`. ValueError for an unknown name, or for
    `classes` or columns where none can be chosen; FileNotFoundError says what to do about missing files.

    Args:
        name: a row of `data.table.DATASETS`. `torchvision:CLASS` is a classification data set of torchvision, and
            `hf:NAME` a data set of the Hugging Face hub or a folder that the library `datasets` reads.
        root: the folder of the files. For `food101` it holds `food-101/` (default `data`); for `imagefolder` it holds
            one folder for each class, or `train/` and `test/` with these inside; for `fashion-mnist` see
            `data.fashion`.
        split: `train` or `test`; `torchvision:` and `hf:` data sets may have others.
        classes: for `digits` and `fashion-mnist`, the chosen ones of the ten classes; None takes the default.
        download: for `food101` (5 GB), `fashion-mnist` (30 MB) and torchvision's data sets, download missing files;
            `hf:` always does.
        broken: what to do about an unreadable photograph: `fatal` or `skip` (see `data.images.SizedImages`).
        image_column, label_column: for `hf:`, the columns to read (see `data.from_hub.hub_images`).
    """
    kind, rest = kind_of(name)
    check_columns(name, image_column, label_column)
    if classes is not None and not kind.classes:
        raise ValueError(f"classes of {name!r} cannot be chosen: it is read as a whole")
    asked = root, split, resolution, classes, download, broken, image_column, label_column
    return kind.load(Request(rest, *asked))
