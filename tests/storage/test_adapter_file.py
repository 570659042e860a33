import json
import os
import re

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tiny_models import make_dit, randomize

from onelora_diffusion import (
    AdapterConfig,
    adapter_state_dict,
    export_lora,
    inject_adapter,
    load_adapter,
    merge_adapter,
    read_adapter,
    save_adapter,
    unload_adapter,
)
from onelora_diffusion.storage.adapter_file import describe_adapter, read_opened
from onelora_diffusion.storage.opening import opened

CONFIG = AdapterConfig(method="difffit", sum=True, num_classes=3)


@pytest.fixture
def saved(dit, tmp_path):
    randomize(inject_adapter(dit, CONFIG))
    return save_adapter(
        dit, tmp_path / "food", id2label={0: "pizza"}, base="facebook/DiT-XL-2-256", training={"fd": 1.5}
    )


def test_round_trip_is_bitwise(dit, inputs, saved):
    assert saved.name == "onelora_weights.safetensors"
    expected = dit(**inputs).sample
    for path in (saved, saved.parent):
        assert torch.equal(load_adapter(make_dit(), path)(**inputs).sample, expected)


def test_a_convolution_of_1_by_1_is_loaded_from_its_file(tmp_path):
    models = [torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 2, 1)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    randomize(inject_adapter(models[0], AdapterConfig(targets=("0", "1"))))
    x = torch.randn(2, 3, 5, 5)
    load_adapter(models[1], save_adapter(models[0], tmp_path))
    assert torch.equal(models[1](x), models[0](x))


def test_the_file_describes_itself(dit, saved):
    file = read_adapter(saved)
    assert file.config == CONFIG
    assert (file.id2label, file.base, file.training) == ({0: "pizza"}, "facebook/DiT-XL-2-256", {"fd": 1.5})
    keys = set(load_file(saved))
    assert {"transformer.class_embedding.weight", "transformer.proj_out_1.onelora_b"} <= keys
    assert {"transformer.transformer_blocks.1.attn1.to_out.0.onelora_gamma"} <= keys
    assert len(keys) == 3 * 16 + 1
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_the_file_can_be_read_by_whom_any_new_file_can(saved, tmp_path):
    (tmp_path / "other").touch()
    assert saved.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_other_values_and_bf16(dit, tmp_path):
    inject_adapter(dit, CONFIG)
    ema = {name: torch.full_like(p, 0.123) for name, p in adapter_state_dict(dit).items()}
    path = save_adapter(dit, tmp_path / "a.safetensors", state_dict=ema, dtype=torch.bfloat16)
    tensors = read_adapter(path).tensors
    assert all(t.dtype == torch.bfloat16 and (t == torch.tensor(0.123).bfloat16()).all() for t in tensors.values())
    assert adapter_state_dict(load_adapter(make_dit(), path))["proj_out_2.onelora_b"].dtype == torch.float32


def test_loading_beside_another_adapter(dit, inputs, saved):
    model = inject_adapter(make_dit(), AdapterConfig(), "first")
    load_adapter(model, saved, "second")
    assert torch.equal(model(**inputs).sample, dit(**inputs).sample)
    unload_adapter(model, "first")
    assert torch.equal(model(**inputs).sample, dit(**inputs).sample)


