"""The Fréchet distance between two sets of images, from the mean and covariance of their features."""

import torch
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from onelora_diffusion.evaluation.statistics import FeatureStatistics, GivenFeatures


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Fréchet distance of two normal distributions, computed by torchmetrics' FID metric.

        d² = |μ₁ - μ₂|² + Tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½)

    (Dowson & Landau 1982; Heusel et al., NeurIPS 2017, equation 6.) Few images, or grey ones, leave covariances
    without full rank; there the square root of rounding errors, 1e-8 each, adds up over all features. So the
    distance is taken where the one of lower rank varies, plus one coordinate for all that lies outside: an
    identity, for Tr (Σ₁ Σ₂)^½ does not depend on Σ₂ outside the range of Σ₁.
    """
    (variances, basis), other = _range(first), second
    if len(_range(second)[0]) < len(variances):
        (variances, basis), other = _range(second), first

    shift = second.mean - first.mean
    inside, covariance = basis.T @ shift, basis.T @ other.covariance @ basis
    outside = (shift - basis @ inside).norm()
    variance_outside = (other.covariance.trace() - covariance.trace()).clamp(min=0)

    metric = FrechetInceptionDistance(GivenFeatures(len(inside) + 1), sync_on_compute=False)
    narrow = torch.block_diag(torch.diag(variances), torch.zeros(1, 1))
    wide = torch.block_diag(covariance, variance_outside)
    metric.update(_points(torch.zeros(len(narrow), dtype=narrow.dtype), narrow), real=True)
    metric.update(_points(torch.cat([inside, outside[None]]), wide), real=False)
    return max(metric.compute().item(), 0.0)


def _range(statistics: FeatureStatistics) -> tuple[Tensor, Tensor]:
    """Variances (r,) and directions (d, r) in which features vary by more than their sums were rounded."""
    variances, directions = torch.linalg.eigh(statistics.covariance)
    size = variances[-1] + statistics.mean.square().max()
    varies = variances > size * len(variances) * torch.finfo(variances.dtype).eps
    return variances[varies], directions[:, varies]


def _points(mean: Tensor, covariance: Tensor) -> Tensor:
    """2d points whose mean and unbiased covariance are those given: μ ± (λ (2d - 1) / 2)^½ v for each λ, v."""
    variances, directions = torch.linalg.eigh(covariance)
    steps = (directions * (variances.clamp(min=0) * (len(mean) - 0.5)).sqrt()).T
    return torch.cat([mean + steps, mean - steps])
