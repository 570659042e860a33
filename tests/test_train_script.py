"""train_dit.py on a tiny pipeline: what it writes, what its result depends on, how it ends and how it fails."""

import io
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import tyro
from diffusers import DDIMScheduler, DiTPipeline, FlowMatchEulerDiscreteScheduler
from launching import REPOSITORY, launch
from PIL import Image
from safetensors.torch import load_file
from tiny_models import make_dit_pipeline

from onelora_diffusion.cli import sample
from onelora_diffusion.cli.train_dit import RECIPES, main
from onelora_diffusion.evaluation import settings as evaluation_settings
from onelora_diffusion.families import family
from onelora_diffusion.storage.adapter_file import read_adapter
from onelora_diffusion.training import outputs, stopping, task
from onelora_diffusion.training import settings as settings_module
from onelora_diffusion.training.checkpoints import read_checkpoint
from onelora_diffusion.training.prompt_settings import PromptSettings
from onelora_diffusion.training.task import Task

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def settings_of(**changes):
    """The defaults of the code: what a test finds must not depend on the recipe of the digits."""
    return settings_module.Settings(**changes)


def parse_command_line(arguments):
    return settings_module.parse_command_line(arguments, RECIPES)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random pipeline for images of 16 by 16, latents of 8 by 8."""
    folder = tmp_path_factory.mktemp("base")
    make_dit_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def train(base, tmp_path):
    """Runs the script's main in this process; returns the run's folder."""

    def run(name="run", exit_code=0, **changes):
        short = dict(base=str(base), output_dir=tmp_path / name, max_steps=4, batch_size=8, log_every=1)
        settings = settings_of(**(short | dict(sample_every=0, checkpoint_every=2) | changes))
        assert main(settings) == exit_code
        return settings.output_dir

    return run


def adapter_of(run):
    return load_file(run / "onelora_weights.safetensors")


def losses_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["mse"], line["vb"]) for line in lines if "loss" in line}


def distances_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["distance"] for line in lines if "distance" in line}


# Losses are near 1, and a model this small rounds by 4 √300 eps. AdamW divides a gradient by its own size: trained
# values come apart by their 20 thousandths of movement times what an element of a gradient is rounded by, of itself.
ROUNDED = 1e-5


def assert_same_run(one, other, tolerance=0.0):
    ours, theirs = losses_of(one), losses_of(other)
    assert ours.keys() == theirs.keys()
    assert all(np.allclose(ours[step], theirs[step], rtol=0, atol=tolerance) for step in ours)
    for name, tensor in adapter_of(one).items():
        assert torch.allclose(tensor, adapter_of(other)[name], rtol=0, atol=tolerance), name


def call_at_step(monkeypatch, step, function):
    """Calls a function inside the given update of the next run (1 is the first)."""
    losses, calls = task.training_losses, []

    def counted(*args):
        calls.append(1)
        if len(calls) == step:
            function()
        return losses(*args)

    monkeypatch.setattr(task, "training_losses", counted)


def fails_with(message, settings):
    with pytest.raises(SystemExit) as caught:
        main(settings)
    assert message in caught.value.code and "\n" not in caught.value.code
    return caught.value.code


def test_a_run_writes_what_sampling_and_evaluation_need(train, base):
    run = train(sample_every=4, sample_steps=2, log_every=2, ema_decay=(0.5,))
    assert {path.name for path in run.iterdir()} == {
        *("checkpoints", "clock.json", "clock.lock", "data.json", "metrics.jsonl", "onelora_weights.safetensors"),
        *("samples", "settings.json"),
    }
    adapter = read_adapter(run)
    assert adapter.id2label == {digit: str(digit) for digit in range(10)}
    assert (adapter.base, adapter.config.num_classes, adapter.training["steps"]) == (str(base), 10, 4)
    assert sum(tensor.numel() for tensor in adapter.tensors.values()) == adapter.training["num_trainable_params"]
    grid = np.array(Image.open(run / "samples" / "step-00000004.png"))
    assert grid.shape == (4 * 18 + 2, 10 * 18 + 2, 3) and grid.std() > 10
    assert json.loads((run / "settings.json").read_text())["ema_decay"] == [0.5]

    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert list(line) == ["step", "loss", "mse", "vb", "lr", "seconds", "images_per_second"]
    assert line["loss"] == pytest.approx(line["mse"] + line["vb"], rel=1e-5)

    # What is saved is the average of the values after each update.
    stored = load_file(run / "checkpoints/step-00000004.safetensors")
    halfway = load_file(run / "checkpoints/step-00000002.safetensors")
    name = "transformer_blocks.0.ff.net.2.onelora_b"
    assert torch.equal(adapter.tensors[name], stored[f"ema.{name}"])
    assert not torch.equal(stored[f"ema.{name}"], stored[f"trained.{name}"])
    assert not torch.equal(halfway[f"trained.{name}"], stored[f"trained.{name}"])


def test_accumulation_and_gradient_checkpointing_change_nothing(train):
    one = train("one")
    assert_same_run(one, train("accumulated", gradient_accumulation_steps=4), tolerance=ROUNDED)
    assert_same_run(one, train("recomputed", gradient_checkpointing=True), tolerance=ROUNDED)


@pytest.mark.parametrize("prediction", ["flow", "v_prediction"])
def test_the_loss_and_the_sampler_are_those_of_the_bases_scheduler(train, base, tmp_path, prediction):
    other = (
        DDIMScheduler(prediction_type=prediction) if prediction != "flow" else FlowMatchEulerDiscreteScheduler(1000, 3)
    )
    pipeline = DiTPipeline.from_pretrained(base)
    pipeline.register_modules(scheduler=other)
    pipeline.save_pretrained(tmp_path / "base")
    changes = dict(base=str(tmp_path / "base"), log_every=2, timestep_density="logit-normal", label_drop=0.0)
    if prediction == "flow":
        changes |= dict(loss_weighting="cosmap")
    whole = train("whole", sample_every=4, sample_steps=2, **changes)
    assert np.array(Image.open(whole / "samples" / "step-00000004.png")).std() > 10
    halves = train("halves", max_steps=2, **changes)
    train("halves", **changes)
    for name, tensor in adapter_of(whole).items():
        assert torch.equal(tensor, adapter_of(halves)[name]), name
    line = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    assert ("vb" in line) == (prediction != "flow")
    if prediction == "flow":  # 0.64 <= 2 / π (1 - 2σ + 2σ²) <= 1.28
        assert 0.63 < line["loss"] / line["mse"] < 1.28
        fails_with(
            "--snr-gamma weighs the error of noise",
            settings_of(**changes, output_dir=tmp_path / "other", snr_gamma=5.0),
        )


ONE_OF_TWO_STOPS = """
import os, runpy, sys
from pathlib import Path
from onelora_diffusion.training import randomness
from onelora_diffusion.training.stopping import Stop

