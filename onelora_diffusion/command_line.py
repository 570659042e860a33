"""What all commands share: flags, and errors that are printed as one line after clean-up, without a traceback."""

import contextlib
import dataclasses
import importlib.util
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

MODULES = Path(__file__).with_name("cli")  # the modules that `python -m` and `accelerate launch -m` start


class Stopped(SystemExit):
    """Raised for Ctrl-C or SIGTERM, so that every `finally` cleans up; its code is 128 + signal."""


@contextlib.contextmanager
def one_line_errors(script: str, *, same_everywhere: bool = False) -> Iterator[None]:
    """Context manager or decorator: ends the script with one line for a wrong value, a full disk, Ctrl-C or SIGTERM.

    The line, or 128 + signal, is the code of a SystemExit, and begins with the command as it was typed. Errors that
    are `same_everywhere`, such as wrong flags, are printed by the first process of each machine alone.
    """
    process, script = int(os.environ.get("RANK", "0")), typed_as(script)
    on_machine = int(os.environ.get("LOCAL_RANK", process))
    speaker = script if process == 0 else f"{script}, process {process}"
    # If the script was started with Ctrl-C ignored (by nohup or in the background), it stays ignored.
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]

    def stop(number: int, frame) -> None:
        for each in numbers:  # further signals are ignored: launchers repeat those that the terminal has sent
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(128 + number)

    handlers = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    except Stopped as stopped:
        if process == 0:
            name = signal.Signals(stopped.code - 128).name
            print(f"{script}: stopped by {'Ctrl-C' if name == 'SIGINT' else name}", file=sys.stderr)
        raise
    except (ValueError, OSError, ModuleNotFoundError) as error:
        is_systems = isinstance(error, OSError) and error.filename
        said = f"{error.filename}: {error.strerror}" if is_systems else error
        raise SystemExit(1 if same_everywhere and on_machine else f"{speaker}: {said}") from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def with_switches(arguments: list[str], settings: type) -> list[str]:
    """Rewrite `--bias` and `--no-bias` for tyro, which has no such switches for settings that may also be None."""
    switches = {f"--{_dashed(field.name)}" for field in dataclasses.fields(settings) if field.type == bool | None}
    words = []
    for word, following in zip(arguments, [*arguments, ""][1:], strict=True):
        flag = _dashed(word)
        if flag in switches and following not in ("True", "False", "None"):
            words += [flag, "True"]
        elif flag.replace("--no-", "--", 1) in switches and flag.startswith("--no-"):
            words += [flag.replace("--no-", "--", 1), "False"]
        else:
            words.append(word)
    return words


def check_flags(arguments: list[str], elsewhere: dict[str, str]) -> None:
    """ValueError for the first flag that only other scripts have, naming its counterpart here."""
    for word in arguments:
        flag = word.split("=")[0]
        if flag.startswith("--") and (here := elsewhere.get(flag[2:].replace("-", "_"))):
            raise ValueError(f"{flag} is a name of other scripts; here there is {here}")


def check_installed(what: str, package: str | None) -> None:
    """ValueError if a package is missing that a flag, or what is named, needs; None is none."""
    if package and importlib.util.find_spec(package) is None:
        extra = '"onelora-diffusion[track]"' if package == "tensorboard" else package
        raise ValueError(f"{what} needs a package that is missing: pip install {extra}")


def typed_as(script: str) -> str:
    """The name of a script as it was typed: `onelora eval-fid`, or its file's name, `eval_fid.py`."""
    return f"onelora {_dashed(Path(script).stem)}" if _is_onelora() else script


def command(script: str, *words: object) -> str:
    """The shell command that starts another script in the same way as this one, in this environment and folder."""
    started, name, python = Path(sys.argv[0]), Path(script).stem, _on_path("python", sys.executable)
    if _is_onelora():
        is_program = started.suffix != ".py"
        listed = [*([_on_path("onelora", str(started))] if is_program else [python, str(started)]), _dashed(name)]
    elif started.with_name(script).is_file() and started.parent != MODULES:
        listed = [python, str(started.with_name(script))]
    else:
        listed = [python, "-m", f"onelora_diffusion.cli.{name}"]
    listed += map(str, words)
    return subprocess.list2cmdline(listed) if sys.platform == "win32" else shlex.join(listed)


def _is_onelora() -> bool:
    return Path(sys.argv[0]).stem == "onelora"


def _on_path(name: str, path: str) -> str:
    """The name of a program if the shell finds it by its name, else its path."""
    found = shutil.which(name)
    # Links are not resolved, since those of several environments lead to the same file.
    return name if found and os.path.abspath(found) == os.path.abspath(path) else path


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def quieten() -> None:
    """Hide two messages of diffusers that do not help users of scripts: its loading bar, and an empty warning."""
    from diffusers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.getLogger("diffusers.models.modeling_utils").addFilter(
        lambda record: "should be kept in float32: []" not in record.getMessage()
    )
