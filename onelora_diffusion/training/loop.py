"""A training run: prepare everything before the first step, run the loop, and end."""

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial, reduce
from itertools import accumulate

import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from onelora_diffusion.command_line import one_line_errors, typed_as
from onelora_diffusion.data.images import BrokenImageError
from onelora_diffusion.data.row_cache import EncodingError
from onelora_diffusion.denoisers import denoiser_of
from onelora_diffusion.families import Conditions
from onelora_diffusion.families.family import joined
from onelora_diffusion.injection.routing import route_adapters
from onelora_diffusion.processes import say
from onelora_diffusion.training.job import Job, MakeTask, Training, prepare
from onelora_diffusion.training.metrics import NonFiniteError
from onelora_diffusion.training.optimizers import averaged_values
from onelora_diffusion.training.outputs import Outputs, diverged
from onelora_diffusion.training.publishing import check_hub, publish
from onelora_diffusion.training.randomness import (
    StepDraws,
    StepKeyedBatches,
    batch_flips,
    caption_choices,
    draw_step,
)
from onelora_diffusion.training.settings import RunSettings
from onelora_diffusion.training.sharding import average_gradients, shard_base
from onelora_diffusion.training.stopping import Stop, format_duration
from onelora_diffusion.training.sum_rates import SumScales
from onelora_diffusion.training.task import encode
from onelora_diffusion.training.trackers import start_trackers
from onelora_diffusion.training.trained_guidance import guidance_excess


def start(settings: RunSettings, make_task: MakeTask, since: float | None = None) -> int:
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
                with Stop(job.clock, job.accelerator.num_processes) as stop:
                    code = train(job, stop)
        except NonFiniteError as error:
            said = f"{script}: {diverged(error, settings)}"
            raise SystemExit(said if job.accelerator.is_main_process else 1) from None
        except BrokenImageError as error:
            # The message of an error in a loader process contains its traceback.
            broken = str(error).splitlines()[-1].split("BrokenImageError: ")[-1]
            raise SystemExit(f"{script}: {broken}") from None
        except (EncodingError, OSError) as error:  # such as a full disk; the last good checkpoint is kept
            raise SystemExit(f"{script}: {error}") from None
        if settings.push_to_hub is not None and code == 0 and PartialState().is_main_process:
            with one_line_errors(settings.script):
                print(publish(settings))
        return code


def train(job: Job, stop: Stop) -> int:
    """Run updates and write outputs until the last step, the end of the time or a signal; return the exit code."""
    begin(job, stop)
    # From here on outputs are written.
    with progress_bar(job) as progress:
        while not (ended := stop.agreed()):
            settle(job, stop, progress)
            if not job.trainings:
                break
            with stop.suspended() if is_compiling(job) else nullcontext():
                update(job)
            for training in list(job.trainings):
                progress.update()
                with job.alone(training):
                    training.outputs.write_due(progress)
        for training in list(job.trainings):
            with job.alone(training):
                finish(job, training, progress, ended)
    job.accelerator.wait_for_everyone()
    job.accelerator.end_training()
    return job.last.say_end(ended) if job.settings.subjects is None else say_end_of_all(job, ended)


def begin(job: Job, stop: Stop) -> None:
    """Encode the data, and prepare the model and the trainings that are in the first batch."""
    settings, accelerator = job.settings, job.accelerator
    encode([training.task for training in job.all_trainings], stop)
    first = job.trainings[0]
    transformer = denoiser_of(first.task.pipeline)
    if settings.engine == "fsdp2":
        job.model = shard_base(transformer, first.task.family, first.run.trained, accelerator.device)
    else:
        job.model = accelerator.prepare(transformer)
    if accelerator.log_with:
        start_trackers(accelerator, settings, max(training.first for training in job.all_trainings))
    for training in job.trainings:
        start_batches(job, training, stop)


def start_batches(job: Job, training: Training, stop: Stop) -> None:
    """Prepare the optimiser, the batches and the outputs of a training."""
    settings, accelerator, task, run = training.settings, job.accelerator, training.task, training.run
    if not stop.agreed():  # after a signal caches may be incomplete, and there will be no update
        task.open_caches()
    buckets, images = task.data.buckets, task.learned_images
    keys = StepKeyedBatches(
        settings.seed,
        run.step,
        settings.batch_size,
        len(images),
        settings.flip,
        training.rows,
        buckets and buckets.of_image[images],
        images,
    )
    loader = DataLoader(
        task.examples,
        batch_sampler=keys,
        num_workers=0 if task.is_cached else settings.num_workers,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=leave_signals_to_main,
    )
    # accelerate keeps all optimisers that it prepares, with the memory of subjects that have ended.
    training.optimizer = accelerator.prepare(run.optimizer) if task.subject is None else run.optimizer
    training.batches = iter(loader)
    training.outputs = Outputs(run, accelerator, task, training.evaluation, stop)


