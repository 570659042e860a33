"""One run of `benchmark.py compare`, in a process of its own: train an adapter for a time, measure it at intervals.

    python -m benchmarks.compare_run JOB.json RESULT.json

The clock counts training alone: loading, evaluations and checkpoints stand outside it. Killed, the run goes on from
its last evaluation when it is started again.
"""

import dataclasses
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor
from torchvision.utils import save_image

from benchmarks.measure import reset_peak_memory, saved_bytes
from onelora_diffusion import AdapterConfig, __version__, adapter_state_dict, count_trainable, inject_adapter
from onelora_diffusion.command_line import quieten
from onelora_diffusion.data.latent_cache import LatentCache
from onelora_diffusion.data.latents import sample_moments
from onelora_diffusion.devices import peak_memory_bytes
from onelora_diffusion.diffusion import training_losses
from onelora_diffusion.evaluation.evaluator import Batches, Evaluator
from onelora_diffusion.evaluation.features import load_features
from onelora_diffusion.evaluation.features.base import Features
from onelora_diffusion.evaluation.images import Source
from onelora_diffusion.evaluation.recognition import recognition_of
from onelora_diffusion.evaluation.report import write_json
from onelora_diffusion.evaluation.statistics import Origin
from onelora_diffusion.evaluation.statistics_file import load_statistics
from onelora_diffusion.families import family_of
from onelora_diffusion.pipelines.base import load_base
from onelora_diffusion.sampling import SamplerSettings, generate_images
from onelora_diffusion.storage.adapter_file import save_adapter
from onelora_diffusion.training.checkpoints import load_newest_checkpoint, save_checkpoint
from onelora_diffusion.training.ema import ExponentialMovingAverage
from onelora_diffusion.training.metrics import NonFiniteError, check_finite
from onelora_diffusion.training.optimizers import make_optimizer
from onelora_diffusion.training.randomness import StepKeyedBatches, draw_step
from onelora_diffusion.training.state import restore_training_tensors, training_tensors
from onelora_diffusion.training.sum_rates import SumScales, divide_groups

NUM_SHOWN = 12  # samples of the best evaluation that are kept as a picture


@dataclass(frozen=True)
class Job:
    """All that a run depends on. `adapter` holds AdapterConfig's settings but num_classes and seed; rates_by_sum."""

    adapter: dict
    learning_rate: float
    class_learning_rate: float | None
    seed: int
    time_budget_s: float
    eval_every_s: float
    base: str | None
    dataset: str
    id2label: dict[str, str]
    inputs: str  # hash of what the next two were made of
    latents: str  # the cache of the training images' moments
    num_train_images: int
    reference: str  # file of the real images' statistics
    features: str
    features_weights: str | None
    num_images: int
    num_inference_steps: int
    guidance_scale: float
    eval_batch_size: int
    batch_size: int
    flip: bool
    label_drop: float
    ema_decay: float
    max_grad_norm: float | None
    mixed_precision: str


