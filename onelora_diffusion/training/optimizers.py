"""Optimisers of the trained tensors, with separate learning rates for the class table and the vectors; schedules."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer

# Entries of schedule-free's groups that are state and no settings; checkpoints must contain them.
RUNNING = ("k", "weight_sum", "lr_max", "scheduled_lr", "train_mode")


def make_optimizer(
    name: str, trained: dict[str, Tensor], learning_rate: float, table_rate: float | None = None
) -> Optimizer:
    """AdamW, bitsandbytes' 8-bit AdamW, or schedule-free AdamW (Defazio et al., 2024), without weight decay.

    Each group has `peak_lr`, which the schedule multiplies; for the class table it is `table_rate`, if given.
    """
    table = [tensor for name, tensor in trained.items() if name.startswith("class_embedding.")]
    vectors = [tensor for name, tensor in trained.items() if not name.startswith("class_embedding.")]
    groups = [(vectors, learning_rate), (table, learning_rate if table_rate is None else table_rate)]
    groups = [{"params": params, "lr": rate, "peak_lr": rate} for params, rate in groups if params]
    if name == "adamw":
        return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    if name == "adamw-8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, weight_decay=0.0)
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(groups, weight_decay=0.0)
    optimizer.train()
    return optimizer


def running_values(optimizer: Optimizer) -> list[dict]:
    """The values of each group that steps change, for JSON."""
    return [{key: group[key] for key in RUNNING if key in group} for group in optimizer.param_groups]


def restore_running(optimizer: Optimizer, values: list[dict]) -> None:
    for group, running in zip(optimizer.param_groups, values, strict=True):
        group.update({key: running[key] for key in RUNNING if key in group})


@contextmanager
def averaged_values(optimizer: Optimizer) -> Iterator[None]:
    """Context manager in which trained tensors hold schedule-free's own average; other optimisers change nothing."""
    is_schedule_free = "train_mode" in optimizer.param_groups[0]
    if is_schedule_free:
        optimizer.eval()
    yield
    if is_schedule_free:
        optimizer.train()


def learning_rate_factor(step: int, schedule: str, warmup_steps: int, max_steps: int | None) -> float:
    """The factor on the learning rate at a step, counted from 0, so that checkpoints need no state of a schedule.

    After warm-up it is 1, or falls from 1 to 0 at `max_steps` along half a cosine or a line.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return (1 + math.cos(math.pi * progress)) / 2 if schedule == "cosine" else 1 - progress
