"""A run's folder is held by one process at a time, which keeps there how much of the budget is used.

`clock.json` holds the process, its machine and the seconds. A lock on the file beside it, not its being there, says
that a run is under way: the lock ends with its process, however that ends, and is not handed on to those that load
images.
"""

import json
import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from accelerate import Accelerator
from filelock import FileLock, Timeout

from onelora_diffusion.processes import told_by_main
from onelora_diffusion.training.stopping import Clock

CLOCK, LOCK = "clock.json", "clock.lock"
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
        self.lock = FileLock(folder / LOCK, timeout=0)
        self.seconds: float = told_by_main(accelerator, self._take)

    def _take(self) -> float:
        folder = self.path.parent
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"--output-dir {folder} is a file: choose another")
        self.made = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire()
        except Timeout:
            holder = self._read()
            raise BlockingIOError(
                f"{folder} is in use by process {holder.get('process')} on {holder.get('machine')}: let that run end, "
                "or choose another --output-dir"
            ) from None
        before = self._read()
        self.is_new = not before
        seconds = before.get("seconds", 0.0)
        self.path.open("ab").close()
        self.file = self.path.open("r+b", buffering=0)
        self._write(seconds)
        return seconds

    def __enter__(self) -> "HeldFolder":
        return self

    def __exit__(self, *exception) -> None:
        if not self.lock.is_locked:
            return
        self.file.close()
        folder, lock = self.path.parent, Path(self.lock.lock_file)
        if self.is_new and {*folder.iterdir()} <= {self.path, lock}:
            self.path.unlink()
            with suppress(OSError):  # not every system removes a file that is open
                lock.unlink()
                for each in self.made:
                    each.rmdir()
        self.lock.release()

    @contextmanager
    def counting(self, clock: Clock) -> Iterator[None]:
        """Context manager: the clock's seconds are kept in the folder all along."""
        if not self.lock.is_locked:
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
            found = json.loads(self.path.read_bytes()[:SIZE])
            return found if found["seconds"] >= 0 else {}
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return {}

    def _write(self, seconds: float) -> None:
        line = json.dumps({"seconds": seconds, "process": os.getpid(), "machine": platform.node()})
        with suppress(OSError):  # the next one may succeed, and a run is not ended for its clock
            self.file.seek(0)
            self.file.write(line.ljust(SIZE - 1).encode() + b"\n")
