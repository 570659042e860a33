"""Compiled models: adapters come, change and go, and the compiled code follows, compiled again only where it must be.

The backend `eager` runs what the compiler captured; `fullgraph` makes an error of anything that it cannot.
"""

import copy

import pytest
import torch
from research_models import inputs_of, make_model
from rounding import assert_rounded
from tiny_models import dit_inputs, make_dit, randomize
from torch._dynamo.testing import CompileCounterWithBackend

from onelora_diffusion import (
    AdapterConfig,
    OneLoRADiTPipeline,
    disable_adapter,
    inject_adapter,
    load_adapter,
    merge_adapter,
    read_adapter,
    route_adapters,
    save_adapter,
    set_adapters,
    unload_adapter,
    unmerge_adapter,
)
from onelora_diffusion.pipelines.base import load_base
from onelora_diffusion.storage.attaching import swap_values

FOOD, BIRDS = AdapterConfig(num_classes=3), AdapterConfig(num_classes=5)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=32):
        yield
    torch._dynamo.reset()


class Twins:
    """A DiT whose blocks are compiled one by one, and the same as it is."""

    def __init__(self):
        self.counter = CompileCounterWithBackend("eager")
        self.compiled, self.plain = make_dit(), make_dit()
        self.both(lambda model: randomize(inject_adapter(model, FOOD, "food"), seed=1))
        self.compiled.compile_repeated_blocks(backend=self.counter, fullgraph=True)

    def both(self, change) -> None:
        for model in (self.compiled, self.plain):
            change(model)

    def graphs(self) -> int:
        """How many graphs the next forward makes; its output is that of the model that is not compiled."""
        before = self.counter.frame_count
        with torch.no_grad():
            assert_rounded(self.compiled(**dit_inputs()).sample, self.plain(**dit_inputs()).sample, self.plain)
        return self.counter.frame_count - before


def test_adapters_are_added_switched_weighed_and_swapped_without_compiling_again(tmp_path):
    other = randomize(inject_adapter(make_dit(), BIRDS), seed=3)
    file = read_adapter(save_adapter(other, tmp_path))
    twins = Twins()
    layouts = twins.graphs()
    assert layouts in (1, 2)  # one for all blocks, or where the first block's input lies otherwise, another for that
    assert twins.graphs() == 0
    twins.both(lambda model: randomize(inject_adapter(model, BIRDS, "birds"), seed=2))
    assert twins.graphs() == 0

    twins.both(lambda model: swap_values(model._onelora, file, "birds", "the file"))
    assert twins.graphs() == 0
    with torch.no_grad():
        assert_rounded(twins.compiled(**dit_inputs()).sample, other(**dit_inputs()).sample, other)

    # What is loaded beside one that trains is frozen, as those before it are, whose graph is another: once, for all.
    twins.both(lambda model: load_adapter(model, tmp_path, "third"))
    assert twins.graphs() == layouts
    for name in ("food", "birds", "third", "food"):
        twins.both(lambda model, name=name: set_adapters(model, name))
        assert twins.graphs() == 0

    # So is that of one weight, or several, whatever the weights are.
    for names, weights in (("food", (0.5, 0.25, -1.0)), (["food", "birds"], ([0.5, 0.5], [1.0, -0.3]))):
        for first, weight in zip((True, False, False), weights, strict=False):
            twins.both(lambda model, names=names, weight=weight: set_adapters(model, names, weight))
            assert twins.graphs() == layouts * first


def test_a_route_of_compiled_blocks_is_that_of_plain_ones():
    twins = Twins()
    twins.both(lambda model: randomize(inject_adapter(model, BIRDS, "birds"), seed=2))
    layouts = twins.graphs()
    for first, names in (
        (True, ["food", "birds", None]),
        (False, [None, "food", "birds"]),
        (False, ["birds", None, {"food": 0.5}]),
    ):
        with route_adapters(twins.compiled, names), route_adapters(twins.plain, names):
            assert twins.graphs() == layouts * first
    assert twins.graphs() == 0


def test_a_merge_leaves_and_comes_back():
    twins = Twins()
    twins.graphs()
    for first in (True, False):
        twins.both(merge_adapter)
        # One for all blocks; in torch 2.7 one for each, whose stock processors are objects of their own.
        assert twins.graphs() in ((1, 2) if first else (0,))
        twins.both(unmerge_adapter)
        assert twins.graphs() == 0
    twins.both(unload_adapter)
    assert twins.graphs() in (1, 2)


@pytest.mark.parametrize(
    "make", [OneLoRADiTPipeline.from_pretrained, lambda: OneLoRADiTPipeline.from_pipe(load_base())]
)
def test_diffusers_finds_the_blocks_of_a_pipelines_dit_without_an_adapter_too(make):
    model = make().transformer
    model.compile_repeated_blocks(backend="eager")
    assert all(block._compiled_call_impl is not None for block in model.transformer_blocks)
    assert sum(module._compiled_call_impl is not None for module in model.modules()) == len(model.transformer_blocks)


WHOLE, PARTS = "the whole model", "its parts"


@pytest.mark.parametrize("compiled", [WHOLE, PARTS])
def test_adapters_of_a_frozen_model_that_was_compiled_and_run_before(compiled):
    """Whatever the adapters are told afterwards; the compiler by itself would not see them come, go or come back."""
    inner = make_model("LightningDiT", depth=1).requires_grad_(False)
    plain, inputs = copy.deepcopy(inner), inputs_of("LightningDiT")
    if compiled == WHOLE:
        model = torch.compile(inner, backend="eager")
    else:
        model = inner
        for part in (*inner.blocks, inner.t_embedder, inner.y_embedder, inner.final_layer):
            part.compile(backend="eager")

    @torch.no_grad()
    def check():
        assert_rounded(model(*inputs), plain(*inputs), plain)

    def both(change):
        change(inner)
        change(plain)
        check()

    check()
    both(lambda model: randomize(inject_adapter(model, AdapterConfig(num_classes=25)), seed=1))
    with disable_adapter(inner), disable_adapter(plain):
        check()
    both(merge_adapter)
    both(unmerge_adapter)
    both(unload_adapter)
    both(lambda model: randomize(inject_adapter(model, AdapterConfig("difffit", num_classes=3)), seed=2))
