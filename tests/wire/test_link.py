"""The socket of one channel: what an end reads of it."""

from __future__ import annotations

import socket

import pytest

from handleipc.wire.link import Link


def test_rest_behind_a_reset() -> None:
    """What the peer had written is read, and then its end, though it left something unread."""
    ours, theirs = socket.socketpair()
    link = Link(ours, 1000)
    ours.send(b"unread")
    theirs.send(b"1\n2\n")
    theirs.close()
    assert len(link.read_rest().ends) == 2
    assert link.read_rest().ends == []
    assert link.at_eof
    link.close()


def test_rest_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel says once that the peer has reset the connection: for ever means not knowing."""
    ours, theirs = socket.socketpair()

    def refuse(lines: int = 0) -> None:
        raise ConnectionResetError

    with theirs:
        link = Link(ours, 1000)
        monkeypatch.setattr(link, "read", refuse)
        with pytest.raises(ConnectionResetError):
            link.read_rest()
        link.close()


def test_socket_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that cannot be made leaves nothing open."""
    ours, theirs = socket.socketpair()

    def refuse(self: socket.socket, blocking: bool) -> None:
        raise OSError("no memory")

    with theirs:
        with monkeypatch.context() as patch:
            patch.setattr(socket.socket, "setblocking", refuse)
            with pytest.raises(OSError, match="no memory"):
                Link(ours, 1000)
        assert ours.fileno() == -1
