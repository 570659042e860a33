"""`benchmark.py compare`: methods beside each other at equal wall-clock time, as in Figure 5 of the 1LoRA paper.

Inputs that all runs share are made first. Then every method tries the same learning rates in short runs. The best of
them and the next lower one, which a short run may have done wrong, train on the first seed for the whole time; the
better of the two trains on the other seeds as well. A run is a process of its own and leaves one JSON file.
"""

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from benchmarks.compare_inputs import Inputs, prepare
from benchmarks.compare_report import write_report
from benchmarks.compare_run import Job, read, run_file, sweep_file
from onelora_diffusion import AdapterConfig
from onelora_diffusion.evaluation.report import write_json
from onelora_diffusion.training.stopping import format_duration, parse_duration

METHODS = ("1lora", "vera", "difffit", "lora", "bitfit", "mora1", "mora6", "dora")

# What a word in --methods stands for. Tables S11 and S12 of the paper: b of 1LoRA, biases β, scales γ and norms, which
# a DiT has none of, so that of the twelve rows seven are left there; beside them the class table alone. Table S1: the
# sum beside a random compression. Names are those of other words, where there are any, so that a method is run once.
ABLATIONS = (
    "1lora",
    '{"method": "1lora", "bias": true}',
    '{"method": "1lora", "scale": true}',
    '{"method": "1lora", "bias": true, "scale": true}',
    "bitfit",
    '{"method": "1lora", "sum": false, "scale": true}',
    "difffit",
    '{"method": "1lora", "sum": false}',
)
# Tuners of PEFT that are about as small as 1LoRA on the miniature, by what sets their size. FourierFT draws its
# spectrum by default, and narrow layers begin far from the base; init_weights has it begin at 0. TinyLoRA's u numbers
# of a layer go through an r x r matrix, two by default, which would leave four of them.
TINY = {
    "miss": {"r": 1},
    "fourierft": {"n_frequency": 240, "init_weights": True},
    "waveft": {"n_frequency": 240},
    "road": {"group_size": 32},
    "ia3": {"feedforward_modules": []},
    "unilora": {"theta_d_length": 8864},
    "tinylora": {"u": 200, "r": 16},
}
GROUPS = {
    "paper": METHODS,
    "directions": (
        "1lora",
        '{"method": "1lora", "compression": "outputs", "rates_by_sum": true}',
        '{"method": "1lora", "compression": "singular", "rank": 4, "rates_by_sum": true}',
    ),
    "ablations": (*ABLATIONS, '{"method": "1lora", "compression": "random"}'),
    "tiny": (
        "1lora",
        "lora",
        *(json.dumps({"method": f"peft:{name}", "peft_config": own}) for name, own in TINY.items()),
    ),
}


