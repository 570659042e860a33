"""A pipeline with two denoisers, one after the other, as Wan 2.2 has: each with adapters of its own."""

import copy

import pytest
import torch
from rounding import assert_rounded
from tiny_models import randomize

from onelora_diffusion import AdapterConfig, OneLoRALoaderMixin, inject_adapter, read_adapter, save_adapter

SIZES = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 16,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


def make(seed):
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    return WanTransformer3DModel(**SIZES).eval()


@pytest.fixture
def pipe():
    from diffusers import WanPipeline

    return OneLoRALoaderMixin.from_pipe(WanPipeline(None, None, None, None, make(0), make(1)))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("high", "low")):
        save_adapter(randomize(inject_adapter(make(seed), AdapterConfig()), seed=seed), folder / name)
    return folder


@torch.no_grad()
def outputs(pipe):
    """What each of the two computes."""
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 4, 4, generator=generator),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 3, 16, generator=generator),
    }
    return [model(**inputs).sample for model in (pipe.transformer, pipe.transformer_2)]


def are(found, expected):
    return [torch.equal(a, b) for a, b in zip(found, expected, strict=True)]


@pytest.fixture
def loaded(pipe, files):
    """`x` in both, and `y` in the second alone; x serves."""
    pipe.load_lora_weights(files / "high", adapter_name="x")
    pipe.load_lora_weights(files / "low", adapter_name="y", load_into_transformer_2=True)
    pipe.load_lora_weights(files / "low", adapter_name="x", load_into_transformer_2=True)
    return pipe


def test_each_transformer_is_loaded_by_itself(pipe, files):
    base = outputs(pipe)
    pipe.load_lora_weights(files / "high", adapter_name="x")
    assert are(outputs(pipe), base) == [False, True]
    first = outputs(pipe)
    pipe.load_lora_weights(files / "low", adapter_name="x", load_into_transformer_2=True)
    assert are(outputs(pipe), first) == [True, False] and not are(outputs(pipe), base)[1]
    assert pipe.get_list_adapters() == {"transformer": ["x"], "transformer_2": ["x"]}
    assert pipe.get_active_adapters() == ["x"] and len(pipe.adapters) == 2
    pipe.unload_lora_weights()
    assert all(are(outputs(pipe), base)) and pipe.get_list_adapters() == {}


def test_a_verb_means_the_adapters_of_both_that_it_names(loaded):
    x = outputs(loaded)
    loaded.set_adapters("y")
    y = outputs(loaded)
    loaded.disable_lora()
    base = outputs(loaded)
    assert are(y, base) == [True, False]
    loaded.enable_lora()
    assert all(are(outputs(loaded), y))
    loaded.set_adapters("x", {"transformer": 1.0, "transformer_2": 0.0})
    assert are(outputs(loaded), x) == [True, False]
    assert_rounded(outputs(loaded)[1], base[1], loaded.transformer_2)
    loaded.set_adapters(["x", "y"], [1.0, 0.0])
    assert are(outputs(loaded), x)[0]
    assert_rounded(outputs(loaded)[1], x[1], loaded.transformer_2)
    with pytest.raises(ValueError, match="2 adapter names .* but 1 weights"):
        loaded.set_adapters(["x", "y"], [1.0])
    with pytest.raises(ValueError, match="'z' is not in the list of present adapters: x, y"):
        loaded.set_adapters(["x", "z"])
    loaded.delete_adapters("x")
    assert loaded.get_list_adapters() == {"transformer_2": ["y"]}
    loaded.set_adapters("y")
    assert all(are(outputs(loaded), y))


def test_fusing_both_or_one(loaded):
    x = outputs(loaded)
    loaded.fuse_lora()
    assert loaded.fused_loras == {"x"} and loaded.num_fused_loras == 1
    for found, expected in zip(outputs(loaded), x, strict=True):
        assert_rounded(found, expected, loaded.transformer)
    with pytest.raises(ValueError, match="unmerge them before others are set"):
        loaded.set_adapters("x", 0.5)
    loaded.unfuse_lora()
    assert all(are(outputs(loaded), x))
    loaded.fuse_lora(["transformer"])
    assert loaded.transformer._onelora.merged and not loaded.transformer_2._onelora.merged
    loaded.unfuse_lora(["transformer"])
    vector = next(iter(loaded.transformer_2._onelora.adapters["x"].values())).b
    with torch.no_grad():
        vector[0] = float("nan")
    with pytest.raises(ValueError, match="gives NaN or infinity: nothing was merged"):
        loaded.fuse_lora(safe_fusing=True)
    assert loaded.num_fused_loras == 0 and are(outputs(loaded), x)[0]


def test_a_scale_of_the_call_is_for_both(loaded):
    x = outputs(loaded)
    with loaded._weighed(0.5):
        half = outputs(loaded)
    assert all(are(outputs(loaded), x))
    loaded.set_adapters("x", 0.5)
    assert all(are(outputs(loaded), half)) and not any(are(half, x))


def test_an_adapter_of_either_is_saved(loaded, files, tmp_path):
    with pytest.raises(ValueError, match="adapters are in transformer and transformer_2: give the component"):
        loaded.save_lora_weights(tmp_path, adapter_name="x")
    loaded.save_lora_weights(tmp_path / "y", adapter_name="y")
    loaded.save_lora_weights(tmp_path / "x", adapter_name="x", component="transformer")
    for name, origin in (("y", "low"), ("x", "high")):
        found, expected = read_adapter(tmp_path / name).tensors, read_adapter(files / origin).tensors
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    with pytest.raises(ValueError, match="no adapter 'y' in 'transformer'"):
        loaded.save_lora_weights(tmp_path, adapter_name="y", component="transformer")
    with pytest.raises(ValueError, match="'z' is not in the list of present adapters: x, y"):
        loaded.save_lora_weights(tmp_path, adapter_name="z")
    with pytest.raises(ValueError, match="adapters x serve unfused"):
        loaded.save_pretrained(tmp_path)


def test_one_transformer_is_no_pipeline_with_two(files):
    from diffusers import WanPipeline

    pipe = OneLoRALoaderMixin.from_pipe(WanPipeline(None, None, None, None, make(0), None))
    with pytest.raises(ValueError, match="load_into_transformer_2: WanPipeline has no second transformer"):
        pipe.load_lora_weights(files / "high", load_into_transformer_2=True)
    second = OneLoRALoaderMixin.from_pipe(WanPipeline(None, None, None, None, None, copy.deepcopy(make(1))))
    second.load_lora_weights(files / "low", adapter_name="x")
    assert second.get_list_adapters() == {"transformer_2": ["x"]}
