"""Files that a stranger may have made: each thing that is wrong with one is named, before it can do anything."""

import json
import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from tiny_models import make_dit, randomize

from onelora_diffusion import (
    AdapterConfig,
    OneLoRADiTPipeline,
    adapter_state_dict,
    inject_adapter,
    load_adapter,
    read_adapter,
    save_adapter,
)
from onelora_diffusion.storage.reading import read_dict, read_file

TABLE = "transformer.class_embedding.weight"
B = "transformer.proj_out_2.onelora_b"


def untranslated(tensors, source):
    return tensors


@pytest.fixture
def saved(tmp_path):
    model = randomize(inject_adapter(make_dit(), AdapterConfig(num_classes=3)))
    return save_adapter(model, tmp_path, id2label={0: "pizza"}, base="someone/base", training={"steps": 3})


@pytest.fixture
def lora(tmp_path):
    model = randomize(inject_adapter(make_dit(), AdapterConfig("lora", rank=2, targets=("to_q",))))
    return save_adapter(model, tmp_path / "lora.safetensors")


def rewrite(path, header=None, config=None, tensors=None):
    """An older file, without a checksum, of the same settings and tensors but for these."""
    with safe_open(path, "pt") as file:
        written = json.loads(file.metadata()["onelora"])
    del written["format"]
    written |= header or {}
    written["config"] = (
        written["config"] | (config or {}) if isinstance(written["config"], dict) else written["config"]
    )
    save_file(load_file(path) | (tensors or {}), path, {"onelora": json.dumps(written)})


def refused(path, match):
    model = make_dit()
    modules = list(model.modules())
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*{match}"):
        load_adapter(model, path)
    assert list(model.modules()) == modules


@pytest.mark.parametrize(
    "header, message",
    [
        ({"config": []}, "its config is \\[\\], and must be"),
        ({"config": None}, "its config is None"),
        ({"id2label": ["pizza"]}, "its id2label is \\['pizza'\\]"),
        ({"id2label": {"0": 7}}, "class 0 is named 7"),
        ({"id2label": {"4": "pizza"}}, "the label '4', of 3 classes"),
        ({"id2label": {"-1": "pizza"}}, "the label '-1'"),
        ({"id2label": {"0": "p" * 300_000}}, "class 0 is named 'pppp.*up to 1,000 characters"),
        ({"base": 3}, "its base is 3"),
        ({"base": "x" * 2000}, "its base has 2,000 characters"),
        ({"fingerprint": {}}, "its fingerprint is {}"),
        ({"training": "x"}, "its training is 'x'"),
        ({"version": None}, "its version is None"),
        ({"format": "2"}, "is of format '2'"),
        ({"format": 0}, "is of format 0"),
        ({"format": 10**30}, "is of format 1000"),
    ],
)
def test_headers_of_other_types(saved, header, message):
    rewrite(saved, header)
    refused(saved, message)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"rank": "4"}, "rank must be int, not '4', which is str"),
        ({"rank": 1.0}, "rank must be int, not '1.0', which is float"),
        ({"rank": 10**40}, "rank must be at least 1"),
        ({"seed": 2**70}, "seed must be a number of 64 bits"),
        ({"method": ["1lora"]}, "method must be str"),
        ({"sum": 1}, "sum must be bool or None"),
        ({"targets": {"to_q": 1}}, "targets must be tuple or None"),
        ({"targets": [None]}, "targets are names"),
        ({"targets": ["to_q"] * 100_000}, "it names 100,000 targets, and holds 17 tensors"),
        ({"targets": ["nowhere"]}, "'nowhere' matches no linear layer"),
        ({"num_classes": 8_000_000}, "its num_classes is 8000000, and its class table has 4 rows"),
        ({"num_classes": 10**12}, "num_classes must be at least 1"),
        ({"num_classes": None}, "its num_classes is None, and its class table has 4 rows"),
    ],
)
def test_settings_of_other_types_and_sizes(saved, config, message):
    rewrite(saved, config=config)
    refused(saved, message)


