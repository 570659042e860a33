"""--push-to-hub: what a run sends when it has ended, and what is refused before it begins."""

import io
import json

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from tiny_models import make_dit_pipeline, make_pipeline

from onelora_diffusion.cli import train_dit, train_text_to_image
from onelora_diffusion.training.prompt_settings import PromptSettings
from onelora_diffusion.training.samples import last_row, png_of
from onelora_diffusion.training.settings import Settings


@pytest.fixture(autouse=True)
def bases(tmp_path, monkeypatch, fresh_accelerate):
    """Bases that lie where their hub ids would be looked for; a token for the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    torch.manual_seed(0)
    make_dit_pipeline().save_pretrained("someone/dit")


def settings_of(**changes):
    short = dict(base="someone/dit", push_to_hub="someone/digits", max_steps=2, batch_size=8, sample_steps=2)
    return Settings(**short | dict(sample_every=2, checkpoint_every=2) | changes)


def pushed(hub):
    return ModelCard(hub["files"]["README.md"].decode())


def test_what_was_measured_and_drawn_is_sent(hub, tmp_path, capsys):
    settings = settings_of(eval_every=2, eval_images=10, eval_steps=1)
    assert train_dit.main(settings) == 0 and "https://hub/someone/digits" in capsys.readouterr().out
    adapter = (settings.output_dir / "onelora_weights.safetensors").read_bytes()
    assert hub["files"]["onelora_weights.safetensors"] == adapter

    card = pushed(hub).data
    (line,) = [json.loads(text) for text in open(settings.output_dir / "metrics.jsonl") if "distance" in text]
    found = {result.metric_name: result.metric_value for result in card.eval_results}
    assert found == {"FD(pixels)": line["distance"], "recognition": line["recognition"]}
    assert {result.dataset_name for result in card.eval_results} == {"digits"}
    assert (card.base_model, card.base_model_relation, card.library_name) == ("someone/dit", "adapter", "diffusers")
    assert card.datasets is None  # no data set of the hub
    assert [item["text"] for item in card.widget] == [str(digit) for digit in range(10)]
    grid = last_row(settings.output_dir / "samples/step-00000002.png")
    for (_, picture), item in zip(grid, card.widget, strict=True):
        sent = Image.open(io.BytesIO(hub["files"][item["output"]["url"]]))
        assert np.array_equal(np.array(sent), np.array(picture)) and sent.size == (16, 16)


def test_prompts_are_sent_with_the_adapters_pictures(hub, tmp_path):
    make_pipeline("sd3").save_pretrained("someone/sd3")
    (tmp_path / "signs").mkdir()
    Image.new("RGB", (16, 16), "red").save(tmp_path / "signs/0.png")
    settings = PromptSettings(
        base="someone/sd3", base_precision="fp32", images="signs", prompt="a [trigger] sign", resolution=16,
        max_steps=2, batch_size=2, sample_every=2, sample_steps=1, validation_prompt=("{trigger} at night", "day"),
        trigger="sks", push_to_hub="someone/signs",
    )  # fmt: skip
    assert train_text_to_image.main(settings) == 0
    card = pushed(hub)
    assert card.data.pipeline_tag == "text-to-image" and card.data.instance_prompt == "sks"
    assert [item["text"] for item in card.data.widget] == ["sks at night", "day"] and card.data.eval_results is None
    assert "pipe('a sks sign')" in card.text and {"lora", "StableDiffusion3"} <= set(card.data.tags)


def test_a_refused_upload_is_one_line_and_the_same_command_tries_again(hub, monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise OSError("no network\nat all")

    settings = settings_of(sample_every=0)
    (tmp_path / "runs/digits/samples").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "runs/digits/samples/step-00000003.png")  # of a later step
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.HfApi.create_commit", refuse)
        with pytest.raises(SystemExit) as caught:
            train_dit.main(settings)
    expected = "cannot be pushed to: no network; the adapter is in runs/digits, and the same command tries again"
    assert caught.value.code == f"train_dit.py: 'someone/digits' {expected}"
    assert train_dit.main(settings) == 0 and "files" in hub
    assert pushed(hub).data.get("widget") is None


@pytest.mark.parametrize(
    ("changes", "token", "message"),
    [
        (dict(push_to_hub="digits"), "hf_x", "--push-to-hub digits is no id of the hub: give one like user/name"),
        (dict(push_to_hub="a/b/c"), "hf_x", "--push-to-hub a/b/c is no id"),
        (dict(push_to_hub="someone/a--b"), "hf_x", "--push-to-hub someone/a--b is no id"),
        (dict(base=None), "hf_x", "is of use to those who have the base, by its hub id, and the miniature is none"),
        ({}, None, "--push-to-hub needs a token of the hub: run `hf auth login`, or set HF_TOKEN"),
    ],
)
def test_what_cannot_be_sent_is_refused_before_anything_is_written(
    hub, monkeypatch, tmp_path, changes, token, message
):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    with pytest.raises(SystemExit) as caught:
        train_dit.main(settings_of(**changes))
    assert message in caught.value.code and "\n" not in caught.value.code
    assert not (tmp_path / "runs").exists() and hub == {}


def test_a_grid_knows_its_columns(tmp_path):
    images = torch.randint(0, 256, (6, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (tmp_path / "grid.png").write_bytes(png_of(images, ["ä", "b", "c"]))
    row = last_row(tmp_path / "grid.png")
    assert [text for text, _ in row] == ["ä", "b", "c"]
    for (_, picture), image in zip(row, images[3:], strict=True):
        assert np.array_equal(np.array(picture), image.permute(1, 2, 0).numpy())
    Image.new("RGB", (9, 9)).save(tmp_path / "plain.png")
    ((text, whole),) = last_row(tmp_path / "plain.png")
    assert text == "samples" and whole.size == (9, 9)
