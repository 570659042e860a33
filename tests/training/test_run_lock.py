import json
import os
import signal
import time
from pathlib import Path

import pytest

from onelora_diffusion.training import run_lock
from onelora_diffusion.training.run_lock import RunLock
from onelora_diffusion.training.stopping import Clock


@pytest.fixture
def holder(accelerator, tmp_path, monkeypatch):
    """A process that holds `tmp_path / "run"`, with 100 seconds before it, and has one that loads images."""
    monkeypatch.setattr(run_lock, "BEAT", 0.01)
    if not (child := os.fork()):
        with RunLock(tmp_path / "run", accelerator) as folder:
            clock = Clock()
            clock.resume(100.0)
            with folder.counting(clock):
                if not os.fork():
                    (tmp_path / "loader").write_text(str(os.getpid()))
                    (tmp_path / "run" / "metrics.jsonl").touch()
                time.sleep(600)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.01)
    yield child
    for process in (child, int((tmp_path / "loader").read_text())):
        os.kill(process, signal.SIGKILL)


def test_a_second_run_in_one_folder_is_refused_and_the_first_is_named(accelerator, holder, tmp_path):
    with pytest.raises(OSError, match=f"run is in use by process {holder} on .*choose another --output-dir"):
        RunLock(tmp_path / "run", accelerator)
    with RunLock(tmp_path / "other", accelerator) as folder:
        assert folder.seconds == 0


def test_a_killed_run_leaves_no_lock_and_its_time_is_counted(accelerator, holder, tmp_path):
    time.sleep(0.3)
    os.kill(holder, signal.SIGKILL)
    os.waitid(os.P_PID, holder, os.WEXITED | os.WNOWAIT)
    with RunLock(tmp_path / "run", accelerator) as folder:
        assert 100.2 < folder.seconds < 160
        clock = Clock()
        clock.resume(folder.seconds)
        with folder.counting(clock):
            pass
        counted = json.loads((tmp_path / "run" / "clock.json").read_text())
    assert folder.seconds <= counted["seconds"] < folder.seconds + 60 and counted["process"] == os.getpid()


def test_a_start_that_writes_nothing_leaves_nothing_and_an_older_clock_alone(accelerator, tmp_path):
    with RunLock(tmp_path / "runs" / "new", accelerator):
        assert (tmp_path / "runs" / "new" / "clock.json").exists()
    assert not (tmp_path / "runs").exists()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "clock.json").write_text('{"seconds": 7.5}')
    with RunLock(tmp_path / "old", accelerator) as folder:
        assert folder.seconds == 7.5
    assert json.loads((tmp_path / "old" / "clock.json").read_text())["seconds"] == 7.5


@pytest.mark.parametrize("content", ["", "null", "7", '{"seconds": null}', '{"seconds": -1}', "{", "\0" * 512])
def test_a_damaged_clock_counts_nothing(accelerator, tmp_path, content):
    (tmp_path / "clock.json").write_text(content)
    (tmp_path / "settings.json").touch()
    with RunLock(tmp_path, accelerator) as folder:
        assert folder.seconds == 0
    assert json.loads((tmp_path / "clock.json").read_text())["seconds"] == 0


def test_a_folder_that_cannot_be_written_is_refused(accelerator, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="--output-dir .*/file is a file"):
        RunLock(tmp_path / "file", accelerator)
    with pytest.raises(OSError, match="Not a directory"):
        RunLock(tmp_path / "file" / "run", accelerator)

    def refuse(*arguments, **keywords):
        raise PermissionError(13, "Permission denied", str(tmp_path / "closed"))

    monkeypatch.setattr(Path, "mkdir", refuse)  # the tests may run as root, whom no folder is closed to
    with pytest.raises(OSError, match="Permission denied: .*closed"):
        RunLock(tmp_path / "closed", accelerator)
