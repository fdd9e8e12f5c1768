"""Connections that are closed on other threads, or by the collector: counted, and waited for."""

from __future__ import annotations

import asyncio
import gc
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import handleipc
from tests.asyncio.helpers import joined, turns
from tests.asyncio.test_server import connect


def elsewhere(function: Callable[[], object]) -> None:
    """Run it on another thread, to its end; what it raises is raised here."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


WAYS: dict[str, Callable[[Any], Callable[[], object]]] = {
    "connection": lambda connection: connection.close,
    "socket": lambda connection: connection.socket().close,
    "given away": lambda connection: lambda sock=connection.socket(): os.close(sock.detach()),
}


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("way", WAYS)
async def test_closed_on_a_thread(way: str, *, debug: bool) -> None:
    """``wait_closed`` wakes, though nothing else happens on the loop; the count is right at once."""
    loop = asyncio.get_running_loop()
    loop.set_debug(debug)
    server = await handleipc.listen("127.0.0.1", 0)
    with connect(server):
        close = WAYS[way](await anext(server))
        server.close()
        waiting = asyncio.create_task(server.wait_closed())
        await turns()
        thread = threading.Timer(0.05, close)  # when the loop sleeps
        thread.start()
        async with asyncio.timeout(20):
            await waiting
        thread.join()
        assert server.connections == 0


async def test_counted_at_once() -> None:
    """Whoever counts after a close has it in the count, whatever the loop has done meanwhile."""
    async with handleipc.listen("127.0.0.1", 0) as server:
        with connect(server), connect(server):
            one, two = await anext(server), await anext(server)
            elsewhere(one.close)
            assert server.connections == 1
            assert await server.get_connections() == 1
            two.close()
            assert server.connections == 0


async def test_collected_on_a_thread() -> None:
    """A connection that nobody closed is counted down wherever the collector finds it."""
    server = await handleipc.listen("127.0.0.1", 0)
    with connect(server):
        cycle: list[Any] = [await anext(server)]
        cycle.append(cycle)
        server.close()
        waiting = asyncio.create_task(server.wait_closed())
        await turns()
        gc.disable()
        try:
            del cycle

            def collect() -> None:
                with pytest.warns(ResourceWarning):
                    gc.collect()

            elsewhere(collect)
        finally:
            gc.enable()
        async with asyncio.timeout(20):
            await waiting


@pytest.mark.parametrize("debug", [False, True])
async def test_the_sender_learns_of_it(*, debug: bool) -> None:
    """A close on a thread of the receiver is reported, and ends the sender's wait."""
    asyncio.get_running_loop().set_debug(debug)
    async with joined("native") as (here, there):
        server = await handleipc.listen("127.0.0.1", 0)
        with connect(server):
            await here.send("c", await anext(server))
            _, connection = await there.recv()
            sock = connection.socket()
            server.close()
            waiting = asyncio.create_task(server.wait_closed())
            await turns()
            assert not waiting.done()
            thread = threading.Timer(0.05, sock.close)
            thread.start()
            async with asyncio.timeout(20):
                await waiting
            thread.join()


def test_closed_after_the_loop() -> None:
    """A loop that has ended is left alone, and the count is right all the same."""

    async def main() -> tuple[Any, Any, Any, Any]:
        server = await handleipc.listen("127.0.0.1", 0)
        client = connect(server)
        connection = await anext(server)
        return server, server.close(), client, connection

    server, _, client, connection = asyncio.run(main())
    with client:
        assert server.connections == 1
        elsewhere(connection.close)
        assert server.connections == 0


async def test_many_threads_many_reports(switching: None) -> None:
    """Eight threads close what two servers handed over: every report arrives, once."""
    jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def close_them() -> None:
        while (job := jobs.get()) is not None:
            job.close()

    threads = [threading.Thread(target=close_them) for _ in range(8)]
    for thread in threads:
        thread.start()
    async with (
        handleipc.listen("127.0.0.1", 0) as one,
        handleipc.listen("127.0.0.1", 0) as two,
        joined("native") as (here, there),
    ):
        try:
            for _ in range(300):
                for server in (one, two):
                    with connect(server):
                        await here.send("c", await anext(server))
                        _, connection = await there.recv()
                        jobs.put(connection.socket())
        finally:
            for _ in threads:
                jobs.put(None)
            for thread in threads:
                await asyncio.to_thread(thread.join)
        one.close()
        two.close()
        async with asyncio.timeout(20):
            await one.wait_closed()
            await two.wait_closed()
        assert (one._group.known, two._group.known) == (0, 0)
        assert (one._group.moved, two._group.moved) == (0, 0)
