"""Data sets of (image, label) with their class names, and the latents that a VAE makes of them."""

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

    It has the attributes `name`, `num_classes` and `id2label: dict[int, str]`.

    Args:
        name: one of `data.table.DATASETS`; so `torchvision:CLASS`, any of torchvision's classification data sets, and
            `hf:NAME`, one of the Hugging Face hub or a folder that its library `datasets` reads.
        root: where the files lie: for `food101` the folder that holds `food-101/` (default `data`), for
            `imagefolder` the folder of one folder a class, or of `train/` and `test/` with those inside, for
            `fashion-mnist` see `data.fashion`.
        split: `train` or `test`; of the last two also others that they have.
        classes: for `digits` and `fashion-mnist`, which of the ten; None is its own default.
        download: for `food101` (5 GB), `fashion-mnist` (30 MB) and torchvision's, fetch the files where they are
            missing; `hf:` does without being asked.
        broken: what an unreadable photograph is: `fatal`, or `skip` (see `data.images.ClassifiedImages`).
        image_column, label_column: of `hf:`, where there are several (see `data.from_hub.hub_images`).

    Raises:
        ValueError: an unknown name, or `classes` or columns for a data set that cannot choose.
        FileNotFoundError: there is no such data, with what to do about it.
    """
    kind, rest = kind_of(name)
    check_columns(name, image_column, label_column)
    if classes is not None and not kind.classes:
        raise ValueError(f"classes of {name!r} cannot be chosen: it is read as a whole")
    asked = root, split, resolution, classes, download, broken, image_column, label_column
    return kind.load(Request(rest, *asked))
