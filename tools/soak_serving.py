"""Serve for long, under load, with everything that happens to servers; and time their probes.

    python -m tools.soak_serving serve --minutes 60              # one server, killed three times
    python -m tools.soak_serving serve --minutes 1 --replicas 2 --clients 50
    python -m tools.soak_serving probes                          # how soon it answers while 500 pictures wait

`serve` has more clients than the queue has places, good requests, malformed ones and clients that hang up, more
adapters than memory, adapters that are replaced by cp and by rename, one of them by another, SIGKILL with a new start
in the first half of the time, and SIGTERM at the end. Every picture must be that of its single run, by the adapters
whose digests the answer names; every malformed request must be refused, and memory must not grow. Two replicas stand
behind nginx as in docs/serving.md; they are killed in turns, each when the other one has been back for as long as a
request takes, and every request must be answered.
"""

import base64
import contextlib
import http.client
import io
import json
import os
import random
import re
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import psutil
import torch
import tyro
from PIL import Image

from benchmarks.tiny_dit import make_dit_pipeline
from onelora_diffusion.config import AdapterConfig
from onelora_diffusion.injection.book import fingerprint
from onelora_diffusion.injection.verbs import inject_adapter, unload_adapter
from onelora_diffusion.pipelines.base import load_base
from onelora_diffusion.serving.adapter_cache import AdapterCache
from onelora_diffusion.serving.batching import Batcher, BatchSettings
from onelora_diffusion.serving.drawing import Drawing
from onelora_diffusion.serving.library import AdapterLibrary
from onelora_diffusion.serving.request import Request
from onelora_diffusion.storage.adapter_file import read_adapter, save_adapter
from tools.soak import resources

ROOT = Path(__file__).parents[1]
ADAPTERS, QUEUE, BATCH = 12, 16, 8
MALFORMED = (None, 7, {}, {"prompt": 99}, {"prompt": 1, "seed": -1}, {"prompt": 1, "adapters": {"../base": 1}})
GENERATE = "/v1/images/generations"
PROBES = ("/healthz", "/readyz", "/metrics")
HOST = "draw.example.org"  # of the guide's configuration
HEADERS = {"Content-Type": "application/json", "Host": HOST}
CERTIFICATE = f"openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN={HOST} -keyout draw.key -out draw.pem"
OPENER = urllib.request.build_opener(urllib.request.HTTPSHandler(context=ssl._create_unverified_context()))


@dataclass
class Serve:
    """Serve for long with a full queue; every picture must be that of its single run."""

    minutes: float = 60.0
    """For how long."""
    clients: int = 32
    """Who ask at the same time; the queue of a server has 16 places."""
    replicas: Literal[1, 2] = 1
    """Servers of the same adapters; two are behind nginx."""
    kills: int = 3
    """How often a server is ended by SIGKILL and started anew, in the first half of the time."""
    growth_mb: float = 32.0
    """By how much a server's memory may grow from the second quarter of its last life to the last."""
    seed: int = 0
    """Of the requests."""


@dataclass
class Probes:
    """Time the server's probes while pictures wait."""

    waiting: int = 500
    """How many pictures wait."""
    times: int = 100
    """How often each probe is asked."""


def main(settings: Serve | Probes) -> int:
    with tempfile.TemporaryDirectory() as folder:
        make_dit_pipeline().save_pretrained(Path(folder) / "base")
        problems = RUNS[type(settings)](settings, Path(folder))
    print("\n".join(problems) or "passed")
    return 1 if problems else 0


# ---------------------------------------------------------------------------------------------------
# serve


