"""The text-to-image miniature inside the package: a real PixArt-Σ pipeline, small, of letters and no digits."""

import pytest
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from onelora_diffusion.data.digits import CAPTIONS, WORDS, Digits
from onelora_diffusion.data.latents import sample_moments
from onelora_diffusion.families import family_of
from onelora_diffusion.families.autoencoder import encode_moments
from onelora_diffusion.pipelines.base import load_base, miniature_text_path
from tools.make_text_miniature import RESOLUTION, caption, captioned_signs, make_tokenizer
from tools.read_letters import LetterClassifier, letters_right


@pytest.fixture(scope="module")
def pipeline():
    pipeline = load_base(condition=str)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_folder_loads_with_stock_classes_in_float32():
    pipeline = PixArtSigmaPipeline.from_pretrained(miniature_text_path())
    assert type(pipeline.transformer) is PixArtTransformer2DModel
    assert type(pipeline.text_encoder) is T5EncoderModel
    assert type(pipeline.tokenizer) is PreTrainedTokenizerFast
    assert type(pipeline.vae) is AutoencoderKL
    assert type(pipeline.scheduler) is DPMSolverMultistepScheduler
    for model in (pipeline.transformer, pipeline.text_encoder, pipeline.vae):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a bold Q", use_resolution_binning=False, num_inference_steps=2, output_type="pt").images
    assert images.shape == (1, 3, RESOLUTION, RESOLUTION)
    assert family_of(pipeline).name == "PixArtSigma"


def test_it_is_small():
    files = [file for file in miniature_text_path().rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 6_000_000
    assert {file.suffix for file in files} == {".json", ".safetensors"}
    assert not any("_name_or_path" in file.read_text() for file in files if file.suffix == ".json")


def test_any_word_has_tokens_and_those_for_digits_one_each(pipeline):
    tokenizer = pipeline.tokenizer
    assert [len(tokenizer.tokenize(word)) for word in WORDS] == [1] * 10
    assert tokenizer.tokenize("a bold Q, SKS") == ["a", "bold", "q", ",", "s", "##k", "##s"]
    captions = captioned_signs(2000, seed=1)[1]
    numbers = tokenizer([*captions, *CAPTIONS])["input_ids"]
    assert max(map(len, numbers)) <= tokenizer.model_max_length
    assert not any(tokenizer.unk_token_id in each for each in numbers)


def test_no_caption_has_a_word_for_a_digit():
    said = {word for text in captioned_signs(5000, seed=2)[1] for word in text.replace(",", "").split()}
    assert not said & {*WORDS, "handwritten"}
    assert caption("Q", "plain", 0, False, weight=1, leans=False, mirrored=False, turn=1) == "a bold Q, turned left"
    all_words = "a large soft italic serif small a, mirrored, upside down"
    assert caption("a", "serif", 1, True, 0, True, True, 3) == all_words


def test_its_tokenizer_is_that_of_its_captions(pipeline):
    assert make_tokenizer(captioned_signs(5000, seed=0)[1]).get_vocab() == pipeline.tokenizer.get_vocab()


@torch.no_grad()
def test_the_autoencoder_reconstructs_digits_it_has_never_seen(pipeline):
    images = Digits("all", RESOLUTION).images
    moments = encode_moments(pipeline.vae, images)
    reconstructed = pipeline.vae.decode(moments[:, 0] / pipeline.vae.config.scaling_factor).sample
    assert (reconstructed - images).square().mean().sqrt() < 0.1  # of a range of 2


@torch.no_grad()
def test_scaled_latents_have_unit_variance(pipeline):
    moments = encode_moments(pipeline.vae, captioned_signs(1000, seed=3)[0])
    noise = torch.randn(moments[:, 0].shape, generator=torch.Generator().manual_seed(0))
    assert sample_moments(moments, noise).std() == pytest.approx(1, abs=0.05)


def test_it_draws_the_letters_that_are_asked_for(pipeline):
    """Not all of them: docs/text_to_image.md says how many."""
    classifier = LetterClassifier()
    right = letters_right(pipeline, classifier, 1)
    assert right.mean() > 0.6 and classifier.accuracy > 0.95, (right.mean(), classifier.accuracy)


def test_it_draws_as_large_heavy_and_soft_as_the_words_say(pipeline):

    def drawn(word):
        return pipeline(
            [f"a {word} {letter}" for letter in "BDGKPTUZ"],
            guidance_scale=2.0,
            num_inference_steps=10,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
            max_sequence_length=16,
            clean_caption=False,
            use_resolution_binning=False,
        ).images.mean(1)

    def ink(images):
        return images.mean().item()

    def sharpness(images):
        return (images.diff(dim=-1).abs().amax((1, 2)) / images.amax((1, 2))).mean().item()

    assert ink(drawn("large")) > 1.5 * ink(drawn("tiny"))
    assert ink(drawn("bold")) > 1.5 * ink(drawn("thin"))
    assert sharpness(drawn("soft")) < 0.75 * sharpness(drawn("typewriter"))
