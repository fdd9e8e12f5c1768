"""A handle on its way: what travels, and what becomes of this end's copy."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from functools import partial

import pytest

from handleipc.exceptions import DescriptorReleased
from handleipc.handles.fds import FileDescriptor
from handleipc.handles.pending import Held, Lent, Moved, PendingHandle
from tests.linger import lingering, lingers


def new_owner() -> FileDescriptor:
    """Return the owner of a new descriptor."""
    return FileDescriptor(os.memfd_create("file"))


def is_open(fd: int) -> bool:
    """Say whether a number is a descriptor now."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


# -- moved ---------------------------------------------------------------------------------------


def test_moved_handle_takes_the_descriptor_along() -> None:
    """The owner is empty while its descriptor travels, and the same one is read each time."""
    owner = new_owner()
    fd = owner.fileno()
    pending = Moved(owner, "fd", b'{"k":1}')
    assert (pending.handle, pending.tag, pending.options) == (owner, "fd", b'{"k":1}')
    assert (pending.fds_needed, pending.native_only, pending.is_given_away) == (1, False, True)
    assert owner.closed
    assert pending.filenos() == pending.filenos() == [fd]
    pending.returned()
    owner.close()


def test_moved_handle_delivered() -> None:
    """Delivered, our copy is closed, and the owner knows that it was handed over."""
    owner = new_owner()
    fd = owner.fileno()
    pending = Moved(owner, "fd")
    pending.delivered()
    assert not is_open(fd)
    with pytest.raises(DescriptorReleased, match="was handed to another process"):
        owner.fileno()
    pending.returned()
    assert owner.closed


def test_moved_handle_returned() -> None:
    """Not delivered, the descriptor is the owner's again, once."""
    owner = new_owner()
    fd = owner.fileno()
    pending = Moved(owner, "fd")
    pending.returned()
    assert owner.fileno() == fd
    owner.close()
    pending.returned()
    assert owner.closed


def test_moved_handle_that_is_closed() -> None:
    """What is closed or on its way already cannot be moved."""
    owner = new_owner()
    pending = Moved(owner, "fd")
    with pytest.raises(DescriptorReleased, match="on its way"):
        Moved(owner, "fd")
    pending.delivered()
    with pytest.raises(DescriptorReleased, match="was handed"):
        Moved(owner, "fd")
    gc.collect()


def test_moved_handle_dropped() -> None:
    """A handle that nobody settled is closed in the end, with a warning that names it."""
    owner = new_owner()
    fd = owner.fileno()
    pending = Moved(owner, "fd")
    with pytest.warns(
        ResourceWarning, match="FileDescriptor is on its way.*was dropped on its way"
    ):
        del pending
    assert not is_open(fd)
    with pytest.raises(DescriptorReleased, match="was handed"):
        owner.fileno()


@pytest.mark.parametrize("end", ["delivered", "dropped"])
@pytest.mark.filterwarnings("ignore:.*dropped on its way")
def test_moved_handle_does_not_linger(end: str) -> None:
    """The peer that has it may have set it to linger: our copy is closed without waiting."""
    with lingering() as (fd, copy):
        pending = Moved(FileDescriptor(fd), "fd")
        if end == "delivered":
            pending.delivered()
        del pending
        gc.collect()
        assert not is_open(fd)
        assert not lingers(copy)


def test_moved_handle_dropped_where_warnings_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The descriptor is closed although the warning became an exception (python -W error)."""
    owner = new_owner()
    fd = owner.fileno()
    pending = Moved(owner, "fd")
    unraisable: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del pending
        gc.collect()
    assert len(unraisable) == 1
    was_open = is_open(fd)
    if was_open:
        os.close(fd)
    assert not was_open


def test_handed_on_is_told_first() -> None:
    """Who counts hears that the peer owns it while the owner still knows its group, and once."""
    owner = new_owner()
    seen: list[str] = []
    pending = Moved(owner, "fd")
    pending.on_handed_on = lambda: seen.append(repr(owner))
    pending.delivered()
    assert seen == ["<FileDescriptor is on its way to another process>"]


# -- held ----------------------------------------------------------------------------------------


def test_held_handle_is_read_at_each_write() -> None:
    """The object keeps its descriptors; the numbers are those of the moment."""
    numbers = [[3, 4], [5, 6]]
    pending = Held("object", "t", read=lambda: numbers.pop(0), fds_needed=2)
    assert pending.filenos() == [3, 4]
    assert pending.filenos() == [5, 6]
    numbers.append([7, 8])
    assert pending.fileno() == 7
    assert not pending.is_given_away


@pytest.mark.parametrize("numbers", [[], [-1, 3], [3, -1], [3], [3, 4, 5]])
def test_held_handle_that_was_closed_meanwhile(numbers: list[int]) -> None:
    """Fewer, more or negative numbers mean that the object was closed while it waited."""
    pending = Held("object", "t", read=lambda: numbers, fds_needed=2)
    with pytest.raises(DescriptorReleased, match="closed while it waited"):
        pending.filenos()


def test_held_handle_that_cannot_be_read() -> None:
    """Objects have their own ways of saying that they are closed: all mean the same here."""

    def read(error: Exception) -> list[int]:
        raise error

    for error in (ValueError("I/O on closed file"), DescriptorReleased("I/O on closed file")):
        with pytest.raises(DescriptorReleased, match="I/O on closed file"):
            Held("object", "t", read=partial(read, error)).filenos()


def test_moved_handle_whose_close_fails() -> None:
    """Nobody is told: the peer owns it. And the number may be somebody else's next."""
    owner = new_owner()
    pending = Moved(owner, "fd")
    os.close(pending.fileno())
    pending.delivered()
    assert owner.closed
    pending.returned()
    assert owner.closed


def test_held_handle_that_refuses_to_be_read() -> None:
    """An owner that has nothing left says so itself."""
    owner = new_owner()
    pending = Lent(owner, "fd")
    assert pending.filenos() == [owner.fileno()]
    told: list[str] = []
    pending.on_handed_on = lambda: told.append("handed on")
    pending.delivered()
    assert told == ["handed on"]
    owner.close()
    with pytest.raises(DescriptorReleased, match="this FileDescriptor is closed"):
        pending.filenos()


def test_base_has_no_descriptors() -> None:
    """Where they are is for its kinds to say."""
    with pytest.raises(NotImplementedError):
        PendingHandle("o", "t").filenos()


def test_held_handle_delivered() -> None:
    """At the acknowledgement the object is told, if it is given away."""
    calls: list[str] = []
    pending = Held("o", "t", read=list, on_delivered=lambda: calls.append("closed"))
    assert pending.is_given_away
    pending.delivered()
    assert calls == ["closed"]
    Held("o", "t", read=list).delivered()


def test_held_handle_returned() -> None:
    """Not delivered, the object is as it was, and nobody is told."""
    calls: list[str] = []
    pending = Held("o", "t", read=list, on_delivered=lambda: calls.append("closed"))
    pending.returned()
    assert calls == []


def test_held_handle_dropped() -> None:
    """A held object is not ours: dropping the handle says and closes nothing."""
    owner = new_owner()
    pending = Lent(owner, "fd")
    assert not pending.is_given_away
    del pending
    gc.collect()
    assert not owner.closed
    owner.close()
