"""Images a second and waiting times, of many clients with adapters of their own and of requests at random times."""

import contextlib
import copy
import dataclasses
import json
import platform
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from diffusers import DDIMScheduler, DiTPipeline
from torch import nn
from tqdm import tqdm

from benchmarks.arrivals import arrivals_table, measure_arrivals, plot
from benchmarks.generate import make_vae
from benchmarks.measure import interleave, ratio, reset_peak_memory, table
from benchmarks.peers import make_base, twin
from onelora_diffusion.config import AdapterConfig
from onelora_diffusion.devices import peak_memory_bytes
from onelora_diffusion.injection.book import fingerprint
from onelora_diffusion.injection.conditioning import DiTConditioning
from onelora_diffusion.injection.layers import target_layers
from onelora_diffusion.injection.routing import route_adapters
from onelora_diffusion.injection.verbs import inject_adapter
from onelora_diffusion.pipelines.base import load_base
from onelora_diffusion.serving.adapter_cache import AdapterCache
from onelora_diffusion.serving.batching import Batcher, BatchSettings
from onelora_diffusion.serving.drawing import Drawing
from onelora_diffusion.serving.library import AdapterLibrary
from onelora_diffusion.serving.request import Request
from onelora_diffusion.storage.adapter_file import save_adapter
from onelora_diffusion.storage.reading import load_adapter

BATCHED, ALONE, SWITCHED = "1LoRA, batched across adapters", "1LoRA, one at a time", "PEFT LoRA, switched by request"
NO_LIMIT = {"max_queue": 10**6, "max_queue_per_client": 10**6}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
MINIATURE, BLOCK = "miniature", "one block of DiT-XL/2's width"


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Time a server's queue under many clients, each with its own adapter; and many resident adapters in one step."""

    clients: tuple[int, ...] = (1, 4, 16, 64)
    """Numbers of clients; each asks anew as soon as it has its picture."""
    loads: tuple[float, ...] = (0.3, 0.5, 0.7, 0.9)
    """Shares of the capacity at which requests come at random, of 1, 2 and 4 times the steps."""
    arrivals: tuple[int, int] = (200, 100)
    """Pictures of each of these runs, for each base."""
    bases: tuple[str, ...] = (MINIATURE, BLOCK)
    """What they are drawn by."""
    images: tuple[int, int] = (32, 16)
    """Pictures of each run, for each base; at least one a client."""
    steps: tuple[int, int] = (10, 2)
    """Steps of the sampler, for each base; guided."""
    max_batch: int = 16
    """Pictures drawn together."""
    rounds: int = 3
    """How often each run is made, in turns; a ratio is taken in each round."""
    resident: int = 512
    """Adapters in the model, and samples of a batch, of the last table."""
    width: int = 1152
    """Features of a token of the block."""
    heads: int = 16
    """Its attention heads."""
    sample_size: int = 8
    """Height and width of its latents."""
    threads: int = 2
    """Threads of PyTorch on a CPU."""
    clock: Literal["wall", "cpu"] = "wall"
    """Of images a second. cpu: processor time of this process; with --threads 1 it is little moved by what else the
    machine does. A request's own seconds are those on the wall."""
    device: str = "cpu"
    """cpu or cuda."""
    output_dir: Path = Path("runs/serve")
    """Where serve.json and serve.md go."""


