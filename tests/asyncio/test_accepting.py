"""When a server accepts, and what becomes of whom it has accepted."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

import handleipc
from handleipc import Connection, Server
from handleipc.asyncio import listener, logs
from handleipc.asyncio.socketpath import BoundPath
from tests.asyncio.helpers import DIALECTS, Recorder, joined, turns, until
from tests.asyncio.test_server import connect, ended


@contextmanager
def crowd(server: Server, count: int) -> Iterator[list[socket.socket]]:
    """So many clients, which the kernel has taken and nobody has accepted."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(connect(server)) for _ in range(count)]


async def answer_all(server: Server) -> int:
    """Iterate to the end, answer each, and say how many they were."""
    count = 0
    async with asyncio.timeout(20):
        async for connection in server:
            await connection.end(b"served")
            count += 1
    return count


def outcome(client: socket.socket) -> bytes | str:
    client.settimeout(10)
    try:
        return client.recv(100)
    except OSError as error:
        return type(error).__name__


@contextmanager
def shortage(set_limit: Callable[[int], None]) -> Iterator[list[int]]:
    """No descriptor is free but those given back from the list, until the block ends."""
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    set_limit(highest + 5)  # so that the list is never empty, holes or none below
    filler: list[int] = []
    try:
        with contextlib.suppress(OSError):
            while True:
                filler.append(os.dup(0))
        yield filler
    finally:
        for fd in filler:
            os.close(fd)
        set_limit(highest + 100)


# -- only while somebody takes -------------------------------------------------------------------


async def test_a_batch_is_bounded() -> None:
    """Somebody who takes one connection has ``untaken`` accepted at most, 16 unless told."""
    for untaken, options in ((16, {}), (3, {"untaken": 3}), (1, {"untaken": 1})):
        async with handleipc.listen("127.0.0.1", 0, **options) as server:
            with crowd(server, 40):
                (await anext(server)).close()
                await turns(50)
                assert server.waiting == server.connections == untaken - 1
                for _ in range(39):
                    (await anext(server)).close()
                assert server.waiting == 0


async def test_nobody_waits_nothing_is_accepted() -> None:
    """A server that was iterated and is no longer accepts nothing more."""
    async with handleipc.listen("127.0.0.1", 0) as server:
        with crowd(server, 1):
            (await anext(server)).close()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await anext(server)
        with crowd(server, 5):
            await turns(50)
            assert (server.waiting, server.connections) == (0, 0)
            for _ in range(5):
                (await anext(server)).close()


async def test_a_batch_needs_no_turn_of_the_loop() -> None:
    """What was accepted at once is given without going back to the loop."""
    async with handleipc.listen("127.0.0.1", 0) as server:
        with crowd(server, 10):
            (await anext(server)).close()
            for _ in range(9):
                with pytest.raises(StopIteration) as caught:
                    anext(server).__await__().__next__()
                caught.value.value.close()


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_shared_with_another_process(dialect: str) -> None:
    """One connection at a time, on both ends, once the listener was handed over."""
    async with handleipc.listen("127.0.0.1", 0) as server, joined(dialect) as (here, there):
        assert not server.shared
        await here.send("server", server)
        _, theirs = await there.recv()
        assert server.shared
        assert theirs.shared
        async with theirs:
            for one, other in ((server, theirs), (theirs, server)):
                with crowd(server, 10):
                    (await anext(one)).close()
                    await turns(50)
                    assert one.waiting == 0
                    for _ in range(9):
                        (await anext(other)).close()


async def test_the_other_process_gets_its_clients() -> None:
    """Who iterated once and then shared the listener takes no client from the other."""
    async with handleipc.listen("127.0.0.1", 0) as server, joined("native") as (here, there):
        with crowd(server, 1):
            (await anext(server)).close()
        await here.send("server", server)
        _, theirs = await there.recv()
        with crowd(server, 40) as clients:
            await turns(50)
            assert server.connections == 0
            serving = asyncio.create_task(answer_all(theirs))
            await until(lambda: theirs.waiting == 0 and not serving.done())
            for client in clients:
                client.shutdown(socket.SHUT_WR)
                assert await asyncio.to_thread(outcome, client) == b"served"
            theirs.close()
            assert await serving == 40