rank, steps, draw_step = os.environ.get("RANK"), [], randomness.draw_step
randomness.draw_step = lambda seed, step, *args: steps.append(step) or draw_step(seed, step, *args)
Stop.asked = lambda stop: int(rank == "1" and len(steps) >= 5)  # its budget is used up after 5 steps
try:
    runpy.run_path("train_dit.py", run_name="__main__")
finally:
    Path(sys.argv[0]).with_name(f"rank-{rank}").write_text(f"{len(steps)} steps")
"""


@pytest.fixture
def defaults(tmp_path):
    """A recipe that changes nothing of the code's defaults."""
    path = tmp_path / "defaults.yaml"
    path.write_text("dataset: digits\n")
    return path


def test_accelerate_launch_on_cpus_trains_with_two_processes_that_end_at_the_same_step(
    train, base, defaults, tmp_path
):
    run, script = tmp_path / "two", tmp_path / "one_of_two_stops.py"
    script.write_text(ONE_OF_TWO_STOPS)
    flags = "--batch-size 8 --log-every 1 --sample-every 0 --gradient-accumulation-steps 2".split()
    said = launch(
        "--num_processes", 2, "--cpu", script, "--config", defaults, *flags, "--base", base, "--output-dir", run
    )
    assert "the time budget is used up at step 5" in said
    assert {path.name: path.read_text() for path in tmp_path.glob("rank-*")} == {
        "rank-0": "5 steps",
        "rank-1": "5 steps",
    }
    assert read_adapter(run).training["num_processes"] == 2
    assert_same_run(train("one", max_steps=5), run, tolerance=ROUNDED)


