"""Who is at the other end of a process's channels, as the kernel tells another process."""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator

import pytest
from click.testing import CliRunner

from handleipc import inspecting
from handleipc.cli import main
from handleipc.inspecting import End, command_of, ends_of, parse_sockets

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc and UNIX_DIAG are Linux's")

WAITS = "import sys; print('there', flush=True); sys.stdin.read()"


@pytest.fixture
def child() -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    """A process that was started with a channel, of which it reads nothing, and our end."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", WAITS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "NODE_CHANNEL_FD": str(theirs.fileno())},
            pass_fds=[theirs.fileno()],
        )
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"there\n"
            theirs.close()
            yield process, ours
            process.kill()


def test_both_ends(child: tuple[subprocess.Popen[bytes], socket.socket]) -> None:
    """The channel is named at either end, with what each has not read."""
    process, ours = child
    ours.send(b"12345")
    (here,) = (end for end in ends_of(os.getpid()) if end.fd == ours.fileno())
    assert (here.to, here.peers, here.unread, here.unread_there) == ("child", [process.pid], 0, 5)
    (there,) = ends_of(process.pid)
    assert (there.to, there.peers) == ("parent", [os.getpid()])
    assert (there.unread, there.unread_there) == (5, 0)


def test_what_is_shown(child: tuple[subprocess.Popen[bytes], socket.socket]) -> None:
    process, ours = child
    ours.send(b"12345")
    shown = CliRunner().invoke(main, ["inspect", str(process.pid)])
    assert shown.exit_code == 0
    first, second = shown.output.splitlines()
    assert (
        first
        == f"process {process.pid} ({command_of(process.pid)}): 1 connected Unix stream socket"
    )
    assert "channel to its parent" in second
    assert f"{os.getpid()} (" in second
    assert second.endswith("5 bytes wait here, 0 there")
    as_json = json.loads(CliRunner().invoke(main, ["inspect", "--json", str(process.pid)]).output)
    assert as_json["pid"] == process.pid
    assert as_json["ends"][0]["peers"] == [os.getpid()]


def test_a_socket_of_nobody_else_is_left_out() -> None:
    a, b = socket.socketpair()
    with a, b:
        assert not {a.fileno(), b.fileno()} & {end.fd for end in ends_of(os.getpid())}


def test_a_peer_that_may_not_be_seen() -> None:
    assert "a process that you may not see" in str(End(3, "", [], 0, 0))


def test_a_process_that_has_gone() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert command_of(gone.pid) == "?"
    assert inspecting._channel_number(gone.pid) is None
    shown = CliRunner().invoke(main, ["inspect", str(gone.pid)])
    assert shown.exit_code == 1
    assert f"there is no process {gone.pid}" in shown.output


def test_a_process_of_somebody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> list[str]:
        raise PermissionError(errno.EACCES, "denied", path)

    monkeypatch.setattr(inspecting.os, "listdir", refuse)
    shown = CliRunner().invoke(main, ["inspect", "1"])
    assert shown.exit_code == 1
    assert "another user" in shown.output
    assert "as root" in shown.output


def test_a_kernel_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "AF_NETLINK")
    shown = CliRunner().invoke(main, ["inspect", str(os.getpid())])
    assert shown.exit_code == 1
    assert "does not tell" in shown.output


def answer(kind: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 1, 0) + body


def test_answers_of_the_kernel() -> None:
    sockets: dict[int, tuple[int, int]] = {}
    stream = struct.pack("=BBBxI8x", socket.AF_UNIX, socket.SOCK_STREAM, 1, 77)
    attributes = struct.pack("=HHI", 8, 2, 78) + struct.pack("=HHII", 12, 4, 5, 0)
    assert not parse_sockets(answer(20, stream + attributes), sockets)
    assert sockets == {77: (78, 5)}
    lonely = struct.pack("=BBBxI8x", socket.AF_UNIX, socket.SOCK_STREAM, 1, 79)
    broken = struct.pack("=HH", 0, 2)
    assert not parse_sockets(answer(20, lonely + struct.pack("=HHB3x", 5, 6, 0) + broken), sockets)
    assert 79 not in sockets
    assert parse_sockets(answer(3, b"\0\0\0\0"), sockets)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (answer(2, struct.pack("=i", -errno.EPERM)), errno.EPERM),
        (answer(20, b"\0" * 16)[:-4], errno.EBADMSG),
        (answer(20, b"\0" * 4), errno.EBADMSG),
    ],
    ids=["refused", "cut", "short"],
)
def test_bad_answers_of_the_kernel(data: bytes, code: int) -> None:
    with pytest.raises(OSError, match=".") as caught:
        parse_sockets(data, {})
    assert caught.value.errno == code