def progress_bar(job: Job) -> tqdm:
    trainings = job.all_trainings
    last = [training.settings.max_steps for training in trainings]
    return tqdm(
        total=None if None in last else sum(last),
        initial=sum(training.first for training in trainings),
        unit="step",
        disable=not job.accelerator.is_main_process,
    )


def settle(job: Job, stop: Stop, progress: tqdm) -> None:
    """End the trainings that have made their last update, and begin those of subjects that wait."""
    while True:
        for training in [training for training in job.trainings if training.is_done]:
            with job.alone(training):
                finish(job, training, progress)
        if not job.has_room:
            return
        with job.alone(job.waiting[0]):
            start_batches(job, job.add_subject(), stop)


def is_compiling(job: Job) -> bool:
    """Whether the next update compiles blocks, for minutes: the first, and the second if the first measures rates."""
    newest = (training.run.step - training.first - training.measures_rates for training in job.trainings)
    return job.settings.compile and any(steps <= 0 for steps in newest)


def finish(job: Job, training: Training, progress: tqdm, ended: int = 0) -> None:
    """Write the last outputs of a training, which leaves the batch."""
    accelerator, task, outputs = job.accelerator, training.task, training.outputs
    outputs.write_checkpoint()
    if training.run.losses.rows:
        outputs.write_losses(progress)
    if training.settings.broken_images == "skip":
        broken = (task.examples.broken() if task.is_cached else task.data.images.broken).int().to(accelerator.device)
        outputs.num_broken = int(accelerator.reduce(broken).count_nonzero())
        accelerator.print(f"{outputs.num_broken} unreadable images were skipped")
    outputs.write_adapters()
    job.ended, job.last = job.ended + 1, outputs
    if task.subject is not None:
        tqdm.write(f"{task.subject}: {outputs.how_it_ended(ended)}; {outputs.folder}")
    job.remove(training)


@dataclass
class Part:
    """The samples of a pass: moments (samples, 2, C, H, W) of their latents, their conditions and random values, and
    how much guidance their targets have, (samples,), on the CPU; and their masks (samples, 1, ...), if any."""

    moments: Tensor
    conditions: Conditions
    draws: StepDraws
    guidance: Tensor
    masks: Tensor | None = None


def update(job: Job) -> None:
    """Update the adapters of all trainings, and their averages, once."""
    settings, accelerator = job.settings, job.accelerator
    for training in job.trainings:
        for group in training.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * training.settings.rate_factor(training.run.step)
    scales = {
        training: SumScales(denoiser_of(training.task.pipeline), training.run.trained, training.task.adapter_name)
        for training in job.trainings
        if training.measures_rates and training.run.rate_factors is None
    }
    num_passes = settings.gradient_accumulation_steps
    means: dict[Training, dict[str, Tensor]] = {training: {} for training in job.trainings}
    for number in range(num_passes):
        is_last = number == num_passes - 1  # gradients are exchanged once per update
        parts = [(training, next_part(job, training, number)) for training in job.trainings]
        for group in of_equal_shape(parts):
            with nullcontext() if is_last else accelerator.no_sync(job.model), ready_for(job, group, scales):
                losses = losses_of(job, group)
                total = reduce(torch.add, (each["loss"].mean() for each in losses))
                accelerator.backward(total / num_passes)
            for (training, _), each in zip(group, losses, strict=True):
                for name, loss in each.items():
                    means[training][name] = means[training].get(name, 0) + loss.detach().mean() / num_passes
    for training, measured in scales.items():
        training.run.scale_rates(measured.factors(accelerator))
        accelerator.print(measured.in_words(training.run.rate_factors))
    for training in job.trainings:
        step(job, training, means[training])


def step(job: Job, training: Training, losses: dict[str, Tensor]) -> None:
    """Update an adapter and its averages by its gradients."""
    settings, run = training.settings, training.run
    if settings.engine == "fsdp2":
        average_gradients(run.trained)
    if settings.max_grad_norm is not None:
        job.accelerator.clip_grad_norm_(run.trained.values(), settings.max_grad_norm)
    training.optimizer.step()
    training.optimizer.zero_grad()
    run.step += 1
    with averaged_values(run.optimizer):
        for average in run.averages:
            average.update(run.step)
    run.losses.add(losses)


