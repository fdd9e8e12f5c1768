"""Connections counted across Node and Python: who asks, who answers, and when a server is closed."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import handleipc
from tests.asyncio.helpers import RawPeer
from tests.interop.children import spawned

Program = Callable[[str, str], Path]

HOLDER = """
    import asyncio, os, sys, handleipc

    async def main():
        parent = await handleipc.parent()
        held = {}
        child = None
        if len(sys.argv) > 1:
            child = await handleipc.fork(sys.argv[1])
        async for message, handle in parent:
            if handle is not None:
                held[message["id"]] = handle
                await parent.send({"got": message["id"]})
            elif message["do"] == "close":
                held.pop(message["id"]).close()
                await parent.send({"closed": message["id"]})
            elif message["do"] == "open and close":
                _, writer = await held.pop(message["id"]).open()
                writer.close()
                await writer.wait_closed()
                await parent.send({"closed": message["id"]})
            elif message["do"] == "forward":
                await child.send({"id": message["id"]}, held.pop(message["id"]))
                answer, _ = await child.recv()
                await parent.send({"forwarded": answer["got"]})
            elif message["do"] == "close there":
                await child.send({"do": "close", "id": message["id"]})
                answer, _ = await child.recv()
                await parent.send(answer)
            elif message["do"] == "kill there":
                child.kill(9)
                await child.wait()
                await parent.send({"killed": True})
            elif message["do"] == "exit":
                os._exit(0)
        for handle in held.values():
            handle.close()
        if child is not None:
            child.disconnect()
            await child.wait()

    factory = None
    if os.environ.get("TEST_LOOP") == "uvloop":
        import uvloop
        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())
"""

# What each scenario shares: children, clients, ask() and count().
NODE_PARENT = """
    'use strict';
    const assert = require('assert');
    const net = require('net');
    const child_process = require('child_process');
    const argv = process.argv.slice(2);
    const internal = [];

    function start(extra = []) {
      const child = child_process.spawn(argv[0], [...argv.slice(1), ...extra],
                                        { stdio: [0, 1, 2, 'ipc'] });
      child.answers = [];
      child.waiting = [];
      child.on('message', (message) => {
        if (child.waiting.length) child.waiting.shift()(message);
        else child.answers.push(message);
      });
      child.on('internalMessage', (message) => internal.push(message.cmd));
      child.exited = new Promise((resolve) => child.once('exit', (code, signal) =>
        resolve(signal || code)));
      child.ask = (message, handle) => {
        child.send(message, handle);
        return child.answers.length ? child.answers.shift() :
          new Promise((resolve) => child.waiting.push(resolve));
      };
      return child;
    }

    const server = net.createServer({ pauseOnConnect: true });
    const sockets = [];
    const waiting = [];
    server.on('connection', (socket) => {
      if (waiting.length) waiting.shift()(socket); else sockets.push(socket);
    });
    const clients = [];
    function connect() {
      const client = net.connect(server.address());
      client.on('error', () => {});
      clients.push(client);
      return sockets.length ? sockets.shift() :
        new Promise((resolve) => waiting.push(resolve));
    }
    const count = () => new Promise((resolve, reject) =>
      server.getConnections((error, n) => error ? reject(error) : resolve(n)));
    // True once close(cb) has called back.
    const state = { closed: false };
    const closed = () => new Promise((resolve) =>
      server.close(() => { state.closed = true; resolve(); }));

    async function main() {
      await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
      SCENARIO
      for (const client of clients) client.destroy();
      console.log('done');
    }
    process.on('unhandledRejection', (error) => { console.error(error); process.exit(97); });
    main();
