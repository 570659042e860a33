"""train_dit.py on a tiny pipeline: what it writes, what its result depends on, how it ends and how it fails."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import make_dit
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from PIL import Image
from safetensors.torch import load_file

import train_dit
from onelora_diffusion.saving import read_adapter
from train_dit import main, parse_command_line, recipe

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random pipeline for images of 16 by 16, latents of 8 by 8."""
    folder = tmp_path_factory.mktemp("base")
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=4, **blocks)
    DiTPipeline(make_dit(), vae, DDIMScheduler(clip_sample=False)).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def train(base, tmp_path):
    """Runs the script's main in this process; returns the run's folder."""

    def run(name="run", exit_code=0, **changes):
        short = dict(base=str(base), output_dir=tmp_path / name, max_steps=4, batch_size=8, log_every=1)
        settings = recipe("digits", **(short | dict(sample_every=0, checkpoint_every=2) | changes))
        assert main(settings) == exit_code
        return settings.output_dir

    return run


def adapter_of(run):
    return load_file(run / "onelora_weights.safetensors")


def losses_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["mse"], line["vb"]) for line in lines}


def assert_same_run(one, other, tolerance=0.0):
    ours, theirs = losses_of(one), losses_of(other)
    assert ours.keys() == theirs.keys()
    assert all(np.allclose(ours[step], theirs[step], rtol=0, atol=tolerance) for step in ours)
    for name, tensor in adapter_of(one).items():
        assert torch.allclose(tensor, adapter_of(other)[name], rtol=0, atol=tolerance), name


def call_at_step(monkeypatch, step, function):
    """Calls a function inside the given update of the next run (1 is the first)."""
    losses, calls = train_dit.training_losses, []

    def counted(*args):
        calls.append(1)
        if len(calls) == step:
            function()
        return losses(*args)

    monkeypatch.setattr(train_dit, "training_losses", counted)


def fails_with(message, settings):
    with pytest.raises(SystemExit) as caught:
        main(settings)
    assert message in caught.value.code and "\n" not in caught.value.code
    return caught.value.code


def test_a_run_writes_what_sampling_and_evaluation_need(train, base):
    run = train(sample_every=4, sample_steps=2, log_every=2, ema_decay=0.5)
    assert {path.name for path in run.iterdir()} == {
        *("checkpoints", "metrics.jsonl", "onelora_weights.safetensors", "samples", "settings.json")
    }
    adapter = read_adapter(run)
    assert adapter.id2label == {0: "5", 1: "6", 2: "7", 3: "8", 4: "9"}
    assert (adapter.base, adapter.config.num_classes, adapter.training["steps"]) == (str(base), 5, 4)
    assert sum(tensor.numel() for tensor in adapter.tensors.values()) == adapter.training["num_trainable_params"]
    grid = np.array(Image.open(run / "samples" / "step-00000004.png"))
    assert grid.shape == (4 * 18 + 2, 5 * 18 + 2, 3) and grid.std() > 10
    assert json.loads((run / "settings.json").read_text())["ema_decay"] == 0.5

    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert list(line) == ["step", "loss", "mse", "vb", "lr", "seconds", "images_per_second"]
    assert line["loss"] == pytest.approx(line["mse"] + line["vb"], rel=1e-5)

    # What is saved is the average of the values after each update.
    stored = load_file(run / "checkpoints/step-00000004/tensors.safetensors")
    halfway = load_file(run / "checkpoints/step-00000002/tensors.safetensors")
    name = "transformer_blocks.0.ff.net.2.onelora_b"
    assert torch.equal(adapter.tensors[name], stored[f"ema.{name}"])
    assert not torch.equal(stored[f"ema.{name}"], stored[f"trained.{name}"])
    assert not torch.equal(halfway[f"trained.{name}"], stored[f"trained.{name}"])


def test_accumulation_and_gradient_checkpointing_change_nothing(train):
    one = train("one")
    assert_same_run(one, train("accumulated", gradient_accumulation_steps=4), tolerance=1e-5)
    assert_same_run(one, train("recomputed", gradient_checkpointing=True), tolerance=1e-5)


ONE_OF_TWO_STOPS = """
import os, sys, train_dit
from itertools import count
from onelora_diffusion.training.stopping import Stop

asked = count()
Stop.asked = lambda stop: int(os.environ["RANK"] == "1" and next(asked) >= 5)  # its budget is used up after 5 steps
sys.exit(train_dit.main(train_dit.parse_command_line(sys.argv[1:])))
"""


