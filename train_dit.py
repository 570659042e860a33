"""Train an adapter on a frozen diffusion transformer (DiT).

    python train_dit.py                                    # the embedded job: minutes on two cores, no network
    python train_dit.py --dataset food101 --data-root data --download
    python train_dit.py --dataset imagefolder --data-root photos --max-train-time 2h
    accelerate launch --num_processes 2 train_dit.py --dataset food101       # two GPUs
    torchrun --nproc_per_node 2 train_dit.py                                 # two processes, with or without GPUs

The same command again resumes a run that was interrupted. `--dataset NAME --help` shows that data set's recipe.
"""

import argparse
import dataclasses
import importlib.util
import io
import json
import os
import shutil
import signal
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.utils import make_grid
from tqdm import tqdm

from onelora_diffusion import AdapterConfig, adapter_state_dict, inject_adapter, save_adapter
from onelora_diffusion.data import load_dataset
from onelora_diffusion.data.images import BrokenImageError
from onelora_diffusion.data.latents import CachedMoments, FlippableImages, encode_moments, sample_moments
from onelora_diffusion.diffusion import training_losses
from onelora_diffusion.pipeline import load_base
from onelora_diffusion.sampling import generate_images
from onelora_diffusion.saving import read_adapter
from onelora_diffusion.training.checkpoints import (
    Checkpoint,
    checkpoint_path,
    checkpoint_paths,
    load_newest_checkpoint,
    save_checkpoint,
    write_bytes,
)
from onelora_diffusion.training.ema import ExponentialMovingAverage
from onelora_diffusion.training.metrics import LossWindow, NonFiniteError, append_line, check_finite, cut_lines_after
from onelora_diffusion.training.randomness import StepKeyedBatches, draw_step, micro_batches
from onelora_diffusion.training.schedule import learning_rate_factor
from onelora_diffusion.training.state import check_same_adapter, restore_training_tensors, training_tensors
from onelora_diffusion.training.stopping import Clock, Stop, format_duration, parse_duration


@dataclass
class Settings:
    """Fine-tune a frozen DiT on new classes. The defaults are the recipe of the chosen --dataset."""

    dataset: Literal["digits", "food101", "imagefolder"] = "digits"
    """What to learn. Its recipe sets the defaults of all other flags."""
    data_root: Path | None = None
    """Where the data set lies: the folder that holds food-101/, or the one of one folder a class."""
    download: bool = False
    """Fetch Food-101 (5 GB) if it is not there."""
    flip: bool = False
    """Mirror half of the images."""
    base: str | None = None
    """Base model: a folder or a hub id. None: the miniature inside the package."""
    output_dir: Path = Path("runs/digits")
    """Where the adapter, checkpoints, metrics and samples go."""

    method: str = "1lora"
    """1lora, bitfit, difffit, mora1, mora6, lora, dora, vera or full."""
    rank: int = 1
    """Rank of the methods that have one."""
    targets: tuple[str, ...] | None = None
    """Names of the linear layers to adapt. None: the paper's set."""
    fuse_qkv: bool = False
    """Compute q, k and v by one matrix product."""
    sum: bool | None = None
    """Train b, the vector of the feature sum. None: as the method does; so for the next three."""
    bias: bool | None = None
    """Train a bias."""
    scale: bool | None = None
    """Train a scale of the outputs."""
    norms: bool | None = None
    """Train the affine weights of normalisation layers."""
    compression: str = "sum"
    """sum, or random: the ablation in which a fixed random vector stands for the sum."""

    max_train_time: str | None = "10m"
    """Budget of wall-clock time, over all resumes: 90s, 30m, 24h, 1h30m."""
    max_steps: int | None = 1500
    """Most updates to make."""
    batch_size: int = 64
    """Images an update, over all processes and accumulation steps."""
    gradient_accumulation_steps: int = 1
    """Passes that an update's images are split into on each process."""
    learning_rate: float = 5e-3
    """AdamW's, without weight decay."""
    class_learning_rate: float | None = None
    """Learning rate of the class table, if another."""
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    """cosine and linear fall to 0 at --max-steps."""
    warmup_steps: int = 0
    """Updates in which the learning rate rises from 0."""
    max_grad_norm: float | None = None
    """Clip the norm of the gradient."""
    label_drop: float = 0.1
    """Share of samples that train the null label, for classifier-free guidance."""
    snr_gamma: float | None = None
    """Weigh the squared error by min(SNR, gamma) / SNR (Hang et al., 2023)."""
    ema_decay: float = 0.999
    """Decay of the moving average of the trained values; the average is what is saved."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of the frozen base and of its products; trained values stay float32."""
    gradient_checkpointing: bool = False
    """Recompute the blocks in the backward pass: less memory, more time."""
    seed: int = 0
    """Of everything random."""

    log_every: int = 20
    """Updates between two lines of metrics."""
    sample_every: int = 500
    """Updates between two grids of samples with the same noise; 0: none."""
    sample_steps: int = 50
    """DDIM steps of those samples."""
    guidance_scale: float = 4.0
    """Classifier-free guidance of those samples."""
    checkpoint_every: int = 500
    """Updates between two checkpoints."""
    keep_checkpoints: int = 2
    """How many of them to keep."""
    track: Literal["none", "tensorboard", "wandb"] = "none"
    """Also send the metrics there."""
    num_workers: int = 0
    """Processes that load images."""
    latent_cache_gb: float = 1.0
    """Encode all images once, and keep their latents, if they take no more memory than this; 0: never."""
    allow_changed_settings: bool = False
    """Resume although settings have changed."""
    fresh: bool = False
    """Start over, and delete the checkpoints and metrics of an earlier run in the output folder."""


