"""The verbs of diffusers' LoRA loaders, line by line of what diffusers' own tests ask of them."""

import copy
import functools
import json

import pytest
import torch
from diffusers import DiTPipeline
from rounding import assert_rounded, rounding_of_images
from safetensors.torch import load_file, save_file
from tiny_models import randomize

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

CONFIGS = {
    "food": AdapterConfig(num_classes=3),
    "birds": AdapterConfig(method="difffit", sum=True, norms=False, num_classes=2),
    "plain": AdapterConfig(),
}
NAMES = {"food": {0: "pizza", 1: "sushi", 2: "ice_cream"}, "birds": {0: "robin", 1: "wren"}, "plain": None}


@functools.cache
def stock():
    return load_base()


@functools.cache
def base_images():
    return run(OneLoRADiTPipeline.from_pipe(stock()))


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder for each adapter."""
    folders = {}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        model = inject_adapter(copy.deepcopy(stock().transformer), config)
        folders[name] = tmp_path_factory.mktemp(name)
        randomize(model, seed=seed)
        save_adapter(model, folders[name], id2label=NAMES[name], base="some/base", training={"steps": 7})
    return folders


@pytest.fixture
def pipe():
    pipe = OneLoRADiTPipeline.from_pipe(copy.deepcopy(stock()))
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
    return torch.allclose(a, b, rtol=0, atol=rounding_of_images(stock(), 2))


def test_01_an_adapter_changes_the_output_and_keeps_its_shape(pipe, files):
    assert torch.equal(run(pipe), base_images())
    pipe.load_lora_weights(files["food"])
    assert run(pipe).shape == base_images().shape
    assert not close(run(pipe), base_images())


def test_02_save_unload_load_gives_the_same_output(pipe, files, tmp_path):
    pipe.load_lora_weights(files["birds"])
    expected = run(pipe)
    pipe.save_lora_weights(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["onelora_weights.safetensors"]
    pipe.unload_lora_weights()
    assert torch.equal(run(pipe), base_images())
    pipe.load_lora_weights(tmp_path)
    assert torch.equal(run(pipe), expected)


def test_03_scale_at_call_time_and_set_scale(pipe, files):
    pipe.load_lora_weights(files["plain"], adapter_name="plain")
    full = run(pipe)
    half = run(pipe, cross_attention_kwargs={"scale": 0.5})
    assert not close(half, full) and not close(half, base_images())
    assert close(run(pipe, cross_attention_kwargs={"scale": 0.0}), base_images())
    assert torch.equal(run(pipe), full)  # nothing leaks to the next call
    pipe.set_adapters("plain", 0.5)
    assert torch.equal(run(pipe), half)
    assert close(run(pipe, cross_attention_kwargs={"scale": 2.0}), full)


def test_04_unload_after_fuse_removes_every_trace(both):
    names = [name for name, _ in stock().transformer.named_parameters()]
    both.fuse_lora()
    assert not close(run(both), base_images())
    both.unload_lora_weights()
    assert torch.equal(run(both), base_images())
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
    both.set_adapters(("food", "plain"))
    ab = run(both)
    outputs = [base_images(), a, b, ab]
    assert not any(close(x, y) for i, x in enumerate(outputs) for y in outputs[:i])
    both.disable_lora()
    both.disable_lora()
    assert torch.equal(run(both), base_images())
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
    assert not close(without_first, full) and not close(without_first, base_images())
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
    assert torch.equal(run(both), base_images())
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
    both.set_adapters(("food", "plain"), (1.0, 0.5))
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
    with pytest.raises(ValueError, match="are merged: unmerge them before others are merged .*unfuse_lora"):
        both.fuse_lora()
    both.unfuse_lora()
    assert both.num_fused_loras == 0
    assert torch.equal(run(both), together)


def test_12_nothing_that_matches_is_an_error(both):
    before = run(both)
    with pytest.raises(ValueError, match=r"none of its 1 keys is one of .* \(unet.conv.weight\)"):
        both.load_lora_weights({"unet.conv.weight": torch.zeros(2)})
    with pytest.raises(
        ValueError,
        match="nowhere.lora_A.weight serves no linear layer, nor 1 x 1 convolution, of DiTTransformer2DModel",
    ):
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
    assert torch.equal(run(pipe), base_images())


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
        ((tmp_path,), {"weight_name": "/etc/passwd"}, "weight_name '/etc/passwd' leads out of the folder"),
        ((tmp_path,), {"subfolder": "sub/../.."}, "subfolder 'sub/../..' leads out of the folder"),
        ((tmp_path / "nowhere",), {}, "there is no such file or folder, and it is no hub id"),
        ((tmp_path / "pickle.bin",), {}, "is a pickle"),
        (("some/repository",), {"local_files_only": True, "cache_dir": tmp_path}, "is not in the cache"),
        ((tmp_path / "a.safetensors",), {"weight_name": "b.safetensors"}, "is a file, and weight_name"),
        ((tmp_path,), {"hotswap": True}, "has no adapter: inject or load one first"),
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
    assert all(torch.equal(output, outputs[0]) for output in outputs) and not close(outputs[0], base_images())


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
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda api, hub_id, timeout: None)
    pipe.load_lora_weights("someone/food", revision="v1")
    assert asked[0] == ("someone/food", "onelora_weights.safetensors", "v1")
    assert pipe.get_label_ids("sushi") == [1]
    with pytest.raises(FileNotFoundError, match="'someone/food' has no other.safetensors"):
        pipe.load_lora_weights("someone/food", weight_name="other.safetensors")


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_16_safe_fusing(both, value):
    before = {name: p.clone() for name, p in stock().transformer.named_parameters()}
    with torch.no_grad():
        adapter_state_dict(both.transformer, "plain")["proj_out_2.onelora_b"][0] = value
    with pytest.raises(ValueError, match="gives NaN or infinity: nothing was merged"):
        both.fuse_lora()
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
    twin = OneLoRADiTPipeline.from_pipe(copy.deepcopy(stock()))
    inject_adapter(twin.transformer, CONFIGS["plain"])
    save_adapter(randomize(twin.transformer, seed=9), tmp_path)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    first = run(pipe)
    with torch.compiler.set_stance("fail_on_recompile"):
        pipe.load_lora_weights(tmp_path, adapter_name="slot", hotswap=True)
        second = run(pipe)
    assert not close(second, first)
    assert close(second, run(twin))
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
        (
            lambda: bare(**{"transformer.nowhere.onelora_b": torch.zeros(3)}),
            "nowhere.onelora_b .*fits nothing in this base",
        ),
    ]:
        write()
        with pytest.raises(ValueError, match=message):
            both.load_lora_weights(file, adapter_name="bad")
        assert both.get_list_adapters() == {"transformer": ["food", "plain"]}
        assert torch.equal(run(both), before)


def test_a_foreign_base(files):
    from tiny_models import make_dit

    other = DiTPipeline(make_dit(), stock().vae, stock().scheduler)
    with pytest.raises(ValueError, match="is missing|fits nothing|but this base needs"):
        OneLoRADiTPipeline.from_pipe(other).load_lora_weights(files["plain"])
    assert not hasattr(other.transformer, "_onelora")


def test_from_pipe_shares_the_weights_and_leaves_the_pipeline_as_it_was(files):
    own = copy.deepcopy(stock())
    pipe = OneLoRADiTPipeline.from_pipe(own)
    assert type(own) is DiTPipeline and pipe.transformer is own.transformer and pipe.vae is own.vae
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(files["food"])
    own.set_progress_bar_config(disable=True)
    assert torch.equal(run(own), run(pipe))  # label 1000 of the stock call is the null row of three classes


def test_any_pipeline_class_and_instance(files, tmp_path):
    class Own(OneLoRALoaderMixin, DiTPipeline):
        pass

    own = copy.deepcopy(stock())
    for pipe in (Own.from_pipe(own), OneLoRALoaderMixin.from_pipe(own)):
        pipe.load_lora_weights(files["food"], adapter_name="food")
        assert isinstance(pipe, OneLoRALoaderMixin) and isinstance(pipe, DiTPipeline)
        pipe.disable_lora()
        pipe.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "DiTPipeline"
        assert torch.equal(run(OneLoRADiTPipeline.from_pretrained(tmp_path)), base_images())
        pipe.unload_lora_weights()

    class Other(OneLoRALoaderMixin):
        transformer = None

    with pytest.raises(ValueError, match="neither a transformer nor a unet"):
        Other().load_lora_weights(files["food"])


def test_save_lora_weights_of_several_or_none(both, tmp_path):
    both.set_adapters(["food", "plain"])
    with pytest.raises(ValueError, match="food, plain are there to choose from: give the adapter_name"):
        both.save_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="leads out of the folder"):
        both.save_lora_weights(tmp_path / "inside", adapter_name="plain", weight_name="../x.safetensors")
    assert not list(tmp_path.iterdir())
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


# ---------------------------------------------------------------------------------------------------
# Calls that are written for diffusers' own pipelines


def test_fuse_lora_takes_components_first_as_in_diffusers(both):
    active = run(both)
    for wrong in (["plain"], [], "plain", 0.7, ["text_encoder"], ["transformer", "vae"]):
        with pytest.raises(
            ValueError, match="adapters are in 'transformer' only; adapters are named by adapter_names"
        ):
            both.fuse_lora(wrong)
        with pytest.raises(ValueError, match="adapters are in 'transformer' only"):
            both.unfuse_lora(wrong)
        assert both.num_fused_loras == 0 and torch.equal(run(both), active)
    both.set_adapters("plain", 0.7)
    weighed = run(both)
    both.set_adapters("plain")
    both.fuse_lora(["text_encoder", "transformer", "text_encoder_2"], 0.7, True, ["plain"])
    assert both.fused_loras == {"plain"} and close(run(both), weighed)
    both.unfuse_lora(components=["transformer", "text_encoder"])
    assert both.num_fused_loras == 0 and torch.equal(run(both), active)


def test_weights_by_component(both, caplog):
    both.set_adapters("plain", 0.5)
    half = run(both)
    both.set_adapters("plain", {"text_encoder": 0.3, "transformer": 0.5})
    assert "weights of text_encoder are left out" in caplog.text
    assert torch.equal(run(both), half)
    both.set_adapters(["plain"], [{"text_encoder_2": 0.3}])
    assert both.transformer._onelora.weights == {"plain": 1.0}
    both.set_adapters("plain", {"text_encoder": 0.3, "transformer_blocks.0": 0.0})
    without_first = run(both)
    both.set_adapters("plain", {"transformer_blocks.0": 0.0})
    assert torch.equal(run(both), without_first)
    with pytest.raises(ValueError, match="serves no layer in 'unet'"):
        both.set_adapters("plain", {"text_encoder": 0.3, "unet": 0.5})
    assert torch.equal(run(both), without_first)


def test_weights_by_component_and_block_of_a_unet():
    from diffusers import StableDiffusionXLPipeline
    from tiny_models import unet

    torch.manual_seed(0)
    model, inputs = unet()
    pipe = OneLoRALoaderMixin.from_pipe(StableDiffusionXLPipeline(None, None, None, None, None, model, None))
    randomize(inject_adapter(model, AdapterConfig(), "it"))
    with torch.no_grad():
        full = model(**inputs).sample
        pipe.set_adapters("it", {"text_encoder": 0.2, "unet": {"down": 0.5, "mid": 1.0, "up": {"block_0": 0.25}}})
        nested = model(**inputs).sample
        pipe.set_adapters("it", {"down_blocks": 0.5, "up_blocks.0": 0.25})
        assert torch.equal(model(**inputs).sample, nested) and not close(nested, full)


def test_keywords_of_other_callers(pipe, files):
    pipe.load_lora_weights(
        str(files["plain"]),
        adapter_name="a",
        use_safetensors=True,
        low_cpu_mem_usage=False,
        weight_name="onelora_weights.safetensors",
        local_files_only=True,
        cache_dir=None,
        token=None,
    )
    expected = run(pipe)
    for name, value in [("use_safetensors", False), ("proxies", {"http": "example.org"})]:
        with pytest.raises(ValueError, match=name):
            pipe.load_lora_weights(files["plain"], **{name: value})
        with pytest.raises(ValueError, match=name):
            pipe.lora_state_dict(files["plain"], **{name: value})
    with pytest.raises(TypeError, match="weights_name"):
        pipe.load_lora_weights(files["plain"], weights_name="x.safetensors")
    assert pipe.get_list_adapters() == {"transformer": ["a"]} and torch.equal(run(pipe), expected)


def test_lora_layers_are_saved_by_the_class_as_diffusers_saves_them(tmp_path):
    """As diffusers' training scripts call it; stock diffusers reads the file to the same layers and settings."""
    from diffusers import StableDiffusion3Pipeline
    from peft import LoraConfig, get_peft_model_state_dict
    from tiny_models import sd3

    model, inputs = sd3()
    base = copy.deepcopy(model)
    model.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "ff.net.2"], init_lora_weights=False))
    layers = {
        "transformer_lora_layers": get_peft_model_state_dict(model),
        "transformer_lora_adapter_metadata": model.peft_config["default"].to_dict(),
    }

    class Ours(OneLoRALoaderMixin, StableDiffusion3Pipeline):
        pass

    Ours.save_lora_weights(tmp_path / "ours", **layers)
    StableDiffusion3Pipeline.save_lora_weights(tmp_path / "stock", **layers)
    ours, stock_file = (
        StableDiffusion3Pipeline.lora_state_dict(tmp_path / name, return_lora_metadata=True)
        for name in ("ours", "stock")
    )
    assert ours[1]["transformer.lora_alpha"] == 6
    assert set(ours[1].pop("transformer.target_modules")) == set(stock_file[1].pop("transformer.target_modules"))
    assert ours[1] == stock_file[1] and set(ours[0]) == set(stock_file[0])
    assert all(torch.equal(tensor, stock_file[0][key]) for key, tensor in ours[0].items())

    pipe = Ours.from_pipe(StableDiffusion3Pipeline(base, None, None, None, None, None, None, None, None))
    pipe.load_lora_weights(tmp_path / "ours")
    with torch.no_grad():
        assert_rounded(base(**inputs).sample, model(**inputs).sample, model)
    pipe.save_lora_weights(tmp_path / "again", weight_name="it.safetensors", **layers)  # the same from an instance
    again = load_file(tmp_path / "again" / "it.safetensors")
    assert all(torch.equal(tensor, again[key]) for key, tensor in ours[0].items())


