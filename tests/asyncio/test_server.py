"""``listen``, ``listen_unix`` and ``Server``."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from typing import Any

import pytest

import handleipc
from handleipc import Connection
from tests.asyncio.helpers import Recorder, joined, turns, until


def connect(server: Any) -> socket.socket:
    """Return a client of this server; the kernel completes it without an accept."""
    client = socket.create_connection(server.sockname[:2], timeout=10)
    return client


def ended(client: socket.socket) -> bool:
    """Say whether the server closed or reset this connection."""
    client.setblocking(False)
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


async def test_iteration() -> None:
    """``async for`` gives each connection, in order of arrival, as a ``Connection``."""
    async with handleipc.listen("127.0.0.1", 0) as server:
        assert aiter(server) is server
        clients = [connect(server) for _ in range(5)]
        got = []
        async for connection in server:
            assert isinstance(connection, Connection)
            got.append(connection)
            if len(got) == 5:
                break
        assert [c.peername for c in got] == [c.getsockname() for c in clients]
        assert server.connections == 5
        for each in [*got, *clients]:
            each.close()
        assert server.connections == 0


async def test_awaited() -> None:
    """``await listen`` gives a ``Server``, which ``async with`` closes too."""
    server = await handleipc.listen("127.0.0.1", 0)
    async with server as same:
        assert same is server
        assert server.sockname[0] == "127.0.0.1"
        assert server.sockname[1] > 0
        address = server.sockname
    assert server.closed
    assert server.sockname == address
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=5)
    server.close()


async def test_leaving_the_block_does_not_wait() -> None:
    """Leaving ``async with`` closes the listener, and connections live on."""
    async with handleipc.listen("127.0.0.1", 0) as server:
        client = connect(server)
        connection = await anext(server)
    with client, connection:
        client.send(b"x")
        await until(lambda: not ended_quietly(connection))
        assert connection.peek(1) == b"x"
        assert server.connections == 1


def ended_quietly(connection: Connection) -> bool:
    try:
        connection.peek(1)
    except BlockingIOError:
        return True
    return False


async def test_break_keeps_untaken_connections() -> None:
    """Accepted and untaken connections survive a ``break``; ``close`` closes them."""
    async with handleipc.listen("127.0.0.1", 0) as server:
        clients = [connect(server) for _ in range(6)]
        async for connection in server:
            connection.close()
            break
        assert not any(ended(client) for client in clients[1:])
        for n in range(1, 4):
            connection = await anext(server)
            assert connection.peername == clients[n].getsockname()
            connection.close()
        server.close()
        await until(lambda: all(ended(client) for client in clients))
        for client in clients:
            client.close()
        with pytest.raises(StopAsyncIteration):
            await anext(server)
        await asyncio.wait_for(server.wait_closed(), 5)


async def test_close_ends_a_waiting_iteration() -> None:
    """``close`` ends an iteration that waits."""
    server = await handleipc.listen("127.0.0.1", 0)
    waiting = asyncio.create_task(anext(server, "ended"))
    await turns()
    server.close()
    assert await waiting == "ended"


async def test_cancelled_iteration_loses_nothing() -> None:
    """A cancelled wait for a connection takes none."""
    async with handleipc.listen("127.0.0.1", 0) as server:
        for turn in range(10):
            waiting = asyncio.create_task(anext(server))
            await asyncio.sleep(0)
            with connect(server) as client:
                for _ in range(turn):
                    await asyncio.sleep(0)
                waiting.cancel()
                await asyncio.wait([waiting])
                connection = await anext(server) if waiting.cancelled() else waiting.result()
                assert connection.peername == client.getsockname()
                connection.close()


async def test_backlog_is_the_queue() -> None:
    """Connections wait in the kernel's backlog until somebody iterates."""
    async with handleipc.listen("127.0.0.1", 0, backlog=50) as server:
        clients = [connect(server) for _ in range(40)]
        await turns()
        assert server.connections == 0
        for client in clients:
            connection = await anext(server)
            assert connection.peername == client.getsockname()
            connection.close()
            client.close()


