"""A live stream connection whose bytes nobody has read: what every front's ``Connection`` is.

Owns a descriptor and makes nothing else until asked, since most connections of a primary are only
passed on. Reads nothing but with MSG_PEEK.
"""

from __future__ import annotations

import errno
import os
import socket as stdlib_socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Self

from handleipc.exceptions import DescriptorReleased, UnsupportedHandle
from handleipc.handles import addresses
from handleipc.handles.addresses import Address
from handleipc.handles.fds import DETACHED, DescriptorOwner
from handleipc.handles.group import Group
from handleipc.handles.sockets import Socket, family_of, is_stream, own, type_of, was_connected
from handleipc.wire.syscalls import KIND_LISTENING, adopt, descriptor_kind

__all__ = ["BaseConnection"]

_MSG_DONTWAIT = stdlib_socket.MSG_DONTWAIT
_MSG_PEEK = stdlib_socket.MSG_PEEK


def _kind_of_received(fd: int) -> int:
    """Return the kind of a connection that came from another process, and make it non-blocking.

    Raises:
        ConnectionAbortedError: it is none, whatever the peer says: to the application it is one
            more connection that cannot be used.
        OSError: the system refuses to say; the next use asks again.
    """
    kind = adopt(fd)
    if not is_stream(kind) or kind & KIND_LISTENING:
        what = "the peer sent a net.Socket with a descriptor of another kind"
        raise ConnectionAbortedError(errno.ECONNABORTED, what)
    return kind


