"""What a child needs to find its channel: written by the parent, read back and judged here."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from handleipc.environment import Taken, adopt, child_environment, socket_cookie
from handleipc.exceptions import NoChannel
from handleipc.limits import Invitation, Limits
from handleipc.wire import VERSION

FD = "NODE_CHANNEL_FD"
MODE = "NODE_CHANNEL_SERIALIZATION_MODE"
INVITATION = "HANDLEIPC_CHANNEL"
OTHER_VARIABLES = {"PATH": "/bin", "NODE_OPTIONS": "x", "XNODE_CHANNEL_FD": "1", "HANDLEIPC": "y"}


@contextmanager
def inherited(sock: socket.socket) -> Iterator[int]:
    """Yield the number of a socket as a child would find it: inheritable, blocking."""
    sock.set_inheritable(True)
    sock.setblocking(True)
    with sock:
        yield sock.fileno()


@pytest.fixture
def channel() -> Iterator[tuple[int, socket.socket]]:
    """The number of the child's end, and the parent's end."""
    parent, child = socket.socketpair()
    child.set_inheritable(True)
    with parent, child:
        yield child.detach(), parent


Channel = tuple[int, socket.socket]


def refused(environment: dict[str, str]) -> str:
    """Adopt in vain, check that the variables are gone all the same, and return the reason."""
    environment.update(OTHER_VARIABLES)
    with pytest.raises(NoChannel) as caught:
        adopt(environment)
    assert environment == OTHER_VARIABLES
    return str(caught.value)


# -- adopt: the descriptor -----------------------------------------------------------------------


def test_adopt(channel: Channel) -> None:
    """The channel is taken over non-blocking and close-on-exec, and its variables are removed."""
    fd, parent = channel
    environment = {FD: str(fd), MODE: "json", INVITATION: "", "NODE_CHANNEL_X": "1"}
    environment |= OTHER_VARIABLES
    found = adopt(environment)
    with found.sock as sock:
        assert environment == OTHER_VARIABLES
        assert (sock.fileno(), found.invited_by) == (fd, None)
        assert not sock.get_inheritable()
        assert not os.get_blocking(fd)
        parent.send(b"hello")
        assert sock.recv(10) == b"hello"


@pytest.mark.parametrize("refused", ["getsockopt", "setblocking", "set_inheritable"])
def test_adopt_that_the_system_refuses(
    channel: Channel, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    """Everything is left as it was, and the next try adopts it."""

    def refuse(*args: object) -> None:
        raise OSError("no memory")

    fd, parent = channel
    given = {FD: str(fd), INVITATION: f"{VERSION} 7 1 1", **OTHER_VARIABLES}
    environment = dict(given)
    with monkeypatch.context() as patch:
        patch.setattr(socket.socket, refused, refuse, raising=False)
        with pytest.raises(OSError, match="no memory"):
            adopt(environment)
    assert environment == given
    parent.send(b"x")
    with adopt(environment).sock as sock:
        assert sock.recv(1) == b"x"


def test_adopt_in_vain_what_was_found_at_import(
    channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was found early is left as well, for the next try."""
    fd, parent = channel
    early = Taken()
    early.take_early({FD: str(fd)})
    monkeypatch.setattr(sys.modules["handleipc.environment"], "taken", early)
    with monkeypatch.context() as patch:
        patch.setattr(socket, "socket", _refuse_socket)
        with pytest.raises(OSError, match="no memory"):
            adopt({})
    with adopt({}).sock as sock:
        assert sock.fileno() == fd


def _refuse_socket(fileno: int) -> None:
    raise OSError("no memory")


def test_adopt_without_serialization_mode(channel: Channel) -> None:
    """A parent that does not name the mode means JSON."""
    adopt({FD: str(channel[0])}).sock.close()


@pytest.mark.parametrize("queued", [b"", b"last words\n"])
def test_adopt_after_the_parent_died(channel: Channel, queued: bytes) -> None:
    """A parent that is gone already leaves a channel that reads what it said, and ends."""
    fd, parent = channel
    parent.send(queued)
    parent.close()
    with adopt({FD: str(fd)}).sock as sock:
        assert sock.recv(100) == queued


@pytest.mark.parametrize("environment", [{}, {FD: ""}, {MODE: "json"}, {INVITATION: "1 2 3 4"}])
def test_adopt_without_channel(environment: dict[str, str]) -> None:
    """A program that was started without a channel is told how to be started."""
    assert f"{FD} is not set: start this program with handleipc.fork" in refused(environment)


@pytest.mark.parametrize("mode", ["advanced", "", "JSON"])
def test_adopt_of_another_serialization(channel: Channel, mode: str) -> None:
    """Another serialization is refused by name, and the descriptor is left alone."""
    fd = channel[0]
    assert f"serialization {mode!r}" in refused({FD: str(fd), MODE: mode})
    os.close(fd)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "x",
            "-1",
            "-0",
            "+3",
            " 3",
            "3 ",
            "3\n",
            "3.0",
            "1e1",
            "0x3",
            "1_0",
            "3,4",
            "\0",
            "None",
        ),
        *("\u0663", "\u00b2", "\uff13", "\ud800"),
        "9" * 5000,
    ],
    ids=ascii,
)
def test_adopt_of_what_is_no_number(text: str) -> None:
    """Only plain ASCII digits name a descriptor."""
    assert "which is no descriptor number" in refused({FD: text})


