"""The table of what recordings say of small pipelines."""

import os
import sys
import time

from onelora_diffusion.families.arguments import same
from tools.stock_calls import alone
from tools.try_families import main

TESTS = """
from tiny_models import PIPELINES, make_tokenizer


class Small:
    pipeline_class = type(PIPELINES["KIND"]())

    def get_dummy_components(self):
        from transformers import AutoTokenizer

        return PIPELINES["KIND"]().components | {"tokenizer": AutoTokenizer.from_pretrained("nowhere/tiny")}

    def get_dummy_inputs(self, device, seed=0):
        return {"max_sequence_length": 64}
"""


def test_a_row_says_what_was_found(capsys):
    assert main(["wan", "hidream"]) == 0
    _, _, wan, hidream, _, tried = capsys.readouterr().out.splitlines()
    assert wan.startswith("| `WanPipeline` | `hidden_states` + | `timestep` 1·t | `encoder_hidden_states` | – | w |")
    assert hidream.startswith("| `HiDreamImagePipeline` | `hidden_states` − | `timesteps` 1·t | ")
    assert tried == "2 tried: 2 work."


def test_noise_beside_constants_and_a_component_that_guides(capsys):
    assert main(["hunyuan_video15"]) == 0
    row = capsys.readouterr().out.splitlines()[2]
    assert row.startswith(
        "| `HunyuanVideo15Pipeline` | `hidden_states` + | `timestep` 1·t | `encoder_hidden_states`, "
    )
    assert "| w |" in row


def test_an_edit_is_tried_with_a_reference_image(capsys):
    assert main(["--edits", "pix2pix_xl"]) == 0
    head, _, row, _, tried = capsys.readouterr().out.splitlines()
    assert head.count("|") == row.count("|") and "| of the reference images |" in head
    assert row.startswith("| `StableDiffusionXLInstructPix2PixPipeline` | `sample` + | `timestep` 1·t | ")
    assert "| `sample` | w |" in row and tried == "1 tried: 1 work."


def test_a_reference_may_stand_beside_the_noise_in_the_scheduler_too(capsys):
    assert main(["--edits", "joy_image"]) == 0
    row = capsys.readouterr().out.splitlines()[2]
    assert row.startswith("| `JoyImageEditPipeline` | `hidden_states` + | `timestep` 1·t | `encoder_hidden_states` | ")
    assert "| `hidden_states`, `encoder_hidden_states` | its own | " in row


def test_classes_are_tried_as_diffusers_tests_make_them(tmp_path, monkeypatch, capsys):
    for kind in ("z_image", "sd15"):
        folder = tmp_path / "tests" / "pipelines" / kind
        folder.mkdir(parents=True)
        (folder / f"test_{kind}.py").write_text(TESTS.replace("KIND", kind))
        (folder / "__init__.py").write_text("")
    for folder in ("tests", "tests/pipelines"):
        (tmp_path / folder / "__init__.py").write_text("")
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr("tools.try_families.PIPELINES", {"sd15": None})
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["--diffusers-tests", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("`")[1] for line in lines[2:4]] == ["StableDiffusionPipeline", "ZImagePipeline"]
    assert "WanPipeline" in lines[-5] and lines[-1] == "2 tried: 2 work."
    assert "with images, masks, clips or sound" in lines[-3]


def test_a_class_that_dies_or_takes_too_long_does_not_end_the_others(monkeypatch):
    assert alone(lambda: ("row", "work"), "`A`") == ("row", "work")
    assert alone(lambda: os._exit(1), "`A`") == ("| `A` | fails: its process died |", "wrong")
    monkeypatch.setattr("tools.stock_calls.SECONDS", 0.1)
    assert alone(lambda: time.sleep(60), "`A`")[0].startswith("| `A` | fails: it takes more than 0.1 s")


def test_no_settings_are_as_none():
    assert same({}, None) and not same({"a": 1}, None) and not same({}, 0)
