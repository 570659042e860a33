import pytest
import torch
from diffusers import AutoencoderDC
from rounding import assert_rounded
from tiny_models import make_vae

from onelora_diffusion.data import load_dataset
from onelora_diffusion.data.latents import FlippableImages, sample_moments
from onelora_diffusion.families.autoencoder import decode_latents, encode_moments


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return make_vae(4, None, levels=1)


def test_latents_are_those_that_diffusers_samples(vae):
    digits = torch.utils.data.Subset(load_dataset("digits", resolution=8), range(5))
    images = torch.stack([image for image, _ in digits])
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
    expected = posterior.sample(torch.Generator().manual_seed(3)) * vae.config.scaling_factor
    noise = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    assert_rounded(sample_moments(encode_moments(vae, images), noise), expected, vae.encoder)


def test_a_vae_with_a_shift_decodes_from_its_latents_what_it_encoded():
    """SD3's and FLUX's VAEs have a shift, taken off in encoding and put back in decoding."""
    torch.manual_seed(0)
    vae, images = make_vae(4, shift_factor=0.1), torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        mean = vae.encode(images).latent_dist.mean
        expected = vae.decode(mean).sample
    latents = encode_moments(vae, images)[:, 0]
    assert_rounded(latents, (mean - 0.1) * vae.config.scaling_factor, vae.encoder)
    assert_rounded(decode_latents(vae, latents), expected, vae)


def test_a_deterministic_autoencoder_has_latents_without_deviation():
    torch.manual_seed(0)
    blocks = dict(encoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()))
    blocks |= {name.replace("encoder", "decoder"): value for name, value in blocks.items()}
    vae = AutoencoderDC(latent_channels=4, attention_head_dim=4, scaling_factor=0.41407, **blocks).eval()
    images = torch.randn(2, 3, 8, 12)
    with torch.no_grad():
        expected = vae.encode(images).latent * 0.41407
    moments = encode_moments(vae, images)
    assert_rounded(sample_moments(moments, torch.randn(2, 4, 4, 6)), expected, vae.encoder)
    assert moments.shape == (2, 2, 4, 4, 6) and not moments[:, 1].any()


def test_images_in_bytes_are_brought_into_range(vae):
    signs = torch.randn(1, 3, 8, 8).sign()
    pixels = torch.where(signs > 0, 255, 0).to(torch.uint8)
    assert torch.equal(encode_moments(vae, pixels), encode_moments(vae, signs))


def test_images_are_mirrored_where_asked():
    digits = load_dataset("digits", resolution=8)
    images = FlippableImages(digits)
    assert len(images) == len(digits)
    assert torch.equal(images[2, False][0], digits[2][0])
    assert torch.equal(images[2, True][0], digits[2][0].flip(-1))
