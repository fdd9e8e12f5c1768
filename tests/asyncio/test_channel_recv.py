"""``recv``, iteration and ``batches``: what they promise to the receiver."""

from __future__ import annotations

import asyncio

import pytest

from handleipc import (
    ChannelBroken,
    ChannelBusy,
    ChannelClosed,
    Limits,
    RemoteProtocolError,
)
from tests.asyncio.helpers import (
    Recorder,
    both_dialects,
    clients,
    connection,
    joined,
    raw_peer,
    turns,
    works,
)


@both_dialects
async def test_recv_waits(dialect: str) -> None:
    """``recv`` waits for the next message."""
    async with joined(dialect) as (a, b):
        waiting = asyncio.create_task(b.recv())
        await turns()
        assert not waiting.done()
        await a.send("now")
        assert await waiting == ("now", None)


@both_dialects
async def test_null_is_a_message(dialect: str) -> None:
    """The message null arrives as None, and is not the end."""
    async with joined(dialect) as (a, b):
        with clients(1) as (sockets, served):
            a.send_nowait(None)
            a.send_nowait(None, served[0])
            assert await b.recv() == (None, None)
            message, handle = await b.recv()
            assert message is None
            assert works(sockets[0], handle)
            handle.close()


@both_dialects
async def test_iteration_ends_at_disconnect(dialect: str) -> None:
    """``async for`` gives every message, and ends when the peer disconnects."""
    async with joined(dialect) as (a, b):
        for n in range(5):
            a.send_nowait(n)
        a.disconnect()
        assert [message async for message, _ in b] == [0, 1, 2, 3, 4]
        assert [message async for message, _ in b] == []


@both_dialects
async def test_iteration_ends_at_own_disconnect(dialect: str) -> None:
    """A waiting iteration ends when this end disconnects."""
    async with joined(dialect) as (_, b):
        waiting = asyncio.create_task(anext(b, "ended"))
        await turns()
        b.disconnect()
        assert await waiting == "ended"


@both_dialects
async def test_break_loses_nothing(dialect: str) -> None:
    """A channel is its own iterator: after a ``break`` iteration goes on with the next message."""
    async with joined(dialect) as (a, b):
        assert aiter(b) is b
        for n in range(4):
            a.send_nowait(n)
        async for message, _ in b:
            assert message == 0
            break
        assert await b.recv() == (1, None)
        async for message, _ in b:
            assert message == 2
            break
        assert await b.recv() == (3, None)


@both_dialects
async def test_cancelled_recv_has_taken_nothing(dialect: str) -> None:
    """A cancelled ``recv`` takes nothing, however late it is cancelled."""
    async with joined(dialect) as (a, b):
        taken = []
        for n in range(30):
            waiting = asyncio.create_task(b.recv())
            await asyncio.sleep(0)
            a.send_nowait(n)
            for _ in range(n % 6):
                await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait([waiting])
            if not waiting.cancelled():
                taken.append(waiting.result()[0])
        while len(taken) < 30:
            taken.append((await b.recv())[0])
        assert taken == list(range(30))


@both_dialects
async def test_recv_after_a_timeout(dialect: str) -> None:
    """``recv`` under a timeout can be called again."""
    async with joined(dialect) as (a, b):
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(b.recv(), 0.005)
        await a.send("late")
        assert await b.recv() == ("late", None)


@both_dialects
async def test_second_recv_is_busy(dialect: str) -> None:
    """Each message goes to one consumer: a second concurrent ``recv`` raises ``ChannelBusy``."""
    async with joined(dialect) as (a, b):
        first = asyncio.create_task(b.recv())
        await turns()
        with pytest.raises(ChannelBusy):
            await b.recv()
        with pytest.raises(ChannelBusy):
            await anext(b)
        with pytest.raises(ChannelBusy):
            await anext(b.batches())
        await a.send("x")
        assert await first == ("x", None)


@both_dialects
async def test_recv_with_a_listener_is_busy(dialect: str) -> None:
    """With a ``"message"`` listener ``recv`` and iteration raise ``ChannelBusy``."""
    async with joined(dialect) as (a, b):
        listener = b.on("message", Recorder())
        for attempt in (b.recv, b.__anext__, b.batches().__anext__):
            with pytest.raises(ChannelBusy, match="listener"):
                await attempt()
        b.off("message", listener)
        await a.send("x")
        assert await b.recv() == ("x", None)


