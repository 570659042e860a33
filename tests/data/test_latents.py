import pytest
import torch
from diffusers import AutoencoderKL

from onelora_diffusion.data import load_dataset
from onelora_diffusion.data.latents import CachedMoments, FlippableImages, encode_moments, sample_moments


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).eval()


@pytest.fixture(scope="module")
def digits():
    return torch.utils.data.Subset(load_dataset("digits", resolution=8), range(5))


def test_latents_are_those_that_diffusers_samples(vae, digits):
    images = torch.stack([image for image, _ in digits])
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
    expected = posterior.sample(torch.Generator().manual_seed(3)) * vae.config.scaling_factor
    noise = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(sample_moments(encode_moments(vae, images), noise), expected, atol=1e-6)


def test_cached_moments_are_those_of_the_images_mirrored_or_not(vae, digits):
    cache, images = CachedMoments(digits, vae, flip=True, batch_size=2, show_progress=False), FlippableImages(digits)
    assert len(cache) == len(images) == 5
    for key in [(0, False), (3, True), (4, False), (4, True)]:
        (moments, label), (image, expected_label) = cache[key], images[key]
        assert label == expected_label
        assert torch.allclose(moments, encode_moments(vae, image[None])[0], atol=1e-5)
    assert torch.equal(images[2, True][0], digits[2][0].flip(-1))
    assert not torch.allclose(cache[2, True][0], cache[2, False][0], atol=1e-3)


@pytest.mark.parametrize("flip", [False, True])
def test_the_size_of_a_cache_is_known_before_it_is_made(vae, digits, flip):
    cache = CachedMoments(digits, vae, flip, show_progress=False)
    assert cache.moments.nbytes == CachedMoments.size_in_bytes(5, flip, (4, 8, 8))
