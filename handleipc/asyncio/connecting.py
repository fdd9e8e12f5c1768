"""``connect`` and ``listen_channels``: channels between processes that did not start each other.

A Unix socket path is where they meet. Who may is decided by the user that the kernel says the other
process runs as, since whoever has the other end of a channel can keep what is sent there.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Collection
from typing import Self

from handleipc.asyncio.channel import Channel
from handleipc.asyncio.listening import BACKLOG, Listening, listen_unix
from handleipc.asyncio.logs import throttle
from handleipc.asyncio.server import Server
from handleipc.asyncio.starting import check_limits
from handleipc.handles.addresses import Address
from handleipc.limits import Limits
from handleipc.wire.peer import Peer, peer_of

__all__ = ["ChannelListener", "connect", "listen_channels"]

Users = Collection[int] | None

# How long connect() waits for room in the other's backlog, and how often it looks. Not tuned.
CONNECT_TIMEOUT = 10.0
CONNECT_INTERVAL = 0.01


def _is_welcome(peer: Peer, users: Users) -> bool:
    return users is None or peer.uid == os.geteuid() or peer.uid in users


async def connect(
    path: str | bytes | os.PathLike[str],
    *,
    users: Users = (),
    limits: Limits | None = None,
    accept_handles: bool = True,
    timeout: float | None = CONNECT_TIMEOUT,
) -> Channel:
    """Connect to a process that has called ``listen_channels`` with this path.

    Args:
        path: of its Unix socket; one that begins with NUL is abstract.
        users: ids of users beside this process's own whom to trust with what is sent; None for
            anybody. Whoever called ``listen`` at that path must be one of them.
        limits: the bounds of this end; None for the defaults.
        accept_handles: False refuses descriptors from the peer, as ``spawn`` does.
        timeout: seconds to wait while its backlog is full; None for ever.

    Raises:
        PermissionError: another user's process listens there, or the path is closed to us.
        FileNotFoundError, ConnectionRefusedError: nobody listens there.
        TimeoutError: ``timeout`` passed.
        OSError: the system refuses for another reason.
    """
    check_limits(limits)
    # Closed at the end of the block, unless the channel has it.
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        async with asyncio.timeout(timeout):
            await _connect(sock, os.fspath(path))
        peer = peer_of(sock)
        if not _is_welcome(peer, users):
            raise PermissionError(
                f"user {peer.uid} listens at {os.fspath(path)!r}, not user {os.geteuid()}, who runs"
                " this process: whom else to trust is said with users="
            )
        return Channel.over(sock, role="child", limits=limits, accept_handles=accept_handles)


async def _connect(sock: socket.socket, path: str | bytes) -> None:
    # Not the loop's sock_connect: with a full backlog a Unix socket says EAGAIN and has not begun
    # to connect, which asyncio takes for EINPROGRESS. Nothing tells when there is room.
    while True:
        try:
            return sock.connect(path)
        except BlockingIOError:
            await asyncio.sleep(CONNECT_INTERVAL)


def listen_channels(
    path: str | bytes | os.PathLike[str],
    *,
    users: Users = (),
    limits: Limits | None = None,
    accept_handles: bool = True,
    backlog: int = BACKLOG,
) -> Listening[ChannelListener]:
    """Let other processes ``connect`` at a Unix socket path, and get a channel to each.

    ``async with listen_channels(path) as listener: async for channel in listener: ...``. Leaving
    the block stops listening, and closes no channel.

    Args:
        path: as of ``listen_unix``.
        users: ids of users beside this process's own who may connect; None for anybody. Others are
            turned away, and the log says so.
        limits: the bounds of the channels' ends here; None for the defaults.
        accept_handles: False refuses descriptors from them, as ``spawn`` does.
        backlog: connections the kernel holds for us.

    Raises:
        ValueError, OSError: as ``listen_unix``.
    """
    check_limits(limits)
    listening = listen_unix(path, backlog=backlog)

    async def build() -> ChannelListener:
        return ChannelListener(await listening, users, limits, accept_handles)

    return Listening(build)


class ChannelListener:
    """A listening Unix socket, and an iterator over channels to those who connect.

    Made by ``listen_channels``.
    """

    def __init__(
        self, server: Server, users: Users, limits: Limits | None, accept_handles: bool
    ) -> None:
        self._server = server
        self._users = users
        self._limits = limits
        self._accept_handles = accept_handles

    @property
    def sockname(self) -> Address:
        """The path it listens at."""
        return self._server.sockname

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Channel:
        async for connection in self._server:
            with connection.socket() as sock:  # closed there, unless the channel has it
                peer = peer_of(sock)
                if _is_welcome(peer, self._users):
                    return Channel.over(
                        sock,
                        role="parent",
                        limits=self._limits,
                        accept_handles=self._accept_handles,
                    )
            throttle.warning(
                "turned away",
                "process %d of user %s was turned away from %r: users= says who may connect",
                peer.pid,
                peer.uid,
                self.sockname,
            )
        raise StopAsyncIteration

    def close(self, *, unlink: bool | None = None) -> None:
        """Stop listening. Who waits in the kernel's backlog is reset; channels live on.

        Args:
            unlink: as of ``Server.close``.
        """
        self._server.close(unlink=unlink)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<ChannelListener {self._server!r}>"
