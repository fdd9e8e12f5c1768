"""Descriptors that the peer asks for again: which, how often, and one answer at a time."""

from __future__ import annotations

import pytest

from handleipc.exceptions import RemoteProtocolError
from handleipc.limits import Limits
from handleipc.protocol.front import Hooks
from handleipc.protocol.resends import Resends
from handleipc.protocol.timers import Timer, Timers


def resends(limits: Limits | None = None) -> Resends:
    """Make one whose time stands still."""
    return Resends(limits or Limits(), Timers(float), Hooks())


def stage_all(answers: Resends) -> list[int]:
    """Take all that is due, as a stage does."""
    taken = []
    while (number := answers.next()) is not None:
        answers.staged()
        taken.append(number)
    return taken


def test_answers_leave_in_the_order_asked_for() -> None:
    """Each once."""
    answers = resends()
    for number in (2, 1, 3):
        answers.ask(number)
    assert answers.due
    assert stage_all(answers) == [2, 1, 3]
    assert not answers.due


def test_asked_twice() -> None:
    """Before the answer has left is too early."""
    answers = resends()
    answers.ask(1)
    with pytest.raises(RemoteProtocolError, match="asked twice for handle 1"):
        answers.ask(1)


def test_asked_too_often() -> None:
    """A handle is asked for so many times at most; another has its own count."""
    answers = resends(Limits(asks=2))
    for _ in range(2):
        answers.ask(1)
        stage_all(answers)
    answers.ask(2)
    with pytest.raises(RemoteProtocolError, match="asked for handle 1 too often"):
        answers.ask(1)


def test_one_answer_at_a_time_lies_unread() -> None:
    """The next leaves when the peer has read all, which is looked at again after a while."""
    limits = Limits(in_flight_delay_max=0.5)
    now = 0.0
    timers = Timers(lambda: now)
    answers = Resends(limits, timers, Hooks())
    has_read = False
    answers._hooks.peer_has_read = lambda: has_read
    answers.ask(1)
    assert answers.may_leave()
    stage_all(answers)
    answers.left([1])
    answers.ask(1)
    now = 7.0
    assert not answers.may_leave()
    assert timers.running == {Timer.LOOK: 7.5}
    now, has_read = 8.0, True
    assert answers.may_leave()
    assert (timers.running, answers.unread) == ({}, set())


def test_an_answer_that_was_acknowledged_is_not_unread() -> None:
    """Whoever acknowledges or refuses a handle has read it, and its asks are forgotten."""
    answers = resends()
    answers._hooks.peer_has_read = lambda: False
    answers.ask(1)
    stage_all(answers)
    answers.left([1])
    assert answers.were_asked
    answers.forget(1)
    assert not answers.were_asked
    assert answers.may_leave()


def test_what_ended_while_it_was_due_is_passed_over() -> None:
    """Only that; and forgetting what was never asked for is nothing."""
    answers = resends()
    answers.ask(1)
    answers.ask(2)
    answers.forget(1)
    answers.forget(9)
    assert stage_all(answers) == [2]
    answers.ask(3)
    answers.forget(3)
    assert answers.next() is None
    assert not answers.due


def test_what_did_not_leave_comes_first_again() -> None:
    """A stage that was taken apart goes back in front."""
    answers = resends()
    for number in (1, 2, 3):
        answers.ask(number)
    answers.next()
    answers.staged()
    answers.put_back(1)
    assert stage_all(answers) == [1, 2, 3]


def test_forget_everything() -> None:
    """At the end nothing is due, and nobody looks again."""
    timers = Timers(float)
    answers = Resends(Limits(), timers, Hooks())
    answers._hooks.peer_has_read = lambda: False
    answers.ask(1)
    stage_all(answers)
    answers.left([1])
    answers.ask(2)
    answers.may_leave()
    answers.clear()
    assert not answers.due
    assert (answers.next(), answers.unread) == (None, set())
    assert not timers.running
