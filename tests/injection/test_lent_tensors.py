"""Trained tensors in the base's place stay the adapter's own, whoever moves, casts, offloads or loads the model."""

import copy
import tempfile

import pytest
import torch
from rounding import assert_rounded, assert_rounded_together
from tiny_models import make_dit, randomize
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from onelora_diffusion import (
    AdapterConfig,
    OneLoRADiTPipeline,
    adapter_state_dict,
    disable_adapter,
    inject_adapter,
    load_adapter,
    merge_adapter,
    save_adapter,
    set_adapters,
    unload_adapter,
    unmerge_adapter,
)

CPU = torch.device("cpu")
FULL, NORMS = AdapterConfig("full"), AdapterConfig("1lora", sum=False, norms=True)
both_kinds = pytest.mark.parametrize("config", [FULL, NORMS], ids=["full", "norms"])


class Net(nn.Module):
    """8 -> 16 -> 8, with a norm that has weights."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8)

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.first(x))))


def by_hand(x, base: dict, adapter: dict | None = None, weight: float = 1.0, dtype=None) -> torch.Tensor:
    """What `Net` computes from a base's state dict and an adapter's tensors in its place."""
    values = {name: tensor.clone() for name, tensor in base.items()}
    for name, tensor in (adapter or {}).items():
        name = name.replace("onelora_", "")
        values[name] = values[name] + weight * (tensor.detach() - values[name])
    v = {name: tensor.to(dtype or tensor.dtype) for name, tensor in values.items()}
    h = F.layer_norm(F.linear(x, v["first.weight"], v["first.bias"]), (16,), v["norm.weight"], v["norm.bias"])
    return F.linear(torch.relu(h), v["last.weight"], v["last.bias"])


def make(config=None, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Net() if config is None else randomize(inject_adapter(Net(), config), 0.5)


def values_of(model) -> dict:
    return {name: tensor.detach().clone() for name, tensor in adapter_state_dict(model).items()}


@pytest.fixture
def x():
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def base() -> dict:
    return {name: tensor.clone() for name, tensor in make().state_dict().items()}


# ---------------------------------------------------------------------------------------------------
# Beside sums of a layer's own outputs, which are without its bias


SUMS = AdapterConfig(compression="outputs", rank=3)


def sums_beside(x, base: dict, full: dict, b: torch.Tensor, weight: float) -> torch.Tensor:
    """y = W x + bias + Bᵀ (G W x), where W and bias are those of `full` at this weight; G sums every third row."""
    matrix, bias = (base[name] + weight * (full[f"onelora_{name}"] - base[name]) for name in ("weight", "bias"))
    groups = torch.stack([(torch.arange(6) % 3 == group).float() for group in range(3)])
    return x @ (matrix + b.T @ groups @ matrix).T + bias


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_sums_of_outputs_are_without_the_bias_that_is_lent(weight, tmp_path):
    from accelerate import cpu_offload

    torch.manual_seed(0)
    x, base = torch.randn(2, 5, 8), nn.Linear(8, 6)
    start = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = nn.Sequential(copy.deepcopy(base))
    files = []
    for seed, (name, config) in enumerate({"full": FULL, "sums": SUMS}.items()):
        randomize(inject_adapter(model, config, name), 0.5, seed=seed)
        files.append(save_adapter(model, tmp_path / name, name))
    full = {name.removeprefix("0."): p.detach().clone() for name, p in adapter_state_dict(model, "full").items()}
    b = adapter_state_dict(model, "sums")["0.onelora_b"].detach()
    expected = sums_beside(x, start, full, b, weight)
    set_adapters(model, ["full", "sums"], [weight, 1.0])
    assert_rounded(model(x), expected, model)
    offloaded = nn.Sequential(copy.deepcopy(base))
    cpu_offload(offloaded, CPU)
    for file, name in zip(files, ("full", "sums"), strict=True):
        load_adapter(offloaded, file, name)
    set_adapters(offloaded, ["full", "sums"], [weight, 1.0])
    with torch.no_grad():
        assert_rounded(offloaded(x), expected, model)


def test_gradients_of_a_lent_bias_are_without_what_is_taken_off():
    torch.manual_seed(0)
    x, model = torch.randn(2, 5, 8), nn.Sequential(nn.Linear(8, 6))
    randomize(inject_adapter(model, SUMS, "sums"), 0.5)
    randomize(inject_adapter(model, FULL, "full"), 0.5)
    set_adapters(model, ["full", "sums"])
    full = {name.removeprefix("0."): p for name, p in adapter_state_dict(model, "full").items()}
    expected = sums_beside(x, model[0].state_dict(), full, adapter_state_dict(model, "sums")["0.onelora_b"], 1.0)
    wanted = torch.autograd.grad(expected.square().sum(), full.values())
    found = torch.autograd.grad(model(x).square().sum(), full.values())
    for gradient, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------
# Offloaded


def offload_to_host(model):
    from accelerate import cpu_offload

    cpu_offload(model, CPU)


def offload_to_disk(model):
    from accelerate import disk_offload

    disk_offload(model, tempfile.mkdtemp(), CPU)


def dispatch(model):
    from accelerate import dispatch_model

    places = {"first": "cpu", "norm": "disk", "last": "disk"}
    dispatch_model(model, places, main_device="cpu", offload_dir=tempfile.mkdtemp())


def offload_to_host_by_models(model):
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(model, CPU)


OFFLOADING = [offload_to_host, offload_to_disk, dispatch, offload_to_host_by_models]


@both_kinds
@pytest.mark.parametrize("offload", OFFLOADING)
def test_loaded_into_an_offloaded_base(config, offload, x, base, tmp_path):
    trained = make(config)
    save_adapter(trained, tmp_path)
    model = make()
    offload(model)
    with torch.no_grad():
        for _ in range(2):
            load_adapter(model, tmp_path)
            for weight in (1.0, 0.5, 1.0):
                set_adapters(model, "default", weight)
                assert_rounded(model(x), by_hand(x, base, values_of(trained), weight), model)
            with disable_adapter(model):
                assert torch.equal(model(x), by_hand(x, base))
            if offload is not offload_to_host_by_models:
                with pytest.raises(ValueError, match="fuse before enable_sequential_cpu_offload: nothing was merged"):
                    merge_adapter(model)
            assert torch.equal(model(x), by_hand(x, base, values_of(trained)))
            assert not any(tensor.requires_grad for name, tensor in model.named_parameters() if "swap" not in name)
            unload_adapter(model)
            assert torch.equal(model(x), by_hand(x, base))


@both_kinds
@pytest.mark.parametrize("offload", OFFLOADING)
def test_offloaded_after_loading(config, offload, x, base):
    model = make(config)
    values = values_of(model)
    offload(model)
    with torch.no_grad():
        for weight in (1.0, 0.5, 1.0):
            set_adapters(model, "default", weight)
            assert_rounded(model(x), by_hand(x, base, values, weight), model)
        with disable_adapter(model):
            assert torch.equal(model(x), by_hand(x, base))
        unload_adapter(model)
        assert torch.equal(model(x), by_hand(x, base))


@pytest.mark.parametrize("first", ["load", "offload"])
@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "what enable_sequential_cpu_offload calls"])
def test_full_fine_tuning_in_an_offloaded_pipeline(offload, first, tmp_path):
    def images(pipe):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return torch.from_numpy(pipe([0, 1], num_inference_steps=2, output_type="np", generator=generator).images)

    plain = OneLoRADiTPipeline.from_pretrained()
    alone = images(plain)
    save_adapter(randomize(inject_adapter(plain.transformer, AdapterConfig("full", num_classes=3))), tmp_path)
    expected = images(plain)
    assert not torch.allclose(alone, expected, atol=0.01)
    pipe = OneLoRADiTPipeline.from_pretrained()
    steps = [
        lambda: pipe.load_lora_weights(tmp_path),
        lambda: getattr(pipe, offload, lambda device: offload_to_host(pipe.transformer))(device=CPU),
    ]
    for step in steps if first == "load" else reversed(steps):
        step()
    torch.testing.assert_close(images(pipe), expected, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------
# Cast


@both_kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_of_the_model_leaves_trained_values_as_they_are(config, dtype, x, base, tmp_path):
    model = make(config)
    values = values_of(model)
    model.to(dtype)
    out = model(x.to(dtype))
    assert torch.equal(out, by_hand(x.to(dtype), {k: t.to(dtype) for k, t in base.items()}, values, dtype=dtype))
    out.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in adapter_state_dict(model).values())
    save_adapter(model, tmp_path)
    for found in (model, load_adapter(make(), tmp_path)):
        assert all(torch.equal(tensor, values[name]) for name, tensor in adapter_state_dict(found).items())
        assert all(tensor.dtype == torch.float32 for tensor in adapter_state_dict(found).values())


@both_kinds
@pytest.mark.parametrize("first", ["load", "cast"])
def test_layerwise_casting(config, first, x, base, tmp_path):
    """The base is stored in fp8 between calls, and the trained values in fp32."""
    from diffusers.hooks import apply_layerwise_casting

    trained = make(config)
    values = values_of(trained)
    save_adapter(trained, tmp_path)
    model = make()
    steps = [
        lambda: load_adapter(model, tmp_path),
        lambda: apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=("norm",)),
    ]
    if config is FULL and first == "cast":
        steps[1]()
        with pytest.raises(ValueError, match="full trains the base in float32, but this one is torch.float8_e4m3fn"):
            steps[0]()
        return
    for step in steps if first == "load" else reversed(steps):
        step()
    stored = {
        name: tensor if name.startswith("norm") else tensor.to(torch.float8_e4m3fn).float()
        for name, tensor in base.items()
    }
    with torch.no_grad():
        for weight in (1.0, 0.5):
            set_adapters(model, "default", weight)
            assert_rounded(model(x), by_hand(x, stored, values, weight), model)
    assert all(torch.equal(tensor, values[name]) for name, tensor in adapter_state_dict(model).items())


# ---------------------------------------------------------------------------------------------------
# Loaded


@both_kinds
def test_a_base_loaded_under_an_adapter_is_the_base(config, x, base):
    model = make(config)
    values = values_of(model)
    other = make(seed=7).state_dict()
    for state, assign in ((base, False), (other, False), (base, True), (other, True)):
        state = {name: tensor.clone() for name, tensor in state.items()}
        assert not model.load_state_dict(state, strict=False, assign=assign).unexpected_keys
        assert_rounded(model(x), by_hand(x, state, values), model)
        assert all(torch.equal(tensor, values[name]) for name, tensor in adapter_state_dict(model).items())
        with disable_adapter(model):
            assert torch.equal(model(x), by_hand(x, state))


@both_kinds
def test_what_is_trained_after_an_assigned_state_dict_is_saved(config, x, base, tmp_path):
    model = make(config)
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    before = values_of(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).square().mean().backward()
    optimizer.step()
    after = values_of(model)
    assert not any(torch.equal(after[name], before[name]) for name in after)
    assert_rounded(model(x), by_hand(x, base, after), model)
    save_adapter(model, tmp_path)
    assert_rounded(load_adapter(make(), tmp_path)(x), by_hand(x, base, after), model)


@pytest.mark.parametrize("method", ["full", "difffit", "1lora", "mora1"])
def test_an_adapter_of_the_meta_device_starts_as_the_base_that_is_loaded(method, x, base):
    with torch.device("meta"):
        model = Net()
    inject_adapter(model, AdapterConfig(method))
    with pytest.MonkeyPatch.context() as patch:  # memory is not always zero
        patch.setattr(torch, "empty_like", lambda t, **k: torch.full(t.shape, 3.0, dtype=t.dtype, device=k["device"]))
        model.to_empty(device="cpu")
    model.load_state_dict(base, strict=False)
    assert_rounded(model(x), by_hand(x, base), model)
    model(x).square().mean().backward()
    assert all(p.grad is not None and p.isfinite().all() for p in adapter_state_dict(model).values())


def test_values_loaded_after_the_meta_device_are_kept(x, base):
    state = make(FULL).state_dict()
    with torch.device("meta"):
        model = inject_adapter(Net(), FULL)
    model.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(model(x), make(FULL)(x))


# ---------------------------------------------------------------------------------------------------
# Read


class Reader(nn.Module):
    """Reads tensors of modules that it never calls."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.tables = nn.ModuleList([nn.ParameterList([torch.randn(8), torch.randn(8)])])
        self.shift = nn.Parameter(torch.randn(8))

    def forward(self, x):
        x = x * self.tables[0][0] + self.tables[0][1] + self.shift
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_tensors_of_modules_that_others_read_train_as_those_of_the_model(checkpointed, x):
    torch.manual_seed(0)
    plain = nn.Sequential(Reader(), Reader())
    model = inject_adapter(copy.deepcopy(plain), FULL)
    plain.requires_grad_(True)

    def run(network):
        h = x.clone().requires_grad_()
        for block in network:
            h = checkpoint(block, h, use_reentrant=False) if checkpointed else block(h)
        h.square().mean().backward()
        return h

    assert_rounded(run(model), run(plain), model)
    found = adapter_state_dict(model)
    expected = {f"{n.rpartition('.')[0]}.onelora_{n.rpartition('.')[2]}": p.grad for n, p in plain.named_parameters()}
    assert found.keys() == expected.keys()
    assert_rounded_together([p.grad for p in found.values()], list(expected.values()), model)


