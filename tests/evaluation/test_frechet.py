"""Distances whose values are known by hand, and those of an independent implementation."""

import numpy as np
import pytest
import scipy.linalg
import torch

from onelora_diffusion.evaluation.formulas import frechet_distance
from onelora_diffusion.evaluation.statistics import FeatureStatistics, shortage


def statistics(mean, covariance, count=1000):
    return FeatureStatistics(torch.tensor(mean).double(), torch.as_tensor(covariance).double(), count)


# A coordinate outside a covariance's range holds the square root of its rounding error.
ROOT = torch.finfo(torch.float64).eps ** 0.5


def statistics_of(features):
    return FeatureStatistics(features.mean(0), torch.cov(features.T), len(features))


def normal(count, width, seed=0, rank=None):
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(count, rank or width, generator=generator, dtype=torch.float64)
    return samples @ torch.randn(rank or width, width, generator=generator, dtype=torch.float64)


def by_scipy(first, second):
    """Heusel et al., equation 6, with scipy's matrix square root."""
    root = scipy.linalg.sqrtm((first.covariance @ second.covariance).numpy()).real
    trace = np.trace(first.covariance.numpy() + second.covariance.numpy() - 2 * root)
    return float((first.mean - second.mean).square().sum()) + trace


def test_equal_covariances_give_the_squared_mean_difference():
    covariance = torch.cov(normal(100, 4).T)
    first, second = statistics([0, 0, 0, 0], covariance), statistics([1, 2, -2, 4], covariance)
    assert frechet_distance(first, second) == pytest.approx(1 + 4 + 4 + 16, rel=ROOT)


def test_shift_of_all_features():
    features = normal(200, 6)
    assert frechet_distance(statistics_of(features), statistics_of(features + 3)) == pytest.approx(9 * 6, rel=ROOT)


def test_scale_of_all_features():
    features = normal(200, 6)
    features -= features.mean(0)
    trace = torch.cov(features.T).trace().item()  # (2 - 1)² Tr Σ
    assert frechet_distance(statistics_of(features), statistics_of(2 * features)) == pytest.approx(trace, rel=1e-10)


def test_commuting_covariances():
    first, second = (statistics([0, 0, 0], torch.diag(torch.tensor(v))) for v in ([1.0, 4.0, 9.0], [4.0, 4.0, 1.0]))
    assert frechet_distance(first, second) == pytest.approx((1 - 2) ** 2 + (2 - 2) ** 2 + (3 - 1) ** 2, rel=ROOT)


def test_rank_deficient_covariances_that_share_one_direction():
    first = statistics([0, 0, 0, 0], torch.diag(torch.tensor([4.0, 9.0, 0.0, 0.0])))
    second = statistics([0, 0, 0, 1], torch.diag(torch.tensor([1.0, 0.0, 5.0, 0.0])))
    expected = (2 - 1) ** 2 + 9 + 5 + 1
    assert frechet_distance(first, second) == pytest.approx(expected, rel=ROOT)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=ROOT)


def test_constant_images():
    first, second = statistics([1, 2], torch.zeros(2, 2)), statistics([1, 5], torch.diag(torch.tensor([2.0, 0.0])))
    assert frechet_distance(first, second) == pytest.approx(2 + 9, rel=ROOT)
    assert frechet_distance(first, first) == 0


@pytest.mark.parametrize("rank", [40, 10])
def test_a_set_against_itself(rank):
    features = normal(60, 40, rank=rank)
    total = torch.cov(features.T).trace().item()
    assert frechet_distance(statistics_of(features), statistics_of(features.flip(0))) < 1e-12 * total


def test_agrees_with_scipy():
    first, second = statistics_of(normal(300, 20)), statistics_of(normal(300, 20, seed=1) + 0.3)
    assert frechet_distance(first, second) == pytest.approx(by_scipy(first, second), rel=1e-9)


@pytest.mark.parametrize("width, count, rank", [(64, 500, 64), (64, 20, 64), (64, 500, 10), (300, 900, 300)])
def test_a_shifted_copy_is_as_far_as_the_shift(width, count, rank):
    """Σ Tr (Σ Σ)^½ takes all digits that the variances have, so that only their rounding is left."""
    features = normal(count, width, rank=rank)
    first, second = statistics_of(features), statistics_of(features + 0.01)
    rounding = torch.finfo(torch.float64).eps * width * first.covariance.trace().item()
    assert frechet_distance(first, second) == pytest.approx(width * 1e-4, abs=4 * rounding)


def test_two_halves_of_one_set_come_closer_with_their_size():
    features = normal(4000, 8)
    near, far = (
        frechet_distance(statistics_of(features[:half]), statistics_of(features[-half:])) for half in (2000, 50)
    )
    assert 0 < near < far / 10


def test_does_not_depend_on_the_order_of_few_images():
    few, others = normal(30, 100), normal(50, 100, seed=1)
    distances = [
        frechet_distance(statistics_of(few[torch.randperm(30)]), statistics_of(others.flip(0))) for _ in range(3)
    ]
    assert max(distances) - min(distances) < 1e-10 * max(distances)


def test_fewer_images_than_features_is_said():
    covariance = torch.eye(3)
    assert "3 generated images for 3 features" in shortage(statistics([0, 0, 0], covariance, count=3), "generated")
    assert shortage(statistics([0, 0, 0], covariance, count=4), "generated") is None
