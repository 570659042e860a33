import pytest
import torch
from rounding import assert_rounded
from tiny_models import make_dit, randomize
from torch import nn

from onelora_diffusion import (
    AdapterConfig,
    adapter_state_dict,
    inject_adapter,
    merge_adapter,
    set_adapters,
    unload_adapter,
    unmerge_adapter,
)
from onelora_diffusion.injection.merging import merged

EVERY_PART = {"method": "difffit", "sum": True, "num_classes": 3}


@pytest.mark.parametrize("fuse_qkv", [False, True])
@pytest.mark.parametrize("compression", ["sum", "random"])
def test_merged_output_equals_the_adapter_and_unmerge_restores_every_bit(dit, inputs, compression, fuse_qkv):
    inject_adapter(dit, AdapterConfig(**EVERY_PART, compression=compression, fuse_qkv=fuse_qkv))
    randomize(dit)
    before = {key: tensor.clone() for key, tensor in dit.state_dict().items()}
    with torch.no_grad():
        expected = dit(**inputs).sample
        merge_adapter(dit)
        assert_rounded(dit(**inputs).sample, expected, dit)
        unmerge_adapter(dit)
        assert torch.equal(dit(**inputs).sample, expected)
    assert all(torch.equal(tensor, before[key]) for key, tensor in dit.state_dict().items())


def test_merge_adds_b_to_every_column(dit):
    inject_adapter(dit, AdapterConfig(targets=("to_q",)))
    linear = dit.transformer_blocks[0].attn1.to_q
    before = linear.weight.clone()
    with torch.no_grad():
        b = adapter_state_dict(dit)["transformer_blocks.0.attn1.to_q.onelora_b"]
        b.copy_(torch.arange(32.0))
    merge_adapter(dit)
    assert_rounded(linear.weight - before, torch.arange(32.0).unsqueeze(1).expand(32, 32), terms=2)


def test_merge_of_weighted_adapters_equals_them(dit, inputs):
    for seed, name in enumerate(("a", "b")):
        randomize(inject_adapter(dit, AdapterConfig(**EVERY_PART), name), seed=seed)
    set_adapters(dit, ["a", "b"], [0.5, -1.5])
    with torch.no_grad():
        expected = dit(**inputs).sample
        merge_adapter(dit)
        assert_rounded(dit(**inputs).sample, expected, dit)


def test_unload_while_merged_leaves_the_plain_base(dit, inputs):
    expected = dit(**inputs).sample
    merge_adapter(randomize(inject_adapter(dit, AdapterConfig(**EVERY_PART))))
    unload_adapter(dit)
    assert torch.equal(dit(**inputs).sample, expected)


def test_merging_nan_is_refused_with_nothing_changed(dit, inputs):
    randomize(inject_adapter(dit, AdapterConfig()))
    expected = dit(**inputs).sample
    bad = adapter_state_dict(inject_adapter(dit, AdapterConfig(), "bad"), "bad")["proj_out_2.onelora_b"]
    bad.data[0] = float("nan")
    set_adapters(dit, "default")
    with pytest.raises(ValueError, match="merging bad into proj_out_2 gives NaN"):
        merge_adapter(dit, "bad")
    assert torch.equal(dit(**inputs).sample, expected)


def test_order_of_verbs(dit):
    inject_adapter(dit, AdapterConfig())
    with pytest.raises(ValueError, match="no adapter is merged"):
        unmerge_adapter(dit)
    merge_adapter(dit)
    with pytest.raises(ValueError, match="are merged: unmerge them before"):
        merge_adapter(dit)
    with pytest.raises(ValueError, match="unmerge them before adding another"):
        inject_adapter(dit, AdapterConfig(), "second")
    with pytest.raises(ValueError, match="has no adapter"):
        merge_adapter(make_dit())


def test_save_pretrained_writes_the_clean_base(dit, inputs, tmp_path):
    from diffusers import DiTTransformer2DModel

    expected = dit(**inputs).sample
    inject_adapter(dit, AdapterConfig(**EVERY_PART, fuse_qkv=True))
    randomize(dit).save_pretrained(tmp_path)
    stock, info = DiTTransformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(stock.eval()(**inputs).sample, expected)


