"""The thread that draws what waits: clients in turns, in one batch that requests join and leave at its steps."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import CancelledError

from torch import Tensor

from onelora_diffusion.files import first_line
from onelora_diffusion.serving.adapter_cache import AdapterCache
from onelora_diffusion.serving.engine import Engine
from onelora_diffusion.serving.library import AdapterLibrary
from onelora_diffusion.serving.queue import Busy, Stopping, Ticket, TurnQueue
from onelora_diffusion.serving.request import Request
from onelora_diffusion.serving.settings import BatchSettings

logger = logging.getLogger(__name__)

LAST_STEP_S = 5.0  # seconds for which the end of the server waits for a step of the networks


class Batcher:
    """A thread that draws the requests of the queue by a `Drawing`; it alone runs the model.

    Other threads call the public methods.
    """

    def __init__(self, drawing, library: AdapterLibrary, cache: AdapterCache, settings: BatchSettings):
        settings.check()
        self.drawing, self.library, self.cache, self.settings = drawing, library, cache, settings
        self.counters: Counter[str] = Counter()  # how many requests ended in each way (`COUNTERS`), and their wait
        self.engine = Engine(drawing, library, cache, self._settle)
        self._waiting = TurnQueue()
        self._drawing: list[Ticket] = []
        self._changed = threading.Condition()
        self._seconds_a_picture, self._seconds_since_picture = 1.0, 0.0
        self._is_open = True
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, request: Request, client: str = "") -> Ticket:
        """Put a request into the queue of a client; errors are those of `submit_all`."""
        return self.submit_all([request], client)[0]

    def submit_all(self, requests: Sequence[Request], client: str = "") -> list[Ticket]:
        """Put several requests into the queue of a client: all of them, or none if one is refused.

        ValueError if an adapter, its class, sampler or size does not exist here; Busy if the queue is full, or too
        many requests of the client wait; Stopping, a kind of it, if the server is being stopped.
        """
        try:
            tickets = [self._ticket(request, client) for request in requests]
        except ValueError:
            self.counters["refused"] += 1
            raise
        with self._changed:
            if not self._is_open:
                raise Stopping()
            self._check_room(tickets, list(self._waiting), self.settings.max_queue, "")
            self._check_room(tickets, self._waiting.of(client), self.settings.max_queue_per_client, " of one client")
            for ticket in tickets:
                self._waiting.add(ticket)
            self._changed.notify_all()
        return tickets

    def _check_room(self, tickets: list[Ticket], waiting: list[Ticket], most: int, whose: str) -> None:
        if len(tickets) > most:
            raise ValueError(f"{len(tickets)} pictures asked for at once; {most} is the most")
        if len(waiting) + len(tickets) > most:
            self.counters["busy"] += len(tickets)
            raise Busy(
                f"busy: {len(waiting)} requests{whose} are waiting, and {most} is the most; ask again later",
                retry_after=self._waiting.place(waiting[-1]) * self._seconds_a_picture,
            )

    def _ticket(self, request: Request, client: str) -> Ticket:
        entries = [self.library.entry(name) for name, _ in request.adapters]
        request = self.drawing.completed(request, entries)
        batch_key = self.drawing.batch_key(request)
        if not self.settings.join:
            batch_key += (request.sampler, request.num_inference_steps)
        return Ticket(request, entries, batch_key, self, client)

    def place(self, ticket: Ticket) -> int:
        with self._changed:
            return self._waiting.place(ticket)

    def cancel(self, ticket: Ticket) -> None:
        with self._changed:
            self._waiting.remove(ticket)
            if not ticket.picture.done():
                self.counters["cancelled"] += 1
                ticket.picture.set_exception(CancelledError())

    def drain(self) -> None:
        """Refuse new requests with `Stopping`, draw all that wait, and end the thread."""
        with self._changed:
            self._is_open = False
            self._changed.notify_all()
        self._thread.join()

    def close(self) -> None:
        """Answer all requests that have no picture yet with `Stopping`, and end the thread.

        A step that is being computed is waited for, but no longer than `LAST_STEP_S`: the process may end without it.
        """
        with self._changed:
            self._is_open = False
            for ticket in [*self._waiting.clear(), *self._drawing]:
                if not ticket.picture.done():
                    ticket.picture.set_exception(Stopping())
            self._changed.notify_all()
        self._thread.join(LAST_STEP_S)

    def state(self) -> dict:
        """Counters since the start, the length of the queue and the memory of the adapters."""
        with self._changed:
            counters = {name: self.counters[name] for name in COUNTERS}
            waited = self.counters["waited_us"] / 1e6
            return {
                **counters,
                "batch_sizes": {str(size): count for size, count in sorted(self.engine.batch_sizes.copy().items())},
                "waiting": len(self._waiting),
                "drawing": sum(not ticket.picture.done() for ticket in self._drawing),
                "mean_wait_s": round(waited / max(1, counters["images"] + counters["failed"]), 6),
                "resident_adapters": len(self.cache),
                "resident_bytes": self.cache.num_bytes,
                "adapter_reads": self.cache.num_reads,
            }

    @property
    def is_alive(self) -> bool:
        """Whether requests that wait are drawn."""
        return self._thread.is_alive()

    def _run(self) -> None:
        while (joining := self._next()) is not None:
            start, drawn = time.monotonic(), self.counters["images"]
            try:
                self.engine.step(joining)
            except Exception as error:  # a programming error must not end the server
                logger.exception("a step failed")
                for ticket in {*joining, *self.engine.running}:
                    self._settle(ticket, error=error)
            self._measure(time.monotonic() - start, self.counters["images"] - drawn)

    def _next(self) -> list[Ticket] | None:
        """The requests that join the running batch, in turns; None when the queue is closed and all of it is drawn."""
        with self._changed:
            while not self.engine.running and not self._waiting:
                if not self._is_open:
                    return None
                self._changed.wait()
            self._drawing = [ticket for ticket in self.engine.running if not ticket.picture.done()]
            joining = self._waiting.joining(len(self._drawing), self.settings.max_batch, self.settings.join)
            for ticket in joining:
                self.counters["waited_us"] += int((time.monotonic() - ticket.since) * 1e6)
            self._drawing = self._drawing + joining
            return joining

    def _measure(self, seconds: float, drawn: int) -> None:
        """Take a step's time, and the number of pictures that it ended, into the average of a picture's time."""
        self._seconds_since_picture += seconds
        if drawn:
            self._seconds_a_picture += 0.2 * (self._seconds_since_picture / drawn - self._seconds_a_picture)
            self._seconds_since_picture = 0.0

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


COUNTERS = ("images", "failed", "refused", "busy", "cancelled")  # the ways in which requests end
