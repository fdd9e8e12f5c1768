"""The kinds of handle that Node knows, and what each needs to be sent or to be accepted.

Checks kinds and builds objects from descriptors; never reads, writes or accepts. The table is
Node's own (lib/internal/child_process.js handleConversion; node-wire.md 3.2, 3.4).
"""

from __future__ import annotations

import base64
import functools
import os
import socket
import ssl
from collections.abc import Callable

from handleipc import codec
from handleipc.ancillary import KIND_FIFO, KIND_LISTENING, KIND_SOCKET, descriptor_kind
from handleipc.connection import BaseConnection, family_of, protocol_of, type_of
from handleipc.exceptions import UnsupportedHandle
from handleipc.fds import DescriptorOwner, FileDescriptor
from handleipc.pending import Held, Lent, Moved, PendingHandle
from handleipc.typing import HasFileno, Options

__all__ = [
    "DGRAM_NATIVE",
    "DGRAM_SOCKET",
    "FD",
    "NET_NATIVE",
    "NET_SERVER",
    "NET_SOCKET",
    "NODE_TAGS",
    "Native",
    "build_fd",
    "build_native",
    "build_socket",
    "is_expected",
    "pend_connection",
    "pend_fd",
    "pend_held",
    "pend_native",
    "pend_socket",
    "read_unread",
    "spell_unread",
]

NET_SOCKET = "net.Socket"
NET_SERVER = "net.Server"
NET_NATIVE = "net.Native"
DGRAM_SOCKET = "dgram.Socket"
DGRAM_NATIVE = "dgram.Native"
NODE_TAGS = frozenset({NET_SOCKET, NET_SERVER, NET_NATIVE, DGRAM_SOCKET, DGRAM_NATIVE})
FD = "fd"

_INET = (socket.AF_INET, socket.AF_INET6)
_STREAM_FAMILIES = (*_INET, socket.AF_UNIX)
_DGRAM_TYPES = {socket.AF_INET: "udp4", socket.AF_INET6: "udp6"}


class Native:
    """Wraps a socket or pipe to be sent as a raw handle (Node's ``net.Native``, ``dgram.Native``).

    For a TCP, Unix stream or UDP socket, or a FIFO. The peer gets a second descriptor of the same
    thing; the wrapped object stays the caller's and open.

    Args:
        source: an object with ``fileno()``.
    """

    __slots__ = ("source",)

    def __init__(self, source: HasFileno) -> None:
        self.source = source

    def fileno(self) -> int:
        """Return the descriptor of what is wrapped."""
        return self.source.fileno()

    def __repr__(self) -> str:
        return f"Native({self.source!r})"


# -- what a descriptor is ------------------------------------------------------------------------


def _is_stream(kind: int) -> bool:
    return (
        bool(kind & KIND_SOCKET)
        and type_of(kind) == socket.SOCK_STREAM
        and family_of(kind) in _STREAM_FAMILIES
    )


def _is_udp(kind: int) -> bool:
    return (
        bool(kind & KIND_SOCKET) and type_of(kind) == socket.SOCK_DGRAM and family_of(kind) in _INET
    )


def is_expected(tag: str, kind: int, options: Options | None) -> bool:
    """Say whether a descriptor of this kind may arrive under this tag."""
    if tag == NET_SOCKET:
        return _is_stream(kind) and not kind & KIND_LISTENING
    if tag == NET_SERVER:
        return _is_stream(kind) and bool(kind & KIND_LISTENING)
    if tag == NET_NATIVE:
        return _is_stream(kind) or kind == KIND_FIFO
    if tag == DGRAM_SOCKET:
        wanted = options.get("dgramType") if options else None
        return _is_udp(kind) and _DGRAM_TYPES[socket.AddressFamily(family_of(kind))] == wanted
    return tag == DGRAM_NATIVE and _is_udp(kind)


# -- sending -------------------------------------------------------------------------------------


def _fileno(source: HasFileno, what: str) -> int:
    fd = source.fileno()
    if fd < 0:
        raise UnsupportedHandle(f"this {what} is closed")
    return fd


def _kind(fd: int, what: str) -> int:
    try:
        return descriptor_kind(fd)
    except OSError as error:
        raise UnsupportedHandle(f"this {what} is not open: {error.strerror}") from None


def pend_held(
    handle: object,
    tag: str,
    source: HasFileno,
    options: bytes = b"",
    on_delivered: Callable[[], None] | None = None,
) -> PendingHandle:
    """Return a handle whose object keeps its one descriptor, made non-blocking for the peer."""
    # Node does not set the mode of what it receives; a blocking descriptor would freeze its loop
    # (node-wire.md fact 3). The flag belongs to the open file description: our copy shares it.
    os.set_blocking(source.fileno(), False)
    return Held(handle, tag, options, read=lambda: [source.fileno()], on_delivered=on_delivered)


