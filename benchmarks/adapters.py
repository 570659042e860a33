"""What it costs to load and switch adapters, and to serve many in one batch, beside PEFT's LoRA of rank 1."""

import contextlib
import dataclasses
import itertools
import json
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.loaders.peft import PeftAdapterMixin
from torch import nn

from benchmarks.measure import interleave, ratio, storage_bytes, table
from benchmarks.peers import make_base, twin
from onelora_diffusion.adapters.contract import BESIDE_LINEAR
from onelora_diffusion.config import AdapterConfig
from onelora_diffusion.injection.layers import target_layers
from onelora_diffusion.injection.routing import route_adapters
from onelora_diffusion.injection.verbs import inject_adapter, set_adapters
from onelora_diffusion.pipelines.dit import OneLoRADiTPipeline
from onelora_diffusion.storage.adapter_file import save_adapter
from onelora_diffusion.storage.lora import DIFFUSERS_LORA

ONE_LORA = "1LoRA"
VERBS = ("first load", "load", "switch", "hot-swap")


@dataclass
class AdaptersSettings:
    """Time loading, switching and per-sample adapters, ours and PEFT's LoRA r=1, on a base held in bf16."""

    parts: tuple[Literal["load", "mixed"], ...] = ("load", "mixed")
    """load: load and switch. mixed: many adapters resident, and many in one batch."""
    width: int = 1152
    """Features of a token."""
    heads: int = 16
    """Attention heads."""
    layers: int = 28
    """Blocks of the model that adapters are loaded into; DiT-XL/2 has 28."""
    rounds: int = 9
    """How often each verb is timed; a ratio is taken in each round."""
    adapters: tuple[int, ...] = (1, 8, 64, 512)
    """Numbers of adapters that are resident, and that serve one batch."""
    batch: int = 512
    """Samples of that batch."""
    mixed_layers: int = 1
    """Blocks of the model for it."""
    mixed_sample_size: int = 8
    """Height of its latents; n makes (n / 2)² tokens a sample."""
    mixed_rounds: int = 5
    """How often each forward pass is timed."""
    threads: int = 2
    """Threads of PyTorch on a CPU."""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: processor time of this process; with --threads 1 it is little moved by what else the machine does."""
    output_dir: Path = Path("runs/adapters")
    """Where adapters.json and adapters.md go."""


def adapters(settings: AdaptersSettings) -> dict:
    """Measure, print the tables, and write `adapters.json` and `adapters.md`.

    Raises:
        ValueError: a batch that the numbers of adapters do not divide.
    """
    if odd := [count for count in settings.adapters if settings.batch % count]:
        raise ValueError(f"a batch of {settings.batch} samples cannot be shared by {odd[0]} adapters alike")
    torch.set_num_threads(settings.threads)
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    results = {
        "settings": dataclasses.asdict(settings) | {"output_dir": str(settings.output_dir)},
        "machine": {"torch": torch.__version__, "processor": platform.processor() or platform.machine()},
        "load": [],
        "mixed": [],
    }
    for part, measure in (("load", measure_loading), ("mixed", measure_mixed)):
        if part in settings.parts:
            results[part] = measure(settings)
            (settings.output_dir / "adapters.md").write_text(markdown(results))
            (settings.output_dir / "adapters.json").write_text(json.dumps(results, indent=1))
    print(markdown(results))
    return results


def make_bf16_base(settings: AdaptersSettings, layers: int, sample_size: int = 32) -> DiTTransformer2DModel:
    """A random base whose weights are drawn in bf16, so that an fp32 one is never in memory."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        return make_base(settings.width, settings.heads, layers, sample_size).eval()
    finally:
        torch.set_default_dtype(torch.float32)


# ---------------------------------------------------------------------------------------------------
# Load and switch. Each peer has the same verbs; after `load` the new adapter serves.


class Ours:
    """Our pipeline's verbs."""

    def __init__(self, model: nn.Module, files: Path):
        self.file = files / "ours"
        self.pipe = OneLoRADiTPipeline.from_pipe(DiTPipeline(model, None, DDIMScheduler()))

    def load(self, name: str) -> None:
        self.pipe.load_lora_weights(self.file, adapter_name=name)

    def switch(self, name: str) -> None:
        self.pipe.set_adapters(name)

    def hotswap(self, name: str) -> None:
        self.pipe.load_lora_weights(self.file, adapter_name=name, hotswap=True)