def test_what_save_lora_weights_cannot_place_is_refused(both, tmp_path):
    values = {key: 2 * tensor for key, tensor in adapter_state_dict(both.transformer, "plain").items()}
    with pytest.raises(ValueError, match="OneLoRADiTPipeline.save_lora_weights writes PEFT's LoRA layers alone"):
        OneLoRADiTPipeline.save_lora_weights(tmp_path, transformer_lora_layers=values)
    with pytest.raises(ValueError, match="unet_lora_layers: the adapters of this pipeline are in 'transformer'"):
        both.save_lora_weights(tmp_path, unet_lora_layers=values)
    assert not list(tmp_path.iterdir())
    both.save_lora_weights(tmp_path, values)
    written = read_adapter(tmp_path).tensors
    assert all(torch.equal(written[key], tensor) for key, tensor in values.items())


def test_an_adapter_of_a_base_that_was_loaded_from_a_path(tmp_path):
    stock().save_pretrained(tmp_path / "base")
    pipe = OneLoRADiTPipeline.from_pretrained(tmp_path / "base")
    inject_adapter(pipe.transformer, AdapterConfig())
    pipe.save_lora_weights(tmp_path / "adapter")
    assert read_adapter(tmp_path / "adapter").base == str(tmp_path / "base")


def test_set_lora_device_moves_the_named_adapters(both):
    def devices(name):
        return {tensor.device.type for tensor in adapter_state_dict(both.transformer, name).values()}

    before = run(both)
    both.set_lora_device(["food"], "meta")  # any device but this one; plain still serves
    assert (devices("food"), devices("plain")) == ({"meta"}, {"cpu"})
    assert torch.equal(run(both), before)
    with pytest.raises(ValueError, match="'fish' is not in the list"):
        both.set_lora_device(["plain", "fish"], "meta")
    assert devices("plain") == {"cpu"}