@pytest.mark.parametrize(
    "config, message",
    [
        (
            {"rank": 2_000_000_000},
            "lora_A.weight has shape \\(2, 32\\), but this base needs shape \\(2000000000, 32\\)",
        ),
        ({"peft_config": {"r": 60_000}}, "but this base needs shape \\(60000, 32\\)"),
        ({"peft_config": {"r": 10**9}}, "peft_config has r='1000000000'; it takes numbers below 1048576"),
        ({"peft_config": {"r": "many"}}, "its settings build no adapter"),
        (
            {"peft_config": {"init_lora_weights": "pissa_niter_100000000"}},
            "init_lora_weights='pissa.*beyond the adapter",
        ),
        (
            {"peft_config": {"megatron_core": "os", "megatron_config": {"a": 1}}},
            "megatron_core='os', which would reach beyond",
        ),
        ({"peft_config": {"rank_pattern": {"(x+x+)+y": 2}}}, "rank_pattern='\\(x\\+x\\+\\)\\+y'"),
        ({"peft_config": {"exclude_modules": "(.*)*b"}}, "exclude_modules="),
        ({"peft_config": {"alpha_pattern": {"to_q": [[1]]}}}, "alpha_pattern='\\[\\[1\\]\\]'"),
        ({"peft_config": {"colour": 1}}, "colour"),
        ({"method": "peft:psoft", "rank": 1, "peft_config": {"psoft_svd_lowrank_niter": 10**4}}, "below 1000"),
    ],
)
def test_settings_of_peft_stay_small(lora, config, message):
    rewrite(lora, config=config)
    refused(lora, message)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"config": NaN}', '{"a": 1e999}', "{", "7", '{"a": 1, "a": 2}', "9" * 5000]
)
def test_headers_that_are_no_settings(saved, text):
    save_file(load_file(saved), saved, {"onelora": text})
    refused(saved, "")


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float64, torch.uint8, torch.float8_e4m3fn])
def test_other_types_of_tensors(saved, dtype):
    rewrite(saved, tensors={B: torch.zeros(32, dtype=dtype)})
    refused(saved, f"{B} is .*weights are float32, bfloat16 or float16")


@pytest.mark.parametrize(
    "old, new",
    [
        ('"__metadata__":{', '"__metadata__":{"onelora":"{}",'),
        ('"dtype":"F32"', '"dtype":"F32","dtype":"F32"'),
        (f'"{TABLE}":', f'"{TABLE}":{{"dtype":"F32","shape":[4,32],"data_offsets":[0,512]}},"{TABLE}":'),
        (f'"{B}"', '"' + "b" * 600 + '"'),
        (f'"{B}"', f'"{B}\\u001b[2J"'),
        (f'"{B}"', f'"{B}é"'),
        ('"shape":[4,32]', '"shape":[4,32,0]'),
        ('"shape":[4,32]', '"shape":"4,32"'),
        ('"shape":[4,32]', '"shape":[4.0,32]'),
        ('"shape":[4,32]', '"shape":[-4,-32]'),
        ('"shape":[4,32]', '"shape":[4,32' + ",1" * 20 + "]"),
        ('"shape":[4,32]', '"shape":[10000000000,32]'),
        ('"dtype":"F32"', '"dtype":["F32"]'),
        ('"dtype":"F32"', '"dtype":"C64"'),
        ('"data_offsets":[0,', '"data_offsets":[-1,'),
        ('"data_offsets":[0,', '"data_offsets":[1,'),
    ],
)
def test_headers_of_safetensors_that_are_wrong(saved, old, new):
    whole = saved.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + size].decode()
    assert old in header
    header = header.replace(old, new, 1).encode()
    saved.write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + size :])
    refused(saved, "")


def test_a_header_that_is_too_long_is_not_read(saved):
    saved.write_bytes((1 << 62).to_bytes(8, "little") + saved.read_bytes())
    refused(saved, "its header has 4,611,686,018,427,387,904 bytes")


def test_every_byte_that_changes_is_noticed(saved):
    """Of the settings, the checksum and the tensors; in the rest of the header it may be the spelling alone."""
    whole = saved.read_bytes()
    expected = read_adapter(saved)
    for position in [*range(0, len(whole), 97), len(whole) - 1]:
        saved.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(ValueError, match=re.escape(str(saved))):
            read_adapter(saved)
    saved.write_bytes(whole)
    assert read_adapter(saved).config == expected.config


def test_without_its_checksum_a_file_is_damaged(saved):
    with safe_open(saved, "pt") as file:
        text = file.metadata()["onelora"]
    save_file(load_file(saved), saved, {"onelora": text})
    refused(saved, "is damaged, for it is not what was written; copy or download it again")


