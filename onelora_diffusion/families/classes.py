"""Classes by their names, which people write in their own way."""

import difflib
from collections import Counter
from collections.abc import Mapping


def find_class(wanted: str | int, classes: Mapping[int, str], owner: str) -> int:
    """The label of a class by name or number; a name wins over a number.

    Args:
        classes: names by label; several names of one class are separated by commas.
        owner: the owner of the classes, for the error.

    Raises:
        ValueError: there is no such class; the message lists similar ones.
    """
    if not isinstance(wanted, str):
        if wanted not in classes:
            last = len(classes) - 1
            raise ValueError(f"label {wanted} is none of the {len(classes)} classes of {owner}: give 0 to {last}")
        return wanted
    known = {plain(part): label for label, names in reversed(classes.items()) for part in (names, *names.split(","))}
    if plain(wanted) in known:
        return known[plain(wanted)]
    if wanted.isascii() and wanted.isdecimal() and int(wanted) in classes:
        return int(wanted)
    near = difflib.get_close_matches(plain(wanted), known, n=5) or [*list(known)[-5:][::-1], "..."]
    raise ValueError(f"no class '{wanted[:60]}' among the {len(classes)} of {owner}: there is {', '.join(near)}")


def plain(name: str) -> str:
    """A name in lower case, with underscores for spaces, by which names are compared."""
    return name.strip().casefold().replace(" ", "_")


def told_apart(id2label: Mapping[int, str], num_classes: int) -> dict[int, str]:
    """Distinct names by label: equal names get their labels appended, and a missing name is the label."""
    names = [id2label.get(label, str(label)) for label in range(num_classes)]
    counts = Counter(map(plain, names))
    return {label: name if counts[plain(name)] == 1 else f"{name} ({label})" for label, name in enumerate(names)}


def by_label(labels: Mapping[str, int]) -> dict[int, str]:
    """Invert labels by name to names by label; several names of one class are joined by commas."""
    names: dict[int, str] = {}
    for name, label in sorted(labels.items(), key=lambda item: item[1]):
        names[label] = f"{names[label]}, {name}" if label in names else name
    return names