def serve_long(settings: Serve, folder: Path) -> list[str]:
    files = ServedAdapters(folder)
    requests = served_requests(files.names, settings.seed)
    expected = {files.replace(0, other): single_runs(folder, requests) for other in (True, False)}
    memory_bytes = files.num_bytes * ADAPTERS // 3
    servers = [Server(folder, memory_bytes, number=number) for number in range(settings.replicas)]
    address, in_hand, lives = servers[0].address, 0, []
    with contextlib.ExitStack() as stack:
        for server in servers:
            server.start()
            stack.callback(server.end, signal.SIGKILL)
        if settings.replicas > 1:
            address = stack.enter_context(nginx(folder, [server.address for server in servers]))
        clients = Clients(address, requests, expected, settings)
        stack.enter_context(clients)
        began = time.monotonic()
        for kill in range(settings.kills):
            # nginx asks each server once: what found one of them gone must be answered before the other one is killed
            answered = time.monotonic() + 2 * clients.slowest
            files.replace_until(max(answered, began + 30 * settings.minutes * (kill + 1) / settings.kills))
            victim = servers[kill % settings.replicas]
            in_hand += int(metrics_of(victim.address)["drawing"])
            if victim.end(signal.SIGKILL) != -signal.SIGKILL:
                clients.problems.append(f"a server had ended by itself:\n{victim.said()}")
            victim.start()
        for _ in range(SAMPLES):
            files.replace_until(time.monotonic() + 30 * settings.minutes / SAMPLES)
            lives.append([resources(psutil.Process(server.process.pid)) for server in servers])
        clients.stop()
        metrics = [metrics_of(server.address) for server in servers]
        began = time.monotonic()
        codes = [server.end(signal.SIGTERM) for server in servers]
        seconds_to_end = time.monotonic() - began
    counts, problems = clients.counts, clients.problems[:10]
    print(", ".join(f"{counts[name]:,} {name}" for name in COUNTED), end=f"; {settings.kills} kills, ")
    print(f"{in_hand} pictures in hand at them; {files.num_replaced:,} replacements of adapters")
    print(f"slowest answer after {clients.slowest:.1f} s; all ended {seconds_to_end:.1f} s after SIGTERM")
    for number, (server, code, last) in enumerate(zip(servers, codes, metrics, strict=True)):
        problems += server_problems(f"server {number}", [life[number] for life in lives], settings.growth_mb)
        if code != 128 + signal.SIGTERM:
            problems.append(f"server {number} ended with {code} after SIGTERM:\n{server.said()}")
        if not last["batch_size_count"] or last["queue_length"] or last["resident_bytes"] > memory_bytes:
            problems.append(f"server {number} ended in a state that cannot be: {last}")
    if settings.replicas > 1 and counts["cut off"]:
        problems.append(f"{counts['cut off']} requests had no answer, such as {clients.cut_off[:3]}")
    return problems if counts["pictures"] else [*problems, "nothing was drawn"]


SAMPLES = 40  # of a life's memory


