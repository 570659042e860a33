"""Launchers: start several processes on CPUs, end with the launcher, and read the options of accelerate's launcher.

`accelerate launch` on CPUs starts one process, and several only through mpirun; here torchrun starts them.
"""

import ctypes
import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser

from onelora_diffusion.command_line import one_line_errors, quieten

T = TypeVar("T")
LAUNCHERS = ("launch", "launch.py", "accelerate-launch", "accelerate.commands.launch")
TORCHRUN = ("torchrun", "torch.distributed.run")
PR_SET_PDEATHSIG = 1  # from Linux's <sys/prctl.h>


def start_all_processes() -> None:
    """Replace this process by torchrun if `accelerate launch` was to start several processes on CPUs but started one.

    A script calls this first. In all other cases it does nothing. The process id stays the same, so signals arrive.
    When the launcher ends, torchrun gets SIGTERM and passes it on.
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
    # Port 0 stands for any free one. The address is given, since resolving the host's own name may be slow or fail.
    where = [f"--master_port={port}"] if port else ["--standalone", "--local_addr=127.0.0.1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={number}", *where]
    os.execv(sys.executable, [*torchrun, *sys.orig_argv[1:]])


def begin(script: str, parse: Callable[[], T]) -> T:
    """What a script does first that runs on several processes; returns the settings that `parse` reads."""
    start_all_processes()
    quieten()
    with one_line_errors(script, same_everywhere=True):
        return parse()


def launchers() -> list[psutil.Process]:
    """The launchers that started this process, nearest first: torchrun, `accelerate launch`, both or none."""
    return list(takewhile(_is_launcher, psutil.Process().parents()))


def _is_launcher(process: psutil.Process) -> bool:
    return any(Path(word).name in LAUNCHERS + TORCHRUN for word in _command_line(process))


def started() -> float:
    """The `time.monotonic()` at which this process or the first of its launchers began."""
    first = [psutil.Process(), *launchers()][-1]
    return time.monotonic() - max(0.0, time.time() - first.create_time())


def end_with_launcher() -> None:
    """Ask Linux to send this process SIGTERM when its launcher ends; other systems cannot.

    Otherwise the processes of a killed launcher would go on training and keep the devices.
    """
    found = launchers()
    if found and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != found[0].pid:  # the launcher has ended in the meantime
            os.kill(os.getpid(), signal.SIGTERM)


def is_left_alone() -> bool:
    """Whether accelerate's launcher set an address for several processes but started only this one."""
    started_by = ("RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
    is_on_cpu = os.environ.get("ACCELERATE_USE_CPU") == "True" or not torch.accelerator.is_available()
    is_several = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    return is_on_cpu and is_several and not any(name in os.environ for name in started_by)


def processes_asked_for(command_line: list[str]) -> tuple[int | None, int | None]:
    """(number of processes, their port or None) of an `accelerate launch` command line.

    The number is None if it is not known, or if there are several machines.
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


# Variables of accelerate's environment that do not affect the computation, or that accelerate itself handles.
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
    """The options of accelerate's launcher, its config file or ACCELERATE_* variables, by the names of settings here.

    They are mixed_precision, compile, gradient_accumulation_steps and max_grad_norm. A launcher's mixed precision "no"
    cannot be told from an absent option, and is taken for that. ValueError for another one, perhaps of a later
    accelerate.
    """
    asked: dict[str, object] = {}
    flags = next(filter(None, map(launch_flags, map(_command_line, launchers()))), Namespace())
    for name, here, kind in (
        ("gradient_accumulation_steps", "gradient_accumulation_steps", int),
        ("gradient_clipping", "max_grad_norm", float),  # accelerate's launcher passes it on to DeepSpeed alone
    ):
        value = os.environ.get(f"ACCELERATE_{name.upper()}") or getattr(flags, name, None)
        if value is not None and str(value).lower() not in NOTHING:
            try:
                asked[here] = kind(value)
            except ValueError:
                raise ValueError(f"accelerate's launcher asks for {name} {value}, which is no number") from None

    # Engines come first, since options of an engine mean nothing without it.
    names = sorted((n for n in os.environ if n.startswith("ACCELERATE_")), key=lambda n: ("_USE_" not in n, n))
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
    """Those of these options that matter outside training: mixed_precision and compile."""
    return {name: value for name, value in asked_by_launcher().items() if name in ("mixed_precision", "compile")}


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # the process is another user's, or has ended
        return []
