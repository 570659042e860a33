"""What `make test-floors` installs is what pyproject.toml promises."""

from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

REPOSITORY = Path(__file__).parents[1]


def versions(requirements, operator: str) -> dict[str, Version]:
    """name -> its version, of requirements that have one bound each."""
    found = {}
    for requirement in map(Requirement, requirements):
        (bound,) = requirement.specifier
        assert bound.operator == operator, f"{requirement}: no {operator}"
        found[requirement.name] = Version(bound.version)
    return found


def test_every_floor_is_in_the_constraints():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    promised = [*project["dependencies"], *extras["dev"], *extras["peft"], *extras["track"], *extras["video"]]
    floors = versions([text for text in promised if not text.startswith(project["name"])], ">=")
    lines = (REPOSITORY / "constraints-floors.txt").read_text().splitlines()
    assert versions([line for line in lines if "==" in line], "==") == floors
