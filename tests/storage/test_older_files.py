"""Files that earlier versions wrote load to the values that were put into them."""

from pathlib import Path

import pytest
import torch
from conftest import make_dit

from onelora_diffusion import AdapterConfig, adapter_state_dict, load_adapter, read_adapter

FOLDER = Path(__file__).parents[1] / "fixtures" / "adapter-0.1"


@pytest.mark.parametrize("name, count, dtype", [("onelora_weights", 10, torch.float32), ("lora", 6, torch.bfloat16)])
def test_an_adapter_of_0_1_loads(name, count, dtype):
    path = FOLDER / f"{name}.safetensors"
    tensors = adapter_state_dict(load_adapter(make_dit(), path))
    assert len(tensors) == count
    for index, (_, tensor) in enumerate(sorted(tensors.items())):  # value i of tensor k was i/64 + k
        expected = (torch.arange(tensor.numel()) / 64 + index).to(dtype).float()
        assert torch.equal(tensor.detach().flatten(), expected)


def test_what_an_adapter_of_0_1_says_of_itself():
    file = read_adapter(FOLDER)
    targets = ("to_q", "proj_out_1")
    assert file.config == AdapterConfig("difffit", sum=True, num_classes=3, targets=targets)
    assert (file.base, file.version) == ("facebook/DiT-XL-2-256", "0.1.0")
    assert file.id2label == {0: "pizza", 1: "sushi", 2: "crème brûlée"}
    assert file.training == {"steps": 110, "dataset": "food101"}
    lora = read_adapter(FOLDER / "lora.safetensors").config
    assert lora == AdapterConfig("lora", rank=2, targets=targets, peft_config={"lora_alpha": 4})
