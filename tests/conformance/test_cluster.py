"""What Node's cluster tests say about the channel and its handles. (Not cluster itself.)"""

from __future__ import annotations

import asyncio
import os

import pytest

import handleipc
from tests.conformance.peers import (
    clients,
    connection,
    goodbye,
    receive,
    receive_all,
)
from tests.conformance.record import BETTER, also, node_test


@node_test(
    "test-cluster-net-send",
    expects="a child passes a connected socket up to its parent, where data and end arrive",
    ours="the same, in both roles",
    why="both ends of a channel are alike",
)
async def test_socket_goes_up(peer) -> None:
    """The parent reads what the far end of the child's socket writes."""
    javascript = """
        const server = net.createServer((socket) => { socket.end('hello'); server.close(); });
        server.listen(0, '127.0.0.1', () => {
          const socket = net.connect(server.address(), () => process.send('handle', socket));
        });
        process.on('message', () => {});
    """
    python = """
        async def main(parent):
            async with handleipc.listen("127.0.0.1", 0) as server:
                client = socket.create_connection(server.sockname)
                accepted = await anext(server)
            await parent.send("handle", client)
            await accepted.end(b"hello")
            async for message in parent:
                pass
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                await task
    """
    async with peer(javascript, python) as child:
        message, sent = await child.recv()
        assert message == "handle"
        reader, writer = await sent.open()
        assert await reader.read() == b"hello"
        writer.close()
        await writer.wait_closed()
        await goodbye(child)


@also("test-cluster-net-send")
def test_socket_goes_up_under_node(under_node) -> None:
    """A Python child's socket, read by a Node parent."""
    javascript = """
        fork().on('message', (m, socket) => {
          socket.on('data', (data) => show(String(data)));
          socket.on('end', () => show('end'));
        });
    """
    python = """
        async def main(parent):
            async with handleipc.listen("127.0.0.1", 0) as server:
                client = socket.create_connection(server.sockname)
                accepted = await anext(server)
            await parent.send("handle", client)
            await accepted.end(b"hello")
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                await task
    """
    assert under_node(javascript, python) == ["hello", "end"]


@node_test(
    "test-cluster-send-handle-twice",
    expects="one socket sent twice: the second message goes without it, and nothing crashes",
    ours="the second `send` raises `DescriptorReleased`; nothing of it is sent",
    verdict=BETTER,
    why="a message whose handle is silently missing is worse than an error",
)
async def test_same_socket_twice(peer) -> None:
    """The second time it is no longer ours."""
    javascript = "process.on('message', (m, socket) => { process.send(m); socket.destroy(); });"
    python = """
        async def main(parent):
            async for message, connection in parent:
                connection.close()
                await parent.send(message)
    """
    async with peer(javascript, python) as child, connection() as (client, accepted):
        child.send_nowait("once", accepted)
        with pytest.raises(handleipc.DescriptorReleased):
            child.send_nowait("twice", accepted)
        with pytest.raises(handleipc.DescriptorReleased):
            await child.send("twice", accepted)
        assert await child.recv() == ("once", None)
        assert await receive_all(client) == b""
        await goodbye(child)


@node_test(
    "test-cluster-send-deadlock",
    expects="handles that cross in both directions do not deadlock",
    ours="the same, in both roles",
    why="acknowledgements overtake what waits",
)
async def test_crossing_handles(peer) -> None:
    """Both ends send before either reads."""
    javascript = """
        let count = 0;
        const server = net.createServer().listen(0, '127.0.0.1', () => {
          for (let n = 0; n < 10; n++) process.send(n, server);
          process.on('message', (m, other) => {
            other.close();
            if (++count === 10) { server.close(); process.send('all'); }
          });
        });
    """
    python = """
        async def main(parent):
            async with handleipc.listen("127.0.0.1", 0) as server:
                for n in range(10):
                    await parent.send(n, server)
                for n in range(10):
                    message, other = await parent.recv()
                    other.close()
            await parent.send("all")
            async for message in parent:
                pass
    """
    async with peer(javascript, python) as child, handleipc.listen("127.0.0.1", 0) as server:
        sends = [asyncio.create_task(child.send(n, server)) for n in range(10)]
        await asyncio.sleep(0)
        for n in range(10):
            message, other = await child.recv()
            assert message == n
            other.close()
        await asyncio.gather(*sends)
        assert await child.recv() == ("all", None)
        await goodbye(child)


