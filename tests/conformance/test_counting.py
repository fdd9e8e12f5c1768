"""Connections of one server in many processes: counted, and waited for."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import handleipc
from tests.conformance.peers import (
    ACK,
    clients,
    collect_events,
    goodbye,
    raw_peer,
    receive_all,
    turns,
)
from tests.conformance.record import BETTER, also, node_test

TAKE = """
    const held = [];
    process.on('message', (m, socket) => {
      if (m === 'end') return socket.end('end');
      if (m === 'write') return socket.write('write', () => socket.end());
      if (m === 'hold') { held.push(socket); return process.send('held'); }
      const one = held.pop();
      one.on('close', () => process.send('closed'));
      one.destroy();
    });
"""
PYTHON_TAKE = """
    async def main(parent):
        held = []
        async for message, connection in parent:
            if message == "end":
                await connection.end(b"end")
            elif message == "write":
                with connection.socket() as sock:
                    sock.send(b"write")
            elif message == "hold":
                held.append(connection)
                await parent.send("held")
            else:
                held.pop().close()
                await parent.send("closed")
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            await task
"""


@node_test(
    "test-child-process-fork-net",
    expects="12 sockets spread over 3 children, which end or write; the server's `close` waits for all;"
    " one child learns of the end by disconnect",
    ours="the same, in both roles",
    why="each child reports when the last of its connections has closed",
)
async def test_twelve_over_three(peer) -> None:
    """Every client is answered, and the server closes with the last."""
    async with contextlib.AsyncExitStack() as stack:
        children = [await stack.enter_async_context(peer(TAKE, PYTHON_TAKE)) for _ in range(3)]
        events = collect_events(children[2])
        server = await handleipc.listen("127.0.0.1", 0)
        async with clients(server.sockname, 12) as connected:
            for n in range(12):
                message = "end" if n % 2 else "write"
                await children[n % 3].send(message, await anext(server))
            server.close()
            answers = [await receive_all(client) for client in connected]
            assert sorted(answers) == [b"end"] * 6 + [b"write"] * 6
        await asyncio.wait_for(server.wait_closed(), 10)
        for child in children:
            await goodbye(child)
        assert events[0] == ["disconnect", False]


@also("test-child-process-fork-net")
def test_twelve_over_three_under_node(under_node) -> None:
    """A Node parent with three Python children."""
    javascript = """
        const children = [fork(), fork(), fork()];
        let count = 0, answered = 0;
        const server = net.createServer({ pauseOnConnect: true }, (socket) => {
          children[count % 3].send(count % 2 ? 'end' : 'write', socket);
          if (++count === 12) server.close(() => {
            show([answered, server._workers.length]);
            for (const child of children) child.disconnect();
          });
        }).listen(0, '127.0.0.1', () => {
          for (let n = 0; n < 12; n++) {
            let got = '';
            net.connect(server.address())
              .on('data', (data) => got += data)
              .on('end', () => { answered++; show(got); });
          }
        });
        let exited = 0;
        for (const child of children)
          child.on('exit', (code) => {
            if (++exited === 3) setImmediate(() => show(server._workers.length));
          });
    """
    lines = under_node(javascript, PYTHON_TAKE)
    answers = [line for line in lines if isinstance(line, str)]
    assert sorted(answers) == ["end"] * 6 + ["write"] * 6
    assert lines[-1] == 0


@node_test(
    "test-child-process-fork-getconnections",
    expects="`getConnections` falls by one with each of 12 sockets that the child destroys; 'close' of"
    " the server after a kill",
    ours="the same, in both roles",
    why="the child is asked each time",
)
async def test_get_connections(peer) -> None:
    """Twelve down to six, then the child is killed."""
    async with peer(TAKE, PYTHON_TAKE) as child:
        server = await handleipc.listen("127.0.0.1", 0)
        async with clients(server.sockname, 12):
            for _ in range(12):
                await child.send("hold", await anext(server))
                assert await child.recv() == ("held", None)
            for left in range(12, 6, -1):
                assert await server.get_connections() == left
                await child.send("destroy")
                assert await child.recv() == ("closed", None)
            server.close()
            child.kill()
            await asyncio.wait_for(server.wait_closed(), 10)
            assert await server.get_connections() == 0


@also("test-child-process-fork-getconnections")
def test_get_connections_under_node(under_node) -> None:
    """A Node parent counts what its Python child holds."""
    javascript = """
        const child = fork();
        let count = 0;
        const server = net.createServer({ pauseOnConnect: true }, (socket) => child.send('hold', socket))
          .listen(0, '127.0.0.1', () => {
            for (let n = 0; n < 12; n++) net.connect(server.address()).on('error', () => {}).resume();
          });
        child.on('message', (message) => {
          if (message === 'held' && ++count < 12) return;
          server.getConnections((error, left) => {
            show(left);
            if (left > 6) return child.send('destroy');
            server.close(() => show('closed'));
            child.kill();
          });
        });
    """
    assert under_node(javascript, PYTHON_TAKE) == [12, 11, 10, 9, 8, 7, 6, "closed"]


@node_test(
    "async-hooks/test-net-get-connections",
    expects="`getConnections` works on a server that never listened",
    ours="0 for a server that nobody has connected to, and for a closed one",
    why="a `Server` here always listens until it is closed",
)
async def test_get_connections_of_none() -> None:
    """Nothing to count is no error."""
    server = await handleipc.listen("127.0.0.1", 0)
    assert await server.get_connections() == 0
    server.close()
    assert await server.get_connections() == 0
    await server.wait_closed()


async def hand_over(channel, raw, server) -> str:
    """Have the raw peer take one connection; return the server's key."""
    sending = asyncio.create_task(channel.send("c", await anext(server)))
    key = (await raw.read())["key"]
    assert raw.drop_descriptors() == 1
    raw.write(ACK)
    await sending
    return key


