"""What `make test-floors` installs is what pyproject.toml promises."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


def test_every_floor_is_in_the_constraints():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    promised = project["dependencies"] + extras["dev"] + extras["peft"] + extras["track"]
    floors = dict(found.groups() for text in promised if (found := re.fullmatch(r"([\w-]+)(?:\[\w+\])?>=(.+)", text)))
    constraints = re.findall(r"^([\w-]+)==(\S+)$", (REPOSITORY / "constraints-floors.txt").read_text(), re.M)
    assert {name: re.sub(r"(\.0)+$", "", version) for name, version in constraints} == floors
