"""The queue of the server: requests with equal batch keys are drawn in one batch, the oldest first."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field

from torch import Tensor

from onelora_diffusion.files import first_line
from onelora_diffusion.serving.adapter_cache import AdapterCache
from onelora_diffusion.serving.drawing import picture_of
from onelora_diffusion.serving.library import AdapterEntry, AdapterLibrary
from onelora_diffusion.serving.request import Request

logger = logging.getLogger(__name__)


class Busy(RuntimeError):
    """The queue is full."""


class _Abandoned(Exception):
    """Every request of the batch that is being drawn was cancelled."""


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """How requests are put together into batches."""

    max_batch: int = 16
    """Pictures drawn together; with guidance the networks run on twice as many."""
    max_wait_ms: float = 20.0
    """How long a request waits for others to share its batch, while nothing is drawn."""
    max_queue: int = 256
    """The most requests that may wait; the next one is refused, as the server is busy."""

    def check(self) -> None:
        if self.max_batch < 1 or self.max_queue < 1 or not 0 <= self.max_wait_ms <= 60_000:
            raise ValueError(
                f"--max-batch {self.max_batch} and --max-queue {self.max_queue} must be at least 1, and --max-wait-ms "
                f"{self.max_wait_ms:g} from 0 to 60000"
            )


@dataclass(eq=False)
class Ticket:
    """A request in the queue.

    Attributes:
        request: the request, completed by `Drawing.completed`.
        entries: the files of its adapters.
        batch_key: requests with equal keys can share a batch.
        picture: a future of the image, (size, size, 3) uint8, or of the error.
        progress: the share of the drawing that is done, from 0 to 1.
    """

    request: Request
    entries: Sequence[AdapterEntry]
    batch_key: tuple
    queue: "Batcher" = field(repr=False)
    picture: "Future[Tensor]" = field(default_factory=lambda: _started(Future()))
    progress: float = 0.0
    since: float = field(default_factory=time.monotonic)

    def place(self) -> int:
        """Its position in the queue, from 1; 0 as soon as it is being drawn."""
        return self.queue.place(self)

    def cancel(self) -> None:
        """Cancel the request. A batch whose requests are all cancelled ends at its next step."""
        self.queue.cancel(self)


class Batcher:
    """A thread that draws the requests of the queue; it alone runs the model.

    Args:
        drawing: a `Drawing`, or another object with the methods `completed`, `batch_key` and `draw`.

    Attributes:
        counters: how many requests ended in which way since the start (see `COUNTERS`).
    """

    def __init__(self, drawing, library: AdapterLibrary, cache: AdapterCache, settings: BatchSettings):
        settings.check()
        self.drawing, self.library, self.cache, self.settings = drawing, library, cache, settings
        self.counters: Counter[str] = Counter()
        self.batch_sizes: Counter[int] = Counter()
        self._waiting: list[Ticket] = []
        self._drawn: list[Ticket] = []
        self._changed = threading.Condition()
        self._is_open = True
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    # -----------------------------------------------------------------------------------------------
    # What other threads call

    def submit(self, request: Request) -> Ticket:
        """Put a request into the queue.

        Raises:
            ValueError: an adapter, its class, sampler or size does not exist here.
            Busy: the queue is full, or the server is being stopped.
        """
        return self.submit_all([request])[0]

    def submit_all(self, requests: Sequence[Request]) -> list[Ticket]:
        """Put several requests into the queue: all of them, or none if one is refused."""
        try:
            tickets = [self._ticket(request) for request in requests]
        except ValueError:
            self.counters["refused"] += 1
            raise
        with self._changed:
            if not self._is_open:
                raise Busy("busy: the server is being stopped; ask again later")
            if len(self._waiting) + len(tickets) > self.settings.max_queue:
                self.counters["busy"] += len(tickets)
                raise Busy(
                    f"busy: {len(self._waiting)} requests are waiting, and {self.settings.max_queue} is the most; "
                    "ask again later"
                )
            self._waiting += tickets
            self._changed.notify_all()
        return tickets

    def _ticket(self, request: Request) -> Ticket:
        entries = [self.library.entry(name) for name, _ in request.adapters]
        request = self.drawing.completed(request, entries)
        return Ticket(request, entries, self.drawing.batch_key(request), self)

    def place(self, ticket: Ticket) -> int:
        with self._changed:
            return self._waiting.index(ticket) + 1 if ticket in self._waiting else 0

    def cancel(self, ticket: Ticket) -> None:
        with self._changed:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            if not ticket.picture.done():
                self.counters["cancelled"] += 1
                ticket.picture.set_exception(CancelledError())

    def close(self) -> None:
        """Answer all requests that have no picture yet with `Busy`, and end the thread."""
        with self._changed:
            self._is_open = False
            waiting, self._waiting = self._waiting, []
            for ticket in [*waiting, *self._drawn]:
                if not ticket.picture.done():
                    ticket.picture.set_exception(Busy("busy: the server is being stopped; ask again later"))
            self._changed.notify_all()
        self._thread.join()

    def state(self) -> dict:
        """Counters since the start, the length of the queue and the memory of the adapters."""
        with self._changed:
            counters = {name: self.counters[name] for name in COUNTERS}
            waited = self.counters["waited_us"] / 1e6
            return {
                **counters,
                "batch_sizes": {str(size): count for size, count in sorted(self.batch_sizes.items())},
                "waiting": len(self._waiting),
                "drawing": len(self._drawn),
                "mean_wait_s": round(waited / max(1, counters["images"] + counters["failed"]), 6),
                "resident_adapters": len(self.cache),
                "resident_bytes": self.cache.num_bytes,
                "adapter_reads": self.cache.num_reads,
            }

    @property
    def is_alive(self) -> bool:
        return self._is_open and self._thread.is_alive()

    # -----------------------------------------------------------------------------------------------
    # The thread

    def _run(self) -> None:
        while (batch := self._next_batch()) is not None:
            try:
                self._draw(batch)
            except _Abandoned:
                pass
            except Exception as error:  # out of memory, or a programming error: it must not end the server
                logger.exception("a batch of %d was not drawn", len(batch))
                if len(batch) > 1:  # a single request may be the cause
                    for ticket in batch:
                        self._draw_alone(ticket)
                else:
                    self._settle(batch[0], error=error)
            finally:
                with self._changed:
                    self._drawn = []

    def _next_batch(self) -> list[Ticket] | None:
        """The oldest request and those with an equal batch key; None when the queue is closed."""
        with self._changed:
            while True:
                if not self._is_open:
                    return None
                if not self._waiting:
                    self._changed.wait()
                    continue
                oldest = self._waiting[0]
                batch = [ticket for ticket in self._waiting if ticket.batch_key == oldest.batch_key]
                left = oldest.since + self.settings.max_wait_ms / 1000 - time.monotonic()
                if left > 0 and len(batch) < self.settings.max_batch:
                    self._changed.wait(left)
                    continue
                batch = batch[: self.settings.max_batch]
                self._waiting = [ticket for ticket in self._waiting if ticket not in batch]
                self._drawn = batch
                for ticket in batch:
                    self.counters["waited_us"] += int((time.monotonic() - ticket.since) * 1e6)
                return batch

    def _draw(self, batch: list[Ticket]) -> None:
        names, problems = self.cache.load(entry for ticket in batch for entry in ticket.entries)
        ready = []
        for ticket in batch:
            broken = next((entry for entry in ticket.entries if entry.key in problems), None)
            if broken is None:
                ready.append(ticket)
            else:
                self.library.refuse(broken, problems[broken.key])
                self._settle(ticket, error=ValueError(f"adapter '{broken.name}': {problems[broken.key]}"))
        if not ready:
            return
        mixtures = [
            {names[entry.key]: weight for entry, (_, weight) in zip(t.entries, t.request.adapters, strict=True)}
            for t in ready
        ]

        def on_step(share: float) -> None:
            for ticket in ready:
                ticket.progress += share
            if all(ticket.picture.done() for ticket in ready):
                raise _Abandoned

        try:
            images = self.drawing.draw([ticket.request for ticket in ready], mixtures, on_step)
        finally:
            self.cache.shrink()
        self.batch_sizes[len(ready)] += 1
        for ticket, image in zip(ready, images, strict=True):
            self._settle(ticket, picture=picture_of(image))

    def _draw_alone(self, ticket: Ticket) -> None:
        ticket.progress = 0.0
        try:
            self._draw([ticket])
        except _Abandoned:
            pass
        except Exception as error:
            self._settle(ticket, error=error)

    def _settle(self, ticket: Ticket, picture: Tensor | None = None, error: Exception | None = None) -> None:
        with self._changed:
            if ticket.picture.done():  # it was cancelled
                return
            self.counters["images" if error is None else "failed"] += 1
            if error is None:
                ticket.picture.set_result(picture)
            elif isinstance(error, ValueError):
                ticket.picture.set_exception(error)
            else:
                ticket.picture.set_exception(RuntimeError(f"not drawn: {first_line(error, 200)}"))


def _started(future: Future) -> Future:
    future.set_running_or_notify_cancel()  # from now on only `Ticket.cancel` can cancel it
    return future


COUNTERS = ("images", "failed", "refused", "busy", "cancelled")
"""The ways in which requests end, each of which is counted."""
