"""Tables of images: metadata.jsonl or metadata.csv, as Hugging Face's image folders have them."""

import csv
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from onelora_diffusion.data.listing import is_mask
from onelora_diffusion.files import keys_once, printable

METADATA = ("metadata.jsonl", "metadata.csv")
FILE_COLUMN = "file_name"


class Table:
    """A table with a row for each image.

    FileNotFoundError if an image is missing; ValueError if the table is empty or cannot be read, lacks a column, or
    names an image twice or outside.

    Args:
        root: the folder of the data set, to which the names of images are relative.
        name: the path of the table in it; the files that it names are relative to its own folder.
        file_column: the column of the paths of images.
        columns: the other columns that are read.
    """

    def __init__(self, root: Path, name: str, file_column: str, columns: Sequence[str]):
        self.path, self.inside = root / name, os.path.dirname(name)
        self.rows: dict[
            str, tuple[dict, str]
        ] = {}  # by the name of each image: its row, and what names it in messages
        for line, row in rows_of(self.path):
            named = printable(f"line {line} of {self.path}")
            for column in (file_column, *columns):
                if column not in row:
                    listed = printable(", ".join(map(str, row)), 200) or "none"
                    raise ValueError(f"{named} has no column {column!r}: it has {listed}")
            image = self._file(row[file_column], file_column, named)
            if image in self.rows:
                raise ValueError(f"{named} names {printable(image, 200)}, which a line before it has named")
            if is_mask(image):
                raise ValueError(f"{named} names {printable(image, 200)} as an image: by its name it is a mask")
            self.rows[image] = row, named
        if not self.rows:
            raise ValueError(f"{self.path} is empty")

    def files(self, column: str) -> dict[str, str]:
        """The names of the files in a column, by those of images; rows without a value are left out."""
        return {
            image: self._file(row[column], column, named)
            for image, (row, named) in self.rows.items()
            if row[column] not in (None, "")
        }

    def column_of(self, file: str) -> str | None:
        """The first column that names a file, given by its path in the data set; None if there is none."""
        for row, _ in self.rows.values():
            for column, value in row.items():
                if isinstance(value, str) and os.path.join(self.inside, os.path.normpath(value)) == file:
                    return column
        return None

    def _file(self, file, column: str, named: str) -> str:
        if not isinstance(file, str) or not file:
            raise ValueError(f"{named} names no file: {column} is {printable(repr(file), 40)}")
        # Only the name is checked, since links to other folders are valid, as in the hub's cache.
        name = os.path.normpath(file)
        if os.path.isabs(name) or name.split(os.sep)[0] == "..":
            raise ValueError(f"{named} leaves the folder: {printable(file, 200)}")
        if not os.path.exists(self.path.parent / name):
            raise FileNotFoundError(f"{named} names {printable(name, 200)}, which is not in {self.path.parent}")
        return os.path.join(self.inside, name)


def rows_of(path: Path) -> Iterator[tuple[int, dict]]:
    """The rows of a .jsonl or .csv file with their line numbers; of any other file one `prompt` a line."""
    rows = {".jsonl": _rows_of_json, ".csv": _rows_of_csv}.get(path.suffix.lower(), _rows_of_text)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from rows(path, file)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error.reason}") from None


def _rows_of_text(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, dict]]:
    return ((number, {"prompt": line}) for number, line in enumerate(lines, 1) if line.strip())


def _rows_of_json(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=keys_once)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} of {path} is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} of {path} is no row of columns: {printable(line.strip(), 40)}")
        yield number, row


def _rows_of_csv(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, dict]]:
    rows = csv.DictReader(lines, strict=True)
    try:
        columns = rows.fieldnames or []
        if len(set(columns)) < len(columns):
            raise ValueError(f"{path} has two columns of one name: {printable(', '.join(columns), 200)}")
        for row in rows:
            if None in row or None in row.values():  # the row has too many or too few values
                raise ValueError(
                    f"line {rows.line_num} of {path} has not one value for each of {len(rows.fieldnames)} columns"
                )
            yield rows.line_num, row
    except csv.Error as error:
        raise ValueError(f"line {rows.reader.line_num} of {path} is no CSV: {error}") from None
