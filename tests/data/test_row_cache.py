import errno
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from onelora_diffusion.data.row_cache import RowCache, build_rows, is_whole, split

# Seven rows in three files, not in their order: row n is n times [1, 2] and n times a square of ones.
SHARDS = [np.array([0, 4, 2]), np.array([6]), np.array([1, 3, 5])]
NAMES = [f"shard-0000{number}.safetensors" for number in range(3)]


def encode(batches):
    for batch in batches:
        numbers = torch.from_numpy(batch).float()
        yield {"pair": numbers[:, None] * torch.tensor([1, 2]), "square": numbers[:, None, None] * torch.ones(2, 2)}


def build(parent, encode=encode, **arguments):
    return build_rows(parent, "hf:some/rows", {"of": "numbers"}, SHARDS, encode, batch_size=2, **arguments)


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("shard"))


def counting(batches):
    """Encodes, and remembers what it was asked for."""
    counting.rows += [batch.tolist() for batch in batches]
    return encode(batches)


@pytest.fixture(autouse=True)
def nothing_counted():
    counting.rows = []


def test_rows_are_found_wherever_they_lie(tmp_path):
    folder = build(tmp_path, counting)
    assert folder.name.startswith("hf-some-rows-") and names(folder) == NAMES
    assert counting.rows == [[0, 4], [2], [6], [1, 3], [5]]  # batches do not cross files
    cache = RowCache(folder, SHARDS)
    assert len(cache) == 7
    for number in range(7):
        row = cache.row(number)
        assert torch.equal(row["pair"], number * torch.tensor([1.0, 2.0]))
        assert torch.equal(row["square"], torch.full((2, 2), float(number)))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux alone lists what is mapped")
def test_rows_stay_in_their_files(tmp_path):
    cache = RowCache(build(tmp_path), SHARDS)
    assert len(cache) == 7
    mapped = Path("/proc/self/maps").read_text()
    assert all(str(path) in mapped for path in tmp_path.glob("*/shard-*"))


def test_what_is_there_is_kept_and_what_is_damaged_is_encoded_again(tmp_path):
    folder, said = build(tmp_path), []
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    build(tmp_path, counting, report=said.append)
    assert (counting.rows, said) == ([], [])
    for damage in (lambda content: content[:-1] + b"\1", lambda content: content[:20], lambda content: b""):
        (folder / NAMES[2]).write_bytes(damage(before[NAMES[2]]))
        build(tmp_path, counting, report=said.append)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert counting.rows == [[1, 3], [5]] * 3
    assert said == [f"{folder / NAMES[2]} is damaged: its rows are encoded again"] * 3


def test_a_build_that_is_stopped_goes_on_where_it_was(tmp_path):
    asked = iter([False, False, False, True])
    folder = build(tmp_path, is_stopped=lambda: next(asked))
    assert names(folder) == NAMES[:2]
    build(tmp_path, counting)
    assert counting.rows == [[1, 3], [5]] and names(folder) == NAMES


def test_kill_9_leaves_whole_files_and_the_next_build_goes_on(tmp_path):
    def killed(batches):
        for number, encoded in enumerate(encode(batches)):
            if number == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            yield encoded

    if not (child := os.fork()):
        torch.set_num_threads(1)
        build(tmp_path, killed)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (folder,) = tmp_path.iterdir()
    assert names(folder) == NAMES[:2] and all(is_whole(folder / name) for name in NAMES[:2])
    assert build(tmp_path, counting) == folder
    assert counting.rows == [[1, 3], [5]]


def test_kill_9_while_a_file_is_written_leaves_nothing_beside_it(tmp_path, monkeypatch):
    def killed(path, target):
        if path.name.startswith(f".{NAMES[1]}"):
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(path, target)

    if not (child := os.fork()):
        replace = os.replace
        monkeypatch.setattr(os, "replace", killed)
        build(tmp_path)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (folder,) = tmp_path.iterdir()
    assert names(folder) == NAMES[:1] and any(path.name.endswith(".part") for path in folder.iterdir())
    build(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["inputs.json", *NAMES]


def test_processes_share_the_files_at_the_same_time(tmp_path):
    children = []
    for process in range(2):
        if not (child := os.fork()):
            torch.set_num_threads(1)
            build(tmp_path / "shared", process_index=process, num_processes=2)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    alone = build(tmp_path / "alone")
    (folder,) = (tmp_path / "shared").iterdir()
    assert folder.name == alone.name
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in alone.iterdir()
    }
    one = build(tmp_path / "one", counting, process_index=1, num_processes=2)
    assert names(one) == [NAMES[1]] and counting.rows == [[6]]


def test_a_full_disk_names_the_file_and_leaves_whole_ones(tmp_path, monkeypatch):
    write = Path.write_bytes

    def full(path, content):
        if NAMES[1] in path.name:
            write(path, content[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    with monkeypatch.context() as patch, pytest.raises(OSError, match=f"No space left on device: '.*/{NAMES[1]}'"):
        patch.setattr(Path, "write_bytes", full)
        build(tmp_path)
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["inputs.json", NAMES[0]]


def test_what_is_not_finite_is_named_and_not_kept(tmp_path):
    def overflowing(batches):
        for encoded in encode(batches):
            encoded["square"][encoded["pair"][:, 0] == 3] = float("inf")
            yield {name: tensor.half() for name, tensor in encoded.items()}

    with pytest.raises(ValueError, match="square of row 3 is not finite in torch.float16: encode in float32"):
        build(tmp_path, overflowing)
    (folder,) = tmp_path.iterdir()
    assert names(folder) == NAMES[:2]


def test_splits_are_of_a_size_and_the_last_is_what_is_left():
    assert split(range(7), 3) == [range(0, 3), range(3, 6), range(6, 7)] and split([], 3) == []
