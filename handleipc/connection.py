"""A live stream connection whose bytes nobody has read: what every front's ``Connection`` is.

Owns a descriptor and makes nothing else until asked, since most connections of a primary are only
passed on. Reads nothing but with MSG_PEEK.
"""

from __future__ import annotations

import socket as stdlib_socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from handleipc import addresses
from handleipc.addresses import Address
from handleipc.exceptions import DescriptorReleased
from handleipc.fds import DescriptorOwner
from handleipc.socketlist import Group

__all__ = ["BaseConnection", "CountedSocket", "family_of", "protocol_of", "type_of"]


def family_of(kind: int) -> int:
    """Return the address family in a descriptor kind of the C core."""
    return kind >> 8 & 0xFF


def protocol_of(kind: int) -> int:
    """Return the protocol that goes with family and type."""
    if family_of(kind) == stdlib_socket.AF_UNIX:
        return 0
    is_stream = type_of(kind) == stdlib_socket.SOCK_STREAM
    return stdlib_socket.IPPROTO_TCP if is_stream else stdlib_socket.IPPROTO_UDP


def type_of(kind: int) -> int:
    """Return the socket type in a descriptor kind of the C core."""
    return kind & 0xFF


class CountedSocket(stdlib_socket.socket):
    """A socket that counts as open in its group until it is closed, given away or dropped.

    Closed or detached, since uvloop ends sockets by ``detach`` and asyncio by ``close``.
    """

    __slots__ = ("group",)
    group: Group | None

    def close(self) -> None:
        """Close it, and count it down (not while ``makefile`` objects keep it open)."""
        super().close()
        if super().fileno() < 0:
            self._tell()

    def detach(self) -> int:
        """Give the descriptor away, and count it down."""
        fd = super().detach()
        self._tell()
        return fd

    def _tell(self) -> None:
        # A copy made by dup() has no such attribute: it is not counted.
        group, self.group = getattr(self, "group", None), None
        if group is not None:
            group.closed_here()

    def __del__(self) -> None:
        # The base class would close it without a word to us.
        if super().fileno() >= 0:
            text = f"unclosed {self!r}"
            self.close()
            # Last, since a filter may turn it into an exception.
            warnings.warn(text, ResourceWarning, stacklevel=2, source=self)


class BaseConnection(DescriptorOwner):
    """Owns one connected stream socket.

    Args:
        fd: the descriptor, non-blocking; this object's from here on.
        kind: what the C core says it is.
        group: the connections of the server it belongs to, which count it already; or None.
        raw_peer: the peer's address as the kernel's bytes, if accept gave it along.
        head: bytes already read from it, which whoever reads it next gets first.
    """

    __slots__ = ("_head", "_kind", "_raw_peer", "group")

    def __init__(
        self,
        fd: int,
        kind: int,
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
        self.group = group

    @property
    def family(self) -> stdlib_socket.AddressFamily:
        """The address family: AF_INET, AF_INET6 or AF_UNIX."""
        return stdlib_socket.AddressFamily(family_of(self._kind))

    @property
    def head(self) -> bytes:
        """Bytes of the connection that were read before it was handed over, not yet taken."""
        return self._head

    def take_head(self) -> bytes:
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
        if self._head:
            return self._head[:size]
        with self._borrowed() as sock:
            return sock.recv(size, stdlib_socket.MSG_PEEK | stdlib_socket.MSG_DONTWAIT)

    def socket(self) -> stdlib_socket.socket:
        """Return a non-blocking ``socket.socket`` that takes the descriptor over.

        The connection counts as open here until that socket is closed or detached.

        Raises:
            DescriptorReleased: it is closed, detached or on its way, or ``head`` holds bytes
                that the socket could not give back: take them first.
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
                " use open() or start(), or take_head() first"
            )

    def _to_socket(self) -> stdlib_socket.socket:
        kind = self._kind
        group = self.group
        factory = stdlib_socket.socket if group is None else CountedSocket
        # All three are given, or the constructor would ask the kernel for them. The protocol too:
        # asyncio sets TCP_NODELAY only on a socket that says it is TCP.
        sock = factory(family_of(kind), type_of(kind), protocol_of(kind), fileno=self.fileno())
        sock.settimeout(0)
        if isinstance(sock, CountedSocket):
            sock.group = group
        self.group = None
        super().detach()
        return sock

    @contextmanager
    def _borrowed(self) -> Iterator[stdlib_socket.socket]:
        sock = stdlib_socket.socket(
            family_of(self._kind), type_of(self._kind), 0, fileno=self.fileno()
        )
        try:
            yield sock
        finally:
            sock.detach()

    def _released(self) -> None:
        group, self.group = self.group, None
        if group is not None:
            group.closed_here()
