"""Modular pipelines of diffusers: as the stock pipeline where there is one, and Anima, of which there is none."""

import modular_pipelines  # noqa: F401  which adds to the pipelines that `make_pipeline` makes
import pytest
import torch
from families.learning import learn_a_batch
from huggingface_hub.errors import EntryNotFoundError
from rounding import rounding
from tiny_models import PIPELINES, make_pipeline

from onelora_diffusion import OneLoRALoaderMixin, save_adapter
from onelora_diffusion.denoisers import denoiser_of
from onelora_diffusion.families import family_of
from onelora_diffusion.pipelines.base import load_base
from tools.stock_calls import batched, conditions_of
from tools.try_families import replayed

PROMPTS = ["a bold Q", "", "a violet triangle"]


@torch.no_grad()
def test_a_modular_pipeline_is_recorded_as_the_stock_pipeline_of_its_components():
    pipeline, modular = make_pipeline("z_image"), make_pipeline("z_image_modular")
    stock, own = family_of(pipeline), family_of(modular)
    assert own.record.times == stock.record.times and own.targets == stock.targets
    latents = torch.randn(3, *stock.latent_shape(pipeline, 64, 64), generator=torch.Generator().manual_seed(0))
    times = torch.tensor([100.0, 500.0, 900.0])
    expected, found = (
        family.predict(denoiser_of(each), latents, times, family.encode_conditions(each, PROMPTS))
        for family, each in ((stock, pipeline), (own, modular))
    )
    assert torch.equal(found, expected) and found.std() > 0.01
    assert torch.equal(own.decode(modular.vae, latents), stock.decode(pipeline.vae, latents))


@torch.no_grad()
def test_flux3_without_the_block_that_writes_prompts_anew_and_with_prompts_of_several_paddings(monkeypatch):
    if "flux3_modular" not in PIPELINES:
        pytest.skip("diffusers has no FLUX.3")
    pipeline = make_pipeline("flux3_modular")
    family, model = family_of(pipeline), denoiser_of(pipeline)
    assert pipeline.prompt_upsampler is None and list(family.record.prompted) == ["encoder_hidden_states", "txt_ids"]
    monkeypatch.setattr("tools.try_families.PROMPTS", prompts := ["a violet triangle, " * 6, "", "a bold Q"])
    lengths = family.encode_conditions(pipeline, prompts)["encoder_hidden_states.length"]
    assert lengths.tolist() == [160, 80, 80]  # of letters, each to the next multiple of 80, which the model reads
    assert max(replayed(pipeline, family), batched(pipeline, family, prompts)) < 10 * rounding(model)


@pytest.fixture
def hub(monkeypatch):
    """A repository `some/anima` that has the index of a modular pipeline in a folder, and no other."""

    def is_at(folder):
        def download(hub_id, name, local_files_only):
            assert hub_id == "some/anima" and not local_files_only
            if not (folder / name).is_file():
                raise EntryNotFoundError(name)
            return str(folder / name)

        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
        monkeypatch.setattr("onelora_diffusion.pipelines.base.is_in_reach", lambda hub_id: True)

    return is_at


def test_a_base_that_is_modular_alone_is_loaded_recorded_and_learns(tmp_path, hub):
    make_pipeline("anima").save_pretrained(str(tmp_path), overwrite_modular_index=True)
    hub(tmp_path)
    pipeline = load_base("some/anima", condition=str)
    family, model = family_of(pipeline), denoiser_of(pipeline)
    assert family.record.times == {"timestep": (1e-3, 0.0)} and family.record.sized == ["padding_mask"]
    assert family.is_guided and family.guidance_scale(pipeline) == 4.0
    with torch.no_grad():
        assert max(replayed(pipeline, family), batched(pipeline, family, conditions_of(family))) < 10 * rounding(model)
    conditions = family.encode_conditions(pipeline, PROMPTS)
    assert family.encoders(pipeline).keys() == {"text_encoder", "tokenizer", "t5_tokenizer"}
    assert family.conditioners(pipeline).keys() == {"text_conditioner"}
    pipeline.register_modules(**dict.fromkeys(family.encoders(pipeline)))  # as training does
    latents = torch.randn(2, *family.latent_shape(pipeline, 64, 96), generator=torch.Generator().manual_seed(0))
    noisy, times = learn_a_batch(pipeline, latents, two := {name: rows[:2] for name, rows in conditions.items()})
    save_adapter(model, tmp_path / "adapter")
    family_of(base := load_base("some/anima", condition=str))
    served = OneLoRALoaderMixin.from_pipe(base)
    served.load_lora_weights(tmp_path / "adapter")
    with torch.no_grad():
        found = family_of(served).predict(denoiser_of(served), noisy, times, two)
        assert torch.equal(found, family.predict(model, noisy, times, two))


def test_a_modular_folder_without_what_it_names_is_refused(tmp_path):
    pipeline = make_pipeline("anima")
    pipeline.save_pretrained(str(tmp_path), overwrite_modular_index=True)
    weights = next((tmp_path / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="does not load: its transformer does not"):
        load_base(tmp_path, condition=str)
    (tmp_path / "modular_model_index.json").write_text("[")
    with pytest.raises(ValueError, match="has no readable modular_model_index.json"):
        load_base(tmp_path, condition=str)
