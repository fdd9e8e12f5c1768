"""Two ends of a channel in one process, and what to send through it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

import handleipc
from handleipc import Channel, Connection, Limits
from handleipc.asyncio.registry import default_registry
from handleipc.limits import Invitation
from handleipc.wire.syscalls import descriptor_kind

DIALECTS = ["node", "native"]
both_dialects = pytest.mark.parametrize("dialect", DIALECTS)

SWITCH = {"cmd": "NODE_HANDLEIPC", "native": 2, "ack": 0, "descriptors": 128, "bytes": 1 << 26}
ACK = {"cmd": "NODE_HANDLE_ACK"}
NACK = {"cmd": "NODE_HANDLE_NACK"}

# A child that sends back what it is sent.
ECHO = """
import asyncio, handleipc

async def main():
    parent = await handleipc.parent()
    async for message, handle in parent:
        await parent.send(message, handle)

asyncio.run(main())
"""


def join(
    dialect: str, limits: Limits | None = None, peer_limits: Limits | None = None
) -> tuple[Channel, Channel]:
    """Return both ends of a channel; the first is the parent's."""
    ours, theirs = socket.socketpair()
    limits = limits or Limits()
    invitation = Invitation(limits.window, limits.bytes) if dialect == "native" else None
    return (
        earned(Channel(ours, limits, inviting=dialect == "native")),
        earned(Channel(theirs, peer_limits or Limits(), invited_by=invitation)),
    )


def earned(channel: Channel) -> Channel:
    """Let the end acknowledge ahead, as one whose application has read all the time."""
    channel._protocol.incoming.deliveries.pace = channel._limits.ready
    return channel


def clean_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test registers is forgotten after it."""
    for name in ("_preparers", "_builders", "_custom", "_found"):
        monkeypatch.setattr(default_registry, name, dict(getattr(default_registry, name)))


async def settle(a: Channel, b: Channel) -> None:
    """Exchange a message each way, so that both ends speak the dialect they will speak."""
    for sender, receiver in ((a, b), (b, a), (a, b)):
        sender.send_nowait("hello")
        assert await receiver.recv() == ("hello", None)


async def close_all(*channels: Channel) -> None:
    """Abort, and close every handle that was delivered and not taken."""
    for channel in channels:
        channel.abort()
    for channel in channels:
        await channel.wait_disconnected()
        await take_rest(channel)


async def take_rest(channel: Channel) -> list[tuple[Any, Any]]:
    """Take what an ended channel still holds, and close its handles."""
    rest = []
    with contextlib.suppress(handleipc.ChannelClosed, handleipc.RemoteProtocolError):
        while True:
            message, handle = await channel.recv()
            rest.append((message, handle))
            if handle is not None:
                handle.close()
    return rest


@contextlib.asynccontextmanager
async def joined(
    dialect: str, limits: Limits | None = None, peer_limits: Limits | None = None
) -> AsyncIterator[tuple[Channel, Channel]]:
    """Two joined ends that know their dialect; aborted at the end."""
    a, b = join(dialect, limits, peer_limits)
    try:
        await settle(a, b)
        assert a.dialect == b.dialect == dialect
        yield a, b
    finally:
        for channel in (a, b):
            for listener, _ in list(channel._listeners.get("message", ())):
                channel.off("message", listener)
        await close_all(a, b)


class RawPeer:
    """The other end of a channel, played by the test line by line."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.setblocking(False)
        self._buffer = b""
        self.fds: list[int] = []

    def write(self, *lines: Any, fds: tuple[int, ...] = ()) -> None:
        """Send lines at once; bytes go as they are, anything else as JSON."""
        data = b"".join(_line(line) for line in lines)
        if fds:
            assert socket.send_fds(self.sock, [data], list(fds)) == len(data)
        else:
            self.sock.setblocking(True)
            self.sock.sendall(data)
            self.sock.setblocking(False)

    async def line(self, *, control: bool = False) -> Any:
        """Return the next line, decoded, control lines only if asked; descriptors go to ``fds``."""
        while True:
            line = await self._line()
            if control or not (isinstance(line, dict) and line.get("cmd") == "NODE_HANDLEIPC"):
                return line

    async def _line(self) -> Any:
        deadline = time.monotonic() + 10
        while b"\n" not in self._buffer:
            try:
                data, fds, _, _ = socket.recv_fds(self.sock, 65536, 253)
            except BlockingIOError:
                assert time.monotonic() < deadline, f"no line came, only {self._buffer!r}"
                await asyncio.sleep(0.001)
                continue
            self.fds += fds
            if not data:
                raise EOFError
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    async def handles(self, count: int) -> None:
        """Read lines until so many descriptors have come in all."""
        while len(self.fds) < count:
            await self.line()

    def unread(self) -> bytes:
        """Return what has arrived and no ``line()`` has taken, without waiting."""
        with contextlib.suppress(BlockingIOError):
            data, fds, _, _ = socket.recv_fds(self.sock, 1 << 20, 253)
            self._buffer += data
            self.fds += fds
        return self._buffer

    def close(self) -> None:
        self.sock.close()
        while self.fds:
            os.close(self.fds.pop())


