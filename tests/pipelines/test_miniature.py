"""The miniature inside the package: a real DiT pipeline, small, and good at digits 0-4."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import load_file
from sklearn.svm import SVC

from onelora_diffusion.data.digits import Digits
from onelora_diffusion.data.latents import encode_moments, sample_moments
from onelora_diffusion.pipelines.base import load_base, miniature_path
from onelora_diffusion.sampling import SamplerSettings, generate_images

ZERO_TO_FOUR = (0, 1, 2, 3, 4)


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
    assert pipeline.get_label_ids(["3", "0"]) == [3, 0]
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline([0, 4], guidance_scale=1, num_inference_steps=2, output_type="np").images
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


def test_all_blocks_own_the_same_embedder_with_forty_classes_and_null(pipeline):
    weights = load_file(miniature_path() / "transformer" / "diffusion_pytorch_model.safetensors")
    first = {name: tensor for name, tensor in weights.items() if "blocks.0.norm1.emb." in name}
    assert first["transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"].shape[0] == 41
    for block in range(1, pipeline.transformer.config.num_layers):
        for name, tensor in first.items():
            assert torch.equal(tensor, weights[name.replace("blocks.0.", f"blocks.{block}.")])


def test_the_autoencoder_reconstructs_digits_it_has_never_seen(pipeline):
    images = Digits("all").images  # 5-9; it was trained on 0-4
    with torch.no_grad():
        latents = pipeline.vae.encode(images).latent_dist.sample(torch.Generator().manual_seed(0))
        reconstructed = pipeline.vae.decode(latents).sample
    assert (reconstructed - images).square().mean().sqrt() < 0.06  # of a range of 2


@pytest.mark.parametrize("classes", [ZERO_TO_FOUR, (5, 6, 7, 8, 9)])
def test_scaled_latents_have_unit_variance(pipeline, classes):
    # The scaling factor is saved with the VAE and the transformer trains on what it scales: they must agree.
    with torch.no_grad():
        moments = encode_moments(pipeline.vae, Digits("all", classes=classes).images)
    noise = torch.randn(moments[:, 0].shape, generator=torch.Generator().manual_seed(0))
    assert sample_moments(moments, noise).std() == pytest.approx(1, abs=0.05)


def test_its_samples_are_the_digits_asked_for(pipeline):
    real = Digits("all", classes=ZERO_TO_FOUR)
    classifier = SVC(C=10).fit(real.images[:, 0].flatten(1).numpy(), real.labels)
    labels = [index % 5 for index in range(100)]
    settings = SamplerSettings(guidance_scale=1.5, num_inference_steps=20)
    batches = generate_images(pipeline, labels, 0, range(100), settings, batch_size=100)
    images = torch.cat([images for _, images in batches]).float() / 127.5 - 1
    recognised = classifier.predict(images.mean(1).flatten(1).numpy()) == np.array(labels)
    assert recognised.mean() >= 0.9


def test_a_folder_is_loaded_like_the_miniature(pipeline):
    again = load_base(str(miniature_path()))
    for name, tensor in pipeline.transformer.state_dict().items():
        assert torch.equal(tensor, again.transformer.state_dict()[name])


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


def test_a_hub_id_without_a_network_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="base model 'nobody/no-such-dit'") as error:
        load_base("nobody/no-such-dit")
    assert "\n" not in str(error.value)


def test_the_module_imports_without_diffusers():
    code = "import sys, onelora_diffusion.pipelines.base; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
