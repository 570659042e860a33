"""What trains is a choice of its own, which no verb on other adapters changes; and who serves, which none resets."""

import pytest
import torch
from tiny_models import make_dit, randomize
from torch import nn

from onelora_diffusion import (
    AdapterConfig,
    adapter_state_dict,
    combine_adapters,
    count_trainable,
    disable_adapter,
    inject_adapter,
    list_adapters,
    load_adapter,
    merge_adapter,
    save_adapter,
    set_adapters,
    train_adapters,
    unload_adapter,
    unmerge_adapter,
)
from onelora_diffusion.injection.book import adapters_of
from onelora_diffusion.storage.adapter_file import read_adapter
from onelora_diffusion.storage.attaching import swap_values

CONFIG = AdapterConfig(bias=True, scale=True, norms=True)
LORA = AdapterConfig("lora", rank=2)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.second(torch.tanh(self.norm(self.first(x))))


def small():
    torch.manual_seed(0)
    return Small()


def trained_names(model):
    return {row.name for row in list_adapters(model) if row.trains}


def has_gradients_of(model, name):
    """Whether exactly the tensors of this adapter are given gradients."""
    model.zero_grad()
    model(torch.ones(2, 4)).square().sum().backward()
    own = {id(tensor) for tensor in adapter_state_dict(model, name).values()}
    given = {id(p) for p in model.parameters() if p.grad is not None}
    return given == own == {id(p) for p in model.parameters() if p.requires_grad}


def load_and_unload(model, file):
    load_adapter(model, file, "other")
    unload_adapter(model, "other")
    set_adapters(model, "mine")


def load_and_serve_both(model, file):
    load_adapter(model, file, "other")
    set_adapters(model, ["other", "mine"], [0.5, 1.0])


def combine(model, file):
    load_adapter(model, file, "other")
    combine_adapters(model, ["mine", "other"], [0.5, 0.5], "mean")
    set_adapters(model, ["mine", "mean", "other"])


def hot_swap(model, file):
    load_adapter(model, file, "other")
    swap_values(adapters_of(model), read_adapter(file), "other", "the file")
    set_adapters(model, "mine")


def merge(model, file):
    merge_adapter(model)
    unmerge_adapter(model)


def pause(model, file):
    with disable_adapter(model):
        model(torch.ones(2, 4))


@pytest.mark.parametrize("config", [AdapterConfig(bias=True), LORA], ids=["1lora", "lora"])
@pytest.mark.parametrize("verb", [load_and_unload, load_and_serve_both, combine, hot_swap, merge, pause])
def test_a_look_at_other_adapters_leaves_the_training_of_one_as_it_is(verb, config, tmp_path):
    if verb is combine and config is LORA:
        pytest.skip("LoRAs have no sum that is a LoRA of their rank")
    model = randomize(inject_adapter(small(), config, "mine"))
    file = save_adapter(model, tmp_path)
    size = count_trainable(model)
    verb(model, file)
    assert trained_names(model) == {"mine"} and count_trainable(model) == size
    assert has_gradients_of(model, "mine")


def test_the_adapter_loaded_last_trains_until_one_is_chosen(tmp_path):
    model = randomize(inject_adapter(small(), CONFIG))
    file = save_adapter(model, tmp_path)
    model, size = small(), count_trainable(model)
    for name in ("a", "b", "c"):
        load_adapter(model, file, name)
        assert trained_names(model) == {name} and has_gradients_of(model, name) and count_trainable(model) == size
    unload_adapter(model, "c")
    set_adapters(model, "b")
    assert trained_names(model) == {"b"} and has_gradients_of(model, "b")

    train_adapters(model, "a")
    assert list_adapters(model)[0].weight is None and trained_names(model) == {"a"}  # it trains, and does not serve
    set_adapters(model, "a")
    assert has_gradients_of(model, "a")
    load_adapter(model, file, "c")
    train_adapters(model, ["a", "c", "a"])
    assert trained_names(model) == {"a", "c"} and count_trainable(model) == 2 * size
    unload_adapter(model, "a")
    assert trained_names(model) == {"c"}
    train_adapters(model, [])
    assert trained_names(model) == set() and count_trainable(model) == 0
    with pytest.raises(ValueError, match="'d' is not in the list of present adapters: b, c"):
        train_adapters(model, ["c", "d"])
    inject_adapter(model, CONFIG, "d")
    assert trained_names(model) == {"d"} and has_gradients_of(model, "d")


def test_loading_beside_leaves_what_else_trains(tmp_path):
    """Such as a layer of the base that its owner trains along."""
    model = randomize(inject_adapter(small(), AdapterConfig(), "mine"))
    file = save_adapter(model, tmp_path)
    model.norm.requires_grad_(True)
    load_adapter(model, file, "other")
    assert model.norm.weight.requires_grad and not model.first.weight.requires_grad


def test_hot_swapping_one_of_two_leaves_who_serves_with_which_weight(tmp_path):
    inputs = torch.randn(2, 4)
    model = randomize(inject_adapter(small(), CONFIG, "a"), seed=1)
    randomize(inject_adapter(model, CONFIG, "b"), seed=2)
    files = {name: read_adapter(save_adapter(model, tmp_path / name, name)) for name in ("a", "b")}
    with torch.no_grad():
        set_adapters(model, ["a", "b"], [0.7, 0.4])
        both = model(inputs)
        swap_values(adapters_of(model), files["a"], "a", "a")  # the values that it has
        assert torch.equal(model(inputs), both) and adapters_of(model).serving == {"a": 0.7, "b": 0.4}
        swap_values(adapters_of(model), files["b"], "a", "b")
        swapped = model(inputs)
        load_adapter(small_again := small(), tmp_path / "b", "b")
        torch.testing.assert_close(swapped, set_adapters(small_again, "b", 1.1)(inputs))
        adapters_of(model).pause()
        swap_values(adapters_of(model), files["a"], "a", "a")
        assert torch.equal(model(inputs), small()(inputs))
        adapters_of(model).resume()
        assert torch.equal(model(inputs), both)


def test_a_name_given_twice_counts_once_or_is_refused():
    model = make_dit()
    for seed, name in enumerate(("a", "b")):
        randomize(inject_adapter(model, AdapterConfig(), name), seed=seed)
    set_adapters(model, ["a", "b", "a"], 0.5)
    assert adapters_of(model).serving == {"a": 0.5, "b": 0.5}
    for verb in (
        lambda: set_adapters(model, ["a", "a"], [0.25, 0.75]),
        lambda: combine_adapters(model, ["a", "b", "a"], [0.5, 0.25, 0.25], "sum"),
    ):
        with pytest.raises(ValueError, match="adapter 'a' is named 2 times: give it once, with one weight"):
            verb()
    assert adapters_of(model).serving == {"a": 0.5, "b": 0.5} and set(adapters_of(model).adapters) == {"a", "b"}