# What differs from the defaults above, which are those of digits. Every value can be overridden by its flag.
RECIPES = {
    "digits": dict(),
    "food101": dict(
        base="facebook/DiT-XL-2-256",
        output_dir=Path("runs/food101"),
        data_root=Path("data"),
        flip=True,
        max_train_time="24h",
        max_steps=None,
        batch_size=32,
        learning_rate=1e-3,
        warmup_steps=100,
        ema_decay=0.9999,
        mixed_precision="bf16",
        sample_every=2000,
        checkpoint_every=1000,
        num_workers=4,
    ),
}
RECIPES["imagefolder"] = RECIPES["food101"] | dict(output_dir=Path("runs/imagefolder"), data_root=None)

# Settings that may change between a run and its resume: they do not alter what an update computes.
FREE_SETTINGS = {
    *("data_root", "download", "output_dir", "max_train_time", "max_steps", "gradient_accumulation_steps"),
    *("gradient_checkpointing", "log_every", "sample_every", "sample_steps", "guidance_scale"),
    *("checkpoint_every", "keep_checkpoints", "track", "num_workers", "latent_cache_gb"),
    *("allow_changed_settings", "fresh"),
}

ADAPTER_FILE = "onelora_weights.safetensors"
GRID_CLASSES, GRID_ROWS = 10, 4


def recipe(dataset: str, **changes) -> Settings:
    return Settings(**{"dataset": dataset, **RECIPES[dataset], **changes})


def parse_command_line(arguments: list[str]) -> Settings:
    # The data set is read first, so that the defaults, and --help, are its recipe's.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", nargs="?")
    dataset = first.parse_known_args(arguments)[0].dataset
    return tyro.cli(Settings, args=arguments, default=recipe(dataset if dataset in RECIPES else "digits"))


def check_settings(settings: Settings) -> None:
    for name in ("batch_size", "gradient_accumulation_steps", "log_every", "checkpoint_every", "keep_checkpoints"):
        if getattr(settings, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(settings, name)}")
    if settings.max_train_time is None and settings.max_steps is None:
        raise ValueError("training would never end: give --max-train-time or --max-steps")
    if settings.lr_schedule != "constant" and settings.max_steps is None:
        raise ValueError(f"the {settings.lr_schedule} schedule ends at --max-steps: give one")
    if not 0 <= settings.label_drop <= 1:
        raise ValueError(f"--label-drop is a share from 0 to 1, not {settings.label_drop}")
    if not 0 <= settings.ema_decay < 1:
        raise ValueError(f"--ema-decay is at least 0 and below 1, not {settings.ema_decay}")
    if settings.track != "none" and importlib.util.find_spec(settings.track) is None:
        extra = '"onelora-diffusion[track]"' if settings.track == "tensorboard" else settings.track
        raise ValueError(f"--track {settings.track} needs a package that is missing: pip install {extra}")