"""


def run_node(node: str, program: Program, scenario: str, *extra: Any) -> None:
    """Run a Node parent with this scenario; its children run ``holder.py``."""
    holder = program("holder.py", HOLDER)
    parent = program("parent.js", NODE_PARENT.replace("SCENARIO", scenario))
    run = subprocess.run(
        [node, parent, sys.executable, "-W", "error", holder, *extra],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "done\n", "")


def test_node_counts_what_python_holds(node: str, program: Program, child_loop: str) -> None:
    """``getConnections`` is right after each close, and ``close(cb)`` comes exactly at the last."""
    run_node(
        node,
        program,
        """
        const children = [start(), start()];
        for (let id = 0; id < 6; id++) {
          assert.deepStrictEqual(await children[id % 2].ask({ id }, await connect()), { got: id });
        }
        assert.strictEqual(await count(), 6);
        for (let id = 0; id < 3; id++) {
          await children[id % 2].ask({ do: id % 2 ? 'close' : 'open and close', id });
          assert.strictEqual(await count(), 5 - id);
        }
        const end = closed();
        for (let id = 3; id < 6; id++) {
          assert.strictEqual(state.closed, false);
          const answer = children[id % 2].ask({ do: 'close', id });
          if (id < 5) await answer;
        }
        await end;
        for (const child of children) {
          child.disconnect();
          assert.strictEqual(await child.exited, 0);
        }
        """,
    )


def test_node_closes_after_python_is_done(node: str, program: Program, child_loop: str) -> None:
    """A server closed when Python has closed everything already is closed at once."""
    run_node(
        node,
        program,
        """
        const child = start();
        await child.ask({ id: 0 }, await connect());
        await child.ask({ do: 'close', id: 0 });
        assert.strictEqual(await count(), 0);
        await closed();
        child.disconnect();
        assert.strictEqual(await child.exited, 0);
        """,
    )


def test_node_closes_when_python_exits(node: str, program: Program, child_loop: str) -> None:
    """A Python child that ends takes its connections with it, and Node's server closes."""
    run_node(
        node,
        program,
        """
        const [one, two] = [start(), start()];
        await one.ask({ id: 0 }, await connect());
        await two.ask({ id: 1 }, await connect());
        const end = closed();
        one.send({ do: 'exit' });
        assert.strictEqual(await one.exited, 0);
        assert.strictEqual(state.closed, false);
        await two.ask({ do: 'close', id: 1 });
        await end;
        two.disconnect();
        assert.strictEqual(await two.exited, 0);
        """,
    )


def test_python_forwards_what_node_counts(node: str, program: Program, child_loop: str) -> None:
    """A Python child answers for a Python grandchild: counts stay right, and close completes."""
    run_node(
        node,
        program,
        """
        const child = start([argv[3]]);
        for (let id = 0; id < 4; id++) await child.ask({ id }, await connect());
        for (let id = 0; id < 3; id++) {
          assert.deepStrictEqual(await child.ask({ do: 'forward', id }), { forwarded: id });
          assert.strictEqual(await count(), 4);
        }
        await child.ask({ do: 'close there', id: 0 });
        assert.strictEqual(await count(), 3);
        await child.ask({ do: 'close', id: 3 });
        assert.strictEqual(await count(), 2);
        const end = closed();
        await child.ask({ do: 'close there', id: 1 });
        assert.strictEqual(state.closed, false);
        await child.ask({ do: 'close there', id: 2 });
        await end;
        child.disconnect();
        assert.strictEqual(await child.exited, 0);
        """,
    )


def test_python_grandchild_dies_under_node(node: str, program: Program, child_loop: str) -> None:
    """What a killed grandchild held is no longer counted, and Node's server closes."""
    run_node(
        node,
        program,
        """
        const child = start([argv[3]]);
        for (let id = 0; id < 2; id++) await child.ask({ id }, await connect());
        await child.ask({ do: 'forward', id: 0 });
        assert.strictEqual(await count(), 2);
        assert.deepStrictEqual(await child.ask({ do: 'kill there' }), { killed: true });
        assert.strictEqual(await count(), 1);
        const end = closed();
        await child.ask({ do: 'close', id: 1 });
        await end;
        child.disconnect();
        assert.strictEqual(await child.exited, 0);
        """,
    )


