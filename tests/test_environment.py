"""The variables of a channel: taken at import if they name one, and whose they are after a fork."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from handleipc.environment import Taken, found, taken
from handleipc.exceptions import NoChannel

FD = "NODE_CHANNEL_FD"
OTHERS = {"PATH": "/bin", "NODE_OPTIONS": "x", "HANDLEIPC": "y"}
OURS = {"NODE_CHANNEL_SERIALIZATION_MODE": "json", "HANDLEIPC_CHANNEL": "1 2 3 4"}


@pytest.fixture
def channel() -> Iterator[socket.socket]:
    """The child's end of a channel, as a parent passes it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.set_inheritable(True)
        yield theirs


def variables(sock: socket.socket, **more: str) -> dict[str, str]:
    return {FD: str(sock.fileno()), **OURS, **more}


def test_nothing_is_found_in_a_process_without_a_channel() -> None:
    """The mapping is there, empty and read-only."""
    assert found is taken.variables
    with pytest.raises(TypeError):
        found["x"] = "y"  # type: ignore[index]


def test_take_early(channel: socket.socket) -> None:
    """A channel becomes close-on-exec and nothing else; its variables are kept, others stay."""
    given = variables(channel, NODE_UNIQUE_ID="7")
    environment = {**OTHERS, **given}
    one = Taken()
    one.take_early(environment)
    assert environment == OTHERS
    assert one.variables == given
    assert not channel.get_inheritable()
    assert os.get_blocking(channel.fileno())
    assert one.claim(environment) == (given, channel.fileno())
    assert one.claim(environment) == (given, channel.fileno())  # until it is adopted
    one.adopted(one.variables, environment)
    assert one.variables == given
    with pytest.raises(NoChannel, match="not set"):
        one.claim(environment)


Number = Callable[[socket.socket, Path], str]

NO_CHANNELS: dict[str, Number] = {
    "empty": lambda sock, path: "",
    "text": lambda sock, path: "three",
    "closed": lambda sock, path: "1000000",
    "huge": lambda sock, path: "9" * 5000,
    "file": lambda sock, path: str(os.open(path / "file", os.O_CREAT)),
    "close-on-exec": lambda sock, path: (sock.set_inheritable(False), str(sock.fileno()))[1],
    "datagram": lambda sock, path: str(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach()),
    "unconnected": lambda sock, path: str(socket.socket(socket.AF_UNIX).detach()),
    "internet": lambda sock, path: str(socket.socket().detach()),
}


@pytest.mark.parametrize("kind", NO_CHANNELS)
def test_what_is_no_channel_is_not_touched(
    kind: str, channel: socket.socket, tmp_path: Path
) -> None:
    """Anything else than a channel is left alone, with its variables, without a word."""
    text = NO_CHANNELS[kind](channel, tmp_path)
    number = int(text) if text.isdigit() and len(text) < 7 else -1
    if number >= 0 and kind != "close-on-exec":
        os.set_inheritable(number, True)
    environment = {**OTHERS, **OURS, FD: text, "NODE_UNIQUE_ID": "7"}
    before = dict(environment)
    one = Taken()
    one.take_early(environment)
    assert environment == before
    assert one.variables == {}
    if number >= 0:
        assert os.get_inheritable(number) is (kind != "close-on-exec")
        if number != channel.fileno():
            os.close(number)


def test_no_variable_at_all() -> None:
    """Nothing is taken where nothing is."""
    one, environment = Taken(), dict(OTHERS)
    one.take_early(environment)
    assert (environment, one.variables) == (OTHERS, {})


def test_closed_before_it_was_adopted(channel: socket.socket) -> None:
    """A channel that the program itself closed is not mistaken for what has its number now."""
    one = Taken()
    one.take_early(variables(channel))
    number = channel.fileno()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        os.dup2(theirs.fileno(), number)
        for _ in range(2):
            with pytest.raises(NoChannel, match="which this program closed"):
                one.claim({})
        channel.close()
        with pytest.raises(NoChannel, match="which this program closed"):
            one.claim({})
        one._leave_to_the_original()
        assert ours.send(b"untouched") == 9


def test_named_at_the_call(channel: socket.socket) -> None:
    """What the environment names at the call is taken then: the child of a zygote."""
    one = Taken()
    given = variables(channel)
    environment = {**OTHERS, **given, "NODE_UNIQUE_ID": "7"}
    kept, number = one.claim(environment)
    assert (kept, number) == (given, None)
    one.adopted(kept, environment)
    assert environment == OTHERS
    assert one.variables == {**given, "NODE_UNIQUE_ID": "7"}


def test_found_comes_first(channel: socket.socket) -> None:
    """What was found at import is this process's, whatever is named later."""
    one = Taken()
    one.take_early(variables(channel))
    later = {FD: "99"}
    assert one.claim(later) == (one.variables, channel.fileno())
    one.adopted(one.variables, later)


def test_forked_copy(channel: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy owns nothing of it, does not keep it open, and may have a channel of its own."""
    one = Taken()
    one.take_early(variables(channel))
    original = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: original + 1)
    with pytest.raises(NoChannel, match=rf"forked.* from process {original}"):
        one.claim({})
    number = channel.detach()
    one._leave_to_the_original()
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(number)
    one._leave_to_the_original()  # and closes nothing twice
    with pytest.raises(NoChannel, match=f"process {original}"):
        one.claim({})
    ours, theirs = socket.socketpair()
    with ours, theirs:
        own = variables(theirs)
        kept, found_early = one.claim(dict(own))
        assert (kept, found_early) == (own, None)
        one.adopted(kept, {})
        with pytest.raises(NoChannel, match="not set"):
            one.claim({})


IMPORTS = """
import os, sys
before = dict(os.environ)
import handleipc
from handleipc import environment
names = ("NODE_CHANNEL_FD", "NODE_CHANNEL_SERIALIZATION_MODE", "NODE_UNIQUE_ID", "HANDLEIPC_X")
assert not any(name in os.environ for name in names), os.environ
assert {**environment.found, **os.environ} == before
assert set(names) <= set(environment.found)
sys.exit(os.system(f"test -e /proc/self/fd/{environment.found['NODE_CHANNEL_FD']}") == 0)
"""


def test_at_import(channel: socket.socket) -> None:
    """Importing the package is enough: a program run after that has neither name nor descriptor."""
    env = {**os.environ, FD: str(channel.fileno()), "NODE_UNIQUE_ID": "3", "HANDLEIPC_X": "1"}
    env["NODE_CHANNEL_SERIALIZATION_MODE"] = "json"
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], env=env, pass_fds=[channel.fileno()], timeout=60
    )
    assert done.returncode == 0