def test_only_a_forward_is_lent_them(x, base):
    """So that whoever copies, moves or quantises a layer's weight finds the base's."""
    model = make(FULL)
    assert torch.equal(model.first.weight, base["first.weight"])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(x[..., :7])
    assert torch.equal(model.first.weight, base["first.weight"])
    model.first.weight = nn.Parameter(2 * model.first.weight.detach())
    assert_rounded(model(x), by_hand(x, base, values_of(model)), model)
    with disable_adapter(model):
        assert_rounded(model(x), by_hand(x, base | {"first.weight": 2 * base["first.weight"]}), model)


def test_classes_are_the_base_s_again_and_go_by_its_names_meanwhile(x, monkeypatch):
    # They stay where a test before this one has compiled something.
    monkeypatch.setattr("onelora_diffusion.injection.book.anything_is_compiled", lambda: False)
    model = make(FULL)
    assert [type(m).__name__ for m in (model.first, model.norm)] == ["Linear", "LayerNorm"]
    assert isinstance(model.first, nn.Linear)
    merge_adapter(model)
    assert type(model.first) is nn.Linear and not model.first._forward_hooks
    unmerge_adapter(model)
    assert isinstance(copy.deepcopy(model).norm, nn.LayerNorm)
    unload_adapter(model)
    assert type(model.first) is nn.Linear and type(model.norm) is nn.LayerNorm
    assert not model.first._forward_hooks and not model.first._forward_pre_hooks


