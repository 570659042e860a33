import copy
import sys

import pytest
import torch
from rounding import assert_rounded, assert_rounded_together
from tiny_models import make_dit, randomize
from torch import nn

from onelora_diffusion import (
    AdapterConfig,
    adapter_state_dict,
    count_trainable,
    disable_adapter,
    inject_adapter,
    set_adapters,
    unload_adapter,
)
from onelora_diffusion.injection.layers import target_layers


class Listing1(nn.Module):
    """The paper's Listing 1, around the same linear layer."""

    def __init__(self, linear, b):
        super().__init__()
        self.linear, self.b = linear, nn.Parameter(b.clone())

    def forward(self, x):
        return self.linear(x) + self.b * x.sum(-1, keepdim=True)


def listing1_twin(model, vectors):
    """A copy of the base with Listing 1 in place of every adapted linear layer."""
    twin = copy.deepcopy(model).requires_grad_(False)
    for path, b in vectors.items():
        parent, _, name = path.rpartition(".")
        setattr(twin.get_submodule(parent), name, Listing1(twin.get_submodule(path), b))
    return twin


@pytest.mark.parametrize("equal_copies", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fuse_qkv", [False, True])
def test_output_and_gradients_equal_listing_1(inputs, fuse_qkv, checkpointing, equal_copies):
    base = make_dit(equal_copies)
    model = randomize(inject_adapter(copy.deepcopy(base), AdapterConfig(fuse_qkv=fuse_qkv)))
    vectors = {key.removesuffix(".onelora_b"): b for key, b in adapter_state_dict(model).items()}
    twin = listing1_twin(base, vectors)
    if checkpointing:
        model.enable_gradient_checkpointing()

    out, expected = model(**inputs).sample, twin(**inputs).sample
    assert_rounded(out, expected, model)

    out.square().mean().backward()
    expected.square().mean().backward()
    theirs = [twin.get_submodule(path).b.grad for path in vectors]
    assert_rounded_together([b.grad for b in vectors.values()], theirs, model)


def test_a_foreign_attention_processor_is_right_too(dit, inputs):
    from diffusers.models.attention_processor import AttnProcessor

    model = randomize(inject_adapter(dit, AdapterConfig()))
    expected = model(**inputs).sample
    for block in model.transformer_blocks:
        block.attn1.set_processor(AttnProcessor())
    assert_rounded(model(**inputs).sample, expected, model)


@pytest.mark.parametrize("method", ["1lora", "bitfit", "difffit"])
def test_starts_as_the_base_and_trains_only_the_adapter(dit, inputs, method):
    expected = dit(**inputs).sample
    inject_adapter(dit, AdapterConfig(method=method, num_classes=3))
    own = list(adapter_state_dict(dit).values())
    assert {id(p) for p in dit.parameters() if p.requires_grad} == {id(p) for p in own}
    assert all(p.dtype == torch.float32 for p in own)

    null = {**inputs, "class_labels": torch.full((3,), 1000)}
    dit(**null).sample.sum().backward()
    assert all(p.grad is not None for p in own)
    base = make_dit()
    assert_rounded(dit(**null).sample, base(**null | {"class_labels": torch.full((3,), 10)}).sample, dit)
    with disable_adapter(dit):
        assert torch.equal(dit(**inputs).sample, expected)


def test_the_vector_of_a_fused_qkv_is_that_of_q_k_and_v():
    separate, fused = make_dit(), make_dit()
    inject_adapter(separate, AdapterConfig())
    inject_adapter(fused, AdapterConfig(fuse_qkv=True))
    shapes = [{key: p.shape for key, p in adapter_state_dict(model).items()} for model in (separate, fused)]
    assert shapes[0] == shapes[1]
    attn = fused.transformer_blocks[0].attn1
    assert attn.to_k.weight.untyped_storage().data_ptr() == attn.to_qkv.weight.untyped_storage().data_ptr()


def test_any_label_past_the_classes_is_the_null_row(dit, inputs):
    model = randomize(inject_adapter(dit, AdapterConfig(num_classes=3)))
    outputs = [model(**inputs | {"class_labels": torch.full((3,), label)}).sample for label in (3, 101, 1000)]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], model(**inputs | {"class_labels": torch.full((3,), 2)}).sample)


def test_new_class_table(dit):
    table = adapter_state_dict(inject_adapter(dit, AdapterConfig(num_classes=500)))["class_embedding.weight"]
    base = make_dit().transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight
    assert table.shape == (501, 32)
    assert torch.equal(table[-1], base[-1])
    assert abs(table[:-1].std().item() - 0.02) < 0.001


def test_conditioning_is_computed_once_and_labels_are_never_dropped(dit, inputs):
    expected = dit(**inputs).sample
    inject_adapter(dit, AdapterConfig(num_classes=None)).train()
    calls = []
    embedder = dit.transformer_blocks[1].norm1.emb.timestep_embedder
    embedder.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(dit(**inputs).sample, expected)
    assert len(calls) == 1


