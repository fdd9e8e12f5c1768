"""One table of what a channel waits for: when the next is due, and in which order they are done."""

from __future__ import annotations

from handleipc.protocol.timers import Timer, Timers


def test_the_next_one_is_the_deadline() -> None:
    """Whatever was started first; a second start replaces the first."""
    timers = Timers(lambda: 10.0)
    assert timers.deadline() is None
    timers.start(Timer.PROGRESS, 30.0)
    timers.start(Timer.ASK, 5.0)
    assert timers.deadline() == 15.0
    timers.start(Timer.ASK, 50.0)
    assert timers.deadline() == 40.0


def test_what_is_due_runs_until_it_is_stopped() -> None:
    """So nothing is lost if what one of them does is interrupted; the order is that of ``Timer``."""
    now = 0.0
    timers = Timers(lambda: now)
    for delay, timer in enumerate(reversed(Timer)):
        timers.start(timer, delay)
    now = 4.0
    due = timers.due()
    assert due == sorted(due)
    assert due == list(Timer)[-5:]
    assert timers.stop(due[0])
    assert not timers.stop(due[0])
    assert timers.due() == due[1:]


def test_none_is_due_after_the_end() -> None:
    """Nobody comes back then."""
    timers = Timers(float)
    timers.start(Timer.NACK, 0.0)
    timers.stop_all()
    assert (timers.deadline(), timers.due()) == (None, [])
