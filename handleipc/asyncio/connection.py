"""``Connection``: a handed-over connection, with the ways asyncio has of using one."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Callable
from typing import Any, TypeVar, cast

from handleipc.asyncio.lingering import at_eof, linger
from handleipc.connection import BaseConnection

__all__ = ["Connection"]

ProtocolT = TypeVar("ProtocolT", bound=asyncio.BaseProtocol)

# What the kernel says of a client that is not there any more: it has reset the connection, or has
# not answered for so long that the kernel gave it up, then with what the network said last.
_CLIENT_IS_GONE = {
    errno.EPIPE,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.ESHUTDOWN,
    errno.ETIMEDOUT,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
}


class Connection(BaseConnection):
    """One live stream connection whose bytes nobody has read.

    Got from a ``Server`` or from a channel, given to ``send``. Use it up with one of ``end``,
    ``open``, ``start``, ``socket`` or ``detach``, or ``close`` it; dropped, it warns and closes.
    """

    __slots__ = ()

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Take the connection over as a pair of asyncio streams; ``head`` is read first.

        Raises:
            DescriptorReleased: it is closed, detached or on its way.
        """
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(loop=loop)
        transport, protocol = await self.start(
            lambda: asyncio.StreamReaderProtocol(reader, loop=loop)
        )
        writer = asyncio.StreamWriter(
            cast(asyncio.WriteTransport, transport), protocol, reader, loop
        )
        return reader, writer

    async def start(
        self, protocol_factory: Callable[[], ProtocolT]
    ) -> tuple[asyncio.BaseTransport, ProtocolT]:
        """Take the connection over with an asyncio protocol, which receives ``head`` first.

        Raises:
            DescriptorReleased: it is closed, detached or on its way.
        """
        sock = self._to_socket()
        head = self.take_head()

        def build() -> ProtocolT:
            protocol = protocol_factory()
            return _with_head(protocol, head) if head else protocol

        try:
            loop = asyncio.get_running_loop()
            return await loop.connect_accepted_socket(build, sock)
        except BaseException:
            sock.close()
            raise

    async def end(self, data: bytes = b"") -> None:
        """Write all of ``data``, send FIN, and return; the connection is used up.

        In the background what the client still sends is read and dropped until its EOF, two
        seconds at most, then the descriptor is closed: closing with unread bytes would make the
        kernel reset the connection, and the client lose the answer.

        A client that is gone, since it has reset the connection or does not answer any more, is no
        error: nothing can be delivered, and the connection is closed. Nobody is told whether the
        client has got the data, with ``end`` or without.

        Raises:
            OSError: the data could not be written for another reason; it is closed.
            DescriptorReleased: it is closed, detached or on its way.
        """
        sock = self._to_socket()
        self.take_head()
        try:
            sent = _send_now(sock, data)
            if sent < len(data):
                loop = asyncio.get_running_loop()
                await loop.sock_sendall(sock, memoryview(data)[sent:])
            with contextlib.suppress(OSError):
                # A client that reset meanwhile has no use for a FIN.
                sock.shutdown(socket.SHUT_WR)
        except BaseException as error:
            sock.close()
            if isinstance(error, OSError) and error.errno in _CLIENT_IS_GONE:
                return
            raise
        if at_eof(sock):
            sock.close()
            return
        linger(sock)


def _send_now(sock: socket.socket, data: bytes) -> int:
    try:
        return sock.send(data) if data else 0
    except BlockingIOError:
        return 0


def _with_head(protocol: ProtocolT, head: bytes) -> ProtocolT:
    """Make ``protocol`` receive ``head`` right after it learns of its connection."""
    connection_made = protocol.connection_made

    def connection_made_with_head(transport: asyncio.BaseTransport) -> None:
        connection_made(transport)
        receiver = cast(Any, protocol)
        if isinstance(protocol, asyncio.BufferedProtocol):
            _fill(protocol, head)
        else:
            receiver.data_received(head)

    protocol.connection_made = connection_made_with_head  # type: ignore[method-assign]
    return protocol


def _fill(protocol: asyncio.BufferedProtocol, head: bytes) -> None:
    while head:
        buffer = memoryview(protocol.get_buffer(len(head)))
        if not buffer:
            raise RuntimeError("get_buffer() returned an empty buffer")  # as asyncio
        count = min(len(buffer), len(head))
        buffer[:count] = head[:count]
        head = head[count:]
        protocol.buffer_updated(count)
