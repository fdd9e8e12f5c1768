"""The other ends: Node and Python programs, and one played line by line."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import handleipc
from handleipc import Channel, Child, Connection, Limits

PATIENCE = 20.0

ACK = {"cmd": "NODE_HANDLE_ACK"}
NACK = {"cmd": "NODE_HANDLE_NACK"}

PYTHON = """
import asyncio, json, logging, os, socket, subprocess, sys
import handleipc

{text}

async def start():
    parent = await handleipc.parent()
    await main(parent)
    parent.disconnect()
    await parent.wait_disconnected()

asyncio.run(start())
"""

NODE_CHILD = """
const assert = require('assert');
const net = require('net');
const parent = process;
"""

NODE_PARENT = """
const assert = require('assert');
const child_process = require('child_process');
const net = require('net');
const show = (value) => require('fs').writeSync(1, JSON.stringify(value) + '\\n');
const python = process.argv.slice(2);
const fork = (stdio = [0, 1, 2, 'ipc'], ...args) =>
  child_process.spawn(python[0], [...python.slice(1), ...args], { stdio });
const events = (child) => {
  for (const event of ['disconnect', 'exit', 'close'])
    child.on(event, (...args) => show([event, child.connected, ...args]));
  return child;
};
"""


def python_program(folder: Path, text: str, name: str = "child.py") -> list[str]:
    """Write a Python child whose ``text`` defines ``main(parent)``; return how to run it."""
    path = folder / name
    path.write_text(PYTHON.format(text=inspect.cleandoc(text)))
    return [sys.executable, "-W", "error", str(path)]


def under_node(node: str, folder: Path, javascript: str, python: str = "") -> list[Any]:
    """Run a Node parent, which must end well, and return what it showed, line by line.

    ``javascript`` has ``fork()``, which starts ``main(parent)`` of ``python``.
    """
    parent = folder / "parent.js"
    parent.write_text(NODE_PARENT + inspect.cleandoc(javascript) + "\n")
    run = subprocess.run(
        [node, parent, *python_program(folder, python)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (run.returncode, run.stderr) == (0, ""), (run.stdout, run.stderr)
    return [json.loads(line) for line in run.stdout.splitlines()]


class Peer:
    """Starts children of one kind: Node of some version, or Python."""

    def __init__(self, node: str | None, folder: Path) -> None:
        self.node = node
        self.folder = folder

    def argv(self, javascript: str, python: str, suffix: str = ".js") -> list[str]:
        """Write the program of this kind, and return how to run it."""
        if self.node is None:
            return python_program(self.folder, python)
        path = self.folder / f"child{suffix}"
        prelude = NODE_CHILD if suffix == ".js" else ""
        path.write_text(prelude + inspect.cleandoc(javascript) + "\n")
        return [self.node, "--no-deprecation", str(path)]

    @contextlib.asynccontextmanager
    async def __call__(
        self, javascript: str, python: str, *args: str, suffix: str = ".js", **options: Any
    ) -> AsyncIterator[Child]:
        """Start a child; it ends with the block, whatever happens in it."""
        async with spawned(*self.argv(javascript, python, suffix), *args, **options) as child:
            yield child


@contextlib.asynccontextmanager
async def spawned(*argv: str, **options: Any) -> AsyncIterator[Child]:
    """Spawn a child; whatever still runs at the end of the block is killed."""
    child = await handleipc.spawn(*argv, **options)
    try:
        async with asyncio.timeout(PATIENCE):
            yield child
    finally:
        child.kill(signal.SIGKILL)
        child.abort()
        await child.wait()
        await child.wait_disconnected()


async def goodbye(child: Child) -> None:
    """Disconnect; the child ends by itself, and well."""
    child.disconnect()
    assert await child.wait() == 0
    await child.wait_disconnected()


def collect_events(child: Child) -> list[Any]:
    """Return a list that the events of the end will be in, with ``connected`` at that time."""
    events: list[Any] = []
    child.on("disconnect", lambda: events.append(["disconnect", child.connected]))
    child.on("exit", lambda *args: events.append(["exit", child.connected, *args]))
    child.on("close", lambda *args: events.append(["close", child.connected, *args]))
    return events


def event(channel: Channel, name: str) -> asyncio.Future[tuple[Any, ...]]:
    """Return what to await for the next event of this name."""
    happened = asyncio.get_running_loop().create_future()
    channel.once(name, lambda *args: happened.done() or happened.set_result(args))
    return happened


# -- sockets -------------------------------------------------------------------------------------


async def connect(address: Any) -> socket.socket:
    """Return a connected client."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    client = socket.socket(family, socket.SOCK_STREAM)
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, address)
    return client