@also("test-cluster-send-deadlock")
def test_crossing_handles_under_node(under_node) -> None:
    """A Node parent and a Python child send ten each."""
    javascript = """
        const child = fork();
        let count = 0;
        const server = net.createServer().listen(0, '127.0.0.1', () => {
          for (let n = 0; n < 10; n++) child.send(n, server);
        });
        child.on('message', (m, other) => {
          if (other) { count++; return other.close(); }
          show([m, count]);
          server.close();
          child.disconnect();
        });
    """
    python = """
        async def main(parent):
            async with handleipc.listen("127.0.0.1", 0) as server:
                for n in range(10):
                    await parent.send(n, server)
                for n in range(10):
                    message, other = await parent.recv()
                    other.close()
            await parent.send("all")
            async for message in parent:
                pass
    """
    assert under_node(javascript, python) == [["all", 10]]


@node_test(
    "test-cluster-invalid-message",
    expects="a cluster message with an unknown `ack` is ignored",
    ours='the same: it goes to `"internal_message"` listeners, or nowhere',
    why="the prefix is Node's, and what we do not know is not ours to judge",
)
async def test_invalid_cluster_message(peer) -> None:
    """In both directions; the channel goes on."""
    javascript = """
        process.send({ cmd: 'NODE_CLUSTER', act: 'no such', ack: -1 });
        process.send('after');
        process.on('message', (m) => process.send(m));
    """
    python = """
        async def main(parent):
            await parent.send({"cmd": "NODE_CLUSTER", "act": "no such", "ack": -1})
            await parent.send("after")
            async for message, handle in parent:
                await parent.send(message)
    """
    env = {**os.environ, "NODE_UNIQUE_ID": "1"}  # a Node child is a cluster worker then
    async with peer("require('cluster');" + javascript, python, env=env) as child:
        assert await child.recv() == ("after", None)
        await child.send({"cmd": "NODE_CLUSTER", "act": "no such", "ack": -1})
        await child.send("echo")
        assert await child.recv() == ("echo", None)
        child.disconnect()
        assert await child.wait() == 0


@node_test(
    "test-net-listen-handle-in-cluster-1",
    expects="a server sent to a cluster worker is usable: its `listen` does not ask the primary",
    ours="a Python parent's server serves in a Node cluster worker, and a Node primary's in a Python"
    " worker",
    why="the handle is the listening socket itself",
)
async def test_server_for_a_cluster_worker(peer) -> None:
    """A worker that never hears from a primary serves what it was sent."""
    javascript = """
        assert(require('cluster').isWorker);
        process.on('message', (m, server) => {
          server.on('connection', (socket) => socket.end('worker'));
          process.send('up');
          process.on('disconnect', () => process.exit(0));
        });
    """
    python = """
        async def main(parent):
            message, server = await parent.recv()
            await parent.send("up")
            async with server:
                await (await anext(server)).end(b"worker")
                async for message in parent:
                    pass
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                await task
    """
    env = {**os.environ, "NODE_UNIQUE_ID": "1"}
    asked = []
    async with peer(javascript, python, env=env) as child:
        child.on("internal_message", lambda message, handle: asked.append(message["act"]))
        server = await handleipc.listen("127.0.0.1", 0)
        await child.send("server", server)
        assert await child.recv() == ("up", None)
        server.close()
        async with clients(server.sockname, 1) as (client,):
            assert await receive(client) == b"worker"
        assert "queryServer" not in asked
        await goodbye(child)


@also("test-net-listen-handle-in-cluster-1")
def test_server_for_a_python_worker(under_node) -> None:
    """A Node primary forks a Python worker, and sends it a server."""
    javascript = """
        const cluster = require('cluster');
        const { execPath } = process;
        process.execPath = python[0];
        cluster.setupPrimary({ exec: python[python.length - 1], execArgv: python.slice(1, -1), args: [] });
        const worker = cluster.fork();
        process.execPath = execPath;
        const server = net.createServer().listen(0, '127.0.0.1', () => worker.send('server', server));
        worker.on('message', (m) => {
          const address = server.address();
          server.close(() => net.connect(address)
            .on('data', (data) => show(String(data)))
            .on('close', () => worker.process.disconnect()));
        });
        worker.on('exit', (code) => show(code));
    """
    python = """
        async def main(parent):
            message, server = await parent.recv()
            await parent.send("up")
            async with server:
                await (await anext(server)).end(b"worker")
            async for message in parent:
                pass
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                await task
    """
    assert under_node(javascript, python) == ["worker", 0]