def test_newer_files_say_so(saved, caplog):
    rewrite(saved, {"format": 3, "version": "9.1"})
    refused(saved, "of format 3, and .* formats up to 2; .*9.1, which is newer .*: pip install --upgrade")
    rewrite_from(saved, {"version": "9.1"}, {"colour": "red"})
    refused(saved, "unknown adapter settings colour.*; it was written by onelora-diffusion 9.1, which is newer")
    rewrite_from(saved, {"version": "9.1"})
    load_adapter(make_dit(), saved)
    assert "was written by onelora-diffusion 9.1, which is newer than this" in caplog.text


def rewrite_from(path, header, config=None):
    config = AdapterConfig(num_classes=3).__dict__ | (config or {})
    written = {"config": config, "fingerprint": None, "base": None, "id2label": {}, "training": {}, "version": "0.1.0"}
    save_file(load_file(path), path, {"onelora": json.dumps(written | header)})


def test_text_of_files_has_no_control_characters(saved):
    rewrite(
        saved, {"id2label": {"0": "pi\x1b[2Jz\u202eza\n"}, "base": "some\x07one/base", "training": {"a\x1b": "\r"}}
    )
    file = read_adapter(saved)
    assert (file.id2label, file.base, file.training) == ({0: "pi [2Jz za "}, "some one/base", {"a ": " "})


def test_a_bare_state_dict_without_one_key_is_refused():
    tensors = dict(adapter_state_dict(randomize(inject_adapter(make_dit(), AdapterConfig()))))
    assert read_dict(make_dit(), tensors, {}, "the state dict", untranslated).config == AdapterConfig()
    for key in tensors:
        rest = {name: tensor for name, tensor in tensors.items() if name != key}
        with pytest.raises(ValueError, match=f"the state dict: has nothing for {key.removesuffix('.onelora_b')}, and"):
            read_dict(make_dit(), rest, {}, "the state dict", untranslated)


Q = "transformer.transformer_blocks.0.attn1.to_q"
PAIR = {f"{Q}.lora_A.weight": torch.eye(2, 32), f"{Q}.lora_B.weight": torch.ones(32, 2)}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"lora_alpha": float("nan")}, "NaN is no number"),
        ({"lora_alpha": "4"}, "its lora_alpha of transformer_blocks.0.attn1.to_q is 4; it must be a finite number"),
        ({"lora_alpha": None}, "its lora_alpha of transformer_blocks.0.attn1.to_q is None"),
        ({"alpha_pattern": {"(a+)+": 1}}, "its alpha_pattern has '\\(a\\+\\)\\+', a regular expression"),
        ({"alpha_pattern": ["to_q"]}, "its alpha_pattern is list"),
        ({"alpha_pattern": {"to_q": [1]}}, "its lora_alpha of transformer_blocks.0.attn1.to_q is \\[1\\]"),
        ({"use_rslora": "yes"}, "its use_rslora is yes"),
        ({"base_model_name_or_path": 3}, "its base_model_name_or_path"),
        ({"bias": ["\x1b[2J"]}, "its bias is \\[' \\[2J'\\]"),
    ],
)
def test_settings_of_a_lora(tmp_path, settings, message):
    path = tmp_path / "x.safetensors"
    settings = {f"transformer.{name}": value for name, value in settings.items()}
    save_file(PAIR, path, {"lora_adapter_metadata": json.dumps(settings)})
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*{message}"):
        read_file(make_dit(), path, untranslated)


def test_patterns_of_a_lora_name_layers(tmp_path):
    path = tmp_path / "x.safetensors"
    for pattern, alpha in (("to_q", 6.0), ("^transformer_blocks.0.attn1.to_q", 6.0), ("^to_q", 2.0), ("o_q", 2.0)):
        settings = {"transformer.alpha_pattern": {pattern: 6}, "transformer.lora_alpha": 2}
        save_file(PAIR, path, {"lora_adapter_metadata": json.dumps(settings)})
        values = read_file(make_dit(), path, untranslated).tensors
        assert (values["transformer_blocks.0.attn1.to_q.onelora_lora_B.weight"] == alpha / 2).all()


def test_the_same_layer_twice_in_a_lora():
    twice = PAIR | {f"{Q}.lora.down.weight": torch.ones(2, 32)}
    with pytest.raises(ValueError, match="the file: .*lora.down.weight is the lora_A of .*to_q, which is there twice"):
        read_dict(make_dit(), twice, {}, "the file", untranslated)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="resource limits")