def rewrite(path, change):
    """Apply `change` to a file's tensors, keeping its header."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


B = "transformer.proj_out_2.onelora_b"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(B), f"{B} is missing; this base needs it with shape \\(32,\\)"),
        (lambda t: t.update({B: torch.zeros(9)}), f"{B} has shape \\(9,\\), but this base needs shape \\(32,\\)"),
        (lambda t: t.update(extra=torch.zeros(2)), "extra with shape \\(2,\\) fits nothing in this base"),
        (lambda t: t[B].fill_(float("nan")), f"{B} holds NaN"),
        (lambda t: t[B].fill_(float("inf")), f"{B} holds NaN or infinity"),
        (lambda t: t[B].copy_(torch.tensor([float("inf"), -float("inf")] * 16)), f"{B} holds NaN or infinity"),
    ],
)
def test_wrong_contents_leave_the_model_as_it_was(inputs, saved, change, message):
    rewrite(saved, change)
    model = make_dit()
    modules, expected = list(model.modules()), model(**inputs).sample
    with pytest.raises(ValueError, match=message):
        load_adapter(model, saved)
    assert list(model.modules()) == modules
    assert torch.equal(model(**inputs).sample, expected)


@pytest.mark.parametrize("value", [3e38, -1e6])
def test_values_too_large_to_compute_with(saved, value):
    rewrite(saved, lambda t: t[B].__setitem__(3, value))
    with pytest.raises(ValueError, match=re.escape(f"{saved}: {B} holds {value:g}, and no weight is beyond 65504")):
        read_adapter(saved)


def test_truncated_foreign_and_missing_files(dit, saved, tmp_path):
    whole = saved.read_bytes()
    saved.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        load_adapter(make_dit(), saved)
    torch.save({"b": torch.zeros(2)}, saved)
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        load_adapter(make_dit(), saved)
    save_file({"b": torch.zeros(2)}, saved)
    with pytest.raises(ValueError, match="holds no adapter: none of its 1 keys"):
        load_adapter(make_dit(), saved)
    with pytest.raises(FileNotFoundError, match="no adapter at"):
        load_adapter(make_dit(), tmp_path / "nothing")


def test_foreign_base(saved):
    from diffusers import DiTTransformer2DModel

    deeper = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        out_channels=8,
        num_layers=3,
        sample_size=8,
        num_embeds_ada_norm=10,
    )
    with pytest.raises(ValueError, match="transformer_blocks.2.* is missing"):
        load_adapter(deeper, saved)
    with pytest.raises(ValueError, match="made for another base \\(facebook/DiT-XL-2-256\\)"):
        load_adapter(make_dit(num_classes=12), saved)


def test_unknown_settings_in_the_header(saved):
    header = json.loads(_metadata(saved)["onelora"])
    header["config"]["colour"] = "red"
    save_file(load_file(saved), saved, {"onelora": json.dumps(header)})
    with pytest.raises(ValueError, match="unknown adapter settings colour"):
        load_adapter(make_dit(), saved)


def _metadata(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


def test_a_full_disk_leaves_the_old_file(dit, saved, monkeypatch):
    before = saved.read_bytes()

    def no_space(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("onelora_diffusion.files.save_file", no_space)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(dit, saved)
    assert saved.read_bytes() == before
    assert len(list(saved.parent.iterdir())) == 1


def test_state_dict_with_other_names_is_refused(dit, tmp_path):
    inject_adapter(dit, AdapterConfig(targets=("to_q",)))
    with pytest.raises(ValueError, match="state_dict differs from the adapter in"):
        save_adapter(dit, tmp_path, state_dict={"x": torch.zeros(1)})


def test_tensors_that_are_shared_out_over_processes_are_gathered_first(tmp_path):
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    model = randomize(inject_adapter(torch.nn.Sequential(torch.nn.Linear(8, 6)), AdapterConfig()))
    b = adapter_state_dict(model)["0.onelora_b"].detach().clone()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model)
        for write in (save_adapter, export_lora):
            with pytest.raises(
                ValueError, match=r"0.onelora_b is shared out over processes: gather .*full_tensor\(\)"
            ):
                write(model, tmp_path / "a.safetensors")
        with pytest.raises(ValueError, match="0 is shared out over processes: merge where the model is whole"):
            merge_adapter(model)
        whole = {name: tensor.full_tensor() for name, tensor in adapter_state_dict(model).items()}
        save_adapter(model, tmp_path / "a.safetensors", state_dict=whole)
    finally:
        distributed.destroy_process_group()
    assert torch.equal(read_adapter(tmp_path / "a.safetensors").tensors["0.onelora_b"], b)


@pytest.mark.parametrize("method", ["1lora", "difffit", "lora"])
def test_a_file_without_a_checksum_that_lacks_a_layer_is_refused(method, tmp_path):
    """As version 0.1 wrote files; those of today are refused as damaged."""
    path = save_adapter(randomize(inject_adapter(make_dit(), AdapterConfig(method))), tmp_path)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["onelora"])
    del header["format"]
    kept = {key: tensor for key, tensor in load_file(path).items() if "blocks.1.attn1.to_k." not in key}
    save_file(kept, path, {"onelora": json.dumps(header)})
    with pytest.raises(
        ValueError, match=r"transformer_blocks.1.attn1.to_k.onelora_\S+ is missing; this base needs it"
    ):
        load_adapter(make_dit(), path)


def test_a_file_that_is_cut_short_while_it_is_read_is_damaged(saved):
    """A process that had the file mapped would be ended by SIGBUS, as by `cp` over an adapter that is in use."""
    with pytest.raises(ValueError, match="is damaged"), opened(saved) as file:
        os.truncate(saved, 4096)
        read_opened(file)


def test_the_digest_tells_settings_and_values_apart(dit, saved, tmp_path):
    found = {read_adapter(saved).digest, describe_adapter(saved).digest}
    assert len(found) == 1
    tensors = load_file(saved)
    for changed in ({"note": "another"}, {}):  # files of format 1 have no checksum
        with safe_open(saved, framework="pt") as file:
            metadata = {"onelora": file.metadata()["onelora"].replace('"format": 2, ', "")} | changed
        save_file(tensors, tmp_path / "older.safetensors", metadata=metadata)
        found.add(describe_adapter(tmp_path / "older.safetensors").digest)
    assert len(found) == 3