def test_two_machines_without_a_common_disk_go_on_as_one(train, base, defaults, tmp_path):
    """The second sees neither the checkpoint nor the first one's latents; everything lies below its own folder."""
    train("0/run", max_steps=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    machines = []
    for number in range(2):
        flags = f"--max-steps 4 --batch-size 8 --log-every 1 --sample-every 0 --checkpoint-every 2 --config {defaults}"
        environment = {"RANK": str(number), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        (tmp_path / str(number)).mkdir(exist_ok=True)
        command = [sys.executable, REPOSITORY / "train_dit.py", *flags.split(), "--base", base, "--output-dir", "run"]
        kept = {"cwd": tmp_path / str(number), "env": os.environ | environment | {"PYTHONPATH": str(REPOSITORY)}}
        machines.append(subprocess.Popen(command, **kept, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    said = [machine.communicate(timeout=300)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert "resuming run/checkpoints/step-00000002" in said[0] and "output in run" not in said[1]
    assert_same_run(train("whole"), tmp_path / "0" / "run", tolerance=ROUNDED)
    latents = [sorted(path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*")) for name in "01"]
    assert [path for path in latents[0] if path.parts[0] == "latents"] == latents[1]  # all of them, and no run


def test_a_base_that_two_processes_share_out_trains_what_one_does(train, base, defaults, tmp_path):
    flags = "--batch-size 8 --max-steps 3 --log-every 1 --sample-every 3 --sample-steps 2 --max-grad-norm 0.1".split()
    flags += ["--eval-every", 3, "--eval-images", 9, "--eval-steps", 2, "--engine", "fsdp2", "--config", defaults]
    run = tmp_path / "shared"
    launch("--num_processes", 2, "--cpu", "train_dit.py", *flags, "--base", base, "--output-dir", run)
    options = dict(sample_every=3, sample_steps=2, eval_every=3, eval_images=9, eval_steps=2, max_grad_norm=0.1)
    one = train("one", max_steps=3, **options)
    assert_same_run(one, run, tolerance=ROUNDED)
    assert distances_of(run) == pytest.approx(distances_of(one), rel=1e-3)  # an image may round differently
    grids = [np.array(Image.open(each / "samples/step-00000003.png")).astype(int) for each in (run, one)]
    assert np.abs(grids[0] - grids[1]).max() <= 1


def test_compiled_blocks_train_the_same(train, monkeypatch):
    # The default compiler takes a minute; this backend traces the same graphs and runs them as they are.
    compiled = []

    def compile_eagerly(module):
        compiled.append(module)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    assert_same_run(train("plain", max_steps=2), train("compiled", max_steps=2, compile=True), tolerance=ROUNDED)
    assert len(compiled) == 2


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
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step-00000002.safetensors",
        "step-00000003.safetensors",
    ]
    assert read_adapter(run).training["steps"] == 3
    train()
    assert_same_run(train("whole"), run)


def test_a_signal_while_images_are_encoded_ends_the_run_before_its_first_step(train, monkeypatch):
    encode = family.encode_moments

    def encode_and_stop(*args):
        signal.raise_signal(signal.SIGTERM)
        return encode(*args)

    with monkeypatch.context() as patch:
        patch.setattr(family, "encode_moments", encode_and_stop)
        run = train(exit_code=128 + signal.SIGTERM)
    assert read_adapter(run).training["steps"] == 0
    train()
    assert_same_run(run, train("whole"))


def test_a_run_that_was_killed_goes_on_from_its_newest_whole_checkpoint(train, tmp_path, monkeypatch, capsys):
    class Killed(BaseException):
        pass

    def kill():
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        call_at_step(patch, 6, kill)
        train(max_steps=8)
    newest = tmp_path / "run" / "checkpoints" / "step-00000004.safetensors"
    newest.write_bytes(b"cut")
    run = train(max_steps=8)
    said = capsys.readouterr().out
    assert f"{newest} is damaged" in said and "step-00000002" in said.split("resuming")[1]
    assert_same_run(train("whole", max_steps=8), run)


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(train, base, tmp_path, log_every):
    train(max_steps=1, learning_rate=1e30)
    settings = settings_of(base=str(base), output_dir=tmp_path / "run", batch_size=8, learning_rate=1e30)
    settings.log_every, settings.checkpoint_every = log_every, 3
    message = fails_with("loss is nan at step 2, with learning rate 1e+30", settings)
    assert "step-00000001.safetensors. Go on" in message
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001.safetensors"]


def test_a_loss_that_is_not_finite_before_any_checkpoint_is_no_advice_to_go_on(base, tmp_path):
    short = dict(base=str(base), output_dir=tmp_path / "run", batch_size=8, log_every=1, sample_every=0)
    message = fails_with("last good checkpoint: none. Start over", settings_of(**short, learning_rate=1e30))
    assert "Go on" not in message


def test_a_damaged_or_missing_adapter_of_a_finished_run_is_written_anew(train, capsys):
    run = train(ema_decay=(0.1, 0.9))
    for name, harm in (
        ("onelora_weights.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-9])),
        ("onelora_weights.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-9] + b"\1" * 9)),
        ("onelora_weights_ema_0.9.safetensors", Path.unlink),
    ):
        before = {key: tensor.clone() for key, tensor in load_file(run / name).items()}  # it maps the file
        harm(run / name)
        train(ema_decay=(0.1, 0.9))
        said = capsys.readouterr().out
        assert ("written anew from" in said and name in said) == (harm is not Path.unlink)
        assert "all 4 steps done" in said
        after = load_file(run / name)
        assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    train(ema_decay=(0.1, 0.9))
    assert "nothing to do" in capsys.readouterr().out


def test_a_second_command_in_one_folder_is_refused_and_the_first_goes_on(train, base, tmp_path, monkeypatch):
    def start_another():
        command = [sys.executable, "train_dit.py", "--base", str(base), "--output-dir", str(tmp_path / "run")]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert f"train_dit.py: {tmp_path}/run is in use by process {os.getpid()} on" in done.stderr

    with monkeypatch.context() as patch:
        call_at_step(patch, 3, start_another)
        run = train()
    assert_same_run(run, train("whole"))
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_signal_while_blocks_are_compiled_ends_the_run_at_once(train, tmp_path, monkeypatch):
    def compile_for_ever(module):
        module._compiled_call_impl = lambda *args, **kwargs: ((tmp_path / "compiling").touch(), time.sleep(600))

    if not (child := os.fork()):
        torch.set_num_threads(1)
        monkeypatch.setattr(torch.nn.Module, "compile", compile_for_ever)
        train(compile=True)
        os._exit(0)
    while not (tmp_path / "compiling").exists():
        time.sleep(0.05)
    os.kill(child, signal.SIGTERM)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
    train()
    assert_same_run(tmp_path / "run", train("whole"))


def test_a_signal_in_samples_leaves_them_and_not_the_run(train, monkeypatch):
    def sample(*args):
        signal.raise_signal(signal.SIGTERM)
        time.sleep(600)

    with monkeypatch.context() as patch:
        patch.setattr(Task, "sample_grid", sample)
        run = train(sample_every=3, exit_code=128 + signal.SIGTERM)
    assert read_adapter(run).training["steps"] == 3 and not (run / "samples").exists()
    train()
    assert_same_run(run, train("whole"))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's end")
def test_processes_whose_launcher_is_killed_stop_at_one_step_with_a_checkpoint(base, defaults, tmp_path):
    run = tmp_path / "run"
    flags = f"--config {defaults} --base {base} --output-dir {run} --batch-size 8 --log-every 1 --sample-every 0"
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", "--num_processes", "2", "--cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(tmp_path / "said", "w") as said:
        launcher = subprocess.Popen(
            [*command, "train_dit.py", *flags.split(), "--max-steps", "100000"],
            cwd=REPOSITORY,
            env=environment,
            stdout=said,
            stderr=said,
        )
        wait_for(lambda: (run / "metrics.jsonl").exists() and len(losses_of(run)) > 2)
        (torchrun,) = psutil.Process(launcher.pid).children()
        processes = [torchrun, *torchrun.children()]
        assert len(processes) == 3
        launcher.kill()
        launcher.wait()
        gone, alive = psutil.wait_procs(processes, timeout=100)
    assert not alive
    step = read_adapter(run).training["steps"]
    assert [path.stem for path in (run / "checkpoints").iterdir()] == [f"step-{step:08}"]
    assert f"stopped by SIGTERM at step {step}" in (tmp_path / "said").read_text()


def wait_for(condition, seconds=200):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


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


def test_the_time_budget_ends_a_run_and_counts_earlier_time(train, monkeypatch, capsys):
    run = train(max_steps=2)
    (run / "clock.json").write_text(json.dumps({"seconds": 3600}))
    train(max_train_time="1h")
    assert "finished at step 2, nothing to do" in capsys.readouterr().out
    train(max_train_time="2h")
    assert read_adapter(run).training["steps"] == 4 and 3600 < read_adapter(run).training["seconds"] < 7200

    call_at_step(monkeypatch, 2, lambda: monkeypatch.setattr(stopping.Clock, "left", -1.0))
    run = train("short", max_steps=None, max_train_time="1h")
    assert "the time budget is used up at step 2" in capsys.readouterr().out
    assert read_adapter(run).training["steps"] == 2


def test_a_budget_that_ends_before_the_first_update_is_no_success(train, base, tmp_path, capsys):
    run = train(max_train_time="0.1s", exit_code=1)
    said = capsys.readouterr().out
    assert "train_dit.py: no update was made within --max-train-time 0.1s" in said and "Next:" not in said
    again = settings_of(base=str(base), output_dir=run, batch_size=8, max_train_time="0.1s", max_steps=4)
    fails_with("no update was made within --max-train-time 0.1s: the same command with more goes on", again)
    train()
    assert read_adapter(run).training["steps"] == 4


def test_the_next_commands_run_as_they_are_printed(train, tmp_path, monkeypatch, capsys):
    """From the folder where they are printed, with the script beside the one that ran, quoted for a shell."""
    monkeypatch.setattr(sys, "argv", [str(REPOSITORY / "train_dit.py")])
    train("it's a run; rm -rf x", max_steps=1, data_root=tmp_path / "its data")
    printed = capsys.readouterr().out.splitlines()
    lines = printed[printed.index("Next:") + 1 :]
    assert len(lines) == 2
    python, script, *flags = shlex.split(lines[0])
    assert Path(script) == REPOSITORY / "sample.py" and shutil.which(python)
    settings = tyro.cli(sample.Settings, args=[*flags, "--per-class", "1", "--num-inference-steps", "2"])
    sample.main(settings)
    assert (tmp_path / "it's a run; rm -rf x" / "sample.png").exists()
    python, script, *flags = shlex.split(lines[1])
    read = evaluation_settings.parse(flags, None)
    assert Path(script) == REPOSITORY / "eval_fid.py"
    assert (read.adapter, read.data_root) == ((tmp_path / "it's a run; rm -rf x",), tmp_path / "its data")

    assert [shlex.split(each)[1:] for each in settings_module.Settings().next_steps()] == [
        [str(REPOSITORY / "sample.py")],
        [str(REPOSITORY / "eval_fid.py")],
    ]
    prompted = PromptSettings(images="some", prompt='a "sks" dog', output_dir=Path("runs/a b"))
    (line,) = prompted.next_steps(references=2)
    read = tyro.cli(sample.Settings, args=shlex.split(line)[2:])
    assert (read.adapter, read.prompts) == (Path("runs/a b"), ('a "sks" dog',))
    assert read.reference == (Path("IMAGE"), Path("IMAGE"))


def test_changed_settings_are_listed_and_refused_unless_allowed(train, base, tmp_path):
    run = train(learning_rate=1e-3)
    changed = dict(base=str(base), output_dir=run, batch_size=8, max_steps=5, sample_every=0)
    fails_with("learning_rate was 0.001 and is 0.005, seed was 0 and is 9", settings_of(**changed, seed=9))
    assert main(settings_of(**changed, seed=9, allow_changed_settings=True)) == 0
    changed |= dict(max_steps=6, bias=True, allow_changed_settings=True, seed=9)
    fails_with("it is of another adapter: ", settings_of(**changed))


def write_classes(folder, *names, count=2):
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            Image.new("RGB", (16, 16), (9 * number, index, 0)).save(folder / name / f"{index}.png")
    return folder


def test_other_data_are_refused_by_name_unless_allowed_and_the_same_data_elsewhere_go_on(
    train, base, tmp_path, capsys
):
    pets, fruit = write_classes(tmp_path / "pets", "cat", "dog"), write_classes(tmp_path / "fruit", "apple", "pear")
    run = train(dataset="imagefolder", data_root=pets, max_steps=1)
    state = read_checkpoint(run / "checkpoints/step-00000001.safetensors").state
    assert state["data"]["classes"] == ["cat", "dog"] and json.loads((run / "data.json").read_text()) == state["data"]

    changed = dict(base=str(base), dataset="imagefolder", output_dir=run, batch_size=8, log_every=1, sample_every=0)
    for steps in (1, 2):  # a finished run too
        fails_with(
            "trained on other data: on 4 images of cat, dog, and not on 4 images of apple, pear. Resume all the same",
            settings_of(**changed, data_root=fruit, max_steps=steps),
        )
    (tmp_path / "moved").mkdir()
    pets = pets.rename(tmp_path / "moved" / "pets")
    train(dataset="imagefolder", data_root=pets, max_steps=2)
    assert read_adapter(run).training["steps"] == 2
    write_classes(pets, "cat", "dog", count=3)
    fails_with("on 4 images of cat, dog, and not on 6 images", settings_of(**changed, data_root=pets, max_steps=3))
    for name in ("cat", "dog"):
        (pets / name / "0.png").unlink()
    fails_with(
        "on other 4 images of cat, dog, and not on these: names, sizes, contents or captions",
        settings_of(**changed, data_root=pets, max_steps=3),
    )
    train(dataset="imagefolder", data_root=fruit, max_steps=3, allow_changed_settings=True)
    assert read_adapter(run).id2label == {0: "apple", 1: "pear"} and read_adapter(run).training["steps"] == 3
    train(dataset="imagefolder", data_root=pets, max_steps=1, fresh=True)
    assert read_adapter(run).id2label == {0: "cat", 1: "dog"} and read_adapter(run).training["steps"] == 1
    assert "does not say" not in capsys.readouterr().out


def test_a_full_disk_is_said_and_training_goes_on(train, monkeypatch, capsys):
    def full(folder, step, *args):
        if step == 4:
            raise OSError("No space left on device")
        return save(folder, step, *args)

    save = outputs.save_checkpoint
    monkeypatch.setattr(outputs, "save_checkpoint", full)
    run = train(max_steps=5)
    said = capsys.readouterr().out
    assert "no checkpoint at step 4 (No space left on device); the last good one is" in said
    assert read_adapter(run).training["steps"] == 5


def test_several_averages_are_kept_and_saved(train):
    run = train("both", ema_decay=(0.1, 0.9), max_steps=2)
    assert run == train("both", ema_decay=(0.1, 0.9))
    other = train("other", ema_decay=(0.9,))
    second = read_adapter(run / "onelora_weights_ema_0.9.safetensors")
    assert second.training["ema_decay"] == 0.9
    assert all(torch.equal(second.tensors[name], tensor) for name, tensor in read_adapter(other).tensors.items())
    assert_same_run(run, train("first", ema_decay=(0.1,)))


EVALUATED = dict(eval_every=2, eval_images=7, eval_steps=2, max_steps=6)


def test_evaluations_are_logged_and_plotted_and_the_best_adapter_is_kept(train, monkeypatch):
    from onelora_diffusion.evaluation import metrics

    distances, measured = iter([3.0, 1.0, 2.0]), []

    def distance(generated, real, features, settings):
        measured.append((generated.statistics.count, real.statistics.count))
        return {"distance": next(distances)}

    monkeypatch.setitem(metrics.METRICS, "fd", replace(metrics.METRICS["fd"], compute=distance))
    run = train(**EVALUATED)
    assert measured == [(7, 1442)] * 3 and distances_of(run) == {2: 3.0, 4: 1.0, 6: 2.0}
    adapter, last = read_adapter(run), read_adapter(run / "onelora_weights_last.safetensors")
    assert (adapter.training["steps"], adapter.training["best"]["step"]) == (6, 4)
    assert adapter.training["best"]["distance"] == 1.0 and 0 <= adapter.training["best"]["recognition"] <= 1
    stored = load_file(run / "checkpoints/step-00000004.safetensors")
    final = load_file(run / "checkpoints/step-00000006.safetensors")
    for name, tensor in adapter.tensors.items():
        assert torch.equal(tensor, stored[f"ema.{name}"]) and torch.equal(last.tensors[name], final[f"ema.{name}"])
    assert np.array(Image.open(run / "distance.png")).std() > 10


def test_evaluations_do_not_depend_on_interruptions(train, monkeypatch):
    whole = train("whole", **EVALUATED)
    with monkeypatch.context() as patch:
        call_at_step(patch, 6, lambda: signal.raise_signal(signal.SIGTERM))
        run = train(exit_code=128 + signal.SIGTERM, **EVALUATED | dict(max_steps=8))
    assert 6 not in distances_of(run)  # the one at this step was left midway
    train(**EVALUATED | dict(max_steps=8))
    train("whole", **EVALUATED | dict(max_steps=8))
    ours, theirs = distances_of(run), distances_of(whole)
    assert ours == {step: distance for step, distance in theirs.items() if step != 6}
    assert len(theirs) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(eval_features="pixel"), "unknown features 'pixel'"),
        (dict(eval_reference=Path("none.safetensors")), "no statistics at 'none.safetensors'"),
        (dict(eval_images=1), "--eval-images must be at least 2, not 1"),
    ],
)
def test_an_evaluation_that_cannot_be_made_fails_at_the_start(base, tmp_path, changes, message):
    fails_with(message, settings_of(base=str(base), output_dir=tmp_path / "run", eval_every=5, **changes))
    assert not (tmp_path / "run").exists()


def test_vectors_and_class_table_have_their_own_learning_rates(train):
    run = train(max_steps=1, learning_rate=1e-3, class_learning_rate=1e-2, warmup_steps=2)
    stored = load_file(run / "checkpoints/step-00000001.safetensors")
    start = load_file(train("start", max_steps=1, learning_rate=1e-30) / "checkpoints/step-00000001.safetensors")
    moved = {n: (stored[n] - start[n]).abs().max().item() for n in stored if n.startswith("trained.")}
    # Adam's first step is the learning rate; half of it at the first of two warm-up steps.
    assert moved.pop("trained.class_embedding.weight") == pytest.approx(5e-3, rel=1e-3)
    assert all(distance == pytest.approx(5e-4, rel=1e-2) for distance in moved.values())


@pytest.mark.parametrize("label_drop", [0.0, 1.0])
def test_dropped_labels_train_the_null_row_and_no_other(train, label_drop):
    run = train(max_steps=1, batch_size=128, label_drop=label_drop)
    gradient = load_file(run / "checkpoints/step-00000001.safetensors")["exp_avg.class_embedding.weight"]
    assert gradient.any(1).tolist() == [label_drop == 0] * 10 + [label_drop == 1]


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
    assert_same_run(food / "cached", food / "images", tolerance=ROUNDED)
    adapter = read_adapter(food / "cached")
    assert adapter.id2label == {0: "apple pie", 1: "pad thai", 2: "sushi"}
    assert adapter.tensors["class_embedding.weight"].shape == (4, 32)


def test_broken_images_are_skipped_and_counted_the_same_with_and_without_the_cache(food, base):
    for name in ("apple_pie/1", "sushi/3"):
        (food / f"food-101/images/{name}.jpg").write_bytes(b"no image")
    for name, cache in {"cached": "1", "cached-again": "1", "images": "0"}.items():
        flags = ["--broken-images", "skip", "--output-dir", str(food / name), "--latent-cache-gb", cache]
        assert main(food_command(food, base, *flags)) == 0
        assert read_adapter(food / name).training["num_broken_images"] == 2
    assert_same_run(food / "cached", food / "images", tolerance=ROUNDED)
    assert_same_run(food / "cached", food / "cached-again")
    assert len(list((food / "latents").iterdir())) == 1


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
        (dict(dataset="digitz", base="facebook/DiT-XL-2-256"), "unknown dataset 'digitz'"),
        (dict(learning_rate=float("nan")), "--learning-rate must be more than 0 and finite, not nan"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(base, tmp_path, changes, message):
    short = dict(dataset="digits", base=str(base), output_dir=tmp_path / "run", batch_size=8)
    settings = settings_of(**(short | changes))
    if settings.mixed_precision == "fp16" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    fails_with(message, settings)
    assert not (tmp_path / "run").exists()


def test_unknown_flags_fail_and_each_dataset_has_its_defaults(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_command_line(["--learning-rat", "1"])
    assert caught.value.code == 2 and "--learning-rat" in capsys.readouterr().err
    assert parse_command_line([]) == settings_module.recipe("digits", RECIPES)
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


def test_tensorboard_gets_pictures_and_goes_on_with_a_resumed_run(train, monkeypatch):
    """In one folder: what was told of steps after the checkpoint is forgotten, and told again."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracked = dict(track="tensorboard", sample_every=2, sample_steps=1, eval_every=2, eval_images=10, eval_steps=1)

    def fail():
        raise OSError("gone")

    with monkeypatch.context() as patch:  # after a line and no checkpoint of step 3
        call_at_step(patch, 4, fail)
        with pytest.raises(SystemExit):
            train(**tracked)
    run = train(**tracked)
    events = EventAccumulator(str(run / "onelora-diffusion"), purge_orphaned_data=True).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    for name in ("samples", "distance"):
        assert [event.step for event in events.Images(name)] == [2, 4]
    written = Image.open(run / "distance.png").convert("RGB")
    shown = Image.open(io.BytesIO(events.Images("distance")[-1].encoded_image_string))
    assert np.array_equal(np.array(shown), np.array(written))
    assert len(list((run / "onelora-diffusion").glob("*/hparams.yml"))) == 1

    train(fresh=True, max_steps=2, track="tensorboard")
    events = EventAccumulator(str(run / "onelora-diffusion"), purge_orphaned_data=True).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]


def test_wandb_goes_on_with_the_run_of_its_folder(train, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracked = dict(track="wandb", sample_every=2, sample_steps=1, eval_every=2, eval_images=10, eval_steps=1)
    run = train(max_steps=2, **tracked)
    identity = (run / "wandb-id").read_text()
    train(max_steps=4, **tracked)
    assert (run / "wandb-id").read_text() == identity
    parts = sorted((run / "wandb").glob("offline-run-*"))
    assert [part.name.rsplit("-", 1)[1] for part in parts] == [identity] * 2
    for part, step in zip(parts, (2, 4), strict=True):
        (picture,) = part.glob("files/media/images/samples_*.png")
        expected = Image.open(run / f"samples/step-{step:08}.png")
        assert np.array_equal(np.array(Image.open(picture)), np.array(expected))
        assert list(part.glob("files/media/images/distance_*.png"))
    train(max_steps=2, fresh=True, track="wandb")
    assert (run / "wandb-id").read_text() != identity