@contextlib.asynccontextmanager
async def clients(address: Any, count: int) -> AsyncIterator[list[socket.socket]]:
    """Connect so many clients, and close them in the end."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(await connect(address)) for _ in range(count)]


@contextlib.asynccontextmanager
async def connection() -> AsyncIterator[tuple[socket.socket, Connection]]:
    """A client, and the connection accepted from it; both are closed in the end."""
    async with handleipc.listen("127.0.0.1", 0) as server:
        client = await connect(server.sockname)
        accepted = await anext(server)
    with client:
        try:
            yield client, accepted
        finally:
            accepted.close()


@contextlib.contextmanager
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected sockets that belong to no server: a client, and what to send."""
    client, sent = socket.socketpair()
    with client, sent:
        client.setblocking(False)
        sent.setblocking(False)
        yield client, sent


async def receive(sock: socket.socket, size: int = 65536) -> bytes:
    """Receive what comes next."""
    return await asyncio.get_running_loop().sock_recv(sock, size)


async def receive_all(sock: socket.socket) -> bytes:
    """Receive until the end."""
    data = b""
    while chunk := await receive(sock):
        data += chunk
    return data


async def readable(sock: Any) -> None:
    """Wait until there is something to read."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_reader(sock.fileno(), lambda: ready.done() or ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_reader(sock.fileno())


# -- a peer with no rules ------------------------------------------------------------------------


def envelope(message: Any, kind: str = "net.Socket", **more: Any) -> dict[str, Any]:
    """Return what Node writes for a handle."""
    return {"cmd": "NODE_HANDLE", "type": kind, "msg": message, **more}


class Raw:
    """The other end of a channel in the node dialect, played by the test line by line."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.setblocking(False)
        self.buffer = b""
        self.fds: list[int] = []

    def write(self, *values: Any, fds: tuple[int, ...] = ()) -> None:
        """Write lines at once: ``bytes`` as they are, anything else as JSON."""
        data = b"".join(
            value if isinstance(value, bytes) else json.dumps(value).encode() + b"\n"
            for value in values
        )
        if fds:
            assert socket.send_fds(self.sock, [data], list(fds)) == len(data)
        else:
            assert self.sock.send(data) == len(data)

    async def line(self) -> bytes:
        """Read the next line; ``b""`` at the end. Descriptors are collected in ``fds``."""
        async with asyncio.timeout(PATIENCE):
            while b"\n" not in self.buffer:
                await readable(self.sock)
                try:
                    data, fds, _, _ = socket.recv_fds(self.sock, 65536, 100)
                except ConnectionResetError:
                    return b""
                self.fds += fds
                if not data:
                    return b""
                self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line

    async def read(self) -> Any:
        """Read the next line, decoded."""
        line = await self.line()
        assert line, "the channel has ended"
        return json.loads(line)

    def nothing_came(self) -> bool:
        """Say whether there is nothing to read."""
        try:
            return not self.buffer and not self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True

    def drop_descriptors(self) -> int:
        """Close the descriptors that came, and return how many there were."""
        fds, self.fds = self.fds, []
        for fd in fds:
            os.close(fd)
        return len(fds)

    def close(self) -> None:
        """End without a word."""
        self.drop_descriptors()
        self.sock.close()


@contextlib.asynccontextmanager
async def raw_peer(limits: Limits | None = None) -> AsyncIterator[tuple[Channel, Raw]]:
    """A channel, and its peer."""
    ours, theirs = socket.socketpair()
    channel, raw = Channel(ours, limits or Limits()), Raw(theirs)
    try:
        yield channel, raw
    finally:
        raw.close()
        channel.abort()
        await channel.wait_disconnected()


@contextlib.asynccontextmanager
async def two_ends() -> AsyncIterator[tuple[Channel, Channel]]:
    """Both ends of a channel in the node dialect, in this process."""
    ours, theirs = socket.socketpair()
    a, b = Channel(ours, Limits()), Channel(theirs, Limits())
    try:
        yield a, b
    finally:
        for channel in (a, b):
            channel.abort()
            await channel.wait_disconnected()


async def turns(count: int = 20) -> None:
    """Let the loop do all that is due: to show that something does not happen."""
    for _ in range(count):
        await asyncio.sleep(0)
