"""Train an adapter on a frozen diffusion transformer (DiT).

    python train_dit.py                                    # the embedded job: minutes on two cores, no network
    python train_dit.py --dataset food101 --data-root data --download
    python train_dit.py --dataset imagefolder --data-root photos --max-train-time 2h
    python train_dit.py --config configs/food101.yaml --learning-rate 3e-3   # flags override the recipe
    accelerate launch --num_processes 2 train_dit.py --dataset food101       # two GPUs
    accelerate launch --num_processes 2 --cpu train_dit.py                   # two processes on CPUs

The same command again resumes a run that was interrupted. `--dataset NAME --help` shows that data set's recipe.
"""

import signal
import sys
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from onelora_diffusion import adapter_state_dict, inject_adapter
from onelora_diffusion.command_line import one_line_errors, quieten
from onelora_diffusion.data import load_dataset
from onelora_diffusion.data.images import BrokenImageError
from onelora_diffusion.data.latent_cache import LatentCache, build_cache, cache_size
from onelora_diffusion.data.latents import FlippableImages, encode_moments
from onelora_diffusion.diffusion import model_timesteps, training_losses
from onelora_diffusion.launch import start_all_processes, started
from onelora_diffusion.pipelines.base import load_base, resolution_of
from onelora_diffusion.training.holding import HeldFolder
from onelora_diffusion.training.metrics import NonFiniteError
from onelora_diffusion.training.optimizers import averaged_values
from onelora_diffusion.training.outputs import Outputs, diverged
from onelora_diffusion.training.randomness import StepKeyedBatches, draw_step, micro_batches
from onelora_diffusion.training.resuming import find_checkpoint, is_finished
from onelora_diffusion.training.run import Run
from onelora_diffusion.training.schedule import learning_rate_factor
from onelora_diffusion.training.settings import Settings, check_settings, parse_command_line
from onelora_diffusion.training.sharding import average_gradients, shard_base
from onelora_diffusion.training.state import check_same_adapter
from onelora_diffusion.training.stopping import Clock, Stop, format_duration, parse_duration
from onelora_diffusion.training.weighting import check_weighting, loss_weights

RECIPES = Path(__file__).parent / "configs"


@dataclass
class Job:
    """What a run trains with; what it changes is the record `run`."""

    settings: Settings
    accelerator: Accelerator
    pipeline: object
    dataset: Dataset
    rows: list[slice]
    """Of the global batch, those that this process takes, a slice for each of its passes."""
    evaluation: object | None
    run: Run


def main(settings: Settings, since: float | None = None) -> int:
    """Trains, or says in one line why not; returns the exit code. The budget counts since that `time.monotonic()`."""
    with ExitStack() as held:
        with one_line_errors("train_dit.py", same_everywhere=True):
            check_settings(settings)
            job = prepare(settings, since, held)
        if job is None:
            return 0
        try:
            with Stop(job.run.clock, job.accelerator.num_processes) as stop:
                return train(job, stop)
        except NonFiniteError as error:
            raise SystemExit(
                f"train_dit.py: {diverged(error, settings)}" if job.accelerator.is_main_process else 1
            ) from None
        except BrokenImageError as error:
            # A loader's process sends its whole traceback as the message.
            broken = str(error).splitlines()[-1].split("BrokenImageError: ")[-1]
            raise SystemExit(f"train_dit.py: {broken}") from None
        except OSError as error:  # a full disk, for one; the last good checkpoint is still there
            raise SystemExit(f"train_dit.py: {error}") from None


def prepare(settings: Settings, since: float | None, held: ExitStack) -> Job | None:
    """All that a run needs, as far as its newest checkpoint, or an error; None if there is nothing to do.

    Nothing has been written then but the clock in the output folder, which is this run's until `held` is closed.
    """
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

    folder = held.enter_context(HeldFolder(settings.output_dir, accelerator))
    clock = Clock(None if settings.max_train_time is None else parse_duration(settings.max_train_time), since)
    clock.resume(0 if settings.fresh else folder.seconds)
    checkpoint = find_checkpoint(settings, accelerator.print)
    if checkpoint:
        clock.resume(checkpoint.state["seconds"])
    if is_finished(settings, checkpoint, clock, accelerator.print):
        accelerator.print(
            f"{settings.output_dir}: finished at step {checkpoint.step}, nothing to do. Raise --max-steps or "
            "--max-train-time to go on, or start over with --fresh"
        )
        return None

    held.enter_context(folder.counting(clock))
    pipeline, dataset = load_inputs(settings, accelerator)
    trained = adapter_state_dict(pipeline.transformer)
    if checkpoint:
        check_same_adapter(checkpoint.tensors, trained)
    evaluation = None
    if settings.eval_every:
        from onelora_diffusion.training.evaluating import Evaluation

        evaluation = Evaluation(settings, accelerator, pipeline, dataset)
    run = Run(settings, accelerator, trained, clock)
    if checkpoint:
        run.restore(checkpoint)
        accelerator.print(f"resuming {checkpoint.path} after {format_duration(clock.seconds)}")
    return Job(settings, accelerator, pipeline, dataset, rows, evaluation, run)


def load_inputs(settings: Settings, accelerator: Accelerator):
    """The base model with its adapter, where it trains, and the data."""
    pipeline = load_base(settings.base)
    check_weighting(pipeline.scheduler, settings.snr_gamma, settings.loss_weighting)
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
    pipeline.to(accelerator.device)
    transformer.train()
    if settings.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if settings.compile:
        for block in transformer.transformer_blocks:
            block.compile()
    return pipeline, dataset


def scheduled(step: int, settings: Settings) -> float:
    return learning_rate_factor(step, settings.lr_schedule, settings.warmup_steps, settings.max_steps)


