"""``peerwatch``: which process is at the other end of a socket pair, and does it live."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from handleipc.wire import peer
from handleipc.wire.peer import peer_of, peer_pidfd


class Maker(NamedTuple):
    """A process that made a socket pair, of which this is one end."""

    pid: int
    sock: socket.socket
    stop: int


@pytest.fixture
def maker() -> Iterator[Maker]:
    """A process that lives until its pipe is closed."""
    reading, writing = os.pipe()
    here, there = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        os.close(writing)
        ours, theirs = socket.socketpair()
        socket.send_fds(there, [b"x"], [theirs.fileno()])
        os.read(reading, 1)
        ours.close()
        os._exit(0)
    os.close(reading)
    with here, there:
        _, fds, _, _ = socket.recv_fds(here, 1, 1)
    with socket.socket(fileno=fds[0]) as sock:
        yield Maker(pid, sock, writing)
    os.close(writing)
    os.waitpid(pid, 0)


@pytest.mark.parametrize("has_peerpidfd", [True, False])
def test_other_process(maker: Maker, monkeypatch: pytest.MonkeyPatch, has_peerpidfd: bool) -> None:
    """The pidfd is of the process that made the pair, close-on-exec, readable when it ends."""
    if not has_peerpidfd:
        monkeypatch.setattr(peer, "_SO_PEERPIDFD", 9999)
    assert peer_of(maker.sock).pid == maker.pid
    fd = peer_pidfd(maker.sock)
    try:
        assert not os.get_inheritable(fd)
        assert select.select([fd], [], [], 0)[0] == []
        os.write(maker.stop, b"x")
        assert select.select([fd], [], [], 20)[0] == [fd]
    finally:
        os.close(fd)


def test_own_process() -> None:
    """A pair that this process made itself is not watched."""
    a, b = socket.socketpair()
    with a, b:
        assert peer_of(a).pid == os.getpid()
        assert peer_pidfd(a) == -1


def test_nothing_to_watch(maker: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none of an unknown process, without room, and on systems that do not tell."""
    a, b = socket.socketpair()
    a.close()
    b.close()
    assert peer_of(a).pid == 0
    assert peer_pidfd(a) == -1

    def full(_: int) -> int:
        raise OSError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(peer, "_SO_PEERPIDFD", 9999)
        patched.setattr(os, "pidfd_open", full)
        assert peer_pidfd(maker.sock) == -1
    monkeypatch.setattr(peer.sys, "platform", "freebsd14")
    assert peer_of(maker.sock).pid == 0