def next_part(job: Job, training: Training, number: int) -> Part:
    """The samples of a training in the pass of this number."""
    settings, task, rows = training.settings, training.task, training.rows[number]
    images, numbers = next(training.batches)
    moments = task.moments(images, task.is_cached)
    if number == 0:
        # All random values of an update are drawn for the global batch and then sliced.
        training.drawn = draw_step(
            settings.seed,
            training.run.step,
            settings.batch_size,
            tuple(moments.shape[2:]),
            len(task.timesteps),
            task.condition_drop,
            settings.density(),
            task.timesteps.start,
        )
    step, size, each = training.run.step, settings.batch_size, task.data.conditions_each
    flips = batch_flips(settings.seed, step, size)[rows] if settings.flip else [False] * len(moments)
    masks = task.data.masks_of(numbers, flips, tuple(moments.shape[3:]))
    masks = send_to_device(masks, job.accelerator.device, non_blocking=True)
    if each > 1:
        numbers = numbers * each + caption_choices(settings.seed, step, size, each)[rows]
    conditions = task.conditions(numbers, training.drawn.label_drops[rows])
    num_timesteps = task.family.training_scheduler(task.pipeline).config.num_train_timesteps
    guidance = guidance_excess(settings, step, training.drawn, num_timesteps)[rows]
    return Part(moments, conditions, training.drawn.rows(rows, job.accelerator.device), guidance, masks)


def of_equal_shape(parts: list[tuple[Training, Part]]) -> list[list[tuple[Training, Part]]]:
    """Divide parts into those whose images have one shape, which one batch can hold."""
    groups: dict[tuple, list[tuple[Training, Part]]] = {}
    for training, part in parts:
        groups.setdefault(tuple(part.moments.shape[1:]), []).append((training, part))
    return list(groups.values())


@contextmanager
def ready_for(job: Job, group: list[tuple[Training, Part]], scales: dict[Training, SumScales]) -> Iterator[None]:
    """Context manager in which each sample of a group uses the adapter of its training, and sums are measured."""
    with ExitStack() as entered:
        if job.settings.subjects is not None:
            names = [training.task.adapter_name for training, part in group for _ in part.moments]
            entered.enter_context(route_adapters(denoiser_of(group[0][0].task.pipeline), names))
        ends = accumulate(len(part.moments) for _, part in group)
        for (training, part), end in zip(group, ends, strict=True):
            if training in scales:
                entered.enter_context(scales[training].watching(slice(end - len(part.moments), end)))
        yield


def losses_of(job: Job, group: list[tuple[Training, Part]]) -> list[dict[str, Tensor]]:
    """The losses by name of each part of a group, (samples,), computed in one batch."""
    together = joined_parts([part for _, part in group])
    keeps_prior, guidance = bool(job.settings.prior_weight), together.guidance if together.guidance.any() else None
    parts = together.moments, together.conditions, together.draws, together.masks
    losses = group[0][0].task.losses(job.model, *parts, keeps_prior, guidance)
    sizes = [len(part.moments) for _, part in group]
    split = {name: loss.split(sizes) for name, loss in losses.items()}
    return [{name: split[name][number] for name in split} for number in range(len(group))]


def joined_parts(parts: list[Part]) -> Part:
    if len(parts) == 1:
        return parts[0]
    draws = zip(*(part.draws for part in parts), strict=True)
    masks = [torch.ones_like(part.moments[:, 0, :1]) if part.masks is None else part.masks for part in parts]
    is_masked = any(part.masks is not None for part in parts)
    return Part(
        torch.cat([part.moments for part in parts]),
        joined([part.conditions for part in parts]),
        StepDraws(*map(torch.cat, draws)),
        torch.cat([part.guidance for part in parts]),
        torch.cat(masks) if is_masked else None,
    )


def say_end_of_all(job: Job, ended: int) -> int:
    """Print how the trainings of subjects have ended, and return the exit code."""
    settings, told = job.settings, partial(say, job.accelerator)
    told(f"{job.ended} adapters in {settings.output_dir}, {format_duration(job.clock.seconds)}")
    if job.waiting:
        told(f"{len(job.waiting)} subjects have not begun")
    if job.failed:
        told(f"{job.failed} subjects have ended with an error")
    if ended:
        told("The same command resumes." if Stop.is_signal(ended) else "The same command with more time goes on.")
        return 128 + ended if Stop.is_signal(ended) else int(bool(job.failed))
    if job.ended:
        told(job.last.next_steps())
    return int(bool(job.failed))


def leave_signals_to_main(worker: int) -> None:
    # Ctrl-C also reaches the loader processes; they ignore it and end with the main one, which stops at the next step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
