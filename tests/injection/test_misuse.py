"""What is given to the verbs by mistake is named in one line, and nothing is changed or written."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import make_dit, randomize

from onelora_diffusion import (
    AdapterConfig,
    adapter_state_dict,
    count_trainable,
    export_lora,
    inject_adapter,
    load_adapter,
    read_adapter,
    save_adapter,
    set_adapters,
    unload_adapter,
)

PLAIN = AdapterConfig()


def refusal(kind, call, *arguments, **keywords):
    with pytest.raises(kind) as caught:
        call(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("config", [{"method": "1lora"}, "1lora", None])
def test_a_config_of_another_kind(dit, config):
    before = list(dit.state_dict())
    assert "the config is an AdapterConfig, as in AdapterConfig(method='1lora'), not" in refusal(
        TypeError, inject_adapter, dit, config
    )
    assert list(dit.state_dict()) == before and not hasattr(dit, "_onelora")


@pytest.mark.parametrize("call", [count_trainable, adapter_state_dict, lambda pipe: inject_adapter(pipe, PLAIN)])
def test_a_pipeline_in_the_models_place(dit, call):
    pipe = SimpleNamespace(transformer=dit)
    assert refusal(TypeError, call, pipe).endswith(
        "is a SimpleNamespace, which is no torch.nn.Module: give its transformer, as in pipe.transformer"
    )


def test_a_name_in_use_says_how_to_free_it(dit, tmp_path):
    save_adapter(inject_adapter(dit, PLAIN), tmp_path)
    for again in (lambda: inject_adapter(dit, PLAIN), lambda: load_adapter(dit, tmp_path)):
        assert "'default' is already in use: unload_adapter" in refusal(ValueError, again)


@pytest.mark.parametrize("name", ["path", "layer", "active", "labels", "train", "onelora"])
def test_a_name_that_a_module_has_an_attribute_of(dit, inputs, name, tmp_path):
    config = AdapterConfig("difffit", num_classes=3)
    model = randomize(inject_adapter(dit, config, name))
    expected = model(**inputs).sample
    loaded = load_adapter(make_dit(), save_adapter(model, tmp_path), name)
    assert torch.equal(loaded(**inputs).sample, expected)
    unload_adapter(loaded)
    assert torch.equal(loaded(**inputs).sample, make_dit()(**inputs).sample)


def test_the_one_active_adapter_is_meant_where_none_is_named(dit, tmp_path):
    randomize(inject_adapter(dit, PLAIN, "food"), seed=1)
    randomize(inject_adapter(dit, PLAIN, "birds"), seed=2)
    birds = adapter_state_dict(dit, "birds")
    assert all(tensor is birds[name] for name, tensor in adapter_state_dict(dit).items())
    save_adapter(dit, tmp_path)
    assert all(torch.equal(tensor, birds[name]) for name, tensor in read_adapter(tmp_path).tensors.items())
    export_lora(dit, tmp_path / "birds.safetensors")
    fresh = load_adapter(make_dit(), tmp_path)
    assert set(adapter_state_dict(fresh)) == set(birds)

    set_adapters(dit, ["food", "birds"])
    verbs = (adapter_state_dict, lambda m: save_adapter(m, tmp_path / "a"), lambda m: export_lora(m, tmp_path / "b"))
    for verb in verbs:
        assert "adapters food, birds are there to choose from: give the adapter_name" in refusal(ValueError, verb, dit)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["birds.safetensors", "onelora_weights.safetensors"]


def test_names_of_classes(dit, tmp_path):
    inject_adapter(dit, AdapterConfig(num_classes=3))
    for names, kind, message in (
        (
            ["pizza", "sushi"],
            TypeError,
            "id2label must be a dict of names by label, as in {0: 'pizza'}, and this is a list",
        ),
        ({3: "ramen"}, ValueError, "id2label names 3 'ramen', and this adapter's labels are 0 to 2"),
        ({"pizza": 0}, ValueError, "id2label names 'pizza' '0', and this adapter's labels are 0 to 2"),
    ):
        assert message in refusal(kind, save_adapter, dit, tmp_path / "new", id2label=names)
    assert not (tmp_path / "new").exists()