def test_different_copies_are_kept(inputs, caplog):
    model = make_dit(equal_copies=False)
    expected = model(**inputs).sample
    inject_adapter(model, AdapterConfig())
    inject_adapter(model, AdapterConfig(), "second")
    assert torch.equal(model(**inputs).sample, expected)
    assert caplog.text.count("different timestep and class embeddings") == 1


def test_unload_leaves_the_plain_base(inputs):
    for equal_copies in (True, False):
        model = make_dit(equal_copies)
        names = [name for name, _ in model.named_modules()]
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        expected = model(**inputs).sample
        processor = type(model.transformer_blocks[0].attn1.processor)
        randomize(inject_adapter(model, AdapterConfig(method="difffit", sum=True, num_classes=3, fuse_qkv=True)))
        assert not torch.equal(model(**inputs).sample, expected)
        unload_adapter(model)
        assert torch.equal(model(**inputs).sample, expected)
        assert [name for name, _ in model.named_modules()] == names
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
        assert type(model.transformer_blocks[0].attn1.processor) is processor
        copies = [block.norm1.emb.timestep_embedder.linear_1.weight for block in model.transformer_blocks]
        assert copies[0].data_ptr() != copies[1].data_ptr()


def test_weighted_sums_of_adapters(dit, inputs):
    randomize(inject_adapter(dit, AdapterConfig(method="difffit", sum=True), "a"), seed=3)
    only_a = dit(**inputs).sample
    randomize(inject_adapter(dit, AdapterConfig(method="difffit", sum=True), "b"), seed=4)
    only_b = dit(**inputs).sample
    with torch.no_grad():
        set_adapters(dit, ["a", "b"], [0.25, -0.5])
        both = dit(**inputs).sample
        summed = inject_adapter(dit, AdapterConfig(method="difffit", sum=True), "summed")
        a, b, s = (adapter_state_dict(dit, name) for name in ("a", "b", "summed"))
        for key in s:
            start = 1.0 if key.endswith("gamma") else 0.0
            s[key].copy_(start + 0.25 * (a[key] - start) - 0.5 * (b[key] - start))
        assert_rounded(summed(**inputs).sample, both, summed)
        set_adapters(dit, "a")
        assert torch.equal(dit(**inputs).sample, only_a)
        set_adapters(dit, "b")
        assert torch.equal(dit(**inputs).sample, only_b)
        set_adapters(dit, ["a", "b"], 0.0)
        assert_rounded(dit(**inputs).sample, make_dit()(**inputs).sample, dit)


def test_summed_vectors_follow_a_change_of_their_values(dit, inputs):
    randomize(inject_adapter(dit, AdapterConfig()))
    set_adapters(dit, "default", 0.5)
    with torch.no_grad():
        first = dit(**inputs).sample
        for vector in adapter_state_dict(dit).values():
            vector.zero_()
        assert not torch.equal(dit(**inputs).sample, first)
        assert_rounded(dit(**inputs).sample, make_dit()(**inputs).sample, dit)


def test_names(dit):
    inject_adapter(dit, AdapterConfig())
    with pytest.raises(ValueError, match="'default' is already in use"):
        inject_adapter(dit, AdapterConfig())
    with pytest.raises(ValueError, match="'a.b' must not be empty or contain a dot"):
        inject_adapter(dit, AdapterConfig(), "a.b")
    with pytest.raises(ValueError, match="'food' is not in the list of present adapters: default"):
        set_adapters(dit, "food")
    with pytest.raises(ValueError, match="1 adapter names .* but 2 weights"):
        set_adapters(dit, ["default"], [1.0, 2.0])


def test_targets(dit):
    assert len(target_layers(dit, None)) == 2 * 7 + 2
    assert set(target_layers(dit, ("to_q", "ff.net.2"))) == {
        f"transformer_blocks.{i}.{name}" for i in (0, 1) for name in ("attn1.to_q", "ff.net.2")
    }
    assert list(target_layers(dit, ("proj_out_*",))) == ["proj_out_1", "proj_out_2"]
    assert all(path.endswith("ff.net.0.proj") for path in target_layers(dit, ("proj",)))
    with pytest.raises(ValueError, match="target 'to_x' matches no linear layer"):
        inject_adapter(dit, AdapterConfig(targets=("to_x",)))
    assert not hasattr(dit, "_onelora")


def test_an_output_head_is_not_inside_a_list_of_blocks():
    model = nn.ModuleDict({"single_transformer_blocks": nn.ModuleList(), "proj_out": nn.Linear(4, 2)})
    for _ in range(2):
        model["single_transformer_blocks"].append(nn.ModuleDict({"proj_out": nn.Linear(4, 4)}))
    assert list(target_layers(model, None)) == [f"single_transformer_blocks.{i}.proj_out" for i in (0, 1)]


