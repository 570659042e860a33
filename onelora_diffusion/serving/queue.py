"""The requests that wait: a queue for each client, which are served in turns."""

import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from torch import Tensor

from onelora_diffusion.serving.library import AdapterEntry
from onelora_diffusion.serving.request import Request


class Busy(RuntimeError):
    """The queue is full, or as full as one client may make it."""

    def __init__(self, message: str, retry_after: float = 1.0):
        super().__init__(message)
        self.retry_after = retry_after  # seconds until there should be room, by the pictures that were drawn lately


class Stopping(Busy):
    """The server is being stopped, and takes no more requests."""

    def __init__(self):
        super().__init__("busy: the server is being stopped; ask again later")


@dataclass(eq=False)
class Ticket:
    """A request in the queue."""

    request: Request  # completed by `Drawing.completed`
    entries: Sequence[AdapterEntry]  # the files of its adapters
    batch_key: tuple  # requests with equal keys can share a batch
    queue: Any = field(repr=False)  # the `Batcher` that it is in
    client: str = ""  # who asks: requests of different clients are served in turns
    # (size, size, 3) uint8, or the error
    picture: "Future[Tensor]" = field(default_factory=lambda: _started(Future()))
    progress: float = 0.0  # the share of the drawing that is done, from 0 to 1
    since: float = field(default_factory=time.monotonic)  # when it came

    def place(self) -> int:
        """Its position in the queue, from 1; 0 as soon as it is being drawn."""
        return self.queue.place(self)

    def cancel(self) -> None:
        """Cancel the request, which leaves the queue now, or its batch at the next step."""
        self.queue.cancel(self)


class TurnQueue:
    """Tickets in a queue for each client, from which they are taken in turns: one of each client that waits.

    Iterating gives the order in which they are taken. It has no lock of its own.
    """

    def __init__(self):
        self._by_client: OrderedDict[str, list[Ticket]] = OrderedDict()  # in the order of their turns

    def __len__(self) -> int:
        return sum(map(len, self._by_client.values()))

    def __iter__(self) -> Iterator[Ticket]:
        for turn in zip_longest(*self._by_client.values()):
            yield from (ticket for ticket in turn if ticket is not None)

    def of(self, client: str) -> list[Ticket]:
        """The tickets of one client, the oldest first."""
        return self._by_client.get(client, [])

    def add(self, ticket: Ticket) -> None:
        self._by_client.setdefault(ticket.client, []).append(ticket)

    def remove(self, ticket: Ticket) -> None:
        """Remove a ticket, if it is there."""
        if ticket in self.of(ticket.client):
            self._by_client[ticket.client].remove(ticket)
            if not self._by_client[ticket.client]:
                del self._by_client[ticket.client]

    def take(self, batch_key: tuple | None = None) -> Ticket | None:
        """Remove the next ticket, or the next one with this batch key, and return it; None if there is none."""
        ticket = next((ticket for ticket in self if batch_key in (None, ticket.batch_key)), None)
        if ticket is not None:
            self.remove(ticket)
            if ticket.client in self._by_client:
                self._by_client.move_to_end(ticket.client)
        return ticket

    def joining(self, num_running: int, max_batch: int, join: bool) -> list[Ticket]:
        """Take those that join a running batch of so many; without `join`, a new batch of equal keys after it."""
        free = max_batch - num_running if join or not num_running else 0
        tickets, batch_key = [], None
        while len(tickets) < free and (ticket := self.take(batch_key)):
            tickets.append(ticket)
            batch_key = None if join else ticket.batch_key
        return tickets

    def place(self, ticket: Ticket) -> int:
        """The position of a ticket in the order in which they are taken, from 1; 0 if it is not there."""
        return next((place for place, each in enumerate(self, 1) if each is ticket), 0)

    def clear(self) -> list[Ticket]:
        """Remove all tickets and return them."""
        tickets = list(self)
        self._by_client.clear()
        return tickets


def _started(future: Future) -> Future:
    future.set_running_or_notify_cancel()  # from now on only `Ticket.cancel` can cancel it
    return future
