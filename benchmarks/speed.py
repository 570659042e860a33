"""Step time, memory and operators of 1LoRA and its peers, in one process, on the same layers and the same batch."""

import copy
import dataclasses
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from benchmarks.families import family_speed
from benchmarks.measure import CountWork, Work, interleave, ratio, resident_bytes, saved_bytes, storage_bytes, table
from benchmarks.peers import OURS, PEERS, RIVALS, make_base, make_peer
from benchmarks.roofline import DEVICES, Device, roofline, step_seconds
from onelora_diffusion.injection.conditioning import DiTConditioning
from onelora_diffusion.injection.merging import merge_adapter

PRECISIONS = ("fp32", "bf16", "bf16-base")
REFERENCE = "BitFit"
PAPER_BATCHES = (1, 4, 16, 64, 256)


@dataclass
class SpeedSettings:
    """Time 1LoRA and its peers, interleaved step by step; count their memory and operators."""

    peers: tuple[str, ...] = tuple(PEERS)
    """Which methods. 1LoRA and BitFit are always among them."""
    family: str = "dit"
    """dit; or few blocks of a text-to-image transformer at its full width, with its own peers: pixart, sd3, flux or
    sana; or the folder of a pipeline, recorded, the denoiser of random weights and --layers blocks a list."""
    precisions: tuple[Literal["fp32", "bf16", "bf16-base", "int8"], ...] = PRECISIONS
    """fp32; bf16: autocast over an fp32 base; bf16-base: autocast over a base held in bf16; int8: the same over one
    whose weights torchao has packed, of text-to-image alone."""
    untimed: tuple[Literal["bf16-base", "int8"], ...] = ()
    """Of a text-to-image transformer, precisions whose bytes alone are counted: steps in bf16 say nothing on a
    processor that has no instructions for it."""
    conditioning: tuple[Literal["shared", "stock"], ...] = ("shared", "stock")
    """The rivals' model: stock computes the conditioning in each block; shared once, as ours always does."""
    width: int = 1152
    """Features of a token."""
    heads: int = 16
    """Attention heads."""
    layers: int = 4
    """Blocks; DiT-XL/2 has 28."""
    sample_size: int = 32
    """Height and width of the latents; a token is 2 x 2 of them."""
    batch: int = 4
    """Samples in a step."""
    rounds: int = 15
    """How often each step is timed; a ratio is taken in each round."""
    compile: bool = False
    """Also time everything under torch.compile."""
    roofline: bool = True
    """Also work out from the operators what a step of DiT-XL/2's depth costs at least on an A100 and an H100."""
    threads: int = 2
    """Threads of PyTorch on a CPU."""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: processor time of this process; with --threads 1 it is little moved by what else the machine does."""
    device: str = "cpu"
    """cpu or cuda."""
    output_dir: Path = Path("runs/speed")
    """Where speed.json, speed.md and speed.png go."""


def speed(settings: SpeedSettings) -> dict:
    """Measure, print the tables, and write `speed.json`, `speed.md` and `speed.png`.

    Raises:
        ValueError: an unknown peer, or a width that the heads do not divide.
    """
    if settings.family != "dit":
        return family_speed(settings)
    if "int8" in settings.precisions:
        raise ValueError("int8 is measured on a text-to-image transformer: give its --family")
    if unknown := [name for name in settings.peers if name not in PEERS]:
        raise ValueError(f"unknown peer '{unknown[0]}': choose from {', '.join(PEERS)}")
    torch.set_num_threads(settings.threads)

    base = make_base(settings.width, settings.heads, settings.layers, settings.sample_size).to(settings.device)
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    results = {
        "settings": dataclasses.asdict(settings) | {"output_dir": str(settings.output_dir)},
        "machine": {"torch": torch.__version__, "processor": platform.processor() or platform.machine()},
        "resident": resident(settings),
        "train": [],
        "forward": [],
        "roofline": [],
    }
    for precision in settings.precisions:
        held = copy.deepcopy(base).bfloat16() if precision == "bf16-base" else base
        for compiled in (False, True) if settings.compile else (False,):
            results["train"] += measure_training(held, precision, compiled, settings)
            results["forward"] += measure_inference(held, precision, compiled, settings)
    if settings.roofline:
        results["roofline"] = paper_steps(settings)

    report = markdown(results)
    print(report)
    (settings.output_dir / "speed.md").write_text(report)
    (settings.output_dir / "speed.json").write_text(json.dumps(results, indent=1))
    plot(results, settings.output_dir / "speed.png")
    return results


# ---------------------------------------------------------------------------------------------------
# Measure


class Step:
    """Forward, mean squared error, backward and AdamW update of one peer on a fixed batch."""

    def __init__(self, model: nn.Module, precision: str, batch: int, compiled: bool = False):
        self.model, self.precision, self.device = model, precision, model.device.type
        self.batch = make_batch(batch, model.config.sample_size, model.device)
        self.call = torch.compile(model) if compiled else model
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = (
            torch.optim.AdamW(self.trained, lr=1e-5, weight_decay=0.0, fused=True) if self.trained else None
        )

    def loss(self) -> torch.Tensor:
        latents, timesteps, class_labels, target = self.batch
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision != "fp32"):
            output = self.call(latents, timesteps, class_labels).sample
        return (output.float() - target).square().mean()

    def train(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    @torch.no_grad()
    def infer(self) -> torch.Tensor:
        return self.loss()

    def saved_bytes(self) -> int:
        return saved_bytes(self.model, self.loss)

    def work(self, call: Callable) -> Work:
        with CountWork() as counter:
            call()
        return counter.work


def make_batch(batch: int, sample_size: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Latents, timesteps, class labels, target."""
    generator = torch.Generator().manual_seed(0)
    latents, target = (
        torch.randn(batch, channels, sample_size, sample_size, generator=generator) for channels in (4, 8)
    )
    timesteps, class_labels = (torch.randint(0, 1000, (batch,), generator=generator) for _ in range(2))
    return tuple(tensor.to(device) for tensor in (latents, timesteps, class_labels, target))


