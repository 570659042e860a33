"""Kill a training run at random moments, train one for long, serve for long: all as if nothing had happened.

    python tools/soak.py kills                     # 20 kills, every second inside a save
    python tools/soak.py launchers                 # SIGTERM and SIGKILL of each launcher
    python tools/soak.py steps                     # 10,000 steps of the smallest model
    python tools/soak.py serve --minutes 60        # serve.py with its queue full, killed three times
    python tools/soak.py probes                    # how soon it answers probes while 500 pictures wait

`kills` ends train_dit.py by SIGKILL after a random time, or while it writes a checkpoint, and starts it again, until
it has been killed often enough; then it may finish. Its adapter, averages and optimiser must be those of a run that
was left alone, bit for bit, and so must the losses; and its clock must have counted all the time that its processes
were alive. `launchers` ends what started the processes: they must stop at one step, with a checkpoint. `steps` watches
memory and open files all along, and resumes a copy of the run from the middle, which must end in the same adapter.
`serve` has more clients than the queue has places, good requests, malformed ones and clients that hang up, more
adapters than memory, adapters that are replaced by cp and by rename, SIGKILL with a new start, and SIGTERM at the end.
Every picture must be that of its single run, every malformed request refused, and memory must not grow.
"""

import base64
import http.client
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import torch
import tyro
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from PIL import Image
from safetensors.torch import load_file
from tqdm import tqdm

from onelora_diffusion.config import AdapterConfig
from onelora_diffusion.injection.book import fingerprint
from onelora_diffusion.injection.verbs import inject_adapter, unload_adapter
from onelora_diffusion.launch import started
from onelora_diffusion.pipelines.base import load_base
from onelora_diffusion.serving.adapter_cache import AdapterCache
from onelora_diffusion.serving.batching import Batcher, BatchSettings
from onelora_diffusion.serving.drawing import Drawing
from onelora_diffusion.serving.library import AdapterLibrary
from onelora_diffusion.serving.request import Request
from onelora_diffusion.storage.adapter_file import read_adapter, save_adapter
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


@dataclass
class Serve:
    """Serve for long with a full queue; every picture must be that of its single run."""

    minutes: float = 60.0
    """For how long."""
    clients: int = 32
    """Who ask at the same time; the queue has 16 places."""
    kills: int = 3
    """How often the server is ended by SIGKILL and started anew."""
    growth_mb: float = 32.0
    """By how much its memory may grow from the second quarter of its last life to the last."""
    seed: int = 0
    """Of the requests."""


@dataclass
class Probes:
    """Time the server's probes while pictures wait."""

    waiting: int = 500
    """How many pictures wait."""
    times: int = 100
    """How often each probe is asked."""


def main(settings: Kills | Launchers | Steps | Serve | Probes) -> int:
    with tempfile.TemporaryDirectory() as folder:
        write_smallest_base(Path(folder) / "base")
        problems = RUNS[type(settings)](settings, Path(folder))
    print("\n".join(problems) or "passed")
    return 1 if problems else 0


