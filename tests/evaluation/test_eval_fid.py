"""The command line on a random miniature pipeline: gen, ref and calc tell one story; processes change nothing."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import make_dit, make_dit_pipeline, randomize

from onelora_diffusion import AdapterConfig, count_trainable, inject_adapter, load_adapter, save_adapter
from onelora_diffusion.cli import eval_fid
from onelora_diffusion.evaluation import planning
from onelora_diffusion.evaluation.settings import parse
from onelora_diffusion.pipelines.base import load_base
from onelora_diffusion.sampling import SamplerSettings, adapters_merged, generate_images

SMALL = ["--num-images", "23", "--num-inference-steps", "2", "--guidance-scale", "1.5"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A base of five classes at 16 by 16 pixels and an adapter of the ten digits, both random."""
    folder = tmp_path_factory.mktemp("run")
    make_dit_pipeline(make_dit(num_classes=5)).save_pretrained(folder / "base")
    model = randomize(inject_adapter(load_base(folder / "base").transformer, AdapterConfig(num_classes=10)))
    names = {label: str(label) for label in range(10)}
    save_adapter(model, folder, id2label=names, base=str(folder / "base"), training={"dataset": "digits"})
    return folder


def run(*arguments):
    eval_fid.main(parse([str(argument) for argument in arguments], None))


def read(path):
    return json.loads(Path(path).read_text())


def test_gen_reports_base_and_adapted(run_folder, capsys):
    run("--adapter", run_folder, *SMALL)
    report, printed = read(run_folder / "evaluation.json"), capsys.readouterr().out
    assert report["distance_name"] == "FD(pixels)" and list(report["results"]) == ["base", "adapted"]
    base, adapted = report["results"]["base"], report["results"]["adapted"]
    assert base["distance"] != adapted["distance"] and 0 <= adapted["recognition"] <= 1
    assert report["reference"]["dataset"] == "digits" and report["reference"]["count"] == 1442
    assert report["features"]["resize"] == "none, 16x16 pixels" and report["features"]["num_features"] == 768
    assert report["seed"] == 0 and report["sampler"] == "ddim" and report["num_inference_steps"] == 2
    assert report["mixed_precision"] == "no" and not report["tf32"] and report["images_at_once"] == 16
    assert "Generated in float32 on cpu, " in printed and ", 16 images at once." in " ".join(printed.split())
    model = load_adapter(load_base(run_folder / "base").transformer, run_folder)
    assert report["num_trainable_params"] == count_trainable(model)
    assert report["adapter_bytes"] == (run_folder / "onelora_weights.safetensors").stat().st_size
    assert f"{adapted['distance']:.4f}" in printed and f"{base['distance']:.4f}" in printed
    assert "23 generated images for 768 features" in " ".join(printed.split())
    assert "it draws i mod 5" in " ".join(printed.split())
    assert max(map(len, printed.replace(str(run_folder), "").splitlines())) <= 80


def test_gen_ref_and_calc_agree(run_folder, tmp_path):
    run("ref", "--output", tmp_path / "digits.safetensors")
    gen = ["--adapter", run_folder, *SMALL, "--compare-base", "False", "--output", tmp_path / "gen.json"]
    run("gen", *gen, "--reference", tmp_path / "digits.safetensors", "--metrics", "limit")

    pipeline = load_base(run_folder / "base")
    load_adapter(pipeline.transformer, run_folder)
    labels = [index % 10 for index in range(23)]
    settings = SamplerSettings(num_inference_steps=2, guidance_scale=1.5)
    with adapters_merged(pipeline, settings):  # as gen draws
        batches = generate_images(pipeline, labels, 0, range(23), settings, batch_size=64)
        images = torch.cat([images for _, images in batches])
    np.savez(tmp_path / "images.npz", images.permute(0, 2, 3, 1).numpy())
    calc = ["calc", "--images", tmp_path / "images.npz", "--dataset", "digits", "--output", tmp_path / "calc.json"]
    run(*calc, "--metrics", "kid", "precision-recall", "limit")

    by_gen, by_calc = (read(tmp_path / name)["results"] for name in ("gen.json", "calc.json"))
    distance = by_gen["adapted"]["distance"]
    assert list(by_gen) == ["adapted"]
    assert by_calc["images.npz"]["distance"] == pytest.approx(distance, rel=1e-9)
    assert by_calc["images.npz"]["limit"]["distances"][-1] == pytest.approx(distance, rel=1e-4)
    assert {"kid", "kid_spread", "precision", "recall"} <= set(by_calc["images.npz"])

    run("ref", "--images", tmp_path / "images.npz", "--output", tmp_path / "images.safetensors")
    files = ["--images", tmp_path / "images.safetensors", "--reference", tmp_path / "digits.safetensors"]
    run("calc", *files, "--output", tmp_path / "calc.json")
    (from_files,) = read(tmp_path / "calc.json")["results"].values()
    assert from_files["distance"] == pytest.approx(distance, rel=1e-9)
    run("calc", "--images", tmp_path / "images.safetensors", "--dataset", "digits", *calc[-2:])
    (from_dataset,) = read(tmp_path / "calc.json")["results"].values()
    assert from_dataset["distance"] == pytest.approx(distance, rel=1e-9)