@pytest.mark.parametrize("equal_copies", [True, False])
def test_a_shared_timestep_embedder_has_one_adapter(inputs, equal_copies):
    model = make_dit(equal_copies)
    expected = model(**inputs).sample
    randomize(inject_adapter(model, AdapterConfig(targets=("timestep_embedder.linear_1",))))
    assert len(adapter_state_dict(model)) == (1 if equal_copies else 2)
    vector = next(iter(adapter_state_dict(model).values()))
    linear, x = model.transformer_blocks[0].norm1.emb.timestep_embedder.linear_1, torch.ones(1, 256)
    assert_rounded(linear(x), nn.functional.linear(x, linear.weight, linear.bias) + 256 * vector, terms=2 * 256)
    assert not torch.equal(model(**inputs).sample, expected)
    assert torch.equal(unload_adapter(model)(**inputs).sample, expected)


def test_layers_are_the_same_beside_other_adapters(dit):
    before = target_layers(dit, None)
    for name, config in {"fused": AdapterConfig(fuse_qkv=True), "mora": AdapterConfig(method="mora1")}.items():
        inject_adapter(dit, config, name)
    assert target_layers(dit, None) == before


def test_injecting_freezes_whatever_trained_before(dit):
    inject_adapter(dit, AdapterConfig(num_classes=3), "first")
    inject_adapter(dit, AdapterConfig(method="lora"), "second")
    dit.requires_grad_(True)
    inject_adapter(dit, AdapterConfig(fuse_qkv=True), "third")
    own = adapter_state_dict(dit, "third").values()
    assert {id(p) for p in dit.parameters() if p.requires_grad} == {id(p) for p in own}


def test_any_module_with_linear_layers():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.body = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 4))
    model.head = nn.Linear(4, 2)
    x = torch.randn(5, 4)
    expected = model(x)
    inject_adapter(model, AdapterConfig(norms=True))
    assert torch.equal(model(x), expected)
    assert list(adapter_state_dict(model)) == [
        "body.0.onelora_b",
        "body.3.onelora_b",
        "body.1.onelora_weight",
        "body.1.onelora_bias",
    ]
    assert count_trainable(model) == 6 + 4 + 6 + 6
    randomize(model)
    assert not torch.equal(model(x), expected)
    with disable_adapter(model):
        assert torch.equal(model(x), expected)
    unload_adapter(model)
    assert torch.equal(model(x), expected)


def test_bf16_base_and_autocast_keep_fp32_vectors(dit, inputs):
    randomize(inject_adapter(dit, AdapterConfig(num_classes=3)))
    expected = dit(**inputs).sample
    with torch.autocast("cpu", torch.bfloat16):
        out = dit(**inputs).sample
    assert_rounded(out, expected, terms=len(target_layers(dit, None)))  # each layer's output is rounded to bf16 once
    out.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in adapter_state_dict(dit).values())

    half = make_dit().to(torch.bfloat16)
    inject_adapter(half, AdapterConfig(num_classes=3))
    assert all(p.dtype == torch.float32 for p in adapter_state_dict(half).values())
    inputs["hidden_states"] = inputs["hidden_states"].bfloat16()
    assert half(**inputs).sample.dtype == torch.bfloat16


def test_deepcopy_is_independent(dit, inputs):
    randomize(inject_adapter(dit, AdapterConfig(num_classes=3)))
    expected = dit(**inputs).sample
    twin = copy.deepcopy(dit)
    assert torch.equal(twin(**inputs).sample, expected)
    unload_adapter(twin)
    assert torch.equal(dit(**inputs).sample, expected)
    assert not torch.equal(twin(**inputs).sample, expected)


def test_random_compression_is_seeded_and_not_stored(inputs):
    models = [randomize(inject_adapter(make_dit(), AdapterConfig(compression="random", seed=s))) for s in (0, 0, 1)]
    outputs = [model(**inputs).sample for model in models]
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    assert count_trainable(models[0]) == count_trainable(inject_adapter(make_dit(), AdapterConfig()))


def test_config_errors():
    with pytest.raises(ValueError, match="unknown method 'loha'"):
        AdapterConfig(method="loha")
    with pytest.raises(ValueError, match="unknown adapter settings colour"):
        AdapterConfig.from_json('{"colour": 1}')
    config = AdapterConfig(method="difffit", num_classes=7, targets=("to_q",))
    assert AdapterConfig.from_json(config.to_json()) == config


def test_import_is_light():
    import subprocess

    code = (
        "import sys, onelora_diffusion, onelora_diffusion.pipelines.base; "
        "print([m for m in ('diffusers', 'peft', 'transformers', 'huggingface_hub', 'matplotlib', 'torchmetrics', "
        "'sklearn') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
