"""Domain guidance that is trained in (DogFit, Bahram et al., AAAI 2026), so that sampling takes one pass.

The target of a prediction is that of domain guidance of strength w, from the base without condition to the model,

    ε' = ε + (w − 1) · sg(ε_θ(x_t, c) − ε_base(x_t)),

where sg stops the gradient. It is used late in training and, if wanted, at low noise alone.
"""

import torch
from torch import Tensor

from onelora_diffusion.training.randomness import StepDraws
from onelora_diffusion.training.settings import RunSettings


def guidance_excess(settings: RunSettings, step: int, draws: StepDraws, num_timesteps: int) -> Tensor:
    """w − 1 of each sample, (samples,): 0 before the start, for noise above the cut-off, and without condition."""
    is_guided = (draws.timesteps < settings.guidance_cutoff * num_timesteps) & ~draws.label_drops
    if step < settings.guidance_start:
        is_guided = torch.zeros_like(is_guided)
    return (settings.trained_guidance - 1) * is_guided
