"""The edge of the scripts: errors and signals in one line, with nothing left behind."""

import logging
import re
import shlex
import shutil
import signal
import subprocess
import sys

import diffusers
import pytest
import torch
from launching import REPOSITORY
from packaging.version import Version
from tiny_models import make_dit

import onelora
from onelora_diffusion.cli import train_dit
from onelora_diffusion.command_line import MODULES, command, one_line_errors, quieten, typed_as


def write_and_wait(path):
    """A script that is in the midst of a file when a signal comes."""
    script = f"""
import time
from pathlib import Path
from onelora_diffusion.command_line import one_line_errors
from onelora_diffusion.files import written_beside

@one_line_errors("script.py")
def main():
    with written_beside(Path({str(path)!r})) as part:
        part.write_text("half")
        print("writing", flush=True)
        time.sleep(100)

main()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "writing\n"
    return process


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_is_one_line_and_leaves_nothing(tmp_path, number, name):
    process = write_and_wait(tmp_path / "result.json")
    process.send_signal(number)
    _, said = process.communicate()
    assert said == f"script.py: stopped by {name}\n" and process.returncode == 128 + number
    assert list(tmp_path.iterdir()) == []


def test_a_signal_that_comes_twice_does_not_cut_the_cleaning_short(capsys):
    cleaned = []
    with pytest.raises(SystemExit) as caught, one_line_errors("script.py"):
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            cleaned.append(True)
    assert caught.value.code == 128 + signal.SIGINT and cleaned
    assert capsys.readouterr().err == "script.py: stopped by Ctrl-C\n"


def test_what_was_ignored_stays_ignored_and_handlers_come_back():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with one_line_errors("script.py"):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    with one_line_errors("script.py"):
        pass
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize(
    ("process", "same_everywhere", "code"),
    [
        ("0", True, "script.py: no class 12"),
        ("1", True, 1),
        ("0", False, "script.py: no class 12"),
        ("1", False, "script.py, process 1: no class 12"),
    ],
)
def test_who_speaks_of_an_error(monkeypatch, process, same_everywhere, code):
    monkeypatch.setenv("RANK", process)
    with pytest.raises(SystemExit) as caught, one_line_errors("script.py", same_everywhere=same_everywhere):
        raise ValueError("no class 12")
    assert caught.value.code == code


def test_an_error_of_the_system_is_told_without_its_number(tmp_path):
    with pytest.raises(SystemExit) as caught, one_line_errors("script.py"):
        (tmp_path / "none").read_bytes()
    assert caught.value.code == f"script.py: {tmp_path / 'none'}: No such file or directory"


@pytest.mark.parametrize(
    ("started", "typed", "following"),
    [
        ("/env/bin/onelora", "onelora eval-fid", ["onelora", "eval-fid"]),
        ("/other/bin/onelora", "onelora eval-fid", ["/other/bin/onelora", "eval-fid"]),
        ("/code/onelora.py", "onelora eval-fid", ["python", "/code/onelora.py", "eval-fid"]),
        (f"{REPOSITORY}/train_dit.py", "eval_fid.py", ["python", f"{REPOSITORY}/eval_fid.py"]),
        (f"{MODULES}/train_dit.py", "eval_fid.py", ["python", "-m", "onelora_diffusion.cli.eval_fid"]),  # by -m
        ("/code/a_notebook.py", "eval_fid.py", ["python", "-m", "onelora_diffusion.cli.eval_fid"]),
    ],
)
def test_errors_and_next_commands_have_the_form_of_what_was_typed(monkeypatch, started, typed, following):
    monkeypatch.setattr(sys, "argv", [started])
    monkeypatch.setattr(shutil, "which", {"python": sys.executable, "onelora": "/env/bin/onelora"}.get)
    assert typed_as("eval_fid.py") == typed
    assert shlex.split(command("eval_fid.py", "--adapter", "a b")) == [*following, "--adapter", "a b"]
    with pytest.raises(SystemExit, match=f"^{typed}: no class 12$"), one_line_errors("eval_fid.py"):
        raise ValueError("no class 12")


def test_onelora_lists_its_commands_before_torch_is_imported():
    code = "import atexit, sys, onelora; atexit.register(lambda: print('torch' in sys.modules)); onelora.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0 and done.stdout.endswith("False\n")
    assert re.findall(r"^    (\S+)", done.stdout, re.MULTILINE) == [*onelora.COMMANDS]
    assert {name.replace("-", "_") for name in onelora.COMMANDS} == {path.stem for path in MODULES.glob("[a-z]*.py")}


def test_onelora_hands_on_the_words_and_the_exit_code(monkeypatch, capsys):
    def handed(*words):
        monkeypatch.setattr(sys, "argv", ["/env/bin/onelora", *words])
        with pytest.raises(SystemExit) as caught:
            onelora.main()
        return caught.value.code

    monkeypatch.setattr(train_dit, "run", lambda arguments: arguments)
    assert handed("train-dit", "--help", "--", "-m", "sample") == ["--help", "--", "-m", "sample"]
    monkeypatch.setattr(onelora, "module_of", {})  # nothing is looked for
    assert handed("train_dit") == 2
    assert "invalid choice: 'train_dit' (choose from" in capsys.readouterr().err


def test_a_shell_completes_the_flags_of_every_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["onelora", "--tyro-print-completion", "bash"])
    with pytest.raises(SystemExit):
        onelora.main()
    script = capsys.readouterr().out
    for word in (*onelora.COMMANDS, "--rates-by-sum", "--caption-drop", "--beside-base", "sweep", "--adapter-memory"):
        assert word in script


@pytest.mark.skipif(
    Version(diffusers.__version__) < Version("0.39"), reason="diffusers before 0.39 says nothing when it is cast"
)
def test_a_cast_says_which_modules_should_be_float32_only_where_there_are_any():
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("diffusers.models.modeling_utils")
    logger.addHandler(handler)
    try:
        quieten()
        model = make_dit()
        model.to(torch.bfloat16)
        assert said == []
        model._keep_in_fp32_modules = ["proj_out_2"]
        model.to(torch.float32)
        assert len(said) == 1 and "should be kept in float32: ['proj_out_2']" in said[0]
    finally:
        logger.removeHandler(handler)