def test_enable_lora_hotswap_needs_nothing(pipe, files):
    pipe.enable_lora_hotswap(target_rank=64, check_compiled="warn")
    pipe.load_lora_weights(files["plain"], adapter_name="slot")
    expected = run(pipe)
    for vector in adapter_state_dict(pipe.transformer, "slot").values():
        vector.data.zero_()
    pipe.load_lora_weights(files["plain"], adapter_name="slot", hotswap=True)
    assert torch.equal(run(pipe), expected)


def test_the_one_active_adapter_is_meant_where_none_is_named(both, files):
    book = both.transformer._onelora
    both.set_adapters(adapter_weights=0.5)
    assert book.serving == {"plain": 0.5}
    both.set_adapters("food")
    for vector in adapter_state_dict(both.transformer, "food").values():
        vector.data.zero_()
    both.load_lora_weights(files["food"], hotswap=True)
    assert all(vector.any() for vector in adapter_state_dict(both.transformer, "food").values())
    both.set_lora_device(device="meta")
    assert all(vector.is_meta for vector in adapter_state_dict(both.transformer, "food").values())
    both.delete_adapters()
    assert both.get_list_adapters() == {"transformer": ["plain"]}
    both.set_adapters()
    assert both.get_active_adapters() == ["plain"]


def test_of_several_active_adapters_one_is_to_be_named(both, files):
    both.set_adapters(["food", "plain"])
    for verb in (
        lambda: both.set_adapters(adapter_weights=0.5),
        both.delete_adapters,
        both.set_lora_device,
        lambda: both.load_lora_weights(files["food"], hotswap=True),
    ):
        with pytest.raises(ValueError, match="adapters food, plain are there to choose from: give the adapter_name"):
            verb()
    assert both.transformer._onelora.serving == {"food": 1.0, "plain": 1.0}


