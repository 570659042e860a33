"""Train an adapter on a frozen diffusion transformer (DiT).

    python train_dit.py                                    # the embedded job: minutes on two cores, no network
    python train_dit.py --dataset food101 --data-root data --download
    python train_dit.py --dataset imagefolder --data-root photos --max-train-time 2h
    python train_dit.py --config configs/food101.yaml --learning-rate 3e-3   # flags override the recipe
    accelerate launch --num_processes 2 train_dit.py --dataset food101       # two GPUs
    accelerate launch --num_processes 2 --cpu train_dit.py                   # two processes on CPUs

The same command again resumes a run that was interrupted. `--dataset NAME --help` shows that data set's recipe.
"""

import json
import os
import shutil
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm import tqdm

from onelora_diffusion import adapter_state_dict, inject_adapter, save_adapter
from onelora_diffusion.data import load_dataset
from onelora_diffusion.data.images import BrokenImageError
from onelora_diffusion.data.latent_cache import LatentCache, build_cache, cache_size
from onelora_diffusion.data.latents import FlippableImages, encode_moments, sample_moments
from onelora_diffusion.diffusion import training_losses
from onelora_diffusion.files import write_bytes
from onelora_diffusion.launch import start_all_processes
from onelora_diffusion.pipelines.base import load_base, resolution_of
from onelora_diffusion.storage.adapter_file import WEIGHTS_NAME
from onelora_diffusion.training.checkpoints import checkpoint_path, checkpoint_paths, save_checkpoint
from onelora_diffusion.training.ema import ExponentialMovingAverage
from onelora_diffusion.training.metrics import LossWindow, MetricsFile, NonFiniteError, check_finite, cut_lines_after
from onelora_diffusion.training.optimizers import averaged_values, make_optimizer, restore_running, running_values
from onelora_diffusion.training.randomness import StepKeyedBatches, draw_step, micro_batches
from onelora_diffusion.training.resuming import find_checkpoint, is_finished
from onelora_diffusion.training.samples import sample_grid, write_sample
from onelora_diffusion.training.schedule import learning_rate_factor
from onelora_diffusion.training.settings import Settings, check_settings, parse_command_line
from onelora_diffusion.training.sharding import average_gradients, shard_base
from onelora_diffusion.training.state import check_same_adapter, restore_training_tensors, training_tensors
from onelora_diffusion.training.stopping import Clock, Stop, format_duration, parse_duration
from onelora_diffusion.training.weighting import min_snr_weights

RECIPES = Path(__file__).parent / "configs"


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
        if settings.engine == "fsdp2" and accelerator.num_processes == 1:
            raise ValueError("--engine fsdp2 shares the base out over several processes: start more, or choose ddp")
        rows = micro_batches(
            settings.batch_size,
            accelerator.num_processes,
            accelerator.process_index,
            settings.gradient_accumulation_steps,
        )
        if settings.max_train_time is not None:
            clock.budget = parse_duration(settings.max_train_time)
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
        evaluation = None
        if settings.eval_every:
            from onelora_diffusion.training.evaluating import Evaluation

            evaluation = Evaluation(settings, accelerator, pipeline, dataset)
    except (ValueError, OSError) as error:
        raise SystemExit(f"train_dit.py: {error}" if is_main else 1) from None
    try:
        with Stop(clock, accelerator.num_processes) as stop:
            return train(settings, accelerator, clock, stop, pipeline, dataset, rows, checkpoint, evaluation)
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
    except OSError as error:  # a full disk, for one; the last good checkpoint is still there
        raise SystemExit(f"train_dit.py: {error}") from None


def load_inputs(settings: Settings, accelerator: Accelerator):
    """The base model, its adapter and the data, or an error: nothing has been written yet."""
    pipeline = load_base(settings.base)
    transformer = pipeline.transformer
    with accelerator.main_process_first() if settings.download else nullcontext():
        dataset = load_dataset(
            settings.dataset,
            settings.data_root,
            "train",
            resolution_of(pipeline),
            download=settings.download,
            broken=settings.broken_images,
        )
    if settings.method != "full" and settings.mixed_precision != "no":
        # The frozen base is kept in the precision it computes in: autocast would cast it anew at every product.
        transformer.to(torch.float16 if settings.mixed_precision == "fp16" else torch.bfloat16)
    inject_adapter(transformer, settings.adapter_config(dataset.num_classes))
    return pipeline, dataset


def scheduled(step: int, settings: Settings) -> float:
    return learning_rate_factor(step, settings.lr_schedule, settings.warmup_steps, settings.max_steps)


