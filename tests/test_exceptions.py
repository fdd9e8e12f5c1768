"""The tree of exceptions: who derives from whom, what they carry and what they say."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

import handleipc
from handleipc import exceptions
from handleipc.exceptions import (
    ChannelBroken,
    DescriptorReleased,
    ForkedCopy,
    HandleInDoubt,
    HandleIPCError,
    HandleNotDelivered,
    LineTooLong,
    MessageNotSerializable,
    UnsupportedHandle,
    WorkerExited,
)

CLASSES = [getattr(exceptions, name) for name in exceptions.__all__]


def documented_tree() -> dict[str, str | None]:
    """Return each class of the module's docstring with its parent."""
    parents: dict[str, str | None] = {}
    above: list[tuple[int, str]] = []
    for line in (exceptions.__doc__ or "").splitlines():
        if found := re.match(r"    ([│├└─ ]*)([A-Z]\w+)", line):
            indent = len(found[1])
            above = [entry for entry in above if entry[0] < indent]
            parents[found[2]] = above[-1][1] if above else None
            above.append((indent, found[2]))
    return parents


def test_tree_is_as_documented() -> None:
    """Every exception is in the tree of the docstring, under its own base class."""
    tree = documented_tree()
    assert sorted(tree) == sorted(exceptions.__all__)
    for name, parent in tree.items():
        assert getattr(exceptions, name).__bases__[0].__name__ == (parent or "Exception")


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_exception_is_public_and_explained(kind: type[HandleIPCError]) -> None:
    """Each derives from the base, has a docstring of its own and is at the top of the package."""
    assert issubclass(kind, HandleIPCError)
    assert "__doc__" in vars(kind)
    assert kind.__doc__
    assert getattr(handleipc, kind.__name__) is kind


def test_module_defines_nothing_else() -> None:
    """Every class of the module is in its list."""
    defined = [
        name
        for name, value in inspect.getmembers(exceptions, inspect.isclass)
        if value.__module__ == exceptions.__name__
    ]
    assert sorted(defined) == sorted(exceptions.__all__)


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        (ChannelBroken, ConnectionError),
        (ChannelBroken, exceptions.ChannelClosed),
        (UnsupportedHandle, TypeError),
        (DescriptorReleased, ValueError),
        (MessageNotSerializable, TypeError),
    ],
)
def test_bases_of_the_standard_library(kind: type[Exception], base: type[Exception]) -> None:
    """Who only knows Python's own exceptions catches these too."""
    assert issubclass(kind, base)


@pytest.mark.parametrize(
    ("code", "signal", "text"),
    [
        (3, None, "the child process exited with code 3"),
        (0, None, "the child process exited with code 0"),
        (None, 9, "the child process was ended by signal 9 (SIGKILL)"),
        (None, 250, "the child process was ended by signal 250"),
        (
            None,
            None,
            "the child process ended (exit status unknown: somebody else reaped it, or SIGCHLD is"
            " ignored)",
        ),
    ],
)
def test_worker_exited(code: int | None, signal: int | None, text: str) -> None:
    """A child that ended tells its code or its signal by name, or that nobody knows."""
    error = WorkerExited(code, signal)
    assert (error.code, error.signal, str(error)) == (code, signal, text)


def test_worker_that_never_opened_its_channel() -> None:
    """Then the fault is likely to be in how it was started, and the sentence says so."""
    error = WorkerExited(1, None, opened=False)
    assert not error.opened
    assert str(error) == (
        "the child process exited with code 1 and never opened its channel, or said nothing on it"
        " (its own output says why, if any does)"
    )


def test_channel_broken() -> None:
    """What is known of a child that has ended is on the object, beside the sentence."""
    error = ChannelBroken("it ended", exit_code=3, opened=False)
    assert (str(error), error.exit_code, error.signal, error.opened) == ("it ended", 3, None, False)
    assert ChannelBroken("x").opened


def test_forked_copy() -> None:
    """The sentence names the thing, the fork, and what to do instead."""
    text = str(ForkedCopy("this Channel"))
    assert text.startswith("this Channel belongs to the process that this one was forked from")
    assert "handleipc.fork" in text


def test_line_too_long() -> None:
    """The limit is on the object, and named in the sentence."""
    error = LineTooLong(1024)
    assert error.limit == 1024
    assert str(error) == "the peer sent a line of more than 1024 bytes (Limits.line)"


def test_handle_not_delivered() -> None:
    """The handle comes back with the reason."""
    handle = object()
    error = HandleNotDelivered(handle, "the peer has no free descriptor")
    assert error.handle is handle
    assert error.reason == "the peer has no free descriptor"
    assert str(error) == (
        "the handle was not delivered, and is yours again: the peer has no free descriptor"
    )


def test_handle_in_doubt() -> None:
    """Nobody knows who owns it: this end does not any more."""
    handle = object()
    error = HandleInDoubt(handle, "the peer was stopped")
    assert error.handle is handle
    assert error.reason == "the peer was stopped"
    assert str(error) == (
        "the handle may have been delivered, and our copy is closed: the peer was stopped"
    )


@pytest.mark.parametrize(
    "error",
    [
        WorkerExited(1, None, opened=False),
        LineTooLong(7),
        HandleNotDelivered("h", "why"),
        HandleInDoubt("h", "why"),
        ChannelBroken("x", signal=9, opened=False),
    ],
)
def test_exceptions_can_be_pickled(error: HandleIPCError) -> None:
    """An exception crosses a process pool as itself."""
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))
