"""The miniature inside the package: a real DiT pipeline, small, which knows letters and signs, and no digit."""

import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import load_file
from sklearn.svm import SVC
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from onelora_diffusion.data.digits import Digits
from onelora_diffusion.data.latents import sample_moments
from onelora_diffusion.families.autoencoder import encode_moments
from onelora_diffusion.pipelines.base import load_base, miniature_path, miniature_text_path
from onelora_diffusion.sampling import SamplerSettings, generate_images
from tools.letters import CHARACTERS, Hand, letters


@pytest.fixture(scope="module")
def pipeline():
    return load_base()


def test_the_folder_loads_with_stock_diffusers_in_float32():
    pipeline = DiTPipeline.from_pretrained(miniature_path())
    assert type(pipeline.transformer) is DiTTransformer2DModel
    assert type(pipeline.vae) is AutoencoderKL
    assert type(pipeline.scheduler) is DDIMScheduler
    for model in (pipeline.transformer, pipeline.vae):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert pipeline.get_label_ids(["Q", "Ψ", "A"]) == [CHARACTERS.index("Q"), CHARACTERS.index("Ψ"), 0]
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline([0, 179], guidance_scale=1, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 16, 16, 3)


def test_it_is_small():
    files = [file for file in miniature_path().rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 4_000_000
    assert {file.suffix for file in files} == {".json", ".safetensors"}


def test_schedule_and_variance_are_those_of_dit_xl_2_256(pipeline):
    # scheduler/scheduler_config.json and transformer/config.json of facebook/DiT-XL-2-256
    expected = {
        "num_train_timesteps": 1000,
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "clip_sample": False,
        "prediction_type": "epsilon",
    }
    assert {key: pipeline.scheduler.config[key] for key in expected} == expected
    config = pipeline.transformer.config
    assert config.out_channels == 2 * config.in_channels == 8
    assert (config.patch_size, config.norm_type, config.activation_fn) == (2, "ada_norm_zero", "gelu-approximate")


def test_all_blocks_own_the_same_embedder_with_its_classes_and_null(pipeline):
    weights = load_file(miniature_path() / "transformer" / "diffusion_pytorch_model.safetensors")
    first = {name: tensor for name, tensor in weights.items() if "blocks.0.norm1.emb." in name}
    assert first["transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"].shape[0] == 180 + 1
    for block in range(1, pipeline.transformer.config.num_layers):
        for name, tensor in first.items():
            assert torch.equal(tensor, weights[name.replace("blocks.0.", f"blocks.{block}.")])


def test_the_autoencoder_reconstructs_digits_it_has_never_seen(pipeline):
    images = Digits("all").images  # it was trained on letters
    with torch.no_grad():
        latents = pipeline.vae.encode(images).latent_dist.sample(torch.Generator().manual_seed(0))
        reconstructed = pipeline.vae.decode(latents).sample
    assert (reconstructed - images).square().mean().sqrt() < 0.06  # of a range of 2


def test_scaled_latents_have_unit_variance(pipeline):
    # The scaling factor is saved with the VAE and the transformer trains on what it scales: they must agree.
    with torch.no_grad():
        moments = encode_moments(pipeline.vae, written_letters(10)[0])
    noise = torch.randn(moments[:, 0].shape, generator=torch.Generator().manual_seed(0))
    assert sample_moments(moments, noise).std() == pytest.approx(1, abs=0.05)


def test_its_samples_are_the_letters_asked_for(pipeline):
    images, labels = written_letters(40)
    classifier = SVC(C=10).fit(grey(images), labels)
    others, their_labels = written_letters(3, seed=2)
    real = (classifier.predict(grey(others)) == their_labels.numpy()).mean()

    asked = list(range(len(CHARACTERS)))
    settings = SamplerSettings(guidance_scale=2.0, num_inference_steps=20)
    batches = generate_images(pipeline, asked, 0, range(len(asked)), settings, batch_size=60)
    drawn = torch.cat([images for _, images in batches]).float() / 127.5 - 1
    recognised = (classifier.predict(grey(drawn)) == np.array(asked)).mean()
    assert real > 0.6 and recognised > 0.8 * real, (real, recognised)


def written_letters(per_letter, seed=1):
    small, labels = letters(per_letter, Hand(), torch.Generator().manual_seed(seed))
    images = interpolate(2 * small - 1, size=(16, 16), mode="bilinear", align_corners=False)
    return images.expand(-1, 3, -1, -1), labels


def grey(images):
    return adaptive_avg_pool2d(images.mean(1, keepdim=True), 8).flatten(1).numpy()


def test_a_folder_is_loaded_like_the_miniature(pipeline):
    again = load_base(str(miniature_path()))
    for name, tensor in pipeline.transformer.state_dict().items():
        assert torch.equal(tensor, again.transformer.state_dict()[name])


def test_a_base_of_which_a_copy_lacks_folders_names_them(tmp_path):
    copied = shutil.copytree(miniature_text_path(), tmp_path / "copied")
    for name in ("vae", "tokenizer"):
        shutil.rmtree(copied / name)
    with pytest.raises(ValueError, match="its model_index.json names tokenizer, vae, of which it has no folder: "):
        load_base(copied, condition=str)


def test_a_base_of_prompts_is_refused_where_classes_are_drawn(pipeline):
    with pytest.raises(ValueError, match="is a PixArtTransformer2DModel, which draws prompts and no classes$"):
        load_base(miniature_text_path())
    assert type(load_base(condition=object)) is type(pipeline)


@pytest.mark.parametrize("base", ["no/such/folder", "./missing", "missing", "/missing/folder"])
def test_a_path_that_is_not_there_is_named(base):
    with pytest.raises(FileNotFoundError, match=f"base model '{base}'") as error:
        load_base(base)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_pipeline_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}.*model_index.json"):
        load_base(tmp_path)


def test_a_damaged_folder_is_one_line(tmp_path):
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match=f"base model '{tmp_path}'") as error:
        load_base(tmp_path)
    assert "\n" not in str(error.value)


def test_a_pipeline_without_a_denoiser_is_one_line(tmp_path):
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "AudioPipeline", "vae": ["diffusers", "AutoencoderKL"]}'
    )
    with pytest.raises(
        ValueError, match=f"'{tmp_path}' has no transformer or transformer_2 or unet, and adapters are"
    ):
        load_base(tmp_path)


def test_a_hub_id_without_a_network_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="base model 'nobody/no-such-dit'") as error:
        load_base("nobody/no-such-dit")
    assert "\n" not in str(error.value)
