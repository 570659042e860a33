"""Formulas of the metrics.

All but the Fréchet distance compare images one by one, so they need all features in memory: (images, d) float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from onelora_diffusion.evaluation.statistics import FeatureStatistics


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Squared Fréchet distance of two normal distributions.

        d² = |μ₁ - μ₂|² + Tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½)

    (Dowson & Landau 1982; Heusel et al., NeurIPS 2017, equation 6.) With Σ = R Rᵀ, the trace of (Σ₁ Σ₂)^½ is the sum
    of the singular values of R₁ᵀ R₂. It needs no root of the product, which is not symmetric, and no full rank.
    """
    shift = (first.mean - second.mean).square().sum()
    cross = torch.linalg.svdvals(_root(first).T @ _root(second)).sum()
    return max((shift + first.covariance.trace() + second.covariance.trace() - 2 * cross).item(), 0.0)


def _root(statistics: FeatureStatistics) -> Tensor:
    """R (d, r) with R Rᵀ the covariance, in the r directions whose variance exceeds the rounding error."""
    variances, directions = torch.linalg.eigh(statistics.covariance)
    size = variances[-1] + statistics.mean.square().max()
    varies = variances > size * len(variances) * torch.finfo(variances.dtype).eps
    return directions[:, varies] * variances[varies].sqrt()


def kernel_distance(generated: Tensor, real: Tensor, subset_size: int = 1000, seed: int = 0) -> tuple[float, float]:
    """KID: squared MMD of a cubic kernel, mean and spread over 100 subsets (Bińkowski et al., ICLR 2018)."""
    size = min(subset_size, len(generated), len(real))
    found = kid_features_to_metric(generated, real, kid_subset_size=size, rng_seed=seed, verbose=False)
    return found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"]


def precision_recall(generated: Tensor, real: Tensor, neighborhood: int = 3) -> tuple[float, float]:
    """The share of generated images among the real ones' neighbours, and the reverse (Kynkäänniemi et al., 2019)."""
    found = prc_features_to_metric(generated, real, prc_neighborhood=neighborhood, save_cpu_ram=True, verbose=False)
    return found["precision"], found["recall"]


def density_coverage(generated: Tensor, real: Tensor, neighborhood: int = 5) -> tuple[float, float]:
    """Density and coverage: how many real neighbourhoods contain a generated image, and the share that contain any.

        density = 1/(kM) Σⱼ Σᵢ [|yⱼ - xᵢ| < rₖ(xᵢ)]        coverage = 1/N Σᵢ [minⱼ |yⱼ - xᵢ| < rₖ(xᵢ)]

    rₖ(xᵢ) is the distance of real image xᵢ to its k-th nearest real neighbour (Naeem et al., ICML 2020). ValueError if
    there are no k others.
    """
    if len(real) <= neighborhood:
        raise ValueError(f"{len(real)} real images: density and coverage need more than {neighborhood}")
    generated, real = generated.double(), real.double()
    inside, covered = 0, 0
    for block in real.split(1000):  # in blocks, since the memory of all distances grows with N²
        radii = torch.cdist(block, real).kthvalue(neighborhood + 1).values  # the nearest one is the image itself
        within = torch.cdist(block, generated) < radii[:, None]
        inside += int(within.sum())
        covered += int(within.any(dim=1).sum())
    return inside / (neighborhood * len(generated)), covered / len(real)


def similarity(
    generated: Tensor, real: Tensor, groups: Sequence[str] | None = None, real_groups: Sequence[str] | None = None
) -> float:
    """Mean cosine of each image with the real ones of its group, or with all (DreamBooth, Ruiz et al., CVPR 2023)."""
    generated, real = _unit(generated), _unit(real)
    if groups is None:
        return (generated @ real.mean(0)).mean().item()
    members = np.array(real_groups)
    means = {group: real[torch.from_numpy(members == group)].mean(0) for group in set(groups)}
    return (generated * torch.stack([means[group] for group in groups])).sum(1).mean().item()


def paired_similarity(images: Tensor, others: Tensor) -> float:
    """Mean cosine of row i with row i: of images with their prompts, or with images of the same noise."""
    return (_unit(images) * _unit(others)).sum(1).mean().item()


