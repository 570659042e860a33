import errno
import os
import signal
from pathlib import Path

import pytest
import torch

from onelora_diffusion import files
from onelora_diffusion.training.checkpoints import load_newest_checkpoint, read_checkpoint, save_checkpoint


def save(folder, step, keep=2, seconds=0.0):
    return save_checkpoint(folder, step, {"trained.b": torch.full((3,), float(step))}, {"seconds": seconds}, keep)


def test_what_is_saved_is_loaded(tmp_path):
    tensors = {"trained.b": torch.randn(4), "exp_avg.b": torch.randn(2, 3), "step.b": torch.tensor(7.0)}
    path = save_checkpoint(tmp_path / "new" / "checkpoints", 7, tensors, {"seconds": 1.5, "window": []}, keep=1)
    loaded = load_newest_checkpoint(path.parent)
    assert (loaded.path, loaded.step, loaded.state) == (path, 7, {"seconds": 1.5, "window": []})
    assert loaded.tensors.keys() == tensors.keys()
    assert all(torch.equal(loaded.tensors[name], tensors[name]) for name in tensors)


def test_the_newest_are_kept(tmp_path):
    for step in (5, 10, 15, 1000):
        save(tmp_path, step, keep=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "step-00000015.safetensors",
        "step-00001000.safetensors",
    ]
    assert load_newest_checkpoint(tmp_path).step == 1000


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def change_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def replace(old, new):
    return lambda path: path.write_bytes(path.read_bytes().replace(old, new, 1))


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        change_a_bit,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:20]),
        lambda path: path.write_bytes(b"null"),
        replace(b'step\\": 2', b'step\\": 9'),
        replace(b"seconds", b"secnods"),
        lambda path: (path.unlink(), path.mkdir()),
    ],
)
def test_a_damaged_newest_is_reported_and_the_one_before_used(tmp_path, damage):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    whole = path.read_bytes()
    damage(path)
    assert path.is_dir() or path.read_bytes() != whole
    reports = []
    assert load_newest_checkpoint(tmp_path, reports.append).step == 1
    assert len(reports) == 1 and "step-00000002.safetensors is damaged" in reports[0]
    if path.is_dir():
        path.rmdir()
    save(tmp_path, 2)  # the run comes by again
    assert load_newest_checkpoint(tmp_path, pytest.fail).step == 2


def test_no_bit_of_a_checkpoint_can_change_in_silence(tmp_path):
    path = save(tmp_path, 2, seconds=8.25e-5)
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="it is not what was written"):
            read_checkpoint(path)
    path.write_bytes(content)
    assert read_checkpoint(path).step == 2


def test_a_step_under_another_ones_name_is_refused(tmp_path):
    other = save(tmp_path, 110).rename(tmp_path / "step-00000910.safetensors")
    with pytest.raises(ValueError, match="its state is of another step"):
        read_checkpoint(other)


def test_no_checkpoint_is_none_but_only_damaged_ones_are_an_error(tmp_path):
    assert load_newest_checkpoint(tmp_path / "nowhere") is None
    cut(save(tmp_path, 1))
    with pytest.raises(ValueError, match="none of the 1 checkpoints in .* can be read"):
        load_newest_checkpoint(tmp_path, lambda report: None)


def test_saving_a_step_again_updates_its_clock(tmp_path):
    save(tmp_path, 4, seconds=1.0)
    save(tmp_path, 4, seconds=2.0)
    assert load_newest_checkpoint(tmp_path).state["seconds"] == 2.0


def test_a_full_disk_leaves_the_last_good_checkpoint_and_no_rest(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device: '.*step-00000002.safetensors'"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.safetensors"]
    assert load_newest_checkpoint(tmp_path).step == 1


CALLS = ["touch", "write_bytes", "chmod", "fsync", "replace", "unlink"]


def kill_before_call(number):
    """Makes this process kill itself at its n-th call that changes the disk."""
    calls = iter(range(1, 1000))

    def wrap(owner, name):
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, counted)

    for owner in (Path, os):
        for name in CALLS:
            if hasattr(owner, name):
                wrap(owner, name)


def test_kill_9_anywhere_in_a_save_leaves_a_whole_checkpoint(tmp_path):
    save(tmp_path, 1, keep=1)
    for number in range(1, 100):
        if not (child := os.fork()):
            kill_before_call(number)
            save(tmp_path, 1 + number, keep=1)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        newest = load_newest_checkpoint(tmp_path, pytest.fail)
        assert newest.tensors["trained.b"][0] == newest.step
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert number > 6 and newest.step == 1 + number
    save(tmp_path, 500, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000500.safetensors"]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    flushed, replace = [], os.replace

    def replace_when_flushed(source, target):
        assert flushed == [source]
        replace(source, target)

    monkeypatch.setattr(files, "flush_to_disk", flushed.append)
    monkeypatch.setattr(files.os, "replace", replace_when_flushed)
    save(tmp_path, 1)
    assert load_newest_checkpoint(tmp_path).step == 1
