"""Processes and what started them.

`accelerate launch` on CPUs starts one process and leaves several to mpirun; here torchrun starts them. A launcher that
is gone takes its processes along. What accelerate's launcher asks for is read here.
"""

import ctypes
import os
import signal
import sys
import time
from argparse import Namespace
from itertools import takewhile
from pathlib import Path

import psutil
import torch
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser

LAUNCHERS = ("launch", "launch.py", "accelerate-launch", "accelerate.commands.launch")
TORCHRUN = ("torchrun", "torch.distributed.run")
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
    return any(Path(word).name in LAUNCHERS + TORCHRUN for word in _command_line(process))


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
    flags = launch_flags(command_line)
    if flags is None:
        return None, None
    if flags.config_file or (Path(default_config_file).is_file() and not flags.cpu):
        config = load_config_from_file(flags.config_file)
        for name in ("num_processes", "num_machines", "main_process_port"):
            if getattr(flags, name) is None:
                setattr(flags, name, getattr(config, name, None))
    return (flags.num_processes if flags.num_machines in (None, 1) else None), flags.main_process_port


def launch_flags(command_line: list[str]) -> Namespace | None:
    """The flags of an `accelerate launch`; None for another command."""
    first = next((i for i, word in enumerate(command_line) if Path(word).name in LAUNCHERS), None)
    return None if first is None else launch_command_parser().parse_known_args(command_line[first + 1 :])[0]


# Of accelerate's environment, what changes nothing that is computed, or what accelerate itself sees to.
ACCELERATES_OWN = {
    *("USE_CPU", "TORCH_DEVICE", "CPU_AFFINITY", "NUM_PROCESSES", "BYPASS_DEVICE_MAP", "LOG_LEVEL", "ENABLE_RICH"),
    *("DISABLE_RICH", "DEBUG_MODE", "DEBUG_RDV_FILE", "DYNAMO_USE_REGIONAL_COMPILATION"),
}
NOTHING = ("", "0", "false", "no", "none", "default")
INSTEAD = {
    "USE_FSDP": "--engine fsdp2 shares out the base; start without FSDP",
    "USE_DEEPSPEED": "--engine fsdp2 shares out the base; start without DeepSpeed",
    "MIXED_PRECISION": "choose no, bf16 or fp16",
    "DYNAMO_BACKEND": "choose no, or inductor, which is --compile",
}


def asked_by_launcher() -> dict[str, object]:
    """What accelerate's launcher, its config file or ACCELERATE_* variables ask for, by the names of settings here.

    They are of mixed_precision, compile, gradient_accumulation_steps and max_grad_norm. That a launcher asks for no
    mixed precision cannot be told from its saying nothing, and counts as that.

    Raises:
        ValueError: it asks for something else; a later accelerate may have names that nobody here has heard of.
    """
    asked: dict[str, object] = {}
    flags = next(filter(None, map(launch_flags, map(_command_line, launchers()))), Namespace())
    for name, here, kind in (
        ("gradient_accumulation_steps", "gradient_accumulation_steps", int),
        ("gradient_clipping", "max_grad_norm", float),  # which accelerate's launcher hands on to DeepSpeed alone
    ):
        value = os.environ.get(f"ACCELERATE_{name.upper()}") or getattr(flags, name, None)
        if value is not None and str(value).lower() not in NOTHING:
            try:
                asked[here] = kind(value)
            except ValueError:
                raise ValueError(f"accelerate's launcher asks for {name} {value}, which is no number") from None

    # Engines first: what is set up for one of them means nothing without it.
    names = sorted(
        (name for name in os.environ if name.startswith("ACCELERATE_")), key=lambda n: ("_USE_" not in n, n)
    )
    for variable in names:
        name, value = variable.removeprefix("ACCELERATE_"), os.environ[variable].lower()
        if value in NOTHING or name in ACCELERATES_OWN or name in ("GRADIENT_ACCUMULATION_STEPS", "GRADIENT_CLIPPING"):
            continue
        if name == "MIXED_PRECISION" and value in ("bf16", "fp16"):
            asked["mixed_precision"] = value
        elif name == "DYNAMO_BACKEND" and value == "inductor":
            asked["compile"] = True
        else:
            raise ValueError(
                f"accelerate's launcher, its config file or the environment asks by {variable} for "
                f"{os.environ[variable]}, which cannot be had here: {INSTEAD.get(name, 'take it out')}"
            )
    return asked


def precision_asked_by_launcher() -> dict[str, object]:
    """Of the same, what concerns those that do not train: mixed_precision and compile."""
    return {name: value for name, value in asked_by_launcher().items() if name in ("mixed_precision", "compile")}


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # of another user, or gone
        return []
