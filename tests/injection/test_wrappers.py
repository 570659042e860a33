"""Adapters of a model that is inside a wrapper: the model's names are theirs, never the wrapper's."""

import copy
import io
import pickle

import pytest
import torch
from rounding import assert_rounded
from safetensors.torch import load_file
from tiny_models import dit_inputs, make_dit, randomize, unet
from torch import nn

from onelora_diffusion import (
    AdapterConfig,
    adapter_state_dict,
    combine_adapters,
    export_lora,
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

WRAPPERS = [lambda model: torch.compile(model, backend="eager"), nn.DataParallel]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_the_verbs_reach_the_model_inside(wrap, tmp_path):
    plain = randomize(inject_adapter(make_dit(), AdapterConfig(num_classes=3)))
    save_adapter(plain, tmp_path / "plain")
    wrapped = wrap(make_dit())
    assert inject_adapter(wrapped, AdapterConfig(num_classes=3)) is wrapped
    randomize(wrapped)
    save_adapter(wrapped, tmp_path / "wrapped")
    expected, found = read_adapter(tmp_path / "plain"), read_adapter(tmp_path / "wrapped")
    assert set(adapter_state_dict(wrapped)) == set(expected.tensors) == set(found.tensors)
    assert found.fingerprint == expected.fingerprint
    assert all(torch.equal(tensor, expected.tensors[key]) for key, tensor in found.tensors.items())

    with torch.no_grad():
        adapted, base = plain(**dit_inputs()).sample, make_dit()(**dit_inputs()).sample
        assert_rounded(wrapped(**dit_inputs()).sample, adapted, plain)
        load_adapter(wrapped, tmp_path / "plain", "second")
        set_adapters(wrapped, ["default", "second"], [0.75, 0.25])
        assert_rounded(wrapped(**dit_inputs()).sample, adapted, plain)
        with route_adapters(wrapped, ["second", None, "default"]):
            assert_rounded(wrapped(**dit_inputs()).sample[1], base[1], plain)
        combine_adapters(wrapped, ["default", "second"], [0.5, 0.5], "mean")
        assert_rounded(wrapped(**dit_inputs()).sample, adapted, plain)
        merge_adapter(wrapped)
        assert_rounded(wrapped(**dit_inputs()).sample, adapted, plain)
        unmerge_adapter(wrapped)
        unload_adapter(wrapped)
        assert_rounded(wrapped(**dit_inputs()).sample, base, plain)
    with pytest.raises(ValueError, match="has no adapter"):
        set_adapters(wrapped, "default")


def test_a_wrapped_unet_is_exported_as_a_unet(tmp_path):
    model, _ = unet()
    export_lora(inject_adapter(nn.DataParallel(model), AdapterConfig()), tmp_path)
    keys = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert all(key.startswith("unet.") and "module." not in key for key in keys)


def test_gradients_of_an_adapter_added_after_ddp_would_not_be_averaged(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(inject_adapter(make_dit(), AdapterConfig()))
        with pytest.raises(ValueError, match="add adapters before DistributedDataParallel wraps the model"):
            inject_adapter(model, AdapterConfig(), "late")
        assert set(adapter_state_dict(model)) == set(adapter_state_dict(model.module))
    finally:
        torch.distributed.destroy_process_group()


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [through_pickle, through_torch_save, copy.deepcopy])
def test_a_copy_of_an_adapted_model_is_one_of_its_own(copied, tmp_path):
    model = randomize(inject_adapter(make_dit(), AdapterConfig(num_classes=3)))
    other = copied(model)
    with torch.no_grad():
        expected = model(**dit_inputs()).sample
        assert torch.equal(other(**dit_inputs()).sample, expected)
        other.save_pretrained(tmp_path)  # its own base
        for tensor in adapter_state_dict(other).values():
            tensor.zero_()
        assert torch.equal(model(**dit_inputs()).sample, expected)
        unload_adapter(other)
        assert torch.equal(other(**dit_inputs()).sample, make_dit()(**dit_inputs()).sample)
        assert torch.equal(model(**dit_inputs()).sample, expected)


def test_a_plain_module_is_given_no_save_pretrained():
    model = inject_adapter(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), AdapterConfig())
    assert not hasattr(model, "save_pretrained")
    assert torch.equal(through_pickle(model)(torch.ones(1, 4)), model(torch.ones(1, 4)))
    unload_adapter(model)


def test_a_replica_serves_with_the_adapters_of_its_own_device():
    """What DataParallel does for each device, by hand, with other values in the place of another device's."""
    base = nn.ModuleDict({"embedding_table": nn.Embedding(4, 8), "linear": nn.Linear(8, 2)})
    model = inject_adapter(base, AdapterConfig(num_classes=2))
    seats = [model["linear"].onelora, model["embedding_table"].onelora]
    replicas = [seat._replicate_for_data_parallel() for seat in seats]
    for seat, replica in zip(seats, replicas, strict=True):
        replica._modules["default"] = randomize(copy.deepcopy(seat["default"]))
    with torch.no_grad():
        x, out = torch.ones(1, 8), torch.zeros(1, 2)
        torch.testing.assert_close(replicas[0](x, out.clone())[0], 8 * replicas[0]["default"].b)
        assert torch.equal(seats[0](x, out.clone()), out)
        for seat in (seats[1], replicas[1]):
            seat.begin(torch.tensor([1]))
            assert torch.equal(seat(torch.zeros(1, 8))[0], seat["default"].weight[1])
