"""Images a second at DiT-XL/2's size, beside the stock pipeline; and what a GPU would need, on paper."""

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
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from torch import nn

from benchmarks.measure import CountWork, interleave, ratio, table
from benchmarks.peers import make_base, make_peer
from benchmarks.roofline import DEVICES, RATES, roofline
from benchmarks.sampled import sample_latents
from onelora_diffusion.devices import DTYPES, ComputeSettings
from onelora_diffusion.injection.merging import merge_adapter, merged
from onelora_diffusion.sampling import SamplerSettings, generate_images, image_generators

STOCK = "stock pipeline, base"
PAPER_IMAGES = (1, 4, 16, 64)


@dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """Time generation by precision, merge, compile and images at once, beside the stock pipeline, in one run."""

    precisions: tuple[Literal["no", "bf16", "fp16"], ...] = ("no", "bf16")
    """Precisions that the model is held in, the stock pipeline's too."""
    images: tuple[int, ...] = (1, 4)
    """Numbers of images that are asked for."""
    padded: bool = True
    """Also time images in a batch that is padded to --images-at-once, as in an evaluation."""
    images_at_once: int = 16
    """Images of a padded batch."""
    compile: bool = False
    """Also time compiled blocks."""
    num_inference_steps: int = 2
    """DDIM steps, guided."""
    width: int = 1152
    """Features of a token."""
    heads: int = 16
    """Attention heads."""
    layers: int = 28
    """Blocks; DiT-XL/2 has 28."""
    sample_size: int = 32
    """Height and width of the latents."""
    vae_channels: tuple[int, ...] = (128, 256, 512, 512)
    """Widths of the VAE's blocks; these are Stable Diffusion's."""
    rounds: int = 3
    """How often each call is timed; a ratio is taken in each round."""
    threads: int = 2
    """Threads of PyTorch on a CPU."""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: processor time of this process; with --threads 1 it is little moved by what else the machine does."""
    device: str = "cpu"
    """cpu or cuda."""
    output_dir: Path = Path("runs/generate")
    """Where generate.json, generate.md and generate.png go."""


def generate(settings: GenerateSettings) -> dict:
    """Measure, print the tables, and write `generate.json`, `generate.md` and `generate.png`."""
    torch.set_num_threads(settings.threads)
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    results = {
        "settings": dataclasses.asdict(settings) | {"output_dir": str(settings.output_dir)},
        "machine": {"torch": torch.__version__, "processor": platform.processor() or platform.machine()},
        "measured": [],
        "merging": [],
        "sampler_seconds_per_step": sampler_alone(settings),
        "paper": paper(settings),
    }
    for precision in settings.precisions:
        for compiled in (False, True) if settings.compile else (False,):
            rows, merging = measure(precision, compiled, settings)
            results["measured"] += rows
            results["merging"].append(merging)
    report = markdown(results)
    print(report)
    (settings.output_dir / "generate.md").write_text(report)
    (settings.output_dir / "generate.json").write_text(json.dumps(results, indent=1))
    plot(results, settings.output_dir / "generate.png")
    return results


# ---------------------------------------------------------------------------------------------------
# Measure


def measure(precision: str, compiled: bool, settings: GenerateSettings) -> tuple[list[dict], dict]:
    """Seconds of every way to make some images, in rounds; and of merging and unmerging the adapter once."""
    base = make_base(settings.width, settings.heads, settings.layers, settings.sample_size)
    base.to(settings.device, DTYPES[precision])
    vae = make_vae(settings.vae_channels)
    unmerged = make_peer("1LoRA", base, True)
    merged_model = merge_adapter(make_peer("1LoRA", copy.deepcopy(base), True))
    pipelines = {
        name: DiTPipeline(model, vae, DDIMScheduler(clip_sample=False))
        for name, model in ((STOCK, base), ("1LoRA, unmerged", unmerged), ("1LoRA, merged", merged_model))
    }
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)
        placement = ComputeSettings(mixed_precision=precision, compile=compiled)
        placement.place(pipeline, torch.device(settings.device))
    calls = {}
    for images in settings.images:
        calls[STOCK, images, images] = stock_call(pipelines[STOCK], images, settings)
        for name in list(pipelines)[1:]:
            calls[name, images, images] = our_call(pipelines[name], images, None, settings)
        if settings.padded and images < settings.images_at_once:
            at_once = settings.images_at_once
            calls["1LoRA, merged", images, at_once] = our_call(pipelines["1LoRA, merged"], images, at_once, settings)
    clock = time.process_time if settings.clock == "cpu" else time.perf_counter
    label = f"{precision}{', compiled' * compiled}"
    # The models share their blocks' code, which is compiled anew for each of them and each shape, and past the limit
    # would run eager.
    with torch._dynamo.config.patch(recompile_limit=8 * len(calls)):
        seconds = interleave(calls, settings.rounds, warmup=1, clock=clock, label=label)
    rows = [
        {"precision": precision, "compiled": compiled, "model": name, "images": images, "at_once": at_once}
        | {"seconds": float(np.median(own)), "images_per_second": images / float(np.median(own))}
        | {"over_stock": ratio(own, seconds[STOCK, images, images])}
        for (name, images, at_once), own in seconds.items()
    ]
    start = clock()
    with merged(unmerged):
        pass
    return rows, {"precision": precision, "compiled": compiled, "seconds": clock() - start}


def make_vae(channels: tuple[int, ...]) -> AutoencoderKL:
    """A random VAE whose images are 2^(len(channels) - 1) times as large as its latents."""
    torch.manual_seed(0)
    blocks = len(channels)
    return AutoencoderKL(
        block_out_channels=channels,
        layers_per_block=2,
        norm_num_groups=min(32, channels[0]),
        down_block_types=["DownEncoderBlock2D"] * blocks,
        up_block_types=["UpDecoderBlock2D"] * blocks,
    ).requires_grad_(False)


def stock_call(pipeline: DiTPipeline, images: int, settings: GenerateSettings) -> Callable[[], object]:
    def call():
        return pipeline(
            list(range(images)),
            generator=image_generators(0, range(images)),
            num_inference_steps=settings.num_inference_steps,
            output_type="np",
        )

    return call


def our_call(pipeline, images: int, images_at_once: int | None, settings: GenerateSettings) -> Callable[[], object]:
    sampler = SamplerSettings(num_inference_steps=settings.num_inference_steps)

    def call():
        batches = generate_images(
            pipeline, range(images), 0, range(images), sampler, images_at_once=images_at_once, batch_size=images
        )
        return [images.cpu() for _, images in batches]

    return call


class Nothing(nn.Module):
    """A transformer that answers at once: what is left of a step is the sampler's own."""

    def __init__(self, config, device: str):
        super().__init__()
        self.config, self.weight = config, nn.Parameter(torch.zeros(1, device=device))
        self.answer = torch.zeros(2, 8, config.sample_size, config.sample_size, device=device)

    def forward(self, latents, timestep, class_labels):
        return type("Output", (), {"sample": self.answer})


