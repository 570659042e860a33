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
    """Inject an adapter and assert that it learns two images.

    Returns:
        The noisy latents and their times.
    """
    noise, timesteps = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1)), torch.tensor([300, 700])
    losses_of(pipeline, latents, noise, timesteps, conditions)
    scheduler = family_of(pipeline).training_scheduler(pipeline)
    return add_noise(latents, noise, timesteps, scheduler), model_timesteps(timesteps, scheduler)


def losses_of(
    pipeline, latents: Tensor, noise: Tensor, timesteps: Tensor, conditions: dict, updates: int = 4
) -> list[float]:
    """The losses of a batch in updates of a new adapter, asserted to fall each time by all of its vectors."""
    family, model = family_of(pipeline), denoiser_of(pipeline).requires_grad_(False)
    inject_adapter(model, AdapterConfig(targets=family.targets))
    vectors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(vectors) == len(target_layers(model, family.targets))
    scheduler, mask = family.training_scheduler(pipeline), family.learned(tuple(latents.shape[1:]))
    noisy, times = add_noise(latents, noise, timesteps, scheduler), model_timesteps(timesteps, scheduler)
    mask = mask if mask is None else mask.expand(len(latents), -1, -1, -1, -1)
    optimizer, losses = torch.optim.Adam(vectors, lr=0.01), []
    for _ in range(updates):
        output = family.predict(model, noisy, times, conditions)
        loss = training_losses(output, latents, noise, timesteps, scheduler, mask)["loss"].mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        gradients = [vector.grad for vector in vectors]
        assert all(g is not None and g.any() and g.isfinite().all() for g in gradients), "a vector has no gradient"
        optimizer.step()
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0], f"the loss does not fall: {losses}"
    return losses


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
