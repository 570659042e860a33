"""An update as the training loop makes it, by the same calls, for what is checked of one."""

import torch
from accelerate.utils import send_to_device
from diffusers import DDIMScheduler
from torch import nn

from onelora_diffusion.data.latents import sample_moments
from onelora_diffusion.diffusion import add_noise, model_timesteps, training_losses
from onelora_diffusion.families.arguments import on
from onelora_diffusion.families.dit import DiT
from onelora_diffusion.injection.verbs import adapter_state_dict
from onelora_diffusion.training.ema import ExponentialMovingAverage
from onelora_diffusion.training.metrics import LossWindow
from onelora_diffusion.training.optimizers import make_optimizer
from onelora_diffusion.training.randomness import draw_step
from onelora_diffusion.training.weighting import loss_weights


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
        self.labels = torch.zeros(batch, dtype=torch.long)

    def __call__(self) -> None:
        drawn = draw_step(0, self.step, self.batch, self.shape, 1000, label_drop=0.1)
        draws = drawn.rows(slice(self.batch), self.device)
        prompts = {"class_labels": torch.where(drawn.label_drops, 3, self.labels)}
        prompts = send_to_device(prompts, self.device, non_blocking=True)
        x_start = sample_moments(self.moments, draws.posterior_noise)
        timesteps = on(draws.timesteps, self.device)
        latents = add_noise(x_start, draws.noise, timesteps, self.scheduler).to(self.model.dtype)
        times = model_timesteps(draws.timesteps, self.scheduler)
        output = DiT().predict(self.model, latents, times, prompts)
        losses = training_losses(output, x_start, draws.noise, timesteps, self.scheduler)
        weights = loss_weights(timesteps, self.scheduler, 5.0, "none")
        losses["loss"] = losses["loss"] + (weights - 1) * losses["mse"]
        losses["loss"].mean().backward()
        nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.average.update(self.step)
        self.losses.add({name: loss.mean() for name, loss in losses.items()})
