"""Data sets of (image, label) with their class names, and the latents that a VAE makes of them."""

from pathlib import Path

from torch.utils.data import Dataset

DATASETS = ("digits", "food101", "imagefolder")


def load_dataset(
    name: str,
    root: str | Path | None = None,
    split: str = "train",
    resolution: int = 256,
    classes: tuple[int, ...] | None = None,
    download: bool = False,
) -> Dataset:
    """A data set of `(image, label)`: image float32 (3, resolution, resolution) in [-1, 1], label an int.

    It has the attributes `name`, `num_classes` and `id2label: dict[int, str]`.

    Args:
        name: one of `DATASETS`.
        root: where the files lie: for `food101` the folder that holds `food-101/` (default `data`), for
            `imagefolder` the folder of one folder a class, or of `train/` and `test/` with those inside.
        split: `train` or `test`.
        classes: for `digits`, which of the ten; None is its own default.
        download: for `food101`, fetch the 5 GB archive where it is missing.

    Raises:
        ValueError: an unknown name, or `classes` for another data set than `digits`.
        FileNotFoundError: there is no such data, with what to do about it.
    """
    if classes is not None and name != "digits":
        raise ValueError(f"classes can be chosen for digits only, not for {name!r}")
    if name == "digits":
        from .digits import Digits

        return Digits(split=split, resolution=resolution, **({} if classes is None else {"classes": classes}))
    if name == "food101":
        from .images import food101

        return food101(root or "data", split, resolution, download)
    if name == "imagefolder":
        from .images import image_folder

        if root is None:
            raise ValueError("imagefolder needs a data root: a folder with one folder of images for each class")
        return image_folder(root, split, resolution)
    raise ValueError(f"unknown dataset {name!r}: choose one of {', '.join(DATASETS)}")
