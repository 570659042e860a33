"""OneLoraConfig in what PEFT, and diffusers' pipelines and training scripts, do with a LoRA."""

import copy

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.training_utils import _collate_lora_metadata, cast_training_params
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from rounding import assert_rounded
from tiny_models import flux, unet
from torch import nn

from benchmarks.measure import saved_bytes
from onelora_diffusion import AdapterConfig, OneLoRALoaderMixin, inject_adapter
from onelora_diffusion.peft import OneLoraConfig, OneLoraLinear

TARGETS = ["to_q", "to_k", "to_v", "ff.net.0.proj", "ff.net.2", "proj_out"]


@pytest.fixture(scope="module")
def stock():
    """A frozen Flux and its inputs."""
    torch.manual_seed(0)
    model, inputs = flux()
    return model.eval().requires_grad_(False), inputs


def adapted(base, alpha=1, seed=1, **settings):
    """A copy of the base with an adapter that is trained a little, made as diffusers' scripts make it."""
    model = copy.deepcopy(base)
    model.add_adapter(OneLoraConfig(target_modules=TARGETS, lora_alpha=alpha, **settings))
    return move(model, seed)


def move(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for parameter in trained(model).values():
        parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def by_hand(base, *adapters):
    """The base whose weights are W + α b 1ᵀ, for (model, α) with b in its tensors."""
    model = copy.deepcopy(base)
    for source, alpha in adapters:
        for name, b in trained(source).items():
            model.get_submodule(name.split(".lora_B")[0]).weight.data += alpha * b.detach()
    return model


def output(model, inputs):
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def pipeline(model, kind=FluxPipeline):
    return kind(None, None, None, None, None, None, transformer=model)


def save(model, path):
    """As diffusers' training scripts save."""
    layers = get_peft_model_state_dict(model)
    FluxPipeline.save_lora_weights(path, layers, **_collate_lora_metadata({"transformer": model}))
    return path


def loaded(base, path, kind=FluxPipeline):
    pipe = pipeline(copy.deepcopy(base), kind)
    pipe.load_lora_weights(path, adapter_name="x")
    return pipe


# ---------------------------------------------------------------------------------------------------
# Verbs: each gives a model that has to compute W + factor · b 1ᵀ.


def by_get_peft_model(base, path):
    return move(get_peft_model(copy.deepcopy(base), OneLoraConfig(target_modules=TARGETS)))


def by_add_adapter(base, path):
    return adapted(base)


def by_peft_state_dict(base, path):
    model = copy.deepcopy(base)
    model.add_adapter(OneLoraConfig(target_modules=TARGETS, init_lora_weights="gaussian"))
    set_peft_model_state_dict(model, get_peft_model_state_dict(adapted(base)))
    return model


def by_stock_load_lora_weights(base, path):
    return loaded(base, save(adapted(base), path)).transformer


def by_our_load_lora_weights(base, path):
    pipe = OneLoRALoaderMixin.from_pipe(pipeline(copy.deepcopy(base)))
    pipe.load_lora_weights(save(adapted(base), path), adapter_name="x")
    assert pipe.transformer._onelora.configs["x"].method == "1lora"
    return pipe.transformer


def by_save_pretrained(base, path):
    by_get_peft_model(base, path).save_pretrained(path)
    return PeftModel.from_pretrained(copy.deepcopy(base), path)


def by_save_pretrained_to_be_trained(base, path):
    by_get_peft_model(base, path).save_pretrained(path)
    config = OneLoraConfig.from_pretrained(path)
    model = PeftModel.from_pretrained(copy.deepcopy(base), path, config=config, is_trainable=True)
    assert all("lora_B" in name for name in trained(model))
    return model


def by_fusing(base, path):
    model = adapted(base)
    model.fuse_lora()
    model.unload_lora()
    return model


def by_unfusing(base, path):
    model = adapted(base)
    model.fuse_lora()
    model.unfuse_lora()
    return model


def by_merge_and_unload(base, path):
    return by_get_peft_model(base, path).merge_and_unload()


def by_hotswap(base, path):
    """Into the file's own kind, and into the layers in which another 1LoRA was trained."""
    save(adapted(base), path)
    model = adapted(base, seed=2)
    pipeline(model).load_lora_weights(path, adapter_name="default", hotswap=True)
    swapped = loaded(base, save(adapted(base, seed=2), path / "other"))
    swapped.load_lora_weights(path, adapter_name="x", hotswap=True)
    assert torch.equal(
        *(
            m.transformer_blocks[0].attn.to_q.lora_B[n].weight
            for m, n in ((model, "default"), (swapped.transformer, "x"))
        )
    )
    return model


def by_half_the_weight(base, path):
    model = adapted(base)
    model.set_adapters(["default"], [0.5])
    return model


def by_alpha(base, path):
    return adapted(base, alpha=3)


def by_rslora(base, path):
    return adapted(base, alpha=3, use_rslora=True)


def by_disabling(base, path):
    model = adapted(base)
    model.disable_adapters()
    return model


VERBS = {
    by_get_peft_model: 1,
    by_add_adapter: 1,
    by_peft_state_dict: 1,
    by_stock_load_lora_weights: 1,
    by_our_load_lora_weights: 1,
    by_save_pretrained: 1,
    by_save_pretrained_to_be_trained: 1,
    by_fusing: 1,
    by_unfusing: 1,
    by_merge_and_unload: 1,
    by_hotswap: 1,
    by_half_the_weight: 0.5,
    by_alpha: 3,
    by_rslora: 3,
    by_disabling: 0,
}


@pytest.mark.parametrize("verb, factor", VERBS.items(), ids=[verb.__name__ for verb in VERBS])
def test_verbs_compute_b_times_the_sum(stock, tmp_path, verb, factor):
    base, inputs = stock
    expected = output(by_hand(base, (adapted(base), factor)), inputs)
    assert_rounded(output(verb(base, tmp_path), inputs), expected, base)
    assert not torch.allclose(expected, output(by_hand(base, (adapted(base), factor + 1)), inputs), atol=1e-3)


def test_adapters_are_added_up_and_chosen(stock):
    base, inputs = stock
    model, other = adapted(base), adapted(base, seed=2)
    model.add_adapter(OneLoraConfig(target_modules=TARGETS), "other")
    move(model, seed=2)  # only the newest is trained
    model.set_adapters(["default", "other"], [1.0, -0.5])
    expected = by_hand(base, (adapted(base), 1), (other, -0.5))
    assert_rounded(output(model, inputs), output(expected, inputs), base)
    model.set_adapters(["other"])
    assert_rounded(output(model, inputs), output(by_hand(base, (other, 1)), inputs), base)


# ---------------------------------------------------------------------------------------------------
# Training


def lora_with_ones(base, **settings):
    """PEFT's own LoRA of rank 1 with ones in A, frozen, and the same b."""
    model = copy.deepcopy(base)
    model.add_adapter(LoraConfig(r=1, lora_alpha=1, target_modules=TARGETS, **settings))
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False).fill_(1)
    return move(model)