def serve(settings: ServeSettings) -> dict:
    """Measure, print the tables, and write `serve.json` and `serve.md`."""
    torch.set_num_threads(settings.threads)
    pipelines = [make_pipeline(base, settings) for base in settings.bases]
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    results = {
        "settings": dataclasses.asdict(settings) | {"output_dir": str(settings.output_dir)},
        "machine": {"torch": torch.__version__, "processor": platform.processor() or platform.machine()},
        "clients": [],
        "arrivals": [],
        "limit": [],
        "resident": [],
    }
    for number, (base, pipeline) in enumerate(zip(settings.bases, pipelines, strict=True)):
        with tempfile.TemporaryDirectory() as folder:
            names = write_adapters(Path(folder), pipeline.transformer, max(settings.clients, default=16))
            ways = {
                BATCHED: Way(pipeline, Path(folder), settings, settings.max_batch),
                ALONE: Way(pipeline, Path(folder), settings, 1),
                SWITCHED: SwitchedWay(pipeline, Path(folder), settings, names),
            }
            for clients in settings.clients:
                results["clients"] += measure_clients(base, number, ways, clients, names, settings)
            if settings.loads:
                rows = measure_arrivals(
                    ways[BATCHED],
                    names,
                    settings.steps[number],
                    settings.arrivals[number],
                    settings.loads,
                    settings.rounds,
                    settings.max_batch,
                    CLOCKS[settings.clock],
                )
                results["arrivals"] += [{"base": base} | row for row in rows]
                plot(results["arrivals"], settings.output_dir / "serve.png")
            results["limit"].append({"base": base} | measure_limit(pipeline, settings.steps[number], settings))
            results["resident"].append({"base": base} | measure_resident(pipeline, Path(folder, names[0]), settings))
        (settings.output_dir / "serve.json").write_text(json.dumps(results, indent=1))
        (settings.output_dir / "serve.md").write_text(markdown(results))
    print(markdown(results))
    return results


def make_pipeline(base: str, settings: ServeSettings):
    if base == MINIATURE:
        pipeline = load_base()
    else:
        transformer = make_base(settings.width, settings.heads, 1, settings.sample_size)
        pipeline = DiTPipeline(transformer, make_vae((16, 32)), DDIMScheduler(clip_sample=False))
    pipeline.transformer.requires_grad_(False).eval().to(settings.device)
    pipeline.vae.requires_grad_(False).eval().to(settings.device)
    return pipeline


def write_adapters(folder: Path, transformer: nn.Module, number: int) -> list[str]:
    """Random adapters of the paper's layers, as files; their names."""
    model = inject_adapter(twin(transformer), AdapterConfig())
    names = [f"adapter-{index}" for index in range(number)]
    for index, name in enumerate(names):
        torch.manual_seed(index)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=1e-3)
        save_adapter(model, folder / f"{name}.safetensors")
    return names


# ---------------------------------------------------------------------------------------------------
# Clients. A way has the same queue, sampler and VAE as the others, and its own model around the same weights.


class Way:
    """Ours: adapters come from their files when they are asked for."""

    def __init__(self, pipeline, folder: Path, settings: ServeSettings, max_batch: int):
        self.pipeline = with_transformer(pipeline, twin(pipeline.transformer))
        self.library = AdapterLibrary([folder], fingerprint(pipeline.transformer))
        self.cache = AdapterCache(self.pipeline.transformer, 10**12)
        self.drawing = Drawing(self.pipeline, 4 * max(settings.steps))
        self.settings = BatchSettings(max_batch=max_batch, **NO_LIMIT)

    @contextlib.contextmanager
    def started(self):
        batcher = Batcher(self.drawing, self.library, self.cache, self.settings)
        try:
            yield batcher
        finally:
            batcher.close()


class SwitchedWay(Way):
    """PEFT's LoRA of rank 1 on the same layers, in memory; the one that a request names is made the active one."""

    def __init__(self, pipeline, folder: Path, settings: ServeSettings, names: list[str]):
        import peft

        super().__init__(pipeline, folder, settings, 1)
        model = self.pipeline.transformer
        DiTConditioning(model).install()  # ours computes it once; so does this
        config = peft.LoraConfig(r=1, lora_alpha=1, target_modules=list(target_layers(model, None)))
        lora = peft.get_peft_model(model, config, adapter_name=names[0])
        self.drawing = SwitchedDrawing(self.pipeline, max(settings.steps), lora, config)
        self.cache = InMemory(self.pipeline.transformer, 10**12)


class SwitchedDrawing(Drawing):
    def __init__(self, pipeline, max_steps: int, lora, config):
        super().__init__(pipeline, max_steps)
        self.lora, self.config = lora, config

    def start(self, request, mixture):
        ((name, _),) = mixture.items()
        if name not in self.lora.peft_config:
            self.lora.add_adapter(name, self.config)
            self.transformer.eval()
        self.lora.set_adapter(name)
        return super().start(request, {})


