"""Learning rate schedules as functions of the step, so that checkpoints need no scheduler state."""

import math


def learning_rate_factor(step: int, schedule: str, warmup_steps: int, max_steps: int | None) -> float:
    """The factor on the learning rate at a step, counted from 0.

    It is (step + 1) / warmup_steps during warm-up. Then it is 1, or falls from 1 to 0 at `max_steps` along half a
    cosine or a line.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return (1 + math.cos(math.pi * progress)) / 2 if schedule == "cosine" else 1 - progress