def nearest(generated: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """For each generated image, the largest cosine with a real one and its index, both (images,)."""
    generated, real = _unit(generated), _unit(real)
    found = [(block @ real.T).max(1) for block in generated.split(1000)]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


def authenticity(generated: Tensor, real: Tensor) -> float:
    """The share of generated images that are farther from their nearest real image than it is from another real one.

    (Alaa et al., ICML 2022, as dgm-eval has it.) Copies of training images make it small. ValueError for one image.
    """
    if len(real) < 2:
        raise ValueError("1 real image: authenticity needs two or more")
    generated, real = generated.double(), real.double()
    distances, indices = zip(*(torch.cdist(block, real).min(1) for block in generated.split(1000)), strict=True)
    near, to_real = torch.cat(indices), torch.cat(distances)
    others = torch.cat([torch.cdist(block, real).kthvalue(2, dim=1).values for block in real.split(1000)])
    return (to_real > others[near]).double().mean().item()


def gaussian_mmd(generated: Tensor, real: Tensor, bandwidth: float = 10.0, scale: float = 1000.0) -> float:
    """CMMD: the squared MMD of a Gaussian kernel on normalised features, times 1000 (Jayasumana et al., CVPR 2024).

        1000 (mean k(x, x') + mean k(y, y') - 2 mean k(x, y))        k(x, y) = exp(-|x - y|² / (2 · 10²))

    The means are over all pairs, those of an image with itself included, as in the authors' code.
    """
    generated, real = _unit(generated), _unit(real)

    def mean(first: Tensor, second: Tensor) -> float:
        blocks = (torch.exp((block @ second.T - 1) / bandwidth**2).sum().item() for block in first.split(1000))
        return sum(blocks) / (len(first) * len(second))

    return scale * (mean(generated, generated) + mean(real, real) - 2 * mean(generated, real))


def inception_score(
    logits: Tensor, split_size: int | None = None, order: str = "shuffled", seed: int = 0
) -> tuple[float, float, int]:
    """exp E KL(p(y|x) || p(y)), mean and spread over splits of the images, and the size of a split.

    (Salimans et al., NeurIPS 2016.) p(y) is the mean over a split, so that the score depends on their size (None makes
    ten), and on their order, `shuffled` or `given`, where the classes have one. ADM's evaluator takes 5,000 images as
    they follow each other, others ten shuffled splits. Logits are (images, classes).
    """
    if order == "shuffled":
        logits = logits[np.random.RandomState(seed).permutation(len(logits))]
    parts = len(logits) * np.arange(11) // 10  # as in torch-fidelity
    splits = logits.split(split_size or np.diff(parts)[np.diff(parts) > 0].tolist())
    scores = [isc_features_to_metric(split, splits=1, shuffle=False)["inception_score_mean"] for split in splits]
    return float(np.mean(scores)), float(np.std(scores)), len(splits[0])


@dataclass(frozen=True)
class Extrapolation:
    """Distances of the first N images, and the line d(N) = limit + slope / N through them."""

    counts: list[int]
    distances: list[float]
    limit: float
    slope: float
    r_squared: float


def extrapolate(generated: Tensor, reference: FeatureStatistics, counts: Sequence[int] | None = None) -> Extrapolation:
    """The distance for several N, and its limit for N to infinity by least squares in 1/N (Chong & Forsyth, 2020).

    Image i does not depend on the others, so the first N of the features (images, d) are a fair sample of N: five
    values, evenly spaced from half of the images to all. The bias that remains is the reference's own, from its count.
    """
    counts = list(counts or np.linspace(len(generated) / 2, len(generated), 5).round().astype(int).tolist())
    firsts = (generated[:count].double() for count in counts)
    statistics = (FeatureStatistics(first.mean(0), torch.cov(first.T), len(first)) for first in firsts)
    distances = [frechet_distance(each, reference) for each in statistics]
    inverse, spread = 1 / np.array(counts), np.var(distances)
    slope, limit = np.polyfit(inverse, distances, 1)
    residual = np.array(distances) - (limit + slope * inverse)
    r_squared = 1 - np.mean(residual**2) / spread if spread > 0 else 1.0
    return Extrapolation(counts, distances, float(limit), float(slope), float(r_squared))


def _unit(features: Tensor) -> Tensor:
    return normalize(features.double(), dim=1)
