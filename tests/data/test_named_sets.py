"""Data sets by their names in torchvision and on the Hugging Face hub."""

import struct
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from onelora_diffusion.data import load_dataset
from onelora_diffusion.data.images import BrokenImageError


def write_images(folder, names, size=(12, 10)):
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", size, (0, 51 * label, 255)).save(folder / name / "1.jpg", quality=100)


def test_a_set_without_parts_is_all_train(tmp_path):
    write_images(tmp_path / "eurosat" / "2750", ["Forest", "River"])
    dataset = load_dataset("torchvision:EuroSAT", tmp_path, resolution=8)
    assert (dataset.name, dataset.id2label) == ("torchvision:EuroSAT", {0: "Forest", 1: "River"})
    image, label = dataset[1]
    assert label == 1 and torch.allclose(image.mean((1, 2)), torch.tensor([-1.0, -0.6, 1.0]), atol=0.02)
    with pytest.raises(ValueError, match="EuroSAT is one set without parts: it has the split train, not 'test'"):
        load_dataset("torchvision:EuroSAT", tmp_path, split="test", resolution=8)


def test_a_set_with_named_splits_gives_each_of_them(tmp_path):
    for split, names in {"train": ["AD", "AE"], "test": ["AD"], "valid": ["AD", "AE", "AF"]}.items():
        write_images(tmp_path / "country211" / split, names)
    lengths = [len(load_dataset("torchvision:Country211", tmp_path, split, 8)) for split in ("train", "test", "valid")]
    assert lengths == [2, 1, 3]
    with pytest.raises(ValueError, match="'no'"):
        load_dataset("torchvision:Country211", tmp_path, "no", 8)


def test_a_set_with_a_train_switch_is_read_in_grey_and_gives_rgb(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, number in (("train", 3), ("t10k", 2)):
        pixels = np.full((number, 28, 28), 255, np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 2051, *pixels.shape) + pixels.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 2049, number) + bytes(range(number)))
    assert [len(load_dataset("torchvision:FashionMNIST", tmp_path, part, 32)) for part in ("train", "test")] == [3, 2]
    dataset = load_dataset("torchvision:FashionMNIST", tmp_path, resolution=32)
    assert dataset.num_classes == 10 and dataset.id2label[9] == "Ankle boot"
    assert torch.equal(dataset[2][0], torch.ones(3, 32, 32)) and dataset[2][1] == 2


def test_a_broken_file_of_torchvision_is_named(tmp_path):
    write_images(tmp_path / "eurosat" / "2750", ["Forest", "River"])
    broken = tmp_path / "eurosat" / "2750" / "River" / "1.jpg"
    broken.write_bytes(b"cut")
    with pytest.raises(BrokenImageError, match=str(broken)):
        load_dataset("torchvision:EuroSAT", tmp_path, resolution=8)[1]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("torchvision:Flower102", ValueError, "torchvision has no data set 'Flower102': Flowers102"),
        ("torchvision:Flowers102", FileNotFoundError, "Flowers102 in .*not found or corrupted.*--download"),
        ("torchvision:EuroSAT", FileNotFoundError, "EuroSAT in .*: .*--download"),
        ("torchvision:FakeData", ValueError, "torchvision has no data set 'FakeData'"),
        ("torchvision:Kinetics", ValueError, "cannot be read by its name alone"),
    ],
)
def test_what_torchvision_cannot_give_is_one_clear_line(tmp_path, name, error, message):
    with pytest.raises(error, match=message) as caught:
        load_dataset(name, tmp_path, resolution=8)
    assert "\n" not in str(caught.value)


# Stand-ins for the classes of Hugging Face's library that the code looks at; their names are what counts.
Feature = type("Image", (), {})
ClassLabel = type("ClassLabel", (), {"names": ["cat", "dog"]})


class Rows(list):
    features = {"picture": Feature(), "animal": ClassLabel(), "width": 0}

    def __getitem__(self, key):
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


@pytest.fixture
def hub(monkeypatch):
    def load(name, split, cache_dir):
        if name != "pets/tiny":
            raise ConnectionError("Couldn't reach the hub\nand more")
        return Rows({"picture": Image.new("L", (9, 12), 255), "animal": i % 2, "width": 9} for i in range(3))

    library = types.SimpleNamespace(load_dataset=load)
    monkeypatch.setitem(sys.modules, "datasets", library)


def test_a_set_of_the_hub_finds_its_columns_and_carries_its_names(hub):
    dataset = load_dataset("hf:pets/tiny", resolution=8)
    assert (len(dataset), dataset.id2label) == (3, {0: "cat", 1: "dog"})
    image, label = dataset[1]
    assert label == 1 and torch.equal(image, torch.ones(3, 8, 8))


def test_names_of_classes_bring_no_commands_for_a_terminal(hub, monkeypatch):
    monkeypatch.setattr(ClassLabel, "names", ["c\x1b[2Jat", "dog\n"])
    assert load_dataset("hf:pets/tiny", resolution=8).id2label == {0: "c [2Jat", 1: "dog "}


