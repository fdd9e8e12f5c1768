"""Owners of descriptors: closed once, given away once, and never used after."""

from __future__ import annotations

import gc
import os
import sys
import warnings

import pytest

from handleipc.exceptions import DescriptorReleased
from handleipc.handles.fds import DescriptorOwner, FileDescriptor
from tests.linger import lingering, lingers


def new_fd() -> int:
    """Return a new descriptor of an empty file."""
    return os.memfd_create("file")


def is_open(fd: int) -> bool:
    """Say whether a number is a descriptor now."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


class Counted(DescriptorOwner):
    """An owner that counts how often it was told of its release."""

    __slots__ = ("releases",)

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self.releases = 0

    def _released(self) -> None:
        self.releases += 1


def test_fileno_is_borrowed() -> None:
    """The descriptor can be asked for again and again, and stays the owner's."""
    fd = new_fd()
    with FileDescriptor(fd) as owner:
        assert owner.fileno() == owner.fileno() == fd
        assert not owner.closed
        assert os.read(owner.fileno(), 1) == b""


@pytest.mark.parametrize("fd", [-1, -2, -100])
def test_construction_from_no_descriptor(fd: int) -> None:
    """A negative number is no descriptor, and the failed object leaves no trace."""
    with pytest.raises(ValueError, match=f"{fd} is not a descriptor"):
        FileDescriptor(fd)
    gc.collect()


def test_descriptor_zero_is_one() -> None:
    """Zero is a descriptor like any other."""
    saved = os.dup(0)
    try:
        owner = FileDescriptor(0)
        assert (owner.closed, owner.fileno(), repr(owner)) == (False, 0, "<FileDescriptor fd=0>")
        owner.close()
        assert not is_open(0)
    finally:
        os.dup2(saved, 0)
        os.close(saved)


def test_close_twice() -> None:
    """The first close closes, the second does nothing, even if the number is in use again."""
    fd = new_fd()
    owner = FileDescriptor(fd)
    owner.close()
    assert owner.closed
    assert not is_open(fd)
    reused = new_fd()
    assert reused == fd
    owner.close()
    assert is_open(reused)
    os.close(reused)


@pytest.mark.parametrize("end", ["close", "drop"])
@pytest.mark.filterwarnings("ignore:unclosed")
def test_close_does_not_linger(end: str) -> None:
    """What a peer has set on a socket does not hold its close up (SO_LINGER)."""
    with lingering() as (fd, copy):
        owner = FileDescriptor(fd)
        if end == "close":
            owner.close()
        del owner
        gc.collect()
        assert not is_open(fd)
        assert not lingers(copy)


def test_tag() -> None:
    """A descriptor says what it was sent as."""
    with FileDescriptor(new_fd()) as plain, FileDescriptor(new_fd(), "net.Native") as fifo:
        assert (plain.tag, fifo.tag) == ("fd", "net.Native")


def test_close_by_context_manager() -> None:
    """Leaving the block closes, whether the block closed or detached already or neither."""
    with FileDescriptor(new_fd()) as owner:
        pass
    assert owner.closed
    with FileDescriptor(new_fd()) as owner:
        owner.close()
    with FileDescriptor(new_fd()) as owner:
        fd = owner.detach()
    os.close(fd)


def test_close_of_descriptor_that_somebody_else_closed() -> None:
    """The mistake of another is reported once, and the owner is closed all the same."""
    owner = FileDescriptor(new_fd())
    os.close(owner.fileno())
    with pytest.raises(OSError, match="Bad file descriptor"):
        owner.close()
    assert owner.closed
    owner.close()


def test_detach() -> None:
    """Detaching gives the open descriptor to the caller; the owner has none any more."""
    fd = new_fd()
    owner = FileDescriptor(fd)
    assert owner.detach() == fd
    assert owner.closed
    owner.close()
    del owner
    gc.collect()
    assert is_open(fd)
    os.close(fd)


