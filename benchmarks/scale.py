"""How a training step grows with tokens, layers and resident adapters, each with its fitted slope."""

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from benchmarks.measure import interleave, resident_bytes, table
from benchmarks.peers import PEERS, make_base, make_peer
from benchmarks.speed import Step
from onelora_diffusion.config import AdapterConfig
from onelora_diffusion.injection.verbs import inject_adapter, set_adapters


@dataclass
class ScaleSettings:
    """Time and memory of a step against tokens, layers and resident adapters, with fitted slopes."""

    peers: tuple[str, ...] = ("1LoRA", "BitFit", "PEFT LoRA r=1")
    """Methods for tokens and layers; the rivals on a model whose conditioning is shared as well."""
    precision: Literal["fp32", "bf16", "bf16-base"] = "bf16"
    """As in `speed`."""
    width: int = 1152
    """Features of a token."""
    heads: int = 16
    """Attention heads."""
    layers: tuple[int, ...] = (1, 2, 4)
    """Depths; the other two are measured at the first."""
    sample_sizes: tuple[int, ...] = (16, 24, 32)
    """Heights of the latents; the others are measured at the last. n makes (n / 2)² tokens a sample."""
    adapters: tuple[int, ...] = (1, 8, 64)
    """Numbers of 1LoRA adapters that are loaded while the first serves."""
    batch: int = 4
    """Samples in a step."""
    rounds: int = 7
    """How often each step is timed."""
    threads: int = 2
    """Threads of PyTorch on a CPU."""
    clock: Literal["wall", "cpu"] = "wall"
    """As in `speed`."""
    device: str = "cpu"
    """cpu or cuda."""
    output_dir: Path = Path("runs/scale")
    """Where scale.json and scale.md go."""


def scale(settings: ScaleSettings) -> list[dict]:
    """Measure, print the table of slopes, and write `scale.json` and `scale.md`.

    Raises:
        ValueError: an unknown peer.
    """
    if unknown := [name for name in settings.peers if name not in PEERS]:
        raise ValueError(f"unknown peer '{unknown[0]}': choose from {', '.join(PEERS)}")
    torch.set_num_threads(settings.threads)
    settings.output_dir.mkdir(parents=True, exist_ok=True)

    depth, size = settings.layers[0], settings.sample_sizes[-1]
    rows = []
    for name in settings.peers:
        steps = {(side // 2) ** 2: _step(settings, name, depth, side) for side in settings.sample_sizes}
        rows.append(_slopes(settings, name, "tokens", steps))
        steps = {layers: _step(settings, name, layers, size) for layers in settings.layers}
        rows.append(_slopes(settings, name, "layers", steps))
    steps = {count: _step(settings, "1LoRA", depth, size, count) for count in settings.adapters}
    rows.append(_slopes(settings, "1LoRA", "adapters", steps))

    report = "\n".join(_table(rows)) + "\n"
    print(report)
    (settings.output_dir / "scale.md").write_text(report)
    described = dataclasses.asdict(settings) | {"output_dir": str(settings.output_dir)}
    (settings.output_dir / "scale.json").write_text(json.dumps({"settings": described, "rows": rows}, indent=1))
    return rows


def _step(settings: ScaleSettings, name: str, layers: int, sample_size: int, adapters: int = 1) -> Step:
    base = make_base(settings.width, settings.heads, layers, sample_size).to(settings.device)
    model = make_peer(name, base.bfloat16() if settings.precision == "bf16-base" else base, True)
    for index in range(1, adapters):
        inject_adapter(model, AdapterConfig(), f"resident-{index}")
    if adapters > 1:
        set_adapters(model, "default")
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(".onelora.default." in parameter_name)
    return Step(model, settings.precision, settings.batch)


def _slopes(settings: ScaleSettings, name: str, axis: str, steps: dict[int, Step]) -> dict:
    clock = time.process_time if settings.clock == "cpu" else time.perf_counter
    seconds = interleave(
        {x: step.train for x, step in steps.items()}, settings.rounds, clock=clock, label=f"{name}, {axis}"
    )
    values = {
        "seconds": [float(np.median(seconds[x])) for x in steps],
        "saved_bytes": [step.saved_bytes() for step in steps.values()],
        "resident_bytes": [resident_bytes(step.model) for step in steps.values()],
    }
    slopes = {f"{key}_slope": slope(list(steps), points) for key, points in values.items()}
    return {"peer": name, "axis": axis, "at": list(steps)} | values | slopes


def slope(x: list[float], y: list[float]) -> float:
    """Of the least-squares line y = a + slope · x."""
    return float(np.polyfit(x, y, 1)[0])


def _table(rows: list[dict]) -> list[str]:
    header = ["method", "against", "at", "ms", "ms each", "saved MB each", "resident MB each"]
    return table(
        header,
        [
            [row["peer"], row["axis"], " ".join(map(str, row["at"]))]
            + [" ".join(f"{1e3 * seconds:.0f}" for seconds in row["seconds"]), f"{1e3 * row['seconds_slope']:.3f}"]
            + [f"{round(row[key] / 1e6, 3) + 0.0:.3f}" for key in ("saved_bytes_slope", "resident_bytes_slope")]
            for row in rows
        ],
    )
