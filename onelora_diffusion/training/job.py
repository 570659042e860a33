"""What a command trains: one adapter, or one for each of many subjects, in the same batches on one base."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from onelora_diffusion.data.row_cache import weights_sample
from onelora_diffusion.denoisers import autoencoder_of, blocks_of, denoiser_of
from onelora_diffusion.families import family_of
from onelora_diffusion.files import digest
from onelora_diffusion.injection.verbs import train_adapters
from onelora_diffusion.processes import check_equal, on_every_process, say, told_by_main
from onelora_diffusion.training.checkpoints import Checkpoint
from onelora_diffusion.training.metrics import NonFiniteError
from onelora_diffusion.training.outputs import Outputs, diverged, no_update
from onelora_diffusion.training.randomness import StepDraws, micro_batches
from onelora_diffusion.training.resuming import (
    agree_on_checkpoint,
    check_same_data,
    check_same_weights,
    is_elsewhere,
)
from onelora_diffusion.training.run import Run
from onelora_diffusion.training.run_lock import RunLock
from onelora_diffusion.training.settings import OF_A_MACHINE, RunSettings
from onelora_diffusion.training.state import check_same_adapter
from onelora_diffusion.training.stopping import Clock, format_duration, parse_duration
from onelora_diffusion.training.subjects import subjects_of
from onelora_diffusion.training.task import Task
from onelora_diffusion.training.weighting import check_weighting

GO_ON = "Raise --max-steps or --max-train-time to go on, or start over with --fresh"

MakeTask = Callable[[RunSettings, Accelerator, object | None], Task]
"""A function from settings to a task; it loads the base, unless the pipeline of another task is given."""


@dataclass(eq=False)
class Training:
    """The training of one adapter: all that it does not share with others of its job."""

    settings: RunSettings  # for a subject those of a run of its own
    rows: list[slice]  # the rows of its global batch that this process takes, one slice for each pass
    task: Task
    clock: Clock
    run: Run | None = None  # the record, which updates change
    evaluation: object | None = None
    optimizer: AcceleratedOptimizer | Optimizer | None = None
    # For each pass, images or the moments of their latents, and the numbers of their conditions.
    batches: Iterator[tuple[Tensor, Tensor]] | None = None
    outputs: Outputs | None = None
    drawn: StepDraws | None = None  # the random values of its current update
    first: int = 0  # the number of updates at the start of this process
    measures_rates: bool = False  # whether learning rates are measured in its first update
    held: ExitStack = field(default_factory=ExitStack)  # the lock of a subject's folder

    @property
    def is_done(self) -> bool:
        """Whether it has made its last update."""
        return self.settings.max_steps is not None and self.run.step >= self.settings.max_steps


@dataclass
class Job:
    """The trainings of a command."""

    settings: RunSettings
    accelerator: Accelerator
    clock: Clock  # the time of the command over all its resumes, with its budget
    held: ExitStack  # what is released at the end: locks of folders
    trainings: list[Training] = field(default_factory=list)  # those in the batch now
    base: str = ""  # a hash of some of the base's values
    waiting: deque[Training] = field(default_factory=deque)  # subjects that have not begun in this process
    model: nn.Module | None = None  # the transformer as it was prepared for several processes
    ended: int = 0  # the number of trainings that have ended
    last: Outputs | None = None  # of the last one that has ended
    failed: int = 0  # the number of subjects whose training has ended with an error

    @property
    def all_trainings(self) -> list[Training]:
        return [*self.trainings, *self.waiting]

    @property
    def has_room(self) -> bool:
        """Whether a subject waits and may begin."""
        return bool(self.waiting) and len(self.trainings) < self.settings.subjects_at_once

    def add(self, training: Training, checkpoint: Checkpoint | None) -> None:
        """Attach an adapter and restore its record from a checkpoint, or begin one; ValueError if it does not fit."""
        settings, accelerator, task = training.settings, self.accelerator, training.task
        trained = task.attach()
        if checkpoint:
            check_same_adapter(checkpoint.tensors, trained)
            check_same_weights(settings, checkpoint, self.base, task.training_adapter)
        if settings.eval_every:
            from onelora_diffusion.training.evaluating import Evaluation

            training.evaluation = Evaluation(settings, accelerator, task.pipeline, task.data.images)
        training.run = run = Run(settings, accelerator, trained, training.clock)
        run.data, run.base, run.training_adapter = task.data.identity, self.base, task.training_adapter
        if checkpoint:
            run.restore(checkpoint)
            say(accelerator, f"resuming {checkpoint.path} after {format_duration(run.clock.seconds)}")
        training.first = run.step
        training.measures_rates = settings.rates_by_sum and run.rate_factors is None
        self.trainings.append(training)
        if task.subject is not None:
            train_adapters(denoiser_of(task.pipeline), [each.task.adapter_name for each in self.trainings])

    def add_subject(self) -> Training:
        """Begin the training of the next subject, or resume it; OSError if another process has its folder."""
        training = self.waiting.popleft()
        settings = training.settings
        self.held.enter_context(training.held)
        lock = training.held.enter_context(RunLock(settings.output_dir, self.accelerator))
        training.clock = clock = Clock()
        clock.resume(0 if settings.fresh else lock.seconds)
        training.held.callback(lambda: lock.write(clock.seconds))
        checkpoint, _ = agree_on_checkpoint(settings, clock, self.accelerator)
        self.add(training, checkpoint)
        return training

    def remove(self, training: Training) -> None:
        """Take a training out of the batch; the memory and the folder of a subject's are freed."""
        if training.run is not None:
            self.trainings.remove(training)
        if training.task.subject is not None:
            training.task.detach()
            training.held.close()

    @contextmanager
    def alone(self, training: Training) -> Iterator[None]:
        """Context manager in which an error of a subject's training ends that training alone, in one line."""
        try:
            yield
        except (NonFiniteError, OSError, ValueError) as error:
            if training.task.subject is None:
                raise
            is_diverged = isinstance(error, NonFiniteError)
            tqdm.write(f"{training.task.subject}: {diverged(error, training.settings) if is_diverged else error}")
            self.failed += 1
            self.remove(training)


