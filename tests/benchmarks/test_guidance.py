"""The table of guidance: what is trained, with what it is drawn, and the passes that it takes."""

import json

from benchmarks import guidance as module
from benchmarks.guidance import GuidanceSettings, guidance


def test_each_kind_is_trained_and_drawn_as_it_says(tmp_path, monkeypatch, capsys):
    trained, drawn = [], []

    def generate(settings, accelerator):
        drawn.append((settings.adapter[0].name, settings.guidance, settings.guidance_scale))
        settings.output.parent.mkdir(exist_ok=True)
        values = {"distance": 4.0 + settings.seed, "recognition": 0.5}
        settings.output.write_text(json.dumps({"results": {"adapted": values}}))

    monkeypatch.setattr(module.train_dit, "main", trained.append)
    monkeypatch.setattr(module.eval_fid, "generate", generate)
    settings = GuidanceSettings(strength=1.5, steps=8, seeds=(0, 2), num_inference_steps=3, output_dir=tmp_path)
    found = guidance(settings)
    assert list(found.values()) == [[(4.0, 50.0), (6.0, 50.0)]] * 5
    assert drawn[::2] == [
        ("seed-0", "cfg", 1.0),
        ("seed-0", "cfg", 2.0),
        ("seed-0", "domain", 2.0),
        ("trained-guidance-1_5-label-drop-0-seed-0", "cfg", 1.0),
        ("trained-guidance-1_5-label-drop-0-guidance-start-4-guidance-cutoff-0_5-seed-0", "cfg", 1.0),
    ]
    asked = [(each.trained_guidance, each.guidance_start, each.guidance_cutoff, each.label_drop) for each in trained]
    assert asked[::2] == [(1.0, 0, 1.0, 0.1)] * 3 + [(1.5, 0, 1.0, 0.0), (1.5, 4, 0.5, 0.0)]
    assert {each.max_steps for each in trained} == {8} and [each.seed for each in trained[:2]] == [0, 2]
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines()]
    assert [row[2].strip() for row in rows[2:]] == ["3", "6", "6", "3", "3"] and "5.00 ± 1.41" in rows[2][3]
    assert guidance(settings) == found and len(drawn) == len(trained) == 10  # what is finished is not made again
