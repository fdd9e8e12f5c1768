"""Answered connections that wait for their client's EOF.

Closing a socket with unread bytes makes the kernel reset the connection, and the client loses the
answer: curl failed 60 times of 60. So what still comes is read and dropped. One task for all of
them, since one each was half of the cost of answering.
"""

from __future__ import annotations

import asyncio
import contextlib

from handleipc.handles.connection import Socket

__all__ = ["at_eof", "linger"]

# How long a client has before its connection is closed all the same.
LINGER = 2.0
# Read at once; more is read when the loop comes round again.
READ_SIZE = 65536

_lingerers: dict[asyncio.AbstractEventLoop, _Lingerer] = {}


def at_eof(sock: Socket) -> bool:
    """Read what there is and drop it; say whether the client has sent FIN, or is gone."""
    try:
        return sock.recv(READ_SIZE) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def linger(sock: Socket) -> None:
    """Close this socket at its client's EOF, after ``LINGER`` seconds, or with the loop."""
    loop = asyncio.get_running_loop()
    lingerer = _lingerers.get(loop)
    if lingerer is None:
        for one in [other for other in _lingerers if other.is_closed()]:
            _lingerers.pop(one).close_all()  # without asyncio.run, nobody cancelled its task
        lingerer = _lingerers[loop] = _Lingerer(loop)
    lingerer.add(sock)


class _Lingerer:
    """The sockets of one event loop, and the task that ends their wait."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        # In the order of their deadlines.
        self._waiting: dict[Socket, float] = {}
        self._task = loop.create_task(self._run())
        # A callback and not `finally`: a task cancelled before it began has not got that far.
        self._task.add_done_callback(lambda _: self._end())

    def add(self, sock: Socket) -> None:
        """Own this socket from here on."""
        self._waiting[sock] = self._loop.time() + LINGER
        with contextlib.suppress(OSError):  # out of watches or memory: then its time ends it
            self._loop.add_reader(sock.fileno(), self._on_readable, sock)

    def _on_readable(self, sock: Socket) -> None:
        if at_eof(sock):
            self._close(sock)

    def _close(self, sock: Socket) -> None:
        del self._waiting[sock]
        self._loop.remove_reader(sock.fileno())
        sock.close()

    async def _run(self) -> None:
        await asyncio.sleep(LINGER)
        while self._waiting:
            sock, deadline = next(iter(self._waiting.items()))
            left = deadline - self._loop.time()
            if left > 0:
                await asyncio.sleep(left)
            else:
                self._close(sock)
        self._end()

    def _end(self) -> None:
        # Empty, or the loop ends: nobody waits any longer.
        if _lingerers.get(self._loop) is self:
            del _lingerers[self._loop]
        for sock in list(self._waiting):
            self._close(sock)

    def close_all(self) -> None:
        """Close every socket; the loop is closed already."""
        for sock in self._waiting:
            sock.close()
        self._waiting.clear()
