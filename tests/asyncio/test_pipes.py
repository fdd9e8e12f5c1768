"""Piped stdio as streams: who closes the descriptor when an event loop cannot take it."""

from __future__ import annotations

import asyncio
import errno
import os
from typing import Any

import pytest

from handleipc.asyncio import pipes


@pytest.mark.parametrize("closes", [False, True], ids=["keeps", "closes"])
async def test_a_loop_that_cannot_take_it(closes: bool) -> None:
    """It is closed once, whether the loop had closed its number before it gave up or not."""
    reading, writing = os.pipe()
    given: list[int] = []

    async def connect(_: Any, pipe: Any) -> Any:
        given.append(pipe.fileno())
        if closes:
            os.close(given[0])
            if given[0] != reading:  # and another thread has opened something at once
                given.append(os.open(os.devnull, os.O_RDONLY))
        raise OSError(errno.EBADF, "refused")

    pipe = open(reading, "rb", buffering=0, closefd=not closes or is_uvloop())
    with pytest.raises(OSError, match="refused"):
        await pipes._connect(connect, asyncio.Protocol, pipe)
    pipe.close()
    for number in given[1:]:
        os.close(number)
    os.close(writing)


def is_uvloop() -> bool:
    return type(asyncio.get_running_loop()).__module__.startswith("uvloop")


async def test_a_close_that_fails() -> None:
    """What close(2) says of the pipe that the loop has a copy of is nobody's business."""
    reading, writing = os.pipe()

    class Pipe:
        def fileno(self) -> int:
            return reading

        def close(self) -> None:
            os.close(reading)
            raise OSError(errno.EIO, "close")

    pipe: Any = Pipe() if is_uvloop() else open(reading, "rb", buffering=0)
    transport, stream, ended = await pipes.open_reader(pipe)
    os.write(writing, b"said")
    os.close(writing)
    assert await stream.read() == b"said"
    await ended
    transport.close()
