"""The step of text-to-image transformers and their memory on paper, at a small width."""

import json

import diffusers
import pytest
import torch
from tiny_models import make_pipeline

from benchmarks import families
from benchmarks.families import BASES, PEERS, MemorySettings, counted, family_base, family_peer, memory
from benchmarks.speed import SpeedSettings, speed

SMALL = {
    "flux": {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 4, 8)},
    "sd3": {"num_attention_heads": 2, "attention_head_dim": 16, "caption_projection_dim": 32},
    "sana": {"num_attention_heads": 2, "attention_head_dim": 16, "num_cross_attention_heads": 2}
    | {"cross_attention_head_dim": 16, "cross_attention_dim": 32},
    "pixart": {"num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32},
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    shrunk = {name: base._replace(config=base.config | base.depths | SMALL[name]) for name, base in BASES.items()}
    monkeypatch.setattr(families, "BASES", shrunk)


@pytest.mark.parametrize("name", SMALL)
def test_a_familys_step_is_measured_beside_its_peers(name, tmp_path, capsys):
    settings = SpeedSettings(family=name, precisions=("fp32",), sample_size=8, batch=1, rounds=2, output_dir=tmp_path)
    settings.threads = torch.get_num_threads()
    rows = speed(settings)["train"]
    assert [row["peer"] for row in rows] == list(PEERS)
    by_peer = {row["peer"]: row for row in rows}
    assert by_peer["1LoRA"]["num_trainable_params"] == by_peer["BitFit"]["num_trainable_params"]
    assert by_peer["PEFT MiSS r=1"]["num_trainable_params"] == by_peer["1LoRA"]["num_trainable_params"]
    assert by_peer["PEFT LoRA r=16"]["num_trainable_params"] == 16 * by_peer["PEFT LoRA r=1"]["num_trainable_params"]
    assert (
        by_peer["BitFit"]["saved_bytes"] <= by_peer["1LoRA"]["saved_bytes"] < by_peer["PEFT LoRA r=16"]["saved_bytes"]
    )
    assert json.loads((tmp_path / f"{name}.json").read_text())["train"][0]["peer"] == "1LoRA"
    assert BASES[name].title in capsys.readouterr().out
    assert (tmp_path / "families.png").read_bytes().startswith(b"\x89PNG")


def test_bytes_alone_where_steps_would_say_nothing(tmp_path):
    settings = SpeedSettings(family="sana", precisions=("fp32", "bf16-base"), untimed=("bf16-base",), rounds=1)
    settings.sample_size, settings.batch, settings.output_dir = 8, 1, tmp_path
    settings.threads = torch.get_num_threads()
    whole, half = (
        [row for row in speed(settings)["train"] if row["precision"] == kind] for kind in settings.precisions
    )
    assert all(row["seconds"] > 0 for row in whole) and all(row["seconds"] is None for row in half)
    assert all(row["saved_bytes"] > 0 for row in half) and half[0]["base_bytes"] * 2 == whole[0]["base_bytes"]
    assert "| 1LoRA  " in (tmp_path / "sana.md").read_text() and (tmp_path / "families.png").is_file()


def test_a_packed_base_is_smaller_and_has_the_peers_that_it_can_have(tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed: make test-quantised")
    settings = SpeedSettings(family="pixart", precisions=("bf16-base", "int8"), sample_size=8, batch=1, rounds=1)
    settings.output_dir, settings.threads = tmp_path, torch.get_num_threads()
    rows = speed(settings)["train"]
    half, packed = ([row for row in rows if row["precision"] == precision] for precision in settings.precisions)
    assert [row["peer"] for row in packed] == [peer for peer in PEERS if "MiSS" not in peer]
    assert packed[0]["base_bytes"] < 0.8 * half[0]["base_bytes"]  # at this width much is biases and scales
    assert (tmp_path / "families.png").is_file()


def test_memory_on_paper_is_what_the_tensors_hold(tmp_path, capsys):
    found = counted("flux", 64, "1LoRA")
    model, family = family_base("flux")
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    whole = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(p.numel() for p in family_peer("1LoRA", model, family).parameters() if p.requires_grad)
    assert found["weights"] == {
        "bf16": 2 * whole,
        "int8": linear + 2 * (whole - linear),
        "nf4": 0.5625 * linear + 2 * (whole - linear),
    }
    assert found["optimizer"] == 16 * trained
    assert found["copies"] == 2 * linear and 0 < found["copies_checkpointed"] < found["copies"]
    assert 0 < found["saved_checkpointed"] < found["saved"] < counted("flux", 64, "PEFT LoRA r=16")["saved"]
    memory(MemorySettings(bases=("sana",), resolutions=(64,), output_dir=tmp_path))
    assert "SANA 1.6B, 64, 1LoRA" in capsys.readouterr().out


def test_the_folder_of_any_pipeline_is_measured(tmp_path, capsys):
    make_pipeline("krea2").save_pretrained(tmp_path / "krea")
    settings = SpeedSettings(family=str(tmp_path / "krea"), precisions=("fp32",), sample_size=8, batch=2, rounds=1)
    settings.layers, settings.threads, settings.output_dir = 1, torch.get_num_threads(), tmp_path
    rows = speed(settings)["train"]
    assert [row["peer"] for row in rows] == list(PEERS)
    # one of two blocks, of a layer of queries and of outputs each (32), of keys and values (16), a gate, and an MLP
    layers = dict(diffusers.Krea2Pipeline.from_pretrained(tmp_path / "krea").transformer.named_modules())
    one = [layer for name, layer in layers.items() if name.startswith("transformer_blocks.0.")]
    outputs = sum(layer.out_features for layer in one if isinstance(layer, torch.nn.Linear))
    assert rows[0]["num_trainable_params"] == outputs
    assert "Krea2Transformer2DModel of krea at its full width, 1 blocks" in capsys.readouterr().out
    assert (tmp_path / "krea.json").is_file()


def test_a_family_that_is_neither_known_nor_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="base model 'nowhere at all': no such folder"):
        speed(SpeedSettings(family="nowhere at all", output_dir=tmp_path))
    (tmp_path / "modular_model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="has neither a transformer nor a unet"):
        speed(SpeedSettings(family=str(tmp_path), output_dir=tmp_path))


def test_int8_is_for_text_to_image():
    with pytest.raises(ValueError, match="int8 is measured on a text-to-image transformer"):
        speed(SpeedSettings(precisions=("int8",)))
