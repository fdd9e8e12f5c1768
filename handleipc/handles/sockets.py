"""Sockets as they come from another process, and what can be said of a descriptor's kind.

``Socket`` is what a ``Connection``, or another socket that somebody handed over, becomes for those
who read and write.
"""

from __future__ import annotations

import errno
import socket as stdlib_socket
import struct
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from handleipc.handles.addresses import Address
from handleipc.handles.group import Group
from handleipc.wire.syscalls import KIND_SOCKET

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

__all__ = [
    "Socket",
    "clear_linger",
    "family_of",
    "is_stream",
    "own",
    "protocol_of",
    "type_of",
    "was_connected",
]

_STREAM_FAMILIES = (stdlib_socket.AF_INET, stdlib_socket.AF_INET6, stdlib_socket.AF_UNIX)
_MSG_DONTWAIT = stdlib_socket.MSG_DONTWAIT
_MSG_PEEK = stdlib_socket.MSG_PEEK
_SOL_SOCKET = stdlib_socket.SOL_SOCKET
_SO_LINGER = stdlib_socket.SO_LINGER
# macOS has no such flag; Python ignores SIGPIPE unless the program asks for it.
_MSG_NOSIGNAL = getattr(stdlib_socket, "MSG_NOSIGNAL", 0)
_NO_LINGER = struct.pack("ii", 0, 0)
# What a program sets to have its close reset the connection: that waits for nobody.
_RESET = struct.pack("ii", 1, 0)


def family_of(kind: int) -> int:
    """Return the address family in a descriptor kind of the C core."""
    return kind >> 8 & 0xFF


def protocol_of(kind: int) -> int:
    """Return the protocol that goes with family and type."""
    if family_of(kind) == stdlib_socket.AF_UNIX:
        return 0
    is_tcp = type_of(kind) == stdlib_socket.SOCK_STREAM
    return stdlib_socket.IPPROTO_TCP if is_tcp else stdlib_socket.IPPROTO_UDP


def type_of(kind: int) -> int:
    """Return the socket type in a descriptor kind of the C core."""
    return kind & 0xFF


def is_stream(kind: int) -> bool:
    """Say whether a descriptor of this kind is a TCP or Unix stream socket, listening or not."""
    return (
        bool(kind & KIND_SOCKET)
        and type_of(kind) == stdlib_socket.SOCK_STREAM
        and family_of(kind) in _STREAM_FAMILIES
    )


def was_connected(sock: stdlib_socket.socket) -> bool:
    """Say whether a stream socket that has no peer had one, which has reset the connection."""
    try:
        sock.recv(1, _MSG_PEEK | _MSG_DONTWAIT)
    except BlockingIOError:
        return False  # it still connects
    except OSError as error:
        # Linux says the first of TCP and the second of Unix sockets that never had a peer.
        return error.errno not in (errno.ENOTCONN, errno.EINVAL)
    return True


def clear_linger(sock: stdlib_socket.socket) -> None:
    """Have the close of this socket wait for nothing that a peer may have asked for."""
    try:
        sock.setsockopt(_SOL_SOCKET, _SO_LINGER, _NO_LINGER)
    except OSError:  # closed, or of a kind that knows no lingering
        pass


