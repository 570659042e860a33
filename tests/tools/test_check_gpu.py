"""That the script runs, small and on the CPU, and that what fails is seen: what it says of a GPU needs one."""

import json

import pytest
import torch

from tools import check_gpu
from tools.check_gpu import Place, Row, Settings, checks, compared, main, run, table

PLACE = Place(torch.device("cpu"), is_rehearsal=True, compile=False)


def test_a_rehearsal_runs_every_check_that_starts_no_processes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check_gpu, "STEPS", 2)
    chosen = tuple(name for name in checks(PLACE) if name != "two processes")
    assert main(Settings(rehearse=True, only=chosen, compile=False, output=tmp_path / "gpu.json")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"device CPU, a rehearsal, torch {torch.__version__}"
    assert max(map(len, lines)) <= 100
    rows = {row["name"]: row for row in json.loads((tmp_path / "gpu.json").read_text())["rows"]}
    assert len(rows) == len(lines) - 4  # the device, an empty line, the table's head and rule
    # The CPU beside itself: the same kernels, and bf16 rounds to 8 bits.
    assert rows["gradients of dora, small"]["figure"] == rows["output of DiT-XL/2, no"]["figure"] == 0
    assert 2**-12 < rows["output of DiT-XL/2, bf16"]["figure"] < rows["output of DiT-XL/2, bf16"]["limit"]
    assert rows["values that differ in batches of 1"]["figure"] == 0
    assert rows["no waiting in an update of vera"]["figure"] is None
    assert rows["step: 1LoRA / PEFT MiSS r=1"]["figure"] > 0


def test_what_fails_is_a_row_and_ends_nothing(monkeypatch, capsys):
    def breaks(place):
        yield Row("before it", 1.0, 2.0)
        raise RuntimeError("called a synchronizing CUDA operation")

    every = {
        "a": breaks,
        "b": lambda place: iter([Row("too large", 3.0, 2.0)]),
        "c": lambda place: iter([Row("c", 1)]),
    }
    monkeypatch.setattr(check_gpu, "checks", lambda place: every)
    assert main(Settings(rehearse=True)) == 1
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[4:]]
    assert rows == [
        ["before it", "1", "2", "ok"],
        ["a", "", "", "FAIL: RuntimeError: called a synchronizing CUDA operation"],
        ["too large", "3", "2", "FAIL"],
        ["c", "1", "", "measured"],
    ]
    assert main(Settings(rehearse=True, only=("c",))) == 0


def test_differences_are_relative_to_the_largest_value_and_nan_is_none_that_passes():
    row = compared("by hand", torch.tensor([1.0, 4.5]), torch.tensor([1.25, -5.0]).abs(), 0.2)
    assert row.figure == pytest.approx(0.1) and row.is_ok
    assert not compared("nan", torch.tensor([float("nan")]), torch.ones(1), 0.2).is_ok


def test_there_are_100_columns_whatever_is_said():
    long = Row("x" * 40, 1e-300, 1e-300, note="word " * 100)
    assert max(map(len, table([long, Row("short", failed=True, note="word " * 100)]))) <= 100


def test_two_processes_are_compared_by_their_losses(monkeypatch):
    monkeypatch.setattr(check_gpu, "losses_of", lambda number, place: torch.tensor([2.0, 1.0 + (number - 1) * 0.5]))
    (row,) = run("two processes", checks(PLACE)["two processes"], PLACE)
    assert row.figure == 0.25 and not row.is_ok


def test_without_a_gpu_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(Settings()) == 1
    assert (
        capsys.readouterr().out == "check_gpu.py: no CUDA device here; --rehearse runs the checks on the CPU, small\n"
    )
