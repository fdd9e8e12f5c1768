"""asyncio's own objects as handles: ``StreamWriter``, transports, ``asyncio.Server``.

A transport reads as soon as it can, and what it has read is in this process's memory. It is paused
before it is sent; bytes that a stream holds go along to a native peer, which gives them to whoever
reads the connection first. Node has no word for them. A transport without a stream is taken only if
it is known to have read nothing: what its protocol has, nobody can ask.
"""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct
import sys
import termios
from asyncio.trsock import TransportSocket
from typing import Any, cast

from handleipc.asyncio.registry import default_registry
from handleipc.exceptions import HandleNotDelivered, UnsupportedHandle
from handleipc.handles import kinds
from handleipc.handles.kinds import HAS_RESET, NET_SERVER, NET_SOCKET, prepare_held
from handleipc.handles.pending import Held, PendingHandle
from handleipc.handles.sockets import Socket, clear_linger
from handleipc.wire import codec

__all__ = ["StreamPending"]

_ACCEPT_HERE = (
    "accept with handleipc.listen() or listen_unix(), whose connections nobody has read, or send a"
    " StreamWriter, which carries what it has read"
)
# struct tcp_info of linux/tcp.h: the state in its first byte, tcpi_bytes_received.
_BYTES_RECEIVED_AT = 128
_TCP_INFO_SIZE = _BYTES_RECEIVED_AT + 8
# States after the client's FIN, which counts as a byte received and is none to be read.
_AFTER_FIN = {6, 8, 9, 11}


class StreamPending(Held):
    """A transport on its way: paused meanwhile, and reading again if it comes back."""

    __slots__ = ("_is_on_its_way", "_keep_open", "_resume", "_transport")

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
            on_delivered=None if keep_open else self._close,
        )
        self._transport = transport
        self._resume = resume
        self._keep_open = keep_open
        self._is_on_its_way = True
        self._pause()
        if isinstance(sock, TransportSocket):
            # In connection_made() asyncio has yet to begin to read, and some versions (3.11.2) then
            # do it although the transport is paused.
            asyncio.get_running_loop().call_soon(self._pause)

    def _pause(self) -> None:
        """Stop reading, also where a transport that is paused reads all the same."""
        transport = self._transport
        if self._is_on_its_way and not transport.is_closing():
            if not transport.is_reading():
                transport.resume_reading()
            transport.pause_reading()

    def _close(self) -> None:
        """Close our copy without shutdown: the connection lives on in the other process."""
        clear_linger(self._transport.get_extra_info("socket"))
        self._transport.abort()

    def delivered(self) -> None:
        """The peer owns it, or with ``keep_open`` shares it: then read on."""
        self._is_on_its_way = False
        super().delivered()
        if self._keep_open:
            self._read_on()

    def returned(self) -> None:
        """It was not delivered: read on."""
        self._is_on_its_way = False
        super().returned()
        self._read_on()

    def _read_on(self) -> None:
        if self._resume and not self._transport.is_closing():
            self._transport.resume_reading()


# -- streams -------------------------------------------------------------------------------------


def _prepare_writer(writer: asyncio.StreamWriter, keep_open: bool) -> PendingHandle:
    transport = cast(asyncio.Transport, writer.transport)
    _check(writer, transport)
    reader = _reader_of(writer, transport)
    if reader is None:
        _refuse_read(writer, transport)
        return StreamPending(writer, transport, b"", resume=False, keep_open=keep_open)
    if not _is_of_asyncio(transport) and _is_being_made(transport, reader):
        raise UnsupportedHandle(
            "this StreamWriter has yet to begin to read, which uvloop does even if it is paused:"
            " send it from a coroutine, as start_server() runs an `async def` callback"
        )
    is_reading = transport.is_reading()
    unread = bytes(reader._buffer)
    options = codec.spell({"unread": kinds.spell_unread(unread)}) if unread else b""
    return StreamPending(writer, transport, options, resume=is_reading, keep_open=keep_open)


def _reader_of(writer: asyncio.StreamWriter, transport: asyncio.Transport) -> Any:
    """Return the reader that has all that the transport read, or None if another protocol has it.

    The reader and its buffer are private, and there is no public way to look into it.
    """
    reader = cast(Any, writer)._reader
    protocol = transport.get_protocol()
    if not isinstance(protocol, asyncio.StreamReaderProtocol):
        return None
    return reader if cast(Any, protocol)._stream_reader is reader else None


def _is_being_made(transport: asyncio.Transport, reader: Any) -> bool:
    """Say whether connection_made() of a stream's protocol runs now, or might."""
    protocol = cast(Any, transport.get_protocol())
    if type(protocol) is asyncio.StreamReaderProtocol:
        # Only while it runs the callback of start_server() it holds the reader itself.
        return getattr(protocol, "_strong_reader", None) is not None
    # Another connection_made() than asyncio's: nobody can tell it from a pause of the application.
    return not (transport.is_reading() or reader._paused or reader._eof)


# -- transports ----------------------------------------------------------------------------------


def _prepare_transport(transport: asyncio.Transport, keep_open: bool) -> PendingHandle:
    _check(transport, transport)
    _refuse_read(transport, transport)
    return StreamPending(transport, transport, b"", resume=False, keep_open=keep_open)


