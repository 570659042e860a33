"""The verbs of diffusers' LoRA loaders, line by line of what diffusers' own tests ask of them."""

import copy
import json

import pytest
import torch
from conftest import randomize
from diffusers import DiTPipeline
from safetensors.torch import load_file, save_file

from onelora_diffusion import (
    AdapterConfig,
    OneLoRADiTPipeline,
    OneLoRALoaderMixin,
    adapter_state_dict,
    export_lora,
    inject_adapter,
    read_adapter,
    save_adapter,
)
from onelora_diffusion.pipelines.base import load_base

STOCK = load_base()
CONFIGS = {
    "food": AdapterConfig(num_classes=3),
    "birds": AdapterConfig(method="difffit", sum=True, norms=False, num_classes=2),
    "plain": AdapterConfig(),
}
NAMES = {"food": {0: "pizza", 1: "sushi", 2: "ice_cream"}, "birds": {0: "robin", 1: "wren"}, "plain": None}


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder for each adapter."""
    folders = {}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        model = inject_adapter(copy.deepcopy(STOCK.transformer), config)
        folders[name] = tmp_path_factory.mktemp(name)
        randomize(model, seed=seed)
        save_adapter(model, folders[name], id2label=NAMES[name], base="some/base", training={"steps": 7})
    return folders


@pytest.fixture
def pipe():
    pipe = OneLoRADiTPipeline.from_pipe(copy.deepcopy(STOCK))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def both(pipe, files):
    pipe.load_lora_weights(files["food"], adapter_name="food")
    pipe.load_lora_weights(files["plain"], adapter_name="plain")
    return pipe


def run(pipe, class_labels=(0, 1), **kwargs):
    """(2, H, W, 3), of the same noise each time."""
    kwargs = {"num_inference_steps": 2, "output_type": "np", "generator": torch.manual_seed(0)} | kwargs
    return torch.from_numpy(pipe(list(class_labels), **kwargs).images)


def close(a, b):
    return torch.allclose(a, b, atol=1e-5)


BASE = run(OneLoRADiTPipeline.from_pipe(STOCK))


def test_01_an_adapter_changes_the_output_and_keeps_its_shape(pipe, files):
    assert torch.equal(run(pipe), BASE)
    pipe.load_lora_weights(files["food"])
    assert run(pipe).shape == BASE.shape
    assert not close(run(pipe), BASE)


def test_02_save_unload_load_gives_the_same_output(pipe, files, tmp_path):
    pipe.load_lora_weights(files["birds"])
    expected = run(pipe)
    pipe.save_lora_weights(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["onelora_weights.safetensors"]
    pipe.unload_lora_weights()
    assert torch.equal(run(pipe), BASE)
    pipe.load_lora_weights(tmp_path)
    assert torch.equal(run(pipe), expected)


def test_03_scale_at_call_time_and_set_scale(pipe, files):
    pipe.load_lora_weights(files["plain"], adapter_name="plain")
    full = run(pipe)
    half = run(pipe, cross_attention_kwargs={"scale": 0.5})
    assert not close(half, full) and not close(half, BASE)
    assert close(run(pipe, cross_attention_kwargs={"scale": 0.0}), BASE)
    assert torch.equal(run(pipe), full)  # nothing leaks to the next call
    pipe.set_adapters("plain", 0.5)
    assert torch.equal(run(pipe), half)
    assert close(run(pipe, cross_attention_kwargs={"scale": 2.0}), full)


def test_04_unload_after_fuse_removes_every_trace(both):
    names = [name for name, _ in STOCK.transformer.named_parameters()]
    both.fuse_lora()
    assert not close(run(both), BASE)
    both.unload_lora_weights()
    assert torch.equal(run(both), BASE)
    assert [name for name, _ in both.transformer.named_parameters()] == names
    assert both.get_list_adapters() == {} and both.get_active_adapters() == [] and both.num_fused_loras == 0


def test_05_fuse_and_unfuse(pipe, files):
    pipe.load_lora_weights(files["food"], adapter_name="food")
    active = run(pipe)
    pipe.fuse_lora()
    assert (pipe.num_fused_loras, pipe.fused_loras) == (1, {"food"})
    assert close(run(pipe), active)
    pipe.unfuse_lora()
    assert pipe.num_fused_loras == 0
    assert torch.equal(run(pipe), active)

    pipe.set_adapters("food", 0.7)
    scaled = run(pipe)
    pipe.set_adapters("food")
    pipe.fuse_lora(lora_scale=0.7)
    assert close(run(pipe), scaled)
    pipe.unfuse_lora()
    assert torch.equal(run(pipe), active)  # the scale of the fuse is gone with it


def test_06_two_adapters_disable_and_enable(both):
    a, b = (both.set_adapters(name) or run(both) for name in ("food", "plain"))
    both.set_adapters(["food", "plain"])
    ab = run(both)
    outputs = [BASE, a, b, ab]
    assert not any(close(x, y) for i, x in enumerate(outputs) for y in outputs[:i])
    both.disable_lora()
    both.disable_lora()
    assert torch.equal(run(both), BASE)
    both.enable_lora()
    assert torch.equal(run(both), ab)


def test_07_an_unknown_name_is_refused_and_valid_calls_still_work(both):
    before = run(both)
    for wrong in (
        lambda: both.set_adapters("fish"),
        lambda: both.set_adapters(["food", "fish"]),
        lambda: both.delete_adapters(["food", "fish"]),
        lambda: both.fuse_lora(adapter_names=["fish"]),
        lambda: run(both, adapter_names=["food", "fish"]),
    ):
        with pytest.raises(ValueError, match="'fish' is not in the list of present adapters: food, plain"):
            wrong()
        assert torch.equal(run(both), before)
    both.set_adapters("food")
    assert both.get_active_adapters() == ["food"]


def test_08_weights_by_number_and_by_block(both):
    with pytest.raises(ValueError, match="2 adapter names .* but 3 weights"):
        both.set_adapters(["food", "plain"], [1.0, 0.5, 0.5])
    both.set_adapters("plain")
    full = run(both)
    both.set_adapters("plain", {"transformer": {"transformer_blocks.0": 0.0}})
    without_first = run(both)
    assert not close(without_first, full) and not close(without_first, BASE)
    first = [p for name, p in adapter_state_dict(both.transformer, "plain").items() if "blocks.0." in name]
    both.set_adapters("plain")
    for vector in first:
        vector.data.zero_()
    assert close(run(both), without_first)
    both.set_adapters("plain", {"*": 0.5, "transformer_blocks.0": 0.0})
    halved = run(both)
    both.set_adapters("plain", {"transformer_blocks.0": 0.0})
    assert close(run(both, cross_attention_kwargs={"scale": 0.5}), halved) and not close(halved, without_first)
    with pytest.raises(ValueError, match="serves no layer in 'transformer_blocks.99'"):
        both.set_adapters("plain", {"transformer_blocks.99": 0.5})
    with pytest.raises(ValueError, match="must be a finite number"):
        both.set_adapters("plain", float("inf"))


def test_09_delete(both, files):
    both.set_adapters("plain")
    only_plain = run(both)
    both.delete_adapters("food")
    assert torch.equal(run(both), only_plain)
    both.load_lora_weights(files["food"], adapter_name="food")
    both.delete_adapters(["food", "plain"])
    assert torch.equal(run(both), BASE)
    both.load_lora_weights(files["plain"], adapter_name="plain")
    assert torch.equal(run(both), only_plain)


def test_10_lists_of_adapters(pipe, files):
    for count, name in enumerate(("food", "birds", "plain"), start=1):
        pipe.load_lora_weights(files[name], adapter_name=name)
        assert len(pipe.get_list_adapters()["transformer"]) == count
        assert pipe.get_active_adapters() == [name]
    pipe.set_adapters(["food", "birds"])
    assert pipe.get_list_adapters() == {"transformer": ["food", "birds", "plain"]}
    assert pipe.get_active_adapters() == ["food", "birds"]
    pipe.load_lora_weights(files["food"])
    assert pipe.get_active_adapters() == ["default_0"]


def test_11_fuse_some_or_all(both):
    both.set_adapters(["food", "plain"], [1.0, 0.5])
    together = run(both)
    both.set_adapters("food")
    only_food = run(both)
    both.set_adapters(["food", "plain"], [1.0, 0.5])
    both.fuse_lora(adapter_names=["food"])
    assert close(run(both), only_food)
    both.unfuse_lora()
    both.fuse_lora(adapter_names=["food", "plain"])
    assert both.num_fused_loras == 2
    assert close(run(both), together)
    with pytest.raises(ValueError, match="are fused, and cannot be fused again: unfuse_lora"):
        both.fuse_lora()
    both.unfuse_lora()
    assert both.num_fused_loras == 0
    assert torch.equal(run(both), together)


def test_12_nothing_that_matches_is_an_error(both):
    before = run(both)
    with pytest.raises(ValueError, match=r"none of its 1 keys is one of .* \(unet.conv.weight\)"):
        both.load_lora_weights({"unet.conv.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match="nowhere.lora_A.weight serves no linear layer of DiTTransformer2DModel"):
        both.load_lora_weights({"transformer.nowhere.lora_A.weight": torch.ones(1, 4)})
    with pytest.raises(ValueError, match="holds no adapter"):
        both.load_lora_weights({})
    assert both.get_list_adapters() == {"transformer": ["food", "plain"]}
    assert torch.equal(run(both), before)


def test_13_metadata_makes_the_round_trip(pipe, files, tmp_path):
    pipe.load_lora_weights(files["food"], adapter_name="food")
    pipe.save_lora_weights(tmp_path)
    before, after = read_adapter(files["food"]), read_adapter(tmp_path)
    assert (after.config, after.id2label, after.base) == (CONFIGS["food"], NAMES["food"], "some/base")
    assert after.training == before.training == {"steps": 7}
    tensors, metadata = pipe.lora_state_dict(tmp_path, return_lora_metadata=True)
    assert metadata["onelora"]["id2label"]["0"] == "pizza"
    assert all(torch.equal(tensor, tensors[f"transformer.{key}"]) for key, tensor in before.tensors.items())


def test_14_unload_then_inject_and_a_clash_of_names(pipe, files):
    pipe.load_lora_weights(files["food"], adapter_name="food")
    before = run(pipe)
    with pytest.raises(ValueError, match="'food' is already in use"):
        pipe.load_lora_weights(files["plain"], adapter_name="food")
    assert torch.equal(run(pipe), before)
    pipe.unload_lora_weights()
    inject_adapter(pipe.transformer, AdapterConfig(), "food")
    assert torch.equal(run(pipe), BASE)


def test_15_where_adapters_are_looked_for(pipe, files, tmp_path, monkeypatch):
    weights = (files["plain"] / "onelora_weights.safetensors").read_bytes()
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(weights)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.safetensors").write_bytes(weights)
    (tmp_path / "pickle.bin").write_bytes(b"\x80\x04")
    wrong = [
        ((tmp_path,), {}, "holds a.safetensors, b.safetensors: give the weight_name"),
        ((tmp_path,), {"weight_name": "z.safetensors"}, "no file 'z.safetensors' in .*there is a.safetensors"),
        ((tmp_path,), {"subfolder": "nowhere"}, "there is no such file or folder"),
        ((tmp_path / "nowhere",), {}, "there is no such file or folder, and it is no hub id"),
        ((tmp_path / "pickle.bin",), {}, "is a pickle"),
        (("some/repository",), {"local_files_only": True, "cache_dir": tmp_path}, "is not in the cache"),
        ((tmp_path / "a.safetensors",), {"weight_name": "b.safetensors"}, "is a file, and weight_name"),
        ((tmp_path,), {"hotswap": True}, "hotswap=True needs the adapter_name"),
    ]
    for args, kwargs, message in wrong:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            pipe.load_lora_weights(*args, **kwargs)
        assert pipe.get_list_adapters() == {}
    with pytest.raises(ValueError, match="is a file, and a folder is needed"):
        pipe.load_lora_weights(files["plain"])
        pipe.save_lora_weights(tmp_path / "a.safetensors")
    outputs = []
    for args, kwargs in [
        ((tmp_path / "a.safetensors",), {}),
        ((str(tmp_path),), {"weight_name": "b.safetensors"}),
        ((tmp_path,), {"subfolder": "sub"}),
        ((load_file(tmp_path / "a.safetensors"),), {}),
    ]:
        pipe.load_lora_weights(*args, **kwargs)
        outputs.append(run(pipe))
    assert all(torch.equal(output, outputs[0]) for output in outputs) and not close(outputs[0], BASE)


def test_15_a_hub_id(pipe, files, tmp_path, monkeypatch):
    """A repository that is in the hub's cache, with no network."""
    asked = []

    def download(repo_id, filename, **settings):
        from huggingface_hub.errors import EntryNotFoundError

        asked.append((repo_id, filename, settings["revision"]))
        if filename != "adapter_model.safetensors":
            raise EntryNotFoundError("no such file")
        return str(files["food"] / "onelora_weights.safetensors")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    pipe.load_lora_weights("someone/food", revision="v1")
    assert asked[0] == ("someone/food", "onelora_weights.safetensors", "v1")
    assert pipe.get_label_ids("sushi") == [1]
    with pytest.raises(FileNotFoundError, match="'someone/food' has no other.safetensors"):
        pipe.load_lora_weights("someone/food", weight_name="other.safetensors")


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_16_safe_fusing(both, value):
    before = {name: p.clone() for name, p in STOCK.transformer.named_parameters()}
    with torch.no_grad():
        adapter_state_dict(both.transformer, "plain")["proj_out_2.onelora_b"][0] = value
    with pytest.raises(ValueError, match="gives NaN or infinity: nothing was merged"):
        both.fuse_lora(safe_fusing=True)
    assert both.num_fused_loras == 0 and both.get_active_adapters() == ["plain"]
    own = dict(both.transformer.named_parameters())
    assert all(torch.equal(own[name], p) for name, p in before.items() if name in own)