def sampler_alone(settings: GenerateSettings, steps: int = 200) -> float:
    """Seconds of the sampler's own work in a guided step of one image."""
    with torch.device("meta"):
        config = make_base(settings.width, settings.heads, 1, settings.sample_size).config
    model, sampler = Nothing(config, settings.device), SamplerSettings(num_inference_steps=steps)
    start = time.process_time()
    labels, generators = torch.tensor([0]), image_generators(0, [0])
    sample_latents(model, DDIMScheduler(clip_sample=False).config, labels, generators, sampler, null_label=1000)
    return (time.process_time() - start) / steps


def paper(settings: GenerateSettings) -> list[dict]:
    """Seconds of a guided step at 28 layers on each device, by precision and images at once."""
    works = {}
    for precision in ("fp32", "bf16"):
        for layers in (1, 2):
            base = make_base(settings.width, settings.heads, layers, settings.sample_size)
            model = merge_adapter(make_peer("1LoRA", base.to(torch.bfloat16 if precision == "bf16" else None), True))
            for batch in (2, 3):
                latents = torch.randn(batch, 4, settings.sample_size, settings.sample_size, dtype=model.dtype)
                with CountWork() as counter, torch.no_grad():
                    model.eval()(latents, torch.zeros(batch, dtype=torch.long), torch.arange(batch))
                works[precision, layers, batch] = counter.work
    rows = []
    for device in DEVICES:
        for rate, flops in RATES[device.name].items():
            of = {key[1:]: work for key, work in works.items() if key[0] == ("bf16" if rate == "bf16" else "fp32")}
            at_rate = dataclasses.replace(device, flops_per_second=flops)
            for row in roofline(of, at_rate, tuple(2 * images for images in PAPER_IMAGES), 28):
                rows.append(row | {"device": device.name, "rate": rate, "images": row["batch"] // 2})
    return rows


# ---------------------------------------------------------------------------------------------------
# Report


def markdown(results: dict) -> str:
    settings = results["settings"]
    lines = [
        f"DiT of width {settings['width']}, {settings['layers']} layers, {settings['num_inference_steps']} guided "
        "DDIM steps and the VAE,",
        f"{settings['threads']} threads, {settings['clock']} time, median over {settings['rounds']} rounds "
        "(± half the distance of the quartiles).",
        "",
    ]
    cells = [
        [f"{_precision(row)}, {row['model']}", str(row["images"]), str(row["at_once"]), f"{row['seconds']:.2f}"]
        + [f"{row['images_per_second']:.3f}", _with_spread(row["over_stock"])]
        for row in results["measured"]
    ]
    lines += table(["", "images", "at once", "s", "images/s", "x stock"], cells)
    step = results["sampler_seconds_per_step"]
    lines += ["", f"The sampler's own work is {1e3 * step:.2f} ms a step."]
    for row in results["merging"]:
        lines += [f"Merging and unmerging the adapter, {_precision(row)}: {row['seconds']:.2f} s, once a run."]
    lines += ["", "### On paper: a guided step of 28 layers, ms by images at once", ""]
    keys = dict.fromkeys((row["device"], row["rate"]) for row in results["paper"])
    seconds = {(row["device"], row["rate"], row["images"]): row["seconds"] for row in results["paper"]}
    cells = [[f"{d}, {r}", *(f"{1e3 * seconds[d, r, n]:.1f}" for n in PAPER_IMAGES)] for d, r in keys]
    lines += table(["", *map(str, PAPER_IMAGES)], cells)
    lines += ["", f"### On paper: hours, {PAPER_IMAGES[-2]} images at once, without the VAE", ""]
    jobs = [(count, steps) for count in (10_000, 50_000) for steps in (50, 250)]
    cells = [
        [f"{d}, {r}"] + [f"{seconds[d, r, PAPER_IMAGES[-2]] * s * n / PAPER_IMAGES[-2] / 3600:.2f}" for n, s in jobs]
        for d, r in keys
    ]
    lines += table(["", *(f"{count // 1000}k, {steps} steps" for count, steps in jobs)], cells)
    return "\n".join(lines) + "\n"


def _precision(row: dict) -> str:
    return ("fp32" if row["precision"] == "no" else row["precision"]) + ", compiled" * row["compiled"]


def _with_spread(ratio: tuple[float, float, float]) -> str:
    median, low, high = ratio
    return f"{median:.3f} ±{(high - low) / 2:.2f}"


def plot(results: dict, path: Path) -> None:
    """Images a second of every way, a panel for each number of images."""
    from matplotlib.figure import Figure

    counts = list(dict.fromkeys(row["images"] for row in results["measured"]))
    figure = Figure(figsize=(2 + 5 * len(counts), 4), layout="constrained")
    panels = figure.subplots(1, len(counts), squeeze=False)[0]
    for axis, count in zip(panels, counts, strict=True):
        rows = [row for row in results["measured"] if row["images"] == count]
        names = [
            f"{_precision(row)}, {row['model']}" + f", {row['at_once']} at once" * (row["at_once"] != count)
            for row in rows
        ]
        colors = ["tab:gray" if row["model"] == STOCK else "tab:red" for row in rows]
        axis.barh(range(len(rows)), [row["images_per_second"] for row in rows], color=colors)
        axis.set(yticks=range(len(rows)), yticklabels=names, xlabel="images a second")
        axis.set_title(f"{count} image" + "s" * (count > 1))
        axis.invert_yaxis()
    figure.savefig(path, dpi=110)