class InMemory(AdapterCache):
    def will_change(self, entries):
        return False

    def load(self, entries):
        return {entry.key: entry.name for entry in entries}, {}


def with_transformer(pipeline, transformer: nn.Module):
    return DiTPipeline(transformer, pipeline.vae, copy.deepcopy(pipeline.scheduler))


def measure_clients(
    base: str, number: int, ways: dict[str, Way], clients: int, names: list[str], settings: ServeSettings
) -> list[dict]:
    """Images a second and seconds a request of each way, round by round in turns."""
    each = max(1, settings.images[number] // clients)
    runs = {name: [] for name in ways}
    clock = CLOCKS[settings.clock]
    for round_ in tqdm(range(-1, settings.rounds), desc=f"{base}, {clients} clients", unit="round", leave=False):
        for name, way in ways.items():
            idle = reset_peak_memory(torch.device(settings.device))
            with way.started() as batcher:
                warm = clients if round_ < 0 else 0  # the first brings the adapters into memory
                seconds, waits = ask(batcher, names[:clients], 1 if warm else each, settings.steps[number], clock)
                sizes = batcher.state()["batch_sizes"]
            if round_ >= 0:
                peak = peak_memory_bytes(torch.device(settings.device)) - idle
                runs[name].append((clients * each / seconds, waits, sizes, peak))
    reference = np.array([run[0] for run in runs[SWITCHED]])
    return [
        {
            "base": base,
            "clients": clients,
            "way": name,
            "images": clients * each,
            "images_per_second": float(np.median([run[0] for run in own])),
            "over_switched": ratio(np.array([run[0] for run in own]), reference),
            "p50_s": float(np.median(np.concatenate([run[1] for run in own]))),
            "p95_s": float(np.quantile(np.concatenate([run[1] for run in own]), 0.95)),
            "batch_sizes": own[-1][2],
            "peak_memory_bytes": max(run[3] for run in own),  # above what the models take
        }
        for name, own in runs.items()
    ]


def ask(
    batcher: Batcher, names: list[str], each: int, steps: int, clock: Callable[[], float]
) -> tuple[float, np.ndarray]:
    """Seconds until every client has had its pictures, and those of every request."""
    waits = [[] for _ in names]

    def client(index: int) -> None:
        for number in range(each):
            request = Request(
                subject=index % 10,
                adapters=((names[index], 1.0),),
                num_inference_steps=steps,
                seed=1000 * index + number,
            )
            start = time.perf_counter()
            batcher.submit(request).picture.result()
            waits[index].append(time.perf_counter() - start)

    threads = [threading.Thread(target=client, args=(index,)) for index in range(len(names))]
    start = clock()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return clock() - start, np.array(waits).ravel()


def network_inputs(transformer: nn.Module, rows: int, settings: ServeSettings) -> dict[str, torch.Tensor]:
    config = transformer.config
    return {
        "hidden_states": torch.randn(rows, config.in_channels, *[config.sample_size] * 2, device=settings.device),
        "timestep": torch.full((rows,), 500, device=settings.device),
        "class_labels": torch.zeros(rows, dtype=torch.long, device=settings.device),
    }


# ---------------------------------------------------------------------------------------------------
# What the machine has to give


def measure_limit(pipeline, steps: int, settings: ServeSettings) -> dict:
    """The base alone, without adapters, queue or sampler: one guided picture, and as many as are drawn together."""
    transformer, vae, side = pipeline.transformer, pipeline.vae, pipeline.transformer.config.sample_size

    def network(pictures: int) -> Callable[[], object]:
        inputs = network_inputs(transformer, 2 * pictures, settings)  # guided
        return lambda: transformer(**inputs)

    def autoencoder(pictures: int) -> Callable[[], object]:
        latents = torch.randn(pictures, vae.config.latent_channels, side, side, device=settings.device)
        return lambda: vae.decode(latents)

    sizes = (1, settings.max_batch)
    parts = {(part, size): part(size) for part in (network, autoencoder) for size in sizes}
    with torch.no_grad():
        seconds = interleave(parts, settings.rounds, clock=CLOCKS[settings.clock])
    a_picture = {key: float(np.median(of_it)) / key[1] for key, of_it in seconds.items()}
    alone, together = (steps * a_picture[network, size] + a_picture[autoencoder, size] for size in sizes)
    return {
        "together": settings.max_batch,
        "network_s": [a_picture[network, size] for size in sizes],
        "autoencoder_s": [a_picture[autoencoder, size] for size in sizes],
        "alone_over_together": alone / together,
    }


# ---------------------------------------------------------------------------------------------------
# Resident adapters


def measure_resident(pipeline, file: Path, settings: ServeSettings) -> dict:
    """A step of one batch: by one adapter, which is alone in the model, and by as many as there are samples."""
    number = settings.resident
    models = {1: twin(pipeline.transformer), number: twin(pipeline.transformer)}
    for count, model in models.items():
        for index in range(count):
            load_adapter(model, file.with_suffix(".safetensors"), str(index))
    inputs = network_inputs(pipeline.transformer, number, settings)
    with (
        torch.no_grad(),
        route_adapters(models[1], ["0"] * number),
        route_adapters(models[number], [str(index) for index in range(number)]),
    ):
        steps = {"one": lambda: models[1](**inputs), "many": lambda: models[number](**inputs)}
        seconds = interleave(steps, settings.rounds, clock=CLOCKS[settings.clock])
    return {
        "samples": number,
        "one_s": float(np.median(seconds["one"])),
        "many_s": float(np.median(seconds["many"])),
        "many_over_one": ratio(seconds["many"], seconds["one"]),
    }


# ---------------------------------------------------------------------------------------------------
# Report


def markdown(results: dict) -> str:
    settings = results["settings"]
    how = f"{settings['threads']} thread(s), {settings['clock']} clock"
    lines = [f"## Serving, {how}, batches of up to {settings['max_batch']}", ""]
    for number, base in enumerate(settings["bases"]):
        rows = [row for row in results["clients"] if row["base"] == base]
        if not rows:
            continue
        lines += [f"### {base}, {settings['steps'][number]} DDIM steps, guided", ""]
        cells = [
            [
                row["way"],
                str(row["clients"]),
                f"{row['images_per_second']:.2f}",
                f"{row['over_switched'][0]:.2f} ±{(row['over_switched'][2] - row['over_switched'][1]) / 2:.2f}",
                f"{row['p50_s']:.2f}",
                f"{row['p95_s']:.2f}",
                f"{row['peak_memory_bytes'] / 1e6:.0f}",
            ]
            for row in rows
        ]
        header = ["", "clients", "images/s", "× switched", "p50 s", "p95 s", "+MB"]
        lines += [*table(header, cells), ""]
    for number, base in enumerate(settings["bases"]):
        if rows := [row for row in results["arrivals"] if row["base"] == base]:
            steps = [str(times * settings["steps"][number]) for times in (1, 2, 4)]
            lines += [f"### {base}, requests at random, {', '.join(steps)} DDIM steps, guided", ""]
            lines += [*arrivals_table(rows), ""]
    lines += ["### What batching can give at most: the base alone, by picture", ""]
    cells = [
        [
            row["base"],
            *(f"{1e3 * seconds:.2f}" for part in ("network_s", "autoencoder_s") for seconds in row[part]),
            f"{row['alone_over_together']:.2f}",
        ]
        for row in results["limit"]
    ]
    of = f"of {settings['max_batch']}"
    header = ["", "network, ms a step", of, "autoencoder, ms", of, "x"]
    lines += [*table(header, cells), ""]
    lines += ["### A step, by resident adapters", ""]
    cells = [
        [
            row["base"],
            str(row["samples"]),
            f"{1e3 * row['one_s']:.1f}",
            f"{1e3 * row['many_s']:.1f}",
            f"{row['many_over_one'][0]:.3f}",
        ]
        for row in results["resident"]
    ]
    lines += table(["", "samples", "one adapter, ms", "one each, ms", "ratio"], cells)
    return "\n".join(lines) + "\n"
