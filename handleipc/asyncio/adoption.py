"""Taking a connection over with an asyncio transport: whole, or not at all.

Until that has worked, a stand-in is the transport's protocol, and keeps what arrives. So the
application's protocol sees a connection that works, with all its bytes in their order, and one that
cannot be taken over is as it was.
"""

from __future__ import annotations

import asyncio
from ssl import MemoryBIO, SSLContext
from typing import Any, NamedTuple, Self, cast

__all__ = ["StandIn", "Tls"]


class Tls(NamedTuple):
    """How a connection is to be encrypted; times in seconds, None for asyncio's own."""

    context: SSLContext
    handshake_timeout: float | None
    shutdown_timeout: float | None

    @classmethod
    def of(
        cls,
        context: SSLContext | None,
        handshake_timeout: float | None,
        shutdown_timeout: float | None,
    ) -> Self | None:
        """Return these, or None without a context; find out before a byte is taken if they work.

        Raises:
            TypeError, ValueError, ssl.SSLError: they do not, for instance a client's context.
        """
        timeouts = (handshake_timeout, shutdown_timeout)
        if context is None:
            if timeouts != (None, None):
                raise ValueError("TLS timeouts are only meaningful with ssl")
            return None
        if not isinstance(context, SSLContext):
            raise TypeError(f"ssl takes an ssl.SSLContext, not a {type(context).__name__}")
        for seconds in timeouts:
            if seconds is not None and seconds <= 0:
                raise ValueError(f"a timeout of {seconds} s leaves no time")
        context.wrap_bio(MemoryBIO(), MemoryBIO(), server_side=True)
        return cls(context, *timeouts)


class StandIn(asyncio.Protocol):
    """The protocol of a transport until the one of the application takes its place.

    Args:
        head: bytes of the connection that were read before.
    """

    transport: asyncio.Transport | None = None

    def __init__(self, head: bytes) -> None:
        self.received: bytes = head
        self._is_encrypted = False
        self._at_eof = False
        self._lost: tuple[Exception | None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Know the transport."""
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Keep it."""
        self.received += data

    def eof_received(self) -> bool:
        """Note it, and leave the other direction open, which TLS cannot."""
        self._at_eof = True
        return not self._is_encrypted

    def connection_lost(self, exc: Exception | None) -> None:
        """Note it."""
        self._lost = (exc,)

    async def encrypt(self, tls: Tls) -> asyncio.Transport:
        """Do the handshake, as the server, with what was received first; return the new transport.

        Raises:
            OSError, ssl.SSLError: the client is gone, or the handshake failed.
        """
        transport = self.transport
        assert transport is not None
        if self._at_eof or transport.is_closing():
            raise ConnectionResetError("the client left before the TLS handshake")
        loop = asyncio.get_running_loop()
        transport.pause_reading()  # what comes from here on is the engine's to read
        received, self.received = self.received, b""
        self._is_encrypted = True

        def feed() -> None:
            if received:
                _deliver(transport.get_protocol(), received)

        # A task whose first step queues that the engine learns of the transport and that this reads
        # again. `feed` is queued right behind those, before anything is read: a plain Task, since a
        # loop's own may begin at once.
        upgrade: asyncio.Task[asyncio.Transport | None] = asyncio.Task(
            loop.start_tls(
                transport,
                self,
                tls.context,
                server_side=True,
                ssl_handshake_timeout=tls.handshake_timeout,
                ssl_shutdown_timeout=tls.shutdown_timeout,
            ),
            loop=loop,
        )
        loop.call_soon(loop.call_soon, feed)
        encrypted = await upgrade
        if encrypted is None:  # what asyncio returns of a client that sent its FIN meanwhile
            raise ConnectionResetError("the client left during the TLS handshake")
        self.transport = encrypted
        return encrypted

    def give_way(self, protocol: asyncio.BaseProtocol) -> None:
        """Put ``protocol`` in this one's place, and tell it what has come meanwhile.

        Raises:
            Exception: what the protocol raises.
        """
        transport = self.transport
        assert transport is not None
        was_closing = transport.is_closing()
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        # It may have put another in its own place, or closed the transport: then nothing follows.
        if self.received and (was_closing or not transport.is_closing()):
            _deliver(transport.get_protocol(), self.received)
        if self._at_eof and (was_closing or not transport.is_closing()):
            stays_open = cast(Any, transport.get_protocol()).eof_received()
            if not stays_open:
                transport.close()
        if self._lost is not None:
            asyncio.get_running_loop().call_soon(protocol.connection_lost, *self._lost)

    def abort(self) -> None:
        """Close the transport, if there is one."""
        if self.transport is not None:
            self.transport.abort()


def _deliver(protocol: asyncio.BaseProtocol, data: bytes) -> None:
    # uvloop's TLS engine has the methods, and no base class.
    if isinstance(protocol, asyncio.BufferedProtocol) or not hasattr(protocol, "data_received"):
        _fill(cast(asyncio.BufferedProtocol, protocol), data)
    else:
        protocol.data_received(data)


def _fill(protocol: asyncio.BufferedProtocol, data: bytes) -> None:
    while data:
        buffer = memoryview(protocol.get_buffer(len(data)))
        if not buffer:
            raise RuntimeError("get_buffer() returned an empty buffer")  # as asyncio
        count = min(len(buffer), len(data))
        buffer[:count] = data[:count]
        data = data[count:]
        protocol.buffer_updated(count)