async def test_emfile(descriptor_limit, caplog: pytest.LogCaptureFixture) -> None:
    """Out of descriptors, connections wait in the backlog, an ``"error"`` says so, then it goes on."""
    async with handleipc.listen("127.0.0.1", 0) as server:
        error = server.on("error", Recorder())
        clients = [connect(server) for _ in range(3)]
        waiting = asyncio.create_task(anext(server))
        used = [int(name) for name in os.listdir("/proc/self/fd")]
        highest = max(used)
        descriptor_limit(highest + 1)
        filler = []
        try:
            while True:
                filler.append(os.dup(0))
        except OSError:
            pass
        ((caught,),) = await error.next()
        assert caught.errno == errno.EMFILE
        assert not waiting.done()
        for fd in filler:
            os.close(fd)
        descriptor_limit(highest + 50)
        async with asyncio.timeout(10):
            (await waiting).close()
            for _ in range(2):
                (await anext(server)).close()
        for client in clients:
            client.close()
    assert caplog.records == []


# -- counting ------------------------------------------------------------------------------------

PATHS = ["close", "end", "detach", "socket close", "socket detach", "open", "start", "sent", "drop"]


@pytest.mark.parametrize("path", PATHS)
async def test_count_through_every_path(path: str) -> None:
    """``server.connections`` counts what is open here, however it was used."""
    async with handleipc.listen("127.0.0.1", 0) as server:
        with connect(server) as client:
            connection = await anext(server)
            assert server.connections == 1
            if path == "close":
                connection.close()
            elif path == "end":
                await connection.end(b"x")
                client.close()
            elif path == "detach":
                fd = connection.detach()
                assert server.connections == 0
                os.close(fd)
            elif path == "socket close":
                sock = connection.socket()
                file = sock.makefile("rb")
                assert server.connections == 1
                sock.close()
                assert server.connections == 1  # the file still holds it
                file.close()
            elif path == "socket detach":
                sock = connection.socket()
                assert server.connections == 1
                os.close(sock.detach())
            elif path == "open":
                _, writer = await connection.open()
                assert server.connections == 1
                writer.close()
                await writer.wait_closed()
            elif path == "start":
                transport, _ = await connection.start(asyncio.Protocol)
                assert server.connections == 1
                transport.abort()
            elif path == "sent":
                async with joined("native") as (a, b):
                    sending = asyncio.create_task(a.send("x", connection))
                    _, handle = await b.recv()
                    await sending
                    assert server.connections == 0
                    handle.close()
            else:
                with pytest.warns(ResourceWarning):
                    del connection
            await until(lambda: server.connections == 0, "the count")


async def test_lent_connection_still_counts() -> None:
    """A connection sent with ``keep_open`` is open here as before."""
    async with handleipc.listen("127.0.0.1", 0) as server, joined("native") as (a, b):
        with connect(server):
            connection = await anext(server)
            sending = asyncio.create_task(a.send("x", connection, keep_open=True))
            _, handle = await b.recv()
            await sending
            handle.close()
            assert server.connections == 1
            connection.close()
            assert server.connections == 0


async def test_undelivered_connection_counts_again() -> None:
    """A connection that comes back is open here, and counts until it is closed."""
    async with handleipc.listen("127.0.0.1", 0) as server, joined("native") as (a, b):
        with connect(server):
            connection = await anext(server)
            undelivered = a.on("undelivered", Recorder())
            a.send_nowait("x", connection)
            a.abort()
            await undelivered.next()
            assert server.connections == 1
            connection.close()
            assert server.connections == 0


async def test_wait_closed() -> None:
    """``wait_closed`` waits for ``close`` and for the last connection."""
    server = await handleipc.listen("127.0.0.1", 0)
    with connect(server):
        connection = await anext(server)
        waits = [asyncio.create_task(server.wait_closed()) for _ in range(2)]
        await turns()
        server.close()
        await turns()
        assert not any(wait.done() for wait in waits)
        connection.close()
        async with asyncio.timeout(5):
            await asyncio.gather(*waits)
            await server.wait_closed()


COUNTED = """
    import asyncio
    import handleipc

    async def main():
        parent = await handleipc.parent()
        connections = []
        async for message, connection in parent:
            if connection is not None:
                connections.append(connection)
            if message == "close one":
                connections.pop().close()
            await parent.send(message)

    asyncio.run(main())
"""


