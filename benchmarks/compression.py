"""`benchmark.py compression`: does the direction matter that a layer's input is read along?

1LoRA adds b (u·x) to a layer's output, where u is all ones and b is learned. Here u is other things: what the first
gradient or the inputs themselves would choose, chance, or two and four directions with a b for each; and LoRA of
rank 1, which learns u too. A frozen direction is scaled so that u·x has an RMS of k^¼, for k inputs, in every layer:
what is compared is where it points. What the scaling is worth shows beside the sum as it is, and LoRA and DiffFit are
tried with rates that are divided in the same way. Every variant has the same batches, and its own best of the same
learning rates.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.compare import job_of, outward, preset
from benchmarks.compare_inputs import prepare
from benchmarks.compare_report import mean_and_deviation, spread
from benchmarks.compare_run import Job, Updates, evaluate, evaluator_of, machine, read
from onelora_diffusion import AdapterConfig, adapter_state_dict, inject_adapter
from onelora_diffusion.adapters.contract import LayerAdapter
from onelora_diffusion.evaluation.features import load_features
from onelora_diffusion.evaluation.images import Source
from onelora_diffusion.evaluation.report import write_json
from onelora_diffusion.files import write_bytes
from onelora_diffusion.injection.attaching import attach_adapter, build_adapter
from onelora_diffusion.injection.layers import target_layers
from onelora_diffusion.pipelines.base import load_base, resolution_of
from onelora_diffusion.training.ema import ExponentialMovingAverage
from onelora_diffusion.training.optimizers import make_optimizer
from onelora_diffusion.training.schedule import learning_rate_factor
from onelora_diffusion.training.stopping import format_duration
from onelora_diffusion.training.sum_rates import divide_groups

# A variant's frozen directions: the rule, and how many of its directions; LoRA has none.
FROZEN = {
    "sum": ("sum", 1),
    "sum-plain": ("sum, as it is", 1),
    "gradient": ("gradient", 1),
    "inputs": ("inputs", 1),
    "random": ("random", 1),
    "gradient-2": ("gradient", 2),
    "gradient-4": ("gradient", 4),
}
NAMES = {
    "sum": "the sum",
    "sum-plain": "the sum, not scaled (1LoRA)",
    "gradient": "the first gradient's direction",
    "inputs": "the inputs' first component",
    "random": "at random",
    "gradient-2": "two of the first gradient",
    "gradient-4": "four of the first gradient",
    "lora": "LoRA r=1, learned",
    "lora-scaled": "LoRA r=1, B's rates scaled",
    "difffit": "no direction: DiffFit",
    "difffit-scaled": "DiffFit, γ's rates scaled",
    "bitfit": "no direction: BitFit",
}
# How many directions are frozen, in the plot.
COLOURS = {
    1: ("tab:blue", "one frozen direction"),
    2: ("tab:purple", "two"),
    4: ("tab:green", "four"),
    None: ("tab:red", "methods of the library"),
}
# Of the library's methods, the trained tensors whose rates are scaled as those of a frozen direction are: by what they
# multiply, from the layer's input, its output and the adapter's other tensor. BitFit's β multiplies 1.
SCALED = {
    "lora-scaled": ("onelora_lora_B.weight", lambda x, out, trained: x @ trained["onelora_lora_A.weight"].T),
    "difffit-scaled": ("onelora_gamma", lambda x, out, trained: out),
}


@dataclass
class CompressionSettings:
    """Fine-tune the miniature along frozen directions of several kinds, beside LoRA of rank 1 that learns its own."""

    variants: tuple[str, ...] = tuple(NAMES)
    """Which of them."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Runs of each; the first one chooses the learning rate."""
    steps: int = 500
    """Updates of a run."""
    rates: tuple[float, ...] = (2.5e-3, 5e-3, 1e-2)
    """Learning rates that each variant tries, and further outward by their factor while the best is at the edge."""
    class_learning_rate: float = 2e-2
    """Of the class table, which every variant trains."""
    measured_batches: int = 8
    """Batches that directions and scales are taken from."""
    num_images: int = 400
    """Samples that a run is measured by."""
    threads: int = 1
    """Of the processor."""
    output_dir: Path = Path("runs/compression")
    """One JSON a run; what is there already is not run again."""
    report_dir: Path | None = None
    """Where compression.md, .json and .png go. None: the output folder."""
    cache_dir: Path = Path("runs/compare/cache")
    """Where latents and statistics are kept."""