def settings_as_json(settings: Settings) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(settings), default=str))


def check_same_settings(settings: Settings, checkpoint: Checkpoint) -> None:
    then, now = checkpoint.state["settings"], settings_as_json(settings)
    free = FREE_SETTINGS - ({"max_steps"} if settings.lr_schedule != "constant" else set())
    changed = [name for name in now if name not in free and then.get(name) != now[name]]
    if changed and not settings.allow_changed_settings:
        listed = ", ".join(f"{name} was {then.get(name)} and is {now[name]}" for name in changed)
        raise ValueError(
            f"{checkpoint.path} was trained with other settings: {listed}. Resume all the same with "
            "--allow-changed-settings, start over with --fresh, or choose another --output-dir"
        )


def find_checkpoint(settings: Settings, report) -> Checkpoint | None:
    if settings.fresh:
        return None
    checkpoint = load_newest_checkpoint(settings.output_dir / "checkpoints", report)
    if checkpoint:
        check_same_settings(settings, checkpoint)
    return checkpoint


def is_finished(settings: Settings, checkpoint: Checkpoint | None) -> bool:
    """Whether the checkpoint is the last of its run, and the adapter of that step has been written."""
    adapter = settings.output_dir / ADAPTER_FILE
    if checkpoint is None or not adapter.exists():
        return False
    budget = float("inf") if settings.max_train_time is None else parse_duration(settings.max_train_time)
    steps = float("inf") if settings.max_steps is None else settings.max_steps
    is_last = checkpoint.step >= steps or checkpoint.state["seconds"] >= budget
    return is_last and read_adapter(adapter).training["steps"] == checkpoint.step


def parameter_groups(trained: dict[str, Tensor], settings: Settings) -> list[dict]:
    """The vectors, and the class table, each with the learning rate that the schedule multiplies."""
    table = [tensor for name, tensor in trained.items() if name.startswith("class_embedding.")]
    vectors = [tensor for name, tensor in trained.items() if not name.startswith("class_embedding.")]
    table_rate = settings.learning_rate if settings.class_learning_rate is None else settings.class_learning_rate
    groups = [(vectors, settings.learning_rate), (table, table_rate)]
    return [{"params": params, "lr": rate, "peak_lr": rate} for params, rate in groups if params]


def scheduled(step: int, settings: Settings) -> float:
    return learning_rate_factor(step, settings.lr_schedule, settings.warmup_steps, settings.max_steps)


def min_snr_weights(timesteps: Tensor, scheduler, gamma: float) -> Tensor:
    """min(SNR, γ) / SNR with SNR = ᾱ / (1 - ᾱ), for a model that predicts the noise: (batch,)."""
    alphas_cumprod = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return snr.clamp(max=gamma) / snr