def prepare(settings: RunSettings, make_task: MakeTask, since: float | None, held: ExitStack) -> Job | None:
    """Prepare everything that training needs, up to the newest checkpoints; None if there is nothing to do.

    Only the clock in the output folder is written; the folder is locked until `held` is closed.
    """
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # otherwise processes without GPUs would not form a group
        mixed_precision=settings.mixed_precision,
        # The settings include the launcher's options, so accelerate must not apply these again.
        dynamo_backend="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        # Frozen buffers are the same everywhere, and a batch that is computed in groups calls the model several times.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        log_with=None if settings.track == "none" else settings.track,
        project_dir=settings.output_dir,
    )
    shared = {name: value for name, value in settings.as_json().items() if name not in OF_A_MACHINE}
    check_equal(accelerator, {f"--{name.replace('_', '-')}": value for name, value in shared.items()})
    check_processes(settings, accelerator)
    subjects = {None: settings} if settings.subjects is None else subjects_of(settings)
    place = accelerator.num_processes, accelerator.process_index
    rows = {n: micro_batches(own.batch_size, *place, own.gradient_accumulation_steps) for n, own in subjects.items()}

    lock = held.enter_context(RunLock(settings.output_dir, accelerator))
    clock = Clock(None if settings.max_train_time is None else parse_duration(settings.max_train_time), since)
    clock.resume(0 if settings.fresh else lock.seconds)
    job = Job(settings, accelerator, clock, held)
    checkpoint = pipeline = None
    for number, (name, own) in enumerate(subjects.items()):
        own_clock = clock if name is None else Clock()
        checkpoint, finished = agree_on_checkpoint(own, own_clock, accelerator)
        if finished and checkpoint.step == 0:
            raise ValueError(no_update(settings))
        # A finished run checks its data only if they are in another folder.
        if not finished or told_by_main(accelerator, partial(is_elsewhere, own, checkpoint)):
            if pipeline is None:
                held.enter_context(lock.counting(clock))
            task = on_every_process(accelerator, partial(make_task, own, accelerator, pipeline))
            pipeline = task.pipeline
            if name is not None:
                task.subject, task.adapter_name = name, f"subject-{number}"
            data = f"{task.data.identity.describe()}, {task.data.identity.fingerprint[:12]}"
            check_equal(accelerator, {"the data set": data})
            if checkpoint:
                check_same_data(own, checkpoint, task.data.identity, partial(say, accelerator))
        if finished:
            say(accelerator, f"{own.output_dir}: finished at step {checkpoint.step}, nothing to do. {GO_ON}")
        else:
            job.waiting.append(Training(own, rows[name], task, own_clock))
    if not job.waiting:
        return None

    check_weighting(family_of(pipeline).training_scheduler(pipeline), settings.snr_gamma, settings.loss_weighting)
    job.base = weights_sample(part for _, part in sorted(pipeline.components.items()) if isinstance(part, nn.Module))
    check_equal(accelerator, {"the base": job.base})
    if settings.subjects is None:
        job.add(job.waiting.popleft(), checkpoint)
    while job.has_room:
        job.add_subject()
    transformer = denoiser_of(pipeline)
    transformer.eval()  # as it draws: in training mode some put out something else, as HiDream's does
    if settings.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if settings.compile:
        for block in blocks_of(transformer):
            block.compile()
    if accelerator.num_processes > 1:
        (training,) = job.trainings
        vae = digest(autoencoder_of(pipeline).state_dict())  # every machine encodes with its own copy
        adapter = digest(training.run.trained)
        check_equal(accelerator, {"the step": training.run.step, "the adapter": adapter, "the autoencoder": vae})
    return job


def check_processes(settings: RunSettings, accelerator: Accelerator) -> None:
    """ValueError for settings that do not fit the device or the number of processes."""
    if settings.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("--mixed-precision fp16 needs a GPU: choose bf16 or no")
    if settings.engine == "fsdp2" and accelerator.num_processes == 1:
        raise ValueError("--engine fsdp2 shares the base out over several processes: start more, or choose ddp")
    if settings.subjects is not None and accelerator.num_processes > 1:
        number = accelerator.num_processes
        raise ValueError(f"--subjects trains in one process, not in {number}: start one for each part of them")
