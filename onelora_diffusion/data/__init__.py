"""Data sets of (image, label) with their class names, and the latents that a VAE makes of them."""

import difflib
from pathlib import Path

from torch.utils.data import Dataset

DATASETS = ("digits", "fashion-mnist", "food101", "imagefolder")


def load_dataset(
    name: str,
    root: str | Path | None = None,
    split: str = "train",
    resolution: int = 256,
    classes: tuple[int, ...] | None = None,
    download: bool = False,
    broken: str = "fatal",
) -> Dataset:
    """A data set of `(image, label)`: image float32 (3, resolution, resolution) in [-1, 1], label an int.

    It has the attributes `name`, `num_classes` and `id2label: dict[int, str]`.

    Args:
        name: one of `DATASETS`; or `torchvision:CLASS`, any of torchvision's classification data sets; or `hf:NAME`,
            one of the Hugging Face hub or a folder that its library `datasets` reads.
        root: where the files lie: for `food101` the folder that holds `food-101/` (default `data`), for
            `imagefolder` the folder of one folder a class, or of `train/` and `test/` with those inside, for
            `fashion-mnist` see `data.fashion`.
        split: `train` or `test`; of the last two also others that they have.
        classes: for `digits` and `fashion-mnist`, which of the ten; None is its own default.
        download: for `food101` (5 GB), `fashion-mnist` (30 MB) and torchvision's, fetch the files where they are
            missing; `hf:` does without being asked.
        broken: what an unreadable photograph is: `fatal`, or `skip` (see `data.images.ClassifiedImages`).

    Raises:
        ValueError: an unknown name, or `classes` for a data set that cannot choose.
        FileNotFoundError: there is no such data, with what to do about it.
    """
    check_name(name)
    if classes is not None and name not in ("digits", "fashion-mnist"):
        raise ValueError(f"classes can be chosen for digits and fashion-mnist only, not for {name!r}")
    chosen = {} if classes is None else {"classes": classes}
    if name == "digits":
        from onelora_diffusion.data.digits import Digits

        return Digits(split=split, resolution=resolution, **chosen)
    if name == "fashion-mnist":
        from onelora_diffusion.data.fashion import FashionMNIST

        return FashionMNIST(root, split, resolution, download=download, **chosen)
    if name == "food101":
        from onelora_diffusion.data.images import food101

        return food101(root or "data", split, resolution, download, broken)
    if name == "imagefolder":
        from onelora_diffusion.data.images import image_folder

        if root is None:
            raise ValueError("imagefolder needs a data root: a folder with one folder of images for each class")
        return image_folder(root, split, resolution, broken)
    kind, _, rest = name.partition(":")
    if kind == "torchvision":
        from onelora_diffusion.data.from_torchvision import torchvision_images

        return torchvision_images(rest, root or "data", split, resolution, download, broken)
    from onelora_diffusion.data.from_hub import hub_images

    return hub_images(rest, root, split, resolution, broken)


def check_name(name: str) -> None:
    """ValueError for a name that `load_dataset` does not know."""
    kind, _, rest = name.partition(":")
    if kind == "torchvision" and rest:
        from onelora_diffusion.data.from_torchvision import class_of

        class_of(rest)
    elif name not in DATASETS and not (kind == "hf" and rest):
        near = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        known = ", ".join(DATASETS)
        raise ValueError(f"unknown dataset {name!r}: choose one of {known}, torchvision:CLASS, hf:NAME{hint}")
