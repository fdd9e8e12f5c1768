"""``Connection``: a handed-over connection, with the ways asyncio has of using one."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from ssl import SSLContext
from typing import TypeVar

from handleipc.asyncio.adoption import StandIn, Tls
from handleipc.asyncio.arrivals import arrivals, has_ended
from handleipc.asyncio.lingering import linger
from handleipc.handles.connection import BaseConnection
from handleipc.handles.sockets import Socket, clear_linger
from handleipc.wire.syscalls import discard, end_stream

__all__ = ["PEEK_LIMIT", "PEEK_TIMEOUT", "Connection", "last_bytes", "peek_until"]

ProtocolT = TypeVar("ProtocolT", bound=asyncio.BaseProtocol)

# What peek_until() looks at unless told otherwise: what servers allow for the head of a request,
# and how long for it to come.
PEEK_LIMIT = 16 * 1024
PEEK_TIMEOUT = 10.0

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

    Got from a ``Server`` or from a channel, or made with ``from_socket``, given to ``send``. Use it
    up with one of ``end``, ``open``, ``start``, ``socket`` or ``detach``, or ``close`` it; dropped,
    it warns and closes.

    Whoever has handed it over may hold a copy of it, and O_NONBLOCK and SO_LINGER belong to all
    copies. Nothing done here waits for what others have set there. On uvloop that cannot be helped
    once ``open`` or ``start`` has given it to libuv, whose writes and whose close rely on both.
    """

    __slots__ = ()

    async def open(
        self,
        *,
        ssl: SSLContext | None = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Take the connection over as a pair of asyncio streams; ``head`` is read first.

        They are a server's: ``writer.start_tls(context)`` waits for the handshake of a client that
        was told to begin it (STARTTLS); for one that begins with it, give ``ssl``.

        Args:
            ssl, ssl_handshake_timeout, ssl_shutdown_timeout: as ``start``.

        Raises:
            DescriptorReleased, OSError, TypeError, ValueError, ssl.SSLError: as ``start``.
        """
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(loop=loop)
        writers: list[asyncio.StreamWriter] = []
        await self.start(
            # With a callback it is a server's protocol, for start_tls() among others.
            lambda: asyncio.StreamReaderProtocol(
                reader, lambda _, writer: writers.append(writer), loop=loop
            ),
            ssl=ssl,
            ssl_handshake_timeout=ssl_handshake_timeout,
            ssl_shutdown_timeout=ssl_shutdown_timeout,
        )
        return reader, writers[0]

    async def start(
        self,
        protocol_factory: Callable[[], ProtocolT],
        *,
        ssl: SSLContext | None = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
    ) -> tuple[asyncio.Transport, ProtocolT]:
        """Take the connection over with an asyncio protocol, which receives ``head`` first.

        As ``loop.connect_accepted_socket``: this end is the server's. If it fails, or is cancelled,
        or the protocol raises in ``connection_made`` or as it is given ``head``, the connection is
        as it was, ``head`` included; but a TLS handshake that has begun uses it up. Only where no
        descriptor is free to keep a copy meanwhile a failure closes it.

        Args:
            protocol_factory: makes the protocol.
            ssl: the context for a TLS handshake with the client, which comes first; ``head`` is
                what the client sent of it.
            ssl_handshake_timeout: seconds before an unfinished handshake ends the connection; None
                for asyncio's 60.
            ssl_shutdown_timeout: seconds that the end of TLS may take; None for asyncio's 30.

        Raises:
            DescriptorReleased: it is closed, detached or on its way.
            TypeError, ValueError: ``ssl`` is no context, or a timeout makes no sense.
            OSError, ssl.SSLError: the handshake failed, or the context is not a server's.
        """
        tls = Tls.of(ssl, ssl_handshake_timeout, ssl_shutdown_timeout)
        return await self._start(protocol_factory, tls)

    async def _start(
        self,
        protocol_factory: Callable[[], ProtocolT],
        tls: Tls | None,
        on_end: Callable[[], object] | None = None,
    ) -> tuple[asyncio.Transport, ProtocolT]:
        """Do what ``start`` says, and call ``on_end`` when a connection that started has ended."""
        loop = asyncio.get_running_loop()
        self.fileno()  # refuses one that is closed or on its way
        protocol = protocol_factory()
        sock = self._to_socket()
        sock._on_end = on_end
        copy = _copy(sock.fileno())
        stand_in = StandIn(self._take_head())
        try:
            clear_linger(sock)  # uvloop closes the descriptor itself, and asks nobody
            await loop.connect_accepted_socket(lambda: stand_in, sock)
            if tls is not None:
                _close_copy(copy)
                copy = -1
                await stand_in.encrypt(tls)
            stand_in.give_way(protocol)
        except BaseException as error:
            self._undo(error, sock, stand_in, copy)
            raise
        _close_copy(copy)
        assert stand_in.transport is not None
        return stand_in.transport, protocol

    def _undo(self, error: BaseException, sock: Socket, stand_in: StandIn, copy: int) -> None:
        """Be what it was before ``start``, if there is a copy of the descriptor."""
        sock._on_end = None
        if copy >= 0:
            self._group, sock._group = sock._group, None
            self._head = stand_in.received
            self._restore(copy)
        if stand_in.transport is not None:
            stand_in.abort()
        elif isinstance(error, Exception):
            sock.close()
        # else it was cancelled on the way, and the loop closes what it has begun with

    async def peek_until(
        self, separator: bytes, *, limit: int = PEEK_LIMIT, timeout: float | None = PEEK_TIMEOUT
    ) -> bytes:
        r"""Wait until ``separator`` has arrived, and return everything up to its end, unread.

        For routing by content: whoever gets the connection afterwards reads the same bytes. They
        stay in the kernel, and no option of the socket is changed. Cancelled, nothing has happened.

        Args:
            separator: for instance ``b"\r\n\r\n"``, the end of an HTTP request's head.
            limit: how many bytes to look at. The kernel must have room for them: a system's
                smallest receive buffer has 4 KiB on Linux, the usual one 128 KiB.
            timeout: seconds to wait; None for ever.

        Raises:
            TimeoutError: the client has not sent it in time.
            asyncio.LimitOverrunError: there are ``limit`` bytes, and it is not among them.
            asyncio.IncompleteReadError: the client has sent its FIN before; ``partial`` is all that
                came.
            OSError: the client has reset the connection.
            ValueError: ``separator`` is empty, or longer than ``limit``.
            DescriptorReleased: it is closed, detached or on its way.
        """
        return await peek_until(self, separator, limit, timeout)

    async def end(self, data: bytes = b"") -> None:
        """Write all of ``data``, send FIN, and return; the connection is used up.

        In the background what the client still sends is read and dropped until its EOF, two
        seconds at most, then the descriptor is closed: closing with unread bytes would make the
        kernel reset the connection, and the client lose the answer.

        A client that is gone, since it has reset the connection or does not answer any more, is no
        error: nothing can be delivered, and the connection is closed. Nobody is told whether the
        client has got the data, with ``end`` or without.

        Raises:
            OSError: the data could not be written for another reason, or the system refuses to
                begin; it is closed.
            TypeError: ``data`` is not bytes; the connection is as it was.
            DescriptorReleased: it is closed, detached or on its way.
        """
        rest = last_bytes(data)
        fd = self.fileno()
        self._take_head()
        ending: Connection | Socket = self
        try:
            written = end_stream(fd, data if type(data) is bytes else bytes(rest))
            if written < len(rest):
                ending = self._to_socket()
                await asyncio.get_running_loop().sock_sendall(ending, rest[written:])
                written = len(rest) + end_stream(ending.fileno(), b"")
        except BaseException as error:
            ending.close()
            if isinstance(error, OSError) and error.errno in _CLIENT_IS_GONE:
                return
            raise
        if written > len(rest):
            ending.close()
        else:
            linger(self._from(self) if ending is self else ending)


async def peek_until(
    connection: BaseConnection, separator: bytes, limit: int, timeout: float | None
) -> bytes:
    """Do what ``Connection.peek_until`` says, for any front's connection."""
    if not 0 < len(separator) <= limit:
        raise ValueError(f"a separator has 1 to {limit} bytes (limit=), not {len(separator)}")
    if (found := _find(connection, separator, limit)) is not None:
        return found
    async with asyncio.timeout(timeout):
        with arrivals(connection.fileno()) as arrival:
            while (found := _find(connection, separator, limit)) is None:
                await arrival.wait()
                arrival.clear()
    return found


def _find(connection: BaseConnection, separator: bytes, limit: int) -> bytes | None:
    """Return what has arrived up to the end of ``separator``, or None. Raises as peek_until."""
    ended = has_ended(connection.fileno())  # first: what is there now is all that comes
    seen = connection.head[:limit]
    if len(seen) < limit:
        try:
            more = connection._peek_at_socket(limit - len(seen))
        except BlockingIOError:
            pass
        else:
            ended = ended or not more
            seen += more
    start, found, _ = seen.partition(separator)
    if found:
        return start + found
    if len(seen) >= limit:
        raise asyncio.LimitOverrunError(
            f"{limit} bytes have come (limit=), and {separator!r} is not among them", len(seen)
        )
    if ended:
        raise asyncio.IncompleteReadError(seen, None)
    return None


def last_bytes(data: bytes) -> memoryview:
    """Return what ``end`` is to write. Raises TypeError for what is not bytes."""
    if isinstance(data, str):
        raise TypeError("end() takes bytes: give text.encode()")
    return memoryview(data).cast("B")


def _copy(fd: int) -> int:
    """Return a second descriptor of the same connection, or -1 if there is no room for one."""
    try:
        return os.dup(fd)
    except OSError:
        return -1


def _close_copy(copy: int) -> None:
    if copy >= 0:
        discard(copy)