def test_two_processes_change_nothing(run_folder, tmp_path):
    arguments = ["gen", "--adapter", run_folder, *SMALL, "--metrics", "kid"]
    run(*arguments, "--output", tmp_path / "one.json")
    launch = "accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 --main_process_port 0"
    launch += " --mixed_precision no --dynamo_backend no"
    script = ["-m", eval_fid.__name__, *arguments, "--batch-size", "7", "--output", tmp_path / "two.json"]
    subprocess.run(
        [sys.executable, "-m", *launch.split(), *map(str, script)],
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    one, two = read(tmp_path / "one.json")["results"], read(tmp_path / "two.json")["results"]
    for model in ("base", "adapted"):
        assert two[model] == pytest.approx(one[model], rel=1e-6)


def test_guidance_of_channels_and_steps_is_taken_and_told(run_folder, tmp_path, capsys):
    gen = ["--adapter", run_folder, *SMALL, "--compare-base", "False", "--output", tmp_path / "gen.json"]
    distances = []
    for flags in ([], ["--guidance-channels", "3"], ["--guidance-interval", "0", "400"]):
        run(*gen, *flags)
        distances.append(read(tmp_path / "gen.json")["results"]["adapted"]["distance"])
    assert len(set(distances)) == 3 and read(tmp_path / "gen.json")["guidance_interval"] == [0, 400]
    printed = " ".join(capsys.readouterr().out.split())
    assert "guidance 1.5 of 3 channels" in printed and "guidance 1.5 from step 0 to 400" in printed


def test_labels_are_drawn_as_asked_and_told(run_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(planning, "class_frequencies", lambda dataset, names: [1] + [0] * (len(names) - 1))
    gen = ["--adapter", run_folder, *SMALL, "--compare-base", "False", "--output", tmp_path / "gen.json"]
    found = {}
    for labels in ("turns", "random", "dataset"):
        run(*gen, "--labels", labels)
        report = read(tmp_path / "gen.json")
        assert report["labels"] == labels
        found[labels] = report["results"]["adapted"]["distance"]
    assert len(set(found.values())) == 3
    printed = " ".join(capsys.readouterr().out.split())
    assert "seed 0, random labels" in printed and "seed 0, labels as frequent as in the data set" in printed


def test_a_sweep_finds_the_best_guidance_of_each_metric(run_folder, tmp_path, capsys):
    sweep = ["sweep", "--adapter", run_folder, *SMALL[:4], "--guidance-scales", "3", "1", "1.5", "--metrics", "kid"]
    run(*sweep, "--output", tmp_path / "sweep.json")
    report = read(tmp_path / "sweep.json")
    assert list(report["results"]) == ["1", "1.5", "3"] and report["num_inference_steps"] == 2
    for name, key, choose in (
        ("FD(pixels)", "distance", min),
        ("KID(pixels)", "kid", min),
        ("recognition",) * 2 + (max,),
    ):
        scales = {float(scale): results[key] for scale, results in report["results"].items()}
        assert scales[report["best"][name]] == choose(scales.values())
    assert len({results["distance"] for results in report["results"].values()}) == 3
    printed = " ".join(capsys.readouterr().out.split())
    assert f"FD(pixels) at {report['best']['FD(pixels)']:g}" in printed
    assert "23 generated images for 768 features: too few" in printed
    assert np.array(Image.open(tmp_path / "sweep.png")).std() > 10

    gen = ["gen", "--adapter", run_folder, *SMALL, "--compare-base", "False", "--output", tmp_path / "gen.json"]
    run(*gen)
    expected = read(tmp_path / "gen.json")["results"]["adapted"]["distance"]
    assert report["results"]["1.5"]["distance"] == pytest.approx(expected, rel=1e-9)


def test_precision_is_taken_and_told(run_folder, tmp_path, capsys):
    gen = ["--adapter", run_folder, *SMALL, "--compare-base", "False", "--output", tmp_path / "gen.json"]
    run(*gen)
    exact = read(tmp_path / "gen.json")["results"]["adapted"]["distance"]
    run(*gen, "--mixed-precision", "bf16", "--images-at-once", "4")
    report = read(tmp_path / "gen.json")
    assert report["mixed_precision"] == "bf16" and report["images_at_once"] == 4
    assert "Generated in bf16 on cpu" in capsys.readouterr().out
    rounded = report["results"]["adapted"]["distance"]
    assert rounded != exact and rounded == pytest.approx(exact, rel=0.05)  # eight bits of each pixel are left


def error_of(*arguments):
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    message = str(caught.value.code)
    assert message.startswith("eval_fid.py: ") and "\n" not in message
    return message


def test_wrong_input_is_named_in_one_line(run_folder, tmp_path):
    assert "no adapter at 'nowhere/onelora_weights.safetensors'" in error_of("--adapter", "nowhere")
    wrong = ["--adapter", run_folder, "--output", tmp_path / "evaluation.json"]
    assert "--num-images 1" in error_of(*wrong, "--num-images", "1")
    assert "9000 inference steps" in error_of(*wrong, "--num-inference-steps", "9000")
    assert "inception-score needs --features inception" in error_of(*wrong, "--metrics", "inception-score")
    assert "no statistics at" in error_of(*wrong, "--reference", tmp_path / "none.safetensors")
    assert "no such folder" in error_of(*wrong, "--base", "nowhere")
    assert "is no class of --dataset digits: give a --reference" in error_of("--adapter", "None", *wrong[2:])
    assert "no Inception weights at" in error_of(*wrong, "--features", "inception", "--inception-weights", "nowhere")
    run("ref", "--output", tmp_path / "eight.safetensors", "--resolution", "8")
    assert "same --features" in error_of(*wrong, "--reference", tmp_path / "eight.safetensors")
    files = ["calc", "--images", tmp_path / "eight.safetensors", "--reference", tmp_path / "eight.safetensors"]
    assert "is given as statistics: --metrics limit needs the images" in error_of(*files, "--metrics", "limit")
    assert "inception-score needs --features inception" in error_of(*files, "--metrics", "inception-score")
    run("ref", "--output", tmp_path / "sixteen.safetensors")
    filed = [*wrong, "--reference", tmp_path / "sixteen.safetensors", "--metrics", "limit"]
    assert "--metrics kid needs the images" in error_of(*filed, "kid")
    (tmp_path / "sixteen.safetensors").unlink()
    assert "unknown split 'none'" in error_of("ref", "--output", tmp_path / "a.safetensors", "--split", "none")
    assert "are a .safetensors file" in error_of("ref", "--output", tmp_path / "statistics.json")
    assert "give them by --reference" in error_of("calc", "--images", tmp_path / "eight.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eight.safetensors"]


def test_a_full_disk_and_ctrl_c_are_one_line_and_leave_nothing(run_folder, tmp_path, monkeypatch, capsys):
    gen = ["--adapter", run_folder, *SMALL, "--compare-base", "False", "--output", tmp_path / "new" / "gen.json"]

    def full_disk(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full_disk)
    assert error_of(*gen).endswith("gen.json: No space left on device")
    monkeypatch.setattr(os, "fsync", lambda descriptor: signal.raise_signal(signal.SIGINT))
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run(*gen)
    assert caught.value.code == 130 and capsys.readouterr().err.splitlines()[-1] == "eval_fid.py: stopped by Ctrl-C"
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("command", [["gen"], ["ref"], ["calc", "--images", "pngs"]])
def test_no_place_for_the_report_is_said_before_anything_is_read(command, tmp_path):
    (tmp_path / "report.npz").mkdir()
    with pytest.raises(SystemExit, match="^eval_fid.py: .*report.npz' is no file that can be replaced"):
        run(*command, "--output", tmp_path / "report.npz")
    (tmp_path / "evaluation.json").mkdir()
    with pytest.raises(SystemExit, match="^eval_fid.py: .*evaluation.json' is no file that can be replaced"):
        run("--adapter", tmp_path)


def test_compare_base_is_a_switch():
    words = ([], ["--compare-base"], ["--no-compare-base"], ["gen", "--compare-base", "False"])
    assert [parse(flags, None).compare_base for flags in words] == [None, True, False, False]


def test_damaged_adapter_and_unknown_flag(run_folder, tmp_path):
    shutil.copy(run_folder / "onelora_weights.safetensors", tmp_path)
    whole = (tmp_path / "onelora_weights.safetensors").read_bytes()
    (tmp_path / "onelora_weights.safetensors").write_bytes(whole[:-10])
    assert "is damaged" in error_of("--adapter", tmp_path)
    with pytest.raises(SystemExit) as caught:
        run("--no-such-flag")
    assert caught.value.code == 2
