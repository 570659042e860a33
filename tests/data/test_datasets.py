import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from onelora_diffusion.data import load_dataset
from onelora_diffusion.data.images import BrokenImageError, crop_to


def write_image(path, seed, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def test_crop_at_the_same_height_is_the_central_square():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 25, 3), dtype=np.uint8)
    assert np.array_equal(np.array(crop_to(Image.fromarray(pixels), 16, 16)), pixels[:, 4:20])


def test_large_images_are_halved_by_averaging_first():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    means = pixels.reshape(8, 4, 8, 4, 3).mean((1, 3))
    assert np.abs(np.array(crop_to(Image.fromarray(pixels), 8, 8)) - means).max() < 2  # two halvings, each rounded


@pytest.mark.parametrize("size", [(64, 48), (31, 200), (8, 9)])
def test_crops_are_square_at_every_size(size):
    assert crop_to(Image.new("L", size), 16, 16).size == (16, 16)


def test_image_folder_carries_class_names_and_scales_to_minus_one_and_one(tmp_path):
    Image.new("RGB", (8, 8), (0, 255, 51)).save((tmp_path / "a class").mkdir() or tmp_path / "a class" / "x.png")
    write_image(tmp_path / "other" / "y.png", seed=0)
    dataset = load_dataset("imagefolder", tmp_path, resolution=8)
    assert (dataset.id2label, dataset.num_classes) == ({0: "a class", 1: "other"}, 2)
    image, label = dataset[0]
    assert label == 0 and image.dtype == torch.float32
    assert torch.allclose(image.mean((1, 2)), torch.tensor([-1.0, 1.0, -0.6]))


def test_image_folder_takes_the_split_where_there_is_one(tmp_path):
    for number, path in enumerate(["train/a/1.png", "train/a/2.png", "test/a/1.png"]):
        write_image(tmp_path / path, seed=number)
    assert [len(load_dataset("imagefolder", tmp_path, split, 8)) for split in ("train", "test")] == [2, 1]
    assert load_dataset("imagefolder", tmp_path, "test", 8).split == "test"


def test_a_split_that_is_not_there_is_an_error_and_no_class(tmp_path):
    write_image(tmp_path / "parts" / "train" / "a" / "1.png", seed=0)
    with pytest.raises(FileNotFoundError, match="no split 'test' in .*parts: there is train"):
        load_dataset("imagefolder", tmp_path / "parts", "test", 8)
    write_image(tmp_path / "whole" / "a" / "1.png", seed=0)
    assert load_dataset("imagefolder", tmp_path / "whole", resolution=8).split == ""
    with pytest.raises(FileNotFoundError, match="whole has no split 'test', nor any other"):
        load_dataset("imagefolder", tmp_path / "whole", "test", 8)


def test_a_strip_is_refused_before_it_is_enlarged(tmp_path):
    with pytest.raises(ValueError, match="60000x1 pixels are too long a strip to be cropped to 256"):
        crop_to(Image.new("L", (60000, 1)), 256, 256)
    (tmp_path / "a").mkdir()
    Image.new("RGB", (60000, 1)).save(tmp_path / "a" / "strip.png")
    with pytest.raises(BrokenImageError, match="image 0 of imagefolder is not readable: 60000x1 pixels"):
        load_dataset("imagefolder", tmp_path, resolution=256)[0]


def test_food101_reads_the_lists_of_its_splits(tmp_path):
    folder = tmp_path / "food-101"
    splits = {"train": {"apple_pie": ["1", "2"], "sushi": ["3"]}, "test": {"apple_pie": ["4"], "sushi": ["5"]}}
    for split, classes in splits.items():
        names = {name: [f"{name}/{file}" for file in files] for name, files in classes.items()}
        (folder / "meta").mkdir(parents=True, exist_ok=True)
        (folder / "meta" / f"{split}.json").write_text(json.dumps(names))
        for image in sum(names.values(), []):
            write_image(folder / "images" / f"{image}.jpg", seed=len(image))
    for root in (tmp_path, folder):
        dataset = load_dataset("food101", root, resolution=8)
        assert dataset.id2label == {0: "apple pie", 1: "sushi"}
        assert [dataset[i][1] for i in range(len(dataset))] == [0, 0, 1]
    assert len(load_dataset("food101", tmp_path, split="test", resolution=8)) == 2


@pytest.mark.parametrize(
    ("name", "root", "error", "message"),
    [
        ("food101", "empty", FileNotFoundError, "no Food-101 in .*food-101: download it"),
        ("imagefolder", "empty", FileNotFoundError, "no images in .*empty"),
        ("imagefolder", "nowhere", FileNotFoundError, "no images in .*nowhere"),
        ("imagefolder", None, ValueError, "imagefolder needs a data root"),
        ("food102", None, ValueError, "unknown dataset 'food102': choose one of digits, .*torchvision:CLASS, hf:NAME"),
    ],
)
def test_missing_data_is_one_clear_line(tmp_path, name, root, error, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(error, match=message) as caught:
        load_dataset(name, root and tmp_path / root)
    assert "\n" not in str(caught.value)


def test_a_broken_image_is_named(tmp_path):
    write_image(tmp_path / "a" / "1.png", seed=0)
    broken = tmp_path / "a" / "2.png"
    broken.write_bytes((tmp_path / "a" / "1.png").read_bytes()[:100])
    loader = DataLoader(load_dataset("imagefolder", tmp_path, resolution=8))
    with pytest.raises(BrokenImageError) as caught:
        list(loader)
    assert f"{broken} is not a readable image" in str(caught.value).splitlines()[-1]


def broken_folder(tmp_path):
    """Images 0 to 4 of one colour each, of which 1, 2 and 4 are cut."""
    paths = [tmp_path / "a" / f"{number}.png" for number in range(5)]
    for number, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
        if number in (1, 2, 4):
            path.write_bytes(path.read_bytes()[:40])
    return paths


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipped_images_are_named_once_counted_and_replaced_by_the_next(tmp_path, num_workers, capfd):
    paths = broken_folder(tmp_path)
    dataset = load_dataset("imagefolder", tmp_path, resolution=8, broken="skip")
    for _ in range(2):
        red = [(image[0, 0, 0, 0] + 1) * 127.5 for image, _ in DataLoader(dataset, num_workers=num_workers)]
        assert [round(float(value)) for value in red] == [0, 3, 3, 3, 0]
    assert dataset.broken.tolist() == [False, True, True, False, True]
    said = "".join(capfd.readouterr())
    assert all(f"skipped: {paths[number]} is not a readable image" in said for number in (1, 2, 4))
    assert num_workers or said.count("skipped: ") == 3


def test_if_all_images_are_broken_it_is_said(tmp_path):
    write_image(tmp_path / "a" / "1.png", seed=0)
    (tmp_path / "a" / "1.png").write_bytes(b"cut")
    with pytest.raises(BrokenImageError, match="none of the 1 images of imagefolder can be read"):
        load_dataset("imagefolder", tmp_path, resolution=8, broken="skip")[0]


def test_digits_choose_their_classes():
    assert load_dataset("digits", resolution=8, classes=(0, 3)).id2label == {0: "0", 1: "3"}
    with pytest.raises(ValueError, match="classes of 'food101' cannot be chosen"):
        load_dataset("food101", classes=(0, 3))
