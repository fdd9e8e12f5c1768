"""A server that knows its connections wherever they live."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import handleipc
from handleipc import Channel, Limits
from handleipc.asyncio import tracking
from handleipc.limits import Invitation
from tests.asyncio.helpers import earned, joined, turns
from tests.nodes import NODE_VERSIONS, node_binary

HOLDER = """
    import asyncio, handleipc

    async def main():
        parent = await handleipc.parent()
        held = {}
        async for message, handle in parent:
            if handle is not None:
                held[message] = handle
            elif message[0] == "close":
                held.pop(message[1]).close()
                await parent.send(["closed", message[1]])
            elif message[0] == "hang":
                import time
                await parent.send(["hanging"])
                time.sleep(60)
        for handle in held.values():
            handle.close()

    asyncio.run(main())
"""

NODE_HOLDER = """
const held = new Map();
process.on('message', (message, socket) => {
  if (socket) {
    socket.on('error', () => {});
    held.set(message, socket);
  } else if (message[0] === 'close') {
    const socket = held.get(message[1]);
    held.delete(message[1]);
    socket.on('close', () => process.send(['closed', message[1]]));
    socket.destroy();
  }
});
"""


@asynccontextmanager
async def clients(address: tuple[str, int], count: int) -> AsyncIterator[list[socket.socket]]:
    """Connect so many clients, and close them in the end."""
    connected = [socket.create_connection(address) for _ in range(count)]
    try:
        yield connected
    finally:
        for client in connected:
            client.close()


async def until(condition, seconds: float = 10) -> None:
    """Wait for something that only shows in what we ask."""
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, "it never came to be"
        await asyncio.sleep(0.005)


def pair(limits: Limits | None = None) -> tuple[Channel, Channel]:
    """Two native ends in one process."""
    a, b = socket.socketpair()
    limits = limits or Limits()
    invitation = Invitation(limits.window, limits.bytes)
    return earned(Channel(a, limits, inviting=True)), earned(
        Channel(b, limits, invited_by=invitation)
    )


@pytest.fixture
def holder(program) -> Path:
    """A Python child that holds what it gets."""
    return program("holder.py", HOLDER)


async def spread(server, children, count) -> None:
    """Accept so many connections, and hand them out in turn."""
    for i in range(count):
        connection = await anext(server)
        await children[i % len(children)].send(i, connection)


@pytest.fixture
def newest_nodes(kind: str) -> list[str]:
    """Three Node.js, if they are asked for: installed before the test's time begins."""
    return [str(node_binary(version)) for version in NODE_VERSIONS[-3:] if kind == "node"]


@pytest.mark.parametrize("kind", ["python", "node"])
async def test_twelve_connections_over_three_children(
    kind: str, program: Any, newest_nodes: list[str]
) -> None:
    """The count is right after each close, and the server ends exactly with the last."""
    if kind == "python":
        path = program("holder.py", HOLDER)
        children = [await handleipc.fork(path) for _ in range(3)]
    else:
        path = program("holder.js", NODE_HOLDER)
        children = [await handleipc.spawn(binary, path) for binary in newest_nodes]
    server = await handleipc.listen("127.0.0.1", 0)
    async with clients(server.sockname, 12):
        await spread(server, children, 12)
        assert server.connections == 0
        assert await server.get_connections() == 12
        server.close()
        waiting = asyncio.create_task(server.wait_closed())
        for i in range(12):
            assert not waiting.done()
            child = children[i % 3]
            await child.send(["close", i])
            assert await child.recv() == (["closed", i], None)
            assert await server.get_connections() == 11 - i
        await asyncio.wait_for(waiting, 10)
    for child in children:
        child.disconnect()
        assert await child.wait() == 0
    assert not any(len(child.lists) for child in children)


async def test_children_killed_in_the_middle(holder: Path) -> None:
    """Counts fall to the truth, and close completes."""
    children = [await handleipc.fork(holder) for _ in range(3)]
    server = await handleipc.listen("127.0.0.1", 0)
    async with clients(server.sockname, 6):
        await spread(server, children, 6)
        assert await server.get_connections() == 6
        counting = asyncio.create_task(server.get_connections())
        children[0].kill(signal.SIGKILL)
        await children[0].wait_disconnected()
        assert await counting in (4, 6)
        assert await server.get_connections() == 4
        server.close()
        for child in children[1:]:
            child.kill(signal.SIGKILL)
        await asyncio.wait_for(server.wait_closed(), 10)
        assert await server.get_connections() == 0
    for child in children:
        await child.wait()
        await child.wait_disconnected()