def test_two_processes_train_what_one_does_and_end_at_the_same_step(train, base, tmp_path):
    run, script = tmp_path / "two", tmp_path / "one_of_two_stops.py"
    script.write_text(ONE_OF_TWO_STOPS)
    flags = "--batch-size 8 --log-every 1 --sample-every 0 --gradient-accumulation-steps 2"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    command += [*flags.split(), "--base", str(base), "--output-dir", str(run)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "the time budget is used up at step 5" in done.stdout
    assert read_adapter(run).training["num_processes"] == 2
    assert_same_run(train("one", max_steps=5), run, tolerance=1e-5)


def test_four_steps_are_two_and_a_resume_and_two_bit_for_bit(train):
    whole = train("whole", log_every=3, max_steps=6)
    halves = train("halves", log_every=3, max_steps=2)
    assert halves == train("halves", log_every=3, max_steps=6)
    assert_same_run(whole, halves)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_a_checkpoint_and_the_same_command_goes_on(train, monkeypatch, number):
    with monkeypatch.context() as patch:
        call_at_step(patch, 3, lambda: signal.raise_signal(number))
        run = train(exit_code=128 + number)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]
    assert read_adapter(run).training["steps"] == 3
    train()
    assert_same_run(train("whole"), run)


def test_a_run_that_was_killed_goes_on_from_its_newest_whole_checkpoint(train, tmp_path, monkeypatch, capsys):
    class Killed(BaseException):
        pass

    def kill():
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        call_at_step(patch, 6, kill)
        train(max_steps=8)
    newest = tmp_path / "run" / "checkpoints" / "step-00000004"
    (newest / "tensors.safetensors").write_bytes(b"cut")
    run = train(max_steps=8)
    said = capsys.readouterr().out
    assert f"{newest} is damaged" in said and "step-00000002" in said.split("resuming")[1]
    assert_same_run(train("whole", max_steps=8), run)


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(train, base, tmp_path, log_every):
    train(max_steps=1, learning_rate=1e30)
    settings = recipe("digits", base=str(base), output_dir=tmp_path / "run", batch_size=8, learning_rate=1e30)
    settings.log_every, settings.checkpoint_every = log_every, 3
    message = fails_with("loss is nan at step 2, with learning rate 1e+30", settings)
    assert "step-00000001. Go on" in message
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_finished_run_is_left_alone_goes_on_with_more_steps_or_starts_over(train, capsys):
    run = train()
    before = (run / "onelora_weights.safetensors").stat().st_mtime_ns
    train()
    assert "finished at step 4, nothing to do" in capsys.readouterr().out
    assert (run / "onelora_weights.safetensors").stat().st_mtime_ns == before
    train(max_steps=5)
    assert_same_run(run, train("whole", max_steps=5))
    train(fresh=True)
    assert_same_run(run, train("short"))


def test_the_time_budget_ends_a_run_and_counts_earlier_time(train, capsys):
    run = train(max_steps=2)
    file = run / "checkpoints" / "step-00000002" / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"seconds": 3600}))
    train(max_train_time="1h")
    assert "finished at step 2, nothing to do" in capsys.readouterr().out
    train(max_train_time="2h")
    assert read_adapter(run).training["steps"] == 4 and 3600 < read_adapter(run).training["seconds"] < 7200

    run = train("short", max_steps=None, max_train_time="0.1s")
    assert "the time budget is used up at step" in capsys.readouterr().out
    assert read_adapter(run).training["seconds"] >= 0.1


def test_changed_settings_are_listed_and_refused_unless_allowed(train, base, tmp_path):
    run = train(learning_rate=1e-3)
    changed = dict(base=str(base), output_dir=run, batch_size=8, max_steps=5, sample_every=0)
    fails_with("learning_rate was 0.001 and is 0.005, seed was 0 and is 9", recipe("digits", **changed, seed=9))
    assert main(recipe("digits", **changed, seed=9, allow_changed_settings=True)) == 0
    changed |= dict(max_steps=6, bias=True, allow_changed_settings=True, seed=9)
    fails_with("it is of another adapter: ", recipe("digits", **changed))


def test_a_full_disk_is_said_and_training_goes_on(train, monkeypatch, capsys):
    def full(folder, step, *args):
        if step == 4:
            raise OSError("No space left on device")
        return save(folder, step, *args)

    save = train_dit.save_checkpoint
    monkeypatch.setattr(train_dit, "save_checkpoint", full)
    run = train(max_steps=5)
    said = capsys.readouterr().out
    assert "no checkpoint at step 4 (No space left on device); the last good one is" in said
    assert read_adapter(run).training["steps"] == 5


def test_vectors_and_class_table_have_their_own_learning_rates(train):
    run = train(max_steps=1, learning_rate=1e-3, class_learning_rate=1e-2, warmup_steps=2)
    stored = load_file(run / "checkpoints/step-00000001/tensors.safetensors")
    start = load_file(train("start", max_steps=1, learning_rate=0.0) / "checkpoints/step-00000001/tensors.safetensors")
    moved = {n: (stored[n] - start[n]).abs().max().item() for n in stored if n.startswith("trained.")}
    # Adam's first step is the learning rate; half of it at the first of two warm-up steps.
    assert moved.pop("trained.class_embedding.weight") == pytest.approx(5e-3, rel=1e-3)
    assert all(distance == pytest.approx(5e-4, rel=1e-2) for distance in moved.values())


