"""Ten thousand connections over several processes, of which some die: nothing is left of them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import resource
import signal
import socket
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import handleipc
from handleipc.asyncio.tracking import TrackingDriver
from tests.asyncio.helpers import joined, until

pytestmark = pytest.mark.slow

CHILDREN = 4
BATCH = 2000
BATCHES = 5
# What connect() may have waiting before we accept: below the backlog.
AT_ONCE = 200

HOLDER = """
    import asyncio, handleipc, os

    class Held(asyncio.Protocol):
        "Ends with its client."

    async def main():
        parent = await handleipc.parent()
        before = len(os.listdir("/proc/self/fd"))
        held, started = {}, []
        async for message, handle in parent:
            if handle is not None:
                if message % 2:
                    started.append((await handle.start(Held))[0])
                else:
                    held[message] = handle
            elif "close" in message:
                for number in message["close"]:
                    held.pop(number).close()
            elif "report" in message:
                started = [one for one in started if not one.is_closing()]
                await asyncio.sleep(0)
                await parent.send(
                    [len(held), len(started), len(os.listdir("/proc/self/fd")) - before,
                     len(parent.lists)]
                )
        for one in held.values():
            one.close()

    asyncio.run(main())
"""

Program = Callable[[str, str], Path]


@pytest.fixture
def many_descriptors() -> Any:
    """As many descriptors as there may be, at most 20,000; children inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(20_000, hard)
    if wanted < 3 * BATCH:
        pytest.skip("RLIMIT_NOFILE is too low")
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Crowd:
    """A server, its clients by number, and the children that hold the other ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.children: list[handleipc.Child] = []
        self.server: handleipc.Server
        self.clients: dict[int, socket.socket] = {}
        self.holder: dict[int, handleipc.Child | None] = {}
        self.here: dict[int, handleipc.Connection] = {}
        self.next_number = 0

    async def start(self) -> None:
        self.server = await handleipc.listen("127.0.0.1", 0)
        for _ in range(CHILDREN):
            self.children.append(await handleipc.fork(self.path))

    async def connect(self, count: int) -> list[tuple[int, handleipc.Connection]]:
        """Connect so many clients and accept them, a few at a time."""
        accepted = []
        for begin in range(0, count, AT_ONCE):
            arrived: dict[Any, socket.socket] = {}
            for _ in range(min(AT_ONCE, count - begin)):
                client = socket.create_connection(self.server.sockname)
                arrived[client.getsockname()] = client
            while arrived:
                connection = await anext(self.server)
                number, self.next_number = self.next_number, self.next_number + 1
                self.clients[number] = arrived.pop(connection.peername)
                self.here[number] = connection
                accepted.append((number, connection))
        return accepted

    async def hand_out(self, accepted: list[tuple[int, Any]], rng: random.Random) -> None:
        for number, connection in accepted:
            child = rng.choice(self.children)
            if not child.send_nowait(number, connection):
                await child.drain()
            self.holder[number] = child
            del self.here[number]
        for child in self.children:
            await child.flush()

    def alive_in(self, child: handleipc.Child) -> int:
        return sum(holder is child for holder in self.holder.values())

    async def close_some(self, numbers: list[int], rng: random.Random) -> None:
        """Close these from one side or the other; the child closes only what it holds unread."""
        orders: dict[handleipc.Child, list[int]] = {}
        for number in numbers:
            child = self.holder.pop(number)
            self.clients.pop(number).close()
            if number % 2 == 0:
                orders.setdefault(child, []).append(number)
            if rng.random() < 0.01:
                await asyncio.sleep(0)
        for child, closed in orders.items():
            await child.send({"close": closed})

    async def replace(self, rng: random.Random) -> None:
        """Kill a child at random, and start another in its place."""
        index = rng.randrange(len(self.children))
        victim = self.children[index]
        victim.kill(signal.SIGKILL)
        await victim.wait()
        await victim.wait_disconnected()
        for number in [n for n, child in self.holder.items() if child is victim]:
            del self.holder[number]
            self.clients.pop(number).close()
        self.children[index] = await handleipc.fork(self.path)

    async def count(self) -> int:
        count = await self.server.get_connections()
        assert count.missing == ()
        return count

    async def counts_are(self, expected: int) -> None:
        """Both ways of counting come to this: asking, and what was reported."""
        async with asyncio.timeout(20):
            while (count := await self.count()) != expected:
                assert count > expected
                await asyncio.sleep(0.005)
        await until(lambda: self.server._group.known == expected, "what is known")

    async def close(self) -> None:
        self.server.close()
        for child in self.children:
            child.disconnect()
        for child in self.children:
            assert await child.wait() == 0
            await child.wait_disconnected()


def memory() -> int:
    """Return the bytes that lines of handleipc have allocated and that live."""
    gc.collect()
    wanted = tracemalloc.Filter(True, str(Path(handleipc.__file__).parent / "*"))
    snapshot = tracemalloc.take_snapshot().filter_traces([wanted])
    return sum(trace.size for trace in snapshot.traces)


async def test_ten_thousand(program: Program, many_descriptors: None) -> None:
    """Closed in any order by any side, with children killed and replaced: all counts end at 0."""
    rng = random.Random(7)
    crowd = Crowd(program("holder.py", HOLDER))
    await crowd.start()
    for batch in range(BATCHES):
        await crowd.hand_out(await crowd.connect(BATCH), rng)
        await crowd.counts_are(len(crowd.holder))
        numbers = list(crowd.holder)
        rng.shuffle(numbers)
        await crowd.close_some(numbers[: BATCH // 2], rng)
        if batch % 2:
            await crowd.replace(rng)
        await crowd.counts_are(len(crowd.holder))
        if batch == 2:
            await crowd.replace(rng)
    numbers = list(crowd.holder)
    rng.shuffle(numbers)
    await crowd.close_some(numbers, rng)
    await crowd.counts_are(0)
    assert (crowd.server.connections, crowd.server._group.known) == (0, 0)
    assert not crowd.clients
    for child in crowd.children:
        await child.send({"report": True})
        report, _ = await child.recv()
        assert report == [0, 0, 0, 0]
    await crowd.close()
    await asyncio.wait_for(crowd.server.wait_closed(), 10)
    assert [len(child.lists) for child in crowd.children] == [0] * CHILDREN


async def test_children_killed_while_they_are_given_connections(
    program: Program, many_descriptors: None
) -> None:
    """With handles on their way, each comes back or is gone, and the counts say which."""
    rng = random.Random(11)
    crowd = Crowd(program("holder.py", HOLDER))
    await crowd.start()
    returned: list[handleipc.Connection] = []

    def gather(child: handleipc.Child) -> None:
        child.on("undelivered", lambda _, handle, __: returned.append(handle))

    for child in crowd.children:
        gather(child)
    for _ in range(4):
        accepted = await crowd.connect(BATCH // 4)
        crowd.here.clear()
        victim = rng.randrange(CHILDREN)
        kill_at = rng.randrange(len(accepted))
        for i, (number, connection) in enumerate(accepted):
            child = rng.choice(crowd.children)
            with contextlib.suppress(handleipc.ChannelClosed):
                child.send_nowait(number, connection)
                connection = None
            if connection is not None:
                returned.append(connection)
            if i == kill_at:
                crowd.children[victim].kill(signal.SIGKILL)
            if not i % 20:
                await asyncio.sleep(0)
        dead = crowd.children[victim]
        await dead.wait()
        await dead.wait_disconnected()
        crowd.children[victim] = await handleipc.fork(crowd.path)
        gather(crowd.children[victim])
        for child in crowd.children:
            await child.flush()
        there = 0
        for child in crowd.children:
            await child.send({"report": True})
            held, started, _, _ = (await child.recv())[0]
            there += held + started
        assert await crowd.count() == there + len(returned)
        assert crowd.server.connections == len(returned)
        while returned:
            returned.pop().close()
        assert await crowd.count() == there
    while crowd.clients:
        crowd.clients.popitem()[1].close()
    await crowd.close()
    await asyncio.wait_for(crowd.server.wait_closed(), 10)
    assert crowd.server._group.known == 0


async def test_memory(
    program: Program, many_descriptors: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A connection elsewhere costs no memory here, one here little; afterwards all is as before."""
    rng = random.Random(3)
    crowd = Crowd(program("holder.py", HOLDER))
    tracemalloc.start(1)
    try:
        await crowd.start()
        # Once around, so that what is made once is made.
        await crowd.hand_out(await crowd.connect(BATCH), rng)
        await crowd.close_some(list(crowd.holder), rng)
        await crowd.counts_are(0)
        before = memory()
        accepted = await crowd.connect(BATCH)
        here = memory() - before
        await crowd.hand_out(accepted, rng)
        accepted.clear()
        await crowd.counts_are(BATCH)
        away = memory() - before
        await crowd.close_some(list(crowd.holder), rng)
        await crowd.counts_are(0)
        after = memory() - before
    finally:
        tracemalloc.stop()
    with capsys.disabled():
        print(
            f"\nbytes per tracked connection: {here / BATCH:.0f} here, {away / BATCH:.1f} elsewhere;"
            f" {after} bytes left of {BATCH}"
        )
    assert here < BATCH * 600
    assert away < BATCH * 16
    assert after < 16_384
    await crowd.close()
    await crowd.server.wait_closed()


