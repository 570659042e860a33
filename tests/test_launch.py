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


# What `accelerate launch` exports for a plain start, and with dynamo_backend no, on a CPU.
PLAIN = {
    **{
        "USE_CPU": "True",
        "MIXED_PRECISION": "no",
        "DYNAMO_BACKEND": "NO",
        "DYNAMO_MODE": "default",
        "DEBUG_MODE": "true",
    },
    **{f"DYNAMO_USE_{name}": "False" for name in ("FULLGRAPH", "DYNAMIC", "REGIONAL_COMPILATION")},
    **{"CPU_AFFINITY": "1", "USE_FSDP": "false", "LOG_LEVEL": "info"},
}


@pytest.fixture
def accelerates(monkeypatch):
    """Sets accelerate's environment, and a launcher's command line."""

    def launched(words="", **environment):
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            monkeypatch.delenv(name)
        for name, value in (PLAIN | environment).items():
            monkeypatch.setenv(f"ACCELERATE_{name}", value)
        monkeypatch.setattr(launch, "launchers", lambda: [ACCELERATE + words.split()] if words else [])
        monkeypatch.setattr(launch, "_command_line", list)

    return launched


@pytest.mark.parametrize(
    ("words", "environment", "asked"),
    [
        ("", {}, {}),
        ("--num_processes 2 --mixed_precision no train.py --gradient_accumulation_steps 3", {}, {}),
        ("--gradient_accumulation_steps 1 train.py", {}, {"gradient_accumulation_steps": 1}),
        ("--gradient_accumulation_steps=4 train.py", {}, {"gradient_accumulation_steps": 4}),
        ("", {"GRADIENT_ACCUMULATION_STEPS": "2"}, {"gradient_accumulation_steps": 2}),
        ("--gradient_clipping 0.5 train.py", {}, {"max_grad_norm": 0.5}),
        ("train.py", {"MIXED_PRECISION": "bf16"}, {"mixed_precision": "bf16"}),
        ("", {"MIXED_PRECISION": "fp16", "DYNAMO_BACKEND": "INDUCTOR"}, {"mixed_precision": "fp16", "compile": True}),
    ],
)
def test_what_the_launcher_asks_for_is_read(accelerates, words, environment, asked):
    accelerates(words, **environment)
    assert launch.asked_by_launcher() == asked
    assert launch.precision_asked_by_launcher().keys() == asked.keys() & {"mixed_precision", "compile"}


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("USE_FSDP", "true", "--engine fsdp2 shares out the base"),
        ("USE_DEEPSPEED", "true", "--engine fsdp2 shares out the base"),
        ("USE_MEGATRON_LM", "true", "take it out"),
        ("USE_PARALLELISM_CONFIG", "true", "take it out"),
        ("MIXED_PRECISION", "fp8", "choose no, bf16 or fp16"),
        ("DYNAMO_BACKEND", "EAGER", "choose no, or inductor, which is --compile"),
        ("DYNAMO_MODE", "max-autotune", "take it out"),
        ("DYNAMO_USE_FULLGRAPH", "True", "take it out"),
        ("DOWNCAST_BF16", "true", "take it out"),
        ("NEXT_YEARS_SETTING", "7", "take it out"),
    ],
)
def test_what_the_launcher_asks_for_and_cannot_be_had_is_refused_by_name(accelerates, name, value, remedy):
    accelerates("train.py", **{name: value, "CONFIG_DS_FIELDS": "a,b"} if "DEEPSPEED" in name else {name: value})
    with pytest.raises(ValueError, match=f"asks by ACCELERATE_{name} for {value}, which cannot be had here: {remedy}"):
        launch.asked_by_launcher()


def test_an_accelerate_launch_of_today_exports_what_is_understood(monkeypatch):
    """Of all launchers but those of engines that are refused, whatever accelerate is installed."""
    from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

    for prepare in (prepare_simple_launcher_cmd_env, prepare_multi_gpu_env):
        words = ["--num_machines=1", "--num_processes=1", "--mixed_precision=bf16", "--dynamo_backend=inductor"]
        arguments = launch.launch_command_parser().parse_args([*words, "--main_process_port=0", "train.py"])
        arguments.use_cpu = arguments.debug = False
        environment = prepare(arguments)
        monkeypatch.setattr(os, "environ", environment[1] if isinstance(environment, tuple) else environment)
        assert launch.asked_by_launcher() == {"mixed_precision": "bf16", "compile": True}


def test_a_flag_goes_before_the_launcher_and_the_launcher_before_a_recipe(accelerates, tmp_path):
    from onelora_diffusion.evaluation.settings import parse
    from onelora_diffusion.training import prompt_settings, settings

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("mixed_precision: bf16\ngradient_accumulation_steps: 2\nmax_grad_norm: 3.0\n")
    accelerates("--gradient_accumulation_steps 4 train.py", MIXED_PRECISION="fp16")
    read = settings.parse_command_line(["--config", str(recipe)], tmp_path)
    assert (read.mixed_precision, read.gradient_accumulation_steps, read.max_grad_norm) == ("fp16", 4, 3.0)
    read = settings.parse_command_line(["--config", str(recipe), "--mixed-precision", "no"], tmp_path)
    assert (read.mixed_precision, read.gradient_accumulation_steps) == ("no", 4)
    assert parse([], None).mixed_precision == "fp16" and parse(["sweep"], None).mixed_precision == "fp16"
    with pytest.raises(ValueError, match="asks for mixed precision fp16: choose bf16 or no"):
        prompt_settings.parse_command_line(["--base", "x", "--images", "y"], recipe)

    accelerates("train.py", MIXED_PRECISION="bf16")
    recipe.write_text("base_precision: fp32\n")
    words = ["--base", "x", "--images", "y", "--config", str(recipe)]
    assert prompt_settings.parse_command_line(words, recipe).base_precision == "bf16"
    assert prompt_settings.parse_command_line([*words, "--base-precision", "int8"], recipe).base_precision == "int8"
    accelerates()
    assert prompt_settings.parse_command_line(words, recipe).base_precision == "fp32"
