"""diffusers' own verbs of a model, its own call's scale, and the state of its parts, while it has adapters."""

import copy
import inspect

import pytest
import torch
from rounding import assert_rounded
from tiny_models import dit_inputs, flux, make_dit, randomize, sd3, unet
from torch import nn

from onelora_diffusion import AdapterConfig, adapter_state_dict, inject_adapter, set_adapters, unload_adapter
from onelora_diffusion.injection.book import adapters_of

PLAIN = AdapterConfig()
LORA = AdapterConfig("lora", rank=2)


def adapted(make, config=PLAIN):
    """(a model with adapters a and b, of which a serves; its inputs; the base's output)."""
    torch.manual_seed(0)
    model, inputs = make()
    base = run(model.eval().requires_grad_(False), inputs)  # PyTorch adds up otherwise for what takes gradients
    for seed, name in enumerate(("a", "b")):
        randomize(inject_adapter(model, config, name), seed=seed, scale=0.02)
    set_adapters(model, "a")
    return model, inputs, base


@torch.no_grad()
def run(model, inputs, **kwargs):
    return model(**inputs, **kwargs).sample


@pytest.mark.parametrize("config", [AdapterConfig(), LORA], ids=["1lora", "lora"])
@pytest.mark.parametrize("make", [sd3, unet])
def test_each_verb_of_a_model_does_what_the_librarys_does(make, config):
    model, inputs, base = adapted(make, config)
    outputs = {}
    for names, weights in [("a", None), ("b", None), ("a", 0.5), (["a", "b"], [0.5, 2.0])]:
        set_adapters(model, names, weights)
        outputs[str((names, weights))] = run(model, inputs)
        set_adapters(model, "a")
        model.set_adapters(names, weights)
        assert torch.equal(run(model, inputs), outputs[str((names, weights))])
    a, b, half, both = outputs.values()
    model.set_adapter("b")
    assert torch.equal(run(model, inputs), b) and model.active_adapters() == ["b"]
    model.set_adapters(["a", "b"], [0.5, 2.0])
    for off, on in (("disable_lora", "enable_lora"), ("disable_adapters", "enable_adapters")):
        getattr(model, off)()
        assert torch.equal(run(model, inputs), base) and model.active_adapters() == []
        getattr(model, on)()
        assert torch.equal(run(model, inputs), both)
    model.set_adapters("a")
    model.fuse_lora(lora_scale=0.5)
    assert_rounded(run(model, inputs), half, model)
    with pytest.raises(ValueError, match="are merged: unmerge them before others are merged"):
        model.fuse_lora()
    model.unfuse_lora()
    assert torch.equal(run(model, inputs), a)
    with pytest.raises(ValueError, match="'c' is not in the list of present adapters: a, b"):
        model.set_adapters("c")
    model.delete_adapters("a")
    model.set_adapter("b")
    assert torch.equal(run(model, inputs), b)
    model.fuse_lora(adapter_names=["b"])
    model.unload_lora()
    assert torch.equal(run(model, inputs), base) and not hasattr(model, "_onelora")
    assert not {"set_adapters", "save_pretrained", "fuse_lora"} & set(vars(model))  # the class's own are back


def test_the_nested_weights_of_a_unet():
    model, inputs, _ = adapted(unet)
    model.set_adapters("a", {"down": 0.5, "up": {"block_0": 0.25}})
    nested = run(model, inputs)
    set_adapters(model, "a", {"down_blocks": 0.5, "up_blocks.0": 0.25})
    assert torch.equal(run(model, inputs), nested)


def test_a_stock_pipeline_that_shares_the_model_has_verbs_that_work():
    from diffusers import StableDiffusion3Pipeline

    model, inputs, base = adapted(sd3)
    pipe = StableDiffusion3Pipeline(model, None, None, None, None, None, None, None, None)
    own = run(model, inputs)
    pipe.disable_lora()
    assert torch.equal(run(model, inputs), base)
    pipe.enable_lora()
    pipe.fuse_lora(["transformer"])
    assert_rounded(run(model, inputs), own, model)
    model.unfuse_lora()  # diffusers' pipeline looks for PEFT's layers here, and asks no model
    assert torch.equal(run(model, inputs), own)
    pipe.unload_lora_weights()
    assert torch.equal(run(model, inputs), base)