def leave_signals_to_main(worker: int) -> None:
    # Ctrl-C reaches the loader's processes too; they end with the main one, which stops at the next step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def train(settings, accelerator, clock, stop, pipeline, dataset, rows, checkpoint, evaluation) -> int:
    say, is_main = accelerator.print, accelerator.is_main_process
    output_dir, checkpoints = settings.output_dir, settings.output_dir / "checkpoints"

    # Model, optimiser, moving averages.
    transformer, vae, scheduler = pipeline.transformer, pipeline.vae, pipeline.scheduler
    pipeline.to(accelerator.device)
    transformer.train()
    if settings.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if settings.compile:
        for block in transformer.transformer_blocks:
            block.compile()
    trained = adapter_state_dict(transformer)
    num_trainable_params = sum(tensor.numel() for tensor in trained.values())
    plain_optimizer = make_optimizer(settings.optimizer, trained, settings.learning_rate, settings.class_learning_rate)
    emas = [ExponentialMovingAverage(trained, decay) for decay in settings.ema_decay]
    window, step, last_good = LossWindow(), 0, None
    if checkpoint:
        best_values = restore_training_tensors(checkpoint.tensors, trained, emas, plain_optimizer)
        restore_running(plain_optimizer, checkpoint.state["optimizer"])
        if evaluation and best_values:
            evaluation.best, evaluation.best_values = checkpoint.state["best"], best_values
        window, step, last_good = LossWindow(checkpoint.state["window"]), checkpoint.step, checkpoint.path
        clock.earlier = checkpoint.state["seconds"]
        say(f"resuming {checkpoint.path} after {format_duration(clock.earlier)}")
    is_sharded = settings.engine == "fsdp2"
    if is_sharded:
        model, optimizer = shard_base(transformer, trained, accelerator.device), accelerator.prepare(plain_optimizer)
    else:
        model, optimizer = accelerator.prepare(transformer, plain_optimizer)
    if checkpoint and accelerator.scaler:
        accelerator.scaler.load_state_dict(checkpoint.state["scaler"])

    # Data: [index, flip] -> image, or the moments of its latents from the cache.
    num_timesteps = scheduler.config.num_train_timesteps
    latent_shape = (transformer.config.in_channels, *[transformer.config.sample_size] * 2)
    is_cached = cache_size(len(dataset), settings.flip, latent_shape) <= settings.latent_cache_gb * 1e9
    examples = FlippableImages(dataset)
    if is_cached:
        folder = build_cache(
            settings.latent_cache or output_dir.parent / "latents",
            dataset,
            vae,
            settings.flip,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            num_workers=settings.num_workers,
            is_stopped=stop.asked,
            report=tqdm.write,
        )
        if not stop.agreed():  # else the cache may be half done, and there is no step to come
            examples = LatentCache(folder, len(dataset))
    loader = DataLoader(
        examples,
        batch_sampler=StepKeyedBatches(settings.seed, step, settings.batch_size, len(dataset), settings.flip, rows),
        num_workers=0 if is_cached else settings.num_workers,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=leave_signals_to_main,
    )
    batches = iter(loader)

    # From here on something is written.
    if is_main:
        output_dir.mkdir(parents=True, exist_ok=True)
        if settings.fresh:
            shutil.rmtree(checkpoints, ignore_errors=True)
        cut_lines_after(output_dir / "metrics.jsonl", step, len(window.rows))
        write_bytes(output_dir / "settings.json", json.dumps(settings.as_json(), indent=2).encode())
    if accelerator.log_with:
        accelerator.init_trackers("onelora-diffusion", {k: str(v) for k, v in settings.as_json().items()})
    metrics = MetricsFile(output_dir / "metrics.jsonl", accelerator, settings.batch_size, step, clock)
    say(
        f"{settings.method} on {settings.base or 'the miniature'}: {num_trainable_params:,} trained parameters; "
        f"{settings.dataset}: {len(dataset):,} images of {dataset.num_classes} classes; output in {output_dir}"
    )
    progress = tqdm(total=settings.max_steps, initial=step, unit="step", disable=not is_main)

    def write_losses() -> None:
        line = metrics.write_losses(window, step, optimizer.param_groups[0]["lr"])
        left = "" if clock.budget is None else f", {format_duration(clock.left)} of the budget left"
        progress.set_postfix_str(f"loss {line['loss']:.4f}{left}", refresh=False)

    def write_checkpoint() -> Path | None:
        losses = window.read(accelerator, step)
        tensors = training_tensors(trained, emas, plain_optimizer, evaluation.best_values if evaluation else {})
        check_finite(tensors, step)
        state = {
            "seconds": clock.seconds,
            "window": losses,
            "optimizer": running_values(plain_optimizer),
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
            "best": evaluation.best if evaluation else None,
            "settings": settings.as_json(),
        }
        if not is_main:
            return checkpoint_path(checkpoints, step)
        try:
            return save_checkpoint(checkpoints, step, tensors, state, settings.keep_checkpoints)
        except OSError as error:
            tqdm.write(f"train_dit.py: no checkpoint at step {step} ({error}); the last good one is {last_good}")
            return last_good

    def write_adapter(name: str, values: dict, **more) -> None:
        if not is_main:
            return
        summary = {
            "dataset": settings.dataset,
            "steps": step,
            "batch_size": settings.batch_size,
            "learning_rate": settings.learning_rate,
            "ema_decay": settings.ema_decay[0],
            "mixed_precision": settings.mixed_precision,
            "seed": settings.seed,
            "seconds": clock.seconds,
            "time_budget_s": clock.budget,
            "num_processes": accelerator.num_processes,
            "num_trainable_params": num_trainable_params,
            "num_broken_images": num_broken,
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        }
        save_adapter(
            transformer,
            output_dir / name,
            state_dict=values,
            id2label=dataset.id2label,
            base=settings.base,
            training=summary | more,
        )

    def write_samples() -> None:
        # The processes that share out the base must run it together; else only one of them draws.
        if is_main or is_sharded:
            is_stopped = stop.agreed if is_sharded else stop.asked
            with emas[0].applied(), accelerator.autocast():
                png = sample_grid(pipeline, dataset.num_classes, settings, is_stopped)
            if is_main and png:
                write_sample(output_dir / f"samples/step-{step:08}.png", png)

    def evaluate() -> None:
        with emas[0].applied(), accelerator.autocast():
            measured = evaluation.measure(stop)
        if measured:
            line = metrics.write({"step": step, **measured, "seconds": clock.seconds})
            if evaluation.keep_if_best(line, emas[0].values):
                write_adapter(WEIGHTS_NAME, evaluation.best_values, best=evaluation.best)
            if is_main:
                evaluation.plot(metrics.path, output_dir / "distance.png")

    max_steps = float("inf") if settings.max_steps is None else settings.max_steps
    num_broken = 0
    with progress:
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

            if is_sharded:
                average_gradients(trained)
            if settings.max_grad_norm is not None:
                accelerator.clip_grad_norm_(trained.values(), settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            with averaged_values(plain_optimizer):
                for ema in emas:
                    ema.update(step)
            window.add(step_losses)
            progress.update()

            if step % settings.log_every == 0:
                write_losses()
            if settings.sample_every and step % settings.sample_every == 0:
                write_samples()
            if evaluation and (step % settings.eval_every == 0 or step == max_steps):
                evaluate()
            if step % settings.checkpoint_every == 0:
                last_good = write_checkpoint()
        last_good = write_checkpoint()
        if window.rows:
            write_losses()

    # The adapter: the best one measured, else the last average.
    if settings.broken_images == "skip":
        broken = (examples.broken() if is_cached and not ended else dataset.broken).int().to(accelerator.device)
        num_broken = int(accelerator.reduce(broken).count_nonzero())
        say(f"{num_broken} unreadable images were skipped")
    if evaluation and evaluation.best:
        write_adapter(WEIGHTS_NAME, evaluation.best_values, best=evaluation.best)
        write_adapter(f"{Path(WEIGHTS_NAME).stem}_last.safetensors", emas[0].values)
    else:
        write_adapter(WEIGHTS_NAME, emas[0].values)
    for ema in emas[1:]:
        write_adapter(f"{Path(WEIGHTS_NAME).stem}_ema_{ema.decay}.safetensors", ema.values, ema_decay=ema.decay)
    seconds = clock.seconds
    accelerator.wait_for_everyone()
    accelerator.end_training()

    reasons = {0: f"all {step} steps done", 1: f"the time budget is used up at step {step}"}
    reason = reasons.get(ended) or f"stopped by {signal.Signals(ended).name} at step {step}"
    say(f"{reason}, {format_duration(seconds)}: {num_trainable_params:,} trained parameters (moving average)")
    if evaluation and evaluation.best:
        best = evaluation.best
        say(f"best of all evaluations: {evaluation.distance_name} {best['distance']:.4f} at step {best['step']}")
    say(f"  {output_dir / WEIGHTS_NAME}")
    if Stop.is_signal(ended):
        say("The same command resumes.")
        return 128 + ended
    where = settings.flag_of_output()
    say(f"Next:\n  python sample.py{where}\n  python eval_fid.py{where}")
    return 0


if __name__ == "__main__":
    start_all_processes()
    try:
        chosen = parse_command_line(sys.argv[1:], RECIPES)
    except (ValueError, OSError) as error:
        raise SystemExit(f"train_dit.py: {error}") from None
    sys.exit(main(chosen))
