"""A training run: prepare everything before the first step, run the loop, and end."""

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import GradientAccumulationPlugin, send_to_device
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from onelora_diffusion.command_line import one_line_errors, typed_as
from onelora_diffusion.data.images import BrokenImageError
from onelora_diffusion.data.latents import sample_moments
from onelora_diffusion.data.row_cache import NotFiniteRowError
from onelora_diffusion.diffusion import add_noise, model_timesteps, training_losses
from onelora_diffusion.files import digest
from onelora_diffusion.injection.verbs import adapter_state_dict
from onelora_diffusion.processes import check_equal, on_every_process, say, told_by_main
from onelora_diffusion.training.metrics import NonFiniteError
from onelora_diffusion.training.optimizers import averaged_values
from onelora_diffusion.training.outputs import Outputs, diverged, no_update
from onelora_diffusion.training.publishing import check_hub, publish
from onelora_diffusion.training.randomness import StepDraws, StepKeyedBatches, draw_step, micro_batches
from onelora_diffusion.training.resuming import agree_on_checkpoint, check_same_data, is_elsewhere
from onelora_diffusion.training.run import Run
from onelora_diffusion.training.run_lock import RunLock
from onelora_diffusion.training.schedule import learning_rate_factor
from onelora_diffusion.training.settings import OF_A_MACHINE, RunSettings
from onelora_diffusion.training.sharding import average_gradients, shard_base
from onelora_diffusion.training.state import check_same_adapter
from onelora_diffusion.training.stopping import Clock, Stop, format_duration, parse_duration
from onelora_diffusion.training.sum_rates import SumScales
from onelora_diffusion.training.task import Task
from onelora_diffusion.training.weighting import check_weighting, loss_weights, weighted_loss


@dataclass
class Job:
    """Everything that a run uses; the part that training changes is the record `run`."""

    settings: RunSettings
    accelerator: Accelerator
    task: Task
    rows: list[slice]
    """The rows of the global batch that this process takes, one slice for each of its passes."""
    evaluation: object | None
    run: Run
    is_cached: bool = False
    """Whether batches contain moments of latents instead of images."""
    model: nn.Module | None = None
    """The transformer as `begin` has prepared it for several processes."""
    optimizer: Optimizer | None = None


def start(
    settings: RunSettings, make_task: Callable[[RunSettings, Accelerator], Task], since: float | None = None
) -> int:
    """Train, or print in one line why not; return the exit code. The budget counts from the monotonic time `since`."""
    script = typed_as(settings.script)
    with ExitStack() as held:
        with one_line_errors(settings.script, same_everywhere=True):
            settings.check()
            if settings.push_to_hub is not None:
                check_hub(settings)
            job = prepare(settings, make_task, since, held)
        try:
            code = 0
            if job is not None:
                with Stop(job.run.clock, job.accelerator.num_processes) as stop:
                    code = train(job, stop)
        except NonFiniteError as error:
            said = f"{script}: {diverged(error, settings)}"
            raise SystemExit(said if job.accelerator.is_main_process else 1) from None
        except BrokenImageError as error:
            # The message of an error in a loader process contains its traceback.
            broken = str(error).splitlines()[-1].split("BrokenImageError: ")[-1]
            raise SystemExit(f"{script}: {broken}") from None
        except (NotFiniteRowError, OSError) as error:  # such as a full disk; the last good checkpoint is kept
            raise SystemExit(f"{script}: {error}") from None
        if settings.push_to_hub is not None and code == 0 and PartialState().is_main_process:
            with one_line_errors(settings.script):
                print(publish(settings))
        return code


