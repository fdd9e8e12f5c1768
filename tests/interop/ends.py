"""The Python end of test_handles.py, in the test itself or as a child of Node.

One end gives a handle with ``{"kind": ...}`` and keeps the client of it; the other takes it,
says "taken", and answers a "ping" that arrives over it with a "pong".
As a program: ``ends.py give|take KIND``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import tempfile
from typing import Any

import handleipc

KINDS = [
    "net.Socket",
    "net.Server",
    "net.Native socket",
    "net.Native server",
    "dgram.Socket",
    "dgram.Socket udp6",
    "dgram.Native",
    "unix net.Socket",
    "unix net.Server",
    "FIFO net.Native",
]

MORE_KINDS = ["messages", "lone surrogate", "socket behind a message", "socket there and back"]
"""What other runtimes than Node are asked beside these; ``handles.js`` has the same."""

VALUES = [None, True, 1.5, "", {"é": ["\U0001f600", {"deep": None}]}, "x" * 200_000, *range(100)]

DIRECTIONS = [
    "Node parent > Python child",
    "Python child > Node parent",
    "Python parent > Node child",
    "Node child > Python parent",
]


async def readable(sock: Any) -> None:
    """Wait until there is something to read, on any event loop."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def on_readable() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(sock.fileno(), on_readable)
    try:
        await ready
    finally:
        loop.remove_reader(sock.fileno())


# -- taking --------------------------------------------------------------------------------------


async def answer_stream(connection: handleipc.Connection) -> None:
    """Answer the ping on a connection."""
    reader, writer = await connection.open()
    assert await reader.readexactly(4) == b"ping"
    writer.write(b"pong")
    await writer.drain()
    writer.close()
    await writer.wait_closed()


async def answer_socket(sock: socket.socket) -> None:
    """Answer the ping on a plain non-blocking socket."""
    with sock:
        await readable(sock)
        assert sock.recv(4) == b"ping"
        sock.sendall(b"pong")


async def answer(channel: handleipc.Channel, kind: str, handle: Any) -> None:
    """Check what arrived, say so, and answer the ping that comes over it."""
    assert not handle.get_inheritable() if isinstance(handle, socket.socket) else True
    assert not os.get_inheritable(handle.fileno())
    assert not os.get_blocking(handle.fileno())
    await channel.send("taken")
    match kind:
        case "net.Socket" | "unix net.Socket" | "socket behind a message":
            assert type(handle) is handleipc.Connection
            await answer_stream(handle)
        case "net.Server" | "unix net.Server":
            assert type(handle) is handleipc.Server
            async with handle as server:
                await answer_stream(await anext(server))
            await server.wait_closed()
        case "net.Native socket":
            assert type(handle) is handleipc.Socket
            await answer_socket(handle)
        case "net.Native server":
            assert type(handle) is handleipc.Socket
            with handle:
                await readable(handle)
                accepted, _ = handle.accept()
                await answer_socket(accepted)
        case "dgram.Socket" | "dgram.Socket udp6" | "dgram.Native":
            assert type(handle) is handleipc.Socket
            with handle:
                await readable(handle)
                data, address = handle.recvfrom(100)
                assert data == b"ping"
                handle.sendto(b"pong", address)
        case "FIFO net.Native":
            assert type(handle) is handleipc.FileDescriptor
            with handle:
                await readable(handle)
                assert os.read(handle.fileno(), 100) == b"ping"
                await channel.send("pong")


async def take(channel: handleipc.Channel, kind: str) -> None:
    """Take one handle of this kind, and let the other end try it."""
    if kind in ("messages", "lone surrogate"):
        async for message, _ in channel:
            if message == "done":
                return
            await channel.send(message)
    if kind == "socket behind a message":
        assert await channel.recv() == ("before", None)
    message, handle = await channel.recv()
    assert message == {"kind": kind}
    assert handle is not None
    if kind == "socket there and back":
        await channel.send("back", handle)
    else:
        await answer(channel, kind, handle)
    assert await channel.recv() == ("done", None)


# -- giving --------------------------------------------------------------------------------------


def connect(address: Any, family: socket.AddressFamily) -> socket.socket:
    """Return a connected, non-blocking client."""
    client = socket.socket(family, socket.SOCK_STREAM)
    client.connect(address)
    client.setblocking(False)
    return client


async def ping_stream(client: socket.socket) -> None:
    """Send the ping and expect the pong and then the end."""
    client.sendall(b"ping")
    data = b""
    while chunk := await receive(client):
        data += chunk
    assert data == b"pong", data


async def receive(sock: socket.socket) -> bytes:
    """Receive what there is, waiting for it."""
    await readable(sock)
    return sock.recv(100)


async def give(channel: handleipc.Channel, kind: str) -> None:
    """Give one handle of this kind, and try it from the other side."""
    with tempfile.TemporaryDirectory() as folder:
        async with contextlib.AsyncExitStack() as stack:
            await GIVERS[kind](channel, kind, folder, stack)
    await channel.send("done")


