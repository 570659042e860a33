"""A small model, accelerate's state, and a stand-in for the hub, that several tests use."""

import signal

import pytest
import torch
from tiny_models import dit_inputs, make_dit

# A shell without job control starts what runs in the background with Ctrl-C ignored, and its children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def same_threads():
    """A benchmark's number of threads ends with it: more threads than cores make later tests many times slower."""
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def dit():
    return make_dit()


@pytest.fixture
def inputs():
    return dit_inputs()


@pytest.fixture
def fresh_accelerate():
    """What a test sets of accelerate's state is taken back."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def accelerator(fresh_accelerate):
    """Of one process on the CPU."""
    from accelerate import Accelerator

    return Accelerator(cpu=True)


@pytest.fixture
def hub(monkeypatch):
    """The hub's client, which keeps what it is given."""
    calls = {}

    class Hub:
        def __init__(self, token=None):
            calls["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            calls["repo"] = repo_id, private, exist_ok
            return f"https://hub/{repo_id}"

        def create_commit(self, repo_id, operations, *, commit_message):
            assert repo_id == calls["repo"][0] and commit_message
            calls["files"] = {}
            for operation in operations:
                with operation.as_file() as file:
                    calls["files"][operation.path_in_repo] = file.read()

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    return calls
