"""The outputs of a run: messages, metrics, samples, evaluations, checkpoints and adapters."""

import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from onelora_diffusion.command_line import typed_as
from onelora_diffusion.denoisers import denoiser_of
from onelora_diffusion.files import write_bytes
from onelora_diffusion.processes import say
from onelora_diffusion.storage.adapter_file import WEIGHTS_NAME, save_adapter
from onelora_diffusion.storage.lora import export_lora
from onelora_diffusion.storage.naming import namings_of
from onelora_diffusion.training.checkpoints import checkpoint_paths, save_checkpoint
from onelora_diffusion.training.metrics import MetricsFile, NonFiniteError, check_finite, cut_lines_after
from onelora_diffusion.training.resuming import adapter_names
from onelora_diffusion.training.run import Run
from onelora_diffusion.training.settings import RunSettings
from onelora_diffusion.training.stopping import Interrupted, Stop, format_duration
from onelora_diffusion.training.trackers import show_picture
from onelora_diffusion.training.validation import Validation


class Outputs:
    """The output folder of a run. Creating it discards outputs of later steps; every process calls every method."""

    def __init__(self, run: Run, accelerator: Accelerator, task, evaluation, stop: Stop):
        self.run, self.settings, self.accelerator = run, run.settings, accelerator
        self.task, self.evaluation, self.stop = task, evaluation, stop
        self.alone = stop.at_once if accelerator.num_processes == 1 else nullcontext  # around what may end at once
        self.folder, self.num_broken = self.settings.output_dir, 0  # unreadable images, for the headers of adapters
        self.validation = Validation(task) if self.settings.validation_images else None
        self.prefix = "" if task.subject is None else f"{task.subject}/"
        if accelerator.is_main_process:
            if self.settings.fresh:
                shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
            cut_lines_after(self.folder / "metrics.jsonl", run.step, len(run.losses.rows))
            write_bytes(self.folder / "settings.json", json.dumps(self.settings.as_json(), indent=2).encode())
            write_bytes(self.folder / "data.json", json.dumps(run.data._asdict(), indent=2).encode())
        self.metrics = MetricsFile(
            self.folder / "metrics.jsonl", accelerator, self.settings.batch_size, run.step, run.clock, self.prefix
        )
        say(
            accelerator,
            f"{self.settings.method} on {self.settings.base or 'the miniature'}: {run.num_trainable_params:,} trained "
            f"parameters; {task.data.described}; output in {self.folder}",
        )

    def write_due(self, progress: tqdm) -> None:
        """Write the outputs that are due after an update."""
        settings, step = self.settings, self.run.step
        if step % settings.log_every == 0:
            self.write_losses(progress)
        if settings.sample_every and step % settings.sample_every == 0:
            self.write_samples()
        if settings.eval_every and (step % settings.eval_every == 0 or step == settings.max_steps):
            self.write_evaluation()
        if self.validation and (step % settings.validate_every == 0 or step == settings.max_steps):
            self.write_validation()
        if step % settings.checkpoint_every == 0:
            self.write_checkpoint()

    @contextmanager
    def averaged(self, in_training: bool = False) -> Iterator[None]:
        """Context manager in which the transformer computes with this adapter (`Task.serving`), at its average."""
        with self.task.serving(in_training), self.run.averages[0].applied():
            yield

    def write_losses(self, progress: tqdm) -> None:
        run = self.run
        line = self.metrics.write_losses(run.losses, run.step, run.learning_rate)
        left = "" if run.clock.budget is None else f", {format_duration(run.clock.left)} of the budget left"
        progress.set_postfix_str(f"loss {line['loss']:.4f}{left}", refresh=False)

    def write_samples(self) -> None:
        """Write a grid of samples, unless a signal comes."""
        is_main, is_sharded = self.accelerator.is_main_process, self.settings.engine == "fsdp2"
        # With FSDP2 all processes must run the model together; otherwise one of them draws.
        if not (is_main or is_sharded):
            return
        is_stopped, alone = (self.stop.agreed, nullcontext) if is_sharded else (self.stop.asked, self.stop.at_once)
        png = None
        with suppress(Interrupted), self.averaged(), self.accelerator.autocast(), alone():
            png = self.task.sample_grid(is_stopped)
        if is_main and png:
            (self.folder / "samples").mkdir(exist_ok=True)
            write_bytes(self.folder / f"samples/step-{self.run.step:08}.png", png)
            show_picture(self.accelerator, f"{self.prefix}samples", png, self.run.step)

    def write_validation(self) -> None:
        """Write a line of metrics with the validation loss, unless a signal comes."""
        with suppress(Interrupted):
            measured = self.validation.measure(self.averaged(in_training=True), self.alone)
            self._keep({"step": self.run.step, **measured})

    def _keep(self, line: dict) -> None:
        """Write a line of metrics, and the adapter if it is the best by it."""
        run = self.run
        if run.keep_if_best(self.metrics.write(line | {"seconds": run.clock.seconds})):
            self._write_adapter(WEIGHTS_NAME, run.best_values, best=run.best)

    def write_evaluation(self) -> None:
        """Write a line of metrics with the distance, and the adapter if it is the best, unless a signal comes."""
        run, measured = self.run, None
        with suppress(Interrupted), self.averaged(), self.accelerator.autocast(), self.alone():
            with self.task.decoding():
                measured = self.evaluation.measure(self.stop)
        if measured:
            self._keep({"step": run.step, **measured})
            if self.accelerator.is_main_process:
                plot = self.folder / "distance.png"
                self.evaluation.plot(self.metrics.path, plot)
                show_picture(self.accelerator, f"{self.prefix}distance", plot.read_bytes(), run.step)

    def write_checkpoint(self) -> None:
        """Write a checkpoint of this step, or print in one line why not; NonFiniteError if a value is not finite."""
        run = self.run
        tensors, state = run.state()
        check_finite(tensors, run.step)
        if not self.accelerator.is_main_process:
            return
        try:
            save_checkpoint(self.folder / "checkpoints", run.step, tensors, state, self.settings.keep_checkpoints)
        except OSError as error:
            last_good = last_checkpoint(self.settings) or "none"
            script = typed_as(self.settings.script)
            tqdm.write(f"{script}: no checkpoint at step {run.step} ({error}); the last good one is {last_good}")

    def write_adapters(self) -> None:
        """Write the adapter, which is the best one measured or else the last average, and the other averages."""
        run = self.run
        values = [({"ema_decay": average.decay}, average.values) for average in run.averages]
        if run.best:
            values = [({"best": run.best}, run.best_values), *values]
        names = adapter_names(self.settings, is_measured=run.best is not None)
        for name, (facts, tensors) in zip(names, values, strict=True):
            self._write_adapter(name, tensors, **facts)
        namings = namings_of(self.settings.export_lora)
        if namings and self.accelerator.is_main_process:
            with self.averaged():
                for naming in namings:
                    export_lora(denoiser_of(self.task.pipeline), self.folder / "lora", naming=naming)

    def _write_adapter(self, name: str, values: dict[str, Tensor], **facts) -> None:
        settings, run = self.settings, self.run
        if not self.accelerator.is_main_process:
            return
        summary = self.task.data.facts | {
            "steps": run.step,
            "batch_size": settings.batch_size,
            "learning_rate": settings.learning_rate,
            "ema_decay": settings.ema_decay[0],
            "mixed_precision": settings.mixed_precision,
            "seed": settings.seed,
            "seconds": run.clock.seconds,
            "time_budget_s": run.clock.budget,
            "num_processes": self.accelerator.num_processes,
            "num_trainable_params": run.num_trainable_params,
            "num_broken_images": self.num_broken,
            "distance_name": self.evaluation and self.evaluation.distance_name,
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        }
        save_adapter(
            denoiser_of(self.task.pipeline),
            self.folder / name,
            self.task.adapter_name,
            state_dict=values,
            id2label=self.task.data.id2label,
            base=settings.base,
            training=summary | facts,
        )

    def how_it_ended(self, ended: int) -> str:
        step = self.run.step
        reasons = {0: f"all {step} steps done", 1: f"the time budget is used up at step {step}"}
        reason = reasons.get(ended) or f"stopped by {signal.Signals(ended).name} at step {step}"
        return f"{reason}, {format_duration(self.run.clock.seconds)}"

    def say_end(self, ended: int) -> int:
        """Print how the run ended and which commands to run next; return the exit code."""
        run, told = self.run, partial(say, self.accelerator)
        if run.step == 0 and not Stop.is_signal(ended):
            told(f"{typed_as(self.settings.script)}: {no_update(self.settings)}")
            return 1
        told(f"{self.how_it_ended(ended)}: {run.num_trainable_params:,} trained parameters (moving average)")
        if run.best:
            measure = self.settings.best_by
            name = self.evaluation.distance_name if measure == "distance" else measure.replace("_", " ")
            told(f"best of all evaluations: {name} {run.best[measure]:.4f} at step {run.best['step']}")
        told(f"  {self.folder / WEIGHTS_NAME}")
        if Stop.is_signal(ended):
            told("The same command resumes.")
            return 128 + ended
        told(self.next_steps())
        return 0

    def next_steps(self) -> str:
        """The lines that tell which commands to run next."""
        return "\n  ".join(["Next:", *self.settings.next_steps(self.task.data.facts.get("references", 0))])


def no_update(settings: RunSettings) -> str:
    """The message for a run whose budget has ended before the first update."""
    return f"no update was made within --max-train-time {settings.max_train_time}: the same command with more goes on"


def last_checkpoint(settings: RunSettings) -> Path | None:
    return next(reversed(checkpoint_paths(settings.output_dir / "checkpoints")), None)


def diverged(error: NonFiniteError, settings: RunSettings) -> str:
    """The message for a run whose loss is not finite."""
    last_good = last_checkpoint(settings)
    go_on = "Go on from it with --allow-changed-settings and a lower --learning-rate, or start over with --fresh"
    if last_good is None:
        go_on = "Start over with --fresh and a lower --learning-rate"
    if error.step == 1 and str(error).startswith("loss"):
        go_on = "It is that of the base alone, which no update has changed yet: check its weights, or its precision"
    rate = settings.learning_rate * settings.rate_factor(error.step - 1)
    return f"{error}, with learning rate {rate:g}; last good checkpoint: {last_good or 'none'}. {go_on}"
