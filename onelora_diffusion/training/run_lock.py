"""The lock of a run's folder, and the seconds that the run has used, which are saved there.

`clock.json` contains the seconds, the process and its machine. Whether a run is active is told by a lock on
`clock.lock`, not by the existence of that file: the lock ends with the process, however that ends, and processes that
load images do not inherit it.
"""

import json
import os
import platform
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from accelerate import Accelerator
from filelock import FileLock, Timeout

from onelora_diffusion.processes import told_by_main
from onelora_diffusion.training.stopping import Clock

CLOCK, LOCK = "clock.json", "clock.lock"
BEAT = 0.1  # seconds between two writes, which is the most that the count misses after a kill
SIZE = 512  # bytes of the file; a single write of a fixed size can be neither incomplete nor too large


class RunLock(AbstractContextManager):
    """Context manager that locks the folder of a run, so that no other run writes into it.

    The main process holds the lock. A new folder into which nothing was written is removed at the end. OSError, on
    every process, if the folder cannot be written, or another process has locked it.
    """

    def __init__(self, folder: Path, accelerator: Accelerator):
        self.path = folder / CLOCK
        self.lock = FileLock(folder / LOCK, timeout=0)
        self.seconds: float = told_by_main(accelerator, self._take)  # that earlier starts of the run have used

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
        self.write(seconds)
        return seconds

    def __exit__(self, *exception) -> None:
        if not self.lock.is_locked:
            return
        self.file.close()
        folder, lock = self.path.parent, Path(self.lock.lock_file)
        if self.is_new and {*folder.iterdir()} <= {self.path, lock}:
            self.path.unlink()
            with suppress(OSError):  # not every system can remove an open file
                lock.unlink()
                for each in self.made:
                    each.rmdir()
        self.lock.release()

    @contextmanager
    def counting(self, clock: Clock) -> Iterator[None]:
        """Context manager in which the clock's seconds are saved in the folder continuously."""
        if not self.lock.is_locked:
            yield
            return
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(BEAT):
                self.write(clock.seconds)

        self.write(clock.seconds)
        beating = threading.Thread(target=beat, daemon=True)
        beating.start()
        try:
            yield
        finally:
            ended.set()
            beating.join()
            self.write(clock.seconds)

    def _read(self) -> dict:
        """The content of the file; {} if it is new or damaged, as the newest checkpoint also has the seconds."""
        try:
            found = json.loads(self.path.read_bytes()[:SIZE])
            return found if found["seconds"] >= 0 else {}
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return {}

    def write(self, seconds: float) -> None:
        """Save the seconds that the run has used."""
        line = json.dumps({"seconds": seconds, "process": os.getpid(), "machine": platform.node()})
        with suppress(OSError):  # the next write may succeed, and a run does not end because of its clock
            self.file.seek(0)
            self.file.write(line.ljust(SIZE - 1).encode() + b"\n")
