"""Data sets of the Hugging Face hub, through its library `datasets`, which is an extra."""

from pathlib import Path

from torch.utils.data import Dataset

from onelora_diffusion.data.images import ClassifiedImages
from onelora_diffusion.files import first_line, printable


class HubImages(Dataset):
    """(PIL image, label) of the rows of a `datasets.Dataset`."""

    def __init__(self, rows, image_column: str, label_column: str):
        self.rows, self.image_column, self.label_column = rows, image_column, label_column

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int):
        row = self.rows[index]
        return row[self.image_column], row[self.label_column]


def hub_images(
    name: str, root: str | Path | None, split: str, resolution: int, broken: str = "fatal"
) -> ClassifiedImages:
    """A data set with one column of images and one of class labels, by its name on the hub, or a local folder.

    Args:
        root: where downloads are kept; None: the library's own cache.

    Raises:
        ValueError: the library is missing, or there is no such data set, split or pair of columns.
    """
    rows = hub_rows(name, root, split)
    columns = {kind: column_of_type(name, rows, kind) for kind in ("Image", "ClassLabel")}
    names = rows.features[columns["ClassLabel"]].names
    source = HubImages(rows, columns["Image"], columns["ClassLabel"])
    return ClassifiedImages(f"hf:{name}", source, names, resolution, broken, split)


def hub_rows(name: str, root: str | Path | None, split: str):
    """The `datasets.Dataset` of a split; ValueError if the library is missing, or it does not load."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"hf:{name} needs a package that is missing: pip install datasets") from None
    try:
        return datasets.load_dataset(name, split=split, cache_dir=root and str(root))
    except Exception as error:  # the hub's client raises its own, the library's and the system's
        raise ValueError(f"hf:{name}, split {split}, does not load: {first_line(error)}") from error


def column_of_type(name: str, rows, kind: str) -> str:
    """The one column whose feature is of a type, `Image` or `ClassLabel`; ValueError if there is not one."""
    found = [column for column, feature in rows.features.items() if type(feature).__name__ == kind]
    if len(found) != 1:
        listed = ", ".join(f"{column} ({type(feature).__name__})" for column, feature in rows.features.items())
        raise ValueError(f"hf:{name} has not one column of type {kind}: {printable(listed, 400)}")
    return found[0]