def _refuse_read(handle: object, transport: asyncio.Transport) -> None:
    name = type(handle).__name__
    if not _is_of_asyncio(transport):
        raise UnsupportedHandle(
            f"this {name} is of another loop than asyncio's own, for instance uvloop's, which"
            " begins reading before it can be paused, so its protocol may have bytes:"
            f" {_ACCEPT_HERE}"
        )
    if transport.is_reading():
        raise UnsupportedHandle(
            f"this {name} is reading, and its protocol may have bytes of the connection:"
            f" pause_reading() in connection_made(), or better {_ACCEPT_HERE}"
        )
    if not _has_read_nothing(transport.get_extra_info("socket")):
        raise UnsupportedHandle(
            f"this {name} may have read bytes of the connection, which its protocol has:"
            f" {_ACCEPT_HERE}"
        )


def _is_of_asyncio(transport: asyncio.Transport) -> bool:
    return isinstance(transport.get_extra_info("socket"), TransportSocket)


def _has_read_nothing(sock: TransportSocket) -> bool:
    """Say whether nobody is known to have read anything from this connection in this process.

    A ``Socket`` knows it itself. Of other TCP sockets Linux knows how much came and how much of it
    waits to be read. Of all others, Unix sockets among them, nobody knows.
    """
    inner = getattr(sock, "_sock", None)
    if isinstance(inner, Socket):
        return not inner.has_read
    if sys.platform != "linux":
        return False
    try:
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL) != socket.IPPROTO_TCP:
            return False
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_SIZE)
        waiting = fcntl.ioctl(sock.fileno(), termios.FIONREAD, bytes(4))
        (received,) = struct.unpack_from("=Q", info, _BYTES_RECEIVED_AT)
    except (OSError, struct.error):  # an old kernel, or not quite Linux
        return False
    return bool(received - (info[0] in _AFTER_FIN) == int.from_bytes(waiting, sys.byteorder))


def _check(handle: object, transport: asyncio.Transport) -> None:
    name = type(handle).__name__
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.type == socket.SOCK_DGRAM:
        raise UnsupportedHandle(
            f"a {name} reads datagrams into its protocol: bind a socket.socket, send that, and give"
            " it to create_datagram_endpoint(sock=...) where it is used"
        )
    if not hasattr(transport, "get_write_buffer_size") or _is_one_way(transport):
        raise UnsupportedHandle(f"this {name} is no stream connection")
    if transport.is_closing():
        _refuse_closed(handle)
    if transport.get_extra_info("ssl_object") is not None:
        raise UnsupportedHandle(
            f"a {name} with TLS cannot be sent: its keys live in this process."
            " Send the plain connection before the handshake"
        )
    if sock is None or sock.type != socket.SOCK_STREAM:
        raise UnsupportedHandle(f"this {name} is no stream connection")
    if transport.get_write_buffer_size():
        raise UnsupportedHandle(
            f"this {name} holds {transport.get_write_buffer_size()} bytes not yet written:"
            " await drain() with write_buffer limits of 0 before sending it"
        )


def _refuse_closed(handle: object) -> None:
    """Raise what became of a transport that is closed: its client's doing, or ours."""
    reader = getattr(handle, "_reader", None)
    if reader is not None and isinstance(reader.exception(), ConnectionError):
        raise HandleNotDelivered(handle, HAS_RESET)
    raise UnsupportedHandle(f"this {type(handle).__name__} is closed")


def _is_one_way(transport: asyncio.Transport) -> bool:
    """Whether it is a pipe; uvloop's have all methods, and raise where they make no sense."""
    try:
        transport.is_reading()
    except (AttributeError, NotImplementedError):
        return True
    return transport.get_extra_info("pipe") is not None


# -- servers -------------------------------------------------------------------------------------


def _prepare_asyncio_server(server: asyncio.Server, keep_open: bool) -> PendingHandle:
    sockets = server.sockets
    if len(sockets) != 1:
        raise UnsupportedHandle(
            f"this server listens on {len(sockets)} sockets, and one handle is one: send each"
        )
    return prepare_held(server, NET_SERVER, sockets[0])


# -- by what they look like ----------------------------------------------------------------------


def _is_transport(handle: object) -> bool:
    return isinstance(handle, asyncio.BaseTransport) or (
        hasattr(handle, "get_extra_info") and hasattr(handle, "is_closing")
    )


def _prepare_by_shape(handle: Any, keep_open: bool) -> PendingHandle | None:
    """Prepare what only looks like asyncio's: uvloop's classes derive from none of them."""
    if _is_transport(handle):
        return _prepare_transport(handle, keep_open)
    if isinstance(handle, asyncio.AbstractServer) or (
        hasattr(handle, "sockets") and hasattr(handle, "start_serving")
    ):
        return _prepare_asyncio_server(handle, keep_open)
    advice = _advice(handle)
    if advice is not None:
        raise UnsupportedHandle(f"a {type(handle).__name__} is no handle: {advice}")
    return None


def _advice(handle: Any) -> str | None:
    """Say what to send instead of what belongs to something that can be sent."""
    if isinstance(handle, asyncio.StreamReader):
        return "send the StreamWriter of the pair"
    if isinstance(handle, TransportSocket) or type(handle).__name__ == "PseudoSocket":  # uvloop's
        return f"it belongs to a transport, which reads it: {_ACCEPT_HERE}"
    if hasattr(handle, "extra_attributes"):
        return (
            "anyio's streams read into memory of their own: send the socket.socket before it"
            f" becomes one, or {_ACCEPT_HERE}"
        )
    return None


default_registry.add_preparer(asyncio.StreamWriter, _prepare_writer)
default_registry.add_fallback(_prepare_by_shape)
