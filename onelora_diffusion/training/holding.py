"""A run's folder is held by one process at a time, which keeps there how much of the budget is used.

`clock.json` holds the process, its machine and the seconds. A lock on it, not its being there, says that a run is
under way: the lock ends with its process, however that ends, and is not handed on to those that load images.
"""

import fcntl
import json
import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from onelora_diffusion.training.stopping import Clock

CLOCK = "clock.json"
BEAT = 0.1  # seconds between two lines in it: what a kill can take from the count
SIZE = 512  # bytes of it, always: written in place and at once, it can be neither half written nor too large


class HeldFolder:
    """Context manager: the folder of a run, which is this run's alone until the end.

    The main process of several holds it. A start that writes nothing into a new folder leaves none.

    Attributes:
        seconds: what the run had used when it last held the folder, 0 for a new one.

    Raises:
        OSError: the folder cannot be written, or another process holds it; on every process.
    """

    def __init__(self, folder: Path, accelerator: Accelerator):
        self.path = folder / CLOCK
        self.descriptor: int | None = None
        found: list = [0.0]
        if accelerator.is_main_process:
            try:
                found = [self._take()]
            except OSError as error:
                found = [str(error)]
        broadcast_object_list(found)
        if isinstance(found[0], str):
            raise OSError(found[0])
        self.seconds: float = found[0]

    def _take(self) -> float:
        folder = self.path.parent
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"--output-dir {folder} is a file: choose another")
        while True:
            self.made = [each for each in (folder, *folder.parents) if not each.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.lockf(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                holder = self._read()
                os.close(self.descriptor)
                where = f"process {holder.get('process')} on {holder.get('machine')}"
                raise BlockingIOError(
                    f"{folder} is in use by {where}: let that run end, or choose another --output-dir"
                ) from None
            with suppress(FileNotFoundError):
                if os.path.samestat(os.stat(self.path), os.fstat(self.descriptor)):
                    break
            os.close(self.descriptor)  # the one who held it has just removed it
        before = self._read()
        self.is_new = not before
        seconds = before.get("seconds", 0.0)
        self._write(seconds)
        return seconds

    def __enter__(self) -> "HeldFolder":
        return self

    def __exit__(self, *exception) -> None:
        if self.descriptor is None:
            return
        if self.is_new and list(self.path.parent.iterdir()) == [self.path]:
            self.path.unlink()
            for folder in self.made:
                folder.rmdir()
        os.close(self.descriptor)

    @contextmanager
    def counting(self, clock: Clock) -> Iterator[None]:
        """Context manager: the clock's seconds are kept in the folder all along."""
        if self.descriptor is None:
            yield
            return
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(BEAT):
                self._write(clock.seconds)

        self._write(clock.seconds)
        beating = threading.Thread(target=beat, daemon=True)
        beating.start()
        try:
            yield
        finally:
            ended.set()
            beating.join()
            self._write(clock.seconds)

    def _read(self) -> dict:
        """What stands in the file; nothing if it is new or damaged: the newest checkpoint has its seconds too."""
        try:
            found = json.loads(os.pread(self.descriptor, SIZE, 0))
            return found if found["seconds"] >= 0 else {}
        except (ValueError, KeyError, TypeError):
            return {}

    def _write(self, seconds: float) -> None:
        line = json.dumps({"seconds": seconds, "process": os.getpid(), "machine": platform.node()})
        with suppress(OSError):  # the next one may succeed, and a run is not ended for its clock
            os.pwrite(self.descriptor, line.ljust(SIZE - 1).encode() + b"\n", 0)