async def test_shared_by_other_means() -> None:
    """``shared`` can be set by who knows better, and a server that is sent is shared again."""
    async with handleipc.listen("127.0.0.1", 0) as server, joined("native") as (here, there):
        server.shared = True
        with crowd(server, 3):
            (await anext(server)).close()
            assert server.waiting == 0
            server.shared = False
            (await anext(server)).close()
            assert server.waiting == 1
        await here.send("server", server)
        _, theirs = await there.recv()
        theirs.close()
        assert server.shared


async def test_batches() -> None:
    """``batches`` gives all that were accepted each time, and ends as iteration does."""
    async with handleipc.listen("127.0.0.1", 0, untaken=4) as server:
        with crowd(server, 7):
            sizes = []
            async for batch in server.batches():
                sizes.append(len(batch))
                for connection in batch:
                    connection.close()
                if sum(sizes) == 4:
                    server.stop()
            assert sizes == [4, 3]


@pytest.mark.parametrize("how", ["socket", "detach"])
async def test_given_away(how: str, tmp_path) -> None:
    """The listener goes on with whoever took it; those accepted are still to be taken."""
    server = await handleipc.listen_unix(tmp_path / "socket")
    assert server.sockets[0].getsockname() == server.sockname
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(3)]
        for client in clients[:2]:
            client.connect(server.sockname)
        (await anext(server)).close()
        waiting = asyncio.create_task(server.wait_closed())
        sock = server.socket() if how == "socket" else socket.socket(fileno=server.detach())
        assert server.closed
        assert server.sockets == ()
        for take in (server.socket, server.detach):
            with pytest.raises(handleipc.DescriptorReleased, match="is closed"):
                take()
        assert await answer_all(server) == 1
        await asyncio.wait_for(waiting, 10)

        async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"served")
            writer.close()

        async with await asyncio.start_unix_server(serve, sock=sock) as other:
            clients[2].connect(server.sockname)
            assert await asyncio.to_thread(outcome, clients[2]) == b"served"
            other.close()


async def test_pause_and_resume() -> None:
    """While paused nothing is accepted; what was, is given; iteration then waits."""
    async with handleipc.listen("127.0.0.1", 0, untaken=2) as server:
        with crowd(server, 4):
            (await anext(server)).close()
            server.pause()
            server.pause()
            (await anext(server)).close()
            waiting = asyncio.create_task(anext(server))
            await turns(50)
            assert not waiting.done()
            assert server.connections == 0
            server.resume()
            (await waiting).close()
            (await anext(server)).close()
            waiting = asyncio.create_task(anext(server))
            await turns(50)
            server.pause()  # while somebody waits already
            with crowd(server, 1):
                await turns(50)
                assert not waiting.done()
                server.resume()
                server.resume()
                (await waiting).close()


# -- ends ----------------------------------------------------------------------------------------


async def test_stop_serves_everybody() -> None:
    """``stop`` accepts whom the kernel has, and iteration ends with the last of them."""
    server = await handleipc.listen("127.0.0.1", 0)
    address = server.sockname
    with crowd(server, 60) as clients:
        await (await anext(server)).end(b"served")
        server.stop()
        assert server.closed
        assert server.waiting == 59
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, timeout=5)
        server.stop()
        assert await answer_all(server) == 59
        for client in clients:
            assert await asyncio.to_thread(outcome, client) == b"served"
    async with asyncio.timeout(10):
        await server.wait_closed()


