"""Share results and errors among the processes of a run, on one or several machines, with or without a shared disk."""

import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

T = TypeVar("T")


def told_by_main(accelerator: Accelerator, tell: Callable[[], T]) -> T:
    """Call `tell` on the main process and return its result on all; its OSError or ValueError is raised on all."""
    found: list = [None]
    if accelerator.is_main_process:
        try:
            found = [tell()]
        except (OSError, ValueError) as error:
            found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def say(accelerator: Accelerator, text: str) -> None:
    """Print once in all; accelerate's own print prints once on each machine."""
    if accelerator.is_main_process:
        print(text, flush=True)


def on_every_process(accelerator: Accelerator, make: Callable[[], T]) -> T:
    """Call `make` on every process and return its own result; if one fails, all raise an error that names it."""
    made, error = None, None
    try:
        made = make()
    except (OSError, ValueError, ModuleNotFoundError) as caught:
        error = caught
    said = gather_object([error and str(error)])
    if error is not None and (accelerator.is_main_process or said[0] is not None):
        raise error
    for number, each in enumerate(said):
        if each is not None:
            raise ValueError(f"process {number} of {accelerator.num_processes}: {each}")
    return made


def check_equal(accelerator: Accelerator, facts: dict[str, object]) -> None:
    """ValueError on every process if the value of a fact on one process differs from that on the main process."""
    by_process = gather_object([facts])
    for number, its in enumerate(by_process):
        for name, value in by_process[0].items():
            if its[name] != value:
                raise ValueError(
                    f"{name} is {value} on process 0 and {its[name]} on process {number}: all must have the same"
                )


@contextmanager
def first_on_each_machine(accelerator: Accelerator) -> Iterator[None]:
    """Context manager that the main process enters first, then the first process of each machine, then all others.

    So a file is downloaded once on each disk and never by two processes at the same time. If the body raises an error,
    no process is left waiting.
    """
    # Where an entry is False the process waits before the body, otherwise after it.
    waits = [accelerator.is_main_process, accelerator.is_local_main_process]
    for is_first in waits:
        if not is_first:
            accelerator.wait_for_everyone()
    try:
        yield
    finally:
        if not isinstance(sys.exc_info()[1], SystemExit | KeyboardInterrupt):  # a signal reaches all processes
            for is_first in waits:
                if is_first:
                    accelerator.wait_for_everyone()


def among_sharers(folder: Path, accelerator: Accelerator) -> tuple[int, int]:
    """(index of this process among those that see the same folder, their number); the folder is created.

    With it, shared files are written once on each disk, whether machines share one or not. Every process must call it.
    """
    rank, number = accelerator.process_index, accelerator.num_processes
    if number == 1:
        folder.mkdir(parents=True, exist_ok=True)
        return 0, 1
    token = told_by_main(accelerator, lambda: secrets.token_hex(8))
    marks = [folder / f".{token}.{each}" for each in range(number)]
    folder.mkdir(parents=True, exist_ok=True)
    marks[rank].touch()
    try:
        accelerator.wait_for_everyone()
        views = gather_object([[each for each in range(number) if marks[each].exists()]])
    finally:
        marks[rank].unlink(missing_ok=True)
    # A network disk may show files of other machines late; if the views differ, each process writes everything itself.
    seen = views[rank]
    return (seen.index(rank), len(seen)) if all(views[each] == seen for each in seen) else (0, 1)
