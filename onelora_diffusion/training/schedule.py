"""Learning rate schedules as functions of the step, so that there is no scheduler to save or to shard."""

import math


def learning_rate_factor(step: int, schedule: str, warmup_steps: int, max_steps: int | None) -> float:
    """What the learning rate is multiplied by at a step counted from 0.

    (step + 1) / warmup_steps in the warm-up; then 1, or from 1 towards 0 at `max_steps` along half a cosine
    or a line.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return (1 + math.cos(math.pi * progress)) / 2 if schedule == "cosine" else 1 - progress
