import pytest
import yaml
from huggingface_hub import ModelCard
from tiny_models import make_dit

from onelora_diffusion import AdapterConfig, inject_adapter, push_to_hub, read_adapter, save_adapter


@pytest.fixture
def adapter(tmp_path):
    model = inject_adapter(make_dit(), AdapterConfig(num_classes=2))
    names = {0: "pizza", 1: "sushi"}
    return save_adapter(model, tmp_path / "run", id2label=names, base="facebook/DiT-XL-2-256", training={"steps": 9})


def test_what_is_pushed(adapter, hub, tmp_path):
    (tmp_path / "grid.png").write_bytes(b"png")
    url = push_to_hub(
        adapter.parent,
        "someone/food",
        dataset="food101",
        metrics={"FID": 12.5},
        sample_grid=tmp_path / "grid.png",
        license="cc-by-nc-4.0",
        private=True,
    )
    assert url == "https://hub/someone/food" and hub["repo"] == ("someone/food", True, True)
    assert hub["files"]["onelora_weights.safetensors"] == adapter.read_bytes()
    assert hub["files"]["sample.png"] == b"png"
    header, card = hub["files"]["README.md"].decode().removeprefix("---\n").split("\n---\n", 1)
    header = yaml.safe_load(header)
    assert (header["base_model"], header["license"]) == ("facebook/DiT-XL-2-256", "cc-by-nc-4.0")
    assert header["datasets"] == ["food101"] and header["base_model_relation"] == "adapter"
    assert header["library_name"] == "diffusers" and "lora" in header["tags"]
    for text in (
        "![samples](sample.png)",
        "| FID | 12.5 |",
        "| steps | 9 |",
        "pizza, sushi",
        'load_lora_weights("someone/food")',
        "class_labels=['pizza']",
        f"{sum(t.numel() for t in read_adapter(adapter).tensors.values()):,} trained weights",
    ):
        assert text in card


def test_the_hubs_own_classes_read_the_card(adapter, hub, tmp_path):
    """What was measured is a result of the model, what was drawn is the gallery's."""
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(bytes([number]))
    push_to_hub(
        adapter,
        "someone/food",
        dataset="ethz/food101",
        metrics={"FID": 12.5, "FD(pixels)": 3.0},
        gallery=[("pizza", tmp_path / "0.png"), ("sushi", tmp_path / "1.png")],
    )
    card = ModelCard(hub["files"]["README.md"].decode())
    assert card.data.model_name == "food"
    found = [(result.dataset_name, result.metric_type, result.metric_value) for result in card.data.eval_results]
    assert found == [("ethz/food101", "fid", 12.5), ("ethz/food101", "fd-pixels", 3.0)]
    shown = {item["text"]: hub["files"][item["output"]["url"]] for item in card.data.widget}
    assert shown == {"pizza": b"\0", "sushi": b"\1"} and "<Gallery />" in card.text


def test_nothing_that_was_not_measured_is_in_the_card(adapter, hub):
    push_to_hub(adapter, "someone/food", dataset="ethz/food101")
    card = ModelCard(hub["files"]["README.md"].decode())
    assert card.data.eval_results is None and card.data.metrics is None and card.data.get("widget") is None
    assert "<Gallery />" not in card.text and "## Results" not in card.text


def test_nothing_is_asked_of_the_hub_for_bad_input(adapter, hub, tmp_path):
    with pytest.raises(FileNotFoundError, match="no sample grid at"):
        push_to_hub(adapter, "someone/food", sample_grid=tmp_path / "none.png")
    nameless = save_adapter(inject_adapter(make_dit(), AdapterConfig()), tmp_path / "nameless")
    with pytest.raises(ValueError, match="names no base model"):
        push_to_hub(nameless, "someone/food")
    adapter.write_bytes(adapter.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged"):
        push_to_hub(adapter, "someone/food")
    assert hub == {}


def test_a_refusal_of_the_hub_is_one_line(adapter, hub, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network\nat all")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    with pytest.raises(ValueError, match="'someone/food' cannot be pushed to: no network$"):
        push_to_hub(adapter, "someone/food")
