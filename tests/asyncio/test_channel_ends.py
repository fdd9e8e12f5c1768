"""How channels end, and whose every handle is then."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import subprocess
import sys
import time
from typing import Any

import pytest

import handleipc
from handleipc import (
    Channel,
    ChannelBroken,
    ChannelClosed,
    HandleInDoubt,
    HandleNotDelivered,
    Limits,
)
from handleipc.asyncio.attachment import process_system
from handleipc.limits import Invitation
from tests.asyncio.helpers import (
    ACK,
    Recorder,
    ack,
    both_dialects,
    clients,
    connection,
    is_open,
    join,
    joined,
    raw_peer,
    settle,
    take_rest,
    turns,
    until,
    works,
)

# -- disconnect ----------------------------------------------------------------------------------


@both_dialects
async def test_messages_before_disconnect_arrive(dialect: str) -> None:
    """What was sent before ``disconnect`` arrives, handles too; ``connected`` is False at once."""
    async with joined(dialect) as (a, b):
        with clients(20) as (sockets, served):
            for n, each in enumerate(served):
                a.send_nowait(n, each)
                a.send_nowait("x" * 30_000)
            assert a.connected
            a.disconnect()
            assert not a.connected
            for n, client in enumerate(sockets):
                message, handle = await b.recv()
                assert message == n
                assert works(client, handle)
                handle.close()
                assert await b.recv() == ("x" * 30_000, None)
            with pytest.raises(ChannelBroken):
                await b.recv()
            await a.wait_disconnected()
            assert all(each.closed for each in served)


@both_dialects
async def test_held_messages_stay_readable(dialect: str) -> None:
    """What was held when the channel ended stays readable, by ``recv`` and by a late listener."""
    async with joined(dialect) as (a, b):
        client, served = connection()
        with client:
            a.send_nowait("one", served)
            a.send_nowait("two")
            a.send_nowait("three")
            a.disconnect()
            await asyncio.gather(a.wait_disconnected(), b.wait_disconnected())
            message, handle = await b.recv()
            assert message == "one"
            assert works(client, handle)
            handle.close()
            assert await b.recv() == ("two", None)
            received = b.on("message", Recorder())
            assert await received.next() == [("three", None)]


@both_dialects
async def test_crossing_disconnects(dialect: str) -> None:
    """Both ends disconnect at once with much on its way: both end, nothing hangs or leaks."""
    async with joined(dialect) as (a, b):
        with clients(20) as (sockets, served):
            undelivered = Recorder()
            for n, each in enumerate(served):
                channel = (a, b)[n % 2]
                channel.send_nowait(n, each)
                channel.send_nowait("x" * 50_000)
            for channel in (a, b):
                channel.on("undelivered", undelivered)
                channel.disconnect()
            async with asyncio.timeout(10):
                await asyncio.gather(a.wait_disconnected(), b.wait_disconnected())
            owned = [h for c in (a, b) for _, h in await _rest(c) if h] + [
                handle for _, handle, _ in undelivered.calls
            ]
            for handle in owned:
                handle.close()
            assert not any(is_open(client) for client in sockets)
            assert len(owned) == 20


async def _rest(channel: Channel) -> list[tuple[Any, Any]]:
    rest = []
    try:
        while True:
            rest.append(await channel.recv())
    except ChannelClosed:
        return rest


@both_dialects
async def test_disconnect_refuses_what_arrives(dialect: str) -> None:
    """A handle that arrives at a disconnecting end goes back to its sender."""
    async with raw_peer(dialect, Limits(disconnect_timeout=5)) as (a, peer):
        with clients(1) as (_, blocker):
            a.send_nowait("keeps it closing", blocker[0])
            while not peer.fds:
                await peer.line()
            a.disconnect()
            await turns()
            client, served = connection()
            with client:
                if dialect == "native":
                    peer.write([1, 1], [2, 1, 1, "net.Socket", "late"], fds=(served.fileno(),))
                    line = await peer.line(control=True)
                    while "refuse" not in line:
                        line = await peer.line(control=True)
                    assert line["refuse"] == [[1, 1, "closing"]]
                else:
                    peer.write(
                        {"cmd": "NODE_HANDLE", "type": "net.Socket", "msg": "late"},
                        fds=(served.fileno(),),
                    )
                    assert await peer.line() == {"cmd": "NODE_HANDLE_NACK"}
                served.close()
                assert not is_open(client)
            peer.write(ack(1) if dialect == "native" else ACK)
            await a.wait_disconnected()
            assert await _rest(a) == []


@both_dialects
@pytest.mark.parametrize("which", ["argument", "limit"])
async def test_disconnect_timeout(dialect: str, which: str) -> None:
    """A ``disconnect`` that cannot flush ends after its timeout, and gives handles back."""
    limits = Limits(disconnect_timeout=0.1 if which == "limit" else 60)
    async with raw_peer(dialect, limits) as (a, peer):
        client, served = connection()
        with client, served:
            a.send_nowait("never acknowledged")
            sending = asyncio.create_task(a.send("nor this", served))
            while not peer.fds:
                await peer.line()
            start = time.monotonic()
            a.disconnect(timeout=0.1 if which == "argument" else None)
            with pytest.raises(HandleNotDelivered if dialect == "native" else HandleInDoubt):
                await sending
            await a.wait_disconnected()
            assert 0.05 < time.monotonic() - start < 5
            if dialect == "native":
                assert works(client, served)


@both_dialects
async def test_disconnect_twice(dialect: str) -> None:
    """A second ``disconnect`` or an ``abort`` after it does nothing."""
    async with joined(dialect) as (a, b):
        ended = a.on("disconnect", Recorder())
        a.send_nowait("x")
        a.disconnect()
        a.disconnect()
        await a.wait_disconnected()
        a.abort()
        a.disconnect()
        await turns()
        assert ended.calls == [()]
        assert await b.recv() == ("x", None)


# -- abort ---------------------------------------------------------------------------------------


@both_dialects
async def test_abort_is_at_once(dialect: str) -> None:
    """``abort`` ends the channel before it returns, with everything still queued lost."""
    async with raw_peer(dialect) as (a, peer):
        waits = [
            asyncio.create_task(a.send("x" * 5_000_000)),
            asyncio.create_task(a.flush()),
            asyncio.create_task(a.recv()),
        ]
        await turns()
        a.abort()
        assert not a.connected
        await asyncio.wait_for(a.wait_disconnected(), 1)
        for error in await asyncio.gather(*waits, return_exceptions=True):
            assert isinstance(error, ChannelClosed)
            assert not isinstance(error, ChannelBroken)


STEPS = ["queued", "staged", "unacknowledged", "acknowledged"]


async def _at_step(a: Channel, b: Channel, step: str, served: Any) -> asyncio.Task[None]:
    """Bring the sending of a handle to a certain step."""
    sending = asyncio.create_task(a.send("the handle", served))
    if step == "queued":
        await asyncio.sleep(0)
    elif step == "staged":
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    elif step == "unacknowledged":
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    else:
        await sending
    return sending


# Towards a living node peer an abort cannot take the handle back, and a node peer delivers even
# when its acknowledgement is lost.
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("dialect", "end"),
    [
        ("node", "b.abort"),
        ("node", "a.disconnect"),
        ("node", "b.disconnect"),
        ("native", "a.abort"),
        ("native", "b.abort"),
        ("native", "a.disconnect"),
        ("native", "b.disconnect"),
        ("native", "b is cut off"),
    ],
)
async def test_one_owner_at_every_step(dialect: str, step: str, end: str) -> None:
    """However the channel ends, each handle has one owner, or is closed and the sender told."""
    a, b = join(dialect)
    await settle(a, b)
    client, served = connection()
    with client:
        a.on("undelivered", Recorder())
        sending = await _at_step(a, b, step, served)
        if end == "b is cut off":
            b._link._sock.shutdown(socket.SHUT_RDWR)
        elif end == "a.abort":
            a.abort()
        elif end == "b.abort":
            b.abort()
        elif end == "a.disconnect":
            a.disconnect()
        else:
            b.disconnect()
        async with asyncio.timeout(10):
            await asyncio.gather(a.wait_disconnected(), b.wait_disconnected())
        owners = [handle for _, handle in await _rest(b) if handle is not None]
        (error,) = await asyncio.gather(sending, return_exceptions=True)
        if error is None:
            assert served.closed
        else:
            assert isinstance(error, HandleNotDelivered)
            assert error.handle is served
            owners.append(served)
        assert len(owners) == 1
        assert works(client, owners[0])
        owners[0].close()
        assert not is_open(client)


async def test_abort_towards_node_is_in_doubt() -> None:
    """Node dialect: the one handle in flight is closed here at ``abort``, and reported in doubt."""
    async with raw_peer() as (a, peer):
        with clients(2) as (sockets, served):
            tasks = [asyncio.create_task(a.send(n, each)) for n, each in enumerate(served)]
            while not peer.fds:
                await peer.line()
            a.abort()
            first, second = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(first, HandleInDoubt)
            assert first.handle is served[0]
            assert served[0].closed
            assert isinstance(second, HandleNotDelivered)
            assert second.handle is served[1]
            assert works(sockets[1], served[1])
            peer.close()
            assert not is_open(sockets[0])


@both_dialects
async def test_many_handles_at_all_steps(dialect: str) -> None:
    """With handles at all steps at once, an end by the receiver leaves each with one owner."""
    for taken in (0, 1, 5):
        for end in ("abort", "disconnect"):
            a, b = join(dialect, peer_limits=Limits(ready=4, window=8))
            await settle(a, b)
            with clients(30) as (sockets, served):
                undelivered = a.on("undelivered", Recorder())
                for n, each in enumerate(served):
                    a.send_nowait(n, each)
                owners = {}
                for _ in range(taken):
                    n, handle = await b.recv()
                    owners[n] = handle
                getattr(b, end)()
                async with asyncio.timeout(10):
                    await asyncio.gather(a.wait_disconnected(), b.wait_disconnected())
                for n, handle in await _rest(b):
                    assert n not in owners
                    owners[n] = handle
                for n, handle, _ in undelivered.calls:
                    assert n not in owners
                    owners[n] = handle
                assert sorted(owners) == list(range(30))
                for n, handle in owners.items():
                    assert works(sockets[n], handle)
                    handle.close()
                assert not any(is_open(client) for client in sockets)


# -- the peer dies -------------------------------------------------------------------------------


@both_dialects
async def test_peer_closes_with_a_handle_unacknowledged(dialect: str) -> None:
    """A peer that goes away without acknowledging: the handle is back, ``send`` says so."""
    async with raw_peer(dialect) as (a, peer):
        client, served = connection()
        with client, served:
            sending = asyncio.create_task(a.send("x", served))
            while not peer.fds:
                await peer.line()
            peer.close()
            with pytest.raises(HandleNotDelivered) as caught:
                await sending
            assert caught.value.handle is served
            assert works(client, served)


@both_dialects
async def test_acknowledgement_read_behind_the_end(dialect: str) -> None:
    """Acknowledgements already in the socket are read before handles are given back."""
    async with raw_peer(dialect) as (a, peer):
        client, served = connection()
        with client:
            sending = asyncio.create_task(a.send("x", served))
            while not peer.fds:
                await peer.line()
            peer.write(ack(1) if dialect == "native" else ACK)
            theirs = peer.fds.pop()
            peer.close()
            await sending
            assert served.closed
            assert is_open(client)
            os.close(theirs)


@both_dialects
async def test_half_received_handle_is_closed(dialect: str) -> None:
    """A handle whose line never came whole is closed at the end, and never given."""
    async with raw_peer(dialect) as (a, peer):
        client, served = connection()
        with client:
            line = b'[1,1]\n[2,1,1,"net.So' if dialect == "native" else b'{"cmd":"NODE_HANDLE","ty'
            peer.write(line, fds=(served.fileno(),))
            served.close()
            await turns()
            assert is_open(client)
            peer.close()
            await a.wait_disconnected()
            assert await _rest(a) == []
            assert not is_open(client)


async def test_natively_received_handle_without_an_acknowledgement_is_closed() -> None:
    """Native: a handle whose acknowledgement cannot be written is not given to the application."""
    ours, theirs = socket.socketpair()
    b = Channel(theirs, Limits(), invited_by=Invitation(9, 9999))
    await turns()
    client, served = connection()
    with client, ours:
        ours.setblocking(False)
        ours.recv(10_000)  # the switch
        lines = (
            b'{"cmd":"NODE_HANDLEIPC","native":2,"ack":0,"descriptors":9,"bytes":9999}\n'
            b'[1,1]\n[2,1,1,"net.Socket","x"]\n[0,"plain"]\n'
        )
        head, rest = lines.split(b"\n", 1)
        ours.send(head + b"\n")
        socket.send_fds(ours, [rest], [served.fileno()])
        ours.close()
        served.close()
        await b.wait_disconnected()
        assert [message for message, handle in await _rest(b)] == ["plain"]
        assert not is_open(client)


@both_dialects
async def test_plain_messages_that_arrived_are_delivered_when_the_peer_dies(dialect: str) -> None:
    """Plain messages that arrived whole are delivered, although the peer died behind them."""
    async with raw_peer(dialect) as (a, peer):
        for n in range(100):
            peer.write([0, n] if dialect == "native" else n)
        peer.close()
        assert [message async for message, _ in a] == list(range(100))


# -- the loop ends -------------------------------------------------------------------------------


def _run(main: Any, factory: Any = None) -> None:
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())


@both_dialects
@pytest.mark.parametrize("how", ["disconnect", "nothing"])
def test_loop_ends_right_after_sending(dialect: str, how: str) -> None:
    """The end of ``asyncio.run`` right after ``send_nowait`` or ``disconnect`` still flushes."""
    ours, theirs = socket.socketpair()
    made = []

    async def main() -> None:
        channel = Channel(ours, Limits(), inviting=dialect == "native")
        made.append(channel)
        for n in range(100):
            channel.send_nowait([n, "x" * 100])
        if how == "disconnect":
            channel.disconnect()

    with theirs:
        _run(main)
        (channel,) = made
        channel._link._sock.close()  # an open channel keeps it for the next loop, as parent() does
        data = b""
        while chunk := theirs.recv(65536):
            data += chunk
        assert data.count(b"\n") == 100


@pytest.mark.parametrize("step", ["idle", "held", "unacknowledged", "received", "waiting"])
@both_dialects
def test_loop_that_ends_with_an_open_channel(dialect: str, step: str) -> None:
    """A loop that ends with an open channel leaks nothing: dropped, it warns and is closed."""
    client, served = connection()
    with client:

        async def main() -> None:
            a, b = join(dialect)
            await settle(a, b)
            if step == "held":
                a.send_nowait("x")
                await turns()
            elif step == "unacknowledged":
                b._watch(reading=False, writing=False)
                a.send_nowait("x", served)
                await asyncio.sleep(0)
            elif step == "received":
                await a.send("x", served)
                _, handle = await b.recv()
                handle.close()
            elif step == "waiting":
                task = asyncio.create_task(b.recv())
                await turns()
                task.cancel()

        # The channel stays open for a next loop, as parent() needs; here nobody keeps it.
        with pytest.warns(ResourceWarning):
            _run(main)
            gc.collect()
        if step in ("unacknowledged", "received"):
            del served
            gc.collect()
            assert not is_open(client)
        else:
            served.close()
        assert process_system.in_flight.total == 0


CHILD_THAT_ENDS = """
    import asyncio, sys
    import handleipc

    async def main():
        parent = await handleipc.parent()
        for n in range(2000):
            parent.send_nowait([n, "x" * 100])
        if "disconnect" in sys.argv:
            parent.disconnect()

    asyncio.run(main())
