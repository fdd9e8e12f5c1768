"""``Connection`` and ``Server`` for threads without an event loop."""

from __future__ import annotations

import socket as stdlib_socket
from asyncio.trsock import TransportSocket
from typing import Self

import handleipc.asyncio.connection as front
from handleipc.asyncio.registry import default_registry
from handleipc.asyncio.server import ConnectionCount
from handleipc.asyncio.server import Server as AsyncServer
from handleipc.blocking.taking import Takes, call, run, within
from handleipc.exceptions import ChannelClosed
from handleipc.handles.addresses import Address
from handleipc.handles.connection import BaseConnection
from handleipc.handles.kinds import prepare_connection
from handleipc.handles.sockets import Socket

__all__ = ["Connection", "Server"]


class Connection(BaseConnection):
    """One live stream connection whose bytes nobody has read, as ``handleipc.Connection``.

    Give it to ``send``, or use it up with ``end``, ``socket`` or ``detach``; dropped, it warns and
    closes.
    """

    __slots__ = ()

    def socket(self) -> Socket:
        """Return a blocking ``socket.socket`` that takes the descriptor over.

        Raises:
            DescriptorReleased, OSError: as ``handleipc.Connection.socket``.
        """
        sock = super().socket()
        sock.settimeout(None)
        return sock

    def peek_until(
        self,
        separator: bytes,
        *,
        limit: int = front.PEEK_LIMIT,
        timeout: float | None = front.PEEK_TIMEOUT,
    ) -> bytes:
        """Wait until ``separator`` has arrived, and return everything up to its end, unread.

        Raises:
            TimeoutError, LimitOverrunError, IncompleteReadError, OSError, ValueError,
            DescriptorReleased: as ``handleipc.Connection.peek_until``.
        """
        return run(lambda: front.peek_until(self, separator, limit, timeout))

    def end(self, data: bytes = b"", *, timeout: float | None = None) -> None:
        """Write all of ``data``, send FIN, and return; the connection is used up.

        What the client still sends is dropped in later calls, for two seconds at most.

        Raises:
            OSError, TypeError, DescriptorReleased: as ``handleipc.Connection.end``.
            TimeoutError: the client did not read all of it in time; the connection is closed.
        """
        front.last_bytes(data)  # refused while the connection is still this object's
        run(lambda: within(timeout, front.Connection._from(self).end(data)))


default_registry.add_preparer(Connection, prepare_connection)


class Server(Takes[Connection]):
    """A listening socket, and an iterator over the connections it accepts.

    As ``handleipc.Server``, whose methods and attributes mean the same. Made by ``listen``, or
    received. It accepts only in a call that takes: others are left in the kernel's backlog.
    """

    def __init__(self, server: AsyncServer) -> None:
        super().__init__()
        self._server = server

    async def _next(self) -> Connection:
        return Connection._from(await anext(self._server))

    def accept(self, *, timeout: float | None = None) -> Connection:
        """Return the next connection.

        Raises:
            ChannelClosed: it was closed or stopped, and nobody is left to take.
            OSError: the listener cannot accept any more.
            TimeoutError: ``timeout`` passed.
        """
        try:
            return self._take(self._next, timeout)
        except StopAsyncIteration:
            raise ChannelClosed("this server is closed, and nobody is left to take") from None

    def get_connections(self, *, timeout: float | None = 10.0) -> ConnectionCount:
        """Count its connections, here and wherever they were handed to, for so long."""
        return run(lambda: self._server.get_connections(timeout=timeout))

    def wait_closed(self, *, timeout: float | None = None) -> None:
        """Wait until it is closed and the last of its connections has, wherever it is."""
        run(lambda: within(timeout, self._server.wait_closed()))

    def stop(self, *, unlink: bool | None = None) -> None:
        """Stop listening without losing a client: iteration ends after the last of those here."""
        call(self._server.stop, unlink=unlink)

    def close(self, *, unlink: bool | None = None) -> int:
        """Stop listening, and close the connections nobody has taken; returns how many."""
        taken = [self._taken.popleft() for _ in range(len(self._taken))]
        for connection in taken:
            connection.close()
        return len(taken) + call(self._server.close, unlink=unlink)

    def detach(self) -> int:
        """Give the listening descriptor away: the caller owns it, and this server has stopped."""
        return call(self._server.detach)

    def socket(self) -> stdlib_socket.socket:
        """Return a blocking ``socket.socket`` that takes the listening descriptor over."""
        sock = call(self._server.socket)
        sock.settimeout(None)
        return sock

    @property
    def sockets(self) -> tuple[TransportSocket, ...]:
        """The listening socket, to look at; none once closed."""
        return self._server.sockets

    @property
    def sockname(self) -> Address:
        """The address it listens at."""
        return self._server.sockname

    @property
    def connections(self) -> int:
        """Connections of this server that are open in this process."""
        return call(lambda: self._server.connections)

    @property
    def waiting(self) -> int:
        """Connections accepted and not yet taken."""
        return self._server.waiting + len(self._taken)

    @property
    def max_connections(self) -> int | None:
        """Connections above which new ones are dropped; None for no such number."""
        return self._server.max_connections

    @max_connections.setter
    def max_connections(self, value: int | None) -> None:
        self._server.max_connections = value

    @property
    def shared(self) -> bool:
        """Whether another process may accept from the same listener, so far as is known."""
        return self._server.shared

    @shared.setter
    def shared(self, value: bool) -> None:
        self._server.shared = value

    @property
    def closed(self) -> bool:
        """Whether it no longer listens."""
        return self._server.closed

    def fileno(self) -> int:
        """Return the listening descriptor, borrowed; -1 once closed."""
        return self._server.fileno()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<blocking {self._server!r}>"
