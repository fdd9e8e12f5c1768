"""``ownership``: what belongs to one process, and what its forked copies do about it."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from handleipc import ForkedCopy, ownership
from handleipc.ownership import Owned, in_copies


class Thing(Owned):
    """Notes what it gave up, and fails at it if told."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.gave_up = 0
        self._error = error

    def _give_up(self) -> None:
        self.gave_up += 1
        if self._error is not None:
            raise self._error


@pytest.fixture
def fork(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """What runs in a copy; of the things of this test alone."""
    monkeypatch.setattr(ownership, "_owned", weakref.WeakSet())
    monkeypatch.setattr(ownership, "_in_copies", [])
    return ownership._after_fork


def test_owner() -> None:
    """In the process that made it a thing is no copy, and is not refused."""
    thing = Owned()
    assert not thing._is_copy
    thing._refuse_copy()
    thing._give_up()


def test_everything_is_given_up(fork: Callable[[], None]) -> None:
    """In a copy each thing gives up, then the callbacks run, whatever any of them raises."""
    told: list[Any] = []

    def fail() -> None:
        raise OSError("of close(2)")

    things = [Thing(OSError("of close(2)")), Thing(), Thing()]
    in_copies(fail)
    in_copies(lambda: told.append([thing.gave_up for thing in things]))
    fork()
    assert told == [[1, 1, 1]]
    for thing in things:
        assert thing._is_copy
        with pytest.raises(ForkedCopy, match="this Thing belongs to the process.*fork\\(2\\)"):
            thing._refuse_copy()
    assert not Thing()._is_copy  # the copy's own


def test_copy_is_one_whatever_its_process_id(fork: Callable[[], None]) -> None:
    """A copy may have the owner's process id, in another PID namespace or after its end."""
    thing = Thing()
    fork()
    assert os.getpid() > 0
    assert thing._is_copy


def test_copy_in_which_no_hook_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork that did not go through Python is seen by the process id."""
    thing = Thing()
    monkeypatch.setattr(os, "getpid", lambda: 1 << 30)
    assert thing._is_copy


def test_things_that_are_gone(fork: Callable[[], None]) -> None:
    """What was dropped before the fork is not kept for it."""
    watch = weakref.ref(Thing())
    assert watch() is None
    fork()
