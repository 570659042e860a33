"""One contract for every method: what a user may do with one adapter, they may do with any other."""

import copy

import pytest
import torch
from peft import PeftType
from rounding import assert_rounded
from tiny_models import make_dit, randomize
from torch import nn

from onelora_diffusion import (
    AdapterConfig,
    adapter_state_dict,
    count_trainable,
    disable_adapter,
    inject_adapter,
    load_adapter,
    merge_adapter,
    save_adapter,
    set_adapters,
    unload_adapter,
    unmerge_adapter,
)

CONFIGS = {
    "1lora": {},
    "1lora-random": {"method": "1lora", "compression": "random"},
    "1lora-rank-3": {"method": "1lora", "rank": 3},
    "1lora-random-2": {"method": "1lora", "compression": "random", "rank": 2},
    "1lora-outputs": {"method": "1lora", "compression": "outputs"},
    "1lora-singular": {"method": "1lora", "compression": "singular"},
    "1lora-singular-3": {"method": "difffit", "sum": True, "compression": "singular", "rank": 3},
    "1lora-outputs-3": {"method": "difffit", "sum": True, "compression": "outputs", "rank": 3},
    "1lora-everything": {"method": "difffit", "sum": True},
    "bitfit": {},
    "difffit": {},
    "mora1": {},
    "mora6": {},
    "lora": {"rank": 2},
    "dora": {"rank": 2},
    "vera": {"rank": 2},
    "full": {},
    "peft:ia3": {"peft_config": {"feedforward_modules": []}},
    "peft:fourierft": {"peft_config": {"n_frequency": 5, "init_weights": True}},
    "peft:vblora": {"peft_config": {"num_vectors": 8, "vector_length": 8, "topk": 2}},
    **({"peft:road": {"peft_config": {"group_size": 16}}} if "ROAD" in PeftType.__members__ else {}),  # PEFT >= 0.18
    "peft:miss": {"peft_config": {"r": 2}},
}
FUSABLE = [name for name in CONFIGS if name != "full"]


def config_of(name, fuse_qkv=False):
    return AdapterConfig(**{"method": name, "num_classes": 3, "fuse_qkv": fuse_qkv} | CONFIGS[name])


def trained(name, fuse_qkv=False, seed=2):
    return randomize(inject_adapter(make_dit(), config_of(name, fuse_qkv)), seed=seed)


@pytest.fixture(
    params=[(name, False) for name in CONFIGS] + [(name, True) for name in FUSABLE],
    ids=lambda case: case[0] + "-fused" * case[1],
)
def case(request):
    return request.param


def test_starts_as_the_base(case, inputs):
    base, model = make_dit(), inject_adapter(make_dit(), config_of(*case))
    labels = {"class_labels": torch.full((3,), 10)}  # the null row, the only one of the new table that is the base's
    out, expected = model(**inputs | labels).sample, base(**inputs | labels).sample
    if case[0] == "peft:vblora":  # its vectors and weights both start beside zero, by up to 0.02
        torch.testing.assert_close(out, expected, atol=0.02, rtol=0.02)
    else:
        assert_rounded(out, expected, model)
    with disable_adapter(model):
        assert torch.equal(model(**inputs).sample, base(**inputs).sample)


@pytest.mark.parametrize("method", ["1lora", "mora1", "mora6", "lora", "dora", "vera"])
def test_starts_as_a_half_precision_base_with_fp32_tensors(inputs, method):
    base, model = make_dit().to(torch.bfloat16), make_dit().to(torch.bfloat16)
    inputs["hidden_states"] = inputs["hidden_states"].bfloat16()
    inject_adapter(model, AdapterConfig(method))
    out = model(**inputs).sample
    assert torch.equal(out, base(**inputs).sample)
    out.float().square().mean().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in adapter_state_dict(model).values())


def test_only_the_adapter_trains_and_every_part_of_it_does(case, inputs):
    model = trained(*case)
    own = adapter_state_dict(model)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in own.values()}
    assert count_trainable(model) == sum(p.numel() for p in own.values())
    assert all(p.dtype == torch.float32 for p in own.values())
    base = {key: tensor.clone() for key, tensor in make_dit().state_dict().items()}

    inputs["class_labels"] = torch.arange(3)
    optimizer = torch.optim.SGD(own.values(), lr=1.0)
    model(**inputs).sample.square().mean().backward()
    gradients = {name: p.grad for name, p in own.items()}
    assert not [name for name, grad in gradients.items() if grad is None or not grad.any()]
    optimizer.step()
    unload_adapter(model)
    assert all(torch.equal(tensor, base[key]) for key, tensor in model.state_dict().items())


def test_save_and_load(case, inputs, tmp_path):
    model = trained(*case)
    expected = model(**inputs).sample
    path = save_adapter(model, tmp_path)
    torch.manual_seed(12345)  # whatever else was drawn before
    loaded = load_adapter(make_dit(), path)
    assert torch.equal(loaded(**inputs).sample, expected)
    assert adapter_state_dict(loaded).keys() == adapter_state_dict(model).keys()


