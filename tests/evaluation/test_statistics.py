"""Running sums against NumPy, over processes and batches; files of statistics."""

import dataclasses

import numpy as np
import pytest
import torch
from rounding import assert_rounded
from safetensors.torch import load_file, save_file
from torch import distributed, multiprocessing

from onelora_diffusion.evaluation.features.pixels import PixelFeatures
from onelora_diffusion.evaluation.formulas import frechet_distance
from onelora_diffusion.evaluation.images import Source, share
from onelora_diffusion.evaluation.statistics import FeatureStatistics, Measured, Origin, RunningStatistics
from onelora_diffusion.evaluation.statistics_file import load_statistics, save_statistics

NUM_IMAGES = 103  # a prime: no number of processes or batch size divides it


def make_images(count=NUM_IMAGES, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def run(images, indices, batch_size):
    running = RunningStatistics(PixelFeatures(4), keep=True)
    for first in range(0, len(indices), batch_size):
        batch = list(indices[first : first + batch_size])
        running.update(batch, images[batch])
    return running.reduce(), running.gather_kept()


def test_moments_agree_with_numpy():
    images = make_images()
    found, kept = run(images, range(NUM_IMAGES), 10)
    features = images.flatten(1).numpy() / 255
    assert_rounded(found.mean, torch.from_numpy(features.mean(0)), NUM_IMAGES)
    # Products of features up to 1, less those of their means.
    covariance = torch.from_numpy(np.cov(features, rowvar=False))
    assert_rounded(found.covariance, covariance, 2 * NUM_IMAGES, size=1)
    np.testing.assert_array_equal(kept, features.astype(np.float32))
    assert found.count == NUM_IMAGES


def _process(rank, folder):
    """One of three processes; the first two also work as a pair."""
    torch.set_num_threads(1)
    reference = run_alone(make_images(seed=1))
    for world_size in (2, 3):
        if rank >= world_size:
            continue
        rendezvous = f"file://{folder}/rendezvous-{world_size}"
        distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
        for batch_size in (1, 7, 64):
            found, kept = run(make_images(), share(NUM_IMAGES, rank, world_size), batch_size)
            if rank == 0:
                distance = torch.tensor(frechet_distance(found, reference), dtype=torch.float64)
                count = torch.tensor(found.count)
                tensors = {"mean": found.mean, "kept": kept, "distance": distance, "count": count}
                save_file(tensors, f"{folder}/{world_size}-{batch_size}.safetensors")
        distributed.destroy_process_group()


def run_alone(images):
    features = PixelFeatures(4)(images)
    return FeatureStatistics(features.mean(0), torch.cov(features.T), len(images))


def test_processes_and_batches_change_nothing(tmp_path):
    multiprocessing.spawn(_process, (str(tmp_path),), nprocs=3)
    alone, reference = run_alone(make_images()), run_alone(make_images(seed=1))
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 6
    for found in map(load_file, files):
        assert found["count"] == NUM_IMAGES
        assert_rounded(found["mean"], alone.mean, NUM_IMAGES)
        assert torch.equal(found["kept"], PixelFeatures(4)(make_images()).float())
        assert found["distance"].item() == pytest.approx(frechet_distance(alone, reference), rel=1e-9)


def test_shares_hold_every_image_once():
    everyone = [index for rank in range(4) for index in share(10, rank, 4)]
    assert sorted(everyone) == list(range(10))


def test_statistics_survive_their_file(tmp_path):
    found, _ = run(make_images(), range(NUM_IMAGES), 50)
    origin = Origin.of(PixelFeatures(4), Source("noise", 4, "train", "ADM centre crop"))
    save_statistics(tmp_path / "deep" / "noise.safetensors", Measured(found, origin))
    filed = load_statistics(tmp_path / "deep" / "noise.safetensors")
    again = filed.statistics
    assert torch.equal(again.mean, found.mean) and torch.equal(again.covariance, found.covariance)
    assert again.count == NUM_IMAGES and filed.origin == origin and filed.kept is filed.spatial is None
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["noise.safetensors"]


def test_statistics_of_other_features_are_refused():
    pixels = Origin.of(PixelFeatures(4), Source("noise", 4))
    for other in ({"extractor": "pixels-8"}, {"resize": "averaged to 16x16 pixels"}):
        with pytest.raises(ValueError, match="make the statistics again with the same --features"):
            pixels.check_comparable(dataclasses.replace(pixels, **other))
    pixels.check_comparable(dataclasses.replace(pixels, dataset="other", split="test"))


def test_files_that_hold_no_statistics(tmp_path):
    with pytest.raises(FileNotFoundError, match="ref --output"):
        load_statistics(tmp_path / "none.safetensors")
    save_file({"mean": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="holds no feature statistics"):
        load_statistics(tmp_path / "foreign.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "foreign.safetensors").read_bytes()[:-3])
    with pytest.raises(ValueError, match="is damaged"):
        load_statistics(tmp_path / "cut.safetensors")
