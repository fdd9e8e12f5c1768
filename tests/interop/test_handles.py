"""Every type of handle, in every direction between Python and Node, with data both ways over it."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import handleipc
from tests.interop.children import spawned
from tests.interop.ends import DIRECTIONS, KINDS, connect, give, receive, take


HERE = Path(__file__).parent

Program = Callable[[str, str], Path]

kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@pytest.mark.parametrize("direction", DIRECTIONS[:2])
def test_node_parent(node: str, direction: str, kind: str, child_loop: str) -> None:
    """A Python child under Node takes and gives every type, and Node cannot tell."""
    node_does, python_does = ("give", "take") if direction.startswith("Node") else ("take", "give")
    python = [sys.executable, "-W", "error", str(HERE / "ends.py"), python_does, kind]
    run = subprocess.run(
        [node, "--no-deprecation", HERE / "handles.js", node_does, kind, *python],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@kinds
@pytest.mark.parametrize("direction", DIRECTIONS[2:])
async def test_python_parent(node: str, direction: str, kind: str) -> None:
    """A Node child under Python takes and gives every type."""
    gives = direction.startswith("Python")
    role = "take" if gives else "give"
    async with spawned(node, "--no-deprecation", HERE / "handles.js", role, kind) as child:
        await (give if gives else take)(child, kind)
        assert child.dialect == "node"
        child.disconnect()
        assert await child.wait() == 0
        await child.wait_disconnected()


ECHO = """
    process.on('message', (message, handle) => {
      process.send(message, handle);
      // A server that is sent stays open here.
      process.on('disconnect', () => { if (handle.listening) handle.close(); });
    });
"""


PAUSED_ECHO = """
    process.on('message', (message, socket) => {
      socket.once('data', (data) => {
        require('assert').strictEqual(String(data), 'first');
        socket.pause();
        process.send(message, socket);
      });
    });
"""


async def tcp_pair() -> tuple[socket.socket, handleipc.Connection]:
    """Return a client and the connection accepted from it."""
    async with handleipc.listen("127.0.0.1", 0) as server:
        client = connect(server.sockname, socket.AF_INET)
        return client, await anext(server)


async def test_asyncio_server(node: str, program: Program) -> None:
    """An ``asyncio.Server`` with one socket goes as net.Server, and stays the caller's."""
    server = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
    try:
        async with spawned(node, program("echo.js", ECHO)) as child:
            await child.send("server", server)
            assert server.is_serving()
            message, returned = await child.recv()
            async with returned:
                assert (message, type(returned)) == ("server", handleipc.Server)
                assert returned.sockname == server.sockets[0].getsockname()
            child.disconnect()
            assert await child.wait() == 0
    finally:
        server.close()


async def test_asyncio_stream_writer(node: str, program: Program) -> None:
    """A ``StreamWriter`` goes as net.Socket."""
    client, accepted = await tcp_pair()
    with client:
        _, writer = await accepted.open()
        try:
            async with spawned(node, program("echo.js", ECHO)) as child:
                await child.send("writer", writer)
                message, returned = await child.recv()
                assert (message, type(returned)) == ("writer", handleipc.Connection)
                await returned.end(b"hello")
                assert await receive(client) == b"hello"
                child.disconnect()
                assert await child.wait() == 0
        finally:
            writer.transport.abort()
            await asyncio.sleep(0)


class PausedFromTheStart(asyncio.Protocol):
    """Hands its transport over before anything is read."""

    def connection_made(self, transport: Any) -> None:
        """Pause reading at once."""
        transport.pause_reading()

    def data_received(self, data: bytes) -> None:
        """Never called."""
        raise AssertionError("paused")


async def test_paused_transport(node: str, program: Program, event_loop_name: str) -> None:
    """A transport whose reading was paused since accept goes as net.Socket, with all its bytes."""
    if event_loop_name == "uvloop":
        pytest.skip("uvloop starts to read after connection_made, whatever that did")
    client, accepted = await tcp_pair()
    with client:
        client.sendall(b"first")
        transport: Any
        transport, _ = await accepted.start(PausedFromTheStart)
        try:
            async with spawned(node, program("echo.js", PAUSED_ECHO)) as child:
                await child.send("transport", transport)
                message, returned = await child.recv()
                assert (message, type(returned)) == ("transport", handleipc.Connection)
                returned.close()
                child.disconnect()
                assert await child.wait() == 0
        finally:
            transport.abort()
            await asyncio.sleep(0)
