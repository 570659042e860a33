"""Files changed at random: nothing comes of them but an adapter, or a ValueError that names the file.

`make fuzz` tries more of them. Memory is that of the address space, of which a process may take 1 GB more than it has.
"""

import json
import resource
import time
from pathlib import Path

import pytest
import torch
from fuzzing import VALUES, changed_bytes, fuzz, places_of, put
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from tiny_models import make_dit, randomize

from onelora_diffusion import AdapterConfig, export_lora, inject_adapter, save_adapter
from onelora_diffusion.storage.attaching import attach_adapter_file
from onelora_diffusion.storage.reading import read_file

SECONDS = 30  # of the processor, for a single file
MORE_BYTES = 2**30


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """The bytes of whole files, by kind."""
    folder = tmp_path_factory.mktemp("originals")
    configs = {
        "1lora": AdapterConfig(num_classes=3, targets=("to_q", "proj_out_2")),
        "lora": AdapterConfig("lora", rank=2, targets=("to_q",), peft_config={"lora_alpha": 4}),
        "full": AdapterConfig("full", targets=("to_q",)),
    }
    files = {}
    for name, config in configs.items():
        model = randomize(inject_adapter(make_dit(), config))
        files[name] = save_adapter(
            model, folder / f"{name}.safetensors", id2label={0: "pizza"}, base="a/b"
        ).read_bytes()
    model = randomize(inject_adapter(make_dit(), AdapterConfig(targets=("to_q",))))
    files["export"] = export_lora(model, folder / "export.safetensors").read_bytes()
    return files


@pytest.fixture(scope="module")
def limited():
    """A model, in a process that may take little more memory than it has."""
    model = make_dit()
    inject_adapter(make_dit(), AdapterConfig("lora", targets=("to_q",)))  # all of PEFT is there
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MORE_BYTES, before[1]))
    yield model
    resource.setrlimit(resource.RLIMIT_AS, before)


def try_to_load(model, path):
    modules, start = list(model.modules()), time.process_time()
    try:
        file = read_file(model, path, lambda tensors, source: tensors)
        attach_adapter_file(make_dit(), file, "default", str(path))
    except ValueError as error:
        assert str(error).startswith(str(path)), error
        assert str(error).isprintable() and len(str(error)) < len(str(path)) + 2000
    assert list(model.modules()) == modules
    assert time.process_time() - start < SECONDS


@fuzz
@given(data=st.data())
def test_bytes_that_changed(originals, limited, tmp_path, data):
    """Flipped, cut, doubled and moved bytes, anywhere."""
    content = changed_bytes(data, data.draw(st.sampled_from(list(originals.values()))))
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    try_to_load(limited, path)


KEYS = ["peft_config", "targets", "format", "rank", "num_classes", "r", "alpha_pattern", "exclude_modules", "colour"]


@fuzz
@given(data=st.data())
def test_settings_that_changed(originals, limited, tmp_path, data):
    """Any value at any place of the settings, without a checksum that would tell."""
    content = data.draw(st.sampled_from(list(originals.values())))
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    key = next(key for key in header["__metadata__"] if key in ("onelora", "lora_adapter_metadata"))
    told = json.loads(header["__metadata__"][key])
    told.pop("format", None)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(list(places_of(told))[:200]))
        owner = told
        for step in place:
            owner = owner[step]
        if isinstance(owner, dict) and data.draw(st.booleans()):
            told = put(told, place, owner | {data.draw(st.sampled_from(KEYS)): data.draw(VALUES)})
        else:
            told = put(told, place, data.draw(VALUES))
    path = tmp_path / "x.safetensors"
    header["__metadata__"] = {key: json.dumps(told)}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    try_to_load(limited, path)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int8, torch.bool]
LAYERS = ["transformer_blocks.0.attn1.to_q", "transformer.proj_out_2", "base_model.model.proj_out_1", "nowhere", ""]
PARTS = [
    "lora_A.weight",
    "lora_B.weight",
    "lora_B.bias",
    "lora.up.weight",
    "alpha",
    "lora_magnitude_vector",
    "miss_block",
    "onelora_b",
    "onelora_M",
    "",
]


@fuzz
@given(data=st.data())
def test_tensors_of_any_kind(limited, tmp_path, data):
    """Any shapes, types and values under names that mean something."""
    names = st.builds("{}.{}".format, st.sampled_from(LAYERS), st.sampled_from(PARTS))
    sizes = st.lists(st.sampled_from([0, 1, 2, 3, 32, 64]), max_size=3)
    tensors = {
        name: torch.full(shape, value).to(dtype)
        for name, shape, value, dtype in data.draw(
            st.lists(
                st.tuples(names, sizes, st.sampled_from([0.0, 1.0, 3e38, float("nan"), 7e4]), st.sampled_from(DTYPES)),
                max_size=8,
            )
        )
    }
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(tensors))
    try_to_load(limited, path)
    settings = {"transformer." + data.draw(st.sampled_from(KEYS)): data.draw(VALUES)}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(settings)})
    try_to_load(limited, path)