@node_test(
    "test-internal-socket-list-send",
    expects="a request is sent and answered, or fails with `ERR_CHILD_CLOSED_BEFORE_REPLY` when the"
    " child disconnects; a late reply is ignored; listeners are removed",
    ours="asked and answered; a child that ends before its reply holds none, which is no error; a late"
    " or second reply changes nothing",
    verdict=BETTER,
    why="a dead process has no connections: Node lets one failure hide all other counts",
)
async def test_socket_list_send() -> None:
    """GET_COUNT, NOTIFY_CLOSE, and what becomes of them."""
    server = await handleipc.listen("127.0.0.1", 0)
    async with raw_peer() as (channel, raw), clients(server.sockname, 1):
        errors = []
        channel.on("error", errors.append)
        key = await hand_over(channel, raw, server)
        counting = asyncio.create_task(server.get_connections())
        assert await raw.read() == {"cmd": "NODE_SOCKET_GET_COUNT", "key": key}
        raw.write({"cmd": "NODE_SOCKET_COUNT", "key": key, "count": 1})
        assert await counting == 1

        counting = asyncio.create_task(server.get_connections())
        assert await raw.read() == {"cmd": "NODE_SOCKET_GET_COUNT", "key": key}
        server.close()
        assert await raw.read() == {"cmd": "NODE_SOCKET_NOTIFY_CLOSE", "key": key}
        closing = asyncio.create_task(server.wait_closed())
        await turns()
        assert not counting.done() and not closing.done()
        raw.sock.shutdown(socket.SHUT_RDWR)
        assert await counting == 0
        assert counting.result().missing == ()
        await closing
        assert errors == []


@also("test-internal-socket-list-send")
async def test_late_replies_are_ignored() -> None:
    """A count that comes after nobody waits any more, and ALL_CLOSED of a server that has ended."""
    server = await handleipc.listen("127.0.0.1", 0)
    async with raw_peer() as (channel, raw), clients(server.sockname, 1):
        key = await hand_over(channel, raw, server)
        count = await server.get_connections(timeout=0)
        assert (count, count.missing) == (0, (channel,))
        assert await raw.read() == {"cmd": "NODE_SOCKET_GET_COUNT", "key": key}
        server.close()
        assert await raw.read() == {"cmd": "NODE_SOCKET_NOTIFY_CLOSE", "key": key}
        raw.write({"cmd": "NODE_SOCKET_ALL_CLOSED", "key": key})
        await server.wait_closed()
        raw.write({"cmd": "NODE_SOCKET_COUNT", "key": key, "count": 5}, "next")
        assert await channel.recv() == ("next", None)
        assert await server.get_connections() == 0


@node_test(
    "test-internal-socket-list-receive",
    expects="nothing is sent when not connected; ALL_CLOSED at once when there is none; COUNT; ALL_CLOSED"
    " when the last has closed",
    ours="the same; a key never seen is answered too, with 0",
    verdict=BETTER,
    why="Node leaves a question about an unknown key open for ever",
)
async def test_socket_list_receive() -> None:
    """The holder of connections answers."""
    async with raw_peer() as (channel, raw):
        ask = {"cmd": "NODE_SOCKET_GET_COUNT", "key": "k"}
        notify = {"cmd": "NODE_SOCKET_NOTIFY_CLOSE", "key": "k"}
        raw.write(ask, notify)
        assert await raw.read() == {"cmd": "NODE_SOCKET_COUNT", "key": "k", "count": 0}
        assert await raw.read() == {"cmd": "NODE_SOCKET_ALL_CLOSED", "key": "k"}
        client, sent = socket.socketpair()
        with client, sent:
            line = {"cmd": "NODE_HANDLE", "type": "net.Socket", "msg": 1, "key": "k"}
            raw.write(line, fds=(sent.fileno(),))
            _, connection = await channel.recv()
            assert await raw.read() == ACK
            raw.write(ask, notify)
            assert await raw.read() == {"cmd": "NODE_SOCKET_COUNT", "key": "k", "count": 1}
            assert raw.nothing_came()
            connection.close()
            assert await raw.read() == {"cmd": "NODE_SOCKET_ALL_CLOSED", "key": "k"}
            raw.write(line, fds=(sent.fileno(),))
            _, connection = await channel.recv()
            assert await raw.read() == ACK
            raw.write(notify, "last")
            assert await channel.recv() == ("last", None)
            channel.disconnect()
            connection.close()
            assert await raw.line() == b""


@also("test-internal-socket-list-receive")
def test_socket_list_receive_under_node(under_node) -> None:
    """A Node parent that waits for its server's end sees Node's own messages, and no others."""
    javascript = """
        const child = fork();
        const seen = new Set();
        child.on('internalMessage', (m) => seen.add(m.cmd));
        const server = net.createServer({ pauseOnConnect: true }, (socket) => child.send('hold', socket))
          .listen(0, '127.0.0.1', () => net.connect(server.address()).resume());
        child.on('message', (message) => {
          if (message === 'closed') return; // may come before its report, as a Node.js child's does
          server.close(() => { show([...seen]); child.disconnect(); });
          child.send('destroy');
        });
    """
    assert under_node(javascript, PYTHON_TAKE) == [["NODE_HANDLE_ACK", "NODE_SOCKET_ALL_CLOSED"]]
