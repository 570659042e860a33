"""KID, precision and recall, Inception Score and the extrapolation where their values are known."""

import pytest
import torch

from onelora_diffusion.evaluation.companions import extrapolate, inception_score, kernel_distance, precision_recall
from onelora_diffusion.evaluation.statistics import FeatureStatistics


def normal(count, width=8, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_kid_is_zero_for_one_distribution_and_grows_with_a_shift():
    same, spread = kernel_distance(normal(500), normal(500, seed=1), subset_size=200)
    near, _ = kernel_distance(normal(500), normal(500, seed=1) + 0.5, subset_size=200)
    far, _ = kernel_distance(normal(500), normal(500, seed=1) + 1, subset_size=200)
    assert abs(same) < 3 * spread and 10 * abs(same) < near < far


def test_kid_of_two_points_by_hand():
    # k(x, y) = (xy + 1)³ of the sets {0, 1} and {2, 3}, unbiased within, all pairs between
    within = 1.0 + 7.0**3
    between = (1 + 1 + 27 + 64) / 4
    found, spread = kernel_distance(torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [3.0]]))
    assert found == pytest.approx(within - 2 * between) and spread == 0


def test_precision_and_recall_of_separate_and_contained_sets():
    real = normal(300)
    assert precision_recall(real + 100, real) == (0, 0)
    assert precision_recall(real, real) == (1, 1)
    precision, recall = precision_recall(real[:20] * 0.1, real)
    assert precision == 1 and recall < 0.2


def test_inception_score_of_certain_and_of_even_guesses():
    certain = 100 * torch.eye(5).repeat(20, 1)
    assert inception_score(certain, splits=1) == (pytest.approx(5), 0)
    assert inception_score(torch.zeros(100, 5), splits=1) == (pytest.approx(1), 0)


def test_extrapolation_takes_out_the_bias_of_few_images():
    width = 20
    reference = FeatureStatistics(torch.zeros(width).double(), torch.eye(width).double(), 10**9)
    found = extrapolate(normal(2000, width), reference, counts=[250, 500, 1000, 2000])
    assert found.counts == [250, 500, 1000, 2000] and found.distances == sorted(found.distances, reverse=True)
    assert abs(found.limit) < found.distances[-1] / 4 and found.r_squared > 0.98


def test_extrapolation_of_a_shift_keeps_it():
    reference = FeatureStatistics(torch.full((4,), 3.0).double(), torch.eye(4).double(), 10**9)
    found = extrapolate(normal(4000, 4), reference)
    assert found.counts == [2000, 2500, 3000, 3500, 4000]
    assert found.limit == pytest.approx(4 * 9, rel=0.05)
