"""The kinds of handle that Node knows, and what each needs to be sent or to be accepted.

Checks kinds and builds objects from descriptors; never reads, writes or accepts. The table is
Node's own (lib/internal/child_process.js handleConversion; node-wire.md 3.2, 3.4).
"""

from __future__ import annotations

import base64
import contextlib
import functools
import os
import socket
import ssl
from collections.abc import Callable

from handleipc.exceptions import HandleNotDelivered, UnsupportedHandle
from handleipc.handles.connection import BaseConnection
from handleipc.handles.fds import FD, FileDescriptor
from handleipc.handles.pending import Held, Lent, Moved, PendingHandle
from handleipc.handles.sockets import (
    Socket,
    clear_linger,
    family_of,
    is_stream,
    own,
    type_of,
    was_connected,
)
from handleipc.typing import HasFileno, Options
from handleipc.wire import codec
from handleipc.wire.syscalls import KIND_FIFO, KIND_LISTENING, KIND_SOCKET, adopt, descriptor_kind

__all__ = [
    "DGRAM_NATIVE",
    "DGRAM_SOCKET",
    "FD",
    "HAS_RESET",
    "NET_BOUND_SOCKET",
    "NET_NATIVE",
    "NET_SERVER",
    "NET_SOCKET",
    "NODE_TAGS",
    "BoundSocket",
    "Native",
    "adopt_fd",
    "build_fd",
    "build_native",
    "build_socket",
    "is_expected",
    "prepare_bound",
    "prepare_connection",
    "prepare_fd",
    "prepare_held",
    "prepare_native",
    "prepare_socket",
    "read_unread",
    "received_kind",
    "spell_unread",
]

NET_SOCKET = BaseConnection.tag
NET_SERVER = "net.Server"
NET_NATIVE = "net.Native"
NET_BOUND_SOCKET = "net.BoundSocket"  # from Node 26 on
DGRAM_SOCKET = "dgram.Socket"
DGRAM_NATIVE = "dgram.Native"
NODE_TAGS = frozenset(
    {NET_SOCKET, NET_SERVER, NET_NATIVE, NET_BOUND_SOCKET, DGRAM_SOCKET, DGRAM_NATIVE}
)

HAS_RESET = "its client has reset the connection"

_INET = (socket.AF_INET, socket.AF_INET6)
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
        self.source: HasFileno = source

    def fileno(self) -> int:
        """Return the descriptor of what is wrapped."""
        return self.source.fileno()

    def __repr__(self) -> str:
        return f"Native({self.source!r})"


class BoundSocket:
    """Wraps a stream socket that is bound and not listening (the ``net.BoundSocket`` of Node 26).

    Who receives it may listen or connect with it: an address can be claimed in one process and be
    used in another. It arrives as a ``Socket``, in Node as a ``net.BoundSocket``, and the copy here
    is closed at the acknowledgement, unless ``keep_open``.

    Send it to a Node of version 26 or later only: an earlier one does not know the kind and dies of
    it, and its version does not show on the wire. Node takes TCP sockets alone.

    Args:
        source: the ``socket.socket``.
    """

    __slots__ = ("source",)

    def __init__(self, source: socket.socket) -> None:
        self.source: socket.socket = source

    def fileno(self) -> int:
        """Return the descriptor of the socket."""
        return self.source.fileno()

    def close(self) -> None:
        """Close the socket."""
        self.source.close()

    def __repr__(self) -> str:
        return f"BoundSocket({self.source!r})"


# -- what a descriptor is ------------------------------------------------------------------------


def _is_udp(kind: int) -> bool:
    return (
        bool(kind & KIND_SOCKET) and type_of(kind) == socket.SOCK_DGRAM and family_of(kind) in _INET
    )


def is_expected(tag: str, kind: int, options: Options | None) -> bool:
    """Say whether a descriptor of this kind may arrive under this tag."""
    if tag in (NET_SOCKET, NET_BOUND_SOCKET):
        return is_stream(kind) and not kind & KIND_LISTENING
    if tag == NET_SERVER:
        return is_stream(kind) and bool(kind & KIND_LISTENING)
    if tag == NET_NATIVE:
        return is_stream(kind) or kind == KIND_FIFO
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


