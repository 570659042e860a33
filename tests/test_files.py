import errno
import os
import platform
import signal
from pathlib import Path

import pytest

from benchmarks.folders import folder_written_beside
from onelora_diffusion import files
from onelora_diffusion.files import check_writable, write_bytes, written_beside


def full(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_is_replaced_in_one_go_with_the_rights_of_any_file(tmp_path):
    path = tmp_path / "a.bin"
    write_bytes(path, b"one")
    with written_beside(path) as part:
        part.write_bytes(b"two")
        part.chmod(0o600)
        assert path.read_bytes() == b"one" and part.parent == tmp_path
    other = tmp_path / "other"
    other.touch()
    assert path.read_bytes() == b"two" and path.stat().st_mode == other.stat().st_mode
    assert sorted(tmp_path.iterdir()) == [path, other]


def test_a_full_disk_names_the_file_and_leaves_what_was_there_and_nothing_beside(tmp_path, monkeypatch):
    path, folder = tmp_path / "a.bin", tmp_path / "folder"
    write_bytes(path, b"one")
    with monkeypatch.context() as patch, pytest.raises(OSError) as caught:
        patch.setattr(Path, "write_bytes", full)
        write_bytes(path, b"two")
    assert caught.value.errno == errno.ENOSPC and str(caught.value).endswith(f"No space left on device: '{path}'")
    with pytest.raises(OSError, match=f"No space left on device: '{folder}'"), folder_written_beside(folder) as part:
        (part / "first").write_bytes(b"1")
        full()
    assert path.read_bytes() == b"one" and list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    for number in (1, 2):
        with folder_written_beside(tmp_path / "folder") as part:
            (part / f"{number}").touch()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["folder", "folder/2"]


def test_what_a_killed_process_left_goes_when_the_file_is_written_again(tmp_path):
    path = tmp_path / "a.bin"
    if not (child := os.fork()):
        with written_beside(path) as part:
            part.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (left,) = tmp_path.iterdir()
    living = f"{platform.node()}-{files.process_space()}.1"
    foreign = [
        left.with_name(f".a.bin.{where}.part") for where in (living, "elsewhere.99", f"{platform.node()}.99999999")
    ]
    for each in foreign:
        each.touch()
    write_bytes(path, b"whole")
    assert set(tmp_path.iterdir()) == {path, *foreign}


def test_containers_of_one_name_leave_each_others_files_alone(tmp_path, monkeypatch):
    """Each numbers its own processes: the other's number may be nobody's here, or this process's own."""
    path = tmp_path / "a.bin"
    with written_beside(path) as part:
        part.write_bytes(b"one")
        with monkeypatch.context() as patch:
            patch.setattr(files, "process_space", lambda: 1)
            for process in (os.getpid(), 2**22 + 1):
                patch.setattr(os, "getpid", lambda process=process: process)
                write_bytes(path, b"other")
                assert path.read_bytes() == b"other" and part.read_bytes() == b"one"
    assert path.read_bytes() == b"one" and list(tmp_path.iterdir()) == [path]


def busy(*arguments):
    raise OSError(errno.EBUSY, "Device or resource busy")


def test_links_and_mount_points_get_what_is_written(tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    (disk / "folder").mkdir(parents=True)
    (disk / "folder" / "old").touch()
    (disk / "a.bin").touch()
    (tmp_path / "a.bin").symlink_to(disk / "a.bin")
    (tmp_path / "folder").symlink_to(disk / "folder")
    write_bytes(tmp_path / "a.bin", b"through the link")
    with folder_written_beside(tmp_path / "folder") as part:
        (part / "new").touch()
    assert (disk / "a.bin").read_bytes() == b"through the link" and (tmp_path / "a.bin").is_symlink()
    assert [path.name for path in (disk / "folder").iterdir()] == ["new"] and (tmp_path / "folder").is_symlink()

    monkeypatch.setattr(os, "replace", busy)  # as the system says of a file, and of a folder, that is mounted
    monkeypatch.setattr(os, "rename", busy)
    monkeypatch.setattr(os, "rmdir", busy)
    write_bytes(disk / "a.bin", b"mounted")
    assert (disk / "a.bin").read_bytes() == b"mounted"
    (disk / "folder" / "new").unlink()
    monkeypatch.setattr("shutil.rmtree", lambda path, ignore_errors: [each.unlink() for each in path.iterdir()])
    with folder_written_beside(disk / "folder") as part:
        (part / "newest").write_bytes(b"mounted")
    assert (disk / "folder" / "newest").read_bytes() == b"mounted"


def test_a_place_where_no_file_can_be_put_is_known_before_the_work(tmp_path, monkeypatch):
    check_writable(tmp_path / "deep" / "new" / "a.json")
    assert not (tmp_path / "deep").exists()
    (tmp_path / "file").touch()
    for place, reason in (
        (tmp_path, "is no file that can be replaced"),
        (Path(os.devnull), "is no file that can be replaced"),
        (tmp_path / "file" / "a.json", "cannot be written, for '.*file' is no folder"),
    ):
        with pytest.raises(OSError, match=reason):
            check_writable(place)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root, who may write anywhere
    with pytest.raises(OSError, match="is no folder that can be"):
        check_writable(tmp_path / "deep" / "a.json")
