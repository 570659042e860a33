"""`benchmark.py compression`: along which directions is a layer's input best read?

1LoRA adds b (u·x) to a layer's output, where u is all ones and b is learned. Here u is other things, one or several
with a b for each: sums of groups of the inputs or of the layer's own outputs, directions of W0 that the layer
amplifies most, what the first gradient or the inputs themselves would choose, chance. Beside them are methods that
learn what they read (LoRA of several ranks, PiSSA), that read it through fixed random matrices (LoRA-FA, TinyLoRA,
UniLoRA), or that read nothing (BitFit, DiffFit). Frozen directions are scaled by `--scale`, by default so that each
u·x has an RMS of k^¼, for k inputs, in every layer: what is compared is where they point. What the scaling is worth
shows beside the sum as it is, and LoRA and DiffFit are tried with rates that are divided in the same way. Every
variant has the same batches, and its own best of the same learning rates.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.compare import TINY, job_of, outward, preset
from benchmarks.compare_inputs import prepare
from benchmarks.compare_run import Job, Updates, evaluate, evaluator_of, machine, read
from benchmarks.compression_report import write_report
from benchmarks.directions import (
    FrozenDirections,
    PrincipalStart,
    directions,
    look_at,
    rate_factors,
    share_of_gradient,
)
from onelora_diffusion import AdapterConfig, adapter_state_dict, inject_adapter
from onelora_diffusion.evaluation.features import load_features
from onelora_diffusion.evaluation.images import Source
from onelora_diffusion.evaluation.report import write_json
from onelora_diffusion.families import family_of
from onelora_diffusion.injection.attaching import attach_adapter, build_adapter
from onelora_diffusion.injection.layers import target_layers
from onelora_diffusion.pipelines.base import load_base
from onelora_diffusion.training.ema import ExponentialMovingAverage
from onelora_diffusion.training.optimizers import learning_rate_factor, make_optimizer
from onelora_diffusion.training.stopping import format_duration
from onelora_diffusion.training.sum_rates import divide_groups


@dataclass(frozen=True)
class Variant:
    """What is trained: along frozen directions, from PiSSA's start, or a method of the library.

    Attributes:
        kind: its row of `KINDS` in the report.
        rule: of its `count` frozen directions, from `RULES`; None for the others.
        scale: of its directions in place of `--scale`.
        principal: the rank of PiSSA.
        adapter: settings of AdapterConfig for a method of the library.
        frozen: part of the names of its tensors that stay as they start.
        scaled: a trained tensor whose rates are divided as a frozen direction is scaled: its name, and what it
            multiplies, from the layer's input, its output and the adapter's tensors.
    """

    label: str
    kind: str
    rule: str | None = None
    count: int = 1
    scale: str | None = None
    principal: int = 0
    adapter: dict = field(default_factory=dict)
    frozen: str | None = None
    scaled: tuple[str, Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]] | None = None


def _several(name: str, label: str, kind: str, rule: str, *counts: int) -> dict[str, Variant]:
    """Variants of one rule with several counts of directions."""
    return {
        name if count == 1 else f"{name}-{count}": Variant(label.format(n=count), kind, rule, count)
        for count in counts
    }


def _lora(rank: int, **others) -> dict:
    return {"adapter": {"method": "lora", "rank": rank}, **others}


def _peft(name: str, **settings) -> dict:
    return {"adapter": {"method": f"peft:{name}", "peft_config": TINY[name] | settings}}


VARIANTS = {
    "sum": Variant("the sum", "inputs", "inputs' sums"),
    "sum-plain": Variant("the sum, not scaled (1LoRA)", "inputs", "inputs' sums", scale="none"),
    **_several("sum", "sums of {n} groups of inputs (MiSS)", "inputs", "inputs' sums", 2, 4, 8),
    "outputs": Variant("the sum of the outputs", "outputs", "outputs' sums"),
    **_several("outputs", "sums of {n} groups of outputs", "outputs", "outputs' sums", 2, 4, 8),
    **_several("svd", "{n} leading singular vectors of W0", "singular", "singular vectors", 1, 2, 4),
    **_several("singular", "{n} of W0 by subspace iteration", "singular", "subspace iteration", 1, 2, 4, 8),
    **{f"rounds-{n}": Variant(f"4 of W0 after {n} rounds", "other", f"{n} rounds", 4) for n in (3, 10)},
    "gradient": Variant("the first gradient's direction", "other", "gradient"),
    "gradient-2": Variant("two of the first gradient", "other", "gradient", 2),
    "gradient-4": Variant("four of the first gradient", "other", "gradient", 4),
    "inputs": Variant("the inputs' first component", "other", "inputs"),
    **_several("inputs", "{n} components of the inputs", "other", "inputs", 2, 4),
    "random": Variant("at random", "other", "random"),
    **_several("random", "{n} at random", "other", "random", 2, 4),
    "lora": Variant("LoRA r=1, learned", "lora", **_lora(1)),
    **{f"lora-{rank}": Variant(f"LoRA r={rank}, learned", "lora", **_lora(rank)) for rank in (2, 4, 8)},
    "lora-scaled": Variant(
        "LoRA r=1, B's rates scaled",
        "tuner",
        **_lora(1),
        scaled=("onelora_lora_B.weight", lambda x, out, trained: x @ trained["onelora_lora_A.weight"].T),
    ),
    "lora-fa-4": Variant("LoRA-FA r=4 (A random)", "tuner", **_lora(4, frozen="lora_A")),
    "pissa": Variant("PiSSA r=1", "tuner", principal=1),
    **{f"pissa-{rank}": Variant(f"PiSSA r={rank}", "tuner", principal=rank) for rank in (2, 4)},
    "tinylora": Variant("TinyLoRA", "tuner", **_peft("tinylora")),
    "unilora": Variant("UniLoRA", "tuner", **_peft("unilora")),
    "unilora-4": Variant("UniLoRA, 4 times as many", "tuner", **_peft("unilora", theta_d_length=4 * 8864)),
    "difffit": Variant("no direction: DiffFit", "tuner", adapter={"method": "difffit"}),
    "difffit-scaled": Variant(
        "DiffFit, γ's rates scaled",
        "tuner",
        adapter={"method": "difffit"},
        scaled=("onelora_gamma", lambda x, out, trained: out),  # β multiplies 1
    ),
    "bitfit": Variant("no direction: BitFit", "tuner", adapter={"method": "bitfit"}),
}
# What a word in --variants stands for: single directions of several kinds; directions of the base by number.
GROUPS = {
    "kinds": (
        *("sum", "sum-plain", "gradient", "inputs", "random", "gradient-2", "gradient-4"),
        *("lora", "lora-scaled", "difffit", "difffit-scaled", "bitfit"),
    ),
    "base": (
        *("sum", "outputs", "singular-4", "lora", "lora-2", "lora-4", "outputs-2", "singular", "singular-2"),
        *("outputs-4", "svd-4", "sum-2", "sum-4", "random-4", "svd", "svd-2", "lora-fa-4", "pissa", "pissa-2"),
        *("unilora", "tinylora", "outputs-8", "singular-8", "sum-8", "lora-8", "unilora-4", "pissa-4"),
        *("inputs-4", "gradient-4"),
    ),
}


@dataclass
class CompressionSettings:
    """Fine-tune a miniature along frozen directions of several kinds, beside methods that learn their own."""

    variants: tuple[str, ...] = ("kinds",)
    """Which of them: names, or kinds (single directions) or base (those of W0 by number, beside LoRA's ranks)."""
    preset: Literal["digits", "fashion-mnist"] = "digits"
    """What is learned on which base, as in `benchmark.py compare`."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Runs of each; the first one chooses the learning rate."""
    steps: int = 500
    """Updates of a run."""
    rates: tuple[float, ...] = (2.5e-3, 5e-3, 1e-2)
    """Learning rates that each variant tries, beside those already in the output folder, where none may be given."""
    outward: int = 3
    """How many rates further outward a variant tries, by their factor, while the best so far is at the edge."""
    scale: Literal["rms", "layer", "sigma", "none"] = "rms"
    """Of frozen directions: rms: each u·x has an RMS of k^¼; layer: those of a layer together; sigma: u has the length
    ‖W0 u‖ of its unit vector; none: as the rule has them."""
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
    """Where compression.md, .json and pictures go. None: the output folder."""
    beside: tuple[Path, ...] = ()
    """compression.json of other reports, drawn beside this one in the picture of distance against numbers."""
    cache_dir: Path = Path("runs/compare/cache")
    """Where latents and statistics are kept."""


def compression(settings: CompressionSettings) -> dict:
    """Run what has not been run, write the report, and return its numbers. ValueError for an unknown variant."""
    started = time.monotonic()
    names = list(dict.fromkeys(each for word in settings.variants for each in GROUPS.get(word, (word,))))
    if unknown := set(names) - VARIANTS.keys():
        raise ValueError(
            f"--variants {' '.join(sorted(unknown))}: choose of {', '.join(GROUPS)}, or of {', '.join(VARIANTS)}"
        )
    torch.set_num_threads(settings.threads)
    compared = preset(
        settings.preset,
        cache_dir=settings.cache_dir,
        num_images=settings.num_images,
        class_learning_rate=settings.class_learning_rate,
        ema_decay=0.99,
        max_grad_norm=1.0,
    )
    inputs = prepare(compared)

    def file_of(name: str, rate: float, seed: int) -> Path:
        return settings.output_dir / f"{name}-lr-{rate:g}-seed-{seed}.json"

    def run_of(name: str, rate: float, seed: int) -> dict:
        file, scale = file_of(name, rate, seed), VARIANTS[name].scale or settings.scale
        job = job_of(compared, inputs, {"method": name}, rate, seed, 0, 0)
        made_with = {"job": dataclasses.asdict(job), "steps": settings.steps, "measured": settings.measured_batches}
        made_with |= {"scale": scale} if VARIANTS[name].rule else {}
        if file.exists():
            then = read(file)
            if changed := [key for key, value in made_with.items() if then["made_with"].get(key) != value]:
                raise ValueError(f"{file} was made with another {changed[0]}: choose another --output-dir")
            return then
        result = {"made_with": made_with, **run(job, scale, settings)}
        write_json(file, result)
        tqdm.write(
            f"{file.stem}: distance {result['distance']:.3f}, recognition {result['recognition']:.1%}, "
            f"{result['seconds']:.0f} s"
        )
        return result

    results = {"settings": _as_json(settings), "machine": machine(), "distance_name": inputs.distance_name}
    results["variants"] = {}
    for name in names:
        found = settings.output_dir.glob(f"{name}-lr-*-seed-{settings.seeds[0]}.json")
        rates = {*settings.rates, *(float(file.stem.rpartition("-seed-")[0].rpartition("-lr-")[2]) for file in found)}
        tried = {rate: run_of(name, rate, settings.seeds[0]) for rate in sorted(rates)}
        for _ in range(settings.outward if len(tried) > 1 else 0):
            if (further := outward(list(tried), _best(tried))) is not None:
                tried[further] = run_of(name, further, settings.seeds[0])
        best = _best(tried)
        results["variants"][name] = {
            "label": VARIANTS[name].label,
            "kind": VARIANTS[name].kind,
            "learning_rate": best,
            "sweep": {f"{rate:g}": tried[rate] for rate in sorted(tried)},
            "runs": [run_of(name, best, seed) for seed in settings.seeds],
        }
    others = [json.loads(path.read_text()) for path in settings.beside]
    paths = write_report(results, others, settings.report_dir or settings.output_dir)
    print(paths[0].read_text(), *paths, sep="\n")
    print(f"{format_duration(time.monotonic() - started)} in total")
    return results


def run(job: Job, scale: str, settings: CompressionSettings) -> dict:
    """Train one variant and measure it."""
    started = time.monotonic()
    pipeline = load_base(job.base)
    transformer, device = pipeline.transformer, torch.device("cpu")
    name = job.adapter["method"]
    variant, layers = VARIANTS[name], target_layers(transformer, None)
    updates = Updates(job, transformer, pipeline.scheduler, device)
    shared = {"num_classes": len(job.id2label), "seed": job.seed}
    shares = None
    if variant.adapter:
        inject_adapter(transformer, AdapterConfig(**variant.adapter, **shared))
    else:
        make, number = (FrozenDirections, variant.count) if variant.rule else (PrincipalStart, variant.principal)
        modules = {path: make(layer, number) for path, layer in layers.items()}
        config = AdapterConfig("1lora", sum=False, **shared)
        attach_adapter(transformer, config, "default", modules | build_adapter(transformer, config))
    if variant.rule:
        seen = look_at(layers, updates, settings.measured_batches)
        for path, module in modules.items():
            module.directions.copy_(directions(seen[path], variant.rule, variant.count, scale))
        shares = share_of_gradient({path: (seen[path].gradient, modules[path].directions) for path in layers})
    trained = adapter_state_dict(transformer)
    for key in [key for key in trained if variant.frozen and variant.frozen in key]:
        trained.pop(key).requires_grad_(False)

    optimizer = make_optimizer("adamw", trained, job.learning_rate, job.class_learning_rate)
    if variant.scaled:
        divide_groups(
            optimizer, trained, rate_factors(layers, trained, updates, settings.measured_batches, *variant.scaled)
        )
    average = ExponentialMovingAverage(trained, job.ema_decay)
    transformer.train()
    for step in tqdm(range(settings.steps), desc=f"{name} {job.learning_rate:g} {job.seed}", leave=False):
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * learning_rate_factor(step, "cosine", 50, settings.steps)
        updates.loss(step).backward()
        nn.utils.clip_grad_norm_(trained.values(), job.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        average.update(step + 1)

    source = Source("generated", family_of(pipeline).resolution(pipeline))
    features = load_features(job.features, source.resolution, job.features_weights)
    with average.applied():
        measured, _ = evaluate(job, evaluator_of(job, features, source, device), pipeline, source)
    count = sum(tensor.numel() for key, tensor in trained.items() if not key.startswith("class_embedding."))
    seconds = time.monotonic() - started
    return {**measured, "trained": count, "share_of_gradient": shares, "seconds": seconds}


def _best(tried: dict[float, dict]) -> float:
    return min(tried, key=lambda rate: tried[rate]["distance"])


def _as_json(settings: CompressionSettings) -> dict:
    return json.loads(json.dumps(vars(settings), default=str))
