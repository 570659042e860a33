"""What processes find out together, as one of them sees it."""

import pytest

from onelora_diffusion import processes
from onelora_diffusion.processes import among_sharers, check_equal, first_on_each_machine, on_every_process


class Processes:
    """Accelerator of one process among several, whose others are told by hand."""

    def __init__(self, process_index=0, num_processes=2, local_process_index=0):
        self.process_index, self.num_processes = process_index, num_processes
        self.is_main_process, self.is_local_main_process = process_index == 0, local_process_index == 0
        self.waits = []

    def wait_for_everyone(self):
        self.waits.append("wait")


def others_say(monkeypatch, mine, *others):
    """The next gathering finds these, and at `mine` what this process gives."""

    def gather(given):
        return [*others[:mine], *given, *others[mine:]]

    monkeypatch.setattr(processes, "gather_object", gather)


def fail(error=None):
    raise error or FileNotFoundError("no such folder as data")


def test_what_fails_on_one_process_is_named_on_all(monkeypatch):
    others_say(monkeypatch, 0, None, None)
    assert on_every_process(Processes(0, 3), lambda: 7) == 7
    others_say(monkeypatch, 0, None, "no such folder as data")
    with pytest.raises(ValueError, match="^process 2 of 3: no such folder as data$"):
        on_every_process(Processes(0, 3), lambda: 7)
    others_say(monkeypatch, 2, None, None)
    with pytest.raises(ValueError, match="^process 2 of 3: no such folder as data$"):
        on_every_process(Processes(2, 3), fail)
    for mine, others in ((0, (None,)), (1, ("no such folder as data",))):  # the main one's own error, as it is
        others_say(monkeypatch, mine, *others)
        with pytest.raises(FileNotFoundError, match="^no such folder as data$"):
            on_every_process(Processes(mine), fail)


@pytest.mark.parametrize("mine", [0, 1])
def test_the_first_difference_is_named_with_both_values(monkeypatch, mine):
    facts = [{"the data set": "cats", "the step": 6}, {"the data set": "cats", "the step": 0}]
    others_say(monkeypatch, mine, facts[1 - mine])
    with pytest.raises(ValueError, match="the step is 6 on process 0 and 0 on process 1: all must have the same"):
        check_equal(Processes(mine), facts[mine])
    others_say(monkeypatch, mine, facts[mine])
    check_equal(Processes(mine), facts[mine])


def test_each_machine_has_a_first_process_and_an_error_keeps_nobody_waiting():
    places = {"main": (0, 0), "beside it": (1, 1), "another machine": (2, 0), "beside that": (3, 1)}
    before = {}
    for name, (rank, local) in places.items():
        for happens in (lambda: None, fail):
            accelerator = Processes(rank, 4, local)
            try:
                with first_on_each_machine(accelerator):
                    before[name] = len(accelerator.waits)
                    happens()
            except FileNotFoundError:
                pass
            assert len(accelerator.waits) == 2
    assert before == {"main": 0, "beside it": 2, "another machine": 1, "beside that": 2}
    interrupted = Processes(0, 4)
    with pytest.raises(SystemExit), first_on_each_machine(interrupted):
        fail(SystemExit(143))
    assert interrupted.waits == []


@pytest.mark.parametrize(
    ("seen", "views", "expected"),
    [
        ({0, 1, 2, 3}, [[0, 1, 2, 3]] * 4, (2, 4)),  # one disk
        ({2, 3}, [[0, 1], [0, 1], None, [2, 3]], (0, 2)),  # two machines, each with its own
        ({2}, [[0], [1], None, [3]], (0, 1)),
        ({0, 1, 2, 3}, [[0, 1, 2, 3], [0, 1], None, [2, 3]], (0, 1)),  # not yet sure of each other
    ],
)
def test_what_all_read_is_written_once_on_each_disk(monkeypatch, tmp_path, seen, views, expected):
    monkeypatch.setattr(processes, "told_by_main", lambda accelerator, tell: "token")
    for each in seen - {2}:
        (tmp_path / f".token.{each}").touch()
    monkeypatch.setattr(
        processes, "gather_object", lambda given: [given[0] if each is None else each for each in views]
    )
    assert among_sharers(tmp_path, Processes(2, 4)) == expected
    assert not (tmp_path / ".token.2").exists()
