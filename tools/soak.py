"""Kill a training run at random moments, train one for long: all as if nothing had happened.

    python tools/soak.py kills                     # 20 kills, every second inside a save
    python tools/soak.py launchers                 # SIGTERM and SIGKILL of each launcher
    python tools/soak.py steps                     # 10,000 steps of the smallest model

`kills` ends train_dit.py by SIGKILL after a random time, or while it writes a checkpoint, and starts it again, until
it has been killed often enough; then it may finish. Its adapter, averages and optimiser must be those of a run that
was left alone, bit for bit, and so must the losses; and its clock must have counted all the time that its processes
were alive. `launchers` ends what started the processes: they must stop at one step, with a checkpoint. `steps` watches
memory and open files all along, and resumes a copy of the run from the middle, which must end in the same adapter.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import psutil
import torch
import tyro
from safetensors.torch import load_file
from tqdm import tqdm

from benchmarks.tiny_dit import make_dit_pipeline
from onelora_diffusion.launch import started
from onelora_diffusion.storage.adapter_file import read_adapter
from onelora_diffusion.training.settings import Settings

sys.path.insert(0, str(Path(__file__).parents[1]))  # where train_dit.py is
ADAPTER = "onelora_weights.safetensors"


@dataclass
class Kills:
    """End a run by SIGKILL at random moments; the last start may finish."""

    kills: int = 20
    """How often."""
    max_steps: int = 400
    """Updates of the run, with a checkpoint every ten."""
    seed: int = 0
    """Of the moments."""


@dataclass
class Launchers:
    """End `accelerate launch` and torchrun; their processes must stop at one step, with a checkpoint."""

    times: int = 1
    """How often, for each launcher and each signal."""


@dataclass
class Steps:
    """Train for long; memory and open files must stay as they are, and a resume from the middle must be exact."""

    max_steps: int = 10_000
    """Updates of the run."""
    warmup: int = 1000
    """Updates after which memory is first looked at."""
    growth_mb: float = 16.0
    """By how much memory may grow from there on."""


def main(settings: Kills | Launchers | Steps) -> int:
    with tempfile.TemporaryDirectory() as folder:
        make_dit_pipeline().save_pretrained(Path(folder) / "base")
        problems = RUNS[type(settings)](settings, Path(folder))
    print("\n".join(problems) or "passed")
    return 1 if problems else 0


def settings_of(folder: Path, run: str, **changes) -> Settings:
    small = dict(base=str(folder / "base"), batch_size=4, log_every=7, max_train_time="24h", sample_every=0)
    return Settings(output_dir=folder / run, **(small | changes))


def start(settings: Settings, log: Path):
    """train_dit.py's main in a process of its own, forked from one that has imported it already."""
    # Killed processes leave tqdm's locks, which the tracker removes and complains about.
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["__main__", __name__, "onelora_diffusion.cli.train_dit", "sklearn.datasets"])
    process = processes.Process(target=train_quietly, args=(settings, log))
    process.start()
    return process


def train_quietly(settings: Settings, log: Path) -> None:
    from onelora_diffusion.cli import train_dit

    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    torch.set_num_threads(1)
    sys.exit(train_dit.main(settings, started()))


def finish(process, log: Path) -> float:
    """Returns for how many seconds the process has been alive."""
    began = psutil.Process(process.pid).create_time()
    process.join()
    if process.exitcode:
        raise SystemExit(f"train_dit.py ended with {process.exitcode}:\n{log.read_text()[-2000:]}")
    return time.time() - began


# ---------------------------------------------------------------------------------------------------
# kills


