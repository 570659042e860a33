"""What the routes of the server share: its queue, its folder of adapters, and whether it is starting or ending."""

import asyncio
import hashlib
import os
import re
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from onelora_diffusion.files import printable, write_bytes
from onelora_diffusion.serving.batching import Batcher
from onelora_diffusion.serving.library import MAX_DEPTH, SKIPPED, AdapterEntry, UnknownAdapter, without_path
from onelora_diffusion.serving.queue import Ticket
from onelora_diffusion.storage.adapter_file import read_opened
from onelora_diffusion.storage.opening import opened

POLL_S = 0.2  # seconds between two reports of the progress
NAME_PART = re.compile(r"\w[\w.-]{0,99}")


class NotReady(RuntimeError):
    """The base is being loaded, or the server is being stopped."""


class Gone(Exception):
    """The client has hung up."""


@dataclass
class Progress:
    """The pictures of a request as they are on the way: their place in the queue, and the share that is drawn."""

    place: int
    share: float


class Service:
    """What the routes of the API ask."""

    def __init__(self, base: str, uploads: Path, guidance_scale: float = 4.0, request_timeout: float = 600.0):
        self.base = base  # its name, which saved pictures contain
        self.uploads = uploads  # the folder into which adapters are written that clients send
        self.guidance_scale = guidance_scale  # with which the page begins
        self.request_timeout = request_timeout  # seconds after which pictures that are not drawn are given up
        self.batcher: Batcher | None = None
        self.base_digest, self.is_draining = "", False

    def start(self, batcher: Batcher) -> None:
        """Begin to take requests."""
        transformer = batcher.drawing.transformer
        self.base_digest = digest_of_base(batcher.drawing.pipeline)
        with torch.device("meta"):  # for checks of adapters, beside the thread that draws
            self._skeleton = type(transformer).from_config(transformer.config)
        self.batcher = batcher

    def drain(self, timeout: float) -> None:
        """Refuse new requests, draw those that wait for at most `timeout` seconds, and give up the others."""
        self.is_draining = True
        if self.batcher is not None:
            drained = threading.Thread(target=self.batcher.drain, daemon=True)
            drained.start()
            drained.join(timeout)
            self.batcher.close()

    @property
    def problem(self) -> str | None:
        """Why no pictures are drawn now, in one line."""
        if self.is_draining:
            return "the server is being stopped; ask another one, or again later"
        if self.batcher is None:
            return "the server is starting; ask again later"
        return None if self.batcher.is_alive else "the server draws nothing any more, since its thread has ended"

    def ready(self) -> Batcher:
        if self.problem:
            raise NotReady(self.problem)
        return self.batcher

    def weights(self, model: str) -> dict[str, float]:
        """The adapters that a model's name stands for: none for the base, an adapter, or `food:0.7+birds:0.3`.

        ValueError if an adapter is named twice, or a part has no name.
        """
        library = self.ready().library
        if library.find(model):
            return {model: 1.0}
        if model == self.base:
            return {}
        weights: dict[str, float] = {}
        for part in model.split("+"):
            name, _, weight = part.rpartition(":")
            if library.find(part) or not re.fullmatch(r"-?\d{1,3}(\.\d{1,9})?", weight):
                name, weight = part, "1"
            if not name:
                raise ValueError(f"model is '{model[:60]}'; give an adapter, or a mixture such as food:0.7+birds:0.3")
            if name in weights:
                raise ValueError(f"model is '{model[:60]}': {name[:60]} is in it twice")
            weights[name] = float(weight)
        return weights

    def digests(self, ticket: Ticket) -> dict:
        return {"base": self.base_digest, "adapters": {entry.name: entry.digest for entry in ticket.entries}}

    def settings(self, ticket: Ticket) -> dict:
        """What draws the picture of a ticket again, as a saved PNG has it inside."""
        return {"base": self.base, "digests": self.digests(ticket), "request": ticket.request.as_json()}

    def warnings(self, expected: dict, tickets: Sequence[Ticket]) -> list[str]:
        """In which of the digests that a client expects, those of a saved picture, the base or an adapter differs."""
        found, said = [self.digests(ticket) for ticket in tickets], []
        if expected.get("base") not in (None, self.base_digest):
            said.append(f"the base '{self.base}' is another than the one that drew the picture before")
        adapters = {name: digest for each in found for name, digest in each["adapters"].items()}
        for name, digest in expected.get("adapters", {}).items():
            if name in adapters and adapters[name] != digest:
                said.append(f"adapter '{name}' is another than the one that drew the picture before")
        return said

    async def follow(self, tickets: Sequence[Ticket], gone: "asyncio.Future", poll: float | None) -> AsyncIterator:
        """Yield (index, ticket) as each picture is drawn or has failed, and `Progress` every `poll` seconds.

        At the end, also of an abandoned iteration, all pictures that are not drawn are given up. Gone if the client
        has hung up, as `gone` tells; TimeoutError if the pictures were not drawn in `request_timeout` seconds.
        """
        clock = asyncio.get_running_loop().time
        end, waiting = clock() + self.request_timeout, {}
        for index, ticket in enumerate(tickets):
            waiting[asyncio.wrap_future(ticket.picture)] = index
        try:
            while waiting:
                left = end - clock()
                if left <= 0:
                    raise TimeoutError(f"not drawn within {self.request_timeout:g} s, and given up")
                done, _ = await asyncio.wait(
                    {gone, *waiting}, timeout=min(left, poll or left), return_when=asyncio.FIRST_COMPLETED
                )
                if gone in done:
                    raise Gone
                for future in done:
                    future.exception()
                    index = waiting.pop(future)
                    yield index, tickets[index]
                if not done and poll:
                    rest = [tickets[index] for index in waiting.values()]
                    share = sum(ticket.progress for ticket in tickets) / len(tickets)
                    yield Progress(rest[0].place(), min(share, 1.0))  # the others wait behind it
        finally:
            for future in (gone, *waiting):
                future.cancel()
            for ticket in tickets:
                ticket.cancel()

    def put(self, name: str, content: bytes) -> AdapterEntry:
        """Write an adapter's file, or replace it: once it was checked, as a whole or not at all.

        ValueError if the name is none that can be written, or the file no adapter that can be drawn with here.
        """
        library, path = self.ready().library, self._path(name)
        try:
            with opened(path, content) as file:
                adapter = read_opened(file, self._skeleton)
            library.check(adapter)
        except ValueError as error:
            raise ValueError(f"adapter '{name}': {without_path(path, str(error))}") from error
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)
        library.rescan()
        return library.entry(name)

    def delete(self, name: str) -> None:
        """Remove an adapter's file; UnknownAdapter if there is none of this name in the folder of uploads."""
        library = self.ready().library
        entry = library.find(name)
        if entry is None or not self._is_own(entry.path):
            raise UnknownAdapter(f"no adapter '{printable(name, 60)}' that can be deleted")
        entry.path.unlink(missing_ok=True)
        library.rescan()

    def _path(self, name: str) -> Path:
        parts = name.split("/")
        is_name = len(parts) <= MAX_DEPTH + 1 and all(NAME_PART.fullmatch(part) for part in parts)
        if not is_name or SKIPPED & set(parts):
            raise ValueError(
                f"'{printable(name, 60)}' is no name for an adapter: give letters, digits, '_', '.' and '-', in up to "
                f"{MAX_DEPTH} folders"
            )
        entry = self.ready().library.find(name)
        path = self.uploads.resolve().joinpath(*parts[:-1], f"{parts[-1]}.safetensors")
        if entry is not None and self._is_own(entry.path):
            path = entry.path
        if path.is_symlink() or not self._is_own(Path(os.path.realpath(path))):
            raise ValueError(f"adapter '{name}' is a link, which is not replaced")
        return path

    def _is_own(self, path: Path) -> bool:
        return path.is_relative_to(self.uploads.resolve())


def digest_of_base(pipeline) -> str:
    """SHA-256 of some values of every tensor of a pipeline, rounded to bfloat16: of other weights it is another.

    At most 1024 values of a tensor are taken, at equal distances, so that the largest base takes seconds.
    """
    sha256 = hashlib.sha256()
    for part, module in sorted(pipeline.components.items()):
        for name, tensor in module.state_dict().items() if isinstance(module, torch.nn.Module) else ():
            if type(tensor) is torch.Tensor and tensor.is_floating_point():
                flat = tensor.detach().reshape(-1)
                values = flat[:: -(-len(flat) // 1024) or 1].to("cpu", torch.bfloat16)
                sha256.update(f"{part} {name} {tuple(tensor.shape)}".encode())
                sha256.update(values.contiguous().view(torch.uint8).numpy())
    return sha256.hexdigest()