def _line(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    return json.dumps(value).encode() + b"\n"


@contextlib.asynccontextmanager
async def raw_peer(
    dialect: str = "node", limits: Limits | None = None, *, handles: int = 128
) -> AsyncIterator[tuple[Channel, RawPeer]]:
    """A channel and the socket of its peer, which is a child.

    ``native``: both have switched. ``invited``: the peer was invited and has said nothing.
    """
    ours, theirs = socket.socketpair()
    channel = earned(Channel(ours, limits or Limits(), inviting=dialect != "node"))
    peer = RawPeer(theirs)
    try:
        if dialect == "native":
            peer.write({**SWITCH, "descriptors": handles})
            assert (await peer.line(control=True))["native"] == 2
        yield channel, peer
    finally:
        for listener, _ in list(channel._listeners.get("message", ())):
            channel.off("message", listener)
        peer.close()
        await close_all(channel)


def ack(upto: int, handles: int = 256) -> dict[str, Any]:
    """Return the control line that acknowledges all handles up to a number."""
    return {"cmd": "NODE_HANDLEIPC", "ack": upto, "descriptors": handles, "bytes": 1 << 26}


def connection(**options: Any) -> tuple[socket.socket, Connection]:
    """Return a client and the connection a server would have accepted from it."""
    client, served = socket.socketpair()
    client.settimeout(10)
    served.setblocking(False)
    kind = descriptor_kind(served.fileno())
    return client, Connection(served.detach(), kind, **options)


@contextlib.contextmanager
def clients(count: int) -> Iterator[tuple[list[socket.socket], list[Connection]]]:
    """Several connections with their clients; what is left of them at the end is closed."""
    pairs = [connection() for _ in range(count)]
    try:
        yield [client for client, _ in pairs], [served for _, served in pairs]
    finally:
        for client, served in pairs:
            client.close()
            if not served.closed:
                served.close()


def is_open(client: socket.socket) -> bool:
    """Say whether anybody still holds the other end of this socket pair."""
    client.setblocking(False)
    try:
        return client.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True


def works(client: socket.socket, served: Any) -> bool:
    """Say whether this handle is the other end of that client."""
    client.setblocking(False)
    client.send(b"?")
    sock = socket.socket(fileno=os.dup(served.fileno()))
    with sock:
        sock.setblocking(False)
        return sock.recv(10) == b"?"


async def until(condition: Callable[[], Any], what: str = "the condition") -> None:
    """Poll a condition of which nobody tells, for ten seconds at most."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, f"{what} never came true"
        await asyncio.sleep(0.002)


async def turns(count: int = 20) -> None:
    """Let the loop do everything that is due: to show that something does not happen."""
    for _ in range(count):
        await asyncio.sleep(0)


class Recorder:
    """A listener that keeps what it was called with, and can be waited for."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._called = asyncio.Event()

    def __call__(self, *args: Any) -> None:
        self.calls.append(args)
        self._called.set()

    async def next(self, count: int = 1) -> list[tuple[Any, ...]]:
        """Wait until it was called so many times in all."""
        async with asyncio.timeout(20):
            while len(self.calls) < count:
                self._called.clear()
                await self._called.wait()
        return self.calls
