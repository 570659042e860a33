"""The losses of a run: kept on the device, read for each line of metrics, and checked to be finite."""

import json
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from onelora_diffusion.files import write_bytes
from onelora_diffusion.training.stopping import Clock


class NonFiniteError(ArithmeticError):
    """The loss, or a trained value, became infinite or not a number."""

    def __init__(self, what: str, step: int):
        super().__init__(f"{what} at step {step}")
        self.step = step


def check_finite(tensors: dict[str, Tensor], step: int) -> None:
    """NonFiniteError, naming the first tensor that contains infinity or NaN."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise NonFiniteError(f"{name} is not finite", step)


class LossWindow:
    """The losses of the steps since the last line of metrics.

    Adding a step does not wait for the device; `read` does, averages over processes, and names the first step with a
    non-finite loss. The window is saved in checkpoints, so that interruptions do not change the lines.
    """

    def __init__(self, rows: list[dict[str, float]] | None = None):
        self.names = ["loss", *(name for name in rows[0] if name != "loss")] if rows else []
        self.rows: list[Tensor] = [torch.tensor([float(row[name]) for name in self.names]) for row in rows or []]

    def add(self, losses: dict[str, Tensor]) -> None:
        """Add the losses of a step, scalars by name."""
        self.names = list(losses)
        self.rows.append(torch.stack([loss.detach().float() for loss in losses.values()]))

    def read(self, accelerator, step: int) -> list[dict[str, float]]:
        """The losses of each step in the window, of which `step` is the last."""
        if not self.rows:
            return []
        stacked = torch.stack([row.to(accelerator.device) for row in self.rows])
        stacked = accelerator.reduce(stacked, reduction="mean").cpu()
        self.rows = list(stacked)
        finite = stacked.isfinite().all(1)
        if not finite.all():
            first = int(finite.long().argmin())
            raise NonFiniteError(f"loss is {stacked[first, 0].item()}", step - len(self.rows) + 1 + first)
        return [dict(zip(self.names, row, strict=True)) for row in stacked.tolist()]

    def clear(self) -> None:
        self.rows = []


class LossWatch:
    """Notices when the loss of a run has risen far above what it was before.

    It compares the mean loss of the last `MIN_STEPS` steps with the lowest such mean so far, and with that of the
    first `FIRST_STEPS`, since a run can go wrong at once.
    """

    FIRST_STEPS, MIN_STEPS = 20, 100
    FACTOR = 2.0  # means of 100 steps differ by noise too, at a batch size of 1 by up to half

    def __init__(self):
        self.recent: list[tuple[float, int]] = []
        self.lowest, self.has_risen = float("inf"), False

    def add(self, loss: float, num_steps: int) -> float | None:
        """Add the mean loss of some steps; the ratio to the lowest the first time that it is too high, else None."""
        self.recent.append((loss, num_steps))
        while sum(steps for _, steps in self.recent[1:]) >= self.MIN_STEPS:
            del self.recent[0]
        num_recent = sum(steps for _, steps in self.recent)
        if self.has_risen or num_recent < self.FIRST_STEPS:
            return None
        mean = sum(loss * steps for loss, steps in self.recent) / num_recent
        self.lowest = min(self.lowest, mean)
        self.has_risen = num_recent >= self.MIN_STEPS and mean > self.FACTOR * self.lowest
        return mean / self.lowest if self.has_risen else None


class MetricsFile:
    """The file metrics.jsonl, with lines of losses and of evaluations; trackers get the values under a prefix."""

    def __init__(self, path: Path, accelerator, batch_size: int, step: int, clock: Clock, prefix: str = ""):
        self.path, self.accelerator, self.batch_size, self.clock = path, accelerator, batch_size, clock
        self.prefix = prefix
        self.last_step, self.last_seconds = step, clock.seconds
        self.watch, before = LossWatch(), 0
        for line in map(json.loads, path.read_text().splitlines() if path.exists() else ()):
            if "loss" in line:
                self.watch.add(line["loss"], line["step"] - before)
                before = line["step"]

    def write_losses(self, window: LossWindow, step: int, learning_rate: float) -> dict:
        """Write the means over the window, empty it, and return the line."""
        losses = window.read(self.accelerator, step)
        line = {"step": step} | {name: sum(row[name] for row in losses) / len(losses) for name in losses[0]}
        seconds = self.clock.seconds
        speed = (step - self.last_step) * self.batch_size / (seconds - self.last_seconds)
        rise = self.watch.add(line["loss"], len(losses))
        if rise and self.accelerator.is_main_process:
            risen = f"the loss is {rise:.1f} times its lowest, at step {step}"
            tqdm.write(f"{risen}: where it stays there, start over with a lower --learning-rate")
        line |= {"lr": learning_rate, "seconds": seconds, "images_per_second": speed}
        self.last_step, self.last_seconds = step, seconds
        window.clear()
        return self.write(line)

    def write(self, line: dict) -> dict:
        self.accelerator.log({f"{self.prefix}{name}": value for name, value in line.items()}, step=line["step"])
        if self.accelerator.is_main_process:
            append_line(self.path, line)
        return line


def append_line(path: Path, values: dict) -> None:
    """Write a line at a file's end. OSError names the file, also where the disk is full, as writing alone does not."""
    try:
        with open(path, "a") as file:
            file.write(json.dumps(values) + "\n")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def cut_lines_after(path: Path, step: int, steps_without_line: int = 0) -> None:
    """Remove the lines that an interrupted run wrote after its last checkpoint, and an incomplete line.

    The losses of the last `steps_without_line` steps will be in a later line.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            break
        if values["step"] <= (step - steps_without_line if "loss" in values else step):
            kept.append(line + "\n")
    write_bytes(path, "".join(kept).encode())