async def test_a_child_that_does_not_answer(holder: Path) -> None:
    """It is named, what others have is counted, and nothing hangs."""
    good, bad = [await handleipc.fork(holder) for _ in range(2)]
    async with handleipc.listen("127.0.0.1", 0) as server, clients(server.sockname, 2):
        await spread(server, [good, bad], 2)
        await bad.send(["hang"])
        assert await bad.recv() == (["hanging"], None)
        count = await server.get_connections(timeout=0.2)
        assert count == 1
        assert count.missing == (bad,)
        bad.kill(signal.SIGKILL)
        await bad.wait()
        count = await server.get_connections()
        assert (count, count.missing) == (1, ())
    good.disconnect()
    await good.wait()


async def test_two_servers_share_two_children(holder: Path) -> None:
    """Both on port 0: their counts never mix, as Node's do."""
    children = [await handleipc.fork(holder) for _ in range(2)]
    async with handleipc.listen("127.0.0.1", 0) as one, handleipc.listen("127.0.0.1", 0) as two:
        async with clients(one.sockname, 3), clients(two.sockname, 2):
            for i in range(3):
                await children[i % 2].send(f"one {i}", await anext(one))
            for i in range(2):
                await children[i % 2].send(f"two {i}", await anext(two))
            assert await one.get_connections() == 3
            assert await two.get_connections() == 2
    for child in children:
        child.disconnect()
        await child.wait()


@pytest.mark.parametrize(
    "how", ["close", "detach", "socket", "socket detach", "open", "start", "end", "dropped"]
)
async def test_every_way_to_end_counts_down(how: str) -> None:
    """Whoever ends a received connection, and however, the server learns of it."""
    here, there = pair()
    async with handleipc.listen("127.0.0.1", 0) as server, clients(server.sockname, 1) as (client,):
        await here.send("c", await anext(server))
        _, connection = await there.recv()
        assert await server.get_connections() == 1
        assert server._group.known == 1
        if how == "close":
            connection.close()
        elif how == "detach":
            os.close(connection.detach())
        elif how == "socket":
            connection.socket().close()
        elif how == "socket detach":
            os.close(connection.socket().detach())
        elif how == "open":
            _, writer = await connection.open()
            writer.close()
            await writer.wait_closed()
        elif how == "start":
            transport, _ = await connection.start(asyncio.Protocol)
            transport.abort()
        elif how == "end":
            await connection.end(b"bye")
            client.close()
        else:
            with pytest.warns(ResourceWarning):
                del connection

        async def gone() -> bool:
            return await server.get_connections() == 0

        await until(gone)
        await until(known_is(server, 0))
    here.disconnect()
    await there.wait_disconnected()
    await here.wait_disconnected()
    assert not len(here.lists) + len(there.lists)


def known_is(server, count: int):
    """Whether what peers have reported makes so many."""

    async def check() -> bool:
        return server._group.known == count

    return check


async def test_keep_open_is_counted_once() -> None:
    """It stays open here, so it counts here; Node counts it twice."""
    here, there = pair()
    async with handleipc.listen("127.0.0.1", 0) as server, clients(server.sockname, 1):
        connection = await anext(server)
        await here.send("c", connection, keep_open=True)
        _, copy = await there.recv()
        assert await server.get_connections() == 1
        copy.close()
        assert await server.get_connections() == 1
        connection.close()
        assert await server.get_connections() == 0
    here.disconnect()
    await there.wait_disconnected()
    await here.wait_disconnected()


async def test_forwarded_on_by_the_receiver() -> None:
    """The middle answers for those that it handed on, and reports their end."""
    here, middle = pair()
    on, there = pair()
    async with handleipc.listen("127.0.0.1", 0) as server, clients(server.sockname, 2):
        await here.send(1, await anext(server))
        _, first = await middle.recv()
        await here.send(2, await anext(server))
        _, second = await middle.recv()
        await on.send("on", first)
        _, far = await there.recv()
        assert await server.get_connections() == 2
        assert server._group.known == 2
        far.close()
        await until(known_is(server, 1))
        assert await server.get_connections() == 1
        server.close()
        second.close()
        await asyncio.wait_for(server.wait_closed(), 10)
    for channel in (here, on):
        channel.disconnect()
    for channel in (here, middle, on, there):
        await channel.wait_disconnected()