@pytest.mark.parametrize("number", [10**6, 2**31 - 1, 2**31, 2**32, 2**64, 10**30])
def test_adopt_of_closed_number(number: int) -> None:
    """A number that is not open, or that no descriptor can have, is stale."""
    assert str(number) in refused({FD: str(number)})


def test_adopt_of_what_is_not_a_socket() -> None:
    """Files and pipes are no channels, and stay open."""
    reading, writing = os.pipe()
    file = os.memfd_create("file")
    for fd in (reading, writing, file):
        os.set_inheritable(fd, True)
        assert "which is not a socket: the variable is stale" in refused({FD: str(fd)})
        os.close(fd)


def test_adopt_of_close_on_exec_socket(channel: Channel) -> None:
    """A socket that is close-on-exec was opened by this process, and is left to it."""
    fd = channel[0]
    os.set_inheritable(fd, False)
    assert "a descriptor of this process's own" in refused({FD: str(fd)})
    os.close(fd)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        (socket.AF_UNIX, socket.SOCK_STREAM),
        (socket.AF_UNIX, socket.SOCK_DGRAM),
        (socket.AF_INET, socket.SOCK_STREAM),
        (socket.AF_INET, socket.SOCK_DGRAM),
    ],
)
def test_adopt_of_unconnected_socket(family: socket.AddressFamily, kind: socket.SocketKind) -> None:
    """A socket without a peer is no channel, and stays open and as it was."""
    with inherited(socket.socket(family, kind)) as fd:
        assert "not a connected Unix stream socket" in refused({FD: str(fd)})
        assert os.get_inheritable(fd)
        assert os.get_blocking(fd)


def test_adopt_of_listening_socket() -> None:
    """A listener is no channel."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("")
    listener.listen()
    with inherited(listener) as fd:
        assert "not a connected Unix stream socket" in refused({FD: str(fd)})


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_adopt_of_connected_unix_socket_of_another_type(kind: socket.SocketKind) -> None:
    """A channel is a stream."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    with inherited(ours) as fd, theirs:
        assert "not a connected Unix stream socket" in refused({FD: str(fd)})


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_adopt_of_connected_internet_socket(kind: socket.SocketKind) -> None:
    """A channel is a Unix socket: a connection of the network could say anything."""
    with socket.socket(socket.AF_INET, kind) as server:
        server.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            server.listen()
        client = socket.socket(socket.AF_INET, kind)
        client.connect(server.getsockname())
        with inherited(client) as fd:
            assert "not a connected Unix stream socket" in refused({FD: str(fd)})


