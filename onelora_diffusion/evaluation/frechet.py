"""The Fréchet distance between two sets of images, from the mean and covariance of their features."""

import torch
from torch import Tensor

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
