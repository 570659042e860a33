"""One caller at a time: what two threads would change under each other, they do one after the other."""

import asyncio
import sys
import threading
from collections.abc import Callable
from types import FrameType

RETRY_SECONDS = 0.1  # after which one who waits looks whether the turn is still in use


class Hold:
    """One of the reasons for which a thread has the turn: a with statement, or a call of the model.

    Attributes:
        frame: of the call, as long as it runs; None for a with statement.
        undo: what is done when the call has ended, or was broken off.
    """

    def __init__(self, frame: FrameType | None = None):
        self.frame = frame
        self.undo: Callable[[], None] = _nothing


class Turn:
    """A context manager that the same thread may enter again, and for which others wait.

    Tasks of one thread cannot wait for each other here, so that a second one is refused. A call of the model that
    Ctrl-C broke off, after which PyTorch runs no hook, has ended for all who come next, in whatever thread: whether it
    still runs is seen by its frame.
    """

    def __init__(self):
        self._free = threading.Condition()
        self._owner = None
        self._task = None
        self._holds: list[Hold] = []

    @property
    def is_mine(self) -> bool:
        """Whether this thread has it."""
        return bool(self._holds) and self._owner == threading.get_ident()

    def __enter__(self) -> "Turn":
        self._take(Hold())
        return self

    def __exit__(self, *exception) -> None:
        with self._free:
            while (hold := self._holds.pop()).frame is not None:
                hold.undo()  # a call inside was broken off
            self._free.notify()

    def begin_call(self, frame: FrameType) -> Hold:
        """Have it for a call that runs in this frame, until `end_call`."""
        return self._take(Hold(frame))

    def end_call(self) -> None:
        """Give back what the last `begin_call` of this thread took, if it did."""
        with self._free:
            if self.is_mine and any(hold.frame is not None for hold in self._holds):
                while (hold := self._holds.pop()).frame is None:
                    pass
                hold.undo()
                self._free.notify()

    def _take(self, hold: Hold) -> Hold:
        me, task = threading.get_ident(), _task()
        with self._free:
            self._end_broken_off()
            while self._holds and self._owner != me:
                self._free.wait(RETRY_SECONDS)
                self._end_broken_off()
            if self._holds and task is not self._task:
                raise RuntimeError(
                    "another task of this thread is in the middle of a call of this model: await it first, or give "
                    "each call a thread (asyncio.to_thread)"
                )
            self._owner, self._task = me, task
            self._holds.append(hold)
        return hold

    def _end_broken_off(self) -> None:
        """End the calls whose frames their thread does not run any more."""
        if all(hold.frame is None for hold in self._holds):
            return
        running, frame = set(), sys._current_frames().get(self._owner)
        while frame is not None:
            running.add(id(frame))
            frame = frame.f_back
        for hold in reversed(self._holds.copy()):
            if hold.frame is not None and id(hold.frame) not in running:
                self._holds.remove(hold)
                hold.undo()

    def __reduce__(self):
        return Turn, ()  # a copy of a model has turns of its own


def _nothing() -> None:
    pass


def _task():
    try:
        return asyncio.current_task()
    except RuntimeError:  # no loop runs in this thread
        return None
