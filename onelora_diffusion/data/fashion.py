"""Fashion-MNIST (Xiao et al., 2017): 70,000 grey photographs of clothes, shoes and bags, 28 by 28 pixels."""

import gzip
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import interpolate, pad

from onelora_diffusion.data.latents import SmallImages, check_chosen

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # the folder of Debian's package dataset-fashion-mnist


class FashionMNIST(SmallImages):
    """Fashion-MNIST with a margin of two black pixels (-1), 32 by 32; resized if the resolution is not 32.

    FileNotFoundError if the files are missing; ValueError if the split or a class is unknown, or a file is damaged.

    Args:
        root: the folder that holds `FashionMNIST/raw/` (torchvision's layout), or the raw files themselves, gzipped
            or not. None looks in `data`, and then in the folder of Debian's package.
        split: `train` (60,000 images) or `test` (10,000).
        classes: the chosen ones of the ten classes by number; None takes sandal, sneaker and ankle boot.
        download: let torchvision download missing files (30 MB).
    """

    name = "fashion-mnist"

    def __init__(
        self,
        root: str | Path | None = None,
        split: str = "train",
        resolution: int = 32,
        classes: tuple[int, ...] | None = None,
        download: bool = False,
    ):
        classes = (5, 7, 9) if classes is None else classes
        check_chosen(self.name, split, ("train", "test"), classes)
        folder = find_folder(root, download)
        prefix = "train" if split == "train" else "t10k"
        pixels = read_idx(folder, f"{prefix}-images-idx3-ubyte")
        labels = read_idx(folder, f"{prefix}-labels-idx1-ubyte")
        chosen = np.isin(labels, classes)

        grey = torch.from_numpy(pixels[chosen])[:, None].float() / 127.5 - 1
        grey = pad(grey, (2, 2, 2, 2), value=-1.0)
        if resolution != 32:
            grey = interpolate(grey, size=(resolution, resolution), mode="bilinear", antialias=True)
        super().__init__(grey, labels[chosen], CLASSES, classes, split)


def find_folder(root: str | Path | None, download: bool) -> Path:
    """The folder with the four raw files."""
    roots = [Path("data"), DEBIAN] if root is None else [Path(root)]
    folders = [folder for each in roots for folder in (each / "FashionMNIST" / "raw", each)]
    found = [folder for folder in folders if any(folder.glob("train-images-idx3-ubyte*"))]
    if found:
        return found[0]
    if download:
        from torchvision.datasets import FashionMNIST as Torchvision

        Torchvision(roots[0], download=True)
        return folders[0]
    raise FileNotFoundError(
        f"no Fashion-MNIST in {folders[0]}: download it (--download, 30 MB), install Debian's package "
        "dataset-fashion-mnist, or give the folder of the raw files (--data-root)"
    )


def read_idx(folder: Path, name: str) -> np.ndarray:
    """Read an idx file of uint8 values (LeCun's format: two zero bytes, type, rank, sizes, values), gzipped or not."""
    path = folder / name
    try:
        content = path.read_bytes() if path.is_file() else gzip.decompress((folder / f"{name}.gz").read_bytes())
        rank = content[3]
        shape = np.frombuffer(content, ">u4", count=rank, offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)
    except FileNotFoundError:
        raise FileNotFoundError(f"no {name} or {name}.gz in {folder}") from None
    except (EOFError, OSError, IndexError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no idx file: {error}") from error