def test_a_table_of_the_adapters(pipe, files):
    assert str(pipe.adapters) == "no adapters"
    pipe.load_lora_weights(files["food"], adapter_name="food")
    pipe.load_lora_weights(files["birds"], adapter_name="the birds of all the gardens of the town")
    pipe.load_lora_weights(files["plain"], adapter_name="plain")
    pipe.set_adapters(["food", "plain"], [0.25, {"*.attn1": 0.5}])
    # The miniature's layers have 8,864 outputs, and a row of a class table is of 96 numbers.
    assert str(pipe.adapters).splitlines() == [
        "name                method              classes    size  weight",
        "food                1lora                     3   9,248    0.25",
        "the birds of all …  difffit +sum -nor…        2  26,880       -",
        "plain               1lora                     -   8,864  blocks",
    ]
    pipe.set_adapters("food")
    pipe.fuse_lora(lora_scale=0.5)
    assert [(row.weight, row.is_merged) for row in pipe.adapters] == [(0.5, True), (None, False), (None, False)]
    assert str(pipe.adapters).splitlines()[1].endswith("9,248  0.5, merged")


def test_hot_swapping_one_of_two_leaves_the_other_and_the_weights(both, files):
    both.set_adapters(["food", "plain"], [0.7, 0.5])
    before = run(both)
    both.load_lora_weights(files["food"], adapter_name="food", hotswap=True)
    assert torch.equal(run(both), before)
    assert both.transformer._onelora.serving == {"food": 0.7, "plain": 0.5}


