"""Results as a table of 80 columns and as JSON."""

import io
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from onelora_diffusion.files import write_bytes

WIDTH = 80


def format_table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """Format a table with names on the left and right-aligned values; each row has as many values as `columns`."""
    name_width = max(map(len, rows))
    widths = [max(len(column), *(len(row[i]) for row in rows.values())) for i, column in enumerate(columns)]
    cells = {"": columns, **rows}
    lines = [
        "   ".join([name.ljust(name_width), *(cell.rjust(width) for cell, width in zip(row, widths, strict=True))])
        for name, row in cells.items()
    ]
    rule = "-" * max(map(len, lines))
    return "\n".join([*textwrap.wrap(title, WIDTH), rule, lines[0], rule, *lines[1:], rule])


def format_tables(title: str, names: Sequence[str], columns: Mapping[str, Sequence[str]]) -> str:
    """Format tables with a row for each name; columns that do not fit into the width go into a further table."""

    def table(title: str, part: Mapping[str, Sequence[str]]) -> str:
        rows = {name: [values[row] for values in part.values()] for row, name in enumerate(names)}
        return format_table(title, list(part), rows)

    parts: list[dict[str, Sequence[str]]] = [{}]
    for column, values in columns.items():
        if parts[-1] and max(map(len, table("", parts[-1] | {column: values}).splitlines())) > WIDTH:
            parts.append({})
        parts[-1][column] = values
    return "\n\n".join(table("" if number else title, part) for number, part in enumerate(parts))


def format_note(text: str) -> str:
    """Break a sentence of the report into lines of at most 80 characters."""
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def format_bytes(size: int) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.1f} {unit}" if unit != "B" else f"{size} B"
        size /= 1000
    return f"{size:.1f} GB"


def write_figure(path: Path, figure) -> None:
    """Write a figure of matplotlib as a PNG."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    write_bytes(path, png.getvalue())


def write_json(path: Path, results: Mapping) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, (json.dumps(results, indent=2) + "\n").encode())
