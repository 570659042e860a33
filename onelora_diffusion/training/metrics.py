"""Losses of a run: kept on the device, read once a line, checked to be finite."""

import json
from pathlib import Path

import torch
from torch import Tensor

from .checkpoints import write_bytes


class NonFiniteError(ArithmeticError):
    """The loss, or a trained value, became infinite or not a number."""

    def __init__(self, what: str, step: int):
        super().__init__(f"{what} at step {step}")
        self.step = step


def check_finite(tensors: dict[str, Tensor], step: int) -> None:
    """NonFiniteError that names the first tensor with infinity or NaN in it."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise NonFiniteError(f"{name} is not finite", step)


class LossWindow:
    """The losses of the steps since the last line of metrics.

    Adding a step does not wait for the device. `read` does: it averages over processes and names the first
    step with a non-finite loss. The window goes into checkpoints, so that lines do not depend on interruptions.
    """

    def __init__(self, rows: list[dict[str, float]] | None = None):
        self.names = list(rows[0]) if rows else []
        self.rows: list[Tensor] = [torch.tensor(list(row.values())) for row in rows or []]

    def add(self, losses: dict[str, Tensor]) -> None:
        """Adds a step's losses, scalars by name."""
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


def append_line(path: Path, values: dict) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(values) + "\n")


def cut_lines_after(path: Path, step: int) -> None:
    """Drops what an interrupted run wrote after the checkpoint it is resumed from, and a line cut in half."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except ValueError:
            break
        kept.append(line + "\n")
    write_bytes(path, "".join(kept).encode())
