import os
import signal
import sys
import time

import pytest

from onelora_diffusion import launch

ACCELERATE = ["/usr/bin/python", "/usr/bin/accelerate", "launch"]


@pytest.fixture(autouse=True)
def no_default_config(monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "default_config_file", str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--num_processes 2 --cpu train.py --batch-size 8", (2, None)),
        ("--num-processes=3 --cpu --main_process_port 29511 train.py", (3, 29511)),
        ("--cpu --num_machines 1 --num_processes 4 -m package.train --num_processes 9", (4, None)),
        ("--num_machines 2 --num_processes 4 --cpu train.py", (None, None)),
        ("--cpu train.py", (None, None)),
    ],
)
def test_the_number_is_read_from_the_launchers_command_line(words, expected):
    assert launch.processes_asked_for(ACCELERATE + words.split()) == expected
    assert launch.processes_asked_for(["python", "/bin/accelerate-launch", *words.split()]) == expected


def test_the_number_is_read_from_a_config_file(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nnum_processes: 5\nuse_cpu: true\n")
    assert launch.processes_asked_for([*ACCELERATE, "--config_file", str(config), "train.py"]) == (5, None)


def test_another_parent_tells_nothing():
    assert launch.processes_asked_for(["bash", "-c", "python train.py"]) == (None, None)


class Replaced(BaseException):
    pass


@pytest.fixture
def left_alone(monkeypatch):
    """The environment that accelerate's launcher gives to the one process that it starts on a CPU."""
    for name in ("RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"USE_CPU": "True", "MIXED_PRECISION": "no"}.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    monkeypatch.setenv("MASTER_PORT", "29500")
    commands = []

    def execv(path, command):
        commands.append(command)
        raise Replaced

    monkeypatch.setattr(launch.os, "execv", execv)
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py", "--seed", "1"])
    return commands


def parent_is(monkeypatch, command):
    class Parent:
        def parent(self):
            return self

        def parents(self):
            return []

        def cmdline(self):
            return command

    monkeypatch.setattr(launch.psutil, "Process", Parent)


def test_the_process_gives_way_to_torchrun_with_its_own_arguments(left_alone, monkeypatch):
    parent_is(monkeypatch, [*ACCELERATE, "--num_processes", "2", "--cpu", "train.py", "--seed", "1"])
    with pytest.raises(Replaced):
        launch.start_all_processes()
    (command,) = left_alone
    assert command[1:3] == ["-m", "torch.distributed.run"] and "--nproc_per_node=2" in command
    assert "--local_addr=127.0.0.1" in command  # one machine: no name to resolve
    assert command[-3:] == ["train.py", "--seed", "1"]


@pytest.mark.parametrize("name", ["RANK", "OMPI_COMM_WORLD_SIZE"])
def test_a_process_that_torchrun_or_mpirun_started_stays(left_alone, monkeypatch, name):
    monkeypatch.setenv(name, "0")
    launch.start_all_processes()
    assert not left_alone


def test_a_process_alone_stays(left_alone, monkeypatch):
    monkeypatch.delenv("MASTER_PORT")  # accelerate gives none to --num_processes 1
    launch.start_all_processes()
    assert not left_alone


def test_where_the_number_cannot_be_known_the_command_is_named(left_alone, monkeypatch):
    parent_is(monkeypatch, ["bash", "start.sh"])
    with pytest.raises(SystemExit, match="start several by: torchrun --nproc_per_node N train.py --seed 1"):
        launch.start_all_processes()


def test_the_launchers_of_a_process_are_its_nearest_ancestors_of_that_name(monkeypatch):
    class Process:
        def __init__(self, *words):
            self.words = words

        def cmdline(self):
            return self.words

        def parents(self):
            return [torchrun, accelerate, Process("bash"), Process("accelerate", "launch")]

    torchrun, accelerate = Process("python", "-m", "torch.distributed.run"), Process("/bin/accelerate", "launch")
    monkeypatch.setattr(launch.psutil, "Process", Process)
    assert launch.launchers() == [torchrun, accelerate]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's end")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_whose_launcher_is_gone_gets_sigterm(tmp_path, monkeypatch, number):
    reads, writes = os.pipe()
    if not (launcher := os.fork()):
        if not os.fork():
            monkeypatch.setattr(launch, "launchers", lambda: [launch.psutil.Process(launcher_pid)])
            launcher_pid = os.getppid()
            signal.signal(signal.SIGTERM, lambda number, frame: (os.write(writes, b"told"), os._exit(0)))
            launch.end_with_launcher()
            os.write(writes, b"here")
            time.sleep(60)
            os._exit(1)
        time.sleep(60)
        os._exit(1)
    os.close(writes)
    assert os.read(reads, 4) == b"here"
    os.kill(launcher, number)
    os.waitpid(launcher, 0)
    assert os.read(reads, 4) == b"told"


def test_a_process_began_before_now_and_after_the_machine():
    assert 0 < launch.started() < time.monotonic()