def kill_often(settings: Kills, folder: Path) -> list[str]:
    log = folder / "log.txt"
    changes = dict(max_steps=settings.max_steps, checkpoint_every=10, ema_decay=(0.9, 0.99))
    whole, killed = (settings_of(folder, run, **changes) for run in ("whole", "killed"))
    finish(start(whole, log), log)

    moments, killed_at, num_inside, newest, alive = random.Random(settings.seed), [], 0, 0, 0.0
    checkpoints = killed.output_dir / "checkpoints"
    for number in tqdm(range(settings.kills), unit="kill"):
        left = half_written(checkpoints)
        process = start(killed, log)
        began = psutil.Process(process.pid).create_time()
        if number % 2:
            while process.is_alive() and half_written(checkpoints) <= left:
                time.sleep(0.0005)
        else:
            target = newest + moments.randint(0, settings.max_steps // settings.kills)
            while process.is_alive() and (last_step(killed.output_dir) or -1) < target:
                time.sleep(0.01)
            process.join(timeout=moments.uniform(0, 0.2))
        if not process.is_alive():
            break
        process.kill()
        process.join()
        alive += time.time() - began
        num_inside += not half_written(checkpoints) <= left
        newest = max((int(path.stem.removeprefix("step-")) for path in checkpoints.glob("step-*")), default=0)
        killed_at.append(newest)
    alive += finish(start(killed, log), log)

    print(f"killed {len(killed_at)} times, {num_inside} of them inside a save, with these newest checkpoints:")
    print("  " + ", ".join(map(str, killed_at)))
    problems = differences(whole.output_dir, killed.output_dir)
    counted = json.loads((killed.output_dir / "clock.json").read_text())["seconds"]
    print(f"alive for {alive:.1f} s, of which the clock has counted {counted:.1f} s")
    if abs(alive - counted) > settings.kills + 1:
        problems.append(f"the clock counted {counted:.1f} s of {alive:.1f} s")
    if len(killed_at) < settings.kills:
        problems.append(f"the run was done after {len(killed_at)} kills: give more --max-steps")
    return problems


def last_step(run: Path) -> int | None:
    """That of the last whole line of a run's metrics."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return next((json.loads(line)["step"] for line in reversed(lines) if line.endswith("}")), None)


def half_written(checkpoints: Path) -> set[tuple[str, int]]:
    """Saves that are under way, or were cut short."""
    found = set()
    for path in checkpoints.glob(".*.part"):
        try:
            found.add((path.name, path.stat().st_ino))
        except FileNotFoundError:  # it has just become whole
            pass
    return found


def differences(whole: Path, other: Path) -> list[str]:
    """What is not the same, bit for bit, in two runs: adapters, the last checkpoint's tensors, losses."""
    problems = []
    last = sorted((whole / "checkpoints").glob("step-*"))[-1].name
    files = [path.name for path in whole.glob("*.safetensors")] + [f"checkpoints/{last}"]
    for name in files:
        ours, theirs = load_file(whole / name), load_file(other / name)
        wrong = [key for key in ours if key not in theirs or not torch.equal(ours[key], theirs[key])]
        problems += [f"{name}: {len(wrong)} of {len(ours)} tensors differ, {wrong[0]} for one"] if wrong else []
    if losses(whole) != losses(other):
        problems.append("metrics.jsonl: the losses differ")
    return problems


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


# ---------------------------------------------------------------------------------------------------
# launchers

LAUNCHERS = {
    "accelerate launch, 1 process": ("accelerate", "launch", "--num_processes", "1", "--cpu"),
    "accelerate launch, 2 processes": ("accelerate", "launch", "--num_processes", "2", "--cpu"),
    "torchrun, 2 processes": ("torchrun", "--nproc_per_node", "2", "--standalone", "--local_addr", "127.0.0.1"),
}


def kill_launchers(settings: Launchers, folder: Path) -> list[str]:
    problems = []
    (folder / "recipe.yaml").write_text("dataset: digits\n")
    for number in range(settings.times):
        for launcher in LAUNCHERS:
            for end in (signal.SIGTERM, signal.SIGKILL):
                run = folder / f"{number}-{launcher}-{end.name}".replace(" ", "-")
                found = kill_launcher(launcher, end, folder, run)
                print(f"{launcher}, {end.name}: {found}", flush=True)
                if not found.startswith("stopped"):
                    problems.append(f"{launcher}, {end.name}: {found}")
    return problems


def kill_launcher(launcher: str, end: signal.Signals, folder: Path, run: Path) -> str:
    program, *words = LAUNCHERS[launcher]
    command = [str(Path(sys.executable).with_name(program)), *words, str(Path(__file__).parents[1] / "train_dit.py")]
    command += ["--config", str(folder / "recipe.yaml"), "--base", str(folder / "base"), "--output-dir", str(run)]
    command += ["--batch-size", "4", "--log-every", "1", "--sample-every", "0", "--max-steps", "1000000"]
    with open(folder / "said.txt", "w") as said:
        process = psutil.Popen(command, stdout=said, stderr=said)
    while (last_step(run) or 0) < 3:
        time.sleep(0.1)
        if process.poll() is not None:
            return f"ended by itself: {(folder / 'said.txt').read_text()[-500:]}"
    started_by_it = process.children(recursive=True)
    began = time.monotonic()
    process.send_signal(end)
    process.wait()
    _, alive = psutil.wait_procs(started_by_it, timeout=120)
    for each in alive:
        each.kill()
    steps = [path.stem for path in (run / "checkpoints").glob("step-*")]
    if alive or len(steps) != 1 or read_adapter(run).training["steps"] != int(steps[0].removeprefix("step-")):
        return f"{len(alive)} of {len(started_by_it)} processes went on; checkpoints: {steps}"
    return f"stopped {len(started_by_it)} processes in {time.monotonic() - began:.1f} s, with checkpoint {steps[0]}"


# ---------------------------------------------------------------------------------------------------
# steps


def resources(process: psutil.Process) -> tuple[float, int, int] | None:
    """Resident memory in MB, open files and threads; None once the process has ended."""
    try:
        memory = process.memory_info().rss
        return (memory / 1e6, process.num_fds(), process.num_threads()) if memory else None
    except psutil.Error:
        return None


def train_long(settings: Steps, folder: Path) -> list[str]:
    middle = settings.max_steps // 2
    changes = dict(max_steps=settings.max_steps, checkpoint_every=middle // 10, keep_checkpoints=20)
    changes |= dict(sample_every=1000, sample_steps=4)
    log = folder / "log.txt"
    process = start(settings_of(folder, "whole", **changes), log)
    watched, sizes, step = psutil.Process(process.pid), {}, 0
    with tqdm(total=settings.max_steps, unit="step") as progress:
        while process.is_alive():
            time.sleep(0.2)
            if (now := last_step(folder / "whole") or 0) > step:
                progress.update(now - step)
                step = now
                if found := resources(watched):
                    sizes[step] = found
    finish(process, log)

    shown = [step for step in sizes if step >= settings.warmup]
    marks = [shown[len(shown) * part // 10] for part in range(10)] + shown[-1:]
    print(f"{'step':>8} {'memory [MB]':>12} {'open files':>11} {'threads':>8}")
    for step in marks:
        memory, files, threads = sizes[step]
        print(f"{step:8} {memory:12.1f} {files:11} {threads:8}")
    first, last = sizes[marks[0]], sizes[marks[-1]]
    problems = []
    if last[0] - first[0] > settings.growth_mb:
        problems.append(f"memory grew from {first[0]:.1f} to {last[0]:.1f} MB")
    if last[1] > first[1] or last[2] > first[2]:
        problems.append(f"open files or threads grew from {first[1:]} to {last[1:]}")

    shutil.copytree(folder / "whole", folder / "resumed")
    for path in (folder / "resumed/checkpoints").iterdir():
        if int(path.stem.removeprefix("step-")) > middle:
            path.unlink()
    (folder / "resumed" / ADAPTER).unlink()
    finish(start(settings_of(folder, "resumed", **changes), log), log)
    if f"resumed/checkpoints/step-{middle:08}.safetensors after" not in log.read_text():
        problems.append(f"the copy was not resumed from step {middle}")
    print(f"resumed from step {middle} and trained to step {settings.max_steps}")
    return problems + differences(folder / "whole", folder / "resumed")


RUNS = {Kills: kill_often, Launchers: kill_launchers, Steps: train_long}

if __name__ == "__main__":
    commands = (
        Annotated[Kills, tyro.conf.subcommand("kills")]
        | Annotated[Launchers, tyro.conf.subcommand("launchers")]
        | Annotated[Steps, tyro.conf.subcommand("steps")]
    )
    sys.exit(main(tyro.cli(commands, description=__doc__, config=(tyro.conf.OmitSubcommandPrefixes,))))