async def test_stop_from_within_the_iteration() -> None:
    """The loop that serves goes on by itself, and ends."""
    async with handleipc.listen("127.0.0.1", 0, untaken=1) as server:
        with crowd(server, 5):
            served = 0
            async for connection in server:
                connection.close()
                served += 1
                if served == 1:
                    server.stop()
            assert served == 5


async def test_stop_while_somebody_waits() -> None:
    """A wait for a connection ends, when nobody is there; paused or not."""
    for pause in (False, True):
        server = await handleipc.listen("127.0.0.1", 0)
        if pause:
            server.pause()
        waiting = asyncio.create_task(anext(server, "ended"))
        await turns()
        server.stop()
        assert await waiting == "ended"


async def test_stop_of_a_shared_listener() -> None:
    """Whom the kernel has is left to the other process, and nobody is reset."""
    server = await handleipc.listen("127.0.0.1", 0)
    async with joined("native") as (here, there):
        await here.send("server", server)
        _, theirs = await there.recv()
        with crowd(server, 5) as clients:
            server.stop()
            assert server.closed
            assert server.waiting == 0
            for client in clients:
                await (await anext(theirs)).end(b"served")
                assert await asyncio.to_thread(outcome, client) == b"served"
        theirs.close()


async def test_stop_after_a_transfer() -> None:
    """Who was given a listener for good stops it as its owner; not so if a third has it."""
    for third in (False, True):
        server = await handleipc.listen("127.0.0.1", 0)
        async with joined("native") as (here, there):
            if third:
                await here.send("server", server)
                _, other = await there.recv()
            with crowd(server, 5):
                await here.send("server", server, transfer=True)
                _, theirs = await there.recv()
                assert theirs.shared is third
                theirs.stop()
                assert theirs.waiting == (0 if third else 5)
                assert await answer_all(theirs) == (0 if third else 5)
                if third:
                    other.shared = False
                    other.stop()
                    assert await answer_all(other) == 5


async def test_stop_when_the_other_process_has_gone() -> None:
    """Whoever is left takes them all: a listener that nobody else has is not shared."""
    for last in ("sender", "receiver"):
        server = await handleipc.listen("127.0.0.1", 0)
        async with joined("native") as (here, there):
            await here.send("server", server)
            _, theirs = await there.recv()
        left, gone = (server, theirs) if last == "sender" else (theirs, server)
        gone.close()
        with crowd(server, 5):
            left.stop()
            assert await answer_all(left) == 5


async def test_stop_without_descriptors(descriptor_limit) -> None:
    """Without descriptors for all the listener stays until there are some, and nobody is reset."""
    server = await handleipc.listen("127.0.0.1", 0)
    error = server.on("error", Recorder())
    with crowd(server, 5) as clients:
        with shortage(descriptor_limit) as filler:
            for _ in range(2):
                os.close(filler.pop())
            server.stop()
            assert not server.closed
            assert server.waiting == 2
            await error.next(2)  # it tries again by itself
            server.stop()
            assert server.waiting == 2
        assert await answer_all(server) == 5
        assert server.closed
        for client in clients:
            assert await asyncio.to_thread(outcome, client) == b"served"


async def test_close_while_it_stops(descriptor_limit) -> None:
    """``close`` waits for no descriptors."""
    server = await handleipc.listen("127.0.0.1", 0)
    server.on("error", Recorder())
    with crowd(server, 5):
        with shortage(descriptor_limit):
            server.stop()
            assert not server.closed
            assert server.close() == 0
        assert await answer_all(server) == 0


async def test_close_says_how_many_it_closed() -> None:
    """Those accepted and not taken; nothing the second time."""
    server = await handleipc.listen("127.0.0.1", 0)
    with crowd(server, 10) as clients:
        (await anext(server)).close()
        assert "waiting=9" in repr(server)
        assert server.close() == 9
        assert server.close() == 0
        assert server.waiting == 0
        await until(lambda: all(ended(client) for client in clients))


