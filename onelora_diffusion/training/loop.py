"""A run of training: what must be ready before its first step, the loop, and how it ends."""

import signal
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import GradientAccumulationPlugin, send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from onelora_diffusion.command_line import one_line_errors
from onelora_diffusion.data.identity import DataIdentity
from onelora_diffusion.data.images import BrokenImageError
from onelora_diffusion.data.latents import encode_moments, sample_moments
from onelora_diffusion.data.row_cache import NotFiniteRowError
from onelora_diffusion.diffusion import add_noise, model_timesteps, training_losses
from onelora_diffusion.families.family import Family, Prompts
from onelora_diffusion.files import digest
from onelora_diffusion.injection.verbs import adapter_state_dict
from onelora_diffusion.processes import check_equal, on_every_process, say, told_by_main
from onelora_diffusion.training.holding import HeldFolder
from onelora_diffusion.training.metrics import NonFiniteError
from onelora_diffusion.training.optimizers import averaged_values
from onelora_diffusion.training.outputs import Outputs, diverged, no_update
from onelora_diffusion.training.publishing import check_hub, publish
from onelora_diffusion.training.randomness import StepKeyedBatches, draw_step, micro_batches
from onelora_diffusion.training.resuming import agree_on_checkpoint, check_same_data, is_elsewhere
from onelora_diffusion.training.run import Run
from onelora_diffusion.training.schedule import learning_rate_factor
from onelora_diffusion.training.settings import OF_A_MACHINE, RunSettings
from onelora_diffusion.training.sharding import average_gradients, shard_base
from onelora_diffusion.training.state import check_same_adapter
from onelora_diffusion.training.stopping import Clock, Stop, format_duration, parse_duration
from onelora_diffusion.training.sum_rates import SumScales
from onelora_diffusion.training.weighting import check_weighting, loss_weights, weighted_loss


class Task(Protocol):
    """What a script trains: a base with its adapter, on its data.

    Attributes:
        pipeline: of the base, with `transformer`, where the adapter trains, `scheduler` and `vae`.
        family: how the transformer is called.
        data: the identity of images and classes or captions, which must be the same on every process and in every
            start of a run.
        dataset: the images, for their number; with `broken`, (images,) bool, if unreadable ones are skipped.
        described: what they are, in a few words.
        facts: of the data, for the adapter's header: its name, and whatever the script adds.
        id2label: class names by label, if it has classes.
        label_drop: share of samples that train without their condition.
    """

    pipeline: object
    family: Family
    data: DataIdentity
    dataset: Dataset
    described: str
    facts: dict
    id2label: dict[int, str] | None
    label_drop: float

    def examples(self, stop: Stop) -> tuple[Dataset, bool, np.ndarray | None]:
        """`[index, flip] -> (image, condition)`, or moments for the image; which it is; the buckets, if any."""

    def prompts(self, conditions: Tensor, drops: Tensor) -> Prompts:
        """What the family's transformer needs of conditions (batch,); samples of `drops`, (batch,) bool, have none."""

    def evaluation(self):
        """What measures the adapter in training, or None."""

    def sample_grid(self, is_stopped: Callable[[], object]) -> bytes | None:
        """The PNG of samples with the same noise all along; None if stopped midway, or if there are none."""

    def export(self, folder: Path) -> None:
        """Writes what else a run leaves of its adapter, whose average the model has."""


@dataclass
class Job:
    """What a run trains with; what it changes is the record `run`."""

    settings: RunSettings
    accelerator: Accelerator
    task: Task
    rows: list[slice]
    """Of the global batch, those that this process takes, a slice for each of its passes."""
    evaluation: object | None
    run: Run


def start(
    settings: RunSettings, make_task: Callable[[RunSettings, Accelerator], Task], since: float | None = None
) -> int:
    """Trains, or says in one line why not; returns the exit code. The budget counts since that `time.monotonic()`."""
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
            raise SystemExit(
                f"{settings.script}: {diverged(error, settings)}" if job.accelerator.is_main_process else 1
            ) from None
        except BrokenImageError as error:
            # A loader's process sends its whole traceback as the message.
            broken = str(error).splitlines()[-1].split("BrokenImageError: ")[-1]
            raise SystemExit(f"{settings.script}: {broken}") from None
        except (NotFiniteRowError, OSError) as error:  # a full disk, for one; the last good checkpoint is still there
            raise SystemExit(f"{settings.script}: {error}") from None
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
    """All that a run needs, as far as its newest checkpoint, or an error; None if there is nothing to do.

    Nothing has been written then but the clock in the output folder, which is this run's until `held` is closed.
    """
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else processes without GPUs would not know of each other
        mixed_precision=settings.mixed_precision,
        # What the launcher asks for is among the settings: accelerate must not see to it a second time.
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

    folder = held.enter_context(HeldFolder(settings.output_dir, accelerator))
    clock = Clock(None if settings.max_train_time is None else parse_duration(settings.max_train_time), since)
    clock.resume(0 if settings.fresh else folder.seconds)
    checkpoint, finished = agree_on_checkpoint(settings, clock, accelerator)
    if finished and checkpoint.step == 0:
        raise ValueError(no_update(settings))
    # The data of a finished run are looked at where another place is named.
    if told_by_main(accelerator, lambda: not finished or is_elsewhere(settings, checkpoint)):
        held.enter_context(folder.counting(clock))
        task = on_every_process(accelerator, lambda: make_task(settings, accelerator))
        check_equal(accelerator, {"the data set": f"{task.data.describe()}, {task.data.fingerprint[:12]}"})
        if checkpoint:
            check_same_data(settings, checkpoint, task.data, partial(say, accelerator))
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
    evaluation = task.evaluation()
    run = Run(settings, accelerator, trained, clock)
    run.data = task.data
    if checkpoint:
        run.restore(checkpoint)
        say(accelerator, f"resuming {checkpoint.path} after {format_duration(clock.seconds)}")
    if accelerator.num_processes > 1:
        vae = digest(task.pipeline.vae.state_dict())  # every machine encodes for itself
        check_equal(accelerator, {"the step": run.step, "the adapter": digest(trained), "the autoencoder": vae})
    return Job(settings, accelerator, task, rows, evaluation, run)


