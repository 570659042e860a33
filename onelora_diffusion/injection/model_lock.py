"""A lock of a model with adapters: one thread at a time runs or changes it."""

import asyncio
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

RETRY_SECONDS = 0.1  # a waiting thread checks this often whether the lock is still held


@dataclass(eq=False)
class Hold:
    """One acquisition of the lock, by a with statement or a call of the model."""

    frame: FrameType | None = None  # of the running call; None for a with statement
    undo: Callable[[], None] = lambda: None  # called when the call has ended or was interrupted


class ModelLock:
    """A reentrant lock, used as a context manager or held during a call of the model.

    Asyncio tasks of one thread cannot wait for each other here, so a second one gets an error. PyTorch runs no hook
    after a call that Ctrl-C has interrupted; the lock detects by the frame of the call that it has ended, and is free
    for all threads.
    """

    def __init__(self):
        self._free = threading.Condition()
        self._owner = None
        self._task = None
        self._holds: list[Hold] = []

    def __enter__(self) -> "ModelLock":
        self._take(Hold())
        return self

    def __exit__(self, *exception) -> None:
        with self._free:
            while (hold := self._holds.pop()).frame is not None:
                hold.undo()  # a call inside was interrupted
            self._free.notify()

    def begin_call(self, frame: FrameType) -> Hold:
        """Acquire the lock for a call that runs in this frame, until `end_call`."""
        return self._take(Hold(frame))

    def end_call(self) -> None:
        """Release what the last `begin_call` of this thread acquired, if anything."""
        with self._free:
            if self._owner == threading.get_ident() and any(hold.frame is not None for hold in self._holds):
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
        """Release the lock for calls whose frames are no longer running."""
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
        return ModelLock, ()  # a copy of a model has a lock of its own


def _task():
    try:
        return asyncio.current_task()
    except RuntimeError:  # no loop runs in this thread
        return None