def variants(settings: SpeedSettings, precision: str) -> list[tuple[str, str]]:
    """(peer, conditioning) of every model to measure."""
    names = [name for name in PEERS if name in settings.peers or name in ("1LoRA", REFERENCE)]
    if precision == "bf16-base":  # full fine-tuning holds its weights in fp32
        names = [name for name in names if name != "full"]
    ours = [(name, "shared") for name in names if name in OURS]
    return ours + [(name, kind) for name in names if name in RIVALS for kind in settings.conditioning]


def measure_training(base: nn.Module, precision: str, compiled: bool, settings: SpeedSettings) -> list[dict]:
    steps = {
        (name, kind): Step(make_peer(name, base, kind == "shared"), precision, settings.batch, compiled)
        for name, kind in variants(settings, precision)
    }
    clock = time.process_time if settings.clock == "cpu" else time.perf_counter
    label = f"train, {precision}{', compiled' * compiled}"
    seconds = interleave({k: s.train for k, s in steps.items()}, settings.rounds, clock=clock, label=label)
    if settings.roofline and not compiled:
        machine = measured_device(torch.float32 if precision == "fp32" else torch.bfloat16, settings.device, clock)

    rows = []
    for (name, kind), step in steps.items():
        own = seconds[name, kind]
        row = {"precision": precision, "compiled": compiled, "peer": name, "conditioning": kind}
        row |= {"seconds": float(np.median(own)), "over_bitfit": ratio(own, seconds[REFERENCE, "shared"])}
        row["ours_over_it"] = {ours: ratio(seconds[ours, "shared"], own) for ours in OURS if (ours, "shared") in steps}
        row["num_trainable_params"] = sum(parameter.numel() for parameter in step.trained)
        row["base_bytes"] = storage_bytes(p for p in step.model.parameters() if not p.requires_grad)
        if not compiled:  # a compiler's operators are its own
            work = step.work(step.train)
            row["saved_bytes"] = step.saved_bytes()
            row |= {"operators": work.operators, "flops": work.flops, "bytes_moved": work.bytes_moved}
            if settings.roofline:
                row["roofline_seconds"] = step_seconds(work, machine)
        rows.append(row)
    return rows