def test_memory_and_time_are_those_of_the_file(saved, lora, tmp_path):
    """What took gigabytes or minutes is refused in a process that has 1 GB more than it starts with, and 60 s."""
    for number, config in enumerate(
        [{"num_classes": 8_000_000}, {"num_classes": 10**12}, {"targets": ["a"] * 100_000}]
    ):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(saved.read_bytes())
        rewrite(path, config=config)
    for number, config in enumerate([{"rank": 2**30}, {"peft_config": {"r": 65_535}}], 10):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(lora.read_bytes())
        rewrite(path, config=config)
    big = {f"{Q}.{part}": torch.ones(shape) for part, shape in (("a.lora_A", (1, 1)),)}
    (tmp_path / "20.safetensors").write_bytes(save(big))
    script = """
        import resource, sys
        from pathlib import Path
        from tiny_models import make_dit
        from onelora_diffusion.storage.reading import read_file
        import onelora_diffusion.adapters.peft, peft
        model = make_dit()
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
        for path in sorted(Path(sys.argv[1]).glob("[0-9]*.safetensors")):
            try:
                read_file(model, path, lambda tensors, source: tensors)
            except ValueError as error:
                assert str(error).startswith(str(path)), error
            else:
                raise AssertionError(path)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([".", "tests"])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_loader_verb_reads_with_the_same_eyes(saved):
    from onelora_diffusion.pipelines.base import load_base

    pipe = OneLoRADiTPipeline.from_pipe(load_base())
    rewrite(saved, config={"num_classes": 10**6})
    with pytest.raises(ValueError, match="its num_classes is 1000000, and its class table has 4 rows"):
        pipe.load_lora_weights(saved)
    assert pipe.get_list_adapters() == {}


@pytest.mark.parametrize("start", ["pissa", "olora", "pissa_niter_4", "eva", "loftq"])
def test_first_values_that_would_change_the_base_are_refused(start):
    with pytest.raises(ValueError, match=f"peft_config has init_lora_weights='{start}', which would reach beyond"):
        AdapterConfig("lora", peft_config={"init_lora_weights": start})


@pytest.mark.parametrize("name", ["/etc/passwd", "../x.safetensors", "a/../../x.safetensors"])
def test_names_stay_in_their_folder(saved, name):
    from onelora_diffusion.pipelines.base import load_base

    pipe = OneLoRADiTPipeline.from_pipe(load_base())
    pipe.transformer = make_dit()
    for source in (saved.parent, "someone/food"):
        for place in ({"weight_name": name}, {"subfolder": name}):
            with pytest.raises(ValueError, match=f"'{name}' leads out of the folder or repository"):
                pipe.load_lora_weights(source, **place)
    pipe.load_lora_weights(saved.parent, adapter_name="food", weight_name=saved.name)
    with pytest.raises(ValueError, match="leads out of|must end in"):
        pipe.save_lora_weights(saved.parent, weight_name=name)
    for adapter_name in ("../food", "a/b", "a\\b", "a\nb"):
        with pytest.raises(ValueError, match="must not be empty or contain a dot, a slash or a line break"):
            load_adapter(make_dit(), saved, adapter_name)


def test_a_base_that_a_file_names_is_shown_before_it_is_fetched(monkeypatch, capsys):
    from onelora_diffusion.pipelines.base import load_base

    shown = []

    def no_hub(hub_id):
        shown.append(capsys.readouterr().out)
        raise FileNotFoundError("no network")

    monkeypatch.setattr("onelora_diffusion.pipelines.base.is_in_reach", no_hub)
    for named_by, expected in (("x.safetensors", "base: some/one (named by x.safetensors)\n"), (None, "")):
        with pytest.raises(ValueError, match="base model 'some/one'"):
            load_base("some/one", named_by)
        assert shown.pop() == expected


def test_what_cannot_be_read_is_not_written(tmp_path):
    model = inject_adapter(make_dit(), AdapterConfig(num_classes=2))
    for more, message in (
        ({"id2label": {0: "p" * 1001}}, "its class 0 is named"),
        ({"training": {"fd": float("nan")}}, "NaN is no number"),
        ({"base": "x" * 1001}, "its base has 1,001 characters"),
    ):
        with pytest.raises(ValueError, match=message):
            save_adapter(model, tmp_path / "out", **more)
    assert not (tmp_path / "out").exists()