def test_node_hears_no_reports(node: str, program: Program, child_loop: str) -> None:
    """What comes to Node is what another Node would have said."""
    run_node(
        node,
        program,
        """
        const child = start();
        for (let id = 0; id < 2; id++) await child.ask({ id }, await connect());
        assert.strictEqual(await count(), 2);
        // Not after close(), which Node counts as one more.
        const end = closed();
        for (let id = 0; id < 2; id++) await child.ask({ do: 'close', id });
        await end;
        const known = ['NODE_SOCKET_COUNT', 'NODE_SOCKET_ALL_CLOSED', 'NODE_HANDLE_ACK'];
        assert.deepStrictEqual(internal.filter((cmd) => !known.includes(cmd)), []);
        child.disconnect();
        assert.strictEqual(await child.exited, 0);
        """,
    )


# -- a Python parent -----------------------------------------------------------------------------

NODE_HOLDER = """
    const held = new Map();
    process.on('message', (message, socket) => {
      if (socket) {
        socket.on('error', () => {});
        held.set(message.id, socket);
        return;
      }
      const one = held.get(message.id);
      held.delete(message.id);
      const tell = () => process.send({ closed: message.id });
      // The client's FIN may have ended it already.
      if (one.closed) return tell();
      one.on('close', tell);
      if (message.do === 'end') { one.resume(); one.end('bye'); }
      else one.destroy();
    });
    process.on('disconnect', () => { for (const one of held.values()) one.destroy(); });
"""


@contextlib.asynccontextmanager
async def listening(count: int) -> AsyncIterator[tuple[handleipc.Server, list[socket.socket]]]:
    """A server and so many clients."""
    async with handleipc.listen("127.0.0.1", 0) as server:
        with contextlib.ExitStack() as stack:
            yield (
                server,
                [
                    stack.enter_context(socket.create_connection(server.sockname, timeout=10))
                    for _ in range(count)
                ],
            )


async def test_python_counts_what_node_holds(node: str, program: Program) -> None:
    """``get_connections`` is right after each close in Node, and ``wait_closed`` at the last."""
    path = program("holder.js", NODE_HOLDER)
    async with spawned(node, path) as one, spawned(node, path) as two:
        async with listening(6) as (server, clients):
            children = [one, two]
            by_client = []
            for i in range(6):
                connection = await anext(server)
                by_client.append(connection.peername)
                await children[i % 2].send({"id": i}, connection)
            assert (server.connections, await server.get_connections()) == (0, 6)
            server.close()
            waiting = asyncio.create_task(server.wait_closed())
            for i in range(6):
                assert not waiting.done()
                if i % 3 == 0:
                    client = next(c for c in clients if c.getsockname() == by_client[i])
                    client.shutdown(socket.SHUT_WR)
                await children[i % 2].send({"do": "end" if i % 3 == 0 else "destroy", "id": i})
                assert await children[i % 2].recv() == ({"closed": i}, None)
                count = await server.get_connections()
                assert (count, count.missing) == (5 - i, ())
            await asyncio.wait_for(waiting, 10)
        for child in children:
            child.disconnect()
            assert await child.wait() == 0
            assert not len(child.lists)


async def test_node_child_killed(node: str, program: Program) -> None:
    """What a killed Node child held is closed, and a waiting server is told."""
    async with spawned(node, program("holder.js", NODE_HOLDER)) as child:
        async with listening(2) as (server, _):
            for i in range(2):
                await child.send({"id": i}, await anext(server))
            assert await server.get_connections() == 2
            server.close()
            waiting = asyncio.create_task(server.wait_closed())
            await asyncio.sleep(0)
            child.kill(9)
            await asyncio.wait_for(waiting, 10)
            count = await server.get_connections()
            assert (count, count.missing) == (0, ())