@pytest.mark.parametrize("label_drop", [0.0, 1.0])
def test_dropped_labels_train_the_null_row_and_no_other(train, label_drop):
    run = train(max_steps=1, batch_size=32, label_drop=label_drop)
    gradient = load_file(run / "checkpoints/step-00000001/tensors.safetensors")["exp_avg.class_embedding.weight"]
    assert gradient.any(1).tolist() == [label_drop == 0] * 5 + [label_drop == 1]


def test_min_snr_weights_by_hand():
    scheduler = DDIMScheduler()
    scheduler.alphas_cumprod = torch.tensor([0.9, 0.5, 0.1])  # signal to noise 9, 1 and 1 / 9
    weights = train_dit.min_snr_weights(torch.tensor([0, 1, 2]), scheduler, gamma=5.0)
    assert weights.tolist() == pytest.approx([5 / 9, 1, 1])


@pytest.fixture
def food(tmp_path):
    """Food-101's tree as torchvision reads it, with three classes of four images."""
    folder, names = tmp_path / "food-101", {}
    for label, name in enumerate(["apple_pie", "pad_thai", "sushi"]):
        names[name] = [f"{name}/{number}" for number in range(4)]
        (folder / "images" / name).mkdir(parents=True)
        for number, image in enumerate(names[name]):
            pixels = np.random.default_rng((label, number)).integers(0, 256, (24, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"{image}.jpg")
    (folder / "meta").mkdir()
    (folder / "meta" / "train.json").write_text(json.dumps(names))
    return tmp_path


def food_command(food, base, *more):
    flags = "--dataset food101 --mixed-precision no --max-steps 4 --batch-size 8 --log-every 1 --num-workers 1"
    return parse_command_line([*flags.split(), "--data-root", str(food), "--base", str(base), *more])


def test_food101_trains_the_same_from_cached_latents_and_from_images(food, base):
    assert main(food_command(food, base, "--output-dir", str(food / "cached"))) == 0
    assert main(food_command(food, base, "--output-dir", str(food / "images"), "--latent-cache-gb", "0")) == 0
    assert_same_run(food / "cached", food / "images", tolerance=1e-5)
    adapter = read_adapter(food / "cached")
    assert adapter.id2label == {0: "apple pie", 1: "pad thai", 2: "sushi"}
    assert adapter.tensors["class_embedding.weight"].shape == (4, 32)


@pytest.mark.parametrize("cache", ["0", "1"])
def test_a_broken_image_is_named_in_one_line(food, base, cache):
    broken = food / "food-101/images/sushi/3.jpg"
    broken.write_bytes(b"no image")
    settings = food_command(food, base, "--output-dir", str(food / "run"), "--latent-cache-gb", cache)
    fails_with(f"train_dit.py: {broken} is not a readable image", settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(base="nowhere"), "base model 'nowhere': no such folder"),
        (dict(dataset="food101", data_root=Path("nowhere")), "no Food-101 in nowhere/food-101"),
        (dict(method="lorra"), "unknown method 'lorra'"),
        (dict(targets=("to_z",)), "target 'to_z' matches no linear layer"),
        (dict(batch_size=9, gradient_accumulation_steps=2), "a batch of 9 images cannot be shared"),
        (dict(max_train_time="1x"), "'1x' is not a duration"),
        (dict(max_train_time=None, max_steps=None), "training would never end"),
        (dict(lr_schedule="cosine", max_steps=None), "the cosine schedule ends at --max-steps"),
        (dict(mixed_precision="fp16"), "fp16 needs a GPU"),
        (dict(keep_checkpoints=0), "--keep-checkpoints must be at least 1, not 0"),
        (dict(track="wandb"), "pip install wandb"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(base, tmp_path, changes, message):
    short = dict(dataset="digits", base=str(base), output_dir=tmp_path / "run", batch_size=8)
    settings = train_dit.Settings(**(short | changes))
    if settings.mixed_precision == "fp16" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    fails_with(message, settings)
    assert not (tmp_path / "run").exists()


def test_unknown_flags_fail_and_each_dataset_has_its_defaults(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_command_line(["--learning-rat", "1"])
    assert caught.value.code == 2 and "--learning-rat" in capsys.readouterr().err
    assert parse_command_line([]) == recipe("digits")
    assert parse_command_line(["--dataset=food101"]).base == "facebook/DiT-XL-2-256"
    settings = parse_command_line(["--batch-size", "7", "--dataset", "imagefolder"])
    assert (settings.batch_size, settings.output_dir) == (7, Path("runs/imagefolder"))


def test_tensorboard_gets_the_lines_of_metrics(train):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(track="tensorboard")
    events = EventAccumulator(str(run / "onelora-diffusion")).Reload()
    logged = {event.step: event.value for event in events.Scalars("loss")}
    assert logged == pytest.approx({step: losses[0] for step, losses in losses_of(run).items()})
