"""Channels belong to the thread of their loop, and end with it: other uses are refused in words."""

from __future__ import annotations

import asyncio
import inspect
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

import handleipc
from handleipc import Channel, ChannelBusy, ChannelClosed
from tests.asyncio.helpers import ECHO, both_dialects, connection, join, joined, take_rest, until
from tests.conftest import LOOPS

loops = pytest.mark.parametrize("loop", list(LOOPS))


def uses(channel: Any) -> dict[str, Callable[[], Any]]:
    return {
        "send": lambda: channel.send("x"),
        "send_nowait": lambda: channel.send_nowait("x"),
        "recv": channel.recv,
        "iteration": lambda: anext(channel),
        "batches": lambda: anext(channel.batches()),
        "drain": channel.drain,
        "flush": channel.flush,
        "disconnect": channel.disconnect,
        "abort": channel.abort,
        "wait_disconnected": channel.wait_disconnected,
    }


def outcomes(channel: Any, loop: str | None, wanted: type[Exception]) -> dict[str, str]:
    """Use a channel in a loop of its own, or in none, and return what was not refused."""
    wrong = {}
    for name, use in uses(channel).items():

        async def call(use: Callable[[], Any] = use) -> Any:
            async with asyncio.timeout(10):
                result = use()
                return await result if inspect.isawaitable(result) else result

        try:
            if loop is not None:
                with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
                    result = runner.run(call())
            else:
                result = use()
                if inspect.isawaitable(result):
                    result.send(None)
        except wanted as error:
            if wanted is ChannelBusy and "loop.call_soon_threadsafe" not in str(error):
                wrong[name] = str(error)
        except Exception as error:
            wrong[name] = repr(error)
        else:
            wrong[name] = f"returned {result!r}"
    return wrong


@both_dialects
@pytest.mark.parametrize("has_loop", [True, False])
async def test_other_threads_are_refused(
    dialect: str, has_loop: bool, event_loop_name: str
) -> None:
    """From another thread, with a loop or without, each use says how to go about it."""
    async with joined(dialect) as (a, b):
        b.send_nowait(1)
        b.send_nowait(2)
        assert await a.recv() == (1, None)
        await until(lambda: a._protocol.incoming.ready)  # there is one to be taken at once
        loop = event_loop_name if has_loop else None
        assert await asyncio.to_thread(outcomes, a, loop, ChannelBusy) == {}
        assert await a.recv() == (2, None)
        a.send_nowait("last")
        assert await b.recv() == ("last", None)
        assert a.connected


async def test_refused_handle_stays_the_callers() -> None:
    """A handle that was given in another thread was not taken."""
    client, served = connection()
    with client, served:
        async with joined("native") as (a, _):

            def send() -> None:
                with pytest.raises(ChannelBusy):
                    a.send_nowait("x", served)

            await asyncio.to_thread(send)
            assert not served.closed
            served.fileno()


async def test_ways_that_the_refusal_names() -> None:
    """``call_soon_threadsafe`` and ``run_coroutine_threadsafe`` send at once from any thread."""
    async with joined("native") as (a, b):
        loop = asyncio.get_running_loop()

        def other() -> None:
            loop.call_soon_threadsafe(a.send_nowait, "first")
            asyncio.run_coroutine_threadsafe(a.send("second"), loop).result(20)

        thread = threading.Thread(target=other)
        thread.start()
        async with asyncio.timeout(20):
            assert [(await b.recv())[0] for _ in range(2)] == ["first", "second"]
        thread.join()


@loops
@both_dialects
@pytest.mark.parametrize("end", ["disconnected", "left open"])
def test_after_the_loop(dialect: str, loop: str, end: str) -> None:
    """After its loop has ended a channel takes nothing any more, and says so, in any loop."""

    async def main() -> tuple[Channel, Channel]:
        a, b = join(dialect)
        await a.send("in the loop")
        assert await b.recv() == ("in the loop", None)
        if end == "disconnected":
            a.disconnect()
        return a, b

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        ends = runner.run(main())
    a, _ = ends
    try:
        with pytest.raises(ChannelClosed):
            a.send_nowait("too late")
        if end == "left open":
            for name in ("send", "recv", "iteration", "flush", "drain", "wait_disconnected"):

                async def call(name: str = name) -> None:
                    with pytest.raises(ChannelClosed, match="event loop of this channel"):
                        await uses(a)[name]()

                with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
                    runner.run(call())
    finally:
        for channel in ends:
            channel.abort()


@loops
def test_child_after_its_loop(program, loop: str) -> None:
    """A child's channel ends with its loop; the process can be waited for in the next."""

    async def first() -> Any:
        child = await handleipc.fork(program("echo.py", ECHO))
        await child.send("a")
        assert await child.recv() == ("a", None)
        return child

    async def second(child: Any) -> None:
        for name in ("send", "recv"):
            with pytest.raises(ChannelClosed, match="event loop that started this child has ended"):
                await uses(child)[name]()
        with pytest.raises(ChannelClosed):
            child.send_nowait("x")
        async with asyncio.timeout(20):
            await child.wait_disconnected()
            assert await child.wait() == 0
        assert child.returncode == 0

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        child = runner.run(first())
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(second(child))


