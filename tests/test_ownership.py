"""What a forked copy gives up, and what it may not do."""

from __future__ import annotations

import os

import pytest

from handleipc import ownership
from handleipc.exceptions import ForkedCopy
from handleipc.ownership import Owned, in_copies


class Door(Owned):
    """Something that a copy closes."""

    def __init__(self, told: list[str]) -> None:
        super().__init__()
        self.told = told

    def _give_up(self) -> None:
        self.told.append("door")


def as_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process be taken for one that was forked from it just now."""
    pid = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: pid + 1)
    ownership._after_fork()


@pytest.fixture(autouse=True)
def nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other modules have registered is not to be given up by a test."""
    monkeypatch.setattr(ownership, "_owned", type(ownership._owned)())
    monkeypatch.setattr(ownership, "_in_copies", [])


def test_the_original_goes_on() -> None:
    """Whoever made it may use it."""
    Door([])._refuse_copy()


def test_a_copy_gives_up_and_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right after the fork it closes what the original needs alone; its use names the fork."""
    told: list[str] = []
    door, plain = Door(told), Owned()
    in_copies(lambda: told.append("callback"))
    as_a_copy(monkeypatch)
    assert told == ["door", "callback"]
    with pytest.raises(ForkedCopy, match="this Door belongs to the process"):
        door._refuse_copy()
    with pytest.raises(ForkedCopy, match="this Owned belongs"):
        plain._refuse_copy()
    Door([])._refuse_copy()  # one of the copy's own


def test_what_is_gone_is_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """An object that nobody holds any more is not kept for the sake of copies."""
    told: list[str] = []
    door = Door(told)
    del door
    as_a_copy(monkeypatch)
    assert told == []


def test_one_that_fails_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """close(2) may say anything."""

    def fail() -> None:
        raise OSError("close failed")

    told: list[str] = []
    in_copies(fail)
    in_copies(lambda: told.append("after"))
    as_a_copy(monkeypatch)
    assert told == ["after"]


def test_a_real_fork() -> None:
    """The system calls all of it in the child, and nothing of it here."""
    told: list[str] = []
    door = Door(told)
    child = os.fork()
    if not child:
        try:
            os._exit(0 if told == ["door"] and door._is_copy else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert told == []
    assert not door._is_copy
