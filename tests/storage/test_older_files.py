"""Files that earlier versions wrote load to the values that were put into them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import make_dit

from onelora_diffusion import (
    AdapterConfig,
    adapter_state_dict,
    inject_adapter,
    load_adapter,
    read_adapter,
    save_adapter,
)

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


def test_a_rank_that_0_1_ignored_is_that_of_the_values(tmp_path, dit):
    config = AdapterConfig(targets=("to_q",))
    path = save_adapter(inject_adapter(dit, config), tmp_path)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["onelora"])
    header["config"]["rank"] = 4
    del header["format"]  # as the first files were, without a checksum
    save_file(load_file(path), path, {"onelora": json.dumps(header)})
    assert read_adapter(path).config == config
    assert load_adapter(make_dit(), path)._onelora.configs["default"] == config