def test_merge_and_unmerge(case, inputs, monkeypatch):
    # Hooks stay, and do nothing, where a test before this one has compiled something.
    monkeypatch.setattr("onelora_diffusion.injection.book.anything_is_compiled", lambda: False)
    model = trained(*case)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = model(**inputs).sample
        merge_adapter(model)
        assert_rounded(model(**inputs).sample, expected, model)
        assert not [m for m in model.modules() if m._forward_hooks]
        unmerge_adapter(model)
        assert torch.equal(model(**inputs).sample, expected)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert count_trainable(model) == sum(p.numel() for p in adapter_state_dict(model).values())


def test_unload_leaves_the_plain_base(case, inputs):
    model = trained(*case)
    unload_adapter(model)
    base = make_dit()
    assert torch.equal(model(**inputs).sample, base(**inputs).sample)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in base.named_modules()]
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in base.named_parameters()]


def test_two_adapters_with_weights(case, inputs):
    """Layer by layer the weighted terms add up, so that weight 0 is the base and merging is exact."""
    model = trained(*case)
    only_first = model(**inputs).sample
    randomize(inject_adapter(model, config_of(*case), "second"), seed=5)
    only_second = model(**inputs).sample
    assert not torch.allclose(only_first, only_second)
    with torch.no_grad():
        set_adapters(model, "default")
        assert torch.equal(model(**inputs).sample, only_first)
        set_adapters(model, "second", 0.0)
        assert_rounded(model(**inputs).sample, make_dit()(**inputs).sample, model)
        set_adapters(model, ["default", "second"], [0.75, -0.5])
        both = model(**inputs).sample
        merge_adapter(model)
        assert_rounded(model(**inputs).sample, both, model)
        unload_adapter(model)
    assert torch.equal(model(**inputs).sample, make_dit()(**inputs).sample)


def assigned(layer, values):
    layer.load_state_dict(layer.state_dict() | values, assign=True)
    return layer


def replaced(layer, values):
    for name, parameter in layer.named_parameters():
        parameter.data = values.get(name, parameter.data)
    return layer


def called(layer, values):
    return lambda x: torch.func.functional_call(layer, values, (x,))


def mapped(layer, values):
    return lambda x: torch.vmap(called(layer, values), in_dims=0)(x[None])[0]


@pytest.mark.parametrize("give", [assigned, replaced, called, mapped])
def test_the_sum_of_adapters_follows_values_that_take_the_place_of_others(give):
    """However they come there, of which the versions of tensors tell nothing."""
    layer = nn.Sequential(nn.Linear(4, 3))
    for name in ("one", "two"):
        randomize(inject_adapter(layer, AdapterConfig(targets=("0",)), name))
    set_adapters(layer, ["one", "two"], [0.5, 2.0])
    x, vectors = torch.randn(5, 4), [torch.randn(3), torch.randn(3)]
    names = ["0.onelora.one.b", "0.onelora.two.b"]
    with torch.no_grad():
        before = layer(x)
        changed = give(layer, dict(zip(names, vectors, strict=True)))(x)
        expected = (
            layer[0].weight @ x.T + layer[0].bias[:, None] + torch.outer(0.5 * vectors[0] + 2 * vectors[1], x.sum(1))
        )
    assert_rounded(changed, expected.T, terms=8)
    assert not torch.allclose(changed, before)


def test_deepcopy_is_independent(case, inputs):
    model = trained(*case)
    expected = model(**inputs).sample
    twin = copy.deepcopy(model)
    randomize(model, seed=9)
    assert torch.equal(twin(**inputs).sample, expected)
    assert not torch.equal(model(**inputs).sample, expected)


def test_a_new_adapter_starts_from_the_base_whatever_serves(inputs):
    """Trained norms and weights are in the base's place while they serve."""
    model = trained("full")
    null = {**inputs, "class_labels": torch.full((3,), 10)}
    for name in ("dora", "full"):
        inject_adapter(model, config_of(name), f"new-{name}")
        assert_rounded(model(**null).sample, make_dit()(**null).sample, model)