def slug(method: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", method.lower()).strip("-")


def run_file(runs: Path, method: str, rate: float, seed: int) -> Path:
    return runs / "runs" / f"{slug(method)}-lr-{rate:g}-seed-{seed}.json"


def sweep_file(runs: Path, method: str, rate: float) -> Path:
    return runs / "sweep" / f"{slug(method)}-lr-{rate:g}.json"


def read(file: Path) -> dict:
    return json.loads(file.read_text())


def run(job: Job, result: Path) -> dict:
    """Train and measure; returns what is to be written to `result`, beside which the best adapter is saved."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if job.mixed_precision == "bf16" else torch.float32
    autocast = torch.autocast(device.type, dtype) if dtype == torch.bfloat16 else nullcontext()

    # The base with its adapter, the data, and what judges the images.
    pipeline = load_base(job.base)
    transformer, scheduler = pipeline.transformer, pipeline.scheduler
    num_classes = len(job.id2label)
    if job.adapter["method"] != "full":
        transformer.to(dtype)
    adapter = dict(job.adapter)
    rates_by_sum = adapter.pop("rates_by_sum", False)
    inject_adapter(transformer, AdapterConfig(**adapter, num_classes=num_classes, seed=job.seed))
    pipeline.to(device)
    updates = Updates(job, transformer, scheduler, device, autocast)
    source = Source("generated", family_of(pipeline).resolution(pipeline))
    features = load_features(job.features, source.resolution, job.features_weights)
    evaluator = evaluator_of(job, features, source, device)

    trained = adapter_state_dict(transformer)
    optimizer = make_optimizer("adamw", trained, job.learning_rate, job.class_learning_rate)
    if rates_by_sum:
        scales = SumScales(transformer, trained)
        with scales.watching(), torch.no_grad():
            updates.loss(0)
        divide_groups(optimizer, trained, scales.factors(Accelerator()))
    ema = ExponentialMovingAverage(trained, job.ema_decay)
    state = {"seconds": 0.0, "evaluations": [], "memory_before_bytes": None, "peak_memory_bytes": None}
    step = 0
    checkpoints = result.with_suffix(".checkpoints")
    if checkpoint := load_newest_checkpoint(checkpoints):
        restore_training_tensors(checkpoint.tensors, trained, [ema], optimizer)
        step, state = checkpoint.step, checkpoint.state

    state["memory_before_bytes"] = state["memory_before_bytes"] or reset_peak_memory(device)
    while state["seconds"] < job.time_budget_s:
        mark = min((state["seconds"] // job.eval_every_s + 1) * job.eval_every_s, job.time_budget_s)
        transformer.train()
        started = time.perf_counter() - state["seconds"]
        while time.perf_counter() - started < mark:
            updates.loss(step).backward()
            if job.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(trained.values(), job.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            ema.update(step)
        synchronize(device)
        state["seconds"] = time.perf_counter() - started

        # Outside the clock. Memory is read before the first evaluation, whose batch is another.
        check_finite(trained, step)
        state["peak_memory_bytes"] = state["peak_memory_bytes"] or peak_memory_bytes(device)
        with ema.applied(), autocast:
            measured, shown = evaluate(job, evaluator, pipeline, source)
        print(f"evaluation {len(state['evaluations']) + 1}: {measured}", flush=True)
        state["evaluations"].append({"step": step, "seconds": state["seconds"], **measured})
        best = min(state["evaluations"], key=lambda evaluation: evaluation["distance"])
        if best is state["evaluations"][-1]:
            save_adapter(
                transformer,
                result.with_suffix(".safetensors"),
                state_dict=ema.values,
                id2label={int(label): name for label, name in job.id2label.items()},
                base=job.base,
                training={"dataset": job.dataset, "learning_rate": job.learning_rate, "seed": job.seed, **best},
            )
            save_image(shown / 255, result.with_suffix(".png"), nrow=NUM_SHOWN, padding=0)
        if state["seconds"] < job.time_budget_s:
            save_checkpoint(checkpoints, step, training_tensors(trained, [ema], optimizer), state, keep=1)

    transformer.train()
    shutil.rmtree(checkpoints, ignore_errors=True)
    return {
        "distance": best["distance"],
        "recognition": best.get("recognition"),
        "time_to_best_s": best["seconds"],
        "step_seconds": state["seconds"] / step,
        "steps": step,
        "num_trainable_params": count_trainable(transformer),
        "memory_before_bytes": state["memory_before_bytes"],
        "peak_memory_bytes": state["peak_memory_bytes"],
        "saved_bytes": saved_bytes(transformer, lambda: updates.loss(0)),
        "adapter_bytes": result.with_suffix(".safetensors").stat().st_size,
        "evaluations": state["evaluations"],
    }


class Updates:
    """The batches of a run, the same images, noise, timesteps and drops for every method."""

    def __init__(self, job: Job, transformer, scheduler, device: torch.device, autocast=None):
        self.job, self.transformer, self.scheduler, self.device = job, transformer, scheduler, device
        self.autocast = autocast or nullcontext()
        self.latents = LatentCache(Path(job.latents), job.num_train_images)
        self.batches = StepKeyedBatches(job.seed, 0, job.batch_size, job.num_train_images, job.flip, rows=[])

    def loss(self, step: int) -> Tensor:
        """The mean loss of a global batch."""
        job, config, device = self.job, self.transformer.config, self.device
        drawn = draw_step(
            job.seed,
            step,
            job.batch_size,
            (config.in_channels, *[config.sample_size] * 2),
            self.scheduler.config.num_train_timesteps,
            job.label_drop,
        )
        drawn = send_to_device(drawn, device)
        examples = [self.latents[key] for key in self.batches.global_batch(step)]
        moments, labels = (torch.stack(parts).to(device) for parts in zip(*examples, strict=True))
        x_start = sample_moments(moments, drawn.posterior_noise)
        class_labels = torch.where(drawn.label_drops, len(job.id2label), labels)
        latents = self.scheduler.add_noise(x_start, drawn.noise, drawn.timesteps)
        with self.autocast:
            output = self.transformer(latents, timestep=drawn.timesteps, class_labels=class_labels).sample
        return training_losses(output, x_start, drawn.noise, drawn.timesteps, self.scheduler)["loss"].mean()


def evaluator_of(job: Job, features: Features, source: Source, device: torch.device) -> Evaluator:
    """Fréchet distance to the reference, and recognition where the classes are known."""
    reference = load_statistics(job.reference)
    Origin.of(features, source).check_comparable(reference.origin)
    names = [job.id2label[str(label)] for label in range(len(job.id2label))]
    recognition = recognition_of(job.dataset, names, features, source.resolution)
    return Evaluator([features], [reference], recognition=recognition, device=device)


def evaluate(job: Job, evaluator: Evaluator, pipeline, source: Source) -> tuple[dict[str, float], Tensor]:
    """`distance` and `recognition` of the pipeline as it is, and its first samples (NUM_SHOWN, 3, R, R).

    The noise and the classes are the same every time.
    """
    shown: list[Tensor] = []
    batches = generate_images(
        pipeline,
        [index % len(job.id2label) for index in range(job.num_images)],
        job.seed,
        range(job.num_images),
        SamplerSettings(num_inference_steps=job.num_inference_steps, guidance_scale=job.guidance_scale),
        batch_size=job.eval_batch_size,
    )
    (measured,) = evaluator.compare(evaluator.measure(keeping_first(batches, shown), source))
    return measured, torch.stack(shown)


def keeping_first(batches: Batches, shown: list[Tensor]) -> Batches:
    """The same batches; the first NUM_SHOWN images are left in `shown`."""
    for indices, images in batches:
        shown += images[: NUM_SHOWN - len(shown)].cpu()
        yield indices, images


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def machine() -> dict:
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = models[0].split(":")[1].strip() if models else name
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "version": __version__,
        "load": os.getloadavg()[0],
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None,
    }


def main(job_file: Path, result_file: Path) -> None:
    if importlib.util.find_spec("peft"):
        import peft  # noqa: F401  for every method alike: its 100 MB are no property of LoRA
    quieten()
    job = Job(**json.loads(job_file.read_text()))
    facts = {"job": dataclasses.asdict(job), "machine": machine(), "failed": None}
    try:
        facts |= run(job, result_file)
    except torch.OutOfMemoryError:
        facts["failed"] = "out of memory"
    except NonFiniteError as error:
        facts["failed"] = f"diverged: {error}"
    write_json(result_file, facts)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
