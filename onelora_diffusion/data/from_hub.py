"""Data sets of the Hugging Face hub, read by the library `datasets`, an optional dependency."""

from pathlib import Path

from torch.utils.data import Dataset

from onelora_diffusion.data.images import ClassifiedImages
from onelora_diffusion.files import first_line, printable


class HubImages(Dataset):
    """(PIL image, label) of the rows of a `datasets.Dataset`."""

    def __init__(self, rows, image_column: str, labels: list[int]):
        self.rows, self.image_column, self.labels = rows, image_column, labels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int):
        image = self.rows[index][self.image_column]
        if image is None:
            raise ValueError("its row has no image")
        return image, self.labels[index]


def hub_images(asked) -> ClassifiedImages:
    """Load a data set of images and labels by its name on the hub, or from a local folder.

    Without a root folder, downloads are in the library's own cache. Without the name of a column, the only one of its
    type is taken. If labels are texts or integers, the distinct ones in sorted order are the classes. ValueError if
    the library, the data set, the split or a column is missing, or a row has no label.
    """
    name, rows = asked.name, hub_rows(asked.name, asked.root, asked.split)
    image_column = column_of_type(name, rows, "Image", asked.image_column, "--image-column")
    label_column = column_of_type(name, rows, "ClassLabel", asked.label_column, "--label-column")
    labels, names = labels_of(name, rows, label_column)
    source = HubImages(rows, image_column, labels)
    return ClassifiedImages(f"hf:{name}", source, names, asked.resolution, asked.broken, asked.split)


def labels_of(name: str, rows, column: str) -> tuple[list[int], list[str]]:
    """(the label of each row, the names of the classes); ValueError if a row has no valid label."""
    values, names = list(rows[column]), getattr(rows.features[column], "names", None)
    kinds = str | int if names is None else int
    missing = [row for row, value in enumerate(values) if value is None or names is not None and value == -1]
    if missing:
        raise ValueError(
            f"{len(missing):,} of the {len(values):,} rows of hf:{name} have no label in the column {column!r} (row "
            f"{missing[0]} has {values[missing[0]]}): save the others by the data set's own `filter`, or choose "
            "another --label-column"
        )
    wrong = next((row for row, value in enumerate(values) if not isinstance(value, kinds)), None)
    if wrong is not None:
        raise ValueError(
            f"hf:{name} has no labels in its column {column!r}: row {wrong} has {printable(repr(values[wrong]), 60)}"
        )
    if names is not None:
        return values, names
    found = sorted(set(values))
    label_of = {value: label for label, value in enumerate(found)}
    return [label_of[value] for value in values], list(map(str, found))


def hub_rows(name: str, root: str | Path | None, split: str):
    """Load a split as a `datasets.Dataset`; ValueError if the library is missing or loading fails."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"hf:{name} needs a package that is missing: pip install datasets") from None
    try:
        return datasets.load_dataset(name, split=split, cache_dir=root and str(root))
    except Exception as error:  # errors of the hub's client, the library or the system
        raise ValueError(f"hf:{name}, split {split}, does not load: {first_line(error)}") from error


def column_of_type(name: str, rows, kind: str, chosen: str | None, flag: str) -> str:
    """The chosen column, or else the only one whose feature has the type `kind`, `Image` or `ClassLabel`."""
    listed = ", ".join(f"{column} ({type(feature).__name__})" for column, feature in rows.features.items())
    if chosen is None:
        found = [column for column, feature in rows.features.items() if type(feature).__name__ == kind]
        if len(found) != 1:
            raise ValueError(
                f"hf:{name} has not one column of type {kind}: {printable(listed, 400)}; choose one by {flag}"
            )
        return found[0]
    if chosen not in rows.features:
        raise ValueError(f"hf:{name} has no column {chosen!r}: it has {printable(listed, 400)}")
    stored = type(rows.features[chosen]).__name__
    if kind == "Image" != stored:
        raise ValueError(f"hf:{name} has no images in its column {chosen!r}, but {stored}")
    return chosen
