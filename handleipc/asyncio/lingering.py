"""Answered connections that wait for their client's EOF.

Closing a socket with unread bytes makes the kernel reset the connection, and the client loses the
answer: curl failed 60 times of 60. So what still comes is read and dropped. One task for all of
them, since one each was half of the cost of answering.
"""

from __future__ import annotations

import asyncio
import contextlib

from handleipc.handles.connection import BaseConnection
from handleipc.handles.sockets import Socket
from handleipc.wire.syscalls import end_stream

__all__ = ["linger"]

# How long a client has before its connection is closed all the same.
LINGER = 2.0

_lingerers: dict[asyncio.AbstractEventLoop, _Lingerer] = {}


def linger(connection: BaseConnection | Socket) -> None:
    """Close it at its client's EOF, after ``LINGER`` seconds, or with the loop; own it until then.

    All of the answer and the FIN are in the kernel already (``end_stream``).
    """
    loop = asyncio.get_running_loop()
    lingerer = _lingerers.get(loop)
    if lingerer is None:
        for one in [other for other in _lingerers if other.is_closed()]:
            _lingerers.pop(one).close_all()  # without asyncio.run, nobody cancelled its task
        lingerer = _lingerers[loop] = _Lingerer(loop)
    lingerer.add(connection)


class _Lingerer:
    """The connections of one event loop, and the task that ends their wait."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        # In the order of their deadlines.
        self._waiting: dict[BaseConnection | Socket, float] = {}
        self._task = loop.create_task(self._run())
        # A callback and not `finally`: a task cancelled before it began has not got that far.
        self._task.add_done_callback(lambda _: self._end())

    def add(self, connection: BaseConnection | Socket) -> None:
        """Own this connection from here on."""
        self._waiting[connection] = self._loop.time() + LINGER
        with contextlib.suppress(OSError):  # out of watches or memory: then its time ends it
            self._loop.add_reader(connection.fileno(), self._on_readable, connection)

    def _on_readable(self, connection: BaseConnection | Socket) -> None:
        try:
            at_end = end_stream(connection.fileno(), b"") > 0
        except OSError:
            at_end = True
        if at_end:
            self._close(connection)

    def _close(self, connection: BaseConnection | Socket) -> None:
        del self._waiting[connection]
        self._loop.remove_reader(connection.fileno())
        with contextlib.suppress(OSError):  # the number is free whatever close(2) says
            connection.close()

    async def _run(self) -> None:
        await asyncio.sleep(LINGER)
        while self._waiting:
            connection, deadline = next(iter(self._waiting.items()))
            left = deadline - self._loop.time()
            if left > 0:
                await asyncio.sleep(left)
            else:
                self._close(connection)
        self._end()

    def _end(self) -> None:
        # Empty, or the loop ends: nobody waits any longer.
        if _lingerers.get(self._loop) is self:
            del _lingerers[self._loop]
        for connection in list(self._waiting):
            self._close(connection)

    def close_all(self) -> None:
        """Close every connection; the loop is closed already."""
        for connection in self._waiting:
            with contextlib.suppress(OSError):
                connection.close()
        self._waiting.clear()
