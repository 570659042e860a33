"""Adapters on bases whose weights are somewhere else between calls; on a CPU, the disk is that place."""

import copy

import pytest
import torch
from rounding import assert_rounded
from tiny_models import dit_inputs, flux, make_dit, pixart, randomize, sd3

from onelora_diffusion import (
    AdapterConfig,
    OneLoRALoaderMixin,
    adapter_state_dict,
    inject_adapter,
    load_adapter,
    merge_adapter,
    save_adapter,
    set_adapters,
    unload_adapter,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cpu_as_accelerator(monkeypatch):
    """diffusers before 0.41 asks torch which accelerator there is, whatever device it is given."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: CPU)


def pipeline_of(model):
    from diffusers import FluxPipeline, PixArtAlphaPipeline, StableDiffusion3Pipeline

    pipeline_class = {
        "FluxTransformer2DModel": FluxPipeline,
        "PixArtTransformer2DModel": PixArtAlphaPipeline,
        "SD3Transformer2DModel": StableDiffusion3Pipeline,
    }[type(model).__name__]
    parts = dict.fromkeys(pipeline_class.__init__.__annotations__) | {"transformer": model}
    return OneLoRALoaderMixin.from_pipe(pipeline_class(**parts))


@pytest.fixture(params=[sd3, flux, pixart])
def case(request, tmp_path):
    """(a base, its inputs, two adapter files, what the base computes with each, and alone)."""
    torch.manual_seed(0)
    base, inputs = request.param()
    files, outputs = [], [base(**inputs).sample]
    for seed in (1, 2):
        model = randomize(inject_adapter(copy.deepcopy(base), AdapterConfig()), seed=seed)
        files.append(save_adapter(model, tmp_path / str(seed)))
        outputs.append(model(**inputs).sample)
    return base, inputs, files, [output.detach() for output in outputs]


@pytest.mark.parametrize("to_disk", [False, True])
def test_leaf_level_group_offload(case, tmp_path, to_disk):
    base, inputs, files, (alone, first, second) = case
    folder = str(tmp_path / "offloaded") if to_disk else None
    base.enable_group_offload(CPU, CPU, "leaf_level", offload_to_disk_path=folder)
    pipe = pipeline_of(base)

    def output():
        with torch.no_grad():
            return base(**inputs).sample

    assert_rounded(output(), alone, base)
    assert not torch.allclose(first, alone, atol=1e-3)
    pipe.load_lora_weights(files[0], adapter_name="first")
    for _ in range(2):
        assert_rounded(output(), first, base)
    pipe.load_lora_weights(files[1], adapter_name="second")
    assert_rounded(output(), second, base)
    pipe.set_adapters("first")
    assert_rounded(output(), first, base)
    pipe.disable_lora()
    assert_rounded(output(), alone, base)
    pipe.enable_lora()
    pipe.load_lora_weights(files[1], adapter_name="first", hotswap=True)
    assert_rounded(output(), second, base)
    with pytest.raises(ValueError, match="weights are offloaded: fuse before enable_group_offload"):
        pipe.fuse_lora()
    with pytest.raises(ValueError, match="weights are offloaded: fuse before enable_group_offload"):
        merge_adapter(base)
    assert_rounded(output(), second, base)
    pipe.unload_lora_weights()
    assert_rounded(output(), alone, base)


def test_group_offload_after_loading(case):
    base, inputs, files, (alone, first, _) = case
    pipe = pipeline_of(base)
    pipe.load_lora_weights(files[0])
    base.enable_group_offload(CPU, CPU, "leaf_level")
    with torch.no_grad():
        assert_rounded(base(**inputs).sample, first, base)
        pipe.unload_lora_weights()
        assert_rounded(base(**inputs).sample, alone, base)


def test_diffusers_has_no_group_offload_for_a_dit():
    """So that docs/loading.md can say so."""
    with pytest.raises(ValueError, match="DiTTransformer2DModel does not support group offloading"):
        make_dit().enable_group_offload(CPU, CPU, "leaf_level")


def test_offload_to_disk_after_loading_is_refused(case, tmp_path):
    base, inputs, files, (_, first, _) = case
    pipe = pipeline_of(base)
    pipe.load_lora_weights(files[0])
    base.enable_group_offload(CPU, CPU, "leaf_level", offload_to_disk_path=str(tmp_path / "offloaded"))
    with torch.no_grad(), pytest.raises(ValueError, match="unload them, offload first, and load them then"):
        base(**inputs)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(files[0])
    with torch.no_grad():
        assert_rounded(base(**inputs).sample, first, base)


def test_sequential_offload_after_loading_is_refused(case):
    """accelerate takes the vectors along, and would not bring them back: they would be no numbers at all."""
    from accelerate import cpu_offload

    base, inputs, files, (alone, first, _) = case
    pipe = pipeline_of(base)
    pipe.load_lora_weights(files[0])
    cpu_offload(base, CPU)
    with torch.no_grad():
        with pytest.raises(
            ValueError, match="enable_sequential_cpu_offload took .* offload first, and load them then"
        ):
            base(**inputs)
        pipe.unload_lora_weights()
        assert_rounded(base(**inputs).sample, alone, base)
        pipe.load_lora_weights(files[0])
        assert_rounded(base(**inputs).sample, first, base)


@pytest.mark.parametrize("method", ["1lora", "difffit", "lora", "mora6"])
def test_what_is_loaded_into_offloaded_weights_is_where_they_compute(tmp_path, method):
    """The meta device stands in for a GPU, to which accelerate brings each layer's weights."""
    from accelerate import cpu_offload

    save_adapter(randomize(inject_adapter(make_dit(), AdapterConfig(method, num_classes=3))), tmp_path)
    base = make_dit()
    cpu_offload(base, torch.device("meta"))
    load_adapter(base, tmp_path)
    assert all(tensor.is_meta for tensor in adapter_state_dict(base).values())
    inputs = {name: tensor.to("meta") for name, tensor in dit_inputs().items()}
    with torch.no_grad():
        assert base(**inputs).sample.is_meta


def offloaded_by_accelerate(base, folder):
    from accelerate import cpu_offload

    cpu_offload(base, CPU)


def offloaded_among_other_hooks(base, folder):
    from accelerate.hooks import ModelHook, add_hook_to_module

    offloaded_by_accelerate(base, folder)
    for module in [module for module in base.modules() if hasattr(module, "_hf_hook")]:
        for _ in range(2):
            add_hook_to_module(module, ModelHook(), append=True)


def offloaded_by_groups(base, folder):
    base.enable_group_offload(CPU, CPU, "leaf_level")


def offloaded_to_the_disk(base, folder):
    base.enable_group_offload(CPU, CPU, "leaf_level", offload_to_disk_path=str(folder))


@pytest.mark.parametrize("method", ["lora", "dora", "peft:hra"])
@pytest.mark.parametrize(
    "offload", [offloaded_by_accelerate, offloaded_among_other_hooks, offloaded_by_groups, offloaded_to_the_disk]
)
def test_tuners_that_read_the_layers_weight(tmp_path, method, offload):
    """DoRA divides by the norm of the layer's rows; HRA turns its columns. LoRA needs the output alone."""
    torch.manual_seed(0)
    base, inputs = sd3()
    model = randomize(inject_adapter(copy.deepcopy(base), AdapterConfig(method)))
    file = save_adapter(model, tmp_path / "adapter")
    offload(base, tmp_path / "offloaded")
    load_adapter(base, file)
    with torch.no_grad():
        if method == "lora" or offload is not offloaded_to_the_disk:
            assert_rounded(base(**inputs).sample, model(**inputs).sample, base)
        else:
            with pytest.raises(
                ValueError, match="reads a layer's weight, serves a layer that is offloaded to the disk"
            ):
                base(**inputs)


@pytest.mark.parametrize("method", ["1lora", "lora", "dora"])
def test_layerwise_casting_computes_with_the_rounded_base(method):
    torch.manual_seed(0)
    model, inputs = sd3()
    with torch.no_grad():
        for parameter in model.parameters():  # values that eight bits hold
            parameter.copy_(parameter.to(torch.float8_e4m3fn).float())
        randomize(inject_adapter(model, AdapterConfig(method)))
        expected = model(**inputs).sample
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        assert model.transformer_blocks[0].attn.to_q.weight.dtype == torch.float8_e4m3fn
        assert_rounded(model(**inputs).sample, expected, model)


@pytest.mark.parametrize("options", [{"targets": ("*",)}, {"method": "full"}])
def test_an_offloaded_dit_shares_its_embedding_as_another_does_and_gives_it_back(options, tmp_path):
    from accelerate import cpu_offload

    config = AdapterConfig(num_classes=3, **options)
    inputs = dit_inputs()
    save_adapter(randomize(inject_adapter(make_dit(), config)), tmp_path)
    base, expected = make_dit(), load_adapter(make_dit(), tmp_path)(**inputs).sample
    embeddings = [block.norm1.emb for block in base.transformer_blocks]
    cpu_offload(base, CPU)
    with torch.no_grad():
        alone = base(**inputs).sample
        load_adapter(base, tmp_path)
        assert_rounded(base(**inputs).sample, expected, base)
        unload_adapter(base)
        assert torch.equal(base(**inputs).sample, alone)
    assert [block.norm1.emb for block in base.transformer_blocks] == embeddings


@pytest.mark.parametrize("last", ["1", "2"])
def test_a_part_of_the_model_that_accelerate_takes_along_is_noticed(tmp_path, last):
    from accelerate import dispatch_model

    torch.manual_seed(0)
    model, x = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3))), torch.randn(2, 4)
    file = save_adapter(randomize(inject_adapter(model, AdapterConfig())), tmp_path / "adapter")
    expected = model(x)
    devices = dict.fromkeys("012", "cpu") | {last: "disk"}
    dispatch_model(model, devices, main_device="cpu", offload_dir=str(tmp_path / "offloaded"))
    with torch.no_grad():
        with pytest.raises(
            ValueError, match="dispatch_model .* took the adapters away .* offload first, and load them"
        ):
            model(x)
        unload_adapter(model)
        assert_rounded(load_adapter(model, file)(x), expected, terms=3 * 8)


@pytest.mark.parametrize("make", [pixart, flux])
@pytest.mark.parametrize("first", ["load", "offload"])
@pytest.mark.parametrize("to_disk", [False, True])
def test_group_offload_of_full_fine_tuning(make, first, to_disk, tmp_path):
    torch.manual_seed(0)
    base, inputs = make()
    model = randomize(inject_adapter(copy.deepcopy(base), AdapterConfig("full")))
    file = save_adapter(model, tmp_path / "adapter")
    alone, expected = base(**inputs).sample, model(**inputs).sample
    folder = str(tmp_path / "offloaded") if to_disk else None
    steps = [
        lambda: load_adapter(base, file),
        lambda: base.enable_group_offload(CPU, CPU, "leaf_level", offload_to_disk_path=folder),
    ]
    for step in steps if first == "load" else reversed(steps):
        step()
    with torch.no_grad():
        for _ in range(2):
            assert_rounded(base(**inputs).sample, expected, base)
        for network in (base, model):
            set_adapters(network, "default", 0.5)
        assert_rounded(base(**inputs).sample, model(**inputs).sample, base)
        unload_adapter(base)
        assert_rounded(base(**inputs).sample, alone, base)