def test_17_half_precision_keeps_fp32_vectors(pipe, files):
    pipe.to(torch.bfloat16)
    pipe.load_lora_weights(files["food"], adapter_name="food")
    expected = run(pipe)
    vectors = {key: p.clone() for key, p in adapter_state_dict(pipe.transformer, "food").items()}
    pipe.to(torch.float32).to(torch.bfloat16)
    own = adapter_state_dict(pipe.transformer, "food")
    assert all(p.dtype == torch.float32 and torch.equal(p, vectors[key]) for key, p in own.items())
    assert pipe.transformer.dtype == torch.bfloat16
    assert torch.equal(run(pipe), expected)


def test_17_layerwise_casting_keeps_fp32_vectors(pipe, files):
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    cast = run(pipe)
    pipe.load_lora_weights(files["plain"], adapter_name="plain")
    own = adapter_state_dict(pipe.transformer, "plain")
    assert not close(run(pipe), cast)
    assert all(torch.equal(own[key], tensor) for key, tensor in read_adapter(files["plain"]).tensors.items())


@pytest.mark.parametrize("name", ["food", "birds"])
def test_17_offloaded_weights(pipe, files, name):
    """Between two calls of a layer its weights are on the meta device."""
    from accelerate import cpu_offload

    pipe.load_lora_weights(files[name], adapter_name=name)
    expected = run(pipe)
    pipe.unload_lora_weights()
    cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
    assert next(pipe.transformer.parameters()).is_meta
    pipe.load_lora_weights(files[name], adapter_name=name)
    assert close(run(pipe), expected)
    assert close(run(pipe, adapter_names=[name, None])[:1], expected[:1])
    with pytest.raises(ValueError, match="weights are offloaded"):
        pipe.fuse_lora()


