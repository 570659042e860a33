"""Equal data have one identity wherever they lie, and a change of any part of them is another."""

import errno
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from reading import load_captioned

from onelora_diffusion.data import identity, load_dataset
from onelora_diffusion.data.identity import data_identity, fingerprint


def write(path, seed=0, size=16):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def pets(tmp_path):
    for number in range(4):
        write(tmp_path / "pets" / ("cat", "dog")[number % 2] / f"{number}.bmp", number)
    return tmp_path / "pets"


def of_classes(root):
    return load_dataset("imagefolder", root, resolution=8)


def of_captions(root, prompt="x"):
    data = load_captioned(root, prompt, resolution=16)
    return data.dataset, data.captions


def identities(root, prompt="x"):
    return data_identity(of_classes(root)), data_identity(*of_captions(root, prompt))


def test_a_copy_elsewhere_is_the_same_data_and_a_relative_path_the_same_cache(pets, tmp_path, monkeypatch):
    before = identities(pets)
    assert before[0][:3] == ("imagefolder", 4, ["cat", "dog"]) and before[1][:3] == ("pets", 4, None)
    shutil.copytree(pets, tmp_path / "elsewhere" / "pets", copy_function=shutil.copyfile)  # at another time
    for path in (tmp_path / "elsewhere").rglob("*.bmp"):
        os.utime(path, (1, 1))
    assert identities(tmp_path / "elsewhere/pets") == before

    caches = fingerprint(of_classes(pets)), fingerprint(of_captions(pets)[0])
    monkeypatch.chdir(tmp_path)
    assert (fingerprint(of_classes("pets")), fingerprint(of_captions("pets")[0])) == caches
    (pets / ".DS_Store").write_text("x")  # changes the time of the folder
    monkeypatch.chdir(pets)
    assert fingerprint(of_classes(".")) == caches[0] == fingerprint(of_classes("../pets"))
    assert data_identity(of_classes(".")) == before[0]


def replace_and_keep_time(path, other):
    status = path.stat()
    shutil.copyfile(other, path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size


def swap_names(one, other):
    for path in (one, other):
        os.utime(path, (10**9, 10**9))
    one.rename(one.with_name("t")), other.rename(one), one.with_name("t").rename(other)


@pytest.mark.parametrize(
    "change",
    [
        lambda pets: replace_and_keep_time(pets / "cat/0.bmp", pets / "cat/2.bmp"),
        lambda pets: swap_names(pets / "cat/0.bmp", pets / "cat/2.bmp"),
        lambda pets: (pets / "cat").rename(pets / "zebra"),
        lambda pets: (pets / "cat/0.bmp").rename(pets / "dog/0.bmp"),
        lambda pets: write(pets / "dog/9.bmp"),
        lambda pets: (pets / "dog/1.bmp").unlink(),
    ],
)
def test_any_change_of_the_data_is_another_identity_and_another_cache(pets, change):
    before = *identities(pets), fingerprint(of_classes(pets)), fingerprint(of_captions(pets)[0])
    change(pets)
    after = *identities(pets), fingerprint(of_classes(pets)), fingerprint(of_captions(pets)[0])
    assert all(one != other for one, other in zip(before, after, strict=True))


def test_captions_are_part_of_the_identity_and_of_no_cache_of_latents(pets):
    assert identities(pets, "x")[1] != identities(pets, "y")[1]
    assert fingerprint(of_captions(pets, "x")[0]) == fingerprint(of_captions(pets, "y")[0])


def test_the_middle_of_a_large_file_is_noticed_by_its_time(tmp_path):
    path = tmp_path / "a" / "large.bmp"
    write(path, size=300)
    before = fingerprint(of_classes(tmp_path)), data_identity(of_classes(tmp_path))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, (1, 1))
    assert fingerprint(of_classes(tmp_path)) != before[0] and data_identity(of_classes(tmp_path)) == before[1]


def test_a_system_that_cannot_read_now_is_said_and_a_missing_file_is_part_of_the_data(pets, monkeypatch):
    dataset = of_classes(pets)
    (pets / "cat/0.bmp").unlink()
    assert data_identity(dataset) != data_identity(of_classes(pets))

    def fail(*arguments):
        raise OSError(errno.EMFILE, "Too many open files", *arguments[:1])

    write(pets / "cat/2.bmp", 9)  # what has not changed since it was read is not read again
    monkeypatch.setattr(identity, "open", fail, raising=False)
    with pytest.raises(OSError, match="Too many open files: .*cat/2.bmp"):
        data_identity(of_classes(pets))