LATE = """
import asyncio, atexit, sys
import handleipc

async def main():
    parent = await handleipc.parent()
    await parent.send("in the loop")
    return parent

def late():
    try:
        parent.send_nowait("late")
    except handleipc.ChannelClosed as error:
        print(error)

if sys.argv[2] == "uvloop":
    import uvloop
    parent = uvloop.run(main())
else:
    parent = asyncio.run(main())
if sys.argv[1] == "at exit":
    atexit.register(late)
else:
    late()
"""


@loops
@pytest.mark.parametrize("when", ["right after", "at exit"])
def test_child_that_reports_too_late(program, when: str, loop: str) -> None:
    """What a child sends after ``asyncio.run`` raises there, rather than being lost."""

    async def main() -> None:
        child = await handleipc.fork(
            program("late.py", LATE), when, loop, stdout=asyncio.subprocess.PIPE
        )
        async with asyncio.timeout(30):
            assert [message async for message, _ in child] == ["in the loop"]
            told = await child.stdout.read()
            assert await child.wait() == 0
        assert b"event loop of this channel has ended" in told

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(main())


@both_dialects
async def test_channels_in_two_threads(dialect: str) -> None:
    """Each thread may have loops and channels of its own, at the same time."""

    async def talk(number: int) -> list[Any]:
        a, b = join(dialect)
        got = []
        for n in range(200):
            client, served = connection()
            with client:
                sending = asyncio.ensure_future(a.send([number, n], served))
                message, handle = await b.recv()
                handle.close()
                await sending
            got.append(message)
        a.disconnect()
        await b.wait_disconnected()
        assert await take_rest(b) == []
        return got

    results = await asyncio.gather(
        *(asyncio.to_thread(asyncio.run, talk(number)) for number in range(3))
    )
    assert results == [[[number, n] for n in range(200)] for number in range(3)]


@loops
def test_another_loop_in_this_thread(loop: str) -> None:
    """Two loops that run by turns on one thread do not use each other's channels."""
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:

        async def make() -> tuple[Channel, Channel]:
            return join("native")

        a, b = runner.run(make())
        assert outcomes(a, loop, ChannelBusy) == {}
        a.send_nowait("while no loop runs")  # in the thread of its own, which leaves it then

        async def take() -> None:
            assert await b.recv() == ("while no loop runs", None)
            for channel in (a, b):
                channel.abort()

        runner.run(take())


@loops
def test_loop_that_was_closed_without_a_word(monkeypatch, loop: str) -> None:
    """A loop closed by hand leaves no use that hangs, and nothing unraisable is reported."""
    unraisable: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    runner = asyncio.Runner(loop_factory=LOOPS[loop])
    closed = runner.get_loop()
    ends: list[Channel] = []

    async def main() -> None:
        ends.extend(join("native"))
        await ends[0].send("x")

    closed.run_until_complete(main())
    closed.close()
    a, _ = ends
    with pytest.raises(ChannelClosed):
        a.send_nowait("x")
    for channel in ends:
        channel.abort()
        assert not channel.connected
    assert unraisable == []


@loops
def test_server_after_its_loop(loop: str) -> None:
    """A server goes on in the next loop: it accepts there, counts, and can be waited for."""

    async def first() -> tuple[Any, Any, Any]:
        server = await handleipc.listen("127.0.0.1", 0)
        client = socket.create_connection(server.sockname)
        kept, closed = client, socket.create_connection(server.sockname)
        served = [await anext(server), await anext(server)]
        waiting = asyncio.ensure_future(server.wait_closed())
        await asyncio.sleep(0)
        waiting.cancel()
        closed.close()
        return server, kept, served

    async def second(server: Any, served: Any) -> None:
        with socket.create_connection(server.sockname):
            third = await anext(server)
            assert await server.get_connections() == 2
            server.close()
            third.close()
        served.close()
        async with asyncio.timeout(20):
            await server.wait_closed()

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        server, kept, (one, other) = runner.run(first())
    with kept:
        other.close()  # between the loops
        with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
            runner.run(second(server, one))


@loops
def test_server_of_a_living_loop(loop: str) -> None:
    """A server of a loop that is not closed is refused to others, in words."""

    async def use(server: Any) -> None:
        for call in (server.__anext__, server.wait_closed, server.get_connections):
            with pytest.raises(ChannelBusy, match="another event loop"):
                await call()
        with pytest.raises(ChannelBusy):
            await anext(server.batches())

    async def make() -> Any:
        return await handleipc.listen("127.0.0.1", 0)

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        server = runner.run(make())
        with asyncio.Runner(loop_factory=LOOPS[loop]) as other:
            other.run(use(server))
        server.close()
