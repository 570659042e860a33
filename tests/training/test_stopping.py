import signal
import time

import pytest

from onelora_diffusion.training.stopping import Clock, Interrupted, Stop, format_duration, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("24h", 86400), ("1h30m", 5400), ("1d2h", 93600), ("1.5h", 5400)],
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "24", "h", "10x", "1h 30", "-5m", "1..5h"])
def test_what_is_no_duration_is_named(text):
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0s"), (47.9, "47s"), (185, "3m05s"), (5400, "1h30m"), (187200, "2d04h")]
)
def test_durations_are_written_with_two_units(seconds, text):
    assert format_duration(seconds) == text


def test_the_budget_counts_what_was_spent_before_a_resume():
    clock = Clock(budget=100.0)
    stop = Stop(clock, num_processes=1)
    assert stop.agreed() == 0
    clock.resume(100.0)
    assert stop.agreed() == 1 and not Stop.is_signal(1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_kept_for_the_loop_and_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with Stop(Clock(), num_processes=1) as stop:
        signal.raise_signal(number)
        signal.raise_signal(number)  # launchers pass on what the terminal has sent already
        assert stop.agreed() == number and Stop.is_signal(stop.agreed())
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_acts_as_always(monkeypatch):
    with Stop(Clock(), num_processes=1), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
        later = time.monotonic() + 3
        monkeypatch.setattr(time, "monotonic", lambda: later)
        signal.raise_signal(signal.SIGINT)


def test_a_signal_is_not_kept_where_work_may_be_left_at_any_point():
    with Stop(Clock(), num_processes=1) as stop:
        with pytest.raises(Interrupted), stop.at_once():
            signal.raise_signal(signal.SIGTERM)
        assert stop.agreed() == signal.SIGTERM
        with stop.at_once():
            signal.raise_signal(signal.SIGTERM)  # known already


def test_signals_act_as_always_while_they_are_suspended():
    before = signal.getsignal(signal.SIGTERM)
    with Stop(Clock(), num_processes=1) as stop:
        with stop.suspended():
            assert signal.getsignal(signal.SIGTERM) is before
        signal.raise_signal(signal.SIGTERM)
        assert stop.agreed() == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_clock_counts_from_where_it_is_told_and_never_twice():
    clock = Clock(budget=1000.0, started=time.monotonic() - 50)
    assert 50 <= clock.seconds < 100
    clock.resume(300.0)
    clock.resume(200.0)
    clock.resume(300.0)
    assert 350 <= clock.seconds < 400 and 600 < clock.left <= 650
