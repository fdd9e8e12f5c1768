"""Where Node is wrong, and handleipc is not: counting the connections of a server."""

from __future__ import annotations

import asyncio
import signal

import handleipc
from tests.conformance.peers import clients, goodbye
from tests.conformance.record import node_bug
from tests.conformance.test_counting import PYTHON_TAKE, TAKE


async def hold(child, server) -> None:
    """Have the child hold one connection."""
    await child.send("hold", await anext(server))
    assert await child.recv() == ("held", None)


@node_bug(
    "nodejs/node#13923",
    problem="one dead child makes `getConnections` fail with ERR_CHILD_CLOSED_BEFORE_REPLY",
    ours="a dead child holds none; one that does not answer in time is named in `missing`",
    why="the others' counts are still wanted",
)
async def test_a_dead_child_counts_as_none(peer) -> None:
    """One of two is killed while it is asked."""
    async with peer(TAKE, PYTHON_TAKE) as good, peer(TAKE, PYTHON_TAKE) as bad:
        async with handleipc.listen("127.0.0.1", 0) as server, clients(server.sockname, 2):
            await hold(good, server)
            await hold(bad, server)
            bad.kill(signal.SIGSTOP)
            while (count := await server.get_connections(timeout=0.1)).missing != (bad,):
                pass  # the good one was slow
            assert count == 1
            counting = asyncio.create_task(server.get_connections())
            await asyncio.sleep(0)
            bad.kill(signal.SIGKILL)
            count = await counting
            assert (count, count.missing) == (1, ())
        await goodbye(good)


@node_bug(
    "own; oven-sh/bun#34659",
    problem="when all children have ended, `getConnections` never calls back and `close` never ends",
    ours="0, and the server closes",
    why="nobody to ask is an answer",
)
async def test_all_children_have_ended(peer) -> None:
    """A count and an end after the last child."""
    server = await handleipc.listen("127.0.0.1", 0)
    async with clients(server.sockname, 1):
        async with peer(TAKE, PYTHON_TAKE) as child:
            await hold(child, server)
        assert await asyncio.wait_for(server.get_connections(), 10) == 0
        server.close()
        await asyncio.wait_for(server.wait_closed(), 10)


@node_bug(
    "nodejs/node#2610",
    problem="counting races with closing (noted in Node's test, which waits instead)",
    ours="each count is one that was true, and the last is 0",
    why="answers come in the order of what happened",
)
async def test_count_while_closing(peer) -> None:
    """Asked all the time while ten connections close."""
    async with peer(TAKE, PYTHON_TAKE) as child:
        async with handleipc.listen("127.0.0.1", 0) as server, clients(server.sockname, 10):
            for _ in range(10):
                await hold(child, server)
            counts = []
            for _ in range(10):
                child.send_nowait("destroy")
                counts.append(asyncio.create_task(server.get_connections()))
            found = [await count for count in counts]
            assert found == sorted(found, reverse=True)
            assert all(0 <= count <= 10 for count in found)
            for _ in range(10):
                assert await child.recv() == ("closed", None)
            assert await server.get_connections() == 0
        await goodbye(child)


@node_bug(
    "nodejs/node#7043, nodejs/node#5727; own",
    problem="two servers on port 0 share a key: their counts mix, and one does not wait for its"
    " connections",
    ours="each server has a key of its own",
    why="the key is opaque to Node, so any string will do",
)
async def test_two_servers_on_port_0(peer) -> None:
    """Three and two, and each closes with its own."""
    async with peer(TAKE, PYTHON_TAKE) as child:
        one, two = [await handleipc.listen("127.0.0.1", 0) for _ in range(2)]
        async with clients(one.sockname, 3), clients(two.sockname, 2):
            for server in (one, one, one, two, two):
                await hold(child, server)
            assert (await one.get_connections(), await two.get_connections()) == (3, 2)
            one.close()
            two.close()
            for _ in range(2):  # the last in is the first out
                await child.send("destroy")
                assert await child.recv() == ("closed", None)
            await asyncio.wait_for(two.wait_closed(), 10)
            assert await one.get_connections() == 3
            for _ in range(3):
                await child.send("destroy")
                assert await child.recv() == ("closed", None)
            await asyncio.wait_for(one.wait_closed(), 10)
        await goodbye(child)


@node_bug(
    "own; destroy after send",
    problem="`destroy()` of a socket that was sent makes the server's count -1",
    ours="closing what was sent does nothing",
    why="it was handed over, and counts there",
)
async def test_close_after_send(peer) -> None:
    """The count stays one, then falls to none."""
    async with peer(TAKE, PYTHON_TAKE) as child:
        async with handleipc.listen("127.0.0.1", 0) as server, clients(server.sockname, 1):
            connection = await anext(server)
            await child.send("hold", connection)
            assert await child.recv() == ("held", None)
            connection.close()
            assert (server.connections, await server.get_connections()) == (0, 1)
            await child.send("destroy")
            assert await child.recv() == ("closed", None)
            assert (server.connections, await server.get_connections()) == (0, 0)
        await goodbye(child)


@node_bug(
    "own; keepOpen",
    problem="a socket sent with `keepOpen` is counted twice",
    ours="once: here, where it stays open",
    why="it is one connection",
)
async def test_keep_open_is_counted_once(peer) -> None:
    """Lent to a child, and closed there: still one; closed here: none."""
    async with peer(TAKE, PYTHON_TAKE) as child:
        async with handleipc.listen("127.0.0.1", 0) as server, clients(server.sockname, 1):
            connection = await anext(server)
            await child.send("hold", connection, keep_open=True)
            assert await child.recv() == ("held", None)
            assert await server.get_connections() == 1
            await child.send("destroy")
            assert await child.recv() == ("closed", None)
            assert await server.get_connections() == 1
            connection.close()
            assert await server.get_connections() == 0
        await goodbye(child)


@node_bug(
    "own; one listener per key",
    problem="a child that gets sockets of 11 servers warns of a leak of listeners, which it is",
    ours="one dispatcher, and lists that are dropped with their last connection",
    why="servers come and go",
)
async def test_sockets_of_many_servers(python_peer) -> None:
    """Twenty servers, one connection each; a child without a word on its standard error."""
    pipe = asyncio.subprocess.PIPE
    async with python_peer("", PYTHON_TAKE, stderr=pipe) as child:
        servers = [await handleipc.listen("127.0.0.1", 0) for _ in range(20)]
        for server in servers:
            async with clients(server.sockname, 1):
                await hold(child, server)
        assert [await server.get_connections() for server in servers] == [1] * 20
        for _ in servers:
            await child.send("destroy")
            assert await child.recv() == ("closed", None)
        for server in servers:
            server.close()
            await asyncio.wait_for(server.wait_closed(), 10)
        await goodbye(child)
        assert await child.stderr.read() == b""