def leave_signals_to_main(worker: int) -> None:
    # Ctrl-C reaches the loader's processes too; they end with the main one, which stops at the next step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def save_samples(path: Path, pipeline, num_classes: int, settings: Settings, is_stopped) -> None:
    """A grid with a class a column; image i has the same noise in every grid. Nothing if stopped midway."""
    columns = min(GRID_CLASSES, num_classes)
    classes = [column * (num_classes - 1) // max(1, columns - 1) for column in range(columns)]
    labels, images = classes * GRID_ROWS, []
    batches = generate_images(
        pipeline,
        labels,
        settings.seed,
        range(len(labels)),
        num_inference_steps=settings.sample_steps,
        guidance_scale=settings.guidance_scale,
        null_label=num_classes,
        batch_size=columns,
    )
    for _, batch in batches:
        images.append(batch.cpu())
        if is_stopped():
            return
    png = io.BytesIO()
    grid = make_grid(torch.cat(images), nrow=columns)
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(png, format="PNG")
    path.parent.mkdir(exist_ok=True)
    write_bytes(path, png.getvalue())


def load_inputs(settings: Settings, accelerator: Accelerator):
    """The base model, its adapter and the data, or an error: nothing has been written yet."""
    AdapterConfig(method=settings.method)  # a wrong method fails before a large model is read
    pipeline = load_base(settings.base)
    transformer, vae = pipeline.transformer, pipeline.vae
    resolution = transformer.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1)
    with accelerator.main_process_first() if settings.download else nullcontext():
        dataset = load_dataset(settings.dataset, settings.data_root, "train", resolution, download=settings.download)
    if settings.method != "full" and settings.mixed_precision != "no":
        # The frozen base is kept in the precision it computes in: autocast would cast it anew at every product.
        transformer.to(torch.float16 if settings.mixed_precision == "fp16" else torch.bfloat16)
    config = AdapterConfig(
        method=settings.method,
        rank=settings.rank,
        targets=settings.targets,
        num_classes=dataset.num_classes,
        fuse_qkv=settings.fuse_qkv,
        sum=settings.sum,
        bias=settings.bias,
        scale=settings.scale,
        norms=settings.norms,
        compression=settings.compression,
        seed=settings.seed,
    )
    inject_adapter(transformer, config)
    return pipeline, dataset


def main(settings: Settings) -> int:
    """Trains, or says in one line why not; returns the exit code."""
    clock = Clock()
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        check_settings(settings)
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # else processes without GPUs would not know of each other
            mixed_precision=settings.mixed_precision,
            log_with=None if settings.track == "none" else settings.track,
            project_dir=settings.output_dir,
        )
        if settings.mixed_precision == "fp16" and accelerator.device.type == "cpu":
            raise ValueError("--mixed-precision fp16 needs a GPU: choose bf16 or no")
        num_processes, accumulation = accelerator.num_processes, settings.gradient_accumulation_steps
        rows = micro_batches(settings.batch_size, num_processes, accelerator.process_index, accumulation)
        if settings.max_train_time is not None:
            clock.budget = parse_duration(settings.max_train_time)
        if num_processes == 1 and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
            # That launcher leaves several processes on CPUs to mpirun, and says nothing.
            print("accelerate launch --cpu has started one process; for two: torchrun --nproc_per_node 2 train_dit.py")
        checkpoint = find_checkpoint(settings, accelerator.print)
        if is_finished(settings, checkpoint):
            accelerator.print(
                f"{settings.output_dir}: finished at step {checkpoint.step}, nothing to do. Raise --max-steps or "
                "--max-train-time to go on, or start over with --fresh"
            )
            return 0
        pipeline, dataset = load_inputs(settings, accelerator)
        if checkpoint:
            check_same_adapter(checkpoint.tensors, adapter_state_dict(pipeline.transformer))
    except (ValueError, OSError) as error:
        raise SystemExit(f"train_dit.py: {error}" if is_main else 1) from None
    try:
        return train(settings, accelerator, clock, pipeline, dataset, rows, checkpoint)
    except NonFiniteError as error:
        rate = settings.learning_rate * scheduled(error.step - 1, settings)
        good = [str(path) for path in checkpoint_paths(settings.output_dir / "checkpoints")][-1:] or ["none"]
        raise SystemExit(
            f"train_dit.py: {error}, with learning rate {rate:g}; last good checkpoint: {good[0]}. Go on from it "
            "with --allow-changed-settings and a lower --learning-rate, or start over with --fresh"
            if is_main
            else 1
        ) from None
    except BrokenImageError as error:
        # A loader's process sends its whole traceback as the message.
        raise SystemExit("train_dit.py: " + str(error).splitlines()[-1].split("BrokenImageError: ")[-1]) from None