class _Unblocked(Held):
    """An object whose descriptor was blocking, and is again if it was not delivered."""

    __slots__ = ("_source",)

    def __init__(self, source: HasFileno, handle: object, tag: str, options: bytes) -> None:
        super().__init__(handle, tag, options, read=lambda: [source.fileno()])
        self._source = source
        _set_blocking(source, False)

    def returned(self) -> None:
        """Nobody shares it, so nobody else needs it to be non-blocking."""
        super().returned()
        with contextlib.suppress(OSError, ValueError):  # closed meanwhile
            _set_blocking(self._source, True)


def _set_blocking(source: HasFileno, blocking: bool) -> None:
    # A socket is told itself: it decides in Python whether a call waits.
    if isinstance(source, socket.socket):
        source.setblocking(blocking)
    else:
        os.set_blocking(source.fileno(), blocking)


def prepare_held(
    handle: object,
    tag: str,
    source: HasFileno,
    options: bytes = b"",
    on_delivered: Callable[[], None] | None = None,
) -> Held:
    """Return a handle whose object keeps its one descriptor, made non-blocking for the peer.

    Node does not set the mode of what it receives, and a blocking descriptor would freeze its loop
    (node-wire.md fact 3). The mode belongs to all copies, so the object, which is told, does not
    block from here on either; only if it comes back it is as it was.
    """
    if os.get_blocking(source.fileno()):
        pending: Held = _Unblocked(source, handle, tag, options)
    else:
        pending = Held(handle, tag, options, read=lambda: [source.fileno()])
    pending.on_delivered = on_delivered
    return pending


def prepare_connection(connection: BaseConnection, keep_open: bool) -> PendingHandle:
    """Prepare a ``Connection``: moved, or with ``keep_open`` lent.

    One that stays open here is counted here, so it travels without its key: Node counts it twice.
    Bytes that were read already go along, which only a native peer understands.
    """
    group, head = None if keep_open else connection._group, connection.head
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


def prepare_fd(handle: FileDescriptor, keep_open: bool) -> PendingHandle:
    """Prepare a ``FileDescriptor``: moved, or with ``keep_open`` lent. Native dialect only."""
    if keep_open:
        handle.fileno()
        return Lent(handle, FD, native_only=True)
    return Moved(handle, FD, native_only=True)


def prepare_socket(sock: socket.socket, keep_open: bool) -> PendingHandle:
    """Prepare a ``socket.socket``, whose kind says what it travels as.

    A connected one is closed at the acknowledgement; a listener or UDP socket stays the caller's,
    non-blocking from here on.

    Raises:
        UnsupportedHandle: TLS, closed, not connected, not bound, or of another family.
        HandleNotDelivered: its client has reset the connection.
    """
    if isinstance(sock, ssl.SSLSocket):
        raise UnsupportedHandle(
            "a TLS socket cannot be sent: its keys live in this process."
            " Send the plain connection before the handshake"
        )
    kind = _kind(_fileno(sock, "socket"), "socket")
    if is_expected(NET_SERVER, kind, None):
        return prepare_held(sock, NET_SERVER, sock)
    if is_stream(kind):
        _refuse_unconnected(sock)
        group = getattr(sock, "_group", None)
        options = _spell_key(group.key) if group is not None and not keep_open else b""
        return prepare_held(sock, NET_SOCKET, sock, options, None if keep_open else _closer(sock))
    if _is_udp(kind):
        if sock.getsockname()[1] == 0:
            raise UnsupportedHandle("this UDP socket is not bound: bind it before sending it")
        udp = {"dgramType": _DGRAM_TYPES[socket.AddressFamily(family_of(kind))]}
        return prepare_held(sock, DGRAM_SOCKET, sock, codec.spell(udp))
    raise UnsupportedHandle(
        f"a socket of {sock.family!r}, {sock.type!r} cannot be sent as it is:"
        " wrap its descriptor in a FileDescriptor for a handleipc peer"
    )