"""


@pytest.mark.parametrize("dialect", ["node", None])
@pytest.mark.parametrize("how", ["disconnect", "return"])
async def test_child_that_ends_right_after_sending(program, how: str, dialect: Any) -> None:
    """A child whose ``asyncio.run`` ends right after sending has still sent everything."""
    child = await handleipc.fork(program("child.py", CHILD_THAT_ENDS), how, dialect=dialect)
    got = [message[0] async for message, _ in child]
    assert got == list(range(2000))
    assert await child.wait() == 0


CHILD_THAT_COUNTS = """
    import asyncio
    import handleipc

    async def main():
        parent = await handleipc.parent()
        count = 0
        async for message, handle in parent:
            count += 1
        print(count)

    asyncio.run(main())
"""

PARENT_THAT_ENDS = """
    import asyncio, sys
    import handleipc

    async def main():
        child = await handleipc.fork("child.py")
        for n in range(2000):
            child.send_nowait([n, "x" * 10])
        if "disconnect" in sys.argv:
            child.disconnect()

    asyncio.run(main())
"""


@pytest.mark.parametrize("how", ["disconnect", "return"])
def test_parent_that_ends_right_after_sending(program, tmp_path, how: str) -> None:
    """A parent whose ``asyncio.run`` ends right after sending has still sent everything."""
    program("child.py", CHILD_THAT_COUNTS)
    parent = program("parent.py", PARENT_THAT_ENDS)
    done = subprocess.run(
        [sys.executable, "-W", "error", parent, how],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "2000\n"


async def test_dropped_channel_leaks_nothing() -> None:
    """A channel nobody refers to any more goes on until its peer ends, and leaks nothing."""
    ours, theirs = socket.socketpair()
    with theirs:
        Channel(ours, Limits()).send_nowait("x")
        await turns()
        assert theirs.recv(10) == b'"x"\n'
    del ours
    await turns()


async def test_take_rest_of_an_untouched_channel() -> None:
    """An ended channel without messages has none."""
    a, b = join("node")
    a.abort()
    await b.wait_disconnected()
    assert await take_rest(a) == await take_rest(b) == []
    await until(lambda: not b.connected)
