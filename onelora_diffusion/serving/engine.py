"""The running batch: requests join it at a step, and leave it as soon as they are drawn, cancelled or failed."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from onelora_diffusion.sampling.trajectory import Trajectory
from onelora_diffusion.serving.adapter_cache import AdapterCache
from onelora_diffusion.serving.drawing import Drawing, picture_of
from onelora_diffusion.serving.library import AdapterEntry, AdapterLibrary
from onelora_diffusion.serving.queue import Ticket

logger = logging.getLogger(__name__)


class Engine:
    """Draws the requests of the running batch step by step. Only the thread that runs the model may use it.

    `settle` is called with a request and its picture, or the error why there is none.
    """

    def __init__(self, drawing: Drawing, library: AdapterLibrary, cache: AdapterCache, settle: Callable[..., object]):
        self.drawing, self.library, self.cache, self.settle = drawing, library, cache, settle
        self.running: dict[Ticket, Trajectory] = {}  # the requests that are being drawn, with their images on the way
        self.batch_sizes: Counter[int] = Counter()  # steps that the networks took, by the number of pictures in them

    def step(self, joining: Sequence[Ticket] = ()) -> None:
        """Let requests join, leave out those that were cancelled, and let all others take their next step."""
        self._leave()
        for ticket in joining:
            try:
                self._join(ticket)
            except ValueError as error:
                self.settle(ticket, error=error)
            except Exception as error:  # out of memory, or a programming error: it must not end the others
                self._fail([ticket], error)
        for batch_key in dict.fromkeys(ticket.batch_key for ticket in self.running):
            group = [ticket for ticket in self.running if ticket.batch_key == batch_key]
            try:
                self._draw(group)
            except Exception as error:
                self._fail(group, error)
        self._leave()

    def _leave(self) -> None:
        """Leave out those that have a picture, an error or were cancelled."""
        self.running = {ticket: image for ticket, image in self.running.items() if not ticket.picture.done()}
        self._load(())
        if not self.running:
            self.drawing.pause()

    def _join(self, ticket: Ticket) -> None:
        names, problems = self._load(ticket.entries)
        for entry in ticket.entries:
            if entry.key in problems:
                self.library.refuse(entry, problems[entry.key])
                raise ValueError(f"adapter '{entry.name}': {problems[entry.key]}")
        pairs = zip(ticket.entries, ticket.request.adapters, strict=True)
        mixture = {names[entry.key]: weight for entry, (_, weight) in pairs}
        self.running[ticket] = self.drawing.start(ticket.request, mixture)

    def _load(self, entries: Sequence[AdapterEntry]) -> tuple[dict, dict]:
        """Load adapters, and unload those beyond the limit of memory, but none that the running batch uses."""
        needed = [entry for ticket in self.running for entry in ticket.entries] + list(entries)
        if not self.cache.will_change(needed):
            return self.cache.load(needed)
        self.drawing.pause()
        try:
            return self.cache.load(needed)
        finally:
            self.drawing.refresh(self.running.values())

    def _draw(self, group: list[Ticket]) -> None:
        """Take a step of requests with equal batch keys, and answer those whose last step it was."""
        if stepping := [image for image in map(self.running.get, group) if not image.is_done]:
            self.drawing.step(stepping)
            self.batch_sizes[len(stepping)] += 1
        for ticket in group:
            ticket.progress = self.running[ticket].step / self.running[ticket].num_steps
        if done := [ticket for ticket in group if self.running[ticket].is_done]:
            images = self.drawing.images([self.running[ticket] for ticket in done])
            for ticket, image in zip(done, images, strict=True):
                if torch.isfinite(image).all():
                    self.settle(ticket, picture=picture_of(image))
                else:
                    self.settle(ticket, error=RuntimeError("the picture has values that are not finite"))

    def _fail(self, group: list[Ticket], error: Exception) -> None:
        """Answer a request with an error; of several, each goes on alone, since one of them may be the cause."""
        logger.error("%d of %d pictures were not drawn", len(group), len(self.running), exc_info=error)
        self.drawing.pause()
        if len(group) == 1:
            self.settle(group[0], error=error)
        for ticket in group:
            ticket.batch_key = (*ticket.batch_key, ticket)