def _refuse_unconnected(sock: socket.socket) -> None:
    try:
        sock.getpeername()
    except OSError as error:
        if was_connected(sock):
            raise HandleNotDelivered(sock, HAS_RESET) from None
        if _is_bound(sock):
            raise UnsupportedHandle(
                "this socket is bound, and neither connected nor listening: listen() first, or"
                " wrap it in BoundSocket for a handleipc peer or a Node of version 26 or later,"
                " since an earlier Node dies of it"
            ) from None
        raise UnsupportedHandle(
            f"this socket is neither connected nor listening: {error.strerror}"
        ) from None


def _is_bound(sock: socket.socket) -> bool:
    address = sock.getsockname()
    return bool(address if sock.family == socket.AF_UNIX else address[1])


def _closer(sock: socket.socket) -> Callable[[], None]:
    """Return what closes a socket of the caller's, without waiting for what the peer has set."""

    def close() -> None:
        clear_linger(sock)
        sock.close()

    return close


def prepare_bound(bound: BoundSocket, keep_open: bool) -> PendingHandle:
    """Prepare a ``BoundSocket``; its socket is closed at the acknowledgement.

    Raises:
        UnsupportedHandle: it is no bound stream socket, or it is connected or listens already.
    """
    sock = bound.source
    if not isinstance(sock, socket.socket):
        raise UnsupportedHandle(f"a BoundSocket holds a socket.socket: {bound!r}")
    kind = _kind(_fileno(sock, "socket"), "socket")
    if not is_expected(NET_BOUND_SOCKET, kind, None) or not _is_bound(sock):
        raise UnsupportedHandle(f"{bound!r} is no stream socket that is bound and not listening")
    with contextlib.suppress(OSError):
        sock.getpeername()
        raise UnsupportedHandle(f"{bound!r} is connected: send the socket itself")
    pending = prepare_held(bound, NET_BOUND_SOCKET, sock, b"", None if keep_open else _closer(sock))
    # Node sends and takes none with a path (lib/net.js, kDeserialize).
    pending.native_only = family_of(kind) == socket.AF_UNIX
    return pending


def prepare_native(native: Native, keep_open: bool) -> PendingHandle:
    """Prepare a ``Native``; what it wraps stays the caller's, non-blocking from here on.

    Raises:
        UnsupportedHandle: closed, or of a kind on which Node would abort (node-wire.md 3.4).
    """
    if isinstance(native.source, ssl.SSLSocket):
        raise UnsupportedHandle("a TLS socket cannot be sent: its keys live in this process")
    kind = _kind(_fileno(native, "object"), "object")
    for tag in (NET_NATIVE, DGRAM_NATIVE):
        if is_expected(tag, kind, None):
            return prepare_held(native, tag, native.source)
    raise UnsupportedHandle(
        f"{native!r} is no TCP, Unix stream or UDP socket and no FIFO, and Node aborts on anything"
        " else: send a FileDescriptor, to a handleipc peer"
    )


# -- receiving -----------------------------------------------------------------------------------


def build_socket(tag: str, fd: int, kind: int, options: Options | None) -> Socket:
    """Make a non-blocking ``Socket`` that owns ``fd`` and was sent as ``tag``.

    Raises:
        OSError: the system refuses; ``fd`` is the caller's still.
    """
    sock = own(fd, kind)
    sock.tag = tag
    return sock


def build_native(tag: str, fd: int, kind: int, options: Options | None) -> Socket | FileDescriptor:
    """Make the object for a raw handle: a ``Socket``, or a ``FileDescriptor`` for a FIFO.

    Raises:
        OSError: as ``build_socket``.
    """
    return build_socket(tag, fd, kind, options) if kind & KIND_SOCKET else FileDescriptor(fd, tag)


def received_kind(fd: int) -> int:
    """Return the kind of a received descriptor, non-blocking from here on; 0 if nobody can say."""
    try:
        return adopt(fd)
    except OSError:
        return 0


def adopt_fd(fd: int) -> FileDescriptor:
    """Make a ``FileDescriptor`` that owns ``fd``; a socket among them is non-blocking then."""
    owner = FileDescriptor(fd)
    received_kind(fd)
    return owner


def build_fd(fd: int, kind: int, options: Options | None) -> FileDescriptor:
    """Make a ``FileDescriptor`` that owns ``fd``."""
    return FileDescriptor(fd)
