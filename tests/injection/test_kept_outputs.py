"""What others keep of a layer's output stays as it was, however they came by it."""

import contextlib

import pytest
import torch
from rounding import assert_rounded
from tiny_models import dit_inputs, make_dit, randomize
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from onelora_diffusion import AdapterConfig, adapter_state_dict, inject_adapter, route_adapters


def by_its_class(layer, kept):
    class Keeping(nn.Linear):
        def forward(self, x):
            kept.append(super().forward(x))
            return kept[-1]

    layer.__class__ = Keeping


def by_its_forward(layer, kept):
    own = layer.forward

    def forward(x):
        kept.append(own(x))
        return kept[-1]

    layer.forward = forward


def by_a_hook_of_diffusers(layer, kept):
    from diffusers.hooks import HookRegistry, ModelHook

    class Keeping(ModelHook):
        def post_forward(self, module, output):
            kept.append(output)
            return output

    HookRegistry.check_if_exists_or_initialize(layer).register_hook(Keeping(), "keeping")


def by_an_earlier_hook(layer, kept):
    layer.register_forward_hook(lambda module, args, out: kept.append(out))


def by_a_hook_of_all_modules(layer, kept):
    return register_module_forward_hook(lambda module, args, out: kept.append(out) if module is layer else None)


def by_a_mode(layer, kept):
    class Keeping(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.addmm.default:
                kept.append(out)
            return out

    return Keeping()


HOLDERS = [
    by_its_class,
    by_its_forward,
    by_a_hook_of_diffusers,
    by_an_earlier_hook,
    by_a_hook_of_all_modules,
    by_a_mode,
]


@contextlib.contextmanager
def held(hold, layer):
    """What `hold` has kept of the layer's outputs, inside."""
    kept = []
    mode = hold(layer, kept)
    with contextlib.ExitStack() as stack:
        if hasattr(mode, "__enter__"):
            stack.enter_context(mode)
        yield kept


@pytest.mark.parametrize("served", ["alone", "routed", "trained"])
@pytest.mark.parametrize("hold", HOLDERS)
def test_what_is_kept_of_a_layer_is_its_own_output(hold, served):
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 5), torch.randn(2, 4)
    if hold is by_an_earlier_hook:
        kept = []
        hold(layer, kept)
    model = randomize(inject_adapter(nn.Sequential(layer), AdapterConfig("difffit", sum=True)))
    vectors = layer.onelora["default"]
    product = nn.functional.linear(x, layer.weight, layer.bias)
    expected = vectors.gamma * (product + vectors.beta + vectors.b * x.sum(-1, keepdim=True))
    with contextlib.ExitStack() as stack:
        if hold is not by_an_earlier_hook:
            kept = stack.enter_context(held(hold, layer))
        if served == "routed":
            stack.enter_context(route_adapters(model, ["default"]))
        if served != "trained":
            stack.enter_context(torch.no_grad())
        outs = [model(x) for _ in range(2)]
    assert len(kept) == 2
    for own, out in zip(kept, outs, strict=True):
        assert_rounded(own, product, terms=4)
        assert_rounded(out, expected, terms=7)


def test_a_layer_that_gives_the_same_memory_again():
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 5), torch.randn(2, 4)
    model = randomize(inject_adapter(nn.Sequential(layer), AdapterConfig()))
    own = layer.forward
    cache = {}
    layer.forward = lambda x: cache.setdefault("out", own(x) if not cache else None)
    with torch.no_grad():
        first, second = model(x).clone(), model(x).clone()
    assert torch.equal(first, second)


def test_a_plain_layer_s_output_is_changed_in_place():
    """So that training keeps no second tensor of tokens and features."""
    layer, x = nn.Linear(4, 5), torch.randn(2, 3, 4)
    inject_adapter(nn.Sequential(layer), AdapterConfig(bias=True))
    for device in (contextlib.nullcontext(), torch.device("cpu")):
        with device:
            out = layer.forward(x)
            assert layer.onelora(x, out).data_ptr() == out.data_ptr()


@pytest.mark.parametrize("hold", [by_its_forward, by_a_hook_of_all_modules, by_a_mode])
@pytest.mark.parametrize("fuse_qkv", [False, True])
def test_what_is_kept_of_q_in_a_dit(hold, fuse_qkv):
    model, inputs = make_dit(), dit_inputs()
    randomize(inject_adapter(model, AdapterConfig(fuse_qkv=fuse_qkv)))
    attn = model.transformer_blocks[0].attn1
    layer = attn.to_qkv if fuse_qkv else attn.to_q
    with torch.no_grad():
        expected, given = model(**inputs).sample, []
        hook = layer.register_forward_pre_hook(lambda module, args: given.append(args[0]))
        model(**inputs)
        hook.remove()
        with held(hold, layer) as kept:
            assert_rounded(model(**inputs).sample, expected, model)
        product = nn.functional.linear(given[0], layer.weight, layer.bias).flatten(0, -2)
        same = [out for out in kept if out.numel() == product.numel()]
        assert any(torch.allclose(out.flatten(0, -2), product, atol=1e-6) for out in same)


def test_hooks_of_q_k_and_v_in_a_dit_run():
    model, inputs = make_dit(), dit_inputs()
    randomize(inject_adapter(model, AdapterConfig()))
    layer, seen = model.transformer_blocks[0].attn1.to_k, []
    hooks = [
        layer.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
        layer.register_forward_hook(lambda module, args, out: seen.append((args[0], out))),
    ]
    model(**inputs)
    (x, out), vectors = seen[0], layer.onelora["default"]
    assert_rounded(out, layer.forward(x) + vectors.b * x.sum(-1, keepdim=True), layer)
    for hook in hooks:
        hook.remove()


def test_selective_checkpointing_keeps_products():
    """It gives the kept products back in the backward pass, where adapters are added to them again."""
    torch.manual_seed(0)
    block, x = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)), torch.randn(2, 4)
    randomize(inject_adapter(block, AdapterConfig()))
    keep = [torch.ops.aten.addmm.default]

    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op in keep else CheckpointPolicy.PREFER_RECOMPUTE

    def gradients(run):
        block.zero_grad()
        run(x).square().sum().backward()
        return {name: b.grad.clone() for name, b in adapter_state_dict(block).items()}

    plain = gradients(block)
    kept = gradients(
        lambda x: checkpoint(
            block, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
        )
    )
    for name, gradient in plain.items():
        assert_rounded(kept[name], gradient, terms=4 * 4 * 2)


@pytest.mark.parametrize("method", ["1lora", "lora"])
def test_layers_and_tables_that_are_called_by_keyword(method):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding_table, self.linear = nn.Embedding(4, 6), nn.Linear(6, 5)

        def forward(self, labels, keyword):
            if not keyword:
                return self.linear(self.embedding_table(labels))
            return self.linear(input=self.embedding_table(input=labels))

    torch.manual_seed(0)
    model, labels = Model(), torch.tensor([0, 2, 3])
    randomize(inject_adapter(model, AdapterConfig(method, num_classes=3)))
    assert torch.equal(model(labels, keyword=True), model(labels, keyword=False))
