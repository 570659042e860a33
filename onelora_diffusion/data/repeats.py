"""How often images count in an epoch: by folders `N_name`, as kohya's scripts read them, or by a column of a table."""

import re
from collections.abc import Sequence

from onelora_diffusion.files import printable

MOST = 10_000  # most times that an image counts; a larger number is rather a date
NUMBERED = re.compile(r"([0-9]+)_")


def checked_repeats(number: object, named: str) -> int:
    """A number of times, from a column or a name; ValueError unless it is a whole number from 1 to `MOST`."""
    text = str(number).strip()
    if not re.fullmatch("[0-9]{1,5}", text) or not 1 <= int(text) <= MOST:
        raise ValueError(f"{named} repeats {printable(repr(number), 40)} times: give a whole number from 1 to {MOST}")
    return int(text)


def repeats_by_folder(names: Sequence[str]) -> list[int]:
    """How often each image counts: N below a folder `N_name`, the nearest one, else once; ValueError if none is so."""
    folders = [numbered_folder(name) for name in names]
    if not any(folders):
        raise ValueError("--repeats-by-folder finds no folder named like 3_cats, for images that count three times")
    return [
        checked_repeats(NUMBERED.match(folder)[1], f"the folder {printable(folder, 100)}") if folder else 1
        for folder in folders
    ]


def numbered_folder(name: str) -> str | None:
    """The folder `N_name` that is nearest above an image, given by its path, if there is one."""
    *folders, _ = name.split("/")
    return next((folder for folder in reversed(folders) if NUMBERED.match(folder)), None)
