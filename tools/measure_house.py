"""Measure the house: lines by folder, the longest functions, and where code asks an adapter for its kind.

python tools/measure_house.py
"""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("onelora_diffusion", "benchmarks", "tools", "tests")

# Files that are loops over seats: a new kind of adapter changes nothing there.
BLIND = (
    *(f"onelora_diffusion/injection/{name}.py" for name in ("attaching", "merging", "routing", "combining")),
    "onelora_diffusion/storage/lora.py",
)


def main() -> None:
    print("lines by folder")
    for folder, lines in lines_by_folder().items():
        print(f"{lines:7,}  {folder}")
    print("\nlongest functions")
    for lines, where in sorted(functions(), reverse=True)[:5]:
        print(f"{lines:7,}  {where}")
    print("\ntests of kind")
    for path in BLIND:
        found = kind_tests((ROOT / path).read_text())
        print(f"{len(found):7,}  {path}{': lines ' * bool(found)}{', '.join(map(str, found))}")


def sources() -> Iterator[Path]:
    """Every Python file of the project, scripts first."""
    yield from sorted(ROOT.glob("*.py"))
    for folder in FOLDERS:
        yield from sorted((ROOT / folder).rglob("*.py"))


def lines_by_folder() -> dict[str, int]:
    lines = Counter()
    for path in sources():
        lines[str(path.parent.relative_to(ROOT))] += len(path.read_text().splitlines())
    return dict(lines)


def functions() -> Iterator[tuple[int, str]]:
    """(lines, `path: name`) of every function that is no test."""
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and "tests" not in path.parts:
                yield node.end_lineno - node.lineno + 1, f"{path.relative_to(ROOT)}: {node.name}"


def kind_tests(source: str) -> list[int]:
    """The lines of a source that ask what kind an adapter is: its class, its method's family, its path."""
    return sorted({node.lineno for node in ast.walk(ast.parse(source)) if _asks_for_kind(node)})


def _asks_for_kind(node: ast.AST) -> bool:
    if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "isinstance":
        names = {getattr(part, "id", "") for part in ast.walk(node.args[1])}
        return any(name.endswith("Adapter") or name == "ClassTable" for name in names)
    if isinstance(node, ast.Compare):
        return any(getattr(part, "id", None) == "CLASS_TABLE" for part in (node.left, *node.comparators))
    return isinstance(node, ast.Attribute) and node.attr in ("is_vector", "is_peft")


if __name__ == "__main__":
    main()
