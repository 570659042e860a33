"""One caller at a time: what two threads would change under each other, they do one after the other."""

import asyncio
import threading


class Turn:
    """A context manager that the same thread may enter again, and for which others wait.

    Tasks of one thread cannot wait for each other here, so that a second one is refused.
    """

    def __init__(self):
        self._lock = threading.RLock()
        self._depth = 0
        self._owner = None
        self._task = None

    @property
    def is_mine(self) -> bool:
        """Whether this thread has it."""
        return self._depth > 0 and self._owner == threading.get_ident()

    def __enter__(self) -> "Turn":
        self._lock.acquire()
        task = _task()
        if self._depth and task is not self._task:
            self._lock.release()
            raise RuntimeError(
                "another task of this thread is in the middle of a call of this model: await it first, or give each "
                "call a thread (asyncio.to_thread)"
            )
        self._owner, self._task = threading.get_ident(), task
        self._depth += 1
        return self

    def __exit__(self, *exception) -> None:
        self._depth -= 1
        self._lock.release()

    def __reduce__(self):
        return Turn, ()  # a copy of a model has turns of its own


def _task():
    try:
        return asyncio.current_task()
    except RuntimeError:  # no loop runs in this thread
        return None
