"""One model, many callers: a route, a scale or a pause belongs to the call that asked for it."""

import asyncio
import contextlib
import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from rounding import assert_rounded
from tiny_models import dit_inputs, make_dit, randomize

from onelora_diffusion import AdapterConfig, disable_adapter, inject_adapter, route_adapters, set_adapters
from onelora_diffusion.injection.model_lock import RETRY_SECONDS


def make_model():
    model = make_dit()
    for seed, name in enumerate(("a", "b")):
        randomize(inject_adapter(model, AdapterConfig(), name), seed=seed)
    return model.requires_grad_(False)


def test_every_thread_gets_what_it_asked_for():
    model, inputs = make_model(), dit_inputs(1)
    start = threading.Barrier(4)

    def routed(name):
        with route_adapters(model, [name]):
            return model(**inputs).sample

    def plain():
        return model(**inputs).sample

    def paused():
        with disable_adapter(model):
            return model(**inputs).sample

    calls = [lambda: routed("a"), lambda: routed("b"), plain, paused]
    expected = [call() for call in calls]

    def many(number):
        start.wait()
        return sum(torch.equal(calls[number](), expected[number]) for _ in range(25))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(many, range(4))) == [25] * 4
    assert model._onelora.serving == {"b": 1.0}


def test_a_forward_that_fails_lets_the_next_thread_in():
    model, inputs = make_model(), dit_inputs(1)
    with pytest.raises(RuntimeError):
        model(**inputs | {"hidden_states": torch.zeros(1, 3, 8, 8)})
    with pytest.raises(ValueError, match="no multiple"), route_adapters(model, ["a", "b"]):
        model(**inputs)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: model(**inputs)).result(timeout=60)


def in_another_thread(call):
    """What it returns, if it does; a thread that waits for ever is left behind."""
    done = []
    thread = threading.Thread(target=lambda: done.append(call()), daemon=True)
    thread.start()
    thread.join(60)
    assert done
    return done[0]


@pytest.mark.parametrize("how", ["plain", "routed", "scaled", "scaled while held"])
def test_a_forward_that_ctrl_c_breaks_off_lets_others_in(how):
    """PyTorch runs no hook when anything but an Exception goes through a module."""
    model, inputs = make_model(), dit_inputs(1)
    expected = model(**inputs).sample

    def interrupt(*args):
        raise KeyboardInterrupt

    hook = model.transformer_blocks[1].ff.net[2].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        if how == "routed":
            with route_adapters(model, ["a"]):
                model(**inputs)
        else:
            kwargs = {"cross_attention_kwargs": {"scale": 0.5}} if "scaled" in how else {}
            with model._onelora.lock if "held" in how else contextlib.nullcontext():
                model(**inputs, **kwargs)
    hook.remove()
    assert torch.equal(in_another_thread(lambda: model(**inputs).sample), expected)
    assert torch.equal(model(**inputs).sample, expected)


def test_a_forward_that_ctrl_c_breaks_off_lets_other_tasks_and_verbs_in():
    model, inputs = make_model(), dit_inputs(1)

    def interrupt(*args):
        raise KeyboardInterrupt

    hook = model.transformer_blocks[1].ff.net[2].register_forward_hook(interrupt)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            model(**inputs)
    hook.remove()

    async def another_task():
        return model(**inputs).sample

    expected = asyncio.run(another_task())
    in_another_thread(lambda: set_adapters(model, "a"))
    assert not torch.equal(model(**inputs).sample, expected)


def test_a_call_that_runs_is_waited_for():
    """However long it takes: nobody takes it for one that was broken off."""
    model, inputs = make_model(), dit_inputs(1)
    inside, go_on = threading.Event(), threading.Event()
    order = []

    def wait(*args):
        inside.set()
        go_on.wait(60)
        order.append("first")

    hook = model.transformer_blocks[0].ff.net[2].register_forward_hook(wait)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(lambda: model(**inputs))
        inside.wait(60)
        hook.remove()
        second = pool.submit(lambda: (set_adapters(model, "a"), order.append("second")))
        threading.Event().wait(3 * RETRY_SECONDS)
        go_on.set()
        first.result(60), second.result(60)
    assert order == ["first", "second"]


def test_a_second_task_of_one_thread_is_refused():
    model = make_model()

    async def route(name):
        with route_adapters(model, [name]):
            await asyncio.sleep(0.01)

    async def both():
        return await asyncio.gather(route("a"), route("b"), return_exceptions=True)

    first, second = asyncio.run(both())
    assert first is None
    assert isinstance(second, RuntimeError) and "another task of this thread" in str(second)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_serves_on_its_own(copied):
    model, inputs = make_model(), dit_inputs(1)
    other = copied(model)
    assert torch.equal(other(**inputs).sample, model(**inputs).sample)
    set_adapters(other, "a")
    assert model._onelora.serving == {"b": 1.0} and other._onelora.serving == {"a": 1.0}
    with route_adapters(model, ["a"]):
        assert_rounded(other(**inputs).sample, model(**inputs).sample, model)