def train(settings, accelerator, clock, pipeline, dataset, rows, checkpoint) -> int:
    say, is_main = accelerator.print, accelerator.is_main_process

    # Model, optimiser, moving average.
    transformer, vae, scheduler = pipeline.transformer, pipeline.vae, pipeline.scheduler
    pipeline.to(accelerator.device)
    transformer.train()
    if settings.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    trained = adapter_state_dict(transformer)
    optimizer = torch.optim.AdamW(parameter_groups(trained, settings), weight_decay=0.0, fused=True)
    ema = ExponentialMovingAverage(trained, settings.ema_decay)
    window = LossWindow()
    step = 0
    if checkpoint:
        restore_training_tensors(checkpoint.tensors, trained, ema, optimizer)
        step = checkpoint.step
        clock.earlier = checkpoint.state["seconds"]
        window = LossWindow(checkpoint.state["window"])
        say(f"resuming {checkpoint.path} after {format_duration(clock.earlier)}")
    model, optimizer = accelerator.prepare(transformer, optimizer)
    if checkpoint and accelerator.scaler:
        accelerator.scaler.load_state_dict(checkpoint.state["scaler"])

    # Data: [index, flip] -> image, or the moments of its latents where those of all images fit into memory.
    num_timesteps = scheduler.config.num_train_timesteps
    latent_shape = (transformer.config.in_channels, *[transformer.config.sample_size] * 2)
    cache_size = CachedMoments.size_in_bytes(len(dataset), settings.flip, latent_shape)
    is_cached = cache_size <= settings.latent_cache_gb * 1e9
    if is_cached:  # every process encodes all of them, in the same batches, and gets the same numbers
        examples = CachedMoments(dataset, vae, settings.flip, 32, settings.num_workers, is_main)
    else:
        examples = FlippableImages(dataset)
    loader = DataLoader(
        examples,
        batch_sampler=StepKeyedBatches(settings.seed, step, settings.batch_size, len(dataset), settings.flip, rows),
        num_workers=0 if is_cached else settings.num_workers,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=leave_signals_to_main,
    )

    # From here on something is written.
    output_dir, checkpoints = settings.output_dir, settings.output_dir / "checkpoints"
    if is_main:
        output_dir.mkdir(parents=True, exist_ok=True)
        if settings.fresh:
            shutil.rmtree(checkpoints, ignore_errors=True)
        cut_lines_after(output_dir / "metrics.jsonl", step - len(window.rows))
        write_bytes(output_dir / "settings.json", json.dumps(settings_as_json(settings), indent=2).encode())
    if accelerator.log_with:
        accelerator.init_trackers("onelora-diffusion", {k: str(v) for k, v in settings_as_json(settings).items()})
    num_trainable_params = sum(tensor.numel() for tensor in trained.values())
    say(
        f"{settings.method} on {settings.base or 'the miniature'}: {num_trainable_params:,} trained parameters; "
        f"{settings.dataset}: {len(dataset):,} images of {dataset.num_classes} classes; output in {output_dir}"
    )

    batches = iter(loader)
    progress = tqdm(total=settings.max_steps, initial=step, unit="step", disable=not is_main)
    last_line = {"step": step, "seconds": clock.seconds}
    last_good = checkpoint.path if checkpoint else None

    def write_metrics() -> None:
        losses = window.read(accelerator, step)
        line = {"step": step} | {name: sum(row[name] for row in losses) / len(losses) for name in losses[0]}
        line |= {"lr": optimizer.param_groups[0]["lr"], "seconds": clock.seconds}
        updates, seconds = step - last_line["step"], clock.seconds - last_line["seconds"]
        line["images_per_second"] = updates * settings.batch_size / seconds
        last_line.update(line)
        window.clear()
        accelerator.log(line, step=step)
        if is_main:
            append_line(output_dir / "metrics.jsonl", line)
        left = "" if clock.budget is None else f", {format_duration(clock.left)} of the budget left"
        progress.set_postfix_str(f"loss {line['loss']:.4f}{left}", refresh=False)

    def write_checkpoint() -> Path | None:
        losses = window.read(accelerator, step)
        tensors = training_tensors(trained, ema, optimizer.optimizer)
        check_finite(tensors, step)
        state = {
            "seconds": clock.seconds,
            "window": losses,
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
            "settings": settings_as_json(settings),
        }
        if not is_main:
            return checkpoint_path(checkpoints, step)
        try:
            return save_checkpoint(checkpoints, step, tensors, state, settings.keep_checkpoints)
        except OSError as error:
            tqdm.write(f"train_dit.py: no checkpoint at step {step} ({error}); the last good one is {last_good}")
            return last_good

    max_steps = float("inf") if settings.max_steps is None else settings.max_steps
    with Stop(clock, accelerator.num_processes) as stop, progress:
        while not (ended := stop.agreed()) and step < max_steps:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * scheduled(step, settings)

            # Everything random in an update is drawn for the global batch, and sliced.
            drawn = draw_step(
                settings.seed, step, settings.batch_size, latent_shape, num_timesteps, settings.label_drop
            )
            step_losses = {}
            for micro_batch in rows:
                images, labels = (part.to(accelerator.device, non_blocking=True) for part in next(batches))
                draws = drawn.rows(micro_batch, accelerator.device)
                moments = images if is_cached else encode_moments(vae, images)
                x_start = sample_moments(moments, draws.posterior_noise)
                latents = scheduler.add_noise(x_start, draws.noise, draws.timesteps)
                class_labels = torch.where(draws.label_drops, dataset.num_classes, labels)

                is_last = micro_batch is rows[-1]  # processes exchange gradients once an update
                with nullcontext() if is_last else accelerator.no_sync(model):
                    with accelerator.autocast():
                        output = model(latents, timestep=draws.timesteps, class_labels=class_labels).sample
                    losses = training_losses(output, x_start, draws.noise, draws.timesteps, scheduler)
                    if settings.snr_gamma is not None:
                        weights = min_snr_weights(draws.timesteps, scheduler, settings.snr_gamma)
                        losses["loss"] = losses["loss"] + (weights - 1) * losses["mse"]
                    accelerator.backward(losses["loss"].mean() / len(rows))
                for name, loss in losses.items():
                    step_losses[name] = step_losses.get(name, 0) + loss.detach().mean() / len(rows)

            if settings.max_grad_norm is not None:
                accelerator.clip_grad_norm_(trained.values(), settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            ema.update(step)
            window.add(step_losses)
            progress.update()

            if step % settings.log_every == 0:
                write_metrics()
            if is_main and settings.sample_every and step % settings.sample_every == 0:
                with ema.applied(), accelerator.autocast():
                    save_samples(
                        output_dir / f"samples/step-{step:08}.png",
                        pipeline,
                        dataset.num_classes,
                        settings,
                        stop.asked,
                    )
            if step % settings.checkpoint_every == 0:
                last_good = write_checkpoint()
        last_good = write_checkpoint()
        if window.rows:
            write_metrics()

    seconds = clock.seconds
    if is_main:
        summary = {
            "dataset": settings.dataset,
            "steps": step,
            "batch_size": settings.batch_size,
            "learning_rate": settings.learning_rate,
            "ema_decay": settings.ema_decay,
            "mixed_precision": settings.mixed_precision,
            "seed": settings.seed,
            "seconds": seconds,
            "time_budget_s": clock.budget,
            "num_processes": accelerator.num_processes,
            "num_trainable_params": num_trainable_params,
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        }
        save_adapter(
            transformer,
            output_dir / ADAPTER_FILE,
            state_dict=ema.values,
            id2label=dataset.id2label,
            base=settings.base,
            training=summary,
        )
    accelerator.wait_for_everyone()
    accelerator.end_training()
    reasons = {0: f"all {step} steps done", 1: f"the time budget is used up at step {step}"}
    reason = reasons.get(ended) or f"stopped by {signal.Signals(ended).name} at step {step}"
    say(f"{reason}, {format_duration(seconds)}: {num_trainable_params:,} trained parameters (moving average)")
    say(f"  {output_dir / ADAPTER_FILE}")
    if Stop.is_signal(ended):
        say("The same command resumes.")
        return 128 + ended
    where = "" if output_dir == Settings.output_dir else f" --adapter {output_dir}"
    say(f"Next:\n  python sample.py{where}\n  python eval_fid.py{where}")
    return 0


if __name__ == "__main__":
    sys.exit(main(parse_command_line(sys.argv[1:])))
