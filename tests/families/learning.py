"""Train a new adapter of a pipeline on one batch, and try that it serves single images of it."""

import torch
from rounding import assert_rounded
from torch import Tensor

from onelora_diffusion import AdapterConfig, inject_adapter, route_adapters
from onelora_diffusion.denoisers import denoiser_of
from onelora_diffusion.diffusion import add_noise, model_timesteps, training_losses
from onelora_diffusion.families import family_of
from onelora_diffusion.injection.layers import target_layers


def learn_a_batch(pipeline, latents: Tensor, conditions: dict) -> tuple[Tensor, Tensor]:
    """Inject an adapter and assert that four updates lower the loss of two images each time, by all of its vectors.

    Returns:
        The noisy latents and their times.
    """
    family, model = family_of(pipeline), denoiser_of(pipeline).requires_grad_(False)
    inject_adapter(model, AdapterConfig(targets=family.targets))
    vectors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(vectors) == len(target_layers(model, family.targets))
    noise, timesteps = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1)), torch.tensor([300, 700])
    scheduler = family.training_scheduler(pipeline)
    noisy = add_noise(latents, noise, timesteps, scheduler)
    times = model_timesteps(timesteps, scheduler)
    optimizer, losses = torch.optim.Adam(vectors, lr=0.01), []
    for _ in range(4):
        output = family.predict(model, noisy, times, conditions)
        loss = training_losses(output, latents, noise, timesteps, scheduler)["loss"].mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(vector.grad.any() and vector.grad.isfinite().all() for vector in vectors)
        optimizer.step()
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    return noisy, times


@torch.no_grad()
def assert_routed(family, model, noisy, times, conditions):
    """Of a batch of two, the adapter serves the first alone, as in a batch of its own, and it does something."""
    with route_adapters(model, ["default", None]):
        routed = family.predict(model, noisy, times, conditions)
    adapted = family.predict(model, noisy, times, conditions)
    with route_adapters(model, [None, None]):
        base = family.predict(model, noisy, times, conditions)
    assert_rounded(routed[:1], adapted[:1], model)
    assert_rounded(routed[1:], base[1:], model)
    assert (adapted - base).abs().max() > 1e-3