def gradients(model, inputs):
    inputs = inputs | {"hidden_states": inputs["hidden_states"].clone().requires_grad_()}
    torch.manual_seed(3)  # of dropout
    model.train()(**inputs, return_dict=False)[0].square().sum().backward()
    return [inputs["hidden_states"].grad] + [parameter.grad for parameter in trained(model).values()]


@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.5}, {"alpha_pattern": {"to_q": 4}}], ids=str)
def test_gradients_are_those_of_pefts_formula(stock, settings):
    base, inputs = stock
    found, expected = adapted(base, **settings), lora_with_ones(base, **settings)
    assert trained(found).keys() == trained(expected).keys()
    for own, other in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        assert_rounded(own, other, base)


def test_checkpointed_blocks_have_the_same_gradients(stock):
    base, inputs = stock
    checkpointed = adapted(base)
    checkpointed.enable_gradient_checkpointing()
    for own, other in zip(gradients(checkpointed, inputs), gradients(adapted(base), inputs), strict=True):
        assert_rounded(own, other, base)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_it_keeps_for_backward_what_ours_keeps(stock, precision):
    base, inputs = stock
    ours = inject_adapter(copy.deepcopy(base), AdapterConfig(targets=tuple(adapted_layers(base))))

    def kept(model):
        def loss():
            with torch.autocast("cpu", precision, enabled=precision != torch.float32):
                return model(**inputs, return_dict=False)[0].float().square().sum()

        return saved_bytes(model, loss)

    lora = copy.deepcopy(base)
    lora.add_adapter(LoraConfig(r=1, target_modules=TARGETS))
    assert kept(adapted(base)) <= kept(ours) < kept(lora)