async def test_given_back_to_the_server_s_own_process() -> None:
    """A connection that comes back over the same channel is still one connection."""
    here, there = pair()
    async with handleipc.listen("127.0.0.1", 0) as server, clients(server.sockname, 1):
        await here.send("there", await anext(server))
        _, connection = await there.recv()
        await there.send("and back", connection)
        _, back = await here.recv()
        assert await server.get_connections() == 1
        back.close()
        assert await server.get_connections() == 0
        await until(known_is(server, 0))
    here.disconnect()
    await there.wait_disconnected()
    await here.wait_disconnected()


async def test_returned_undelivered() -> None:
    """What came back is counted here, as if it had never left."""
    here, there = pair()
    async with handleipc.listen("127.0.0.1", 0) as server, clients(server.sockname, 1):
        connection = await anext(server)
        there.abort()
        await there.wait_disconnected()
        with pytest.raises((handleipc.HandleNotDelivered, handleipc.ChannelClosed)):
            await here.send("c", connection)
        assert server.connections == 1
        connection.close()
        assert server.connections == 0
    await here.wait_disconnected()


async def test_max_connections_counts_native_peers() -> None:
    """Above it a connection is closed at once; a report of the peer makes room."""
    here, there = pair()
    dropped = []
    async with handleipc.listen("127.0.0.1", 0) as server:
        server.max_connections = 1
        server.on("drop", dropped.append)
        async with clients(server.sockname, 1):
            await here.send("c", await anext(server))
            _, connection = await there.recv()
            taking = asyncio.create_task(anext(server))
            await asyncio.sleep(0)
            with socket.create_connection(server.sockname) as refused:
                await asyncio.get_running_loop().run_in_executor(None, refused.recv, 1)
                assert dropped == [refused.getsockname()]
            connection.close()
            await until(known_is(server, 0))
            with socket.create_connection(server.sockname):
                (await taking).close()
    here.disconnect()
    await there.wait_disconnected()
    await here.wait_disconnected()


@pytest.mark.parametrize(
    "line",
    [
        {"cmd": "NODE_SOCKET_GET_COUNT"},
        {"cmd": "NODE_SOCKET_GET_COUNT", "key": 5},
        {"cmd": "NODE_SOCKET_COUNT", "count": 1},
        {"cmd": "NODE_SOCKET_NOTIFY_CLOSE", "key": None},
    ],
)
async def test_a_message_without_a_key(line: dict[str, object]) -> None:
    """It is an error event, and costs nothing else."""
    ours, theirs = socket.socketpair()
    with theirs:
        channel = Channel(ours, Limits())
        errors: list[Exception] = []
        channel.on("error", errors.append)
        theirs.send(json.dumps(line).encode() + b'\n"next"\n')
        assert await channel.recv() == ("next", None)
        assert "without a key" in str(errors[0])
        channel.abort()


@pytest.mark.parametrize("answer", ['"7"', "-1", "true", "null", "1.5"])
async def test_a_count_that_makes_no_sense(answer: str) -> None:
    """The peer is named as missing; the number is not believed."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    with theirs:
        channel = Channel(ours, Limits())
        errors: list[Exception] = []
        channel.on("error", errors.append)
        async with handleipc.listen("127.0.0.1", 0) as server, clients(server.sockname, 1):
            sending = asyncio.create_task(channel.send("c", await anext(server)))
            loop = asyncio.get_running_loop()
            _, fds, _, _ = await readable(loop, theirs)
            for fd in fds:
                os.close(fd)
            theirs.send(b'{"cmd":"NODE_HANDLE_ACK"}\n')
            await sending
            counting = asyncio.create_task(server.get_connections())
            data, _, _, _ = await readable(loop, theirs)
            key = json.loads(data)["key"]
            theirs.send(
                b'{"cmd":"NODE_SOCKET_COUNT","key":%b,"count":%b}\n'
                % (json.dumps(key).encode(), answer.encode())
            )
            count = await counting
            assert (count, count.missing) == (0, (channel,))
            theirs.send(
                b'{"cmd":"NODE_SOCKET_COUNT","key":%b,"count":3}\n'
                b'{"cmd":"NODE_SOCKET_ALL_CLOSED","key":%b}\n' % ((json.dumps(key).encode(),) * 2)
            )

            async def both_noted() -> bool:
                return len(errors) == 3

            await until(both_noted)
            count = await server.get_connections(timeout=0.2)
            assert (count, count.missing) == (0, (channel,))
            channel.abort()


async def readable(loop, sock):
    """Wait for a message with descriptors."""
    ready = loop.create_future()
    loop.add_reader(sock.fileno(), lambda: ready.done() or ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_reader(sock.fileno())
    return socket.recv_fds(sock, 65536, 10)


async def test_notify_twice_is_answered_twice() -> None:
    """As Node does, at once if there is none, and for a key never seen."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    with theirs:
        channel = Channel(ours, Limits())
        theirs.send(b'{"cmd":"NODE_SOCKET_NOTIFY_CLOSE","key":"k"}\n' * 2)
        theirs.send(b'{"cmd":"NODE_SOCKET_GET_COUNT","key":"k"}\n')
        got = b""
        while got.count(b"\n") < 3:
            got += (await readable(asyncio.get_running_loop(), theirs))[0]
        assert got.count(b'"NODE_SOCKET_ALL_CLOSED","key":"k"') == 2
        assert b'{"cmd":"NODE_SOCKET_COUNT","key":"k","count":0}' in got
        channel.abort()


