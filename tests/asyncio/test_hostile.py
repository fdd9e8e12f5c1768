"""A hostile peer costs what the bounds allow, and nothing else: each attack with its bound.

``python -m tests.hostile`` measures what they cost a neighbour, and in memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path

import pytest

import handleipc
from handleipc import (
    Channel,
    ChannelBroken,
    ChannelClosed,
    FileDescriptor,
    HandleIPCError,
    Limits,
    RemoteProtocolError,
)
from handleipc.asyncio import hangups
from handleipc.stages import Entry, EntryState
from handleipc.window import Window
from tests.asyncio.helpers import (
    RawPeer,
    Recorder,
    ack,
    both_dialects,
    clean_registry,
    raw_peer,
    turns,
    until,
)
from tests.asyncio.test_descriptor_limits import unprivileged

# The most descriptors that one sendmsg carries (SCM_MAX_FD).
SET = 253


@contextlib.contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe, both ends closed at the end."""
    read, write = os.pipe()
    try:
        yield read, write
    finally:
        os.close(read)
        os.close(write)


def open_here() -> int:
    """Return how many descriptors are open, quickly."""
    return len(os.listdir("/proc/self/fd"))


async def most_open(channel: Channel, sock: socket.socket, steps: Iterable[Step]) -> int:
    """Write as long as the channel lives; return the most that was open here meanwhile."""
    most = 0
    for data, fds in steps:
        try:
            while not _sends(sock, data, fds):
                await asyncio.sleep(0)
        except (BrokenPipeError, ConnectionResetError):
            break
        # Read, and what was read is acknowledged.
        for _ in range(3):
            await asyncio.sleep(0)
            most = max(most, open_here())
    return most


def _sends(sock: socket.socket, data: bytes, fds: list[int]) -> bool:
    with contextlib.suppress(BlockingIOError):
        return socket.send_fds(sock, [data], fds) == len(data)
    return False


# -- descriptors ---------------------------------------------------------------------------------

Step = tuple[bytes, list[int]]
UNFINISHED = b"[1,%d" % SET


def _handles(channel: Channel, fd: int, size: int) -> Iterator[Step]:
    """Handles of so many descriptors, as many as are granted."""
    grants = channel._protocol.incoming.grants
    number = sent = 0
    while sent + size <= grants.descriptors or (not sent and grants.ack == number):
        number, sent = number + 1, sent + size
        yield b'[1,%d]\n[2,%d,%d,"many",1]\n' % (size, number, size), [fd] * size


class _Many:
    tag = "many"

    def to_wire(self, handle: object) -> tuple[object, list[int]]:
        """Never called."""
        raise NotImplementedError

    def from_wire(self, details: object, fds: list[FileDescriptor]) -> _Held:
        """Take any number."""
        return _Held(fds)


class _Held:
    """Any number of descriptors."""

    def __init__(self, fds: list[FileDescriptor]) -> None:
        self.fds = fds

    def close(self) -> None:
        """Close them all."""
        for fd in self.fds:
            fd.close()


def _then(data: bytes) -> Callable[[Channel, int], Iterator[Step]]:
    """All that is granted, one by one, and then a set of descriptors with this."""

    def steps(channel: Channel, fd: int) -> Iterator[Step]:
        yield from _handles(channel, fd, 1)
        yield data, [fd] * SET
        yield from [(b" " if data == UNFINISHED else b"[0,1]\n", [])] * 5

    return steps


PINNING: dict[str, Callable[[Channel, int], Iterator[Step]]] = {
    "small handles": lambda channel, fd: _handles(channel, fd, 1),
    "handles of 60": lambda channel, fd: _handles(channel, fd, 60),
    "handles of a whole set": lambda channel, fd: _handles(channel, fd, SET),
    "a line that never ends": _then(UNFINISHED),
    "a set never used up": _then(UNFINISHED + b"]\n"),
}


@pytest.mark.parametrize("read", [0, 1, 32], ids=["never read", "read once", "well read"])
@pytest.mark.parametrize("attack", PINNING)
async def test_native_descriptors_are_bounded(attack: str, read: int, monkeypatch) -> None:
    """A native peer pins a window and the larger of ``ready`` and one set, whatever it sends.

    Whether the application never read, or did before, and earned acknowledging ahead.
    """
    clean_registry(monkeypatch)
    handleipc.register(_Held, _Many())
    limits = Limits(window=256)
    async with raw_peer("native", limits) as (a, peer):
        with pipe() as (fd, _):
            a.on("error", Recorder())
            a._protocol.incoming.deliveries.pace = read
            before = open_here()
            most = await most_open(a, peer.sock, PINNING[attack](a, fd)) - before
            assert most >= 240
            assert most <= limits.window + max(limits.ready, SET)


@pytest.mark.parametrize("waits", [True, False], ids=["waits", "does not wait"])
@pytest.mark.parametrize("last", [1, SET], ids=["one", "a line that never ends"])
async def test_node_descriptors_are_bounded(last: int, waits: bool) -> None:
    """A node-dialect peer pins a window and one set, whether it waits for replies or not."""
    limits = Limits(window=256)
    line = b'{"cmd":"NODE_HANDLE","type":"net.Native","msg":1}\n'
    async with raw_peer("node", limits) as (a, peer):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            a.on("error", Recorder())
            steps = [(line, [sock.fileno()])] * (limits.window + (0 if waits else 63))
            before = open_here()
            most = await most_open(a, peer.sock, [*steps, (line[:20], [sock.fileno()] * last)])
            assert limits.window <= most - before <= limits.window + max(limits.ready, SET)