async def test_count_costs_by_process(
    program: Program, many_descriptors: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``get_connections`` asks each process once, however many connections it has."""
    sent: list[Any] = []
    send_internal = TrackingDriver._send_internal

    def counted(self: TrackingDriver, message: Any) -> None:
        sent.append(message["cmd"])
        send_internal(self, message)

    monkeypatch.setattr(TrackingDriver, "_send_internal", counted)
    rng = random.Random(5)
    crowd = Crowd(program("holder.py", HOLDER))
    await crowd.start()
    asked = []
    for more in (CHILDREN * 10, BATCH):
        await crowd.hand_out(await crowd.connect(more), rng)
        await crowd.counts_are(len(crowd.holder))
        sent.clear()
        assert await crowd.count() == len(crowd.holder)
        asked.append(sent.copy())
    assert asked == [["NODE_SOCKET_GET_COUNT"] * CHILDREN] * 2
    while crowd.clients:
        crowd.clients.popitem()[1].close()
    await crowd.close()
    await crowd.server.wait_closed()


async def test_counted_while_handing_out(program: Program, many_descriptors: None) -> None:
    """Each count that is asked for meanwhile has every connection exactly once."""
    rng = random.Random(13)
    crowd = Crowd(program("holder.py", HOLDER))
    await crowd.start()
    accepted = await crowd.connect(AT_ONCE)
    counting = []
    for number, connection in accepted:
        counting.append(asyncio.create_task(crowd.count()))
        await rng.choice(crowd.children).send(number, connection)
    counts = [await one for one in counting]
    while crowd.clients:
        crowd.clients.popitem()[1].close()
    await crowd.close()
    await crowd.server.wait_closed()
    assert set(counts) == {AT_ONCE}


async def test_dispatched_again() -> None:
    """Workers that give connections back for another to take leave all counts right."""
    async with joined("native") as (to_one, one), joined("native") as (to_two, two):
        server = await handleipc.listen("127.0.0.1", 0)
        with contextlib.ExitStack() as stack:
            there = []
            for to, end in ((to_one, one), (to_two, two)):
                stack.enter_context(socket.create_connection(server.sockname))
                await to.send("take", await anext(server))
                there.append((await end.recv())[1])
            first, second = there
            await one.send("full", first)
            _, back = await to_one.recv()
            await to_two.send("take", back)
            _, third = await two.recv()
            try:
                count = await server.get_connections(timeout=2)
                assert (count, count.missing) == (2, ())
                server.close()
                waiting = asyncio.create_task(server.wait_closed())
                second.close()
                count = await server.get_connections(timeout=2)
                assert (count, count.missing) == (1, ())
                assert not waiting.done()
                third.close()
                await asyncio.wait_for(waiting, 5)
            finally:
                server.close()
                for connection in (second, third):
                    connection.close()


async def test_server_ends_while_it_counts() -> None:
    """A count under way when the last connection closes is answered, and does not time out."""
    async with joined("native") as (here, there):
        server = await handleipc.listen("127.0.0.1", 0)
        with socket.create_connection(server.sockname):
            await here.send("take", await anext(server))
            _, connection = await there.recv()
            server.close()
            await asyncio.sleep(0)
            connection.close()
            count = await server.get_connections(timeout=2)
            assert (count, count.missing) == (0, ())
            await asyncio.wait_for(server.wait_closed(), 5)
