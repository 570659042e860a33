"""Each family from a folder of captioned pictures, by way of the caches, to what its transformer predicts."""

import pytest
import torch
from PIL import Image
from reading import load_captioned
from rounding import assert_rounded
from tiny_models import NAMED, make_pipeline
from torch import nn
from torch.utils.data import DataLoader

from onelora_diffusion.data.latent_cache import LatentCache, build_cache
from onelora_diffusion.data.latents import sample_moments
from onelora_diffusion.data.prompt_cache import PromptCache, build_prompt_cache, identity_of
from onelora_diffusion.families import family_of
from onelora_diffusion.families.autoencoder import encode_moments
from onelora_diffusion.training.randomness import StepKeyedBatches

LENGTH = 24  # tokens of a prompt
CAPTIONS = ["a bold Q", "a violet triangle, upside down", "a bold Q", "a thin F"]


@pytest.fixture
def pictures(tmp_path):
    """Two that are wide and two that are tall, with captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, caption in enumerate(CAPTIONS):
        size = (40, 20) if number < 2 else (20, 40)
        Image.effect_noise(size, 80).convert("RGB").save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return folder


@pytest.mark.parametrize("name", list(NAMED))
@torch.no_grad()
def test_what_is_cached_predicts_what_its_pictures_and_captions_do(tmp_path, pictures, name):
    pipeline = make_pipeline(name)
    family, transformer, vae = family_of(pipeline), pipeline.transformer, pipeline.vae
    multiple = family.multiple(pipeline)
    images = load_captioned(pictures, resolution=4 * multiple, multiple=multiple, aspect_buckets=True)
    assert images.captions == CAPTIONS

    def encode(prompts):
        return family.encode_conditions(pipeline, prompts, LENGTH)

    encoders = {key: part for key, part in pipeline.components.items() if key.startswith("text_encoder")}
    assert encoders and all(isinstance(encoder, nn.Module) for encoder in encoders.values())
    prompts = PromptCache(
        build_prompt_cache(tmp_path, images.captions, encode, identity_of(encoders), f"{name}, {LENGTH}"),
        images.captions,
    )
    latents = LatentCache(build_cache(tmp_path, images.dataset, vae, flip=True), len(images), images.dataset.buckets)

    shapes, dropped = set(), torch.tensor([False, True])
    keys = StepKeyedBatches(0, 0, 2, len(images), True, [slice(0, 2)], images.dataset.buckets.of_image)
    batches = zip(
        *(DataLoader(examples, batch_sampler=keys) for examples in (images, latents)), range(4), strict=False
    )
    for (pixels, expected_captions), (moments, captions), _ in batches:
        assert torch.equal(captions, expected_captions)
        noise = torch.randn(moments[:, 0].shape)
        fresh = sample_moments(encode_moments(vae, pixels), noise)
        assert_rounded(sample_moments(moments, noise), fresh, vae.encoder)

        embeddings = prompts.embeddings(captions, dropped)
        texts = [CAPTIONS[captions[0]], ""]
        timesteps = torch.tensor([300.0, 600.0])
        found = family.predict(transformer, fresh, timesteps, embeddings)
        expected = family.predict(transformer, fresh, timesteps, encode(texts))
        assert_rounded(found, expected, transformer)
        shapes.add(tuple(found.shape[-2:]))
    (tall,) = [shape for shape in shapes if shape[0] > shape[1]]
    assert shapes == {tall, tall[::-1]}