def test_methods_side_by_side(inputs):
    """Fused and separate, vectors and matrices and trained tensors on the same layers, each as when alone."""
    alone, model = {}, make_dit()
    cases = {
        "a": ("1lora", True),
        "b": ("lora", True),
        "c": ("full", False),
        "d": ("lora", False),
        "e": ("mora6", True),
    }
    for name, case in cases.items():
        alone[name] = trained(*case)(**inputs).sample
        randomize(inject_adapter(model, config_of(*case), name))
    for name in cases:
        set_adapters(model, name)
        assert_rounded(model(**inputs).sample, alone[name], model)
    with pytest.raises(ValueError, match="'c' trains q, k and v, which 'b' adapts as one"):
        set_adapters(model, ["b", "c"])

    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        for names in (["a", "b", "d", "e"], ["a", "c", "d"], ["b"], ["e"]):
            set_adapters(model, names, 0.5)
            expected = model(**inputs).sample
            assert torch.equal(merge_adapter(model)(**inputs).sample, model(**inputs).sample)
            assert_rounded(model(**inputs).sample, expected, model)
            unmerge_adapter(model)
            assert torch.equal(model(**inputs).sample, expected)
        set_adapters(model, "e")  # as when `state` was taken
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_full_trains_everything_once(inputs):
    """The blocks' equal embeddings are one; where they differ, each is trained."""
    base = make_dit()
    embedding = sum(p.numel() for p in base.transformer_blocks[0].norm1.emb.parameters())
    table = base.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight.numel()
    total = sum(p.numel() for p in base.parameters())
    assert count_trainable(inject_adapter(make_dit(), AdapterConfig("full"))) == total - embedding
    assert count_trainable(inject_adapter(make_dit(False), AdapterConfig("full"))) == total
    new_table = AdapterConfig("full", num_classes=3)
    assert count_trainable(inject_adapter(make_dit(), new_table)) == total - embedding - table + 4 * 32
    with pytest.raises(ValueError, match="this one is torch.bfloat16: load it in float32"):
        inject_adapter(make_dit().to(torch.bfloat16), AdapterConfig("full"))
    with pytest.raises(ValueError, match="fuse_qkv goes with a frozen base"):
        AdapterConfig("full", fuse_qkv=True)


def test_full_is_plain_training(inputs):
    """A step on the trained tensors is a step on the model itself."""
    base = make_dit().requires_grad_(True)
    first, second = base.transformer_blocks
    second.norm1.emb = first.norm1.emb
    model = inject_adapter(make_dit(), AdapterConfig("full"))
    for network in (base, model):
        optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
        network(**inputs).sample.square().mean().backward()
        optimizer.step()
    assert_rounded(model(**inputs).sample, base(**inputs).sample, model)


@pytest.mark.parametrize("name", ["full", "lora"])
def test_save_pretrained_is_the_base_and_merged_the_adapted_model(inputs, name, tmp_path):
    from diffusers import DiTTransformer2DModel

    model = trained(name)
    inputs["class_labels"] = torch.tensor([0, 2, 10])
    expected = model(**inputs).sample
    model.save_pretrained(tmp_path / "base")
    merge_adapter(model).save_pretrained(tmp_path / "merged")
    for folder, output in (("base", make_dit()(**inputs).sample), ("merged", expected)):
        stock, info = DiTTransformer2DModel.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(info.values())
        assert_rounded(stock.eval()(**inputs).sample, output, stock)


def test_fused_layers_need_all_three():
    with pytest.raises(ValueError, match="of transformer_blocks.0.attn1 the targets have not all three"):
        inject_adapter(make_dit(), AdapterConfig("mora1", targets=("to_q", "to_v"), fuse_qkv=True))


def test_file_names(tmp_path):
    names = list(adapter_state_dict(inject_adapter(make_dit(), AdapterConfig("dora", targets=("to_q",)))))
    parts = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector.weight")
    assert names == [f"transformer_blocks.{i}.attn1.to_q.onelora_{part}" for i in (0, 1) for part in parts]
    fused = AdapterConfig("mora1", targets=("to_q", "to_k", "to_v"), fuse_qkv=True)
    names = list(adapter_state_dict(inject_adapter(make_dit(), fused)))
    assert names == [f"transformer_blocks.{i}.attn1.to_qkv.onelora_M" for i in (0, 1)]


def test_a_bias_that_is_loaded_later_is_no_part_of_what_is_read_of_the_outputs():
    torch.manual_seed(0)
    linear = nn.Linear(5, 4)
    model = randomize(
        inject_adapter(
            nn.Sequential(linear, nn.ReLU(), nn.Linear(4, 2)), AdapterConfig(compression="outputs", targets=("0",))
        )
    )
    b = adapter_state_dict(model)["0.onelora_b"]
    with torch.no_grad():
        linear.bias.copy_(torch.arange(4.0))
        x = torch.randn(3, 5)
        product = x @ linear.weight.T
        expected = product + linear.bias + product.sum(-1, keepdim=True) * b
        assert_rounded(linear(x), expected, terms=20)
        merge_adapter(model)
        assert_rounded(linear(x), expected, terms=20)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"rank": 6}, "a rank of 6 is above the 5 features of 0 that are compressed"),
        ({"rank": 5, "compression": "outputs"}, "a rank of 5 is above the 4 features of 0 that are compressed"),
        ({"targets": ("1",)}, "1 computes with complex numbers"),
    ],
)
def test_layers_that_cannot_be_summed_up_are_refused_by_name(config, message):
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 4, dtype=torch.complex64))
    with pytest.raises(ValueError, match=message):
        inject_adapter(model, AdapterConfig(**{"targets": ("0",)} | config))
    assert not hasattr(model, "_onelora") and all(p.requires_grad for p in model.parameters())