class FrozenDirections(LayerAdapter):
    """y = W0 x + bias + B (U x): U (m, k) is frozen, B (d, m) is trained from 0."""

    def __init__(self, linear: nn.Linear, count: int):
        super().__init__()
        self.register_buffer("directions", torch.zeros(count, linear.in_features))
        self.b = nn.Parameter(torch.zeros(linear.out_features, count))

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        return out + (x @ self.directions.T) @ self.b.T

    def merged(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return weight + self.b @ self.directions, bias


def compression(settings: CompressionSettings) -> dict:
    """Run what has not been run, write the report, and return its numbers. ValueError for an unknown variant."""
    started = time.monotonic()
    if unknown := set(settings.variants) - NAMES.keys():
        raise ValueError(f"--variants {' '.join(sorted(unknown))}: choose of {', '.join(NAMES)}")
    torch.set_num_threads(settings.threads)
    compared = preset(
        "digits",
        cache_dir=settings.cache_dir,
        num_images=settings.num_images,
        class_learning_rate=settings.class_learning_rate,
        ema_decay=0.99,
        max_grad_norm=1.0,
    )
    inputs = prepare(compared)

    def run_of(variant: str, rate: float, seed: int) -> dict:
        file = settings.output_dir / f"{variant}-lr-{rate:g}-seed-{seed}.json"
        job = job_of(compared, inputs, {"method": variant}, rate, seed, 0, 0)
        made_with = {"job": dataclasses.asdict(job), "steps": settings.steps, "measured": settings.measured_batches}
        if file.exists():
            then = read(file)
            if changed := [name for name, value in made_with.items() if then["made_with"].get(name) != value]:
                raise ValueError(f"{file} was made with another {changed[0]}: choose another --output-dir")
            return then
        result = {"made_with": made_with, **run(job, settings)}
        write_json(file, result)
        tqdm.write(f"{file.stem}: distance {result['distance']:.3f}, recognition {result['recognition']:.1%}")
        return result

    results = {"settings": _as_json(settings), "machine": machine(), "variants": {}}
    for variant in settings.variants:
        tried = {rate: run_of(variant, rate, settings.seeds[0]) for rate in sorted(settings.rates)}
        while len(tried) > 1 and (further := outward(list(tried), _best(tried))) and len(tried) < 6:
            tried[further] = run_of(variant, further, settings.seeds[0])
        best = _best(tried)
        results["variants"][variant] = {
            "learning_rate": best,
            "sweep": {f"{rate:g}": tried[rate]["distance"] for rate in sorted(tried)},
            "runs": [run_of(variant, best, seed) for seed in settings.seeds],
        }
    paths = write_report(results, settings.report_dir or settings.output_dir)
    print(paths[0].read_text(), *paths, sep="\n")
    print(f"{format_duration(time.monotonic() - started)} in total")
    return results


def run(job: Job, settings: CompressionSettings) -> dict:
    """Train one variant and measure it."""
    pipeline = load_base(job.base)
    transformer, device = pipeline.transformer, torch.device("cpu")
    variant = job.adapter["method"]
    updates = Updates(job, transformer, pipeline.scheduler, device)
    num_classes = len(job.id2label)
    shares = None
    if variant in FROZEN:
        rule, count = FROZEN[variant]
        config = AdapterConfig("1lora", sum=False, num_classes=num_classes, seed=job.seed)
        layers = target_layers(transformer, None)
        frozen = {path: FrozenDirections(layer, count) for path, layer in layers.items()}
        attach_adapter(transformer, config, "default", frozen | build_adapter(transformer, config))
        seen = look_at(layers, updates, settings.measured_batches)
        generator = torch.Generator().manual_seed(job.seed)
        for path, module in frozen.items():
            module.directions.copy_(directions(*seen[path], rule, count, generator))
        shares = share_of_gradient({path: (seen[path][1], frozen[path].directions) for path in layers})
    else:
        method = variant.removesuffix("-scaled")
        inject_adapter(transformer, AdapterConfig(method, num_classes=num_classes, seed=job.seed))
    trained = adapter_state_dict(transformer)

    optimizer = make_optimizer("adamw", trained, job.learning_rate, job.class_learning_rate)
    if variant in SCALED:
        layers = target_layers(transformer, None)
        divide_groups(optimizer, trained, rate_factors(layers, trained, updates, settings, *SCALED[variant]))
    average = ExponentialMovingAverage(trained, job.ema_decay)
    transformer.train()
    for step in tqdm(range(settings.steps), desc=f"{variant} {job.learning_rate:g} {job.seed}", leave=False):
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * learning_rate_factor(step, "cosine", 50, settings.steps)
        updates.loss(step).backward()
        nn.utils.clip_grad_norm_(trained.values(), job.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        average.update(step + 1)

    source = Source("generated", resolution_of(pipeline))
    features = load_features(job.features, source.resolution, job.features_weights)
    with average.applied():
        measured, _ = evaluate(job, evaluator_of(job, features, source, device), pipeline, source)
    count = sum(tensor.numel() for name, tensor in trained.items() if not name.startswith("class_embedding."))
    return {**measured, "trained": count, "share_of_gradient": shares}


def look_at(layers: dict[str, nn.Linear], updates: Updates, batches: int) -> dict[str, tuple[Tensor, Tensor]]:
    """For each layer, of the first batches: E[x xᵀ] (k, k) of its inputs, and the gradient ∂L/∂W (d, k)."""
    moments = {path: 0 for path in layers}

    def hook(path):
        def add(seat, args):
            rows = args[0].detach().flatten(0, -2)
            moments[path] = moments[path] + rows.T @ rows / len(rows) / batches

        return add

    handles = [layer.onelora.register_forward_pre_hook(hook(path)) for path, layer in layers.items()]
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    for step in range(batches):
        updates.loss(step).backward()
    gradients = {path: layer.weight.grad for path, layer in layers.items()}
    for handle in handles:
        handle.remove()
    for parameter in updates.transformer.parameters():
        parameter.grad = None
    for layer in layers.values():
        layer.weight.requires_grad_(False)
    return {path: (moments[path], gradients[path]) for path in layers}


def rate_factors(
    layers: dict[str, nn.Linear],
    trained: dict[str, Tensor],
    updates: Updates,
    settings: CompressionSettings,
    name: str,
    multiplied: Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor],
) -> dict[str, float]:
    """k^¼ / RMS of what a trained tensor multiplies, by the tensor's name, over the first batches."""
    squares: dict[str, list[float]] = {path: [] for path in layers}

    def hook(path):
        own = {key.removeprefix(f"{path}."): tensor for key, tensor in trained.items() if key.startswith(f"{path}.")}
        return lambda seat, args: squares[path].append(float(multiplied(*args[:2], own).square().mean()))

    handles = [layer.onelora.register_forward_pre_hook(hook(path)) for path, layer in layers.items()]
    with torch.no_grad():
        for step in range(settings.measured_batches):
            updates.loss(step)
    for handle in handles:
        handle.remove()
    return {
        f"{path}.{name}": layer.in_features**0.25 / statistics.mean(squares[path]) ** 0.5
        for path, layer in layers.items()
    }


def directions(moments: Tensor, gradient: Tensor, rule: str, count: int, generator: torch.Generator) -> Tensor:
    """(count, k) directions, each scaled so that the RMS of u·x is k^¼."""
    k = len(moments)
    if rule == "sum, as it is":
        return torch.ones(1, k)
    if rule == "sum":
        chosen = torch.ones(1, k)
    elif rule == "random":
        chosen = torch.randn(count, k, generator=generator)
    elif rule == "inputs":
        chosen = torch.linalg.eigh(moments)[1].T.flip(0)[:count]
    else:
        chosen = torch.linalg.svd(gradient, full_matrices=False)[2][:count]
    rms = torch.einsum("mk,kl,ml->m", chosen, moments, chosen).sqrt()
    return chosen * (k**0.25 / rms)[:, None]


def share_of_gradient(layers: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Of each kind of layer, which share of ‖∂L/∂W‖² the directions hold, in the mean over its layers."""
    shares: dict[str, list[float]] = {}
    for path, (gradient, chosen) in layers.items():
        basis = torch.linalg.qr(chosen.T)[0]
        share = (gradient @ basis).square().sum() / gradient.square().sum()
        kind = path.split(".", 2)[2] if path.startswith("transformer_blocks.") else path
        shares.setdefault(kind, []).append(float(share))
    return {kind: statistics.mean(values) for kind, values in shares.items()}


def write_report(results: dict, folder: Path) -> list[Path]:
    """compression.md, .json and .png."""
    folder.mkdir(parents=True, exist_ok=True)
    table, numbers, picture = (folder / f"compression.{suffix}" for suffix in ("md", "json", "png"))
    write_bytes(table, markdown(results).encode())
    write_json(numbers, results)
    plot(results, picture)
    return [table, numbers, picture]


def markdown(results: dict) -> str:
    settings, variants = results["settings"], results["variants"]
    first = "sum" if "sum" in variants else next(iter(variants))
    beside = variants[first]["runs"]  # seed by seed: the same batches and sample noise
    head = ["direction", "FD(pixels)", f"x {NAMES[first]}", "recognised", "trained beside the table", "learning rate"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * 5]
    for name, variant in variants.items():
        runs = variant["runs"]
        pairs = zip(runs, beside, strict=True)
        cells = [
            spread(mean_and_deviation([run["distance"] for run in runs]), 1, 2),
            spread(mean_and_deviation([run["distance"] / its["distance"] for run, its in pairs]), 1, 2),
            spread(mean_and_deviation([run["recognition"] for run in runs]), 100, 1) + " %",
            f"{runs[0]['trained']:,}",
            f"{variant['learning_rate']:g}",
        ]
        lines.append(f"| {NAMES[name]} | " + " | ".join(cells) + " |")
    frozen = {name: each["runs"][0]["share_of_gradient"] for name, each in variants.items() if name in FROZEN}
    if frozen:
        lines += ["", "Share of the first gradient's squared norm along the frozen directions:", ""]
        lines += ["| layer | " + " | ".join(frozen) + " |", "|---|" + "---:|" * len(frozen)]
        for kind in next(iter(frozen.values())):
            lines.append(f"| {kind} | " + " | ".join(f"{shares[kind]:.0%}" for shares in frozen.values()) + " |")
    seeds = ", ".join(map(str, settings["seeds"]))
    sampled = beside[0]["made_with"]["job"]
    lines += [
        "",
        f"{settings['steps']} updates of {sampled['batch_size']} digits, cosine schedule, seeds {seeds}, mean ± "
        f"standard deviation; each at the best of its learning rates on the first seed. {sampled['num_images']} "
        f"samples (DDIM, {sampled['num_inference_steps']} steps, guidance {sampled['guidance_scale']:g}) against the "
        "training images.",
        "",
    ]
    return "\n".join(lines)


def plot(results: dict, picture: Path) -> None:
    """A dot a seed and a line at their mean, for both measures; colours by how many directions are frozen."""
    import io

    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    variants = results["variants"]
    names, places = [NAMES[name] for name in variants], range(len(variants))
    figure = Figure(figsize=(9, 1.2 + 0.42 * len(names)), layout="constrained", dpi=130)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, key, factor, label in (
        (left, "distance", 1, "FD(pixels): less is better"),
        (right, "recognition", 100, "recognised [%]: more is better"),
    ):
        for place, (name, variant) in zip(places, variants.items(), strict=True):
            values = [factor * run[key] for run in variant["runs"]]
            colour = COLOURS[FROZEN[name][1] if name in FROZEN else None][0]
            axes.plot(values, [place] * len(values), "o", color=colour, ms=5, alpha=0.7)
            axes.plot([statistics.mean(values)] * 2, [place - 0.3, place + 0.3], color=colour, lw=2.5)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3, axis="x")
    left.set_yticks(list(places), names)
    left.invert_yaxis()
    shown = {FROZEN[name][1] if name in FROZEN else None for name in variants}
    kinds = [
        Line2D([], [], color=colour, marker="o", lw=2.5, label=label)
        for count, (colour, label) in COLOURS.items()
        if count in shown
    ]
    figure.legend(handles=kinds, loc="outside lower center", ncols=len(kinds), fontsize=9, frameon=False)
    figure.suptitle("What a layer's input is read along: a dot a seed, a bar at their mean", fontsize=11)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    write_bytes(picture, png.getvalue())


def _best(tried: dict[float, dict]) -> float:
    return min(tried, key=lambda rate: tried[rate]["distance"])


def _as_json(settings: CompressionSettings) -> dict:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(settings).items()}
