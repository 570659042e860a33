"""benchmark.py compare: its data, its learning rates, one run, the report, and all of it on a micro scale."""

import copy
import dataclasses
import gzip
import json

import numpy as np
import peft
import pytest
import torch
from PIL import Image

import benchmark
from benchmarks import compare_run
from benchmarks.compare import (
    PRESETS,
    best_rate,
    compare,
    finalists_of,
    is_finished,
    outward,
    parse_methods,
    preset,
    preset_asked_for,
)
from benchmarks.compare_inputs import made_once, prepare
from benchmarks.compare_report import name_of, pushed_apart, summarise, write_report
from benchmarks.compare_run import Job, run_file
from onelora_diffusion import AdapterConfig, count_trainable, inject_adapter
from onelora_diffusion.data import load_dataset
from onelora_diffusion.evaluation.features import load_features
from onelora_diffusion.pipelines.base import load_base
from onelora_diffusion.storage.adapter_file import read_adapter


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture(scope="module")
def fashion_root(tmp_path_factory):
    """Raw files with 200 and 60 images: class c is a bright square of side 4 + 2c on black."""
    root = tmp_path_factory.mktemp("fashion")
    for prefix, count in (("train", 200), ("t10k", 60)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = np.zeros((count, 28, 28), np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[: 4 + 2 * label, : 4 + 2 * label] = 255
        write_idx(root / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(root / f"{prefix}-labels-idx1-ubyte.gz", labels)
    return root


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A short run on the digits and the miniature."""
    settings = preset("digits", cache_dir=tmp_path_factory.mktemp("cache"), num_images=20)
    inputs = prepare(settings)
    return Job(
        adapter={"method": "1lora"},
        learning_rate=5e-3,
        class_learning_rate=2e-2,
        seed=0,
        time_budget_s=0.6,
        eval_every_s=0.3,
        **{name: getattr(inputs, name) for name in ("base", "id2label", "latents", "reference", "features_weights")},
        inputs=inputs.identity,
        num_train_images=inputs.num_train_images,
        dataset="digits",
        features="pixels",
        num_images=20,
        num_inference_steps=2,
        guidance_scale=1.5,
        eval_batch_size=20,
        batch_size=4,
        flip=False,
        label_drop=0.1,
        ema_decay=0.9,
        max_grad_norm=None,
        mixed_precision="no",
    )


# ---------------------------------------------------------------------------------------------------
# Fashion-MNIST


def test_shoes_are_read_from_the_raw_files(fashion_root):
    shoes = load_dataset("fashion-mnist", fashion_root, "train", resolution=32)
    assert shoes.id2label == {0: "sandal", 1: "sneaker", 2: "ankle boot"}
    assert len(shoes) == 60 and shoes.labels[:4] == [0, 1, 2, 0]
    image, label = shoes[0]  # class 5: a square of 14, two pixels in from the corner
    expected = torch.full((3, 32, 32), -1.0)
    expected[:, 2:16, 2:16] = 1.0
    assert label == 0 and torch.equal(image, expected)


def test_a_cut_raw_file_and_a_missing_one_are_named(fashion_root, tmp_path):
    for file in fashion_root.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    images = gzip.decompress((tmp_path / "train-images-idx3-ubyte.gz").read_bytes())
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(images[:-1]))
    with pytest.raises(ValueError, match="train-images-idx3-ubyte is damaged"):
        load_dataset("fashion-mnist", tmp_path, resolution=32)
    (tmp_path / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist"):
        load_dataset("fashion-mnist", tmp_path, resolution=32)


def test_the_classifier_learns_squares_and_its_recipe_repeats(fashion_root, tmp_path):
    from benchmarks.fashion_classifier import train_fashion_classifier

    for name in ("one", "two"):
        train_fashion_classifier(tmp_path / name, fashion_root, epochs=60, batch_size=50)
    features = load_features("fashion-mnist", 32, tmp_path / "one")
    assert features.extractor == load_features("fashion-mnist", 32, tmp_path / "two").extractor
    test = load_dataset("fashion-mnist", fashion_root, "test", resolution=32, classes=tuple(range(10)))
    images = ((test.images + 1) * 127.5).to(torch.uint8)
    right = (features.predict(images) == torch.tensor(test.labels)).double().mean().item()
    assert right == features.accuracy > 0.9
    assert features(images).shape == (60, 64) and features(images).dtype == torch.float64


# ---------------------------------------------------------------------------------------------------
# Settings and learning rates


def test_the_preset_sets_the_defaults_and_flags_override_them():
    assert preset_asked_for(["compare", "--preset", "food101"]).base == "facebook/DiT-XL-2-256"
    assert preset_asked_for(["compare"]).dataset == "digits"
    assert preset("fashion-mnist", seeds=(3,)).seeds == (3,)
    assert {len(preset(name).methods) for name in PRESETS} == {8}


def test_methods_are_names_or_settings():
    fourier = '{"method": "peft:fourierft", "peft_config": {"n_frequency": 50}}'
    methods = parse_methods(preset("digits", methods=("lora", fourier, '{"method": "1lora", "bias": true}'), rank=2))
    assert methods["lora"] == {"method": "lora", "rank": 2}
    assert methods["1lora (bias True)"]["bias"] is True
    assert len(methods) == 3
    by_sum = '{"method": "lora", "rates_by_sum": true}'
    for wrong in ("lore", '{"method": "1lora", "biass": true}', "{", by_sum):
        with pytest.raises(ValueError, match="lore|biass|JSON|rates_by_sum is of 1LoRA's sum"):
            parse_methods(preset("digits", methods=(wrong,)))


def test_groups_of_methods_are_the_papers_tables_and_pefts_smallest():
    ablations = parse_methods(preset("digits", methods=("ablations",)))
    assert [name_of(method) for method in ablations] == [
        *("1LoRA", "1LoRA, β", "1LoRA, γ", "1LoRA, β, γ", "BitFit", "γ", "DiffFit", "class table alone"),
        "1LoRA, at random",
    ]
    assert ablations["1lora (sum False, scale True)"] == dict(method="1lora", rank=1, sum=False, scale=True)
    tiny = parse_methods(preset("digits", methods=("tiny",)))
    names = ["1LoRA", "LoRA", "MiSS r=1", "FourierFT", "WaveFT", "RoAd", "IA³", "UniLoRA", "TinyLoRA"]
    assert [name_of(method) for method in tiny] == names
    directions = parse_methods(preset("digits", methods=("directions",)))
    assert [name_of(method) for method in directions] == ["1LoRA", "1LoRA, outputs", "1LoRA, four of W0"]
    model = load_base().transformer.eval()
    shape = (2, model.config.in_channels, model.config.sample_size, model.config.sample_size)
    batch = {
        "hidden_states": torch.randn(shape, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([3, 700]),
        "class_labels": torch.tensor([5, 9]),
    }
    with torch.no_grad():
        at_first = model(**batch).sample
    for config in tiny.values():
        kind = config["method"].removeprefix("peft:")
        if kind != config["method"] and kind.upper() not in peft.PeftType.__members__:
            continue  # of a newer PEFT
        adapted = inject_adapter(copy.deepcopy(model), AdapterConfig(**config))
        assert 8_800 <= count_trainable(adapted) <= 15_000
        with torch.no_grad():  # UniLoRA begins near the base, all others at it
            torch.testing.assert_close(adapted(**batch).sample, at_first, atol=1e-2, rtol=0)


def test_the_best_rate_is_the_smallest_distance_and_a_failed_run_never_is(tmp_path):
    files = {}
    for rate, result in ((1e-3, {"distance": 2.0}), (4e-3, {"distance": 1.0}), (1.6e-2, {"failed": "diverged"})):
        files[rate] = tmp_path / f"{rate}.json"
        files[rate].write_text(json.dumps(result))
    assert best_rate(files) == 4e-3


def test_finalists_are_the_best_rate_and_the_next_lower_one():
    assert finalists_of([1e-3, 4e-3, 1.6e-2, 6.4e-2], 1.6e-2) == [4e-3, 1.6e-2]
    assert finalists_of([4e-3, 1e-3], 1e-3) == [1e-3]


def test_a_rate_at_the_edge_goes_on_geometrically():
    rates = [1e-3, 4e-3, 1.6e-2]
    assert outward(rates, 4e-3) is None
    assert outward(rates, 1.6e-2) == 6.4e-2
    assert outward(rates, 1e-3) == 2.5e-4


def test_a_result_of_other_settings_is_not_taken_for_this_one(job, tmp_path):
    file = tmp_path / "run.json"
    assert not is_finished(file, job)
    file.write_text(json.dumps({"job": dataclasses.asdict(job)}))
    assert is_finished(file, job)
    with pytest.raises(ValueError, match="batch_size was 4 and is 8"):
        is_finished(file, dataclasses.replace(job, batch_size=8))


def test_inputs_are_made_once_and_again_for_another_recipe(tmp_path):
    made = []

    def make(folder):
        made.append(1)
        (folder / "file").write_text(str(len(made)))

    for recipe, content in (({"steps": 1}, "1"), ({"steps": 1}, "1"), ({"steps": 2}, "2")):
        assert (made_once(tmp_path / "base", recipe, make) / "file").read_text() == content


# ---------------------------------------------------------------------------------------------------
# A run


def test_a_run_measures_at_its_intervals_and_keeps_the_best(job, tmp_path):
    result = compare_run.run(job, tmp_path / "run.json")
    evaluations = result["evaluations"]
    seconds = [evaluation["seconds"] for evaluation in evaluations]
    assert 0.3 <= seconds[0] and 0.6 <= seconds[-1] and seconds == sorted(seconds)
    assert result["distance"] == min(evaluation["distance"] for evaluation in evaluations)
    assert result["steps"] == evaluations[-1]["step"] > 0
    assert result["step_seconds"] == pytest.approx(seconds[-1] / result["steps"])
    adapter = read_adapter(tmp_path / "run.safetensors")
    assert adapter.training["distance"] == result["distance"]
    assert result["num_trainable_params"] == sum(tensor.numel() for tensor in adapter.tensors.values())
    assert result["adapter_bytes"] == (tmp_path / "run.safetensors").stat().st_size
    assert Image.open(tmp_path / "run.png").size == (12 * 16, 16)
    assert not (tmp_path / "run.checkpoints").exists()


def test_every_method_sees_the_same_batches(job, tmp_path, monkeypatch):
    seen, sample = {}, compare_run.sample_moments
    for method in ("1lora", "lora"):
        monkeypatch.setattr(
            compare_run,
            "sample_moments",
            lambda *args, method=method: seen.setdefault(method, []).append(sample(*args)) or seen[method][-1],
        )
        other = dataclasses.replace(job, adapter={"method": method}, time_budget_s=0.3)
        compare_run.run(other, tmp_path / f"{method}.json")
    steps = list(zip(seen["1lora"], seen["lora"], strict=False))[:-1]  # the last looks at step 0 once more
    assert steps and all(torch.equal(ours, theirs) for ours, theirs in steps)


def test_rates_by_the_sum_are_those_of_training(job, tmp_path, monkeypatch):
    taken, divide = [], compare_run.divide_groups
    monkeypatch.setattr(
        compare_run, "divide_groups", lambda optimizer, *rest: divide(optimizer, *rest) or taken.append(optimizer)
    )
    job = dataclasses.replace(job, adapter={"method": "1lora", "rates_by_sum": True}, time_budget_s=0.1)
    compare_run.run(job, tmp_path / "run.json")
    (optimizer,) = taken
    factors = {group["factor"] for group in optimizer.param_groups if group["lr"] != 2e-2}  # of the sums
    assert all(group["lr"] in (2e-2, 5e-3 * group["factor"]) for group in optimizer.param_groups)
    assert len(factors) > 3 and max(factors) > 2 * min(factors)
    assert read_adapter(tmp_path / "run.safetensors").config == AdapterConfig(num_classes=len(job.id2label))


def test_a_killed_run_goes_on_from_its_last_evaluation(job, tmp_path, monkeypatch):
    job = dataclasses.replace(job, time_budget_s=2.4, eval_every_s=0.6)  # two of them on a busy machine as well
    calls, evaluate = [], compare_run.evaluate

    def killed(*arguments):
        calls.append(len(calls) + 1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*arguments)

    monkeypatch.setattr(compare_run, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        compare_run.run(job, tmp_path / "run.json")
    result = compare_run.run(job, tmp_path / "run.json")
    assert len(calls) > len(result["evaluations"]) == len(calls) - 1
    seconds = [evaluation["seconds"] for evaluation in result["evaluations"]]
    assert seconds == sorted(seconds) and seconds[-1] >= 2.4


def test_divergence_is_a_result(job, tmp_path):
    job_file = tmp_path / "run.job"
    job_file.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(job, learning_rate=1e30))))
    compare_run.main(job_file, tmp_path / "run.json")
    assert json.loads((tmp_path / "run.json").read_text())["failed"].startswith("diverged")


# ---------------------------------------------------------------------------------------------------
# The report


def one_result(distance, seconds, failed=None):
    evaluations = [
        {"step": 10, "seconds": seconds / 2, "distance": 2 * distance, "recognition": 0.5},
        {"step": 20, "seconds": seconds, "distance": distance, "recognition": 0.75},
    ]
    machine = {"processor": "abacus", "cores": 2, "threads": 1, "torch": "2", "load": 0.5, "memory_bytes": None}
    numbers = dict(distance=distance, recognition=0.75, time_to_best_s=seconds, step_seconds=0.01, steps=20)
    numbers |= dict(
        num_trainable_params=1234, memory_before_bytes=4e8, peak_memory_bytes=5e8, saved_bytes=1e6, adapter_bytes=5000
    )
    facts = {"job": {}, "machine": machine, "failed": failed}
    return facts if failed else facts | numbers | {"evaluations": evaluations}


def made_up_results(folder):
    runs = {
        "lora": [one_result(0.5, 20.0), one_result(0.7, 40.0)],
        "1lora": [one_result(0.25, 30.0), one_result(0.35, 30.0)],
        "dora": [one_result(0, 0, failed="out of memory")] * 2,
    }
    for method, rate in (("lora", 4e-3), ("1lora", 1e-3)):
        file = run_file(folder, method, rate, 0).with_suffix(".png")
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (48, 4)).save(file)
    settings = dataclasses.asdict(preset("digits", output_dir=folder))
    return {
        "settings": json.loads(json.dumps(settings, default=str)),
        "inputs": {
            "distance_name": "FD(pixels)",
            "reference_count": 100,
            "autoencoder_distance": 0.1,
            "notes": ["Of these features."],
        },
        "sweep": {
            "lora": {"0.001": one_result(1.0, 5.0), "0.004": one_result(0.8, 5.0)},
            "1lora": {"0.001": one_result(0.6, 5.0), "0.004": one_result(0, 0, "diverged")},
            "dora": {"0.001": one_result(0, 0, "out of memory")},
        },
        "finals": {
            "lora": {"0.004": one_result(0.5, 20.0), "0.001": one_result(0.9, 20.0)},
            "1lora": {"0.001": one_result(0.25, 30.0)},
            "dora": {"0.001": one_result(0, 0, "out of memory")},
        },
        "learning_rates": {"lora": 4e-3, "1lora": 1e-3, "dora": 1e-3},
        "runs": runs,
    }


def test_rows_hold_mean_and_sample_deviation_best_first(tmp_path):
    rows = summarise(made_up_results(tmp_path))
    assert [row["method"] for row in rows] == ["1lora", "lora", "dora"]
    assert rows[0]["distance"] == pytest.approx((0.3, 0.1 / 2**0.5))
    assert rows[1]["ratio"] == pytest.approx((2.0, 0.0))  # 0.5 / 0.25 and 0.7 / 0.35, seed by seed
    assert rows[1]["time_to_best_s"] == pytest.approx((30.0, 200**0.5))
    assert rows[2]["failed"] == "out of memory"


def test_the_report_has_a_table_a_sweep_and_pictures(tmp_path):
    table, numbers, *pictures = write_report(made_up_results(tmp_path), tmp_path / "docs", "digits")
    lines = table.read_text().splitlines()
    assert lines[2].startswith("| method | time to best [s] | FD(pixels) | x 1LoRA | peak memory [MB] |")
    assert lines[4].startswith("| 1LoRA | 30.0 ± 0.0 | 0.300 ± 0.071 | 1.00 ± 0.00 | 500 ± 0 | 1,234 | 10.0 ± 0.0 |")
    assert lines[6].startswith("| DoRA | out of memory |")
    assert "| 1LoRA | **0.600** | failed |" in lines
    assert "| LoRA | 1.000 | **0.800** |" in lines
    assert {"| LoRA | 0.001: 0.900 | 0.004: 0.500 |", "| 1LoRA |  | 0.001: 0.250 |"} <= set(lines)
    assert "| DoRA |  | 0.001: out of memory |" in lines
    assert lines[-1].endswith("not at its best: LoRA, 1LoRA, DoRA.")
    assert [picture.name for picture in pictures] == ["digits.png", "digits-curves.png", "digits-samples.png"]
    for picture in pictures:
        assert np.asarray(Image.open(picture)).std() > 5 and f"({picture.name})" in table.read_text()
    assert json.loads(numbers.read_text())["summary"][0]["method"] == "1lora"


def test_labels_are_pushed_apart_in_their_order():
    heights = pushed_apart(np.array([0.5, 0.5, 0.52, 0.9]), 0.1, 0.0, 1.0)
    assert np.diff(heights[[0, 1, 2, 3]]).min() > 0.0999
    assert 0.1 <= heights.min() and heights.max() <= 0.9


def test_labels_of_a_crowd_at_the_bottom_stay_inside_with_one_at_the_top():
    heights = pushed_apart(np.array([0.12, 0.99, 0.11, 0.13, 0.14, 0.15, 0.16, 0.1]), 0.1, 0.0, 1.0)
    np.testing.assert_allclose(heights, [0.3, 0.9, 0.2, 0.4, 0.5, 0.6, 0.7, 0.1])
    assert np.diff(np.sort(heights)).min() > 0.0999
    assert 0.1 <= heights.min() and heights.max() <= 0.9


# ---------------------------------------------------------------------------------------------------
# All of it


def test_fashion_from_raw_files_to_the_report_and_again(fashion_root, tmp_path, capsys):
    command = ["compare", "--preset", "fashion-mnist", "--data-root", fashion_root, "--jobs", "1"]
    command += ["--methods", "1lora", "--seeds", "0", "--sweep-rates", "0.001", "--max-train-time", "0.2s"]
    command += ["--eval-every", "0.1s", "--base-steps", "2", "--base-vae-steps", "2", "--classifier-epochs", "1"]
    command += ["--num-images", "8", "--num-inference-steps", "2", "--batch-size", "4"]
    command += [
        "--output-dir",
        tmp_path / "runs",
        "--report-dir",
        tmp_path / "docs",
        "--cache-dir",
        tmp_path / "cache",
    ]
    settings = benchmark.parse(list(map(str, command)))
    first = compare(settings)
    assert compare(settings) == first  # nothing is run again
    assert "| 1LoRA |" in capsys.readouterr().out
    report = json.loads((tmp_path / "docs/fashion-mnist.json").read_text())
    (run,) = report["runs"]["1lora"]
    assert run["job"]["id2label"] == {"0": "sandal", "1": "sneaker", "2": "ankle boot"}
    assert Image.open(tmp_path / "cache/fashion-base/samples.png").size == (10 * 34 + 2, 7 * 34 + 2)
    assert len(list((tmp_path / "runs/runs").glob("*.json"))) == 1
    assert "FD(fashion-mnist)" in (tmp_path / "docs/fashion-mnist.md").read_text()