@pytest.mark.parametrize("mode", ["json", "advanced"])
def test_adopt_what_was_found_at_import(
    channel: Channel, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was found before anybody asked is adopted, or refused at each call with its reason."""
    fd, parent = channel
    early = Taken()
    early.take_early({FD: str(fd), MODE: mode})
    monkeypatch.setitem(adopt.__globals__, "taken", early)
    if mode == "json":
        with adopt({}).sock as sock:
            assert (sock.fileno(), os.get_blocking(fd)) == (fd, False)
            parent.send(b"hello")
            assert sock.recv(10) == b"hello"
        return
    for _ in range(2):
        with pytest.raises(NoChannel, match="serialization 'advanced'"):
            adopt({})
    os.close(fd)


# -- adopt: the invitation -----------------------------------------------------------------------


def invited(channel: Channel, text: str) -> Invitation | None:
    """Adopt a copy of the channel with this invitation, and close it again."""
    fd = os.dup(channel[0])
    os.set_inheritable(fd, True)
    found = adopt({FD: str(fd), INVITATION: text})
    found.sock.close()
    return found.invited_by


@pytest.fixture
def cookie(channel: Channel) -> Iterator[int]:
    """The cookie of the child's end, whose first number is closed afterwards."""
    with socket.socket(fileno=channel[0]) as sock:
        yield socket_cookie(sock)


def test_invitation_that_a_parent_wrote(channel: Channel, cookie: int) -> None:
    """What the parent grants is what the child reads."""
    limits = Limits(window=7, bytes=1234)
    environment = child_environment({}, channel[0], limits, cookie)
    assert invited(channel, environment[INVITATION]) == Invitation(7, 1234)


def test_invitation_of_several_versions(channel: Channel, cookie: int) -> None:
    """A later parent may offer several versions, and say more than this one reads."""
    assert invited(channel, f"{VERSION},99 {cookie} 1 2") == Invitation(1, 2)
    assert invited(channel, f"99,{VERSION} {cookie} 1 2 more words") == Invitation(1, 2)


@pytest.mark.parametrize("versions", ["99", f"{VERSION}1", "", "1,3", "x" * 1000])
def test_invitation_to_other_versions(
    channel: Channel, cookie: int, versions: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Invites nobody, and one line says why both ends are slower than they could be."""
    assert invited(channel, f"{versions} {cookie} 1 2") is None
    (line,) = caplog.messages
    assert "the same version of handleipc in both" in line
    assert len(line) < 300


def test_invitation_to_another_socket(channel: Channel, cookie: int) -> None:
    """A variable that leaked through a program in between invites nobody."""
    with socket.socket(fileno=os.dup(channel[1].fileno())) as other:
        assert invited(channel, f"{VERSION} {socket_cookie(other)} 1 2") is None
    assert invited(channel, f"{VERSION} {cookie + 1} 1 2") is None
    assert invited(channel, f"{VERSION} {cookie + 2**64} 1 2") is None


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "2", "2 {}", "2 {} 1", "x", "{}", " 2 {} 1 2", "2  {} 1 2", "2\t{}\t1\t2"),
        *("2 {} -1 2", "2 {} 1 -2", "2 {} +1 2", "2 {} 1.0 2", "2 {} 1e3 2", "2 {} 0x1 2"),
        *("2 {} 1_0 2", "2 {} \u0661 2", "2 {} \u00b2 2", "2 {} 1 2\n", "2 {}\n 1 2", "2 {} 1  2"),
        *("2 x 1 2", "2 -{} 1 2", "2 None 1 2", ", {} 1 2", " {} 1 2", "\u0661 {} 1 2"),
    ],
    ids=ascii,
)
def test_invitation_that_is_malformed(channel: Channel, cookie: int, text: str) -> None:
    """Anything that is not quite an invitation is none, and never an error."""
    assert invited(channel, text.format(cookie)) is None


@pytest.mark.parametrize("at", [1, 2, 3])
def test_invitation_with_endless_number(channel: Channel, cookie: int, at: int) -> None:
    """Nor is one with a number that Python refuses to read."""
    fields = [str(VERSION), str(cookie), "1", "2"]
    fields[at] = "9" * 5000
    assert invited(channel, " ".join(fields)) is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=40) | st.text("01 9,\u0661-", max_size=20))
def test_invitation_of_any_text(channel: Channel, cookie: int, text: str) -> None:
    """Whatever the variable holds, the channel is adopted, and only its own cookie invites."""
    found = invited(channel, text)
    assert found is None or str(cookie) in text.split(" ")


# -- the cookie ----------------------------------------------------------------------------------


def test_cookie_is_the_same_for_every_copy(pair: tuple[socket.socket, socket.socket]) -> None:
    """A duplicate is the same socket, the other end is another."""
    a, b = pair
    with a.dup() as copy:
        assert socket_cookie(a) == socket_cookie(copy)
    assert socket_cookie(a) != socket_cookie(b)


def test_cookie_where_there_is_none(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On other systems than Linux the inode serves."""
    a, b = pair
    monkeypatch.setattr(sys, "platform", "darwin")
    assert socket_cookie(a) == os.fstat(a.fileno()).st_ino
    assert socket_cookie(a) != socket_cookie(b)


# -- the child's environment ---------------------------------------------------------------------


def test_child_environment() -> None:
    """The child gets what it would get anyway, without our own channel, and with its own."""
    ours = {
        FD: "99",
        MODE: "advanced",
        INVITATION: "old",
        "NODE_CHANNEL_X": "1",
        "HANDLEIPC_Y": "2",
    }
    result = child_environment({**ours, **OTHER_VARIABLES}, 5, Limits(window=4, bytes=10), 77)
    assert result == {
        **OTHER_VARIABLES,
        FD: "5",
        MODE: "json",
        INVITATION: f"{VERSION} 77 4 10",
    }
    # Node appends its variables last; so that they win where a name is given twice.
    assert list(result)[-2:] == [FD, MODE]


def test_child_environment_without_invitation() -> None:
    """A child that is to speak node is not invited."""
    given_environment = {"A": "1"}
    assert child_environment(given_environment, 3, Limits(), None) == {
        "A": "1",
        FD: "3",
        MODE: "json",
    }
    assert given_environment == {"A": "1"}


def test_adopt_in_a_real_child() -> None:
    """A program started with the variables finds its channel, and the next one does not."""
    code = """if True:
        import os, subprocess, sys
        from handleipc.limits import Limits
        from handleipc.environment import adopt
        found = adopt(os.environ)
        found.sock.send(repr(found.invited_by).encode())
        left = [name for name in os.environ if name.startswith(("NODE_CHANNEL_", "HANDLEIPC_"))]
        sys.exit(len(left))
    """
    parent, child = socket.socketpair()
    with parent:
        with child:
            environment = child_environment(
                dict(os.environ), child.fileno(), Limits(window=5, bytes=6), socket_cookie(child)
            )
            done = subprocess.run(
                [sys.executable, "-c", code],
                env=environment,
                pass_fds=[child.fileno()],
                timeout=60,
                check=False,
            )
        assert done.returncode == 0
        assert parent.recv(1000).decode() == repr(Invitation(5, 6))