def load_examples(job: Job, stop: Stop) -> tuple[Dataset, bool]:
    """`[index, flip] -> (image, label)`, or moments for the image, encoded once if they fit; and which it is."""
    settings, accelerator, config = job.settings, job.accelerator, job.pipeline.transformer.config
    images = FlippableImages(job.dataset)
    size = cache_size(len(job.dataset), settings.flip, (config.in_channels, *[config.sample_size] * 2))
    if size > settings.latent_cache_gb * 1e9:
        return images, False
    folder = build_cache(
        settings.latent_cache or settings.output_dir.parent / "latents",
        job.dataset,
        job.pipeline.vae,
        settings.flip,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        num_workers=settings.num_workers,
        is_stopped=stop.asked,
        report=tqdm.write,
    )
    # Stopped, the cache may be half done, and there is no step to come.
    return (images, False) if stop.agreed() else (LatentCache(folder, len(job.dataset)), True)


def leave_signals_to_main(worker: int) -> None:
    # Ctrl-C reaches the loader's processes too; they end with the main one, which stops at the next step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def train(job: Job, stop: Stop) -> int:
    settings, accelerator, dataset, run = job.settings, job.accelerator, job.dataset, job.run
    transformer, vae, scheduler = job.pipeline.transformer, job.pipeline.vae, job.pipeline.scheduler
    is_sharded = settings.engine == "fsdp2"
    if is_sharded:
        model, optimizer = shard_base(transformer, run.trained, accelerator.device), accelerator.prepare(run.optimizer)
    else:
        model, optimizer = accelerator.prepare(transformer, run.optimizer)

    # Data: [index, flip] -> image, or the moments of its latents from the cache.
    examples, is_cached = load_examples(job, stop)
    rows = job.rows
    keys = StepKeyedBatches(settings.seed, run.step, settings.batch_size, len(dataset), settings.flip, rows)
    loader = DataLoader(
        examples,
        batch_sampler=keys,
        num_workers=0 if is_cached else settings.num_workers,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=leave_signals_to_main,
    )
    batches = iter(loader)
    num_timesteps = scheduler.config.num_train_timesteps
    density = settings.density()
    latent_shape = (transformer.config.in_channels, *[transformer.config.sample_size] * 2)

    # From here on something is written.
    outputs = Outputs(run, accelerator, job.pipeline, dataset, job.evaluation, stop)
    first, last = run.step, float("inf") if settings.max_steps is None else settings.max_steps
    progress = tqdm(total=settings.max_steps, initial=first, unit="step", disable=not accelerator.is_main_process)
    with progress:
        while not (ended := stop.agreed()) and run.step < last:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * scheduled(run.step, settings)

            # Everything random in an update is drawn for the global batch, and sliced.
            drawn = draw_step(
                settings.seed, run.step, settings.batch_size, latent_shape, num_timesteps, settings.label_drop, density
            )
            step_losses = {}
            # Blocks are compiled in the first update of a start, which may take minutes and has nothing to lose.
            with stop.suspended() if settings.compile and run.step == first else nullcontext():
                for micro_batch in rows:
                    images, labels = (part.to(accelerator.device, non_blocking=True) for part in next(batches))
                    draws = drawn.rows(micro_batch, accelerator.device)
                    moments = images if is_cached else encode_moments(vae, images)
                    x_start, latents, class_labels = draws.shown(moments, labels, scheduler, dataset.num_classes)

                    is_last = micro_batch is rows[-1]  # processes exchange gradients once an update
                    with nullcontext() if is_last else accelerator.no_sync(model):
                        with accelerator.autocast():
                            times = model_timesteps(draws.timesteps, scheduler)
                            output = model(latents, timestep=times, class_labels=class_labels).sample
                        losses = training_losses(output, x_start, draws.noise, draws.timesteps, scheduler)
                        weights = loss_weights(draws.timesteps, scheduler, settings.snr_gamma, settings.loss_weighting)
                        if weights is not None:
                            losses["loss"] = losses["loss"] + (weights - 1) * losses["mse"]
                        accelerator.backward(losses["loss"].mean() / len(rows))
                    for name, loss in losses.items():
                        step_losses[name] = step_losses.get(name, 0) + loss.detach().mean() / len(rows)

            if is_sharded:
                average_gradients(run.trained)
            if settings.max_grad_norm is not None:
                accelerator.clip_grad_norm_(run.trained.values(), settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            run.step += 1
            with averaged_values(run.optimizer):
                for average in run.averages:
                    average.update(run.step)
            run.losses.add(step_losses)
            progress.update()

            if run.step % settings.log_every == 0:
                outputs.write_losses(progress)
            if settings.sample_every and run.step % settings.sample_every == 0:
                outputs.write_samples()
            if settings.eval_every and (run.step % settings.eval_every == 0 or run.step == last):
                outputs.write_evaluation()
            if run.step % settings.checkpoint_every == 0:
                outputs.write_checkpoint()
        outputs.write_checkpoint()
        if run.losses.rows:
            outputs.write_losses(progress)

    if settings.broken_images == "skip":
        broken = (examples.broken() if is_cached else dataset.broken).int().to(accelerator.device)
        outputs.num_broken = int(accelerator.reduce(broken).count_nonzero())
        accelerator.print(f"{outputs.num_broken} unreadable images were skipped")
    outputs.write_adapters()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return outputs.say_end(ended)


if __name__ == "__main__":
    start_all_processes()
    quieten()
    with one_line_errors("train_dit.py", same_everywhere=True):
        chosen = parse_command_line(sys.argv[1:], RECIPES)
    sys.exit(main(chosen, started()))
