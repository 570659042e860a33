"""Fashion-MNIST (Xiao et al., 2017): 70,000 grey photographs of clothes, shoes and bags, 28 by 28 pixels."""

import gzip
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import interpolate, pad

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # the folder of Debian's package dataset-fashion-mnist


class FashionMNIST(torch.utils.data.Dataset):
    """Fashion-MNIST with a margin of two black pixels, 32 by 32, as RGB.

    Item: `(image, label)`, image float32 `(3, resolution, resolution)` in [-1, 1] (background -1), label an int
    in `0..len(classes)-1`: the position of the class in `classes`. Images are resized if the resolution is not 32.

    Args:
        root: the folder that holds `FashionMNIST/raw/` (torchvision's layout), or the raw files themselves, gzipped
            or not. None looks in `data`, and then in the folder of Debian's package.
        split: `train` (60,000 images) or `test` (10,000).
        classes: the chosen ones of the ten classes (0..9, in the order of `CLASSES`).
        download: let torchvision download missing files (30 MB).

    Raises:
        FileNotFoundError: the files are missing.
        ValueError: the split or a class is unknown, or a file is damaged.
    """

    name = "fashion-mnist"
    crop = "none"

    def __init__(
        self,
        root: str | Path | None = None,
        split: str = "train",
        resolution: int = 32,
        classes: tuple[int, ...] = (5, 7, 9),
        download: bool = False,
    ):
        if split not in ("train", "test"):
            raise ValueError(f"fashion-mnist: unknown split {split!r}, choose train or test")
        if not classes or len(set(classes)) < len(classes) or not set(classes) <= set(range(10)):
            raise ValueError(f"fashion-mnist: classes {tuple(classes)} must be different numbers from 0 to 9")
        folder = find_folder(root, download)
        prefix = "train" if split == "train" else "t10k"
        pixels = read_idx(folder, f"{prefix}-images-idx3-ubyte")
        labels = read_idx(folder, f"{prefix}-labels-idx1-ubyte")
        chosen = np.isin(labels, classes)

        grey = torch.from_numpy(pixels[chosen])[:, None].float() / 127.5 - 1
        grey = pad(grey, (2, 2, 2, 2), value=-1.0)
        if resolution != 32:
            grey = interpolate(grey, size=(resolution, resolution), mode="bilinear", antialias=True)
        self.split = split
        self.images = grey.expand(-1, 3, -1, -1)  # three views of one channel
        self.labels = [classes.index(label) for label in labels[chosen].tolist()]
        self.id2label = {label: CLASSES[number] for label, number in enumerate(classes)}
        self.num_classes = len(classes)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], self.labels[index]


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