async def give_connection(
    channel: handleipc.Channel, kind: str, folder: str, stack: contextlib.AsyncExitStack
) -> None:
    """An accepted connection: moved, or lent as a native handle."""
    if kind.startswith("unix"):
        path = f"{folder}/s"
        server = await stack.enter_async_context(handleipc.listen_unix(path))
        client = stack.enter_context(connect(path, socket.AF_UNIX))
    else:
        server = await stack.enter_async_context(handleipc.listen("127.0.0.1", 0))
        client = stack.enter_context(connect(server.sockname, socket.AF_INET))
    connection = await anext(server)
    if kind == "net.Native socket":
        with connection.socket() as sock:
            await channel.send({"kind": kind}, handleipc.Native(sock))
            assert sock.fileno() >= 0, "stays open, caller's"
    else:
        if kind == "socket behind a message":
            channel.send_nowait("before")
        await channel.send({"kind": kind}, connection)
        assert connection.closed, "closed at the acknowledgement"
    if kind == "socket there and back":
        message, connection = await channel.recv()
        assert message == "back"
        await connection.end(b"pong")
        assert await receive(client) == b"pong"
        return
    assert await channel.recv() == ("taken", None)
    await ping_stream(client)


async def give_server(
    channel: handleipc.Channel, kind: str, folder: str, stack: contextlib.AsyncExitStack
) -> None:
    """A listener, closed here before anybody connects."""
    address: Any
    if kind.startswith("unix"):
        family, address = socket.AF_UNIX, f"{folder}/s"
    else:
        family, address = socket.AF_INET, ("127.0.0.1", 0)
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.bind(address)
        sock.listen()
        address = sock.getsockname()
        handle = handleipc.Native(sock) if kind == "net.Native server" else sock
        await channel.send({"kind": kind}, handle)
        assert sock.fileno() >= 0, "stays open, caller's"
        assert await channel.recv() == ("taken", None)
    await ping_stream(stack.enter_context(connect(address, family)))


async def give_udp(
    channel: handleipc.Channel, kind: str, folder: str, stack: contextlib.AsyncExitStack
) -> None:
    """A bound UDP socket, closed here before anything is sent to it."""
    family, host = (
        (socket.AF_INET6, "::1") if kind.endswith("udp6") else (socket.AF_INET, "127.0.0.1")
    )
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.bind((host, 0))
        address = sock.getsockname()
        handle = handleipc.Native(sock) if kind == "dgram.Native" else sock
        await channel.send({"kind": kind}, handle)
        assert sock.fileno() >= 0, "stays open, caller's"
        assert await channel.recv() == ("taken", None)
    client = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
    client.setblocking(False)
    client.connect(address)
    client.send(b"ping")
    assert await receive(client) == b"pong"


async def give_fifo(
    channel: handleipc.Channel, kind: str, folder: str, stack: contextlib.AsyncExitStack
) -> None:
    """The reading end of a FIFO; its answer comes over the channel."""
    os.mkfifo(f"{folder}/fifo")
    reading = os.open(f"{folder}/fifo", os.O_RDONLY | os.O_NONBLOCK)
    writing = os.open(f"{folder}/fifo", os.O_WRONLY | os.O_NONBLOCK)
    stack.callback(os.close, writing)
    with handleipc.FileDescriptor(reading) as end:
        await channel.send({"kind": kind}, handleipc.Native(end))
        assert end.fileno() == reading, "stays open, caller's"
        assert await channel.recv() == ("taken", None)
    os.write(writing, b"ping")
    assert await channel.recv() == ("pong", None)


async def give_messages(
    channel: handleipc.Channel, kind: str, folder: str, stack: contextlib.AsyncExitStack
) -> None:
    """Values, which come back as they are and in order."""
    values = VALUES if kind == "messages" else ["\ud800"]
    for value in values:
        channel.send_nowait(value)
    for value in values:
        assert await channel.recv() == (value, None)


GIVERS = {
    "messages": give_messages,
    "lone surrogate": give_messages,
    "socket behind a message": give_connection,
    "socket there and back": give_connection,
    "net.Socket": give_connection,
    "net.Server": give_server,
    "net.Native socket": give_connection,
    "net.Native server": give_server,
    "dgram.Socket": give_udp,
    "dgram.Socket udp6": give_udp,
    "dgram.Native": give_udp,
    "unix net.Socket": give_connection,
    "unix net.Server": give_server,
    "FIFO net.Native": give_fifo,
}


if __name__ == "__main__":
    from child import run  # type: ignore[import-not-found]  # a program finds it beside it

    async def main(parent: handleipc.Channel) -> None:
        """Give or take one handle as told, then wait for the parent to disconnect."""
        await {"give": give, "take": take}[sys.argv[1]](parent, sys.argv[2])
        async for message, handle in parent:
            raise AssertionError(f"unexpected: {message!r}, {handle!r}")

    run(main)