def measure_inference(base: nn.Module, precision: str, compiled: bool, settings: SpeedSettings) -> list[dict]:
    """Forward passes without gradients: the bare base, 1LoRA merged into it, and 1LoRA and PEFT's LoRA beside it."""
    shared = copy.deepcopy(base)
    DiTConditioning(shared).install()
    models = {
        "base, stock": base,
        "base": shared,
        "1LoRA, merged": merge_adapter(make_peer("1LoRA", copy.deepcopy(base), True)),
    }
    beside = [name for name in PEERS if name in ("1LoRA", *settings.peers) and "LoRA" in name]
    models |= {name: make_peer(name, base, True) for name in beside}
    steps = {name: Step(model.eval(), precision, settings.batch, compiled) for name, model in models.items()}
    clock = time.process_time if settings.clock == "cpu" else time.perf_counter
    label = f"forward, {precision}{', compiled' * compiled}"
    seconds = interleave({k: s.infer for k, s in steps.items()}, 2 * settings.rounds, clock=clock, label=label)
    return [
        {"precision": precision, "compiled": compiled, "model": name, "seconds": float(np.median(seconds[name]))}
        | {"over_base": ratio(seconds[name], seconds["base"])}
        | {"over_stock_base": ratio(seconds[name], seconds["base, stock"])}
        | ({} if compiled else {"operators": step.work(step.infer).operators})
        for name, step in steps.items()
    ]


def resident(settings: SpeedSettings) -> dict[str, int]:
    """fp32 bytes of DiT-XL/2's depth at this width, stock and with one conditioning for all blocks."""
    with torch.device("meta"):
        model = make_base(settings.width, settings.heads, 28, settings.sample_size)
    embedding = resident_bytes(model.transformer_blocks[0].norm1.emb)
    stock = resident_bytes(model)
    return {"stock": stock, "shared": stock - 27 * embedding}


def paper_steps(settings: SpeedSettings) -> list[dict]:
    """A roofline of the training step in bf16 autocast over a bf16 base, at 28 layers."""
    bases = {n: make_base(settings.width, settings.heads, n, settings.sample_size).bfloat16() for n in (1, 2)}
    rows = []
    for name, kind in variants(settings, "bf16-base"):
        works = {}
        for layers, base in bases.items():
            for batch in (2, 3):
                step = Step(make_peer(name, base, kind == "shared"), "bf16-base", batch)
                works[layers, batch] = step.work(step.train)
        for device in DEVICES:
            for row in roofline(works, device, PAPER_BATCHES, 28):
                rows.append({"peer": name, "conditioning": kind, "device": device.name} | row)
    return rows


def measured_device(dtype: torch.dtype, device: str, clock: Callable[[], float]) -> Device:
    """This machine's own rates: of a large matrix product, and of an add onto half a gigabyte."""
    matrix, large = torch.randn(2048, 2048, device=device).to(dtype), torch.randn(2**27, device=device)
    seconds = interleave(
        {"mm": lambda: matrix @ matrix, "add": lambda: large.add_(1.0)}, 7, clock=clock, label="rates"
    )
    flops, moved = 2 * 2048**3, 2 * large.numel() * 4
    return Device("this machine", flops / np.median(seconds["mm"]), moved / np.median(seconds["add"]))


# ---------------------------------------------------------------------------------------------------
# Report


def markdown(results: dict) -> str:
    """The tables, at most 100 columns wide."""
    settings = results["settings"]
    lines = [
        f"DiT of width {settings['width']}, {settings['layers']} layers, batch {settings['batch']} of "
        f"{(settings['sample_size'] // 2) ** 2} tokens,",
        f"{settings['threads']} threads, {settings['clock']} time, median over {settings['rounds']} rounds "
        "(± half the distance of the quartiles).",
        "saved: kept for backward. moved: read and written. paper: ms by this machine's roofline.",
    ]
    for precision, compiled in dict.fromkeys((row["precision"], row["compiled"]) for row in results["train"]):
        kind = f"{precision}{', compiled' * compiled}"
        rows = [row for row in results["train"] if (row["precision"], row["compiled"]) == (precision, compiled)]
        lines += ["", f"### Training step, {kind}", ""] + _training_table(rows)
        rows = [row for row in results["forward"] if (row["precision"], row["compiled"]) == (precision, compiled)]
        lines += ["", f"### Forward pass without gradients, {kind}", ""] + _inference_table(rows)
    stock, shared = results["resident"]["stock"], results["resident"]["shared"]
    lines += [
        "",
        f"Resident weights of 28 layers in fp32: stock {stock / 1e6:,.0f} MB, with one conditioning "
        f"{shared / 1e6:,.0f} MB: {(stock - shared) / 1e6:,.0f} MB less.",
    ]
    if results["roofline"]:
        for device in DEVICES:
            rows = [row for row in results["roofline"] if row["device"] == device.name]
            lines += ["", f"### Roofline of a step of 28 layers, bf16 base, {device.name}", ""] + _roofline_table(rows)
    return "\n".join(lines) + "\n"