def train(job: Job, stop: Stop) -> int:
    settings, accelerator, task, run = job.settings, job.accelerator, job.task, job.run
    transformer, vae, scheduler = task.pipeline.transformer, task.pipeline.vae, task.pipeline.scheduler
    # Data: [index, flip] -> image, or the moments of its latents from the cache; and the number of its condition.
    examples, is_cached, buckets = task.examples(stop)
    keys = StepKeyedBatches(
        settings.seed, run.step, settings.batch_size, len(task.dataset), settings.flip, job.rows, buckets
    )
    loader = DataLoader(
        examples,
        batch_sampler=keys,
        num_workers=0 if is_cached else settings.num_workers,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=leave_signals_to_main,
    )
    batches = iter(loader)
    num_timesteps, density = scheduler.config.num_train_timesteps, settings.density()

    is_sharded = settings.engine == "fsdp2"
    if is_sharded:
        model = shard_base(transformer, task.family.blocks_of(transformer), run.trained, accelerator.device)
        optimizer = accelerator.prepare(run.optimizer)
    else:
        model, optimizer = accelerator.prepare(transformer, run.optimizer)

    # From here on something is written.
    outputs = Outputs(run, accelerator, task, job.evaluation, stop)
    first, last = run.step, float("inf") if settings.max_steps is None else settings.max_steps
    measures = settings.rates_by_sum and run.rate_factors is None  # in the first update
    progress = tqdm(total=settings.max_steps, initial=first, unit="step", disable=not accelerator.is_main_process)
    with progress:
        while not (ended := stop.agreed()) and run.step < last:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * scheduled(run.step, settings)

            drawn, step_losses = None, {}
            scales = SumScales(transformer, run.trained) if measures and run.step == first else None
            # Blocks are compiled in the first update of a start, or the second where the first measures without that,
            # which may take minutes and has nothing to lose.
            is_compiling = settings.compile and run.step <= first + measures
            with stop.suspended() if is_compiling else nullcontext(), scales.watching() if scales else nullcontext():
                for micro_batch in job.rows:
                    images, conditions = next(batches)
                    images = images.to(accelerator.device, non_blocking=True)
                    moments = images if is_cached else encode_moments(vae, images)
                    # Everything random in an update is drawn for the global batch, and sliced.
                    drawn = drawn or draw_step(
                        settings.seed,
                        run.step,
                        settings.batch_size,
                        tuple(moments.shape[2:]),
                        num_timesteps,
                        task.label_drop,
                        density,
                    )
                    draws = drawn.rows(micro_batch, accelerator.device)
                    prompts = task.prompts(conditions, drawn.label_drops[micro_batch])
                    prompts = send_to_device(prompts, accelerator.device, non_blocking=True)
                    x_start = sample_moments(moments, draws.posterior_noise)
                    latents = add_noise(x_start, draws.noise, draws.timesteps, scheduler)

                    is_last = micro_batch is job.rows[-1]  # processes exchange gradients once an update
                    with nullcontext() if is_last else accelerator.no_sync(model):
                        with accelerator.autocast():
                            times = model_timesteps(draws.timesteps, scheduler)
                            output = task.family.predict(model, latents, times, prompts)
                        losses = training_losses(output, x_start, draws.noise, draws.timesteps, scheduler)
                        weights = loss_weights(draws.timesteps, scheduler, settings.snr_gamma, settings.loss_weighting)
                        losses["loss"] = weighted_loss(losses, weights)
                        accelerator.backward(losses["loss"].mean() / len(job.rows))
                    for name, loss in losses.items():
                        step_losses[name] = step_losses.get(name, 0) + loss.detach().mean() / len(job.rows)

            if scales:
                run.scale_rates(scales.factors(accelerator))
                accelerator.print(scales.in_words(run.rate_factors))
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
        broken = (examples.broken() if is_cached else task.dataset.broken).int().to(accelerator.device)
        outputs.num_broken = int(accelerator.reduce(broken).count_nonzero())
        accelerator.print(f"{outputs.num_broken} unreadable images were skipped")
    outputs.write_adapters()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return outputs.say_end(ended)


def scheduled(step: int, settings: RunSettings) -> float:
    return learning_rate_factor(step, settings.lr_schedule, settings.warmup_steps, settings.max_steps)


def leave_signals_to_main(worker: int) -> None:
    # Ctrl-C reaches the loader's processes too; they end with the main one, which stops at the next step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
