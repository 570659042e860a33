"""When training ends: a time budget, or a signal; all processes agree on the step."""

import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_GO_ON, _BUDGET = 0, 1  # what processes tell each other, beside the number of a signal (2 is the lowest used)


def parse_duration(text: str) -> float:
    """Seconds of `90s`, `30m`, `24h`, `1h30m`, `2d`; ValueError for anything else."""
    parts = re.fullmatch(r"(?:[0-9]+(?:\.[0-9]+)?[dhms])+", text.strip())
    if not parts:
        raise ValueError(f"{text!r} is not a duration: write it like 90s, 30m, 24h or 1h30m")
    return sum(float(number) * _UNITS[unit] for number, unit in re.findall(r"([0-9.]+)([dhms])", text))


def format_duration(seconds: float) -> str:
    """`47s`, `3m05s`, `1h30m`, `2d04h`: the two largest units."""
    seconds = max(0, int(seconds))
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if days:
        return f"{days}d{hours % 24:02}h"
    if hours:
        return f"{hours}h{minutes % 60:02}m"
    return f"{minutes}m{seconds % 60:02}s" if minutes else f"{seconds}s"


class Clock:
    """Wall-clock seconds of a run over all its resumes, against a budget (None: no end).

    `started` is the `time.monotonic()` from which this start of the run counts; None: now.
    """

    def __init__(self, budget: float | None = None, started: float | None = None):
        self.budget = budget
        self._started = time.monotonic() if started is None else started
        self._earlier = 0.0  # seconds spent before this start

    def resume(self, seconds: float) -> None:
        """The run is known to have used so many seconds before this start."""
        self._earlier = max(self._earlier, seconds)

    @property
    def seconds(self) -> float:
        return self._earlier + time.monotonic() - self._started

    @property
    def left(self) -> float:
        return float("inf") if self.budget is None else self.budget - self.seconds


class Interrupted(BaseException):
    """A signal has come where it need not be kept: see `Stop.at_once`."""


class Stop:
    """SIGTERM, SIGINT and the time budget, as one answer that is the same on every process.

    Inside its context a signal is kept for the loop to see. A second Ctrl-C, two seconds later, acts as always;
    sooner it may be the same one, sent by the terminal and passed on by the launcher.
    """

    def __init__(self, clock: Clock, num_processes: int):
        self.clock = clock
        self.signal = _GO_ON
        self._is_kept = True
        # A group of its own on the CPU: the flag costs a message a step, and no wait for the GPU.
        self.group = torch.distributed.new_group(backend="gloo") if num_processes > 1 else None

    def __enter__(self) -> "Stop":
        self._before = {number: signal.signal(number, self._keep) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _keep(self, number: int, frame) -> None:
        if number == self.signal == signal.SIGINT and time.monotonic() - self._signalled > 2:
            raise KeyboardInterrupt
        if not self.signal:
            self.signal, self._signalled = number, time.monotonic()
            if not self._is_kept:
                raise Interrupted

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal is kept and raises Interrupted too: for long work that may be left at any point."""
        self._is_kept = False
        try:
            yield
        finally:
            self._is_kept = True

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside, signals act as if there were no run: for long work while there is nothing to lose.

        No Python needs to run for that, so it holds in the compiler's threads as well.
        """
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    def asked(self) -> int:
        """This process's own answer: 0, 1 for the budget, or the number of the signal."""
        return self.signal or (_BUDGET if self.clock.left <= 0 else _GO_ON)

    def agreed(self) -> int:
        """The answer of all processes, their largest. Every process must call it at the same step."""
        if self.group is None:
            return self.asked()
        flag = torch.tensor(self.asked())
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self.group)
        return int(flag)

    @staticmethod
    def is_signal(answer: int) -> bool:
        return answer > _BUDGET