def server_problems(name: str, life: list, growth_mb: float) -> list[str]:
    """Print memory (MB), open files and threads of a server's last life; what is wrong with them."""
    marks = [life[index] for index in range(SAMPLES // 8 - 1, SAMPLES, SAMPLES // 8)]
    print(f"{name}, its last life in eighths: " + ", ".join(f"{mark[0]:.1f} MB" for mark in marks), end="; ")
    print(f"open files {marks[0][1]} to {marks[-1][1]}, threads {marks[0][2]} to {marks[-1][2]}")
    memory = [each[0] for each in life]
    first, last = (float(np.median(part)) for part in (memory[SAMPLES // 4 : SAMPLES // 2], memory[-SAMPLES // 4 :]))
    return [f"memory of {name} grew from {first:.1f} to {last:.1f} MB"] if last - first > growth_mb else []


class ServedAdapters:
    """Random adapters in files that are replaced, half of which bring classes; the first file by another adapter."""

    def __init__(self, folder: Path):
        transformer = load_base(folder / "base").transformer
        self.names, self.num_bytes, self.num_replaced = [f"adapter-{index}" for index in range(ADAPTERS)], 0, 0
        self.paths = [folder / "adapters" / f"{name}.safetensors" for name in self.names]
        self.paths[0].parent.mkdir()
        for index, path in enumerate([*self.paths, folder / "other.safetensors"]):
            inject_adapter(transformer, AdapterConfig(num_classes=4 if index % 2 else None))
            torch.manual_seed(index)
            trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
            with torch.no_grad():
                for parameter in trained:
                    parameter.normal_(std=0.3)
            self.num_bytes = max(self.num_bytes, 4 * sum(parameter.numel() for parameter in trained))
            save_adapter(transformer, path)
            unload_adapter(transformer)
        self.contents = [path.read_bytes() for path in self.paths]
        self.other = (folder / "other.safetensors").read_bytes()

    def replace(self, index: int, other: bool = False) -> str:
        """Write a file anew: into the one that is there, as cp, or beside it and renamed; the adapter's digest."""
        path, content = self.paths[index], self.other if other else self.contents[index]
        beside = path.with_suffix(".new") if self.num_replaced % 2 else path
        beside.write_bytes(content)
        beside.replace(path)
        self.num_replaced += 1
        return read_adapter(path).digest

    def replace_until(self, end: float) -> None:
        """Replace a file every half second, or twenty in the time if it is longer."""
        pause = max(0.5, (end - time.monotonic()) / 20)
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, pause))
            turn, number = divmod(self.num_replaced, 4)
            if number < 2:
                self.replace(0, other=(turn + number) % 2)
            else:
                self.replace(turn % ADAPTERS)


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


def single_runs(folder: Path, requests: list[Request]) -> list[np.ndarray]:
    """Their pictures, each drawn alone."""
    pipeline = load_base(folder / "base")
    transformer = pipeline.transformer.requires_grad_(False)
    library = AdapterLibrary([folder / "adapters"], fingerprint(transformer))
    cache = AdapterCache(transformer, 10**9)
    batcher = Batcher(Drawing(pipeline, 50), library, cache, BatchSettings(max_batch=1))
    pictures = [batcher.submit(request).picture.result().numpy() for request in requests]
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
            client.request("POST", "/v1/pictures", body, HEADERS)
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


# ---------------------------------------------------------------------------------------------------
# servers


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Server:
    """serve.py in a process of its own."""

    def __init__(self, folder: Path, memory_bytes: int, places: int = QUEUE, number: int = 0):
        self.folder, self.memory_bytes, self.places = folder, memory_bytes, places
        self.process, self.log, self.port = None, folder / f"serve-{number}.txt", free_port()
        self.address = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, str(ROOT / "serve.py"), "--port", str(self.port), "--allow-host", HOST]
        command += ["--base", str(self.folder / "base"), "--adapters", str(self.folder / "adapters")]
        command += ["--adapter-memory", str(self.memory_bytes / 1e6), "--max-batch", str(BATCH)]
        command += ["--max-queue", str(self.places), "--max-queue-per-client", str(self.places)]
        command += ["--root-path", "/draw", "--trusted-proxy", "127.0.0.1"]
        with self.log.open("w") as output:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        while "serving at" not in self.log.read_text():
            if self.process.poll() is not None:
                raise SystemExit(f"serve.py ended with {self.process.returncode}:\n{self.said()}")
            time.sleep(0.1)

    def end(self, how: signal.Signals) -> int | None:
        """Send a signal, unless the process has ended already; its exit code."""
        if self.process is None:
            return None
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(timeout=120)

    def said(self) -> str:
        return self.log.read_text()[-2000:]


@contextlib.contextmanager
def nginx(folder: Path, servers: Sequence[str]) -> Iterator[str]:
    """nginx by the configuration in docs/serving.md, with its files in a folder; its address."""
    guide = (ROOT / "docs/serving.md").read_text()
    text, port = re.search(r"```nginx\n(.*?)```", guide, re.DOTALL)[1], free_port()
    for number, server in zip((7861, 7862), servers, strict=True):
        text = text.replace(f"127.0.0.1:{number}", re.search(r"127\.0\.0\.1:\d+", server)[0])
    text = text.replace("listen 443", f"listen 127.0.0.1:{port}").replace("/etc/ssl", str(folder))
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
    own = f"daemon off; pid {folder}/pid; error_log {folder}/error.log; events {{}}"
    (folder / "nginx.conf").write_text(f"{own}\nhttp {{ access_log off; {temporary}\n{text} }}")
    subprocess.run(CERTIFICATE.split(), cwd=folder, check=True, capture_output=True)
    process = subprocess.Popen(["nginx", "-p", folder, "-c", folder / "nginx.conf", "-e", folder / "error.log"])
    try:
        end = time.monotonic() + 20
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert process.poll() is None and time.monotonic() < end, (folder / "error.log").read_text()
            time.sleep(0.05)
        yield f"https://127.0.0.1:{port}/draw"
    finally:
        process.terminate()
        process.wait(20)


# ---------------------------------------------------------------------------------------------------
# clients

OTHER_PICTURE, OTHER_ANSWER = "other pictures than may be", "other answers than may be"
COUNTED = (
    "pictures",
    "refusals",
    "busy",
    "given up",
    "cut off",
    "caught in a replacement",
    OTHER_PICTURE,
    OTHER_ANSWER,
)


class Clients:
    """Threads that ask, and look at what they get.

    Args:
        expected: the pictures of the requests by the digest of the first adapter, whose file is replaced by another.
    """

    def __init__(self, address: str, requests: list[Request], expected: dict[str, list[np.ndarray]], settings: Serve):
        self.address, self.requests, self.expected = address, requests, expected
        self.counts, self.problems, self.cut_off, self.slowest = Counter(), [], [], 0.0
        self.ended = threading.Event()
        self.threads = [
            threading.Thread(target=self._repeat, args=(random.Random(1000 * settings.seed + number),))
            for number in range(settings.clients)
        ]

    def __enter__(self) -> "Clients":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.stop()

    def stop(self) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join()

    def _repeat(self, draw: random.Random) -> None:
        while not self.ended.is_set():
            began = time.monotonic()
            try:
                self._ask(draw)
            except (OSError, http.client.HTTPException) as error:
                self.counts["cut off"] += 1  # without a second server to ask, it was killed meanwhile
                self.cut_off.append(repr(error))
                time.sleep(0.2)
            self.slowest = max(self.slowest, time.monotonic() - began)

    def _ask(self, draw: random.Random) -> None:
        chance, index = draw.random(), draw.randrange(len(self.requests))
        request = self.requests[index].as_json()
        body = {"prompt": request.pop("subject"), "steps": request.pop("num_inference_steps")} | request
        body["size"] = None
        if chance < 0.1:
            values = draw.choice(MALFORMED)
            status, answer = ask(self.address, GENERATE, values)
            if status not in (400, 404, 503):
                self._note(OTHER_ANSWER, f"{values} was answered by {status}: {answer}")
            self.counts["refusals" if status != 503 else "busy"] += 1
        elif chance < 0.2:
            with contextlib.suppress(OSError):
                ask(self.address, GENERATE, body, draw.uniform(0.01, 0.5))
            self.counts["given up"] += 1
        else:
            status, answer = ask(self.address, GENERATE, body)
            if status == 200:
                self._compare(index, answer["data"][0])
            elif status in (429, 503):
                self.counts["busy"] += 1
                time.sleep(0.05)
            elif status == 400 and "is damaged" in answer["error"]["message"]:
                self.counts["caught in a replacement"] += 1  # by cp, which writes in place
            else:
                self._note(OTHER_ANSWER, f"request {index} was answered by {status}: {answer}")

    def _note(self, kind: str, problem: str) -> None:
        self.counts[kind] += 1
        self.problems.append(problem)

    def _compare(self, index: int, image: dict) -> None:
        digest = image["settings"]["digests"]["adapters"].get("adapter-0", next(iter(self.expected)))
        found = np.asarray(Image.open(io.BytesIO(base64.b64decode(image["b64_json"])))).astype(int)
        off = np.abs(found - self.expected[digest][index])
        if off.max() > 1 or (off > 0).mean() > 0.02:  # rounding may reach the next grey level
            self._note(OTHER_PICTURE, f"request {index} got another picture, off by up to {off.max()}")
        self.counts["pictures"] += 1


def ask(address: str, path: str, body=None, timeout: float = 120.0) -> tuple[int, dict]:
    """(status, answer) in so many seconds, after which the client hangs up; a probe's text is not read."""
    data = None if path in PROBES else json.dumps(body).encode()
    try:
        with OPENER.open(urllib.request.Request(address + path, data, HEADERS), timeout=timeout) as answer:
            content = answer.read()
            return answer.status, json.loads(content) if path == GENERATE else {}
    except urllib.error.HTTPError as error:
        content = error.read()
        is_ours = error.headers["content-type"] == "application/json"
        return error.code, json.loads(content) if is_ours else {"error": {"message": content.decode()}}


def metrics_of(address: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{address}/metrics", timeout=60) as answer:
        return metrics_in(answer.read().decode())


def metrics_in(text: str) -> dict[str, float]:
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name.removeprefix("onelora_"): float(value) for name, _, value in lines}


RUNS = {Serve: serve_long, Probes: time_probes}

if __name__ == "__main__":
    commands = Annotated[Serve, tyro.conf.subcommand("serve")] | Annotated[Probes, tyro.conf.subcommand("probes")]
    sys.exit(main(tyro.cli(commands, description=__doc__, config=(tyro.conf.OmitSubcommandPrefixes,))))