@dataclass
class CompareSettings:
    """Train methods for an equal time each, measure them at intervals, and tabulate and plot what they reached."""

    preset: Literal["digits", "fashion-mnist", "food101"] = "digits"
    """digits, fashion-mnist: three quarters of an hour on two cores. food101: DiT-XL/2, 24 h a run on a GPU."""
    methods: tuple[str, ...] = METHODS
    """Names of methods, full among them, or JSON of AdapterConfig:
    '{"method": "peft:fourierft", "peft_config": {"n_frequency": 100}}'; or ablations (Tables S11, S12 and S1), tiny
    (1LoRA, LoRA and the smallest tuners of PEFT), directions (1LoRA, outputs and four of W0), paper.
    "rates_by_sum": true is that flag of train_dit.py."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Runs of each method: data order, noise and what an adapter draws."""
    max_train_time: str = "60s"
    """Training time of a run, evaluations not counted."""
    eval_every: str = "15s"
    """Training time between two evaluations."""
    sweep_time: str = "12s"
    """Training time of a run of the learning-rate sweep."""
    sweep_rates: tuple[float, ...] = (1e-3, 4e-3, 1.6e-2)
    """Learning rates that every method tries, rising by one factor. One rate: no sweep."""
    sweep_extra: int = 2
    """How many rates further outward a method tries while the best so far is at the edge."""
    class_learning_rate: float | None = 1.6e-2
    """Learning rate of the class table, which all methods train. None: that of the method."""
    jobs: int = 2
    """Runs at a time."""
    threads: int = 1
    """Threads of each."""
    output_dir: Path = Path("runs/compare/digits")
    """One JSON a run; what is there already is not run again."""
    report_dir: Path | None = None
    """Where <preset>.md, .json and pictures go. None: the output folder."""
    cache_dir: Path = Path("runs/compare/cache")
    """Where base, classifier, latents and statistics are kept."""

    dataset: Literal["digits", "fashion-mnist", "food101", "imagefolder"] = "digits"
    """What is learned."""
    data_root: Path | None = None
    """Where the data set lies."""
    base: str | None = None
    """Base model: a folder or hub id. None: the miniature; for fashion-mnist, one trained on clothes and bags."""
    base_steps: int = 6000
    """Training steps of that base's transformer."""
    base_vae_steps: int = 600
    """Training steps of its autoencoder."""
    features: Literal["pixels", "fashion-mnist", "inception", "dinov2"] = "pixels"
    """What the distance compares."""
    features_weights: Path | None = None
    """Weights of the features. None for fashion-mnist: a classifier trained here."""
    classifier_epochs: int = 3
    """Training epochs of that classifier."""
    reference_split: str = "train"
    """Which real images the samples are compared with."""
    num_images: int = 400
    """Samples of the averaged adapter at an evaluation."""
    num_inference_steps: int = 12
    """DDIM steps."""
    guidance_scale: float = 1.5
    """Classifier-free guidance."""
    eval_batch_size: int = 100
    """Samples at a time."""

    rank: int = 1
    """Of LoRA, DoRA and VeRA."""
    batch_size: int = 32
    """Images an update."""
    label_drop: float = 0.1
    """Share of samples that train the null label."""
    ema_decay: float = 0.999
    """Of the averaged adapter."""
    max_grad_norm: float | None = None
    """Clip the norm of the gradient."""
    flip: bool = False
    """Mirror half of the images."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Precision of the frozen base."""
    num_workers: int = 0
    """Processes that load images while they are encoded."""


# What differs from the defaults above, which are those of digits. Every value can be overridden by its flag.
PRESETS = {
    "digits": dict(),
    "fashion-mnist": dict(
        max_train_time="48s",
        eval_every="12s",
        output_dir=Path("runs/compare/fashion-mnist"),
        dataset="fashion-mnist",
        features="fashion-mnist",
        reference_split="test",
        num_images=600,
    ),
    "food101": dict(
        max_train_time="24h",
        eval_every="2h",
        sweep_time="1h",
        sweep_rates=(1e-4, 1e-3, 1e-2),
        class_learning_rate=None,
        seeds=(0,),
        jobs=1,
        threads=8,
        output_dir=Path("runs/compare/food101"),
        dataset="food101",
        data_root=Path("data"),
        base="facebook/DiT-XL-2-256",
        features="inception",
        reference_split="test",
        num_images=10_000,
        num_inference_steps=50,
        eval_batch_size=64,
        ema_decay=0.9999,
        flip=True,
        mixed_precision="bf16",
        num_workers=8,
    ),
}


def preset(name: str, **changes) -> CompareSettings:
    return CompareSettings(**{"preset": name, **PRESETS[name], **changes})


