"""Piped stdio of a child as streams. Knows pipes and event loops, and no child."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from typing import IO, Any

from handleipc.system import close_quietly

__all__ = ["open_reader", "open_writer", "to_the_end"]


async def open_writer(pipe: IO[bytes]) -> tuple[asyncio.BaseTransport, asyncio.StreamWriter]:
    """Return a transport, which owns the pipe from here on, and the stream that writes to it."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(loop=loop)
    transport, protocol = await _connect(
        loop.connect_write_pipe, lambda: asyncio.StreamReaderProtocol(reader, loop=loop), pipe
    )
    return transport, asyncio.StreamWriter(transport, protocol, reader, loop)


async def open_reader(
    pipe: IO[bytes],
) -> tuple[asyncio.BaseTransport, asyncio.StreamReader, asyncio.Future[None]]:
    """Return a transport, which owns the pipe from here on, its stream, and when it has ended.

    Raises:
        OSError: the pipe cannot be watched. It may be closed already.
    """
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(loop=loop)
    ended = loop.create_future()
    transport, _ = await _connect(
        loop.connect_read_pipe, lambda: _PipeProtocol(reader, loop, ended), pipe
    )
    try:
        # asyncio begins to read in a callback, where nobody hears that the kernel refused it.
        transport.pause_reading()
        transport.resume_reading()
    except BaseException:
        transport.close()
        raise
    return transport, reader, ended


class _Number:
    """A descriptor with the looks of a pipe, for a loop that closes the number itself."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        """Do nothing: libuv has closed the number, and somebody else may have it by now."""


async def _connect(
    connect: Callable[..., Any], protocol_factory: Callable[[], Any], pipe: IO[bytes]
) -> tuple[Any, Any]:
    """Call the loop's ``connect_read_pipe`` or the other so that the descriptor is closed once.

    uvloop has libuv close the descriptor, and then closes the object, too. If it fails, libuv may
    have closed the number or never have had it; that of the same pipe can only be ours.
    """
    if not type(asyncio.get_running_loop()).__module__.startswith("uvloop"):
        transport, protocol = await connect(protocol_factory, pipe)
        return transport, protocol
    number = os.dup(pipe.fileno())
    try:
        transport, protocol = await connect(protocol_factory, _Number(number))
    except BaseException:
        if _is_same_file(number, pipe):
            close_quietly(number)
        raise
    close_quietly(pipe)
    return transport, protocol


def _is_same_file(number: int, pipe: IO[bytes]) -> bool:
    try:
        return os.path.sameopenfile(number, pipe.fileno())
    except OSError:
        return False


class _PipeProtocol(asyncio.StreamReaderProtocol):
    """A reader's protocol that also tells when the pipe has ended."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        loop: asyncio.AbstractEventLoop,
        closed: asyncio.Future[None],
    ) -> None:
        super().__init__(reader, loop=loop)
        self._pipe_closed = closed

    def eof_received(self) -> bool:
        """Let the transport close itself: uvloop would keep it for the sake of a half-close."""
        super().eof_received()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the reader, and who waits for the pipe."""
        super().connection_lost(exc)
        if not self._pipe_closed.done():
            self._pipe_closed.set_result(None)


async def to_the_end(coroutine: Coroutine[Any, Any, None]) -> None:
    """Await something short that must not be cancelled half way, then pass the cancellation on.

    uvloop closes the descriptor of a pipe whose connecting is cancelled under the pipe's object.
    """
    task = asyncio.ensure_future(coroutine)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    task.result()
