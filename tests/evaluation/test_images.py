"""Folders and .npz files: the pixels come back as written, and bad input is named."""

import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from onelora_diffusion.data import load_dataset
from onelora_diffusion.evaluation.images import DatasetImages, FolderImages, NpzImages, open_images
from onelora_diffusion.sampling import as_uint8


def write_images(folder, count=5, size=8, mode="RGB"):
    folder.mkdir(exist_ok=True)
    arrays = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    for index, array in enumerate(arrays):
        Image.fromarray(array).convert(mode).save(folder / f"{index:03d}.png")
    return arrays


def assert_reads(images, arrays, indices):
    batches = list(images.batches(indices, batch_size=2))
    assert [index for batch, _ in batches for index in batch] == list(indices)
    np.testing.assert_array_equal(torch.cat([b for _, b in batches]).permute(0, 2, 3, 1), arrays[list(indices)])
    assert all(pixels.dtype == torch.uint8 for _, pixels in batches)


@pytest.mark.parametrize("indices", [range(5), range(1, 5, 3), range(4, 5)])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_folder_and_npz_come_back_as_written(tmp_path, indices, save):
    arrays = write_images(tmp_path / "pngs")
    save(tmp_path / "images.npz", arrays)
    for source in ("pngs", "images.npz"):
        images = open_images(tmp_path / source)
        assert len(images) == 5 and images.resolution == 8
        assert_reads(images, arrays, indices)


def test_dataset_is_rounded_to_bytes():
    digits = load_dataset("digits", resolution=8)
    (indices, pixels), *_ = DatasetImages(digits, 8).batches([3, 1], 10)
    assert indices == [3, 1]
    expected = torch.stack([(digits[index][0] + 1) * 127.5 for index in indices])
    torch.testing.assert_close(pixels.float(), expected, rtol=0, atol=0.5)


def test_to_uint8_rounds():
    assert as_uint8(torch.tensor([-1.2, -1.0, 0.0, 0.999, 1.0])).tolist() == [0, 0, 128, 255, 255]


def test_empty_folder_and_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no .png in"):
        open_images(tmp_path)
    with pytest.raises(FileNotFoundError, match="no images at"):
        open_images(tmp_path / "nowhere")


def test_grey_and_transparent_images_are_decoded_as_in_training(tmp_path):
    write_images(tmp_path, count=1, mode="L")
    (grey,) = FolderImages(tmp_path)
    assert torch.equal(grey, torch.tensor(np.array(Image.open(tmp_path / "000.png"))).expand(3, 8, 8))
    Image.new("RGBA", (8, 8), (0, 200, 0, 51)).save(tmp_path / "000.png")  # a fifth of it is seen
    assert FolderImages(tmp_path)[0].unique(dim=1)[:, 0, 0].tolist() == [204, 244, 204]


def test_mixed_sizes(tmp_path):
    write_images(tmp_path)
    Image.new("RGB", (9, 9)).save(tmp_path / "003.png")
    with pytest.raises(ValueError, match="003.png' is 9x9, but '000.png' is 8x8"):
        FolderImages(tmp_path)
    Image.new("RGB", (8, 9)).save(tmp_path / "003.png")
    with pytest.raises(ValueError, match="003.png' is 8x9, not square"):
        FolderImages(tmp_path)


def test_unreadable_images(tmp_path):
    write_images(tmp_path, size=32)
    whole = (tmp_path / "002.png").read_bytes()
    (tmp_path / "002.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="002.png' is not a readable image"):
        list(FolderImages(tmp_path).batches(range(5), 2))
    (tmp_path / "002.png").write_text("no image")
    with pytest.raises(ValueError, match="002.png' is not a readable image"):
        FolderImages(tmp_path)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"images": np.zeros((2, 8, 8, 3), np.uint8)}, "has no arr_0"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.float32)}, "arr_0 is float32"),
        ({"arr_0": np.zeros((2, 3, 8, 8), np.uint8)}, r"arr_0 is uint8 \(2, 3, 8, 8\), not uint8"),
        ({"arr_0": np.zeros((2, 8, 3), np.uint8)}, "not uint8"),
    ],
)
def test_npz_of_something_else(tmp_path, arrays, message):
    np.savez(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        NpzImages(tmp_path / "wrong.npz")


def test_damaged_npz(tmp_path):
    (tmp_path / "damaged.npz").write_bytes(b"PK not really")
    with pytest.raises(ValueError, match="damaged or no .npz"):
        NpzImages(tmp_path / "damaged.npz")


def test_images_too_large_for_memory_are_refused_unread(tmp_path):
    Image.new("1", (5000, 5000)).convert("RGB").save(tmp_path / "large.png")
    with pytest.raises(ValueError, match="large.png' has images of 5000x5000 pixels: 1 to 4096 a side"):
        FolderImages(tmp_path)
    with zipfile.ZipFile(tmp_path / "large.npz", "w") as archive, archive.open("arr_0.npy", "w") as member:
        header = {"descr": "|u1", "fortran_order": False, "shape": (3, 40_000, 40_000, 3)}
        np.lib.format.write_array_header_1_0(member, header)
    with pytest.raises(ValueError, match="large.npz' is damaged: arr_0 is"):
        NpzImages(tmp_path / "large.npz")
    np.savez_compressed(tmp_path / "wide.npz", np.zeros((1, 4097, 4097, 3), np.uint8))
    with pytest.raises(ValueError, match="4097x4097 pixels"):
        NpzImages(tmp_path / "wide.npz")


def test_large_images_are_read_a_few_at_a_time(tmp_path):
    np.savez_compressed(tmp_path / "images.npz", np.zeros((3, 2048, 2048, 3), np.uint8))
    images = NpzImages(tmp_path / "images.npz")
    assert [len(batch) for batch, _ in images.batches(range(3), 64)] == [3]
    np.savez_compressed(tmp_path / "images.npz", np.zeros((2, 4096, 4096, 3), np.uint8))
    images = NpzImages(tmp_path / "images.npz")
    assert [len(batch) for batch, _ in images.batches(range(2), 64)] == [1, 1]