def _name(row: dict) -> str:
    return row["peer"] + ", stock" * (row["conditioning"] == "stock")


def _with_spread(ratio: tuple[float, float, float]) -> str:
    """Median and half the distance of the quartiles."""
    median, low, high = ratio
    return f"{median:.3f} ±{(high - low) / 2:.2f}"


def _training_table(rows: list[dict]) -> list[str]:
    header = ["method", "ms", "x BitFit", "1LoRA/it"]
    cells = [
        [_name(row), f"{1e3 * row['seconds']:.0f}"]
        + [_with_spread(row["over_bitfit"]), _with_spread(row["ours_over_it"]["1LoRA"])]
        for row in rows
    ]
    if "saved_bytes" in rows[0]:
        header += ["saved MB", "moved GB", "ops"]
        for line, row in zip(cells, rows, strict=True):
            line += [f"{row['saved_bytes'] / 1e6:.1f}", f"{row['bytes_moved'] / 1e9:.2f}", str(row["operators"])]
    if "roofline_seconds" in rows[0]:
        header += ["paper"]
        for line, row in zip(cells, rows, strict=True):
            line += [f"{1e3 * row['roofline_seconds']:.0f}"]
    return table(header, cells)


def _inference_table(rows: list[dict]) -> list[str]:
    header = ["model", "ms", "x base", "x stock base", "operators"]
    cells = [
        [row["model"], f"{1e3 * row['seconds']:.0f}", _with_spread(row["over_base"])]
        + [_with_spread(row["over_stock_base"]), str(row.get("operators", ""))]
        for row in rows
    ]
    return table(header, cells)


def _roofline_table(rows: list[dict]) -> list[str]:
    """Milliseconds of BitFit, and of every peer its ratio, at each batch."""
    seconds = {(_name(row), row["batch"]): row["seconds"] for row in rows}
    launches = {_name(row): row["launch_seconds"] for row in rows}
    header = ["x BitFit"] + [f"batch {batch}" for batch in PAPER_BATCHES] + ["launches, ms"]
    cells = [["BitFit, ms"] + [f"{1e3 * seconds[REFERENCE, batch]:.1f}" for batch in PAPER_BATCHES] + [""]]
    for name in launches:
        ratios = [f"{seconds[name, batch] / seconds[REFERENCE, batch]:.3f}" for batch in PAPER_BATCHES]
        cells.append([name, *ratios, f"{1e3 * launches[name]:.0f}"])
    return table(header, cells)


def plot(results: dict, path: Path) -> None:
    """Step time and memory for backward against BitFit's, a panel a precision."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    eager = [row for row in results["train"] if not row["compiled"]]
    precisions = list(dict.fromkeys(row["precision"] for row in eager))
    figure, axes = pyplot.subplots(
        1, len(precisions), figsize=(1 + 4.5 * len(precisions), 5), squeeze=False, layout="constrained"
    )
    for axis, precision in zip(axes[0], precisions, strict=True):
        rows = [row for row in eager if row["precision"] == precision and row["peer"] != "full"]
        memory = next(row["saved_bytes"] for row in rows if row["peer"] == REFERENCE)
        for position, row in enumerate(rows):
            median, low, high = row["over_bitfit"]
            color = "tab:red" if row["peer"].startswith("1LoRA") else "tab:blue"
            axis.errorbar(median, position, xerr=[[median - low], [high - median]], fmt="o", color=color)
            axis.plot(row["saved_bytes"] / memory, position, "|", color="black", markersize=12)
        axis.plot([], [], "o", color="tab:blue", label="step time, with quartiles")
        axis.plot([], [], "|", color="black", markersize=12, linestyle="none", label="memory for backward")
        axis.axvline(1, color="lightgray", zorder=0)
        axis.set(yticks=range(len(rows)), yticklabels=[_name(row) for row in rows], xlabel="x BitFit", title=precision)
        axis.set_xscale("log")
        limits = axis.get_xlim()
        axis.set_xticks([1, 1.2, 1.5, 2, 3, 5], labels=["1", "1.2", "1.5", "2", "3", "5"])
        axis.set_xlim(limits)  # ticks outside would widen them
        axis.minorticks_off()
        axis.invert_yaxis()
        if axis is not axes[0][0]:
            axis.set_yticklabels([])
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
