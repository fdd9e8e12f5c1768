"""``net.BoundSocket``, the sixth kind of handle: Node has it from version 26 on."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

import handleipc
from tests.interop.children import spawned
from tests.interop.ends import connect, readable, receive
from tests.interop.test_node import under_node
from tests.nodes import NODE_VERSIONS, node_binary

Program = Callable[[str, str], Path]

HAVE_IT = [version for version in NODE_VERSIONS if int(version.partition(".")[0]) >= 26]


@pytest.fixture(params=HAVE_IT)
def new_node(request: pytest.FixtureRequest) -> str:
    """The path of each Node that knows the kind."""
    return str(node_binary(request.param))


def bound() -> socket.socket:
    """Return a TCP socket that is bound and not listening."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    return sock


LISTEN = """
    const assert = require('assert');
    const net = require('net');
    process.on('message', (message, bound) => {
      assert(bound instanceof net.BoundSocket, String(bound));
      const server = net.createServer((socket) => { server.close(); socket.end('served'); });
      server.listen(bound, () => process.send([message, server.address().port]));
    });
"""


async def test_node_child_takes_it(new_node: str, program: Program) -> None:
    """A Node child listens with what a Python parent has bound; the copy here is closed."""
    async with spawned(new_node, program("child.js", LISTEN)) as child:
        with bound() as sock:
            address = sock.getsockname()
            await child.send("bound", handleipc.BoundSocket(sock))
            assert sock.fileno() == -1, "closed at the acknowledgement"
        assert await child.recv() == (["bound", address[1]], None)
        with connect(address, socket.AF_INET) as client:
            assert await receive(client) == b"served"
        child.disconnect()
        assert await child.wait() == 0


async def test_python_keeps_it_open(new_node: str, program: Program) -> None:
    """With ``keep_open`` it stays the caller's."""
    async with spawned(new_node, program("child.js", LISTEN)) as child:
        with bound() as sock:
            await child.send("bound", handleipc.BoundSocket(sock), keep_open=True)
            assert await child.recv() == (["bound", sock.getsockname()[1]], None)
        child.disconnect()
        child.kill()  # it listens


GIVE = """
    const net = require('net');
    const bound = new net.BoundSocket({ host: '127.0.0.1', port: 0 });
    process.send(bound.address().port, bound);
    process.on('message', () => {});
"""


async def test_node_child_gives_it(new_node: str, program: Program) -> None:
    """What a Node child has bound arrives as a socket that is not listening, and can."""
    async with spawned(new_node, program("child.js", GIVE)) as child:
        port, sock = await child.recv()
        assert isinstance(sock, socket.socket)
        with sock:
            assert (sock.getsockname(), sock.getblocking()) == (("127.0.0.1", port), False)
            assert not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            sock.listen()
            with connect(("127.0.0.1", port), socket.AF_INET) as client:
                await readable(sock)
                accepted, _ = sock.accept()
                with accepted:
                    accepted.sendall(b"served")
                assert await receive(client) == b"served"
        child.disconnect()
        assert await child.wait() == 0


def test_node_parent_gives_it(new_node: str, program: Program, child_loop: str) -> None:
    """A Python child serves on an address that its Node parent has bound."""
    javascript = """
        const bound = new net.BoundSocket({ host: '127.0.0.1', port: 0 });
        const { port } = bound.address();
        child.send('bound', bound);
        child.once('message', (message) => {
          show(message);
          const client = net.connect(port, '127.0.0.1');
          client.on('data', (data) => show(String(data)));
          client.on('end', () => child.disconnect());
        });
        child.on('exit', (code) => show(code));
    """
    python = """
        async def main(parent):
            message, sock = await parent.recv()
            assert isinstance(sock, socket.socket), sock
            async def serve(reader, writer):
                writer.write(b"served")
                writer.close()
                await writer.wait_closed()
            server = await asyncio.start_server(serve, sock=sock)
            await parent.send([message, "listens"])
            assert [m async for m, _ in parent] == []
            server.close()
            del sock
    """
    lines = under_node(new_node, program, javascript, python)
    assert lines == [["bound", "listens"], "served", 0]


def test_node_parent_takes_it(new_node: str, program: Program, child_loop: str) -> None:
    """A Node parent listens with what its Python child has bound."""
    javascript = """
        child.on('message', (message, bound) => {
          const server = net.createServer((socket) => { server.close(); socket.end('served'); });
          show([message, bound instanceof net.BoundSocket]);
          server.listen(bound, () => {
            const client = net.connect(server.address());
            client.on('data', (data) => show(String(data)));
            client.on('end', () => child.disconnect());
          });
        });
        child.on('exit', (code) => show(code));
    """
    python = """
        async def main(parent):
            sock = socket.socket()
            sock.bind(("127.0.0.1", 0))
            await parent.send("bound", handleipc.BoundSocket(sock))
            assert sock.fileno() == -1
            assert [m async for m, _ in parent] == []
            del sock
    """
    assert under_node(new_node, program, javascript, python) == [["bound", True], "served", 0]


async def test_bare_bound_socket_is_refused(new_node: str, program: Program) -> None:
    """A bound socket goes by that name only: an older Node would die of it."""
    async with spawned(new_node, program("child.js", GIVE)) as child:
        with bound() as sock:
            with pytest.raises(handleipc.UnsupportedHandle, match="BoundSocket"):
                await child.send("bound", sock)
            assert sock.fileno() >= 0
        _, given = await child.recv()
        given.close()
        child.disconnect()
        assert await child.wait() == 0
