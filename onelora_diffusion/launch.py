"""Processes and what started them.

`accelerate launch` on CPUs starts one process and leaves several to mpirun; here torchrun starts them. And a launcher
that is gone takes its processes along.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import broadcast_object_list

LAUNCHERS = ("launch", "launch.py", "accelerate-launch", "accelerate.commands.launch")
TORCHRUN = ("torchrun", "torch.distributed.run")
T = TypeVar("T")
PR_SET_PDEATHSIG = 1  # of Linux's <sys/prctl.h>


def start_all_processes() -> None:
    """Gives way to torchrun where `accelerate launch` was asked for several processes on CPUs and has started one.

    To be called first in a script. Everywhere else it does nothing. The process id stays, so that signals arrive; and
    SIGTERM arrives too when the launcher ends, also at torchrun, which passes it on.
    """
    end_with_launcher()
    if not is_left_alone():
        return
    number, port = processes_asked_for(psutil.Process().parent().cmdline())
    if number == 1:
        return
    if number is None:
        command = f"torchrun --nproc_per_node N {' '.join(sys.orig_argv[1:])}"
        raise SystemExit(f"accelerate launch has started one process on the CPU; start several by: {command}")
    # Port 0 is any that is free. The address is named, for a host's own name may be slow to resolve, or not do so.
    where = [f"--master_port={port}"] if port else ["--standalone", "--local_addr=127.0.0.1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={number}", *where]
    os.execv(sys.executable, [*torchrun, *sys.orig_argv[1:]])


def launchers() -> list[psutil.Process]:
    """The launchers that have started this process, the nearest first: torchrun, `accelerate launch`, both or none."""
    return list(takewhile(_is_launcher, psutil.Process().parents()))


def _is_launcher(process: psutil.Process) -> bool:
    try:
        return any(Path(word).name in LAUNCHERS + TORCHRUN for word in process.cmdline())
    except psutil.Error:  # of another user, or gone
        return False


def started() -> float:
    """The `time.monotonic()` at which this process began, or the first of its launchers."""
    first = [psutil.Process(), *launchers()][-1]
    return time.monotonic() - max(0.0, time.time() - first.create_time())


def end_with_launcher() -> None:
    """Has this process sent SIGTERM when its launcher ends, in whatever way. Linux alone can do so.

    Else, where a launcher was killed, its processes would train on, and keep the devices.
    """
    found = launchers()
    if found and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != found[0].pid:  # it has ended in between
            os.kill(os.getpid(), signal.SIGTERM)


def is_left_alone() -> bool:
    """Whether accelerate's launcher named a meeting point for several processes, and started no others."""
    started_by = ("RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
    is_on_cpu = os.environ.get("ACCELERATE_USE_CPU") == "True" or not torch.accelerator.is_available()
    is_several = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    return is_on_cpu and is_several and not any(name in os.environ for name in started_by)


def processes_asked_for(command_line: list[str]) -> tuple[int | None, int | None]:
    """The number of processes, and their port if one was named, of an `accelerate launch`.

    The number is None if it cannot be known, or if it is that of several machines.
    """
    first = next((i for i, word in enumerate(command_line) if Path(word).name in LAUNCHERS), None)
    if first is None:
        return None, None
    flags, _ = launch_command_parser().parse_known_args(command_line[first + 1 :])
    if flags.config_file or (Path(default_config_file).is_file() and not flags.cpu):
        config = load_config_from_file(flags.config_file)
        for name in ("num_processes", "num_machines", "main_process_port"):
            if getattr(flags, name) is None:
                setattr(flags, name, getattr(config, name, None))
    return (flags.num_processes if flags.num_machines in (None, 1) else None), flags.main_process_port


def told_by_main(accelerator: Accelerator, tell: Callable[[], T]) -> T:
    """What the main process finds out, on every process: an OSError or ValueError that it meets is raised on all."""
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