def prepare(
    settings: RunSettings,
    make_task: Callable[[RunSettings, Accelerator], Task],
    since: float | None,
    held: ExitStack,
) -> Job | None:
    """Prepare everything that a run needs, up to its newest checkpoint; None if there is nothing to do.

    Only the clock in the output folder is written; the folder is locked until `held` is closed.
    """
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # otherwise processes without GPUs would not form a group
        mixed_precision=settings.mixed_precision,
        # The settings include the launcher's options, so accelerate must not apply these again.
        dynamo_backend="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=None if settings.track == "none" else settings.track,
        project_dir=settings.output_dir,
    )
    shared = {name: value for name, value in settings.as_json().items() if name not in OF_A_MACHINE}
    check_equal(accelerator, {f"--{name.replace('_', '-')}": value for name, value in shared.items()})
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

    lock = held.enter_context(RunLock(settings.output_dir, accelerator))
    clock = Clock(None if settings.max_train_time is None else parse_duration(settings.max_train_time), since)
    clock.resume(0 if settings.fresh else lock.seconds)
    checkpoint, finished = agree_on_checkpoint(settings, clock, accelerator)
    if finished and checkpoint.step == 0:
        raise ValueError(no_update(settings))
    # A finished run checks its data only if they are in another folder.
    if told_by_main(accelerator, lambda: not finished or is_elsewhere(settings, checkpoint)):
        held.enter_context(lock.counting(clock))
        task = on_every_process(accelerator, lambda: make_task(settings, accelerator))
        check_equal(
            accelerator, {"the data set": f"{task.data.identity.describe()}, {task.data.identity.fingerprint[:12]}"}
        )
        if checkpoint:
            check_same_data(settings, checkpoint, task.data.identity, partial(say, accelerator))
    if finished:
        say(
            accelerator,
            f"{settings.output_dir}: finished at step {checkpoint.step}, nothing to do. Raise --max-steps or "
            "--max-train-time to go on, or start over with --fresh",
        )
        return None

    transformer = task.pipeline.transformer
    check_weighting(task.pipeline.scheduler, settings.snr_gamma, settings.loss_weighting)
    trained = adapter_state_dict(transformer)
    if checkpoint:
        check_same_adapter(checkpoint.tensors, trained)
    transformer.train()
    if settings.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if settings.compile:
        for block in task.family.blocks_of(transformer):
            block.compile()
    evaluation = None
    if settings.eval_every:
        from onelora_diffusion.training.evaluating import Evaluation

        evaluation = Evaluation(settings, accelerator, task.pipeline, task.data.images)
    run = Run(settings, accelerator, trained, clock)
    run.data = task.data.identity
    if checkpoint:
        run.restore(checkpoint)
        say(accelerator, f"resuming {checkpoint.path} after {format_duration(clock.seconds)}")
    if accelerator.num_processes > 1:
        vae = digest(task.pipeline.vae.state_dict())  # every machine encodes with its own copy
        check_equal(accelerator, {"the step": run.step, "the adapter": digest(trained), "the autoencoder": vae})
    return Job(settings, accelerator, task, rows, evaluation, run)


def train(job: Job, stop: Stop) -> int:
    """Run updates and write outputs until the last step, the end of the time or a signal; return the exit code."""
    settings, accelerator, task, run = job.settings, job.accelerator, job.task, job.run
    examples, batches = begin(job, stop)
    # From here on outputs are written.
    outputs = Outputs(run, accelerator, task, job.evaluation, stop)
    first, last = run.step, float("inf") if settings.max_steps is None else settings.max_steps
    measures = settings.rates_by_sum and run.rate_factors is None  # rates are measured in the first update
    progress = tqdm(total=settings.max_steps, initial=first, unit="step", disable=not accelerator.is_main_process)
    with progress:
        while not (ended := stop.agreed()) and run.step < last:
            # The first update compiles the blocks (the second, if the first measures rates). That may take minutes,
            # and there is no progress to save yet.
            is_compiling = settings.compile and run.step <= first + measures
            with stop.suspended() if is_compiling else nullcontext():
                update(job, islice(batches, len(job.rows)))
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
        broken = (examples.broken() if job.is_cached else task.data.images.broken).int().to(accelerator.device)
        outputs.num_broken = int(accelerator.reduce(broken).count_nonzero())
        accelerator.print(f"{outputs.num_broken} unreadable images were skipped")
    outputs.write_adapters()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return outputs.say_end(ended)