@pytest.mark.parametrize("dialect", ["node", None])
async def test_connections_handed_to_a_child(program, dialect: Any) -> None:
    """``get_connections`` counts those of a child too, and ``wait_closed`` waits for them."""
    child = await handleipc.fork(program("child.py", COUNTED), dialect=dialect)
    server = await handleipc.listen("127.0.0.1", 0)
    clients = [connect(server) for _ in range(3)]
    here = await anext(server)
    async with asyncio.timeout(20):
        for _ in range(2):
            await child.send("take", await anext(server))
            assert await child.recv() == ("take", None)
        assert server.connections == 1
        assert await server.get_connections() == 3
        await child.send("close one")
        await child.recv()
        assert await server.get_connections() == 2
        here.close()
        server.close()
        waiting = asyncio.create_task(server.wait_closed())
        await turns()
        assert not waiting.done()
        await child.send("close one")
        await child.recv()
        await waiting
        child.disconnect()
        assert await child.wait() == 0
    for client in clients:
        client.close()


async def test_connections_of_a_dead_child(program) -> None:
    """A killed child holds no connection any more: counts and ``wait_closed`` go on."""
    child = await handleipc.fork(program("child.py", COUNTED))
    server = await handleipc.listen("127.0.0.1", 0)
    with connect(server):
        async with asyncio.timeout(20):
            await child.send("take", await anext(server))
            assert await child.recv() == ("take", None)
            child.kill(9)
            await child.wait()
            assert await server.get_connections() == 0
            server.close()
            await server.wait_closed()


async def test_max_connections() -> None:
    """Above ``max_connections`` a connection is dropped, and a ``"drop"`` event says so."""
    async with handleipc.listen("127.0.0.1", 0) as server:
        server.max_connections = 1
        dropped = server.on("drop", Recorder())
        with connect(server) as first, connect(server) as second:
            connection = await anext(server)
            waiting = asyncio.create_task(anext(server))
            await dropped.next()
            await until(lambda: ended(second))
            assert not ended(first)
            connection.close()
            with connect(server) as third:
                connection = await waiting
                assert connection.peername == third.getsockname()
                connection.close()


# -- addresses -----------------------------------------------------------------------------------


async def test_all_interfaces() -> None:
    """No host means all interfaces, IPv4 clients included."""
    for host in (None, ""):
        async with handleipc.listen(host, 0) as server:
            with socket.create_connection(("127.0.0.1", server.sockname[1]), timeout=5):
                (await anext(server)).close()


async def test_name() -> None:
    """A host name is resolved."""
    async with handleipc.listen("localhost", 0) as server:
        with socket.create_connection(server.sockname[:2], timeout=5):
            (await anext(server)).close()


async def test_reuse_port() -> None:
    """``reuse_port`` lets two servers listen at one port; without, the second is ``OSError``."""
    async with handleipc.listen("127.0.0.1", 0, reuse_port=True) as one:
        port = one.sockname[1]
        async with handleipc.listen("127.0.0.1", port, reuse_port=True) as two:
            assert two.sockname == one.sockname
        with pytest.raises(OSError, match=f"{port}") as caught:
            await handleipc.listen("127.0.0.1", port)
        assert caught.value.errno == errno.EADDRINUSE


async def test_bad_addresses() -> None:
    """A port that is none, and an address that is not ours, are refused and leave nothing."""
    for port in (-1, 65536):
        with pytest.raises(ValueError, match=str(port)):
            await handleipc.listen("127.0.0.1", port)
    with pytest.raises(OSError, match=r"192\.0\.2\.1"):
        await handleipc.listen("192.0.2.1", 0)
    with pytest.raises(OSError, match=r"nowhere\.invalid"):
        await handleipc.listen("nowhere.invalid", 0)
    with pytest.raises(ValueError, match="untaken=0"):
        await handleipc.listen("127.0.0.1", 0, untaken=0)


async def test_unknown_server_event() -> None:
    """A server has the events of the contract, and no others."""
    async with handleipc.listen("127.0.0.1", 0) as server:
        with pytest.raises(ValueError, match="drop"):
            server.on("connection", print)