async def test_close_after_stop() -> None:
    """``close`` closes whom ``stop`` accepted."""
    server = await handleipc.listen("127.0.0.1", 0)
    with crowd(server, 10):
        server.stop()
        assert server.close() == 10


async def test_a_step_of_close_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other step runs, and the failure is told."""
    server = await handleipc.listen("127.0.0.1", 0)
    close = Connection.close

    def close_badly(connection: Connection) -> None:
        close(connection)
        raise OSError(errno.EIO, "the wire is cut")

    with crowd(server, 5) as clients:
        (await anext(server)).close()
        waiting = asyncio.create_task(server.wait_closed())
        with monkeypatch.context() as patch:
            patch.setattr(Connection, "close", close_badly)
            patch.setattr(BoundPath, "remove", lambda _: 1 / 0)
            with pytest.raises(OSError, match="the wire is cut"):
                server.close()
        assert server.closed
        await asyncio.wait_for(waiting, 10)
        await until(lambda: all(ended(client) for client in clients))


async def test_the_path_cannot_be_removed(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the first step of an end, and the others run."""
    monkeypatch.setattr(BoundPath, "remove", lambda _: 1 / 0)
    for end in (Server.close, Server.stop):
        server = await handleipc.listen_unix(tmp_path / end.__name__)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(server.sockname)
            with pytest.raises(ZeroDivisionError):
                end(server)
            assert server.closed
            assert server.waiting == (end is Server.stop)
            server.close()
            assert ended(client)


def test_closed_after_its_loop() -> None:
    """A server outlives its loop, and closes what it has."""

    async def main() -> tuple[Server, socket.socket]:
        server = await handleipc.listen("127.0.0.1", 0)
        clients = [connect(server) for _ in range(3)]
        (await anext(server)).close()
        clients[0].close()
        clients[1].close()
        waiting = asyncio.create_task(server.wait_closed())
        await turns()
        waiting.cancel()
        return server, clients[2]

    server, client = asyncio.run(main())
    with client:
        assert server.close() == 2
        assert server.connections == 0
        assert ended(client)


# -- failures ------------------------------------------------------------------------------------


async def test_no_system_call_between_accept_and_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked of an accepted descriptor that could fail, and cost the whole batch."""
    async with handleipc.listen("127.0.0.1", 0) as server:
        monkeypatch.setattr(listener, "descriptor_kind", lambda _: 1 / 0)
        with crowd(server, 4):
            for _ in range(4):
                connection = await anext(server)
                assert connection.family == socket.AF_INET
                assert connection.peername
                connection.close()


async def test_family_of_what_is_accepted(tmp_path) -> None:
    """It is the listener's: also of IPv4 clients of a listener for both, and of Unix clients."""
    async with handleipc.listen(None, 0) as server:
        with (
            socket.create_connection(("127.0.0.1", server.sockname[1])) as client,
            (await anext(server)).socket() as sock,
        ):
            assert sock.family == socket.AF_INET6 if socket.has_dualstack_ipv6() else client.family
            assert sock.getpeername()[1] == client.getsockname()[1]
    async with handleipc.listen_unix(tmp_path / "socket") as server:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(server.sockname)
            with await anext(server) as connection:
                assert connection.family == socket.AF_UNIX
                assert connection.peername == ""