def test_beside_adapters_of_peft_each_verb_means_those_it_names():
    from peft import LoraConfig

    torch.manual_seed(0)
    model, inputs = sd3()
    model.add_adapter(LoraConfig(r=2, target_modules=["ff.net.2"], init_lora_weights=False), "theirs")
    with_theirs = run(model.eval(), inputs)
    model.disable_lora()
    base = run(model, inputs)
    model.enable_lora()
    randomize(inject_adapter(model, AdapterConfig(targets=("to_q",)), "ours"))
    both = run(model, inputs)
    assert model.active_adapters() == ["ours", "theirs"]
    model.set_adapters("theirs", 1.0)
    assert torch.equal(run(model, inputs), both)
    model.set_adapters("ours", 0.0)
    assert_rounded(run(model, inputs), with_theirs, model)
    model.set_adapters("ours")
    model.disable_lora()
    assert torch.equal(run(model, inputs), base)
    model.enable_lora()
    assert torch.equal(run(model, inputs), both)
    with pytest.raises(ValueError, match="'ours' is of this library, and others are PEFT's"):
        model.set_adapters(["ours", "theirs"])
    with pytest.raises(ValueError, match="model with PEFT's adapters beside"):
        run(model, inputs, joint_attention_kwargs={"scale": 0.5})
    inject_adapter(model, AdapterConfig("lora", targets=("to_q",)), "our lora")
    for verb in (model.disable_lora, model.fuse_lora, model.unload_lora, lambda: model.set_adapters("theirs")):
        with pytest.raises(ValueError, match="'our lora' is computed by PEFT's layers, .*unload one of them first"):
            verb()
    unload_adapter(model)
    assert torch.equal(run(model, inputs), with_theirs)


def styled(model):
    from peft import LoraConfig

    torch.manual_seed(3)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "ff.net.2"], init_lora_weights=False), "theirs")


@pytest.mark.parametrize(
    "config", [AdapterConfig("full"), *(AdapterConfig(compression=c) for c in ("outputs", "singular"))]
)
def test_adapters_of_peft_are_not_fused_into_weights_that_ours_replace_or_read(config):
    torch.manual_seed(0)
    model, inputs = sd3()
    randomize(inject_adapter(model.eval(), config, "ours"))
    styled(model)
    both = run(model, inputs)
    with pytest.raises(
        ValueError, match="fuse_lora: 'ours' (replaces|reads) the weights of .*to_q that 'theirs' would"
    ):
        model.fuse_lora(adapter_names=["theirs"])
    assert torch.equal(run(model, inputs), both)
    model.disable_lora()
    model.enable_lora()
    assert torch.equal(run(model, inputs), both)
    model.delete_adapters("ours")
    with_theirs = run(model, inputs)
    model.fuse_lora(adapter_names=["theirs"])
    assert_rounded(run(model, inputs), with_theirs, model)


@pytest.mark.parametrize(
    "config",
    [AdapterConfig(), AdapterConfig(compression="outputs"), AdapterConfig("difffit")],
    ids=["1lora", "outputs", "γβ"],
)
def test_beside_peft_an_adapter_computes_the_same_whichever_was_first(config):
    outputs = []
    for order in (1, -1):
        torch.manual_seed(0)
        model, inputs = sd3()
        for add in [lambda model: randomize(inject_adapter(model, config, "ours")), styled][::order]:
            add(model.eval())
        outputs.append(run(model, inputs))
    assert torch.equal(*outputs)


def test_an_adapter_of_peft_is_not_added_beside_a_lora_of_ours(tmp_path):
    torch.manual_seed(0)
    stock, _ = sd3()
    styled(stock)
    stock.save_lora_adapter(tmp_path, adapter_name="theirs")
    model, inputs, _ = adapted(sd3, LORA)
    own, names = run(model, inputs), model.state_dict().keys()
    message = "adapter 'a' is computed by PEFT's layers, .*: .* before"
    with pytest.raises(ValueError, match=f"add_adapter: {message}"):
        styled(model)
    with pytest.raises(ValueError, match=f"load_lora_adapter: {message}"):
        model.load_lora_adapter(tmp_path, prefix=None)
    assert torch.equal(run(model, inputs), own) and model.state_dict().keys() == names


@pytest.mark.parametrize("ours_first", [True, False])
def test_merging_into_a_layer_that_peft_has_an_adapter_of_is_refused_by_that_name(ours_first):
    torch.manual_seed(0)
    model, inputs = sd3()
    for add in [lambda model: inject_adapter(model, PLAIN), styled][:: 1 if ours_first else -1]:
        add(model)
    with pytest.raises(ValueError, match="has an adapter of PEFT's as well: merge or unload that first"):
        model.fuse_lora()