class Socket(stdlib_socket.socket):
    """A ``socket.socket`` that came from another process, or that a ``Connection`` became.

    Whoever has sent it may hold a copy, and O_NONBLOCK and SO_LINGER belong to all copies. So while
    this object is non-blocking, as it comes, nothing that it sends or receives waits, whatever the
    others set; ``accept``, ``connect`` and ``sendfile`` alone can be made to. Its close does not
    linger: SO_LINGER is cleared first, unless this object was told to reset (on, with a time of 0).
    It counts as open in its server's ``connections`` until it is closed, given away with ``detach``
    or dropped, which warns.

    Attributes:
        tag: what it was sent as: ``"net.Socket"`` for what was a ``Connection``, ``"net.Native"``,
            ``"net.BoundSocket"``, ``"dgram.Socket"`` or ``"dgram.Native"``; None of any other.
    """

    __slots__ = ("_group", "_on_end", "_resets", "has_read", "tag")

    tag: str | None
    # What counts it, or None. It is counted down on detach too: uvloop ends sockets that way.
    _group: Group | None
    # Whom to tell, once, when it is closed or given away; or None.
    _on_end: Callable[[], object] | None
    # Whether any byte was read through this object.
    has_read: bool

    def __init__(
        self, family: int = -1, type: int = -1, proto: int = -1, fileno: int | None = None
    ) -> None:
        try:
            super().__init__(family, type, proto, fileno)
        except BaseException:
            if fileno is not None:
                super().detach()  # the caller's still, however far it came
            raise
        self.tag = None
        self._group = None
        self._on_end = None
        self.has_read = False
        self._resets = False

    # -- never waiting ---------------------------------------------------------------------------

    def _now(self, flags: int) -> int:
        """Return the flags of a call that is to wait as long as this object says, and no longer."""
        return flags | _MSG_DONTWAIT if self.gettimeout() == 0 else flags

    def _note(self, count: int, flags: int) -> None:
        if count and not flags & _MSG_PEEK:
            self.has_read = True

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        """Receive, as ``socket.recv``."""
        data = super().recv(bufsize, self._now(flags))
        self._note(len(data), flags)
        return data

    def recv_into(self, buffer: WriteableBuffer, nbytes: int = 0, flags: int = 0) -> int:
        """Receive, as ``socket.recv_into``."""
        count = super().recv_into(buffer, nbytes, self._now(flags))
        self._note(count, flags)
        return count

    def recvfrom(self, bufsize: int, flags: int = 0, /) -> tuple[bytes, Address]:
        """Receive, as ``socket.recvfrom``."""
        result = super().recvfrom(bufsize, self._now(flags))
        self._note(len(result[0]), flags)
        return result

    def recvfrom_into(
        self, buffer: WriteableBuffer, nbytes: int = 0, flags: int = 0
    ) -> tuple[int, Address]:
        """Receive, as ``socket.recvfrom_into``."""
        result = super().recvfrom_into(buffer, nbytes, self._now(flags))
        self._note(result[0], flags)
        return result

    def recvmsg(
        self, bufsize: int, ancbufsize: int = 0, flags: int = 0, /
    ) -> tuple[bytes, list[tuple[int, int, bytes]], int, Any]:
        """Receive, as ``socket.recvmsg``."""
        result = super().recvmsg(bufsize, ancbufsize, self._now(flags))
        self._note(len(result[0]), flags)
        return result

    def recvmsg_into(
        self, buffers: Iterable[WriteableBuffer], ancbufsize: int = 0, flags: int = 0, /
    ) -> tuple[int, list[tuple[int, int, bytes]], int, Any]:
        """Receive, as ``socket.recvmsg_into``."""
        result = super().recvmsg_into(buffers, ancbufsize, self._now(flags))
        self._note(result[0], flags)
        return result

    def send(self, data: ReadableBuffer, flags: int = 0, /) -> int:
        """Send, as ``socket.send``, and never with a SIGPIPE."""
        return super().send(data, self._now(flags) | _MSG_NOSIGNAL)

    def sendall(self, data: ReadableBuffer, flags: int = 0, /) -> None:
        """Send, as ``socket.sendall``, and never with a SIGPIPE."""
        super().sendall(data, self._now(flags) | _MSG_NOSIGNAL)

    def sendto(self, data: ReadableBuffer, *args: Any) -> int:
        """Send, as ``socket.sendto``, and never with a SIGPIPE."""
        *flags, address = args
        return super().sendto(data, self._now(*flags or [0]) | _MSG_NOSIGNAL, address)

    def sendmsg(
        self,
        buffers: Iterable[ReadableBuffer],
        ancdata: Iterable[tuple[int, int, ReadableBuffer]] = (),
        flags: int = 0,
        address: Any = None,
        /,
    ) -> int:
        """Send, as ``socket.sendmsg``, and never with a SIGPIPE."""
        return super().sendmsg(buffers, ancdata, self._now(flags) | _MSG_NOSIGNAL, address)

    def setsockopt(self, level: int, option: int, *value: Any) -> None:
        """Set an option, as ``socket.setsockopt``."""
        super().setsockopt(level, option, *value)
        if option == _SO_LINGER and level == _SOL_SOCKET:
            self._resets = value == (_RESET,)

    # -- ending ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Close it without lingering, and count it down.

        It stays open, and counted, while ``makefile`` objects need it. Raises nothing: what
        close(2) may say of a socket nobody can act on, and event loops call this.
        """
        if self.fileno() >= 0 and not self._resets:
            clear_linger(self)
        try:
            super().close()
        except OSError:
            pass  # the number is free
        if self.fileno() < 0:
            self._has_ended()

    def detach(self) -> int:
        """Give the descriptor away, and count it down."""
        fd = super().detach()
        self._has_ended()
        return fd

    def _has_ended(self) -> None:
        group, self._group = self._group, None
        on_end, self._on_end = self._on_end, None
        if group is not None:
            group.closed_here()
        if on_end is not None:
            on_end()

    def __del__(self) -> None:
        # The base class would close it without a word to us.
        if self.fileno() >= 0:
            text = f"unclosed {self!r}"
            self.close()
            # Last, since a filter may turn it into an exception.
            warnings.warn(text, ResourceWarning, stacklevel=2, source=self)


def own(fd: int, kind: int) -> Socket:
    """Return a non-blocking ``Socket`` that owns a descriptor of this kind.

    Raises:
        OSError: the system refuses; ``fd`` is the caller's, as before.
    """
    # All three are given, or the constructor would ask the kernel for them. The protocol too:
    # asyncio sets TCP_NODELAY only on a socket that says it is TCP.
    sock = Socket(family_of(kind), type_of(kind), protocol_of(kind), fileno=fd)
    try:
        sock.settimeout(0)
    except BaseException:
        sock.detach()
        raise
    return sock
