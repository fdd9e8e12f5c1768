"""asyncio's own objects as handles: ``StreamWriter``, transports, ``asyncio.Server``.

A transport reads as soon as it can, and what it has read is in this process's memory. It is paused
before it is sent; bytes that a stream holds go along to a native peer, which gives them to whoever
reads the connection first. Node has no word for them.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any, cast

from handleipc import codec, conversions
from handleipc.asyncio.handles import default_registry
from handleipc.conversions import NET_SERVER, NET_SOCKET, pend_held
from handleipc.exceptions import UnsupportedHandle
from handleipc.pending import Held, PendingHandle

__all__ = ["StreamPending"]


class StreamPending(Held):
    """A transport on its way: paused meanwhile, and reading again if it comes back."""

    __slots__ = ("_keep_open", "_resume", "_transport")

    def __init__(
        self,
        handle: object,
        transport: asyncio.Transport,
        options: bytes,
        *,
        resume: bool,
        keep_open: bool,
    ) -> None:
        sock = transport.get_extra_info("socket")
        super().__init__(
            handle,
            NET_SOCKET,
            options,
            read=lambda: [sock.fileno()],
            native_only=bool(options),
            # Closes without shutdown: the connection lives on in the other process.
            on_delivered=None if keep_open else transport.abort,
        )
        self._transport = transport
        self._resume = resume
        self._keep_open = keep_open

    def delivered(self) -> None:
        """The peer owns it, or with ``keep_open`` shares it: then read on."""
        super().delivered()
        if self._keep_open:
            self._read_on()

    def returned(self) -> None:
        """It was not delivered: read on."""
        super().returned()
        self._read_on()

    def _read_on(self) -> None:
        if self._resume and not self._transport.is_closing():
            self._transport.resume_reading()


def _pend_writer(writer: asyncio.StreamWriter, keep_open: bool) -> PendingHandle:
    transport = cast(asyncio.Transport, writer.transport)
    # The reader's own buffer is private, and there is no public way to look into it.
    reader = cast(Any, writer)._reader
    unread = bytes(reader._buffer) if reader is not None else b""
    _check(writer, transport)
    resume = transport.is_reading()
    if resume:
        transport.pause_reading()
    options = codec.spell({"unread": conversions.spell_unread(unread)}) if unread else b""
    return StreamPending(writer, transport, options, resume=resume, keep_open=keep_open)


def _pend_transport(transport: asyncio.Transport, keep_open: bool) -> PendingHandle:
    _check(transport, transport)
    if transport.is_reading():
        raise UnsupportedHandle(
            "this transport is reading, and its protocol may have bytes of the connection:"
            " pause_reading() in connection_made(), on uvloop right after it, and send it then"
        )
    return StreamPending(transport, transport, b"", resume=False, keep_open=keep_open)


def _check(handle: object, transport: asyncio.Transport) -> None:
    name = type(handle).__name__
    if not hasattr(transport, "get_write_buffer_size") or _is_one_way(transport):
        raise UnsupportedHandle(f"this {name} is no stream connection")
    if transport.is_closing():
        raise UnsupportedHandle(f"this {name} is closed")
    if transport.get_extra_info("ssl_object") is not None:
        raise UnsupportedHandle(
            f"a {name} with TLS cannot be sent: its keys live in this process."
            " Send the plain connection before the handshake"
        )
    sock = transport.get_extra_info("socket")
    if sock is None or sock.type != socket.SOCK_STREAM:
        raise UnsupportedHandle(f"this {name} is no stream connection")
    if transport.get_write_buffer_size():
        raise UnsupportedHandle(
            f"this {name} holds {transport.get_write_buffer_size()} bytes not yet written:"
            " await drain() with write_buffer limits of 0 before sending it"
        )


def _is_one_way(transport: asyncio.Transport) -> bool:
    """Whether it is a pipe; uvloop's have all methods, and raise where they make no sense."""
    try:
        transport.is_reading()
    except (AttributeError, NotImplementedError):
        return True
    return transport.get_extra_info("pipe") is not None


def _pend_asyncio_server(server: asyncio.Server, keep_open: bool) -> PendingHandle:
    sockets = server.sockets
    if len(sockets) != 1:
        raise UnsupportedHandle(
            f"this server listens on {len(sockets)} sockets, and one handle is one: send each"
        )
    return pend_held(server, NET_SERVER, sockets[0])


def _is_transport(handle: object) -> bool:
    return isinstance(handle, asyncio.Transport) or (
        hasattr(handle, "get_extra_info") and hasattr(handle, "pause_reading")
    )


def _pend_by_shape(handle: Any, keep_open: bool) -> PendingHandle | None:
    """Prepare what only looks like asyncio's: uvloop's classes derive from none of them."""
    if _is_transport(handle):
        return _pend_transport(handle, keep_open)
    if isinstance(handle, asyncio.AbstractServer) or (
        hasattr(handle, "sockets") and hasattr(handle, "start_serving")
    ):
        return _pend_asyncio_server(handle, keep_open)
    return None


default_registry.add_pender(asyncio.StreamWriter, _pend_writer)
default_registry.add_fallback(_pend_by_shape)
