"""``Server``: accepts connections in batches and hands them out untouched.

Makes no Python socket per connection and reads nothing from them. When nobody takes connections,
accepting pauses, and the kernel's backlog is the queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Generator
from types import TracebackType
from typing import Any, ClassVar, Self

from handleipc import codec
from handleipc.addresses import Address
from handleipc.ancillary import Acceptor, descriptor_kind
from handleipc.asyncio.connection import Connection
from handleipc.asyncio.emitter import Emitter
from handleipc.asyncio.handles import default_registry
from handleipc.connection import family_of, protocol_of, type_of
from handleipc.conversions import NET_SERVER, pend_held
from handleipc.exceptions import UnsupportedHandle
from handleipc.pending import Held, PendingHandle
from handleipc.socketlist import Group
from handleipc.typing import Options

__all__ = ["ConnectionCount", "Server", "listen", "listen_unix"]

log = logging.getLogger("handleipc")

# Node's default; the kernel caps it at net.core.somaxconn.
BACKLOG = 511
# Connections accepted in one call into C.
ACCEPT_BATCH = 64
# Accepted and untaken connections above which accepting pauses: one batch is on the way while the
# application works on the last.
MAX_UNTAKEN = 64
# Pause after EMFILE and the like: waiting connections stay in the backlog meanwhile.
ACCEPT_PAUSE = 0.05
# How long get_connections waits for a process that does not answer, unless told otherwise.
COUNT_TIMEOUT = 10.0

_serials = itertools.count(1)


class ConnectionCount(int):
    """A number of connections, and who did not say how many it has.

    Attributes:
        missing: the channels whose peer did not answer in time, or not sensibly.
    """

    missing: tuple[object, ...]

    def __new__(cls, count: int, missing: tuple[object, ...] = ()) -> Self:
        """Make a count."""
        self = super().__new__(cls, count)
        self.missing = missing
        return self


class Server(Emitter):
    """A listening socket, and an iterator over the connections it accepts.

    Connections accepted and not yet taken survive a ``break`` and are closed by ``close()``.

    Events: ``"drop"(peername)`` when a connection was closed because of ``max_connections``,
    ``"error"(exc)`` when accepting failed for want of descriptors; it goes on by itself.

    Args:
        sock: a listening stream socket; the server's from here on.
        unlink: the path of a Unix socket to remove at ``close()``, or None.
    """

    EVENTS: ClassVar[frozenset[str]] = frozenset({"drop", "error"})

    tag: ClassVar[str] = NET_SERVER
    """What it travels as."""

    def __init__(self, sock: socket.socket, *, unlink: str | None = None) -> None:
        super().__init__(asyncio.get_running_loop())
        sock.setblocking(False)
        self._sock = sock
        self._unlink = unlink
        self._inode = _inode(unlink) if unlink is not None else 0
        self._address = sock.getsockname()
        # The key is opaque to Node, whose own collide for port 0 (node-wire.md fact 11).
        self.group = Group(f"handleipc:{os.getpid()}:{next(_serials)}:{self._address}")
        self.max_connections: int | None = None
        """Connections above which new ones are dropped: those open here and with native peers,
        which report each close. Node peers report none."""
        self._kind: int | None = None
        self._acceptor = Acceptor(ACCEPT_BATCH)
        self._untaken: deque[Connection] = deque()
        self._is_accepting = False
        self._pause: asyncio.TimerHandle | None = None
        self._reader: asyncio.Future[None] | None = None
        self._closed = asyncio.Event()
        self._emptied = asyncio.Event()

    @property
    def sockname(self) -> Address:
        """The address it listens at."""
        return self._address

    @property
    def connections(self) -> int:
        """Connections of this server that are open in this process."""
        return self.group.local

    async def get_connections(self, *, timeout: float | None = COUNT_TIMEOUT) -> ConnectionCount:
        """Count the connections of this server, here and in every process they were handed to.

        A process that has ended holds none. One that does not answer in time, or nonsense, is
        named in the result's ``missing``, and not counted.

        Args:
            timeout: seconds to wait for answers; None for ever.
        """
        answered = asyncio.Event()
        tally = self.group.count(lambda _: answered.set())
        try:
            async with asyncio.timeout(timeout):
                await answered.wait()
        except TimeoutError:
            pass
        finally:
            tally.give_up()
        return ConnectionCount(tally.count, tuple(one.peer for one in tally.missing))

    @property
    def closed(self) -> bool:
        """Whether ``close()`` was called."""
        return self._sock.fileno() < 0

    def fileno(self) -> int:
        """Return the listening descriptor, borrowed; -1 once closed."""
        return self._sock.fileno()

    def close(self) -> None:
        """Stop listening, and close the connections nobody has taken. Others live on.

        A Unix path that ``listen_unix`` made is removed. Does nothing the second time.
        """
        if self._unlink is not None and not self.closed:
            self._remove_path(self._unlink)
        self._stop_listening()
        while self._untaken:
            self._untaken.popleft().close()

    def _stop_listening(self) -> None:
        """Close the listening socket; what was accepted can still be taken."""
        if self.closed:
            return
        self._stop_accepting()
        if self._pause is not None:
            self._pause.cancel()
        self._sock.close()
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
        self._closed.set()
        self.group.when_empty(self._on_empty)

    def transfer(self, pending: Held) -> None:
        """Have the listener stop here when the peer has it. Used by ``send(transfer=True)``."""
        if self._unlink is not None:
            # Whoever listens last removes the path; Node, which never does, leaves it.
            pending.options = codec.spell({"unlink": self._unlink})
        pending.on_delivered = self._transferred

    def _transferred(self) -> None:
        self._unlink = None
        self._stop_listening()

    def _on_empty(self) -> None:
        for one in list(self.group.lists):
            one.forget()
        self._emptied.set()

    async def wait_closed(self) -> None:
        """Wait until the server is closed and the last of its connections has, wherever it is.

        As Node's ``close(callback)``: connections handed to other processes are waited for too;
        those of a process that has ended are closed.
        """
        await self._closed.wait()
        await self._emptied.wait()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Connection:
        while not self._untaken:
            if self.closed:
                raise StopAsyncIteration
            if self._reader is not None:
                raise RuntimeError("another task iterates over this server already")
            self._reader = self._loop.create_future()
            self._start_accepting()
            try:
                await self._reader
            finally:
                self._reader = None
        connection = self._untaken.popleft()
        if not self.closed and len(self._untaken) < MAX_UNTAKEN // 2:
            self._start_accepting()
        return connection

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"fd={self._sock.fileno()}"
        return f"<Server {state} {self._address!r} connections={self.connections}>"

    # -- accepting -------------------------------------------------------------------------------

    def _start_accepting(self) -> None:
        if not self._is_accepting and self._pause is None:
            self._is_accepting = True
            self._loop.add_reader(self._sock.fileno(), self._on_readable)

    def _stop_accepting(self) -> None:
        if self._is_accepting:
            self._is_accepting = False
            self._loop.remove_reader(self._sock.fileno())

    def _on_readable(self) -> None:
        room = MAX_UNTAKEN - len(self._untaken)
        if room <= 0:
            self._stop_accepting()
            return
        try:
            accepted = self._acceptor.accept(self._sock.fileno(), room)
        except OSError as error:
            self._accept_failed(error)
            return
        for fd, raw_peer in accepted:
            if self._kind is None:
                self._kind = descriptor_kind(fd)
            connection = Connection(fd, self._kind, group=self.group, raw_peer=raw_peer)
            self.group.opened_here()
            most = self.max_connections
            if most is not None and self.group.known > most:
                self._drop(connection)
            else:
                self._untaken.append(connection)
        if self._untaken and self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _accept_failed(self, error: OSError) -> None:
        """Out of descriptors or memory: connections wait in the backlog until there are some."""
        self._stop_accepting()
        self._pause = self._loop.call_later(ACCEPT_PAUSE, self._resume)
        hint = " (RLIMIT_NOFILE)" if error.errno == errno.EMFILE else ""
        if not self._emit("error", error):
            log.warning("%r cannot accept: %s%s", self, error.strerror, hint)

    def _resume(self) -> None:
        self._pause = None
        if not self.closed:
            self._start_accepting()

    def _drop(self, connection: Connection) -> None:
        """Too many are open: close this one, and tell."""
        peername = connection.peername
        connection.close()
        self._emit("drop", peername)

    def _remove_path(self, path: str) -> None:
        # Only if it is still ours: another server may have bound the name meanwhile.
        with contextlib.suppress(OSError):
            if _inode(path) == self._inode:
                os.unlink(path)


def _inode(path: str) -> int:
    try:
        return os.stat(path).st_ino
    except OSError:
        return -1


class _Listening:
    """What ``listen`` returns: awaited it gives a ``Server``, in ``async with`` it is one."""

    def __init__(self, build: Callable[[], Any]) -> None:
        self._build = build
        self._server: Server | None = None

    def __await__(self) -> Generator[Any, None, Server]:
        return self._build().__await__()  # type: ignore[no-any-return]

    async def __aenter__(self) -> Server:
        self._server = await self
        return self._server

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._server is not None
        self._server.close()


def listen(
    host: str | None,
    port: int,
    *,
    backlog: int = BACKLOG,
    reuse_port: bool = False,
    reuse_address: bool = True,
    ipv6_only: bool = False,
) -> _Listening:
    """Listen for TCP connections: ``server = await listen(...)`` or ``async with listen(...)``.

    Leaving the ``async with`` block closes the listener and does not wait for connections.

    Args:
        host: an address or name, whose first address is taken; None or ``""`` for all interfaces,
            IPv6 and IPv4 where the system has both.
        port: 0 lets the system choose; see ``server.sockname``.
        backlog: connections the kernel holds for us, capped by net.core.somaxconn.
        reuse_port: set SO_REUSEPORT.
        reuse_address: set SO_REUSEADDR.
        ipv6_only: with an IPv6 address, refuse IPv4 clients.

    Raises:
        ValueError: the port is none.
        OSError: the name is unknown, or the address cannot be bound; it names the address.
    """
    # getaddrinfo would take it modulo 65536.
    if not 0 <= port <= 65535:
        raise ValueError(f"{port} is no port: it must lie in 0..65535")

    async def build() -> Server:
        family, address = await _resolve(host, port)
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            if reuse_address:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if reuse_port:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(ipv6_only))
            _bind(sock, address, backlog)
            return Server(sock)
        except BaseException:
            sock.close()
            raise

    return _Listening(build)


def listen_unix(path: str | os.PathLike[str], *, backlog: int = BACKLOG) -> _Listening:
    """Listen at a Unix socket path, as ``listen`` does at a port. ``close()`` removes the path.

    Raises:
        OSError: the path cannot be bound, for instance since it exists.
    """
    name = os.fspath(path)

    async def build() -> Server:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            _bind(sock, name, backlog)
            return Server(sock, unlink=None if name.startswith("\0") else name)
        except BaseException:
            sock.close()
            raise

    return _Listening(build)


async def _resolve(host: str | None, port: int) -> tuple[int, Address]:
    if not host:
        dual = socket.has_dualstack_ipv6()
        return (socket.AF_INET6, ("::", port)) if dual else (socket.AF_INET, ("0.0.0.0", port))
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_ADDRCONFIG
    )
    family, _, _, _, address = found[0]
    return family, address


def _bind(sock: socket.socket, address: Address, backlog: int) -> None:
    try:
        sock.bind(address)
        sock.listen(backlog)
    except OSError as error:
        raise OSError(error.errno, f"cannot listen at {address!r}: {error.strerror}") from None


def _build_server(fd: int, kind: int, options: Options | None) -> Server:
    sock = socket.socket(family_of(kind), type_of(kind), protocol_of(kind), fileno=fd)
    path = options.get("unlink") if options else None
    # A path that is not this socket's own is not for the peer to have removed.
    return Server(sock, unlink=path if path and path == sock.getsockname() else None)


def _pend_server(server: Server, keep_open: bool) -> PendingHandle:
    if server.closed:
        raise UnsupportedHandle("this server is closed")
    return pend_held(server, NET_SERVER, server)


default_registry.add_builder(NET_SERVER, _build_server)
default_registry.add_pender(Server, _pend_server)
