"""Stop training by a time budget or a signal, at the same step on all processes."""

import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_GO_ON, _BUDGET = 0, 1  # messages between processes, besides the number of a signal, which is at least 2


def parse_duration(text: str) -> float:
    """Convert a duration such as `90s`, `30m`, `24h`, `1h30m` or `2d` to seconds; ValueError for other texts."""
    parts = re.fullmatch(r"(?:[0-9]+(?:\.[0-9]+)?[dhms])+", text.strip())
    if not parts:
        raise ValueError(f"{text!r} is not a duration: write it like 90s, 30m, 24h or 1h30m")
    return sum(float(number) * _UNITS[unit] for number, unit in re.findall(r"([0-9.]+)([dhms])", text))


def format_duration(seconds: float) -> str:
    """Write seconds in the two largest units: `47s`, `3m05s`, `1h30m` or `2d04h`."""
    seconds = max(0, int(seconds))
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if days:
        return f"{days}d{hours % 24:02}h"
    if hours:
        return f"{hours}h{minutes % 60:02}m"
    return f"{minutes}m{seconds % 60:02}s" if minutes else f"{seconds}s"


class Clock:
    """Wall-clock seconds of a run, since a `time.monotonic()` or now, over all its resumes, with a budget or None."""

    def __init__(self, budget: float | None = None, started: float | None = None):
        self.budget = budget
        self._started = time.monotonic() if started is None else started
        self._earlier = 0.0  # seconds spent before this start

    def resume(self, seconds: float) -> None:
        """Set the seconds that the run has used before this start."""
        self._earlier = max(self._earlier, seconds)

    @property
    def seconds(self) -> float:
        return self._earlier + time.monotonic() - self._started

    @property
    def left(self) -> float:
        return float("inf") if self.budget is None else self.budget - self.seconds


class Interrupted(BaseException):
    """A signal has arrived inside `Stop.at_once`."""


class Stop:
    """Combines SIGTERM, SIGINT and the time budget into one decision, equal on every process.

    Inside this context manager a signal is recorded for the loop. A second Ctrl-C acts as usual if it comes at least
    two seconds later; a sooner one may be the first again, sent by both the terminal and the launcher.
    """

    def __init__(self, clock: Clock, num_processes: int):
        self.clock = clock
        self.signal = _GO_ON
        self._is_kept = True
        # This CPU group exchanges one message per step without waiting for the GPU.
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
        """Context manager in which a signal also raises Interrupted, for long work that may end at any point."""
        self._is_kept = False
        try:
            yield
        finally:
            self._is_kept = True

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Context manager in which signals have their usual effect, for long work without progress to save.

        The system itself then handles a signal, even while a compiler runs and Python code does not.
        """
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    def asked(self) -> int:
        """The decision of this process: 0 to go on, 1 for the budget, or the number of the signal."""
        return self.signal or (_BUDGET if self.clock.left <= 0 else _GO_ON)

    def agreed(self) -> int:
        """The decision of all processes, which is their largest; every process must call it at the same step."""
        if self.group is None:
            return self.asked()
        flag = torch.tensor(self.asked())
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self.group)
        return int(flag)

    @staticmethod
    def is_signal(answer: int) -> bool:
        return answer > _BUDGET
