import pytest
import torch
from diffusers import AutoencoderKL
from rounding import assert_rounded

from onelora_diffusion.data import load_dataset
from onelora_diffusion.data.latents import FlippableImages, encode_moments, sample_moments


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).eval()


def test_latents_are_those_that_diffusers_samples(vae):
    digits = torch.utils.data.Subset(load_dataset("digits", resolution=8), range(5))
    images = torch.stack([image for image, _ in digits])
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
    expected = posterior.sample(torch.Generator().manual_seed(3)) * vae.config.scaling_factor
    noise = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    assert_rounded(sample_moments(encode_moments(vae, images), noise), expected, vae.encoder)


def test_images_are_mirrored_where_asked():
    digits = load_dataset("digits", resolution=8)
    images = FlippableImages(digits)
    assert len(images) == len(digits)
    assert torch.equal(images[2, False][0], digits[2][0])
    assert torch.equal(images[2, True][0], digits[2][0].flip(-1))