def preset_asked_for(arguments: list[str]) -> CompareSettings:
    """The defaults for a command line: those of its --preset."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", nargs="?")
    name = first.parse_known_args(arguments)[0].preset
    return preset(name if name in PRESETS else "digits")


def compare(settings: CompareSettings) -> dict:
    """Run what has not been run, write the report, and return its numbers.

    Raises:
        ValueError: a wrong setting; runs in the output folder that were made with others; runs that broke off.
    """
    started = time.monotonic()
    methods = parse_methods(settings)
    budget, eval_every, sweep_time = map(
        parse_duration, (settings.max_train_time, settings.eval_every, settings.sweep_time)
    )
    rates = sorted(settings.sweep_rates)
    if not rates or rates[0] <= 0 or not settings.seeds:
        raise ValueError("--sweep-rates and --seeds take at least one value, rates above 0")
    if settings.jobs * settings.threads > os.cpu_count():
        print(f"{settings.jobs} jobs of {settings.threads} threads on {os.cpu_count()} cores slow each other down")
    inputs = prepare(settings)
    runs = settings.output_dir

    # The same rates for every method; one whose best rate is at the edge of them tries further outward.
    tried = {method: list(rates) if len(rates) > 1 else [] for method in methods}
    for extra in range(settings.sweep_extra + 1):
        jobs = {
            sweep_file(runs, method, rate): job_of(
                settings, inputs, methods[method], rate, settings.seeds[0], sweep_time, sweep_time
            )
            for method, own in tried.items()
            for rate in own
        }
        run_all(jobs, settings, "learning rates")
        if extra < settings.sweep_extra:
            for method, own in tried.items():
                if own and (further := outward(own, best_rate(sweep_files(runs, method, own)))):
                    own.append(further)

    # For the whole time: the finalists on the first seed, then the better of them on all others.
    def whole_runs(rates: dict[str, list[float]], seeds: list[int]) -> dict[Path, Job]:
        return {
            run_file(runs, method, rate, seed): job_of(
                settings, inputs, methods[method], rate, seed, budget, eval_every
            )
            for seed in seeds
            for method, own in rates.items()
            for rate in own
        }

    finalists = {
        method: finalists_of(own, best_rate(sweep_files(runs, method, own))) if own else rates
        for method, own in tried.items()
    }
    first, *others = settings.seeds
    run_all(whole_runs(finalists, [first]), settings, "first seed")
    finals = {method: {rate: run_file(runs, method, rate, first) for rate in own} for method, own in finalists.items()}
    chosen = {method: best_rate(files) for method, files in finals.items()}
    run_all(whole_runs({method: [rate] for method, rate in chosen.items()}, others), settings, "other seeds")

    results = {
        "settings": json.loads(json.dumps(dataclasses.asdict(settings), default=str)),
        "inputs": dataclasses.asdict(inputs),
        "sweep": {
            method: {f"{rate:g}": read(sweep_file(runs, method, rate)) for rate in sorted(own)}
            for method, own in tried.items()
        },
        "finals": {
            method: {f"{rate:g}": read(file) for rate, file in sorted(files.items())}
            for method, files in finals.items()
        },
        "learning_rates": chosen,
        "runs": {
            method: [read(run_file(runs, method, chosen[method], seed)) for seed in settings.seeds]
            for method in methods
        },
    }
    paths = write_report(results, settings.report_dir or runs, settings.preset)
    print(paths[0].read_text())
    print(*paths, sep="\n")
    print(f"{format_duration(time.monotonic() - started)} in total")
    return results


def parse_methods(settings: CompareSettings) -> dict[str, dict]:
    """Label of a method -> its AdapterConfig settings."""
    methods = {}
    for text in (each for word in settings.methods for each in GROUPS.get(word, (word,))):
        try:
            config = json.loads(text) if text.startswith("{") else {"method": text}
        except json.JSONDecodeError as error:
            raise ValueError(f"--methods {text}: neither a method nor JSON ({error})") from None
        further = ", ".join(f"{key} {value}" for key, value in config.items() if key != "method")
        config = {"rank": settings.rank, **config}
        adapter = {key: value for key, value in config.items() if key != "rates_by_sum"}
        checked = AdapterConfig.from_json(json.dumps(adapter | {"num_classes": 1}))  # a wrong one fails now
        if config.get("rates_by_sum") and not (checked.method == "1lora" and checked.sum):
            raise ValueError(f"--methods {text}: rates_by_sum is of 1LoRA's sum")
        methods[config["method"] + (f" ({further})" if further else "")] = config
    return methods


def job_of(
    settings: CompareSettings,
    inputs: Inputs,
    adapter: dict,
    learning_rate: float,
    seed: int,
    time_budget_s: float,
    eval_every_s: float,
) -> Job:
    return Job(
        adapter=adapter,
        learning_rate=learning_rate,
        class_learning_rate=settings.class_learning_rate,
        seed=seed,
        time_budget_s=time_budget_s,
        eval_every_s=eval_every_s,
        base=inputs.base,
        dataset=settings.dataset,
        id2label=inputs.id2label,
        inputs=inputs.identity,
        latents=inputs.latents,
        num_train_images=inputs.num_train_images,
        reference=inputs.reference,
        features=settings.features,
        features_weights=inputs.features_weights,
        num_images=settings.num_images,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        eval_batch_size=settings.eval_batch_size,
        batch_size=settings.batch_size,
        flip=settings.flip,
        label_drop=settings.label_drop,
        ema_decay=settings.ema_decay,
        max_grad_norm=settings.max_grad_norm,
        mixed_precision=settings.mixed_precision,
    )


# ---------------------------------------------------------------------------------------------------
# The sweep


def sweep_files(runs: Path, method: str, rates: list[float]) -> dict[float, Path]:
    return {rate: sweep_file(runs, method, rate) for rate in rates}


def best_rate(files: dict[float, Path]) -> float:
    """The rate whose run has the smallest distance; a failed run counts as infinitely far."""
    distances = {rate: read(file).get("distance", float("inf")) for rate, file in files.items()}
    return min(distances, key=distances.get)


def finalists_of(rates: list[float], best: float) -> list[float]:
    """The best rate of the short runs, and the next lower one that was tried."""
    return [*sorted(rate for rate in rates if rate < best)[-1:], best]


def outward(rates: list[float], best: float) -> float | None:
    """The next rate beyond the best one where that is at the edge of those tried: the row goes on geometrically."""
    row = sorted(rates)
    factor = row[1] / row[0]
    if best not in (row[0], row[-1]):
        return None
    return float(f"{best / factor if best == row[0] else best * factor:.3g}")


# ---------------------------------------------------------------------------------------------------
# Runs


def is_finished(file: Path, job: Job) -> bool:
    """Whether the run has left its result. ValueError if that is a result of other settings."""
    if not file.exists():
        return False
    then, now = read(file)["job"], json.loads(json.dumps(dataclasses.asdict(job)))
    changed = [f"{name} was {then.get(name)} and is {now[name]}" for name in now if then.get(name) != now[name]]
    if changed:
        raise ValueError(f"{file} was made with other settings ({', '.join(changed)}): choose another --output-dir")
    return True


def run_all(jobs: dict[Path, Job], settings: CompareSettings, what: str) -> None:
    """Run the jobs without a result, `settings.jobs` at a time. ValueError, after all others, if one broke off."""
    waiting = [file for file, job in jobs.items() if not is_finished(file, job)]
    running: dict[Path, subprocess.Popen] = {}
    broken = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # to end the runs as well
    with tqdm(total=len(jobs), initial=len(jobs) - len(waiting), desc=what, unit="run") as progress:
        try:
            while waiting or running:
                while waiting and len(running) < settings.jobs:
                    file = waiting.pop(0)
                    running[file] = start(file, jobs[file], settings.threads)
                time.sleep(0.1)
                for file in [file for file, process in running.items() if process.poll() is not None]:
                    code = running.pop(file).returncode
                    progress.update()
                    if code:
                        broken.append(file)
                    tqdm.write(one_line(file) if not code else f"{file.stem}: broke off, see {log_of(file)}")
        finally:  # Ctrl-C, for one
            signal.signal(signal.SIGTERM, before)
            for process in running.values():
                process.terminate()
                process.wait()
    if broken:
        last = log_of(broken[0]).read_text().strip().splitlines()[-1:] or ["no message"]
        raise ValueError(f"{len(broken)} runs broke off, the first with: {last[0]} ({log_of(broken[0])})")


def start(file: Path, job: Job, threads: int) -> subprocess.Popen:
    file.parent.mkdir(parents=True, exist_ok=True)
    job_file = file.with_suffix(".job")
    write_json(job_file, dataclasses.asdict(job))
    with open(log_of(file), "w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "benchmarks.compare_run", str(job_file), str(file)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )


def log_of(file: Path) -> Path:
    return file.with_suffix(".log")


def one_line(file: Path) -> str:
    result = read(file)
    if result["failed"]:
        return f"{file.stem}: {result['failed']}"
    return (
        f"{file.stem}: distance {result['distance']:.4f} after {result['time_to_best_s']:.0f} s, "
        f"{1000 * result['step_seconds']:.1f} ms a step, lr {result['job']['learning_rate']:g}"
    )