async def test_node_child_that_never_had_any(node: str, program: Program) -> None:
    """It is not asked: Node would not answer for a key it has never seen."""
    async with spawned(node, program("holder.js", NODE_HOLDER)) as child:
        async with listening(1) as (server, _):
            connection = await anext(server)
            count = await server.get_connections(timeout=5)
            assert (count, count.missing) == (1, ())
            connection.close()
            server.close()
            await asyncio.wait_for(server.wait_closed(), 10)
        child.disconnect()
        assert await child.wait() == 0


async def test_counted_while_handing_over(node: str, program: Program) -> None:
    """Many connections to Node, each followed by a count: none is lost or counted twice."""
    async with spawned(node, program("holder.js", NODE_HOLDER)) as child:
        async with listening(50) as (server, _):
            counts = []
            for i in range(50):
                sending = asyncio.create_task(child.send({"id": i}, await anext(server)))
                counts.append(asyncio.create_task(server.get_connections()))
                await sending
            waiting = server._group.local
            for i, task in enumerate(counts):
                # Accepted so far, at least; taken or not.
                assert i + 1 <= await task <= 50
            assert waiting == 0
            assert await server.get_connections() == 50
        child.disconnect()
        assert await child.wait() == 0


# -- line by line --------------------------------------------------------------------------------


async def test_a_node_peer_sees_nodes_messages_only() -> None:
    """To a node-dialect parent no NODE_SOCKET_CLOSED goes, even when the last close is reported."""
    ours, theirs = socket.socketpair()
    channel, peer = handleipc.Channel(ours, handleipc.Limits()), RawPeer(theirs)
    a, b = socket.socketpair()
    c, d = socket.socketpair()
    with a, b, c, d:
        for one in (b, d):
            peer.write(
                {"cmd": "NODE_HANDLE", "type": "net.Socket", "msg": "m", "key": "k"},
                fds=(one.fileno(),),
            )
            assert await peer.line() == {"cmd": "NODE_HANDLE_ACK"}
        connections = [(await channel.recv())[1] for _ in range(2)]
        try:
            peer.write({"cmd": "NODE_SOCKET_NOTIFY_CLOSE", "key": "k"})
            peer.write({"cmd": "NODE_SOCKET_GET_COUNT", "key": "k"})
            assert await peer.line() == {"cmd": "NODE_SOCKET_COUNT", "key": "k", "count": 2}
            for one in connections:
                one.close()
            assert await peer.line() == {"cmd": "NODE_SOCKET_ALL_CLOSED", "key": "k"}
            peer.write({"cmd": "NODE_SOCKET_GET_COUNT", "key": "k"})
            assert await peer.line() == {"cmd": "NODE_SOCKET_COUNT", "key": "k", "count": 0}
        finally:
            for one in connections:
                one.close()
            peer.close()
            channel.abort()
            await channel.wait_disconnected()


async def test_a_count_and_the_next_acknowledgement_in_one_read() -> None:
    """The count came before the acknowledgement, so it has not the connection of that one."""
    ours, theirs = socket.socketpair()
    channel, peer = handleipc.Channel(ours, handleipc.Limits()), RawPeer(theirs)
    try:
        async with listening(3) as (server, _):
            first = asyncio.create_task(channel.send("first", await anext(server)))
            key = (await peer.line())["key"]
            peer.write({"cmd": "NODE_HANDLE_ACK"})
            await first
            counting = asyncio.create_task(server.get_connections(timeout=5))
            assert (await peer.line())["cmd"] == "NODE_SOCKET_GET_COUNT"
            second = asyncio.create_task(channel.send("second", await anext(server)))
            assert (await peer.line())["cmd"] == "NODE_HANDLE"
            here = await anext(server)
            peer.write(
                {"cmd": "NODE_SOCKET_COUNT", "key": key, "count": 1}, {"cmd": "NODE_HANDLE_ACK"}
            )
            await second
            count = await counting
            here.close()
            assert (count, count.missing) == (3, ())
    finally:
        peer.close()
        channel.abort()
        await channel.wait_disconnected()