@both_kinds
def test_autocast_and_the_parameters_that_train(config, x, base):
    model = make(config)
    plain = make()
    with torch.no_grad():
        for name, tensor in values_of(model).items():
            plain.get_parameter(name.replace("onelora_", "")).copy_(tensor)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), plain(x))
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in adapter_state_dict(model).values()}


@both_kinds
@pytest.mark.parametrize("whole", [True, False])
@torch._dynamo.config.patch(recompile_limit=32)
def test_compiled(config, whole, x, base):
    torch._dynamo.reset()
    model = make(config)
    values = values_of(model)
    if whole:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
    else:
        compiled = model
        for part in model.children():
            part.compile(backend="eager", fullgraph=True)
    for weight in (1.0, 0.5):
        set_adapters(model, "default", weight)
        out = compiled(x)
        assert_rounded(out, by_hand(x, base, values, weight), model)
        out.sum().backward()
    assert all(p.grad is not None for p in adapter_state_dict(model).values())
    with torch.no_grad():
        for p in adapter_state_dict(model).values():
            p.add_(1)
    assert_rounded(compiled(x), by_hand(x, base, {n: v + 1 for n, v in values.items()}, 0.5), model)
    with disable_adapter(model):
        assert_rounded(compiled(x), by_hand(x, base), model)
    merge_adapter(model)
    assert_rounded(compiled(x), by_hand(x, base, {n: v + 1 for n, v in values.items()}, 0.5), model)
    unmerge_adapter(model)
    unload_adapter(model)
    assert_rounded(compiled(x), by_hand(x, base), model)
    torch._dynamo.reset()