def write_smallest_base(folder: Path) -> None:
    """A random pipeline of two blocks of width 32, for images of 16 by 16."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
    )
    first, second = transformer.transformer_blocks
    second.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=4, **blocks)
    DiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False)).save_pretrained(folder)


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


# ---------------------------------------------------------------------------------------------------
# serve

ADAPTERS, QUEUE, BATCH = 12, 16, 8
SAMPLES = 40  # of a life's memory
MALFORMED = (None, 7, {}, {"prompt": 99}, {"prompt": 1, "seed": -1}, {"prompt": 1, "adapters": {"../base": 1}})


def serve_long(settings: Serve, folder: Path) -> list[str]:
    names, num_bytes = write_served_adapters(folder)
    requests = served_requests(names, settings.seed)
    expected = single_runs(folder, requests)
    server = Server(folder, num_bytes * ADAPTERS // 3)
    clients = Clients(server, requests, expected, settings)
    lives = settings.kills + 1
    seconds = 60 * settings.minutes / lives  # each, from when it serves
    memory: list[float] = []
    try:
        for life in range(lives):
            server.start()
            if not life:
                clients.start()
            memory = []
            for number in range(SAMPLES):
                time.sleep(seconds / SAMPLES)
                memory.append(server.memory_mb())
                replace_adapter(folder / "adapters" / f"{names[number % ADAPTERS]}.safetensors", number % 2)
            if life < lives - 1:
                server.end(signal.SIGKILL)
        clients.stop()
        metrics = metrics_of(server.address)
        began = time.monotonic()
        code, seconds_to_end = server.end(signal.SIGTERM), time.monotonic() - began
    finally:
        clients.stop()
        server.end(signal.SIGKILL)
    first, last = (
        sorted(part)[len(part) // 2] for part in (memory[SAMPLES // 4 : SAMPLES // 2], memory[-SAMPLES // 4 :])
    )
    counts, problems = clients.counts, clients.problems[:10]
    print(", ".join(f"{counts[name]:,} {name}" for name in COUNTED) + f"; {settings.kills} kills")
    print(f"memory of the last life: {first:.1f} to {last:.1f} MB; it ended {seconds_to_end:.1f} s after SIGTERM")
    if last - first > settings.growth_mb:
        problems.append(f"memory grew from {first:.1f} to {last:.1f} MB")
    if code != 128 + signal.SIGTERM:
        problems.append(f"serve.py ended with {code} after SIGTERM:\n{server.log.read_text()[-2000:]}")
    if not counts["pictures"] or metrics["queue_length"] or metrics["resident_bytes"] > server.memory_bytes:
        problems.append(f"the server ended in a state that cannot be: {metrics}")
    return problems


def replace_adapter(path: Path, in_place: bool) -> None:
    """Write an adapter anew with the same content: into the file that is there, as cp, or beside it and renamed."""
    content = path.read_bytes()
    if in_place:
        path.write_bytes(content)
    else:
        path.with_suffix(".new").write_bytes(content)
        path.with_suffix(".new").replace(path)


def write_served_adapters(folder: Path) -> tuple[list[str], int]:
    """(names of random adapters, half of which bring classes; the bytes of the largest)."""
    transformer = load_base(folder / "base").transformer
    (folder / "adapters").mkdir()
    names, largest = [f"adapter-{index}" for index in range(ADAPTERS)], 0
    for index, name in enumerate(names):
        inject_adapter(transformer, AdapterConfig(num_classes=4 if index % 2 else None))
        torch.manual_seed(index)
        trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
        with torch.no_grad():
            for parameter in trained:
                parameter.normal_(std=0.3)
        largest = max(largest, 4 * sum(parameter.numel() for parameter in trained))
        save_adapter(transformer, folder / "adapters" / f"{name}.safetensors")
        unload_adapter(transformer)
    return names, largest


def served_requests(names: list[str], seed: int) -> list[Request]:
    draw = random.Random(seed)
    requests = []
    for number in range(64):
        chosen = draw.sample(names, draw.randint(0, 2))
        requests.append(
            Request(
                subject=draw.randrange(4),
                adapters=tuple((name, draw.choice((0.5, 1.0, -0.3))) for name in chosen),
                guidance="domain" if chosen and number % 3 == 0 else "cfg",
                guidance_scale=draw.choice((1.0, 2.0, 4.5)),
                sampler=draw.choice(("ddim", "dpm-solver++")),
                num_inference_steps=draw.choice((4, 6)),
                seed=number,
            )
        )
    return requests


def single_runs(folder: Path, requests: list[Request]) -> list[torch.Tensor]:
    """Their pictures, each drawn alone."""
    pipeline = load_base(folder / "base")
    transformer = pipeline.transformer.requires_grad_(False)
    library = AdapterLibrary([folder / "adapters"], fingerprint(transformer))
    cache = AdapterCache(transformer, 10**9)
    batcher = Batcher(Drawing(pipeline, 50), library, cache, BatchSettings(max_batch=1))
    pictures = [batcher.submit(request).picture.result() for request in requests]
    batcher.close()
    return pictures


# ---------------------------------------------------------------------------------------------------
# probes


def time_probes(settings: Probes, folder: Path) -> list[str]:
    (folder / "adapters").mkdir()
    server = Server(folder, 10**9, settings.waiting)
    body = json.dumps({"pictures": [{"subject": 1, "num_inference_steps": 50}] * 50})
    seconds: dict[str, list[float]] = {probe: [] for probe in PROBES}
    try:
        server.start()
        clients = [http.client.HTTPConnection("127.0.0.1", server.port) for _ in range(settings.waiting // 50)]
        for client in clients:
            client.request("POST", "/v1/pictures", body, TYPE)
        while metrics_of(server.address)["queue_length"] < settings.waiting - 50:
            time.sleep(0.1)
        for _ in range(settings.times):
            for probe in PROBES:
                began = time.perf_counter()
                ask(server.address, probe)
                seconds[probe].append(time.perf_counter() - began)
            time.sleep(0.05)
        print(f"{metrics_of(server.address)['queue_length']:.0f} pictures wait at the end")
    finally:
        server.end(signal.SIGKILL)
    print("| probe | median, ms | 95 %, ms | slowest, ms |\n|---|---:|---:|---:|")
    for probe, took in seconds.items():
        shown = " | ".join(f"{1e3 * np.quantile(took, share):.1f}" for share in (0.5, 0.95, 1))
        print(f"| `{probe}` | {shown} |")
    return []


class Server:
    """serve.py in a process of its own."""

    def __init__(self, folder: Path, memory_bytes: int, places: int = QUEUE):
        self.folder, self.memory_bytes, self.process, self.log = folder, memory_bytes, None, folder / "serve.txt"
        self.places = places
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, str(Path(__file__).parents[1] / "serve.py"), "--port", str(self.port)]
        command += ["--base", str(self.folder / "base"), "--adapters", str(self.folder / "adapters")]
        command += ["--adapter-memory", str(self.memory_bytes / 1e6), "--max-batch", str(BATCH)]
        command += ["--max-queue", str(self.places), "--max-queue-per-client", str(self.places)]
        with self.log.open("w") as output:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        while "serving at" not in self.log.read_text():
            if self.process.poll() is not None:
                raise SystemExit(f"serve.py ended with {self.process.returncode}:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.1)

    def end(self, how: signal.Signals) -> int | None:
        """Send a signal, unless the process has ended already; its exit code."""
        if self.process is None:
            return None
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(timeout=120)

    def memory_mb(self) -> float:
        return psutil.Process(self.process.pid).memory_info().rss / 1e6


COUNTED = ("pictures", "refusals", "busy", "given up", "cut off", "caught in a replacement")


class Clients:
    """Threads that ask, and look at what they get."""

    def __init__(self, server: Server, requests: list[Request], expected: list[torch.Tensor], settings: Serve):
        self.server, self.requests, self.expected = server, requests, expected
        self.counts, self.problems, self.ended = Counter(), [], threading.Event()
        self.threads = [
            threading.Thread(target=self._repeat, args=(random.Random(1000 * settings.seed + number),))
            for number in range(settings.clients)
        ]

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        self.ended.set()
        for thread in self.threads:
            if thread.is_alive():
                thread.join()

    def _repeat(self, draw: random.Random) -> None:
        while not self.ended.is_set():
            try:
                self._ask(draw)
            except (OSError, http.client.HTTPException):
                self.counts["cut off"] += 1  # the server was killed meanwhile
                time.sleep(0.2)

    def _ask(self, draw: random.Random) -> None:
        chance, index = draw.random(), draw.randrange(len(self.requests))
        request = self.requests[index].as_json()
        body = {"prompt": request.pop("subject"), "steps": request.pop("num_inference_steps")} | request
        body["size"] = None
        if chance < 0.1:
            values = draw.choice(MALFORMED)
            status, answer = ask(self.server.address, GENERATE, values)
            if status not in (400, 404, 503):
                self.problems.append(f"{values} was answered by {status}: {answer}")
            self.counts["refusals" if status != 503 else "busy"] += 1
        elif chance < 0.2:
            hang_up(self.server, body, draw.uniform(0, 0.2))
            self.counts["given up"] += 1
        else:
            status, answer = ask(self.server.address, GENERATE, body)
            if status == 200:
                self._compare(index, answer["data"][0]["b64_json"])
            elif status in (429, 503):
                self.counts["busy"] += 1
                time.sleep(0.05)
            elif status == 400 and "is damaged" in answer["error"]["message"]:
                self.counts["caught in a replacement"] += 1  # by cp, which writes in place
            else:
                self.problems.append(f"request {index} was answered by {status}: {answer}")

    def _compare(self, index: int, b64_json: str) -> None:
        found = np.asarray(Image.open(io.BytesIO(base64.b64decode(b64_json)))).astype(int)
        off = np.abs(found - self.expected[index].numpy())
        if off.max() > 1 or (off > 0).mean() > 0.02:  # rounding may reach the next grey level
            self.problems.append(f"request {index} got another picture, off by up to {off.max()}")
        self.counts["pictures"] += 1


GENERATE = "/v1/images/generations"
PROBES = ("/healthz", "/readyz", "/metrics")
TYPE = {"Content-Type": "application/json"}


def ask(address: str, path: str, body=None) -> tuple[int, dict]:
    """(status, answer); a probe's text is not read."""
    data = None if path in PROBES else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(address + path, data, TYPE), timeout=120) as answer:
            content = answer.read()
            return answer.status, json.loads(content) if path == GENERATE else {}
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def hang_up(server: Server, body: dict, seconds: float) -> None:
    """Ask for a picture, and hang up after so long."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", GENERATE, json.dumps(body), TYPE)
    time.sleep(seconds)
    connection.close()


def metrics_of(address: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{address}/metrics", timeout=60) as answer:
        lines = [line.rpartition(" ") for line in answer.read().decode().splitlines() if not line.startswith("#")]
    return {name.removeprefix("onelora_"): float(value) for name, _, value in lines}


RUNS = {Kills: kill_often, Launchers: kill_launchers, Steps: train_long, Serve: serve_long, Probes: time_probes}

if __name__ == "__main__":
    commands = (
        Annotated[Kills, tyro.conf.subcommand("kills")]
        | Annotated[Launchers, tyro.conf.subcommand("launchers")]
        | Annotated[Steps, tyro.conf.subcommand("steps")]
        | Annotated[Serve, tyro.conf.subcommand("serve")]
        | Annotated[Probes, tyro.conf.subcommand("probes")]
    )
    sys.exit(main(tyro.cli(commands, description=__doc__, config=(tyro.conf.OmitSubcommandPrefixes,))))