def test_a_fused_pipeline_is_written_by_variant_and_in_shards(pipe, files, tmp_path):
    pipe.load_lora_weights(files["food"])
    pipe.fuse_lora()
    expected = run(pipe, (0, 1))
    pipe.save_pretrained(tmp_path, variant="fp16", max_shard_size="50KB")
    written = sorted(path.name for path in (tmp_path / "transformer").glob("*.safetensors"))
    assert len(written) > 1 and all(name.endswith(".safetensors") and ".fp16" in name for name in written)
    stock = OneLoRADiTPipeline.from_pretrained(tmp_path, variant="fp16")
    assert close(run(stock, (0, 1)), expected)


def test_an_auto_pipeline_is_made_of_one_with_the_verbs():
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForText2Image
    from tiny_models import make_pipeline

    pipe = OneLoRALoaderMixin.from_pipe(make_pipeline("sd3"))
    assert type(OneLoRALoaderMixin.from_pipe(pipe)) is type(pipe)
    randomize(inject_adapter(pipe.transformer, AdapterConfig()))
    for auto, name in [
        (AutoPipelineForText2Image, "StableDiffusion3Pipeline"),
        (AutoPipelineForImage2Image, "StableDiffusion3Img2ImgPipeline"),
    ]:
        made = auto.from_pipe(pipe)
        assert type(made).__name__ == name and made.transformer is pipe.transformer
    assert isinstance(OneLoRALoaderMixin.from_pipe(made), OneLoRALoaderMixin)  # the verbs for that kind
