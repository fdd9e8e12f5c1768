"""A live stream connection whose bytes nobody has read: what every front's ``Connection`` is.

Owns a descriptor and makes nothing else until asked, since most connections of a primary are only
passed on. Reads nothing but with MSG_PEEK.
"""

from __future__ import annotations

import socket as stdlib_socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from handleipc import addresses
from handleipc.addresses import Address
from handleipc.exceptions import DescriptorReleased
from handleipc.fds import DescriptorOwner

__all__ = ["BaseConnection", "family_of", "type_of"]


def family_of(kind: int) -> int:
    """Return the address family in a descriptor kind of the C core."""
    return kind >> 8 & 0xFF


def type_of(kind: int) -> int:
    """Return the socket type in a descriptor kind of the C core."""
    return kind & 0xFF


class _WatchedSocket(stdlib_socket.socket):
    """A socket that tells when its descriptor is closed or given away.

    Both, since uvloop ends sockets by ``detach`` and asyncio by ``close``.
    """

    __slots__ = ("_on_release",)
    _on_release: Callable[[], None] | None

    def close(self) -> None:
        super().close()
        if super().fileno() < 0:  # not while makefile() objects keep it open
            self._tell()

    def detach(self) -> int:
        fd = super().detach()
        self._tell()
        return fd

    def _tell(self) -> None:
        on_release, self._on_release = self._on_release, None
        if on_release is not None:
            on_release()


class BaseConnection(DescriptorOwner):
    """Owns one connected stream socket.

    Args:
        fd: the descriptor, non-blocking; this object's from here on.
        kind: what the C core says it is.
        key: the server it belongs to, as the wire names it, or None.
        raw_peer: the peer's address as the kernel's bytes, if accept gave it along.
        head: bytes already read from it, which whoever reads it next gets first.
        on_release: called once when the descriptor is closed or given away here.
    """

    __slots__ = ("_head", "_kind", "_on_release", "_raw_peer", "key")

    def __init__(
        self,
        fd: int,
        kind: int,
        *,
        key: str | None = None,
        raw_peer: bytes | None = None,
        head: bytes = b"",
        on_release: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(fd)
        self._kind = kind
        self._raw_peer = raw_peer
        self._head = head
        self._on_release = on_release
        self.key = key

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
        on_release = self._on_release
        factory = stdlib_socket.socket if on_release is None else _WatchedSocket
        # Family and type are given, or the constructor would ask the kernel for them.
        sock = factory(family_of(kind), type_of(kind), 0, fileno=self.fileno())
        sock.settimeout(0)
        if isinstance(sock, _WatchedSocket):
            sock._on_release = on_release
        self._on_release = None
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

    def moved(self) -> None:
        """Forget it: another process owns it, and it no longer counts as open here."""
        super().moved()
        self._released()

    def _released(self) -> None:
        on_release, self._on_release = self._on_release, None
        if on_release is not None:
            on_release()