def pend_connection(connection: BaseConnection, keep_open: bool) -> PendingHandle:
    """Prepare a ``Connection``: moved, or with ``keep_open`` lent.

    One that stays open here is counted here, so it travels without its key: Node counts it twice.
    Bytes that were read already go along, which only a native peer understands.
    """
    group, head = None if keep_open else connection.group, connection.head
    options = b"" if group is None else _spell_key(group.key)
    native_only = bool(head)
    if head:
        key = {} if group is None else {"key": group.key}
        options = codec.spell({**key, "unread": spell_unread(head)})
    if keep_open:
        connection.fileno()  # refuses one that is closed or on its way
        return Lent(connection, NET_SOCKET, options, native_only)
    return Moved(connection, NET_SOCKET, options, native_only)


@functools.lru_cache
def _spell_key(key: str) -> bytes:
    return codec.spell({"key": key})


def spell_unread(data: bytes) -> str:
    """Spell bytes as JSON can carry them, for the option ``unread``."""
    return base64.b64encode(data).decode("ascii")


def read_unread(options: Options | None) -> bytes:
    """Return the bytes in the option ``unread``; none if there is none, or it is not base64."""
    text = options.get("unread") if options else None
    if not isinstance(text, str):
        return b""
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        return b""


def pend_fd(handle: FileDescriptor, keep_open: bool) -> PendingHandle:
    """Prepare a ``FileDescriptor``: moved, or with ``keep_open`` lent. Native dialect only."""
    if keep_open:
        handle.fileno()
        return Lent(handle, FD, native_only=True)
    return Moved(handle, FD, native_only=True)


def pend_socket(sock: socket.socket, keep_open: bool) -> PendingHandle:
    """Prepare a ``socket.socket``, whose kind says what it travels as.

    A connected one is closed at the acknowledgement; a listener or UDP socket stays the caller's.

    Raises:
        UnsupportedHandle: TLS, closed, not connected, not bound, or of another family.
    """
    if isinstance(sock, ssl.SSLSocket):
        raise UnsupportedHandle(
            "a TLS socket cannot be sent: its keys live in this process."
            " Send the plain connection before the handshake"
        )
    kind = _kind(_fileno(sock, "socket"), "socket")
    if is_expected(NET_SERVER, kind, None):
        return pend_held(sock, NET_SERVER, sock)
    if _is_stream(kind):
        try:
            sock.getpeername()
        except OSError as error:
            raise UnsupportedHandle(
                f"this socket is neither connected nor listening: {error.strerror}"
            ) from None
        group = getattr(sock, "group", None)
        options = _spell_key(group.key) if group is not None and not keep_open else b""
        return pend_held(
            sock, NET_SOCKET, sock, options, on_delivered=None if keep_open else sock.close
        )
    if _is_udp(kind):
        if sock.getsockname()[1] == 0:
            raise UnsupportedHandle("this UDP socket is not bound: bind it before sending it")
        udp = {"dgramType": _DGRAM_TYPES[socket.AddressFamily(family_of(kind))]}
        return pend_held(sock, DGRAM_SOCKET, sock, codec.spell(udp))
    raise UnsupportedHandle(
        f"a socket of {sock.family!r}, {sock.type!r} cannot be sent as it is:"
        " wrap its descriptor in a FileDescriptor for a handleipc peer"
    )


def pend_native(native: Native, keep_open: bool) -> PendingHandle:
    """Prepare a ``Native``; what it wraps stays the caller's.

    Raises:
        UnsupportedHandle: closed, or of a kind on which Node would abort (node-wire.md 3.4).
    """
    if isinstance(native.source, ssl.SSLSocket):
        raise UnsupportedHandle("a TLS socket cannot be sent: its keys live in this process")
    kind = _kind(_fileno(native, "object"), "object")
    for tag in (NET_NATIVE, DGRAM_NATIVE):
        if is_expected(tag, kind, None):
            return pend_held(native, tag, native)
    raise UnsupportedHandle(
        f"{native!r} is no TCP, Unix stream or UDP socket and no FIFO, and Node aborts on anything"
        " else: send a FileDescriptor, to a handleipc peer"
    )


# -- receiving -----------------------------------------------------------------------------------


def build_socket(fd: int, kind: int, options: Options | None) -> socket.socket:
    """Make a non-blocking ``socket.socket`` that owns ``fd``."""
    sock = socket.socket(family_of(kind), type_of(kind), protocol_of(kind), fileno=fd)
    sock.settimeout(0)
    return sock


def build_native(fd: int, kind: int, options: Options | None) -> socket.socket | DescriptorOwner:
    """Make the object for a raw handle: a socket, or a ``FileDescriptor`` for a FIFO."""
    return build_socket(fd, kind, options) if kind & KIND_SOCKET else FileDescriptor(fd)


def build_fd(fd: int, kind: int, options: Options | None) -> FileDescriptor:
    """Make a ``FileDescriptor`` that owns ``fd``."""
    return FileDescriptor(fd)