def test_move_then_moved() -> None:
    """A descriptor on its way is out of reach; once delivered it is another process's."""
    fd = new_fd()
    owner = FileDescriptor(fd)
    assert owner._move() == fd
    assert owner.closed
    for use in (owner.fileno, owner.close, owner.detach, owner._move):
        with pytest.raises(DescriptorReleased, match="on its way to another process"):
            use()
    os.close(fd)
    owner._moved()
    owner.close()
    for use in (owner.fileno, owner.detach, owner._move):
        with pytest.raises(DescriptorReleased, match="was handed to another process"):
            use()


def test_move_then_restore() -> None:
    """A descriptor that was not delivered is the owner's again."""
    fd = new_fd()
    owner = FileDescriptor(fd)
    owner._restore(owner._move())
    assert owner.fileno() == fd
    owner.close()
    assert not is_open(fd)


def test_context_manager_left_during_a_move() -> None:
    """A block that is left while the descriptor travels neither raises nor closes."""
    fd = new_fd()
    with FileDescriptor(fd) as owner:
        owner._move()
    assert is_open(fd)
    owner._restore(fd)
    owner.close()


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (FileDescriptor.close, "is closed"),
        (FileDescriptor.detach, "was detached: its descriptor has another owner now"),
    ],
)
def test_use_after_the_end(end: object, reason: str) -> None:
    """Each misuse names the type and what became of the descriptor."""
    owner = FileDescriptor(fd := new_fd())
    end(owner)  # type: ignore[operator]
    for use in (owner.fileno, owner.detach, owner._move):
        with pytest.raises(DescriptorReleased) as caught:
            use()
        assert str(caught.value) == f"this FileDescriptor {reason}"
    if is_open(fd):
        os.close(fd)


def test_repr_in_every_state() -> None:
    """The representation says where the descriptor is."""
    owner = FileDescriptor(fd := new_fd())
    assert repr(owner) == f"<FileDescriptor fd={fd}>"
    owner._move()
    assert repr(owner) == "<FileDescriptor is on its way to another process>"
    owner._moved()
    assert repr(owner) == "<FileDescriptor was handed to another process>"
    owner._restore(fd)
    owner.detach()
    assert repr(owner) == "<FileDescriptor was detached>"
    owner._restore(fd)
    owner.close()
    assert repr(owner) == "<FileDescriptor is closed>"


def test_released_is_called_once() -> None:
    """Those who count are told once, by close, detach or the garbage collector, and not on a move."""
    for end in ("close", "detach"):
        owner = Counted(fd := new_fd())
        getattr(owner, end)()
        owner.close()
        assert owner.releases == 1
        if end == "detach":
            os.close(fd)
    owner = Counted(new_fd())
    os.close(owner._move())
    owner._moved()
    assert owner.releases == 0


def test_drop_of_open_owner_warns_and_closes() -> None:
    """An owner that is forgotten says so, and closes its descriptor."""
    fd = new_fd()
    owner = FileDescriptor(fd)
    with pytest.warns(ResourceWarning, match=f"unclosed <FileDescriptor fd={fd}>"):
        del owner
    assert not is_open(fd)


def test_drop_of_open_owner_where_warnings_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The descriptor is closed although the warning became an exception (python -W error)."""
    fd = new_fd()
    owner = FileDescriptor(fd)
    unraisable: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del owner
        gc.collect()
    assert len(unraisable) == 1
    was_open = is_open(fd)
    if was_open:
        os.close(fd)
    assert not was_open


def test_drop_after_the_end_is_silent() -> None:
    """An owner that ended is dropped without a word."""
    for end in ("close", "_move"):
        owner = FileDescriptor(fd := new_fd())
        getattr(owner, end)()
        del owner
        gc.collect()
        if end == "_move":
            os.close(fd)


def test_owner_has_no_dict() -> None:
    """Owners are slim: a primary holds thousands of them."""
    with FileDescriptor(new_fd()) as owner:
        assert not hasattr(owner, "__dict__")


def test_close_that_fails() -> None:
    """Who closes a file hears that data may be lost; it is released all the same."""
    owner = Counted(new_fd())
    os.close(owner.fileno())
    with pytest.raises(OSError, match="Bad file descriptor"):
        owner.close()
    assert owner.closed
    assert owner.releases == 1