def test_a_replica_is_lent_the_tensors_of_its_own_device(x):
    """What DataParallel does for each device, by hand, with other values in the place of another device's."""
    model = make(NORMS).norm
    seat = model.onelora_swap
    replica, replica_seat = model._replicate_for_data_parallel(), seat._replicate_for_data_parallel()
    other = randomize(copy.deepcopy(seat["default"]))
    replica_seat._modules["default"], replica._modules["onelora_swap"] = other, replica_seat
    for name, parameter in model.named_parameters(recurse=False):
        setattr(replica, name, parameter.detach().clone())
    h = torch.randn(2, 16)
    assert_rounded(replica(h), F.layer_norm(h, (16,), other.weight, other.bias), 16)
    assert_rounded(model(h), F.layer_norm(h, (16,), seat["default"].weight, seat["default"].bias), 16)


def test_a_layer_replaced_under_its_trained_tensors_is_refused(x):
    model = make(FULL)
    model.first = nn.Linear(8, 16)
    with pytest.raises(ValueError, match="first was replaced after its adapter was attached"):
        model(x)


def test_a_dit_trains_what_its_plain_self_does_under_checkpointing():
    """q, k and v of a DiT's own attention, and blocks that run again in backward."""
    from tiny_models import dit_inputs

    base = make_dit().requires_grad_(True)
    base.transformer_blocks[1].norm1.emb = base.transformer_blocks[0].norm1.emb
    model = inject_adapter(make_dit(), FULL)
    model.enable_gradient_checkpointing()
    model.train()
    for network in (base, model):
        network(**dit_inputs()).sample.square().mean().backward()
    expected = {name: p.grad for name, p in base.named_parameters()}
    found = {name.replace("onelora_", ""): p.grad for name, p in adapter_state_dict(model).items()}
    assert found.keys() == expected.keys()
    assert_rounded_together(list(found.values()), [expected[name] for name in found], model)