def begin(job: Job, stop: Stop) -> tuple[Dataset, Iterator[tuple[Tensor, Tensor]]]:
    """Encode the data and prepare the model for several processes; return (the examples, endless batches of them)."""
    settings, accelerator, task, run = job.settings, job.accelerator, job.task, job.run
    examples, job.is_cached = task.encode(stop)
    buckets = task.data.buckets
    keys = StepKeyedBatches(
        settings.seed,
        run.step,
        settings.batch_size,
        len(task.data.images),
        settings.flip,
        job.rows,
        buckets and buckets.of_image,
    )
    loader = DataLoader(
        examples,
        batch_sampler=keys,
        num_workers=0 if job.is_cached else settings.num_workers,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=leave_signals_to_main,
    )
    transformer = task.pipeline.transformer
    if settings.engine == "fsdp2":
        job.model = shard_base(transformer, task.family, run.trained, accelerator.device)
        job.optimizer = accelerator.prepare(run.optimizer)
    else:
        job.model, job.optimizer = accelerator.prepare(transformer, run.optimizer)
    return examples, iter(loader)


def update(job: Job, batch: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Update the adapter and its averages once.

    Args:
        batch: for each of the job's rows, images or the moments of their latents, and the numbers of their conditions.
    """
    settings, accelerator, run = job.settings, job.accelerator, job.run
    for group in job.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * scheduled(run.step, settings)
    measures = settings.rates_by_sum and run.rate_factors is None
    scales = SumScales(job.task.pipeline.transformer, run.trained) if measures else None
    drawn, mean_losses = None, {}
    with scales.watching() if scales else nullcontext():
        for rows, (images, numbers) in zip(job.rows, batch, strict=True):
            images = images.to(accelerator.device, non_blocking=True)
            moments = images if job.is_cached else job.task.family.encode_images(job.task.pipeline.vae, images)
            # All random values of an update are drawn for the global batch and then sliced.
            drawn = drawn or draw_step(
                settings.seed,
                run.step,
                settings.batch_size,
                tuple(moments.shape[2:]),
                job.task.pipeline.scheduler.config.num_train_timesteps,
                job.task.condition_drop,
                settings.density(),
            )
            is_last = rows is job.rows[-1]  # gradients are exchanged once per update
            with nullcontext() if is_last else accelerator.no_sync(job.model):
                losses = losses_of(job, moments, numbers, drawn, rows)
                accelerator.backward(losses["loss"].mean() / len(job.rows))
            for name, loss in losses.items():
                mean_losses[name] = mean_losses.get(name, 0) + loss.detach().mean() / len(job.rows)
    if scales:
        run.scale_rates(scales.factors(accelerator))
        accelerator.print(scales.in_words(run.rate_factors))
    if settings.engine == "fsdp2":
        average_gradients(run.trained)
    if settings.max_grad_norm is not None:
        accelerator.clip_grad_norm_(run.trained.values(), settings.max_grad_norm)
    job.optimizer.step()
    job.optimizer.zero_grad()
    run.step += 1
    with averaged_values(run.optimizer):
        for average in run.averages:
            average.update(run.step)
    run.losses.add(mean_losses)


def losses_of(job: Job, moments: Tensor, numbers: Tensor, drawn: StepDraws, rows: slice) -> dict[str, Tensor]:
    """The losses of rows of a global batch by name, each (rows,)."""
    settings, accelerator, task = job.settings, job.accelerator, job.task
    scheduler, draws = task.pipeline.scheduler, drawn.rows(rows, accelerator.device)
    conditions = task.conditions(numbers, drawn.label_drops[rows])
    conditions = send_to_device(conditions, accelerator.device, non_blocking=True)
    x_start = sample_moments(moments, draws.posterior_noise)
    latents = add_noise(x_start, draws.noise, draws.timesteps, scheduler)
    with accelerator.autocast():
        times = model_timesteps(draws.timesteps, scheduler)
        output = task.family.predict(job.model, latents, times, conditions)
    losses = training_losses(output, x_start, draws.noise, draws.timesteps, scheduler)
    weights = loss_weights(draws.timesteps, scheduler, settings.snr_gamma, settings.loss_weighting)
    return losses | {"loss": weighted_loss(losses, weights)}


def scheduled(step: int, settings: RunSettings) -> float:
    return learning_rate_factor(step, settings.lr_schedule, settings.warmup_steps, settings.max_steps)


def leave_signals_to_main(worker: int) -> None:
    # Ctrl-C also reaches the loader processes; they ignore it and end with the main one, which stops at the next step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
