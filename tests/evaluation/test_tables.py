"""A feature, a metric and a data set more are a file and a row each: the command lines follow the tables."""

import json

import numpy as np
import pytest
import torch

from onelora_diffusion.cli import eval_fid
from onelora_diffusion.cli.train_dit import RECIPES
from onelora_diffusion.data import load_dataset
from onelora_diffusion.data.table import DATASETS, DatasetKind, Defaults
from onelora_diffusion.evaluation.features import FEATURES, FeatureKind
from onelora_diffusion.evaluation.features.base import Features
from onelora_diffusion.evaluation.labels import class_frequencies
from onelora_diffusion.evaluation.metrics import GENERATED, METRICS, REAL, Metric, MetricSettings, Shown
from onelora_diffusion.evaluation.settings import parse
from onelora_diffusion.evaluation.statistics_file import load_statistics
from onelora_diffusion.training.settings import parse_command_line


class Brightness(Features):
    """The mean of all pixels, and that of the first channel."""

    name, extractor, resize, num_features = "brightness", "brightness", "none", 2

    def forward(self, images):
        images = images.double()
        return torch.stack([images.mean((1, 2, 3)), images[:, 0].mean((1, 2))], dim=1)


def largest_difference(generated, real, features, settings: MetricSettings) -> dict:
    return {"gap": (generated.kept.mean(0) - real.kept.mean(0)).abs().max().item()}


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.setitem(FEATURES, "brightness", FeatureKind(lambda resolution, weights: Brightness()))
    shown = {"gap": Shown("gap", "{gap:.2f}")}
    monkeypatch.setitem(METRICS, "gap", Metric((GENERATED, REAL), largest_difference, shown))


def run(*arguments):
    eval_fid.main(parse([str(argument) for argument in arguments], None))


def test_a_row_is_all_that_a_feature_and_a_metric_need(tables, tmp_path, capsys):
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, top, (40, 4, 4, 3), dtype=np.uint8) for top in (200, 256))
    np.savez(tmp_path / "a.npz", a)
    np.savez(tmp_path / "b.npz", b)
    files = ["calc", "--images", tmp_path / "a.npz", "--reference", tmp_path / "b.npz"]
    run(*files, "--features", "brightness", "--metrics", "gap", "limit", "--output", tmp_path / "calc.json")
    report = json.loads((tmp_path / "calc.json").read_text())
    assert report["distance_name"] == "FD(brightness)" and report["features"]["num_features"] == 2
    expected = max(abs(a.mean() - b.mean()), abs(a[..., 0].mean() - b[..., 0].mean()))
    assert report["results"]["a.npz"]["gap"] == pytest.approx(expected, rel=1e-6)
    assert f"gap(brightness) {expected:.2f}" in " ".join(capsys.readouterr().out.split())
    run("ref", "--images", tmp_path / "b.npz", "--features", "brightness", "--output", tmp_path / "b.safetensors")
    files[-1] = tmp_path / "b.safetensors"
    run(*files, "--output", tmp_path / "filed.json")  # the features that the file is of
    filed = json.loads((tmp_path / "filed.json").read_text())
    assert filed["results"]["a.npz"]["distance"] == pytest.approx(report["results"]["a.npz"]["distance"], rel=1e-9)
    with pytest.raises(SystemExit, match="b.npz' is given as statistics: --metrics gap needs the images"):
        run(*files, "--metrics", "gap")


class Shades(torch.utils.data.Dataset):
    """Two classes of grey squares, bright ones three times as often."""

    name, crop, num_classes, id2label = "shades", "none", 2, {0: "dark", 1: "bright"}

    def __init__(self, request):
        self.split, self.resolution, self.labels = request.split, request.resolution, [0, 1, 1, 1] * 5

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        value = self.labels[index] * 0.9 - 0.8 + index / 100
        return torch.full((3, self.resolution, self.resolution), value), self.labels[index]


def test_a_row_is_all_that_a_data_set_needs(tables, tmp_path, monkeypatch):
    own = Defaults(recipe="digits.yaml", resolution=8, features="brightness")
    monkeypatch.setitem(DATASETS, "shades", DatasetKind(Shades, own))
    dataset = load_dataset("shades", split="test", resolution=4)
    assert len(dataset) == 20 and dataset.split == "test" and dataset[0][0].shape == (3, 4, 4)
    run("ref", "--dataset", "shades", "--output", tmp_path / "shades.safetensors")
    filed = load_statistics(tmp_path / "shades.safetensors")
    assert (filed.origin.features, filed.origin.dataset, filed.origin.resolution) == ("brightness", "shades", 8)
    assert filed.statistics.count == 20
    assert class_frequencies(dataset, ["bright", "dark"]) == [15, 5]
    settings = parse_command_line(["--dataset", "shades"], RECIPES)
    settings.check()
    assert settings.dataset == "shades" and settings.output_dir.name == "shades"
    with pytest.raises(ValueError, match="classes of 'shades' cannot be chosen"):
        load_dataset("shades", classes=(1,))
    with pytest.raises(ValueError, match="unknown dataset 'shade': choose .* .did you mean shades"):
        load_dataset("shade")


def test_names_that_no_table_has_are_refused_with_those_that_it_has(tmp_path):
    np.savez(tmp_path / "a.npz", np.zeros((4, 4, 4, 3), np.uint8))
    files = ["calc", "--images", tmp_path / "a.npz", "--reference", tmp_path / "a.npz"]
    with pytest.raises(
        SystemExit, match="unknown features 'brightness': choose from pixels, inception, dinov2, dino,"
    ):
        run(*files, "--features", "brightness")
    with pytest.raises(SystemExit, match="--metrics gap is unknown: choose from fd, sfid, kid, mmd, precision-"):
        run(*files, "--features", "pixels", "--metrics", "gap")
    with pytest.raises(SystemExit, match="--inception-score-split is 0; it must be at least 1"):
        run(*files, "--features", "pixels", "--inception-score-split", "0")


def test_images_of_another_size_than_the_reference_and_what_is_passed_over_are_said(tables, tmp_path, capsys):
    from PIL import Image

    rng = np.random.default_rng(0)
    (tmp_path / "folder").mkdir()
    for index in range(3):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"folder/{index}.png")
        Image.fromarray(pixels).save(tmp_path / f"folder/{index}.jpg")
    (tmp_path / "folder/more").mkdir()
    Image.fromarray(pixels).save(tmp_path / "folder/more/3.png")
    for name in ("notes.txt", "._0.png", "Thumbs.db"):  # the last two are what operating systems leave there
        (tmp_path / "folder" / name).write_text("no image")
    np.savez(tmp_path / "small.npz", rng.integers(0, 256, (5, 4, 4, 3), dtype=np.uint8))
    files = ["calc", "--images", tmp_path / "folder", "--reference", tmp_path / "small.npz"]
    run(*files, "--features", "brightness")
    printed = " ".join(capsys.readouterr().out.split())
    assert "The images have 8x8 pixels, those of the reference 4x4" in printed
    assert "of which the PNG files are measured: 3 .jpg, 1 in folders, 1 .txt." in printed and "3 images" in printed
    run("calc", "--images", tmp_path / "small.npz", "--reference", tmp_path / "small.npz", "--features", "brightness")
    printed = capsys.readouterr().out
    assert "those of the reference" not in printed and "Passed over" not in printed