async def test_a_signal_in_the_middle_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever raises there: each accepted descriptor has an owner, or is closed."""
    async with handleipc.listen("127.0.0.1", 0) as server:
        with crowd(server, 5) as clients:
            server.shared = True  # one by one: then we call it ourselves
            (await anext(server)).close()
            opened, admit = [], server._admit

            def interrupted(fd: int, raw_peer: bytes) -> None:
                if len(opened) == 2:
                    os.close(fd)
                    raise KeyboardInterrupt
                opened.append(fd)
                admit(fd, raw_peer)

            monkeypatch.setattr(server, "_admit", interrupted)
            with pytest.raises(KeyboardInterrupt):
                server._accept(16)
            monkeypatch.undo()
            assert server.waiting == 2
            await until(lambda: sum(ended(client) for client in clients) == 3)
            for _ in range(2):
                (await anext(server)).close()


async def test_dropping_fails(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """A connection that cannot be dropped in peace costs the others nothing."""
    monkeypatch.setattr(logs.throttle, "_kinds", {})
    close = Connection.close

    def close_badly(connection: Connection) -> None:
        close(connection)
        raise OSError(errno.EIO, "the wire is cut")

    async with handleipc.listen("127.0.0.1", 0) as server:
        dropped = server.on("drop", Recorder())
        server.max_connections = 1
        with crowd(server, 4):
            with monkeypatch.context() as patch:
                patch.setattr(Connection, "close", close_badly)
                connection = await anext(server)
            assert (server.connections, dropped.calls) == (1, [])
            connection.close()
    assert "could not drop a connection: [Errno 5] the wire is cut" in caplog.text
    assert len(caplog.records) == 1


async def test_set_to_block_by_who_shares_it() -> None:
    """Accepting waits for nobody, whatever mode another process has set the listener to."""
    async with handleipc.listen("127.0.0.1", 0) as server:
        with socket.socket(fileno=os.dup(server.fileno())) as copy, crowd(server, 3):
            for _ in range(3):
                copy.setblocking(True)
                (await anext(server)).close()
            copy.setblocking(True)
            waiting = asyncio.create_task(anext(server, "ended"))
            await turns()
            server._on_readable()  # another process was faster
            assert not waiting.done()
            copy.setblocking(True)
            server.stop()
            assert await waiting == "ended"


async def test_shut_down_by_who_shares_it() -> None:
    """A listener that will never accept again ends the iteration with the reason."""
    async with handleipc.listen("127.0.0.1", 0) as server:
        with socket.socket(fileno=os.dup(server.fileno())) as copy:
            waiting = asyncio.create_task(anext(server))
            await turns()
            copy.shutdown(socket.SHUT_RDWR)
            async with asyncio.timeout(10):
                with pytest.raises(OSError, match="cannot accept any more") as caught:
                    await waiting
        assert caught.value.errno == errno.EINVAL
        assert server.closed
        with pytest.raises(StopAsyncIteration):
            await anext(server)


async def test_shut_down_before_it_stops() -> None:
    """``stop`` of such a listener ends too: the kernel has reset whoever waited."""
    server = await handleipc.listen("127.0.0.1", 0)
    server._sock.shutdown(socket.SHUT_RDWR)
    server.stop()
    assert server.closed
    assert await answer_all(server) == 0


async def test_one_line_a_minute(
    descriptor_limit, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of descriptors, one line says so, however often it was tried; then it goes on."""
    monkeypatch.setattr(logs.throttle, "_kinds", {})
    monkeypatch.setattr(listener, "ACCEPT_PAUSE", 0.001)
    async with handleipc.listen("127.0.0.1", 0) as server:
        with crowd(server, 1):
            with shortage(descriptor_limit):
                waiting = asyncio.create_task(anext(server))
                await until(lambda: logs.throttle._kinds.get("accept", (0, 0))[1] > 5)
            (await waiting).close()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().endswith("cannot accept: Too many open files (RLIMIT_NOFILE)")


async def test_pause_while_there_are_no_descriptors(descriptor_limit) -> None:
    """Whoever cancels the wait, or pauses, during a shortage is not overridden by its end."""
    async with handleipc.listen("127.0.0.1", 0) as server:
        error = server.on("error", Recorder())
        with crowd(server, 2):
            with shortage(descriptor_limit):
                waiting = asyncio.create_task(anext(server))
                await error.next()
                waiting.cancel()
                await asyncio.wait([waiting])
            await until(lambda: server._short is None)
            await turns(50)
            assert server.connections == 0
            (await anext(server)).close()
