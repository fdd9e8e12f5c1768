"""``accepting``: lets servers that know nothing of handleipc serve handed connections.

A library that is given ``sock=`` passes it to ``loop.create_server``. So it gets a socket that
never listens, and where the loop is asked to serve that very address, what serves instead takes its
connections from a channel.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import socket
import weakref
from asyncio.trsock import TransportSocket
from collections.abc import AsyncIterator, Awaitable, Callable
from ssl import SSLContext
from typing import Any, Self

from handleipc.asyncio.adoption import Tls
from handleipc.asyncio.connection import Connection
from handleipc.asyncio.logs import throttle
from handleipc.exceptions import ChannelBusy
from handleipc.system import close_quietly

__all__ = ["Door", "HandedServer", "accepting"]

# TLS handshakes at once: each waits for its client, and none is to wait for another's. Not tuned.
HANDSHAKES = 100

OnOther = Callable[[Any, Any], object]
# The doors that each loop's create_server knows of.
_doors: dict[asyncio.AbstractEventLoop, list[Door]] = {}


def accepting(source: AsyncIterator[Any], *, on_other: OnOther | None = None) -> Door:
    """Make a door through which unmodified servers get the connections of ``source``.

    ::

        parent = await handleipc.parent()
        door = handleipc.accepting(parent)
        async with door.patched():
            server = await asyncio.start_server(serve, sock=door.socket)
            await server.serve_forever()

    Anything that takes a listening socket and ends in ``loop.create_server(sock=)`` will do:
    uvicorn, aiohttp, hypercorn, websockets.

    Args:
        source: a ``Channel``, whose messages with a ``Connection`` are taken; or a ``Server`` or
            any other asynchronous iterator of ``Connection``. The next is taken when the last has
            started, so what cannot be served waits in the source. With TLS up to 100 handshakes go
            on at once.
        on_other: called with ``(message, handle)`` of everything else that comes, and awaited if it
            is a coroutine function. It owns the handle. Without it such handles are closed, and
            the log says so.
    """
    return Door(source, on_other)


class Door:
    """What ``accepting`` returns. It owns neither the source nor the connections it lets in.

    Attributes:
        socket: stands for the source: bound to a port of 127.0.0.1, and never listening. Closed
            when ``patched()`` is left, or by whom it was given to.
    """

    def __init__(self, source: AsyncIterator[Any], on_other: OnOther | None) -> None:
        self._source = source
        self._on_other = on_other
        self._ended: asyncio.Future[None] | None = None
        self._server: HandedServer | None = None
        self.socket: socket.socket = socket.socket()
        try:
            self.socket.bind(("127.0.0.1", 0))
        except BaseException:
            self.socket.close()
            raise
        self._address = self.socket.getsockname()

    @contextlib.asynccontextmanager
    async def patched(self) -> AsyncIterator[Self]:
        """Have this loop's ``create_server`` know ``socket``; every other call is as it was.

        What was created inside goes on after the block, as does what the application does with it.
        """
        loop = asyncio.get_running_loop()
        doors = _doors.setdefault(loop, [])
        if not doors:
            original = loop.create_server
            loop.create_server = _diverting(loop, original)  # type: ignore[method-assign,assignment]
        doors.append(self)
        try:
            yield self
        finally:
            doors.remove(self)
            if not doors:
                del _doors[loop]
                del loop.create_server  # of this object, over that of its class
            close_quietly(self.socket)

    async def ended(self) -> None:
        """Wait until the source has ended; at once if it has.

        Raises:
            Exception: what the source ended with, such as ``RemoteProtocolError``.
        """
        await asyncio.shield(self._end())

    def _end(self) -> asyncio.Future[None]:
        if self._ended is None:
            self._ended = asyncio.get_running_loop().create_future()
        return self._ended

    def _has_ended(self, error: Exception | None) -> None:
        end = self._end()
        if end.done():
            return
        if error is None:
            end.set_result(None)
        else:
            end.set_exception(error)

    async def _give_other(self, message: Any, handle: Any) -> None:
        if self._on_other is not None:
            result = self._on_other(message, handle)
            if inspect.isawaitable(result):
                await result
            return
        throttle.warning(
            "not a connection",
            "accepting() got a message with %s and no on_other= to give it to: it is dropped",
            "no handle" if handle is None else f"a {type(handle).__name__}",
        )
        if handle is not None:
            close_quietly(handle)

    async def _serve(
        self,
        protocol_factory: Any,
        *,
        sock: Any,
        ssl: SSLContext | None = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
        start_serving: bool = True,
        family: Any = None,
        flags: Any = None,
        backlog: Any = None,
        reuse_address: Any = None,
        reuse_port: Any = None,
        keep_alive: Any = None,
    ) -> HandedServer:
        """Do what ``create_server`` does, with those of its options that need no listener.

        Raises:
            TypeError, ValueError, ssl.SSLError: an option is none of its, or makes no sense.
            ChannelBusy: this door has a server.
        """
        tls = Tls.of(ssl, ssl_handshake_timeout, ssl_shutdown_timeout)
        if self._server is not None and not self._server._is_closed:
            raise ChannelBusy("another server takes the connections of this door: close it first")
        self._server = server = HandedServer(self, protocol_factory, tls)
        if start_serving:
            await server.start_serving()
        return server


def _diverting(
    loop: asyncio.AbstractEventLoop, original: Callable[..., Awaitable[Any]]
) -> Callable[..., Awaitable[Any]]:
    """Return a ``create_server`` that knows the doors of ``loop``, and calls the original else."""

    async def create_server(
        protocol_factory: Any, host: Any = None, port: Any = None, **options: Any
    ) -> Any:
        sock = options.get("sock")
        if sock is not None:
            name = None
            with contextlib.suppress(OSError):  # closed: as the original says it
                name = sock.getsockname()
            for door in _doors.get(loop, ()):
                if door._address == name:
                    return await door._serve(protocol_factory, **options)
        return await original(protocol_factory, host, port, **options)

    return create_server


class HandedServer(asyncio.AbstractServer):
    """An ``asyncio.Server`` whose connections come through a ``Door``. Made by ``create_server``.

    Closing it closes neither the door's source nor its connections, and another may follow it.
    """

    def __init__(self, door: Door, protocol_factory: Any, tls: Tls | None) -> None:
        self._door = door
        self._factory = protocol_factory
        self._tls = tls
        self._loop = asyncio.get_running_loop()
        self._is_closed = False
        self._task: asyncio.Task[None] | None = None
        self._is_taking = False
        self._starting: set[asyncio.Task[None]] = set()
        self._transports: weakref.WeakSet[asyncio.Transport] = weakref.WeakSet()
        # Connections that have started and not ended, and whether nothing is left to wait for.
        self._count = 0
        self._done = asyncio.Event()

    # -- what asyncio.Server has -----------------------------------------------------------------

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """Return the event loop that it serves in."""
        return self._loop

    def is_serving(self) -> bool:
        """Say whether it takes connections."""
        return self._task is not None and not self._is_closed

    @property
    def sockets(self) -> tuple[TransportSocket, ...]:
        """The door's socket, to look at; none once closed."""
        return () if self._is_closed else (TransportSocket(self._door.socket),)

    async def start_serving(self) -> None:
        """Begin to take connections. Does nothing the second time."""
        if self._is_closed:
            raise RuntimeError(f"{self!r} is closed")
        if self._task is None:
            self._task = self._loop.create_task(self._run())

    async def serve_forever(self) -> None:
        """Take connections until it is closed or the source has ended; cancelled, it closes.

        Raises:
            Exception: what the source ended with.
        """
        await self.start_serving()
        assert self._task is not None
        try:
            await asyncio.shield(self._task)
        except asyncio.CancelledError:
            if not self._is_closed:  # it is this call that was cancelled
                self.close()
                await self.wait_closed()
                raise
        if self._door._end().done():
            self._door._end().result()

    def close(self) -> None:
        """Take no more connections. What the source has, and who is served, stays."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._task is not None and self._is_taking:
            self._task.cancel()  # has taken nothing yet
        self._look()

    def close_clients(self) -> None:
        """Close all connections that it serves, as their transports' ``close`` does."""
        for transport in list(self._transports):
            transport.close()

    def abort_clients(self) -> None:
        """Close all connections that it serves at once, and lose what is not written."""
        for transport in list(self._transports):
            transport.abort()

    async def wait_closed(self) -> None:
        """Wait until it is closed, or its source has ended, and its last connection too."""
        await self._done.wait()

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else "serving" if self._task else "not serving"
        return f"<HandedServer {state} connections={self._count} of {self._door._source!r}>"

    # -- taking ----------------------------------------------------------------------------------

    async def _run(self) -> None:
        error: Exception | None = None
        handshakes = asyncio.Semaphore(HANDSHAKES)
        try:
            while not self._is_closed:
                self._is_taking = True
                try:
                    came = await anext(self._door._source)
                finally:
                    self._is_taking = False
                message, connection = (None, came) if isinstance(came, Connection) else came
                if not isinstance(connection, Connection):
                    await self._door._give_other(message, connection)
                elif self._tls is None:
                    await self._start(connection)
                else:
                    await handshakes.acquire()
                    task = self._loop.create_task(self._start(connection))
                    self._starting.add(task)
                    task.add_done_callback(self._starting.discard)
                    task.add_done_callback(lambda _: handshakes.release())
            return
        except StopAsyncIteration:
            pass
        except Exception as raised:
            error = raised
        self._is_closed = True
        self._door._has_ended(error)
        self._look()

    async def _start(self, connection: Connection) -> None:
        self._count += 1
        try:
            transport, _ = await connection._start(self._factory, self._tls, self._ended_one)
        except BaseException as error:
            self._ended_one()
            if not connection.closed:
                close_quietly(connection)
            if not isinstance(error, Exception):
                raise
            if not isinstance(error, OSError):  # which is the client's affair, as is an SSLError
                self._loop.call_exception_handler(
                    {"message": "a handed connection could not be served", "exception": error}
                )
        else:
            self._transports.add(transport)

    def _ended_one(self) -> None:
        self._count -= 1
        self._look()

    def _look(self) -> None:
        if self._is_closed and not self._count:
            self._done.set()