def adapted_layers(base):
    return [name for name, module in adapted(base).named_modules() if isinstance(module, OneLoraLinear)]


def test_four_steps_are_two_and_two_more_after_a_checkpoint(stock, tmp_path):
    """The calls of diffusers' training scripts, their hooks for accelerate's `load_state` among them."""
    base, inputs = stock

    def start():
        model = copy.deepcopy(base).to(torch.bfloat16)
        model.add_adapter(
            OneLoraConfig(r=1, lora_alpha=1, lora_dropout=0.0, init_lora_weights="gaussian", target_modules=TARGETS)
        )
        cast_training_params([model], dtype=torch.float32)
        return model

    def go_on(model):
        optimizer = torch.optim.SGD(trained(model).values(), lr=1e-3)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**inputs, return_dict=False)[0].float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return model

    straight = go_on(start())
    save(straight, tmp_path)
    resumed = start()
    tensors = {name.removeprefix("transformer."): t for name, t in FluxPipeline.lora_state_dict(tmp_path).items()}
    assert not set_peft_model_state_dict(resumed, tensors, adapter_name="default").unexpected_keys
    cast_training_params([resumed], dtype=torch.float32)
    straight, resumed = (get_peft_model_state_dict(go_on(model)) for model in (straight, resumed))
    for name, tensor in straight.items():
        assert torch.equal(tensor, resumed[name])
        assert (tensor == 1).all() if "lora_A" in name else tensor.any()


def test_data_parallel_training_needs_no_search_for_unused_parameters(stock):
    base, inputs = stock
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(adapted(base))
        for _ in range(2):  # the second forward fails if a gradient is missing
            model(**inputs, return_dict=False)[0].sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(parameter.grad is not None for parameter in trained(model).values())


def layer(features=1000, dtype=torch.float32):
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(features, 8)).to(dtype),
        OneLoraConfig(target_modules=["0"]),
        autocast_adapter_dtype=False,
    )
    return move(model)


def test_a_sum_beyond_half_precision_is_right():
    model = layer(dtype=torch.float16)
    x = torch.full((1, 1000), 200.0, dtype=torch.float16)  # Σ x = 200,000; half precision ends at 65,504
    linear = model.base_model.model[0]
    with torch.no_grad():
        linear.base_layer.weight.zero_()
        linear.base_layer.bias.zero_()
        linear.lora_B["default"].weight.fill_(2**-10)
        assert (model(x) == 200_000 / 1024).all()
    assert (model(x) == 200_000 / 1024).all()


def test_compiled_code_computes_the_same():
    model, x = layer(), torch.randn(4, 1000)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_rounded(compiled(x), model(x), 1000)
    with torch.no_grad():
        assert_rounded(compiled(x), model(x), 1000)


def test_what_a_hook_has_kept_stays_as_it_was():
    model, kept = layer(), []
    linear = model.base_model.model[0].base_layer
    linear.register_forward_hook(lambda module, args, out: kept.append(out))
    x = torch.randn(4, 1000)
    assert not torch.equal(model(x), kept[0]) and torch.equal(
        kept[0], nn.functional.linear(x, linear.weight, linear.bias)
    )


# ---------------------------------------------------------------------------------------------------
# Beside other LoRAs