def test_18_hot_swapping_does_not_compile_again(pipe, files, tmp_path):
    pipe.load_lora_weights(files["plain"], adapter_name="slot")
    twin = OneLoRADiTPipeline.from_pipe(copy.deepcopy(STOCK))
    inject_adapter(twin.transformer, CONFIGS["plain"])
    save_adapter(randomize(twin.transformer, seed=9), tmp_path)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    first = run(pipe)
    with torch.compiler.set_stance("fail_on_recompile"):
        pipe.load_lora_weights(tmp_path, adapter_name="slot", hotswap=True)
        second = run(pipe)
    assert not close(second, first)
    assert torch.allclose(second, run(twin), atol=1e-4)
    with pytest.raises(ValueError, match="is of another kind or shape than adapter 'slot'"):
        pipe.load_lora_weights(files["food"], adapter_name="slot", hotswap=True)
    with pytest.raises(ValueError, match="'other' is not in the list"):
        pipe.load_lora_weights(tmp_path, adapter_name="other", hotswap=True)
    assert torch.equal(run(pipe), second)


def test_bad_files_leave_the_pipeline_as_it_was(both, files, tmp_path):
    before, file = run(both), tmp_path / "bad.safetensors"
    good = (files["plain"] / "onelora_weights.safetensors").read_bytes()
    key = "transformer.proj_out_2.onelora_b"
    whole = load_file(files["plain"] / "onelora_weights.safetensors")

    def bare(**changes):
        save_file(whole | changes, file)

    for write, message in [
        (lambda: file.write_bytes(good[: len(good) // 2]), "is damaged or no safetensors file"),
        (lambda: torch.save({"b": torch.zeros(2)}, file), "is damaged or no safetensors file"),
        (lambda: bare(**{key: torch.full_like(whole[key], float("inf"))}), f"{key} holds NaN or infinity"),
        (lambda: bare(**{key: torch.zeros(3)}), f"{key} has shape \\(3,\\), but this base needs"),
        (lambda: bare(**{"transformer.nowhere.onelora_b": torch.zeros(3)}), "'nowhere' matches no linear layer"),
    ]:
        write()
        with pytest.raises(ValueError, match=message):
            both.load_lora_weights(file, adapter_name="bad")
        assert both.get_list_adapters() == {"transformer": ["food", "plain"]}
        assert torch.equal(run(both), before)


def test_a_foreign_base(files):
    from conftest import make_dit

    other = DiTPipeline(make_dit(), STOCK.vae, STOCK.scheduler)
    with pytest.raises(ValueError, match="is missing|fits nothing|but this base needs"):
        OneLoRADiTPipeline.from_pipe(other).load_lora_weights(files["plain"])
    assert not hasattr(other.transformer, "_onelora")


def test_from_pipe_shares_the_weights_and_leaves_the_pipeline_as_it_was(files):
    stock = copy.deepcopy(STOCK)
    pipe = OneLoRADiTPipeline.from_pipe(stock)
    assert type(stock) is DiTPipeline and pipe.transformer is stock.transformer and pipe.vae is stock.vae
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(files["food"])
    stock.set_progress_bar_config(disable=True)
    assert torch.equal(run(stock), run(pipe))  # label 1000 of the stock call is the null row of three classes


def test_any_pipeline_class_and_instance(files, tmp_path):
    class Own(OneLoRALoaderMixin, DiTPipeline):
        pass

    stock = copy.deepcopy(STOCK)
    for pipe in (Own.from_pipe(stock), OneLoRALoaderMixin.from_pipe(stock)):
        pipe.load_lora_weights(files["food"], adapter_name="food")
        assert isinstance(pipe, OneLoRALoaderMixin) and isinstance(pipe, DiTPipeline)
        pipe.disable_lora()
        pipe.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "DiTPipeline"
        assert torch.equal(run(OneLoRADiTPipeline.from_pretrained(tmp_path)), BASE)
        pipe.unload_lora_weights()

    class Other(OneLoRALoaderMixin):
        transformer = None

    with pytest.raises(ValueError, match="neither a transformer nor a unet"):
        Other().load_lora_weights(files["food"])


def test_save_lora_weights_of_several_or_none(both, tmp_path):
    both.set_adapters(["food", "plain"])
    with pytest.raises(ValueError, match="food, plain are active: give the adapter_name"):
        both.save_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="would write a pickle"):
        both.save_lora_weights(tmp_path, safe_serialization=False)
    both.save_lora_weights(tmp_path, adapter_name="plain", weight_name="mine.safetensors")
    assert read_adapter(tmp_path / "mine.safetensors").config == CONFIGS["plain"]


def test_an_exported_lora_comes_back(pipe, files, tmp_path):
    pipe.load_lora_weights(files["plain"], adapter_name="plain")
    expected = run(pipe)
    export_lora(pipe.transformer, tmp_path, "plain")
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path)
    assert torch.equal(run(pipe), expected)