class _DiTWithLoRA(PeftAdapterMixin, DiTTransformer2DModel):
    """What diffusers makes of the transformers that it gives LoRA verbs."""


class DiffusersLora:
    """diffusers' verbs, with the defaults of its pipelines."""

    def __init__(self, model: nn.Module, files: Path):
        self.file = {"pretrained_model_name_or_path_or_dict": files / "diffusers", "weight_name": DIFFUSERS_LORA}
        self.model = model
        model.__class__ = _DiTWithLoRA

    def load(self, name: str) -> None:
        self.model.load_lora_adapter(**self.file, prefix=None, adapter_name=name, low_cpu_mem_usage=True)

    def switch(self, name: str) -> None:
        self.model.set_adapters(name)

    def hotswap(self, name: str) -> None:
        self.model.load_lora_adapter(**self.file, prefix=None, adapter_name=name, hotswap=True, low_cpu_mem_usage=True)


class PeftLora:
    """PEFT's own verbs, which it gives any model."""

    def __init__(self, model: nn.Module, files: Path):
        self.file, self.model = files / "peft", model

    def load(self, name: str) -> None:
        import peft

        if isinstance(self.model, peft.PeftModel):
            self.model.load_adapter(self.file, name)
            self.model.set_adapter(name)
        else:
            self.model = peft.PeftModel.from_pretrained(self.model, self.file, name)

    def switch(self, name: str) -> None:
        self.model.set_adapter(name)

    def hotswap(self, name: str) -> None:
        from peft.utils.hotswap import hotswap_adapter

        hotswap_adapter(self.model, self.file, name, torch_device="cpu")


LOADERS = {ONE_LORA: Ours, "PEFT LoRA r=1": PeftLora, "PEFT LoRA r=1, diffusers": DiffusersLora}


def lora_config(base: nn.Module):
    import peft

    return peft.LoraConfig(r=1, lora_alpha=1, target_modules=list(target_layers(base, None)))


def write_files(base: nn.Module, files: Path) -> None:
    """The adapter of each peer as its own library writes it."""
    import peft

    save_adapter(inject_adapter(twin(base), AdapterConfig()), files / "ours")
    peft.get_peft_model(twin(base), lora_config(base)).save_pretrained(files / "peft")
    model = twin(base)
    model.__class__ = _DiTWithLoRA
    model.add_adapter(lora_config(base))
    model.save_lora_adapter(files / "diffusers")


def measure_loading(settings: AdaptersSettings) -> list[dict]:
    """Seconds of each verb of each peer. Every round loads one more adapter beside those that are there."""
    base = make_bf16_base(settings, settings.layers)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        files = Path(folder)
        write_files(base, files)
        plain = {name: [peer(twin(base), files) for _ in range(settings.rounds + 1)] for name, peer in LOADERS.items()}
        serving = {name: peers[0] for name, peers in plain.items()}  # each of the others loads once only

        def verb(call: Callable[[str], Callable[[], None]], warmup: int, label: str) -> dict[str, np.ndarray]:
            clock = time.process_time if settings.clock == "cpu" else time.perf_counter
            steps = {name: call(name) for name in LOADERS}
            return interleave(steps, settings.rounds, warmup=warmup, clock=clock, label=label)

        def first(name):
            peers = iter(plain[name])
            return lambda: next(peers).load("a0")

        def load(name):
            names = (f"a{index}" for index in itertools.count(1))
            return lambda: serving[name].load(next(names))

        def switch(name):
            names = itertools.cycle(["a0", "a1"])
            return lambda: serving[name].switch(next(names))

        def hotswap(name):
            return lambda: serving[name].hotswap("a1")

        seconds = {"first load": verb(first, 1, "first load")}
        for peers in plain.values():
            del peers[1:]
        for label, call in (("load", load), ("switch", switch), ("hot-swap", hotswap)):
            seconds[label] = verb(call, 2, label)
    return [
        {"peer": name, "verb": label, "seconds": quartiles(own[name]), "ours_over_it": ratio(own[ONE_LORA], own[name])}
        for label, own in seconds.items()
        for name in LOADERS
    ]


