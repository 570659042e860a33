"""The loss of one batch beside the arithmetic of diffusers' training scripts, on the same draws."""

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline
from rounding import assert_rounded
from tiny_models import make_pipeline

from onelora_diffusion.diffusion import add_noise, model_timesteps, training_losses
from onelora_diffusion.families import family_of

INDICES = torch.tensor([3, 400, 999])  # in the scheduler's descending timesteps, as the scripts draw them


def drawn(name):
    """A pipeline, images' latents, noise and encoded prompts."""
    pipeline = make_pipeline(name)
    shape = (3, *family_of(pipeline).latent_shape(pipeline, 64, 64))
    prompts = family_of(pipeline).encode_conditions(pipeline, ["a bold Q", "night", "7"], 24)
    generator = torch.Generator().manual_seed(1)
    return pipeline, *(torch.randn(shape, generator=generator) for _ in range(2)), prompts


def ours(pipeline, latents, noise, timesteps, prompts):
    family, scheduler = family_of(pipeline), pipeline.scheduler
    noisy = add_noise(latents, noise, timesteps, scheduler)
    output = family.predict(pipeline.transformer, noisy, model_timesteps(timesteps, scheduler), prompts)
    return training_losses(output, latents, noise, timesteps, scheduler)


def call_sd3(transformer, noisy, timesteps, prompts):
    return transformer(
        hidden_states=noisy,
        timestep=timesteps,
        encoder_hidden_states=prompts["encoder_hidden_states"],
        pooled_projections=prompts["pooled_projections"],
        return_dict=False,
    )[0]


def call_flux(transformer, noisy, timesteps, prompts):
    batch, channels, height, width = noisy.shape
    output = transformer(
        hidden_states=FluxPipeline._pack_latents(noisy, batch, channels, height, width),
        timestep=timesteps / 1000,
        guidance=None,
        pooled_projections=prompts["pooled_projections"],
        encoder_hidden_states=prompts["encoder_hidden_states"],
        txt_ids=torch.zeros(prompts["encoder_hidden_states"].shape[1], 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, noisy.device, noisy.dtype),
        return_dict=False,
    )[0]
    return FluxPipeline._unpack_latents(output, height=2 * height, width=2 * width, vae_scale_factor=2)


def call_sana(transformer, noisy, timesteps, prompts):
    return transformer(
        hidden_states=noisy,
        encoder_hidden_states=prompts["encoder_hidden_states"],
        encoder_attention_mask=prompts["encoder_attention_mask"],
        timestep=timesteps,
        return_dict=False,
    )[0]


@torch.no_grad()
@pytest.mark.parametrize(
    "name, call, scheduler",
    [
        ("sd3", call_sd3, FlowMatchEulerDiscreteScheduler(shift=3.0)),
        ("flux", call_flux, FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)),
        ("sana", call_sana, FlowMatchEulerDiscreteScheduler(shift=3.0)),
    ],
)
def test_flow_matching_is_that_of_the_scripts(name, call, scheduler):
    """train_dreambooth_lora_{sd3,flux,sana}.py, of SD3 without preconditioned outputs."""
    pipeline, latents, noise, prompts = drawn(name)
    timesteps = scheduler.timesteps[INDICES]
    sigmas = scheduler.sigmas[INDICES].view(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * latents + sigmas * noise
    predicted = call(pipeline.transformer, noisy, timesteps, prompts)
    expected = torch.mean(((predicted.float() - (noise - latents).float()) ** 2).reshape(len(latents), -1), 1)
    losses = ours(pipeline, latents, noise, 999 - INDICES, prompts)
    assert_rounded(losses["loss"], expected, pipeline.transformer)
    if name == "sd3":  # its preconditioned outputs weigh by σ², which its sigma_sqrt takes back
        preconditioned = predicted * -sigmas + noisy
        weighed = torch.mean((sigmas**-2 * (preconditioned - latents) ** 2).reshape(len(latents), -1), 1)
        torch.testing.assert_close(losses["loss"], weighed, rtol=1e-3, atol=0)  # it divides by the smallest σ


@torch.no_grad()
def test_pixarts_loss_is_its_definition():
    """The squared error of half its output to the noise, and on top the variance's bound, as DiT's is defined."""
    pipeline, latents, noise, prompts = drawn("pixart")
    scheduler = DDPMScheduler(beta_schedule="linear")
    timesteps = 999 - INDICES
    output = pipeline.transformer(
        scheduler.add_noise(latents, noise, timesteps),
        encoder_hidden_states=prompts["encoder_hidden_states"],
        encoder_attention_mask=prompts["encoder_attention_mask"],
        timestep=timesteps,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    ).sample
    losses = ours(pipeline, latents, noise, timesteps, prompts)
    assert_rounded(losses["mse"], (output[:, :4] - noise).square().mean((1, 2, 3)), pipeline.transformer)
    assert_rounded(losses["loss"], training_losses(output, latents, noise, timesteps, scheduler)["loss"], 1000)
    assert (losses["vb"] > 0).all()