@both_dialects
async def test_listener_while_recv_waits_is_busy(dialect: str) -> None:
    """A ``"message"`` listener cannot be added while ``recv`` waits; other listeners can."""
    async with joined(dialect) as (a, b):
        waiting = asyncio.create_task(b.recv())
        await turns()
        for add in (b.on, b.once):
            with pytest.raises(ChannelBusy):
                add("message", Recorder())
        b.on("internal_message", Recorder())
        b.on("disconnect", Recorder())
        await a.send("x")
        assert await waiting == ("x", None)
        got = b.on("message", Recorder())
        await a.send("y")
        assert await got.next() == [("y", None)]


@both_dialects
async def test_batches(dialect: str) -> None:
    """``batches()`` gives lists of everything that has arrived, and ends at disconnect."""
    async with joined(dialect) as (a, b):
        with clients(3) as (sockets, served):
            for n in range(100):
                a.send_nowait(n, served[n // 40] if n % 40 == 0 else None)
            flushed = asyncio.create_task(a.flush())
            batches = []
            got = []
            async for batch in b.batches():
                assert batch
                batches.append(len(batch))
                got += batch
                if len(got) == 100:
                    a.disconnect()
            await flushed
            assert [message for message, _ in got] == list(range(100))
            assert len(batches) < 50
            for n, (_, handle) in enumerate(got):
                assert (handle is not None) == (n % 40 == 0)
                if handle is not None:
                    assert works(sockets[n // 40], handle)
                    handle.close()


async def test_batches_take_more_than_ready() -> None:
    """``batches()`` takes whatever has arrived: all of it is acknowledged, beyond ``ready`` too."""
    async with joined("native", peer_limits=Limits(ready=2)) as (a, b):
        with clients(20) as (_, served):
            batches = b.batches()
            first = asyncio.create_task(anext(batches))
            await turns()
            for n, each in enumerate(served):
                a.send_nowait(n, each)
            batch = await first
            assert len(batch) == 20
            await a.flush()
            for _, handle in batch:
                handle.close()


@both_dialects
async def test_batches_can_be_left(dialect: str) -> None:
    """After leaving ``batches()``, ``recv`` goes on with what it did not give."""
    async with joined(dialect) as (a, b):
        a.send_nowait(1)
        async for batch in b.batches():
            assert batch == [(1, None)]
            break
        a.send_nowait(2)
        assert await b.recv() == (2, None)


@both_dialects
async def test_recv_after_the_peer_disconnected(dialect: str) -> None:
    """``recv`` first gives what arrived, then raises ``ChannelBroken``, again and again."""
    async with joined(dialect) as (a, b):
        a.send_nowait("last")
        a.disconnect()
        await b.wait_disconnected()
        assert await b.recv() == ("last", None)
        for _ in range(2):
            with pytest.raises(ChannelBroken):
                await b.recv()


@both_dialects
async def test_recv_after_own_disconnect(dialect: str) -> None:
    """Messages that arrived before ``disconnect`` stay readable, then ``recv`` says who closed."""
    async with joined(dialect) as (a, b):
        first = asyncio.create_task(b.recv())
        a.send_nowait("first")
        a.send_nowait("arrived")
        assert await first == ("first", None)
        b.disconnect()
        await b.wait_disconnected()
        assert await b.recv() == ("arrived", None)
        with pytest.raises(ChannelClosed) as caught:
            await b.recv()
        assert not isinstance(caught.value, ChannelBroken)


async def test_iteration_raises_the_error_of_the_peer() -> None:
    """A peer that breaks the protocol ends iteration with ``RemoteProtocolError``."""
    async with raw_peer() as (a, peer):
        a.on("error", Recorder())
        peer.write("good", b"not json\n")
        with pytest.raises(RemoteProtocolError):
            async for message, _ in a:
                assert message == "good"


@both_dialects
async def test_untaken_handles_wait(dialect: str) -> None:
    """A handle that arrived waits in its place until it is taken."""
    async with joined(dialect) as (a, b):
        client, served = connection()
        with client:
            await a.send("handle", served)
            await a.send("behind")
            message, handle = await b.recv()
            assert message == "handle"
            assert works(client, handle)
            handle.close()
            assert await b.recv() == ("behind", None)


@both_dialects
async def test_both_directions_at_once(dialect: str) -> None:
    """Both ends send and receive at the same time, handles in both directions."""

    async def send_all(channel, served) -> None:
        for n, each in enumerate(served):
            await channel.send(n, each)

    async def take_all(channel, sockets) -> None:
        for n, client in enumerate(sockets):
            message, handle = await channel.recv()
            assert message == n
            assert works(client, handle)
            handle.close()

    async with joined(dialect) as (a, b):
        with clients(50) as (ours, mine), clients(50) as (theirs, yours):
            async with asyncio.TaskGroup() as group:
                group.create_task(send_all(a, mine))
                group.create_task(send_all(b, yours))
                group.create_task(take_all(b, ours))
                group.create_task(take_all(a, theirs))