@pytest.mark.parametrize("config", [AdapterConfig(), LORA], ids=["1lora", "lora"])
@pytest.mark.parametrize(
    "make, name", [(sd3, "joint_attention_kwargs"), (flux, "joint_attention_kwargs"), (unet, "cross_attention_kwargs")]
)
def test_a_scale_in_a_models_own_call_counts_for_that_call(make, name, config):
    model, inputs, base = adapted(make, config)
    full = run(model, inputs)
    half = run(model, inputs, **{name: {"scale": 0.5}})
    assert torch.equal(run(model, inputs), full) and adapters_of(model).serving == {"a": 1.0}
    set_adapters(model, "a", 0.5)
    assert torch.equal(run(model, inputs), half) and not torch.equal(half, full)
    assert_rounded(run(model, inputs, **{name: {"scale": 2.0}}), full, model)
    assert_rounded(run(model, inputs, **{name: {"scale": 0.0}}), base, model)
    with pytest.raises((TypeError, AttributeError)):  # the next call is none the worse for one that failed
        model(None, **{name: {"scale": 2.0}})
    assert torch.equal(run(model, inputs), half)
    adapters_of(model).pause()
    assert torch.equal(run(model, inputs, **{name: {"scale": 0.5}}), base)
    adapters_of(model).resume()
    model.fuse_lora()
    with pytest.raises(ValueError, match="are merged: unmerge them before they are scaled by 0.5"):
        run(model, inputs, **{name: {"scale": 0.5}})
    model.unfuse_lora()
    model.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match="is gone when checkpointing computes blocks again"):
        model(**inputs, **{name: {"scale": 0.5}})
    assert torch.equal(run(model, inputs), half)


def test_a_scale_in_the_call_of_a_dit():
    model, inputs = make_dit(), dit_inputs()
    randomize(inject_adapter(model, AdapterConfig(), "a"))
    half = run(model, inputs, cross_attention_kwargs={"scale": 0.5})
    set_adapters(model, "a", 0.5)
    assert torch.equal(run(model, inputs), half)
    assert torch.equal(run(model, inputs, cross_attention_kwargs={"scale": 1.0}), half)


# ---------------------------------------------------------------------------------------------------
# The state of a part


def controlnet_of(model, kind):
    import diffusers

    if kind == "unet":
        return diffusers.ControlNetModel.from_unet(model)
    if kind == "sd3":
        return diffusers.SD3ControlNetModel.from_transformer(model, num_layers=1, num_extra_conditioning_channels=0)
    return diffusers.FluxControlNetModel.from_transformer(
        model, num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=16
    )


@pytest.mark.parametrize("kind, make", [("unet", unet), ("sd3", sd3), ("flux", flux)])
def test_a_controlnet_made_of_an_adapted_model_is_that_of_its_base(kind, make):
    torch.manual_seed(0)
    model, _ = make()
    torch.manual_seed(0)
    expected = controlnet_of(model, kind).state_dict()
    for config in (AdapterConfig(), LORA):
        randomize(inject_adapter(model, config, config.method))
        torch.manual_seed(0)
        found = controlnet_of(model, kind).state_dict()
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_the_state_of_the_whole_has_the_adapter_and_that_of_a_part_has_none():
    model, _ = sd3()
    paths = {key.rpartition(".")[0] for key in adapter_state_dict(inject_adapter(model, AdapterConfig(norms=True)))}
    own = {key for key in model.state_dict() if "onelora" in key}
    assert len(own) >= len(paths)
    for wrapped, prefix in [
        (nn.ModuleDict({"model": model}), "model."),
        (torch.compile(model, backend="eager"), "_orig_mod."),
        (nn.DataParallel(model), "module."),
    ]:
        assert {key for key in wrapped.state_dict() if "onelora" in key} == {prefix + key for key in own}
    for part in (model.transformer_blocks, model.transformer_blocks[0], model.transformer_blocks[0].attn.to_q):
        state = part.state_dict()
        assert state and not [key for key in state if "onelora" in key.split(".")]
        part.load_state_dict(state)  # strictly: nothing is missing, and nothing is too much
    assert set(model.state_dict()) > own
    model.load_state_dict(model.state_dict())
    state = {key: tensor for key, tensor in model.state_dict().items() if key != min(own)}
    with pytest.raises(RuntimeError, match=min(own)):
        model.load_state_dict(state)


def test_a_compiled_block_in_its_place_keeps_the_adapters_in_the_state_of_the_whole():
    model, _ = sd3()
    inject_adapter(model, AdapterConfig())
    count = len(model.state_dict())
    model.transformer_blocks[0] = torch.compile(model.transformer_blocks[0], backend="eager")
    assert len(model.state_dict()) == count


def test_copied_models_have_verbs_of_their_own():
    model, inputs, base = adapted(sd3)
    other = copy.deepcopy(model)
    other.unload_lora()
    assert torch.equal(run(other, inputs), base) and not torch.equal(run(model, inputs), base)
    assert "max_shard_size" in inspect.signature(model.save_pretrained).parameters