class BaseConnection(DescriptorOwner):
    """Owns one connected stream socket.

    Args:
        fd: the descriptor, non-blocking if its kind is known; this object's from here on.
        kind: what the C core says it is; 0 of one that came from another process, and at which
            nobody has looked: it is made non-blocking, and refused if it is something else, when
            it is first used.
        group: the connections of the server it belongs to, which count it already; or None.
        raw_peer: the peer's address as the kernel's bytes, if accept gave it along.
        head: bytes already read from it, which whoever reads it next gets first.
    """

    __slots__ = ("_group", "_head", "_kind", "_raw_peer")

    tag: ClassVar[str] = "net.Socket"
    """What it travels as."""

    def __init__(
        self,
        fd: int,
        kind: int = 0,
        *,
        group: Group | None = None,
        raw_peer: bytes | None = None,
        head: bytes = b"",
    ) -> None:
        # As DescriptorOwner.__init__, without the call: there may be a hundred thousand a second.
        if fd < 0:
            raise ValueError(f"{fd} is not a descriptor")
        self._fd = fd
        self._kind = kind
        self._raw_peer = raw_peer
        self._head = head
        self._group = group

    @classmethod
    def from_socket(cls, sock: stdlib_socket.socket) -> Self:
        """Take over a connected TCP or Unix stream socket, of which nobody has read anything yet.

        The connection owns the descriptor from here on, makes it non-blocking, and the socket is
        detached. One that its client has reset meanwhile is taken too.

        Raises:
            UnsupportedHandle: it is no such socket, is closed, listening or was never connected,
                or speaks TLS. It is the caller's still, as it was.
        """
        if not isinstance(sock, stdlib_socket.socket):
            raise UnsupportedHandle(
                f"from_socket() takes a socket.socket over, and a {type(sock).__name__} is none"
            )
        if isinstance(sock, ssl.SSLSocket):
            raise UnsupportedHandle("a TLS socket is no plain connection: its keys live in it")
        fd = sock.fileno()
        if fd < 0:
            raise UnsupportedHandle("this socket is closed")
        kind = descriptor_kind(fd)
        if not is_stream(kind) or kind & KIND_LISTENING:
            raise UnsupportedHandle(f"{sock!r} is no connection: a connected stream socket is")
        try:
            sock.getpeername()
        except OSError:
            if not was_connected(sock):
                raise UnsupportedHandle(f"{sock!r} is not connected") from None
        # The flag of the kernel: the object may have a timeout of its own.
        os.set_blocking(fd, False)
        group = None
        if isinstance(sock, Socket):
            group, sock._group = sock._group, None
        return cls(sock.detach(), kind, group=group)

    @classmethod
    def _from(cls, other: BaseConnection) -> Self:
        """Take over what another front's connection owns; the other one is detached."""
        made = cls(
            DescriptorOwner.fileno(other),  # which does not look: the new one will
            other._kind,
            group=other._group,
            raw_peer=other._raw_peer,
            head=other._head,
        )
        other._group, other._head = None, b""
        other._fd = DETACHED
        return made

    def fileno(self) -> int:
        """Return the descriptor, borrowed: it stays this object's.

        Raises:
            DescriptorReleased: it is closed, detached or on its way.
            ConnectionAbortedError: it came from another process, and is no connection. So say
                all methods that use it.
        """
        fd = self._fd
        if fd < 0 or not self._kind:
            fd = super().fileno()
            self._kind = _kind_of_received(fd)
        return fd

    @property
    def family(self) -> stdlib_socket.AddressFamily:
        """The address family: AF_INET, AF_INET6 or AF_UNIX.

        Raises:
            DescriptorReleased, ConnectionAbortedError: as ``fileno``, of one that was never used.
        """
        if not self._kind:
            self.fileno()
        return stdlib_socket.AddressFamily(family_of(self._kind))

    @property
    def head(self) -> bytes:
        """Bytes of the connection that were read before it was handed over, not yet taken."""
        return self._head

    def _take_head(self) -> bytes:
        """Return ``head`` and forget it: the caller must give these bytes to the reader first."""
        head, self._head = self._head, b""
        return head

    @property
    def peername(self) -> Address:
        """The other end's address.

        Raises:
            OSError: the connection was reset meanwhile.
            DescriptorReleased: it is closed, detached or on its way.
        """
        if self._raw_peer is not None:
            self.fileno()  # a closed connection has no address
            return addresses.parse(self._raw_peer)
        with self._borrowed() as sock:
            return sock.getpeername()

    @property
    def sockname(self) -> Address:
        """This end's address.

        Raises:
            DescriptorReleased: it is closed, detached or on its way.
        """
        with self._borrowed() as sock:
            return sock.getsockname()

    def peek(self, size: int) -> bytes:
        """Return up to ``size`` bytes that have arrived, without consuming them (MSG_PEEK).

        ``b""`` means that the client has sent FIN. For routing by content before handing off.

        Raises:
            BlockingIOError: nothing has arrived yet.
            OSError: the connection was reset.
        """
        return self._head[:size] if self._head else self._peek_at_socket(size)

    def _peek_at_socket(self, size: int) -> bytes:
        with self._borrowed() as sock:
            return sock.recv(size, _MSG_PEEK | _MSG_DONTWAIT)

    def socket(self) -> Socket:
        """Return a non-blocking ``Socket``, a ``socket.socket``, that takes the descriptor over.

        The connection counts as open here until that socket is closed or detached.

        Raises:
            DescriptorReleased: it is closed, detached or on its way, or ``head`` holds bytes
                that the socket could not give back: take them first.
            OSError: the system refuses; the connection is as it was.
        """
        self._refuse_head()
        return self._to_socket()

    def detach(self) -> int:
        """Give the descriptor away: the caller owns it, and it no longer counts as open here.

        Raises:
            DescriptorReleased: it is closed, detached or on its way, or ``head`` holds bytes.
        """
        self._refuse_head()
        return super().detach()

    def _refuse_head(self) -> None:
        if self._head:
            raise DescriptorReleased(
                f"{len(self._head)} bytes of this connection were read before it was handed over:"
                " use open() or start(), or _take_head() first"
            )

    def _to_socket(self) -> Socket:
        fd = self.fileno()  # first: it looks what it is
        sock = own(fd, self._kind)
        sock.tag = self.tag
        sock._group, self._group = self._group, None
        super().detach()
        return sock

    @contextmanager
    def _borrowed(self) -> Iterator[stdlib_socket.socket]:
        fd = self.fileno()  # first: it looks what it is
        sock = Socket(family_of(self._kind), type_of(self._kind), 0, fileno=fd)
        try:
            yield sock
        finally:
            sock.detach()

    def _released(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.closed_here()