def test_save_pretrained_of_a_merged_model_is_a_plain_diffusers_model(dit, inputs, tmp_path):
    from diffusers import DiTTransformer2DModel

    randomize(inject_adapter(dit, AdapterConfig(**EVERY_PART)))
    inputs["class_labels"] = torch.tensor([0, 2, 10])  # 10: the base's null row, the last of its table
    expected = dit(**inputs).sample
    merge_adapter(dit).save_pretrained(tmp_path)
    stock, info = DiTTransformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_rounded(stock.eval()(**inputs).sample, expected, stock)


def test_save_pretrained_refuses_more_classes_than_the_base_has_room_for(dit, tmp_path):
    merge_adapter(inject_adapter(dit, AdapterConfig(num_classes=11)))
    with pytest.raises(ValueError, match="11 classes, but the base's class table only has room for 10"):
        dit.save_pretrained(tmp_path)


METHODS = ["1lora", "difffit", "mora1", "mora6", "lora", "dora", "vera", "full"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_merged_in_a_context_and_taken_out_to_the_bit(dit, inputs, method):
    randomize(inject_adapter(dit, AdapterConfig(method, num_classes=3)))
    before = {key: tensor.clone() for key, tensor in dit.state_dict().items()}
    with torch.no_grad():
        expected = dit(**inputs).sample
        with pytest.raises(KeyboardInterrupt), merged(dit):
            with pytest.raises(ValueError, match="merged"):
                merge_adapter(dit)
            with merged(dit):  # by the outer one already: nothing is left to do
                assert_rounded(dit(**inputs).sample, expected, dit)
            raise KeyboardInterrupt
        assert torch.equal(dit(**inputs).sample, expected)
    assert all(torch.equal(tensor, before[key]) for key, tensor in dit.state_dict().items())


@pytest.mark.parametrize("method", [method for method in METHODS if method != "full"])
def test_in_bf16_merged_and_unmerged_differ_by_rounding(dit, inputs, method):
    """Without autocast; each of the few hundred terms of an output is rounded to 8 bits once more or once less."""
    randomize(inject_adapter(dit, AdapterConfig(method, num_classes=3)))
    with torch.no_grad():
        expected = dit(**inputs).sample
        dit.to(torch.bfloat16)
        inputs["hidden_states"] = inputs["hidden_states"].bfloat16()
        apart = dit(**inputs).sample.float()
        with merged(dit):
            together = dit(**inputs).sample
    assert together.dtype == torch.bfloat16
    for each in (apart, together.float()):
        assert (each - expected).norm() < 0.05 * expected.norm()


def test_what_cannot_be_merged_serves_unmerged(dit, inputs):
    with torch.no_grad():
        base = dit(**inputs).sample
        with merged(dit):  # no adapter at all
            assert torch.equal(dit(**inputs).sample, base)
        randomize(inject_adapter(dit, AdapterConfig(num_classes=3)))
        expected = dit(**inputs).sample
        linear = dit.transformer_blocks[0].attn1.to_q
        linear.weight.data[0, 0] = float("inf")
        weight = linear.weight.clone()
        with merged(dit):
            assert torch.equal(linear.weight, weight)
        linear.weight.data.copy_(linear.weight.nan_to_num(posinf=0.0))
        set_adapters(dit, [])
        with merged(dit):  # none that serves
            assert dit(**inputs).sample.shape == expected.shape


def test_unmerging_leaves_who_served_before(dit, inputs):
    for seed, name in enumerate(("a", "b", "c")):
        randomize(inject_adapter(dit, AdapterConfig(), name), seed=seed)
    set_adapters(dit, ["a", "b"], [0.5, 2])
    with torch.no_grad():
        expected = dit(**inputs).sample
        for names in (["a"], ["a", "a"], "c", None):
            merge_adapter(dit, names)
            unmerge_adapter(dit)
            assert dit._onelora.serving == {"a": 0.5, "b": 2.0}
            assert torch.equal(dit(**inputs).sample, expected)
        dit._onelora.pause()
        paused = dit(**inputs).sample
        merge_adapter(dit, ["a"])
        unmerge_adapter(dit)
        assert dit._onelora.serving == {}
        assert torch.equal(dit(**inputs).sample, paused)
        dit._onelora.resume()
        assert torch.equal(dit(**inputs).sample, expected)


class Codes(nn.Linear):
    """A linear layer of numbers that a scale beside them makes weights of."""

    def __init__(self, linear: nn.Linear, dtype, scale: float):
        super().__init__(linear.in_features, linear.out_features)
        self.weight = nn.Parameter((linear.weight / scale).to(dtype), requires_grad=False)
        self.bias, self.scale = linear.bias, scale

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class Refusing(nn.Linear):
    def forward(self, x):
        raise NotImplementedError("no kernel\nfor this machine")


def replaced_forward(linear):
    own = linear.forward
    linear.forward = lambda x: 2 * own(x)
    return linear


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda linear: Codes(linear, torch.float8_e4m3fn, 0.5), "0 holds its weight in torch.float8_e4m3fn"),
        (lambda linear: Codes(linear, torch.float32, 0.5), "0 does not compute with its weight alone .*Codes"),
        (lambda linear: Codes(linear, torch.bfloat16, 0.98), "0 does not compute with its weight alone .*Codes"),
        (replaced_forward, "0 does not compute with its weight alone .*Linear"),
        (lambda linear: Refusing(8, 8), "0 does not compute on one input, .*Refusing: no kernel"),
    ],
)
def test_a_layer_that_is_more_than_its_weight_takes_no_adapter_in(make, reason):
    torch.manual_seed(0)
    model = nn.Sequential(make(nn.Linear(8, 8)), nn.Linear(8, 8))
    randomize(inject_adapter(model, AdapterConfig()))
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"^{reason}.*: serve adapters unmerged: nothing was merged$"):
        merge_adapter(model)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert model._onelora.serving == {"default": 1.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_of_another_class_that_computes_with_its_weight_is_merged(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(Codes(nn.Linear(512, 512), dtype, 1.0))
    randomize(inject_adapter(model, AdapterConfig("difffit", sum=True)), scale=0.01)
    x = torch.randn(4, 512)
    with torch.no_grad():
        expected = model(x)
        merge_adapter(model)
        assert (model(x) - expected).norm() <= 4 * torch.finfo(dtype).eps * expected.norm()


def test_layerwise_casting_is_served_unmerged():
    from tiny_models import sd3

    model, inputs = sd3()
    randomize(inject_adapter(model, AdapterConfig()))
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with torch.no_grad():
        expected = model(**inputs).sample
        with pytest.raises(ValueError, match="holds its weight in torch.float8_e4m3fn, whose rounding is larger"):
            merge_adapter(model)
        with merged(model):
            assert torch.equal(model(**inputs).sample, expected)


@pytest.mark.parametrize("method", ["1lora", "lora", "dora", "mora6", "vera"])
def test_a_merge_under_autocast_is_not_rounded(method):
    model = randomize(inject_adapter(make_dit(), AdapterConfig(method)))
    weights = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            merge_adapter(model)
        weights.append(model.proj_out_2.weight.clone())
        unmerge_adapter(model)
    assert torch.equal(*weights)


@pytest.mark.parametrize("first", [AdapterConfig("full"), AdapterConfig("dora", fuse_qkv=True)])
def test_adapters_in_and_beside_one_layer_are_merged_in_the_order_in_which_they_serve(dit, inputs, first):
    """Trained tensors take the base's place before others are added to them; q, k and v are parts of what is fused."""
    randomize(inject_adapter(dit, first, "first"), seed=3)
    randomize(inject_adapter(dit, AdapterConfig(), "second"), seed=4)
    set_adapters(dit, ["first", "second"])
    before = {key: tensor.clone() for key, tensor in dit.state_dict().items()}
    with torch.no_grad():
        expected = dit(**inputs).sample
        merge_adapter(dit)
        assert_rounded(dit(**inputs).sample, expected, dit)
        unmerge_adapter(dit)
        assert torch.equal(dit(**inputs).sample, expected)
    assert all(torch.equal(tensor, before[key]) for key, tensor in dit.state_dict().items())


def test_other_weights_are_not_loaded_while_adapters_are_merged(dit, inputs):
    other = make_dit(seed=5).state_dict()
    model = randomize(inject_adapter(dit, AdapterConfig()))
    merge_adapter(model)
    with torch.no_grad():
        merged_output = model(**inputs).sample
        with pytest.raises(
            ValueError, match="adapters default are merged: unmerge them before other weights are loaded"
        ):
            model.load_state_dict(other, strict=False)
        assert torch.equal(model(**inputs).sample, merged_output)
        unmerge_adapter(model).load_state_dict(other, strict=False)
        unload_adapter(model)
        assert torch.equal(model(**inputs).sample, make_dit(seed=5)(**inputs).sample)
