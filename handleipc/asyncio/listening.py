"""``listen`` and ``listen_unix``: sockets that are bound here, as servers.

Knows names and addresses; what becomes of connections is the server's.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator
from typing import Any, Generic, TypeVar

from handleipc.asyncio.listener import UNTAKEN, check_untaken
from handleipc.asyncio.server import Server
from handleipc.asyncio.socketpath import BoundPath
from handleipc.handles.addresses import Address
from handleipc.system import Closeable, close_quietly

__all__ = ["BACKLOG", "Listening", "listen", "listen_unix"]

# Node's default; the kernel caps it at net.core.somaxconn.
BACKLOG = 511
NOT_AWAITED = (
    "listen() has not been awaited: write `server = await handleipc.listen(...)`, or"
    " `async with handleipc.listen(...) as server`"
)


ServerT = TypeVar("ServerT", bound=Closeable)


class Listening(Generic[ServerT]):
    """What ``listen`` returns: awaited it gives a ``Server``, in ``async with`` it is one."""

    def __init__(self, build: Callable[[], Coroutine[Any, Any, ServerT]]) -> None:
        self._build = build
        self._server: ServerT | None = None

    def __await__(self) -> Generator[Any, None, ServerT]:
        return self._build().__await__()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{name}: {NOT_AWAITED}")

    def __aiter__(self) -> AsyncIterator[Any]:
        raise TypeError(NOT_AWAITED)

    async def __aenter__(self) -> ServerT:
        self._server = await self
        return self._server

    async def __aexit__(self, *_: object) -> None:
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
    untaken: int = UNTAKEN,
) -> Listening[Server]:
    """Listen for TCP connections: ``server = await listen(...)`` or ``async with listen(...)``.

    Leaving the ``async with`` block closes the listener and does not wait for connections. To serve
    who was accepted and not taken, call ``stop()`` and iterate on before.

    Args:
        host: an address or name, whose first address is taken; None or ``""`` for all interfaces,
            IPv6 and IPv4 where the system has both.
        port: 0 lets the system choose; see ``server.sockname``.
        backlog: connections the kernel holds for us, capped by net.core.somaxconn.
        reuse_port: set SO_REUSEPORT.
        reuse_address: set SO_REUSEADDR.
        ipv6_only: with an IPv6 address, refuse IPv4 clients.
        untaken: connections to accept at once when somebody waits for one: as many at most are
            ever accepted and not taken. More are faster, and more are lost if the process dies.

    Raises:
        ValueError: the port is none, or ``untaken`` is less than 1.
        OSError: the name is unknown, or the address cannot be bound; it names the address.
    """
    check_untaken(untaken)
    if not isinstance(port, int):
        raise TypeError(f"port={port!r}: give an integer")
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
            with _named(address):
                sock.bind(address)
                sock.listen(backlog)
            return Server(sock, untaken=untaken)
        except BaseException:
            close_quietly(sock)
            raise

    return Listening(build)


def listen_unix(
    path: str | bytes | os.PathLike[str], *, backlog: int = BACKLOG, untaken: int = UNTAKEN
) -> Listening[Server]:
    """Listen at a Unix socket path, as ``listen`` does at a port.

    ``close()`` removes the path, wherever the process works by then, if nobody else has bound it
    meanwhile. Not so after ``send(transfer=True)``, and ``close(unlink=False)`` leaves it, too: it
    is what clients of a process that goes on accepting need. A name that begins with NUL is
    abstract, and has no path.

    Raises:
        ValueError: ``untaken`` is less than 1, or NUL stands within a path.
        OSError: the path cannot be bound, for instance since it exists.
    """
    check_untaken(untaken)
    name = os.fspath(path)
    text = os.fsdecode(name)
    is_path = bool(text) and not text.startswith("\0")
    if is_path and "\0" in text:
        raise ValueError(f"{text!r} is no path: the kernel would cut it at the NUL")

    async def build() -> Server:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        bound = None
        try:
            with _named(name):
                sock.bind(name)
                bound = BoundPath(text) if is_path else None
                sock.listen(backlog)
            return Server(sock, unlink=bound, untaken=untaken)
        except BaseException:
            close_quietly(sock)
            if bound is not None:
                bound.remove()
            raise

    return Listening(build)


async def _resolve(host: str | None, port: int) -> tuple[int, Address]:
    if not host:
        dual = socket.has_dualstack_ipv6()
        return (socket.AF_INET6, ("::", port)) if dual else (socket.AF_INET, ("0.0.0.0", port))
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_ADDRCONFIG
        )
    except socket.gaierror as error:
        hint = "; the port is an argument of its own" if host.count(":") == 1 else ""
        text = f"cannot listen at {host!r}: {error.strerror}{hint}"
        raise socket.gaierror(error.errno, text) from None
    family, _, _, _, address = found[0]
    return family, address


@contextlib.contextmanager
def _named(address: Address | str | bytes) -> Iterator[None]:
    """Have errors name the address."""
    try:
        yield
    except OSError as error:
        # Python's own, of a path that is too long, has neither number nor words.
        number, text = error.errno or errno.ENAMETOOLONG, error.strerror or str(error)
        raise OSError(number, f"cannot listen at {address!r}: {text}") from None