def test_what_the_hub_cannot_give_is_one_clear_line(hub, monkeypatch):
    with pytest.raises(ValueError, match="hf:pets/none, split train, does not load: Couldn't reach the hub$"):
        load_dataset("hf:pets/none", resolution=8)
    monkeypatch.setattr(Rows, "features", {"picture": Feature(), "other": Feature(), "animal": ClassLabel()})
    with pytest.raises(ValueError, match="has not one column of type Image: picture"):
        load_dataset("hf:pets/tiny", resolution=8)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="hf:pets/tiny needs a package that is missing: pip install datasets"):
        load_dataset("hf:pets/tiny", resolution=8)


def hub_of(monkeypatch, features, **columns):
    """A set of the hub with these columns; those of images are named."""
    rows = Rows(dict(zip(columns, each, strict=True)) for each in zip(*columns.values(), strict=True))
    monkeypatch.setattr(Rows, "features", features)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *a, **k: rows))


WHITE, BLACK = Image.new("L", (8, 8), 255), Image.new("L", (8, 8), 0)


def test_columns_of_the_hub_can_be_chosen_and_texts_and_integers_are_labels(monkeypatch):
    features = {"image": Feature(), "mask": Feature(), "coarse": ClassLabel(), "fine": ClassLabel()}
    features |= {"text": object(), "number": object()}
    hub_of(
        monkeypatch,
        features,
        image=[BLACK] * 3,
        mask=[WHITE] * 3,
        coarse=[0, 0, 1],
        fine=[1, 0, 1],
        text=["pear", "fig", "pear"],
        number=[7, 7, 3],
    )
    for column, names, labels in (
        ("coarse", {0: "cat", 1: "dog"}, [0, 0, 1]),
        ("fine", {0: "cat", 1: "dog"}, [1, 0, 1]),
        ("text", {0: "fig", 1: "pear"}, [1, 0, 1]),
        ("number", {0: "3", 1: "7"}, [1, 1, 0]),
    ):
        dataset = load_dataset("hf:a/b", resolution=8, image_column="mask", label_column=column)
        assert dataset.id2label == names and [dataset[index][1] for index in range(3)] == labels
        assert torch.equal(dataset[0][0], torch.ones(3, 8, 8))


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (dict(), "has not one column of type Image: image .Image., mask .Image., .*; choose one by --image-column"),
        (dict(image_column="mask"), "has not one column of type ClassLabel: .*; choose one by --label-column"),
        (dict(image_column="picture"), "has no column 'picture': it has image .Image., mask"),
        (dict(image_column="minus"), "has no images in its column 'minus', but ClassLabel"),
        (dict(image_column="mask", label_column="kind"), "has no column 'kind'"),
        (
            dict(image_column="mask", label_column="minus"),
            "2 of the 3 rows .* have no label in the column 'minus' .row 1",
        ),
        (
            dict(image_column="mask", label_column="null"),
            "1 of the 3 rows .* in the column 'null' .row 2 has None.: save",
        ),
        (dict(image_column="mask", label_column="real"), "no labels in its column 'real': row 0 has 0.5"),
        (dict(image_column="mask", label_column="several"), "no labels in its column 'several': row 0 has .'a', 'b'."),
        (dict(image_column="mask", label_column="image"), "no labels in its column 'image': row 0 has <PIL"),
    ],
)
def test_columns_that_are_no_images_or_labels_are_one_clear_line(monkeypatch, chosen, message):
    features = {"image": Feature(), "mask": Feature(), "minus": ClassLabel(), "null": ClassLabel()}
    features |= {"real": object(), "several": object()}
    hub_of(
        monkeypatch,
        features,
        image=[BLACK] * 3,
        mask=[WHITE] * 3,
        minus=[0, -1, -1],
        null=[0, 1, None],
        real=[0.5] * 3,
        several=[["a", "b"]] * 3,
    )
    with pytest.raises(ValueError, match=message) as caught:
        load_dataset("hf:a/b", resolution=8, **chosen)
    assert "\n" not in str(caught.value)


def test_a_row_without_an_image_is_a_broken_image(monkeypatch):
    hub_of(monkeypatch, {"image": Feature(), "label": ClassLabel()}, image=[BLACK, None, WHITE], label=[0, 0, 1])
    with pytest.raises(BrokenImageError, match="image 1 of hf:a/b is not readable: its row has no image"):
        load_dataset("hf:a/b", resolution=8)[1]
    image, label = load_dataset("hf:a/b", resolution=8, broken="skip")[1]
    assert label == 1 and torch.equal(image, torch.ones(3, 8, 8))


def test_columns_are_refused_where_there_are_none():
    with pytest.raises(ValueError, match="--image-column x is for hf:NAME, not for digits"):
        load_dataset("digits", image_column="x")
    with pytest.raises(ValueError, match="--label-column y is for hf:NAME, not for torchvision:CIFAR10"):
        load_dataset("torchvision:CIFAR10", label_column="y")
