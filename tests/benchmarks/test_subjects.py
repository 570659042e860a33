"""The measurement of many subjects: what it writes, what it starts, and the table of it."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks import families
from benchmarks import subjects as module
from benchmarks.subjects import SubjectsSettings, subjects, write_subjects
from onelora_diffusion import AdapterConfig, inject_adapter, save_adapter


def test_each_subject_has_pictures_of_its_own(tmp_path):
    names = write_subjects(tmp_path, 12, 3)
    assert len(names) == 12 and names == sorted(names)
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    pictures = [np.array(Image.open(path)).tobytes() for path in tmp_path.rglob("*.png")]
    assert len(pictures) == len(set(pictures)) == 36


def test_the_table_holds_the_seconds_of_one_run_and_of_all_runs_alone(tmp_path, monkeypatch, capsys):
    started = []

    def seconds_of(flags):
        started.append(flags)
        folder = Path(flags[flags.index("--output-dir") + 1])
        value = 1.0 if "--subjects" in flags else 1.5
        model = inject_adapter(torch.nn.Sequential(torch.nn.Linear(2, 2)), AdapterConfig())
        values = {"0.onelora_b": torch.full((2,), value)}
        for path in [folder / name for name in names] if "--subjects" in flags else [folder]:
            save_adapter(model, path, state_dict=values)
        return (30.0, 20.0) if "--subjects" in flags else (10.0, 5.0)

    names = write_subjects(tmp_path / "pictures", 4, 2)
    monkeypatch.setattr(module, "seconds_of", seconds_of)
    found = subjects(SubjectsSettings(subjects=4, images=2, alone=2, output_dir=tmp_path))
    assert found == {
        "1LoRA, one run": (30.0, 20.0),
        "1LoRA, 4 runs": (40.0, 20.0),
        "PEFT LoRA r=1, 4 runs": (40.0, 20.0),
    }
    assert [flags[flags.index("--method") + 1] for flags in started[1:]] == ["1lora"] * 2 + ["lora"] * 2
    said = capsys.readouterr().out
    assert "| 1LoRA, 4 runs         |   40 |       0.75 |        20 |       1.00 |" in said
    assert "differ by 5.0e-01 at most" in said


def test_a_step_of_all_subjects_is_timed_beside_a_step_of_each(monkeypatch, capsys):
    small = {"num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32}
    base = families.BASES["pixart"]
    monkeypatch.setitem(families.BASES, "pixart", base._replace(config=base.config | small, depths={"num_layers": 1}))
    found = subjects(SubjectsSettings(family="pixart", subjects=2, rounds=1))
    assert list(found) == ["1LoRA, one step of all", "1LoRA, a step of each", "PEFT LoRA r=1, a step of each"]
    assert min(found.values()) > 0 and "PixArt-Σ, 2 subjects" in capsys.readouterr().out