@pytest.mark.slow
async def test_many_connections_closed_in_random_order() -> None:
    """Thousands over several peers, some of which die: every count ends at zero."""
    rng = random.Random(1)
    pairs = [pair() for _ in range(4)]
    server = await handleipc.listen("127.0.0.1", 0)
    for _ in range(10):
        async with clients(server.sockname, 200):
            held = []
            for i in range(200):
                connection = await anext(server)
                here, there = rng.choice(pairs)
                if rng.random() < 0.1:
                    held.append(connection)
                else:
                    here.send_nowait(i, connection)
            for here, _ in pairs:
                await here.drain()

            async def all_there() -> bool:
                for _, there in pairs:
                    while there._protocol.incoming.ready:
                        held.append((await there.recv())[1])
                return len(held) == 200

            await until(all_there)
            assert await server.get_connections() == 200
            rng.shuffle(held)
            for connection in held[: rng.randint(100, 190)]:
                connection.close()
            if rng.random() < 0.5:
                index = rng.randrange(4)
                for channel in pairs[index]:
                    channel.abort()
                    await channel.wait_disconnected()
                pairs[index] = pair()
            for connection in held:
                connection.close()
            await until(known_is(server, 0))
            assert await server.get_connections() == 0
    server.close()
    await asyncio.wait_for(server.wait_closed(), 10)
    for here, there in pairs:
        here.disconnect()
        await there.wait_disconnected()
        await here.wait_disconnected()
        assert len(here.lists) == len(there.lists) == 0


async def test_a_server_is_transferred() -> None:
    """With ``transfer`` the sender stops accepting at the acknowledgement, and loses nothing."""
    here, there = pair()
    server = await handleipc.listen("127.0.0.1", 0)
    address = server.sockname
    with socket.create_connection(address) as before:
        taken = await anext(server)
        await here.send("server", server, transfer=True)
        assert server.closed
        _, theirs = await there.recv()
        assert theirs.sockname == address
        with socket.create_connection(address) as client:
            connection = await anext(theirs)
            assert connection.peername == client.getsockname()
            connection.close()
        assert taken.peername == before.getsockname()
        taken.close()
    await server.wait_closed()
    theirs.close()
    here.disconnect()
    await there.wait_disconnected()
    await here.wait_disconnected()


@pytest.fixture
def reports_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """No close is reported alone while the test lasts."""
    monkeypatch.setattr(tracking, "REPORT_WITHIN", 60.0)


@asynccontextmanager
async def handed_on(count: int) -> AsyncIterator[tuple[handleipc.Server, Channel, Channel]]:
    """A server with so many clients, of which one was handed on and not taken yet."""
    async with (
        handleipc.listen("127.0.0.1", 0) as server,
        joined("native") as (a, b),
        clients(server.sockname, count),
    ):
        await a.send("first", await anext(server))
        yield server, a, b


async def test_a_close_is_reported_with_the_next_acknowledgement(reports_wait: None) -> None:
    async with handed_on(2) as (server, a, b):
        _, first = await b.recv()
        await turns()
        first.close()
        await turns()
        assert a.connections == 1
        await a.send("second", await anext(server))
        await until(known_is(server, 1))
        _, second = await b.recv()
        second.close()


async def test_a_count_does_not_wait_for_reports(reports_wait: None) -> None:
    async with handed_on(1) as (server, _, b):
        (await b.recv())[1].close()
        assert await server.get_connections(timeout=10) == 0


async def test_a_close_is_reported_alone_when_nothing_leaves() -> None:
    async with handed_on(1) as (server, a, b):
        (await b.recv())[1].close()
        await until(known_is(server, 0))
        assert a.connections == 0
