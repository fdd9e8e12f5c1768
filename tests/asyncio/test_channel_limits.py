"""Every queue of a channel is bounded, and two ends that only send do not deadlock."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
import tracemalloc

import pytest

from handleipc import ChannelBusy, FileDescriptor, HandleNotDelivered, Limits
from tests.asyncio.helpers import (
    Recorder,
    ack,
    both_dialects,
    clients,
    connection,
    joined,
    raw_peer,
    turns,
    until,
    works,
)

# -- who sends before it reads -------------------------------------------------------------------


@both_dialects
async def test_both_ends_send_before_they_read(dialect: str) -> None:
    """Two ends that both await 50,000 sends before they read do not deadlock."""
    count = 50_000

    async def run(channel) -> None:
        for n in range(count):
            await channel.send(n)
        for n in range(count):
            assert await channel.recv() == (n, None)

    async with joined(dialect) as (a, b):
        await asyncio.gather(run(a), run(b))


@both_dialects
async def test_both_ends_flush_before_they_read(dialect: str) -> None:
    """The same with ``send_nowait`` and ``flush``: 50,000 messages of 100 bytes each way."""
    count = 50_000

    async def run(channel) -> None:
        for n in range(count):
            channel.send_nowait([n, "x" * 90])
        await channel.flush()
        for n in range(count):
            assert (await channel.recv())[0][0] == n

    async with joined(dialect) as (a, b):
        await asyncio.gather(run(a), run(b))


@both_dialects
async def test_both_ends_hand_over_before_they_read(dialect: str) -> None:
    """Two ends that both await ``send(handle)`` before they read do not deadlock."""
    async with joined(dialect) as (a, b):
        with clients(10) as (_, first), clients(10) as (_, second):

            async def run(channel, served) -> None:
                for n, each in enumerate(served):
                    await channel.send(n, each)
                for n in range(10):
                    message, handle = await channel.recv()
                    handle.close()
                    assert message == n

            await asyncio.gather(run(a, first), run(b, second))


@both_dialects
async def test_held_hard_gives_channel_busy(dialect: str) -> None:
    """At ``held_hard`` a waiting ``send`` gets ``ChannelBusy`` "nobody reads this channel"."""
    limits = Limits(held_bytes=10_000, held_hard=200_000, bytes=100_000)

    async def flood(channel) -> None:
        for _ in range(1000):
            await channel.send("x" * 10_000)

    async with joined(dialect, limits, limits) as (a, b):
        tasks = [asyncio.create_task(flood(channel)) for channel in (a, b)]
        done, _ = await asyncio.wait(tasks, timeout=20, return_when=asyncio.FIRST_EXCEPTION)
        assert done
        errors = [task.exception() for task in done]
        assert any(
            isinstance(e, ChannelBusy) and "nobody reads this channel" in str(e) for e in errors
        )
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for channel in (a, b):
            assert channel._protocol.incoming.deliveries.bytes <= 2 * limits.held_hard
            assert channel.connected


@both_dialects
@pytest.mark.parametrize("wait", ["flush", "drain"])
async def test_held_hard_ends_flush_and_drain(dialect: str, wait: str) -> None:
    """``flush`` and ``drain`` get ``ChannelBusy`` likewise, and can be called again."""
    limits = Limits(held_bytes=10_000, held_hard=200_000, bytes=100_000)
    async with joined(dialect, limits, limits) as (a, b):
        for channel in (a, b):
            for _ in range(300):
                channel.send_nowait("x" * 10_000)
        waits = [asyncio.create_task(getattr(channel, wait)()) for channel in (a, b)]
        done, _ = await asyncio.wait(waits, timeout=20, return_when=asyncio.FIRST_EXCEPTION)
        assert any(isinstance(task.exception(), ChannelBusy) for task in done)
        received = [a.on("message", Recorder()), b.on("message", Recorder())]
        for each in received:
            await each.next(300)
        await asyncio.gather(*waits, return_exceptions=True)
        await a.flush()
        await b.flush()


# -- what is held --------------------------------------------------------------------------------


async def _refuses_more(a) -> int:
    """Send until the kernel takes no more for a while; return how much went."""
    sent = 0
    while True:
        try:
            await a.send("x" * 1000, timeout=0.2)
        except TimeoutError:
            return sent
        sent += 1


@pytest.mark.parametrize(
    ("dialect", "limits"),
    [
        ("node", Limits(held_messages=10)),
        ("node", Limits(held_bytes=50_000)),
        ("native", Limits(bytes=50_000)),  # a native end never stops reading: it grants bytes
    ],
    ids=["node-messages", "node-bytes", "native"],
)
async def test_reading_stops_at_the_held_limits(dialect: str, limits: Limits) -> None:
    """While nobody reads, what is held stays near ``Limits.held_*``: the sender has to wait."""
    async with joined(dialect, peer_limits=limits) as (a, b):
        sent = await _refuses_more(a)
        assert sent < 1000
        incoming = b._protocol.incoming
        # One read may bring more than was asked for, of a node-dialect peer.
        assert incoming.deliveries.bytes <= 50_000 + 300_000
        got = 0
        for _ in range(sent):
            assert await b.recv() == ("x" * 1000, None)
            got += 1
        await a.send("goes again", timeout=5)


async def test_native_credit_bounds_bytes() -> None:
    """Native: never more than ``Limits.bytes`` and one line is on its way to who does not read."""
    async with joined("native", peer_limits=Limits(bytes=50_000)) as (a, b):
        for n in range(500):
            a.send_nowait([n, "x" * 990])
        await turns(100)
        assert b._protocol.incoming.deliveries.bytes <= 50_000 + 1_100
        for n in range(500):
            assert (await b.recv())[0][0] == n


async def test_a_send_that_need_not_wait_grants_nothing() -> None:
    """Only a local wait lifts the bound on held bytes: a ``send`` that returns at once does not."""
    async with joined("native", peer_limits=Limits(bytes=50_000)) as (a, b):
        await b.send("returns at once")
        await a.recv()
        for n in range(500):
            a.send_nowait([n, "x" * 990])
        await turns(100)
        assert b._protocol.incoming.deliveries.bytes <= 50_000 + 1_100


async def test_queued_messages_take_the_memory_of_their_bytes() -> None:
    """``queued_bytes`` bounds memory: a queued short message takes no more than some 200 bytes."""
    async with raw_peer("invited") as (a, _):
        a.send_nowait("warm up")
        tracemalloc.start()
        try:
            for n in range(10_000):
                a.send_nowait(n)
            size, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert size < 10_000 * 200


# -- handles -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ready", [1, 4, 32])
async def test_at_most_ready_handles_are_acknowledged(ready: int) -> None:
    """Native: at most ``Limits.ready`` acknowledged handles ever wait untaken."""
    async with joined("native", peer_limits=Limits(ready=ready)) as (a, b):
        with clients(80) as (sockets, served):
            for n, each in enumerate(served):
                a.send_nowait(n, each)
            taken = 0
            while taken < 80:
                await turns(30)
                acknowledged = sum(_is_gone(each) for each in served)
                assert acknowledged - taken <= ready
                assert acknowledged > taken
                message, handle = await b.recv()
                assert message == taken
                assert works(sockets[taken], handle)
                handle.close()
                taken += 1
            await a.flush()


def _is_gone(served) -> bool:
    return "was handed" in str(_why(served))


def _why(served) -> Exception | None:
    try:
        served.fileno()
    except Exception as error:
        return error
    return None


async def test_plain_messages_behind_unready_handles_are_held() -> None:
    """Native: order is kept over the ``ready`` limit, plain messages wait behind handles."""
    async with joined("native", peer_limits=Limits(ready=1)) as (a, b):
        with clients(6) as (_, served):
            for n, each in enumerate(served):
                a.send_nowait(["handle", n], each)
                a.send_nowait(["plain", n])
            for n in range(6):
                message, handle = await b.recv()
                handle.close()
                assert (message, await b.recv()) == (["handle", n], (["plain", n], None))


async def test_window_bounds_unacknowledged_handles() -> None:
    """Native: a sender has at most the granted number of handles unacknowledged."""
    async with raw_peer("native", handles=3) as (a, peer):
        with clients(10) as (_, served):
            for n, each in enumerate(served):
                a.send_nowait(n, each)
            await until(lambda: peer.unread() and len(peer.fds) >= 3)
            await turns()
            peer.unread()
            assert len(peer.fds) == 3
            peer.write(ack(2, handles=5))
            await until(lambda: peer.unread() and len(peer.fds) >= 5)
            await turns()
            peer.unread()
            assert len(peer.fds) == 5
            peer.write(ack(5, handles=100))
            await until(lambda: peer.unread() and len(peer.fds) >= 10)
            peer.write(ack(10, handles=100))
            await a.flush()


async def test_budget_of_the_process() -> None:
    """One stopped peer does not keep other channels of the process from handing over."""
    limits = Limits(in_flight=8)
    async with raw_peer("native", limits) as (stopped, peer), joined("native", limits) as (a, b):
        with clients(20) as (_, stuck), clients(20) as (_, served):
            stopped.on("undelivered", lambda message, handle, reason: handle.close())
            for n, each in enumerate(stuck):
                stopped.send_nowait(n, each)
            await turns()
            received = b.on("message", Recorder())
            for n, each in enumerate(served):
                a.send_nowait(n, each)
            await a.flush()
            assert [message for message, _ in await received.next(20)] == list(range(20))
            for _, handle in received.calls:
                handle.close()
            peer.unread()
            assert len(peer.fds) <= 8


# -- descriptors run out -------------------------------------------------------------------------


@both_dialects
async def test_receiver_without_free_descriptors(dialect: str, descriptor_limit) -> None:
    """A receiver out of descriptors gets every handle once it has some again, in order."""
    async with joined(dialect) as (a, b):
        with clients(12) as (sockets, served):
            hogs = [os.open(os.devnull, os.O_RDONLY) for _ in range(4)]
            used = max(int(name) for name in os.listdir("/proc/self/fd"))
            descriptor_limit(used + 1)
            filler = []
            try:
                while True:
                    filler.append(os.dup(hogs[0]))
            except OSError:
                pass
            received = b.on("message", Recorder())
            for n, each in enumerate(served):
                a.send_nowait(n, each)
            await turns()
            assert received.calls == []
            for fd in filler + hogs:
                os.close(fd)
            descriptor_limit(used + 40)
            calls = await received.next(12)
            assert [message for message, _ in calls] == list(range(12))
            for client, (_, handle) in zip(sockets, calls, strict=True):
                assert works(client, handle)
                handle.close()
            await a.flush()


async def test_no_free_descriptor_for_long(descriptor_limit) -> None:
    """Native: without a free slot for ``retry_time`` the handle comes back; the channel lives."""
    async with joined("native", peer_limits=Limits(retry_time=0.05)) as (a, b):
        client, served = connection()
        with client:
            filler = [os.open(os.devnull, os.O_RDONLY)]
            used = max(int(name) for name in os.listdir("/proc/self/fd"))
            descriptor_limit(used + 1)
            try:
                while True:
                    filler.append(os.dup(filler[0]))
            except OSError:
                pass
            received = b.on("message", Recorder())
            b.on("error", Recorder())
            try:
                with pytest.raises(HandleNotDelivered) as caught:
                    await a.send("x", served)
                a.send_nowait("next")
                await received.next()
            finally:
                for fd in filler:
                    os.close(fd)
            descriptor_limit(used + 40)
            assert received.calls == [("next", None)]
            assert "descriptor" in caught.value.reason
            assert works(client, served)
            served.close()


# -- time ----------------------------------------------------------------------------------------


async def test_native_only_handle_waits_for_the_hello() -> None:
    """A native-only handle sent early waits for the first line, ``hello_timeout`` at most."""
    async with raw_peer("invited", Limits(hello_timeout=0.05)) as (a, peer):
        read, write = os.pipe()
        with FileDescriptor(read) as pipe, FileDescriptor(write):
            start = time.monotonic()
            with pytest.raises(HandleNotDelivered):
                await a.send("early", pipe)
            assert time.monotonic() - start < 5
            assert pipe.fileno() == read
        await a.send("goes on")
        assert await peer.line() == "goes on"


async def test_half_a_line_for_long() -> None:
    """Descriptors of a line that does not go on for ``incomplete_timeout`` end the channel."""
    async with raw_peer("native", Limits(incomplete_timeout=0.05)) as (a, peer):
        error = a.on("error", Recorder())
        with open(os.devnull) as null:
            peer.write(b"[1,", fds=(null.fileno(),))
        ((caught,),) = await error.next()
        assert "unfinished" in str(caught)
        await a.wait_disconnected()


async def test_line_limit_of_the_receiver() -> None:
    """A peer's line longer than ``Limits.line`` ends the channel, with an error that says so."""
    async with raw_peer(limits=Limits(line=1000)) as (a, peer):
        error = a.on("error", Recorder())
        peer.write("x" * 2000)
        ((caught,),) = await error.next()
        assert "Limits.line" in str(caught)


async def test_depth_limit_of_the_receiver() -> None:
    """A peer's line nested deeper than ``Limits.depth`` ends the channel with an error."""
    async with raw_peer(limits=Limits(depth=10)) as (a, peer):
        error = a.on("error", Recorder())
        peer.write(b"[" * 10_000 + b"]" * 10_000 + b"\n")
        ((caught,),) = await error.next()
        assert "deep" in str(caught)


def test_limits_are_checked_and_frozen() -> None:
    """``Limits`` is frozen, and refuses what makes no sense."""
    limits = Limits()
    assert limits.ready == 32
    assert (limits.set_size, limits.bytes, limits.queued_handles) == (64, 1 << 20, 131_072)
    assert 4 <= limits.window <= 256
    with pytest.raises(dataclasses.FrozenInstanceError):
        limits.ready = 1
    for bad in ({"set_size": 0}, {"set_size": 254}, {"ready": -1}, {"low_water_bytes": 1 << 30}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Limits(**bad)