@contextlib.contextmanager
def _quiet():
    """Without PEFT's advice on models that have several adapters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def quartiles(seconds: np.ndarray) -> tuple[float, float, float]:
    """Median and quartiles."""
    return tuple(float(q) for q in np.quantile(seconds, (0.5, 0.25, 0.75)))


# ---------------------------------------------------------------------------------------------------
# Many adapters


def our_models(base: nn.Module, count: int) -> tuple[nn.Module, nn.Module]:
    """Two bases with the same `count` random 1LoRA adapters, `a0`, `a1`, …: where `a0` serves, and to be routed."""
    model = twin(base)
    for index in range(count):
        inject_adapter(model, AdapterConfig(), f"a{index}")
    _randomize(model, ".onelora.")
    set_adapters(model, "a0")
    return model, twin(model)


def peft_model(base: nn.Module, count: int) -> nn.Module:
    """The base with `count` random LoRA adapters of PEFT, `a0`, `a1`, …, of which `a0` serves."""
    import peft

    model = peft.get_peft_model(twin(base), lora_config(base), "a0")
    for index in range(1, count):
        model.add_adapter(f"a{index}", lora_config(base))
    _randomize(model, ".lora_B.")
    return model.eval()


def _randomize(model: nn.Module, part: str, scale: float = 1e-3, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def adapter_bytes(model: nn.Module) -> int:
    """Bytes of the tensors that adapters have added."""
    return storage_bytes(p for name, p in model.named_parameters() if ".onelora." in name or ".lora_" in name)


def batch_of(settings: AdaptersSettings) -> tuple[torch.Tensor, ...]:
    """Latents, timesteps, class labels."""
    generator, size = torch.Generator().manual_seed(0), settings.mixed_sample_size
    latents = torch.randn(settings.batch, 4, size, size, generator=generator).bfloat16()
    timesteps, class_labels = (torch.randint(0, 1000, (settings.batch,), generator=generator) for _ in range(2))
    return latents, timesteps, class_labels


def measure_mixed(settings: AdaptersSettings) -> list[dict]:
    """Forward passes without gradients, all of them in every round: the base, one adapter, and many in the batch."""
    base = make_bf16_base(settings, settings.mixed_layers, settings.mixed_sample_size)
    batch = batch_of(settings)
    shared, _ = our_models(base, 1)  # conditioning is computed once, as in all of ours
    set_adapters(shared, [])
    steps = {"base": lambda: shared(*batch), "base, stock": lambda: base(*batch)}
    openings, rows = {}, []
    clock = time.process_time if settings.clock == "cpu" else time.perf_counter
    with contextlib.ExitStack() as routes, torch.no_grad(), _quiet():
        for count in settings.adapters:
            names = [f"a{index % count}" for index in range(settings.batch)]
            serving, routed = our_models(base, count)
            routes.enter_context(route_adapters(routed, names))
            peft = peft_model(base, count)
            steps[ONE_LORA, "one", count] = lambda model=serving: model(*batch)
            steps[ONE_LORA, "mixed", count] = lambda model=routed: model(*batch)
            steps["PEFT", "one", count] = lambda model=peft: model(*batch)
            steps["PEFT", "mixed", count] = lambda model=peft, names=names: model(*batch, adapter_names=names)
            openings[count] = lambda model=serving, names=names: _open(model, names)
            seats = [seat for (kind, _), seat in routed._onelora.seats.items() if kind == BESIDE_LINEAR]
            rows.append(
                {
                    "adapters": count,
                    "ours_bytes": adapter_bytes(serving),
                    "route_bytes": storage_bytes([b for seat in seats for b in seat.open_route.stacks().b.values()]),
                    "peft_bytes": adapter_bytes(peft),
                }
            )
        seconds = interleave(steps, settings.mixed_rounds, warmup=1, clock=clock, label="mixed")
        opening = interleave(openings, settings.mixed_rounds, warmup=1, clock=clock, label="open")
    for row in rows:
        count = row["adapters"]
        row["base_seconds"] = quartiles(seconds["base"])
        row["stock_base_over_base"] = ratio(seconds["base, stock"], seconds["base"])
        row["open_seconds"] = quartiles(opening[count])
        for peer, reference in ((ONE_LORA, "base"), ("PEFT", "base, stock")):
            for kind in ("one", "mixed"):
                own = seconds[peer, kind, count]
                row[f"{peer}, {kind}"] = {"seconds": quartiles(own), "over_base": ratio(own, seconds[reference])}
        row["ours_over_peft"] = ratio(seconds[ONE_LORA, "mixed", count], seconds["PEFT", "mixed", count])
    return rows


def _open(model: nn.Module, names: list[str]) -> None:
    with route_adapters(model, names):
        pass


# ---------------------------------------------------------------------------------------------------
# Report


def markdown(results: dict) -> str:
    """The tables, at most 100 columns wide."""
    settings = results["settings"]
    machine = (
        f"threads: {settings['threads']}, {settings['clock']} time, medians (± half the distance of the quartiles)."
    )
    lines = []
    if results["load"]:
        lines += [
            f"### Load and switch: DiT of width {settings['width']}, {settings['layers']} layers, bf16",
            "",
            f"{settings['rounds']} rounds, {machine}",
            "`load` includes that the new adapter serves. The first load of ours also shares the conditioning.",
            "",
        ] + _loading_table(results["load"])
    if results["mixed"]:
        tokens = (settings["mixed_sample_size"] // 2) ** 2
        first = results["mixed"][0]
        lines += (
            [""] * bool(lines)
            + [
                f"### Many adapters: width {settings['width']}, layers: {settings['mixed_layers']}, "
                f"batch {settings['batch']} of {tokens} tokens, bf16",
                "",
                f"{settings['mixed_rounds']} rounds, {machine}",
                "Forward pass without gradients in units of the base: for ours with one conditioning, which takes",
                f"{1e3 * first['base_seconds'][0]:.0f} ms; for PEFT as diffusers has it, which takes "
                f"{first['stock_base_over_base'][0]:.2f} of that.",
                "",
            ]
            + _mixed_table(results["mixed"])
        )
    return "\n".join(lines) + "\n"


def _spread(values: tuple[float, float, float], unit: float = 1.0, digits: int = 2) -> str:
    median, low, high = (unit * value for value in values)
    return f"{median:.{digits}f} ±{(high - low) / 2:.{digits}f}"


def _loading_table(rows: list[dict]) -> list[str]:
    by_peer = {(row["peer"], row["verb"]): row for row in rows}
    cells = [
        [peer] + [_spread(by_peer[peer, verb]["seconds"], 1e3, 1) for verb in VERBS]
        for peer in dict.fromkeys(row["peer"] for row in rows)
    ]
    for peer in dict.fromkeys(row["peer"] for row in rows if row["peer"] != ONE_LORA):
        cells.append(
            [f"{ONE_LORA} / {peer.removeprefix('PEFT ')}"]
            + [_spread(by_peer[peer, verb]["ours_over_it"], digits=3) for verb in VERBS]
        )
    return table(["ms", *VERBS], cells)


def _mixed_table(rows: list[dict]) -> list[str]:
    header = ["adapters", "ours, one", "ours, mixed", "PEFT, one", "PEFT, mixed", "mixed/mixed"]
    speeds = table(
        header,
        [
            [str(row["adapters"])]
            + [
                _spread(row[f"{peer}, {kind}"]["over_base"])
                for peer in (ONE_LORA, "PEFT")
                for kind in ("one", "mixed")
            ]
            + [_spread(row["ours_over_peft"], digits=3)]
            for row in rows
        ],
    )
    memory = table(
        ["adapters", "ours, MB", "open route, MB", "PEFT, MB", "opening, ms"],
        [
            [str(row["adapters"])]
            + [f"{row[key] / 1e6:.2f}" for key in ("ours_bytes", "route_bytes", "peft_bytes")]
            + [_spread(row["open_seconds"], 1e3, 1)]
            for row in rows
        ],
    )
    return [
        *speeds,
        "",
        "one: all are resident, one serves. mixed: all serve, each its share of the samples. Resident:",
        "",
        *memory,
    ]
