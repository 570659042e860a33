"""An update as train_dit.py makes it, by the same calls, for what is measured and checked of a step."""

import torch
from diffusers import DDIMScheduler
from torch import nn

from onelora_diffusion.diffusion import training_losses
from onelora_diffusion.injection.verbs import adapter_state_dict
from onelora_diffusion.training.ema import ExponentialMovingAverage
from onelora_diffusion.training.metrics import LossWindow
from onelora_diffusion.training.optimizers import make_optimizer
from onelora_diffusion.training.randomness import draw_step
from onelora_diffusion.training.weighting import min_snr_weights


class Update:
    """Call it to train a DiT with an adapter on one batch: draws, losses, backward, clipping, optimiser, averages.

    Args:
        model: the latents come to it in its own precision, as under autocast.
    """

    def __init__(self, model: nn.Module, device: torch.device, batch: int = 4):
        self.model, self.device, self.batch, self.step = model, device, batch, 0
        self.scheduler = DDIMScheduler(clip_sample=False)
        self.trained = adapter_state_dict(model)
        self.optimizer = make_optimizer("adamw", self.trained, 1e-3)
        self.average = ExponentialMovingAverage(self.trained, 0.999)
        self.losses = LossWindow()
        self.shape = (model.config.in_channels, *[model.config.sample_size] * 2)
        self.moments = torch.ones(batch, 2, *self.shape, device=device)
        self.labels = torch.zeros(batch, dtype=torch.long, device=device)

    def __call__(self) -> None:
        draws = draw_step(0, self.step, self.batch, self.shape, 1000, 0.1).rows(slice(self.batch), self.device)
        x_start, latents, class_labels = draws.shown(self.moments, self.labels, self.scheduler, null_label=3)
        output = self.model(latents.to(self.model.dtype), timestep=draws.timesteps, class_labels=class_labels).sample
        losses = training_losses(output, x_start, draws.noise, draws.timesteps, self.scheduler)
        weights = min_snr_weights(draws.timesteps, self.scheduler, 5.0)
        losses["loss"] = losses["loss"] + (weights - 1) * losses["mse"]
        losses["loss"].mean().backward()
        nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.average.update(self.step)
        self.losses.add({name: loss.mean() for name, loss in losses.items()})
