"""KID, precision and recall, Inception Score and the extrapolation where their values are known."""

import math

import numpy as np
import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric

from onelora_diffusion.evaluation.formulas import (
    authenticity,
    density_coverage,
    extrapolate,
    gaussian_mmd,
    inception_score,
    kernel_distance,
    nearest,
    paired_similarity,
    precision_recall,
    similarity,
)
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


def test_density_and_coverage_by_hand():
    # Real images at 0, 1, ... 5 on a line, k = 2: the radii are 2, 1, 1, 1, 1, 2, and a ball has no border.
    real = torch.arange(6.0)[:, None]
    made = torch.tensor([[0.5], [2.5], [9.0]])
    # 0.5 lies in the balls of 0 and 1; 2.5 in those of 2 and 3; 9 in none.
    assert density_coverage(made, real, neighborhood=2) == (pytest.approx(4 / (2 * 3)), pytest.approx(4 / 6))
    assert density_coverage(made + 100, real, neighborhood=2) == (0, 0)
    with pytest.raises(ValueError, match="6 real images: density and coverage need more than 6"):
        density_coverage(made, real, neighborhood=6)


def test_density_and_coverage_by_all_distances_at_once():
    real, made = normal(1300, 5).double(), 1.2 * normal(700, 5, seed=1).double() + 0.3
    distances = (real[:, None] - made[None]).norm(dim=-1)
    radii = (real[:, None] - real[None]).norm(dim=-1).sort().values[:, 5]
    inside = distances < radii[:, None]
    density, coverage = density_coverage(made, real)
    assert density == pytest.approx(inside.sum(0).double().mean().item() / 5, rel=1e-12)
    assert coverage == pytest.approx(inside.any(1).double().mean().item(), rel=1e-12)


def test_inception_score_of_certain_and_of_even_guesses():
    certain = 100 * torch.eye(5).repeat(20, 1)
    assert inception_score(certain, split_size=100) == (pytest.approx(5), 0, 100)
    assert inception_score(torch.zeros(100, 5), split_size=100) == (pytest.approx(1), 0, 100)


def by_adms_evaluator(logits, size):
    """exp of the mean divergence from the mean of each split in the order of the file, the last with what is left."""
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    splits = [probabilities[first : first + size] for first in range(0, len(logits), size)]
    return [np.exp((split * np.log(split / split.mean(0))).sum(1).mean()) for split in splits]


def test_inception_score_of_splits_in_the_given_order_is_that_of_adms_evaluator():
    logits = np.random.default_rng(0).standard_normal((1100, 20))
    logits[np.arange(1100), np.arange(1100) % 20] += 6
    for size in (500, 90, 2000):
        scores = by_adms_evaluator(logits, size)
        expected = pytest.approx(np.mean(scores), rel=1e-9), pytest.approx(np.std(scores), abs=1e-9), min(size, 1100)
        assert inception_score(torch.from_numpy(logits), size, "given") == expected


def test_inception_score_of_sorted_classes_depends_on_the_order():
    sorted_classes = 100 * torch.eye(10).repeat_interleave(10, 0)  # ten splits of one class each
    assert inception_score(sorted_classes, order="given") == (pytest.approx(1), pytest.approx(0, abs=1e-9), 10)
    assert inception_score(sorted_classes, order="shuffled")[0] > 4


def test_inception_score_of_ten_shuffled_splits_is_torch_fidelitys():
    logits = normal(1003, 12)
    expected = isc_features_to_metric(logits, splits=10, rng_seed=0)
    found = inception_score(logits)
    assert found[:2] == pytest.approx(tuple(expected.values()), rel=1e-12) and found[2] == 100


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


def test_gaussian_mmd_is_the_authors_double_sum():
    """1000 (mean k(x, x') + mean k(y, y') - 2 mean k(x, y)) over all pairs, of vectors of length 1, bandwidth 10."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 5)), rng.normal(size=(4, 5)) + 1
    a, b = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (x, y))

    def mean(first, second):
        return np.mean([[math.exp(-np.sum((p - q) ** 2) / (2 * 10**2)) for q in second] for p in first])

    expected = 1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b))
    found = gaussian_mmd(torch.from_numpy(x), torch.from_numpy(3 * y))  # lengths do not count
    assert found == pytest.approx(expected, rel=1e-9) and expected > 1
    assert gaussian_mmd(torch.from_numpy(x), torch.from_numpy(x)) == pytest.approx(0, abs=1e-9)


def test_similarity_is_with_the_images_of_the_own_group():
    generated, real = torch.tensor([[1.0, 0], [0, 2]]), torch.tensor([[3.0, 0], [0, 1], [1, 1]])
    half = 0.5**0.5
    assert similarity(generated, real) == pytest.approx((1 + 0 + half + 0 + 1 + half) / 6)
    assert similarity(generated, real, ["a", "b"], ["a", "b", "b"]) == pytest.approx((1 + (1 + half) / 2) / 2)
    assert paired_similarity(generated, real[[2, 1]]) == pytest.approx((half + 1) / 2)
    values, indices = nearest(generated, real)
    assert values.tolist() == pytest.approx([1, 1]) and indices.tolist() == [0, 1]


def test_authenticity_counts_images_that_are_no_copies():
    real = torch.tensor([[0.0], [10], [11]])
    # 0.5 is nearer to 0 than 0 is to 10; 12.5 is farther from 11 than 11 is from 10; 10.2 is nearer to 10 than 11 is.
    assert authenticity(torch.tensor([[0.5], [12.5], [10.2], [-11]]), real) == pytest.approx(2 / 4)
    with pytest.raises(ValueError, match="authenticity needs two or more"):
        authenticity(real, real[:1])