def test_another_lora_in_the_same_layers_is_what_it_is_alone(stock):
    base, inputs = stock
    model, alone, both = adapted(base), copy.deepcopy(base), by_hand(base, (adapted(base), 1))
    for one in (model, alone, both):
        one.add_adapter(LoraConfig(r=2, target_modules=TARGETS), "lora")
        move(one, seed=4)  # its A and B; only the newest is trained
    assert trained(model).keys() == trained(alone).keys() and any("lora_A" in name for name in trained(model))
    assert_rounded(output(model, inputs), output(alone, inputs), base)
    model.set_adapters(["default", "lora"])
    assert_rounded(output(model, inputs), output(both, inputs), base)


def test_a_foreign_lora_that_is_swapped_in_computes_what_it_is(stock, tmp_path):
    """PEFT's hotswap writes into the memory of A, and nothing tells of it."""
    base, inputs = stock
    foreign = copy.deepcopy(base)
    foreign.add_adapter(LoraConfig(r=1, lora_alpha=1, target_modules=TARGETS, init_lora_weights=False))
    model = adapted(base)
    output(model, inputs)
    pipeline(model).load_lora_weights(save(foreign, tmp_path), adapter_name="default", hotswap=True)
    assert_rounded(output(model, inputs), output(foreign, inputs), base)


def test_training_on_an_a_of_other_numbers_is_refused(stock):
    base, inputs = stock
    model = adapted(base)
    model.transformer_blocks[0].attn.to_q.lora_A["default"].weight.data = torch.full((1, 32), 2.0)
    with pytest.raises(ValueError, match="lora_A .* holds other numbers than ones"):
        model(**inputs)
    tensors = {name: 2 * tensor for name, tensor in get_peft_model_state_dict(adapted(base)).items()}
    before = get_peft_model_state_dict(unchanged := adapted(base, seed=2))
    with pytest.raises(ValueError, match="to_q.lora_A.default.weight holds other numbers than ones: this is no 1LoRA"):
        set_peft_model_state_dict(unchanged, tensors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in get_peft_model_state_dict(unchanged).items())


# ---------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"r": 4}, "r=4 .* give r=1"),
        ({"rank_pattern": {"to_q": 2}}, "to_q=2 .* its rank is 1 everywhere"),
        ({"use_dora": True}, "use_dora=True .* leave it at its default, False"),
        ({"init_lora_weights": False}, "init_lora_weights=False"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config="),
        ({"target_parameters": ["weight"]}, "target_parameters="),
        ({"layer_replication": [(0, 1)]}, "layer_replication="),
    ],
    ids=str,
)
def test_settings_that_1lora_does_not_have_are_refused(settings, reason):
    with pytest.raises(ValueError, match=f"^OneLoraConfig: {reason}"):
        OneLoraConfig(target_modules=TARGETS, **settings)


@pytest.mark.parametrize("combination", ["linear", "cat", "svd"])
def test_a_weighted_sum_by_peft_is_refused(stock, combination):
    base, inputs = stock
    model = by_get_peft_model(base, None)
    model.add_adapter("other", OneLoraConfig(target_modules=TARGETS))
    before = output(model, inputs)
    with pytest.raises(ValueError, match="add_weighted_adapter does, which would scale A .*: mix adapters by"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type=combination)
    assert torch.equal(output(model, inputs), before) and list(model.peft_config) == ["default", "other"]


def test_layers_that_cannot_hold_it_are_named(stock):
    base, _ = stock
    with pytest.raises(ValueError, match=r"target_modules names .*Conv2d\(.*, and 1LoRA is for linear layers"):
        unet()[0].add_adapter(OneLoraConfig(target_modules=["conv1"]))
    model = copy.deepcopy(base)
    model.add_adapter(LoraConfig(target_modules=TARGETS), "lora")
    with pytest.raises(ValueError, match="add the adapter of a OneLoraConfig before any other LoRA"):
        model.add_adapter(OneLoraConfig(target_modules=TARGETS))


def test_a_packed_weight_is_not_merged_into():
    model = layer()
    linear = model.base_model.model[0].base_layer
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="take up 1LoRA is quantised: serve adapters unmerged"):
        model.merge_adapter()
