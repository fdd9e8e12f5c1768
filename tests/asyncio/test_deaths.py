"""Every death of a child has a name: in the error, in the event, and in one line of the log."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from typing import Any

import pytest

import handleipc
from handleipc import ChannelBroken, Child, HandleNotDelivered
from tests.asyncio.helpers import Recorder, both_dialects, connection, raw_peer, turns, works

CHILDREN = """
    import asyncio, os, signal, sys, threading
    import handleipc

    async def raises(parent):
        await told(parent)
        raise KeyError("of the child")

    async def exits(parent):
        await told(parent)
        sys.exit(7)

    async def segfaults(parent):
        await told(parent)
        os.kill(os.getpid(), signal.SIGSEGV)

    async def kills_itself_hard(parent):
        await told(parent)
        os._exit(7)

    async def says_goodbye(parent):
        await told(parent)
        parent.disconnect()
        await parent.wait_disconnected()
        sys.stdin.read()
        sys.exit(3)

    async def closes_and_lives(parent):
        await told(parent)
        parent.abort()
        sys.stdin.read()

    async def takes_one_and_dies(parent):
        await parent.send("up")
        await parent.recv()
        os._exit(7)

    def plain(parent):
        parent.on("message", lambda *_: sys.exit(7))

    async def told(parent):
        await parent.send("up")
        assert await parent.recv() == ("go", None)
"""


@pytest.fixture
def start(program, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Start a child that runs a function of ``CHILDREN``; what it prints is not shown."""
    monkeypatch.syspath_prepend(program("children.py", CHILDREN).parent)

    async def start(function: str, **options: Any) -> Child:
        child = await handleipc.fork(f"children:{function}", stderr=QUIET, **options)
        assert await child.recv() == ("up", None)
        return child

    return start


QUIET = asyncio.subprocess.DEVNULL
PIPE = asyncio.subprocess.PIPE

# What a program does that ends before it has opened its channel.
UNOPENED = {
    "exits": ("import sys; sys.exit(7)", 7, None),
    "knows us and exits": ("import handleipc, sys; sys.exit(7)", 7, None),
    "raises": ("import handleipc; raise KeyError", 1, None),
    "cannot import": ("import handleipc, no_such_module", 1, None),
    "segfaults": ("import os; os.kill(os.getpid(), 11)", None, signal.SIGSEGV),
    "aborts": ("import handleipc, os; os.abort()", None, signal.SIGABRT),
}
OPENED = {
    "raises": (1, None),
    "exits": (7, None),
    "segfaults": (None, signal.SIGSEGV),
    "kills_itself_hard": (7, None),
}


def words(code: int | None, number: int | None) -> str:
    return f"code {code}" if number is None else signal.Signals(number).name


async def _iterate(channel: Any) -> None:
    async for _ in channel:
        pass


async def _batches(channel: Any) -> None:
    async for _ in channel.batches():
        pass


async def _receive(channel: Any) -> None:
    while True:
        await channel.recv()


async def _flush(channel: Any) -> None:
    channel.send_nowait("x" * (1 << 22))
    await channel.flush()


async def _drain(channel: Any) -> None:
    channel.send_nowait("x" * (1 << 22))
    await channel.drain()


async def _send(channel: Any) -> None:
    await channel.send("x" * (1 << 22))


WAITS = {
    "iteration": _iterate,
    "batches": _batches,
    "recv": _receive,
    "flush": _flush,
    "drain": _drain,
    "send": _send,
}


async def broken(channel: Any, wait: Any) -> ChannelBroken:
    async with asyncio.timeout(30):
        with pytest.raises(ChannelBroken) as caught:
            await wait(channel)
    return caught.value


async def judge(
    child: Any, error: ChannelBroken, code: int | None, number: int | None, *, opened: bool
) -> None:
    """The exception says how the child ended, and so do its attributes."""
    assert (error.exit_code, error.signal, error.opened) == (code, number, opened)
    assert words(code, number) in str(error)
    assert ("never opened its channel" in str(error)) is not opened
    async with asyncio.timeout(30):
        assert await child.wait() == (code if number is None else -number)
    assert (child.exit_code, child.signal) == (code, number)


def one_line(caplog: pytest.LogCaptureFixture, *parts: object) -> None:
    """There is one line of this package in the log, with these words in it."""
    lines = [r.getMessage() for r in caplog.records if r.name == "handleipc"]
    assert len(lines) == 1, lines
    for part in parts:
        assert str(part) in lines[0]


@pytest.mark.parametrize(
    ("how", "wait"),
    [(how, "iteration") for how in OPENED] + [("exits", wait) for wait in WAITS][1:],
)
async def test_death_of_a_child_that_had_opened_its_channel(
    start, caplog: pytest.LogCaptureFixture, how: str, wait: str
) -> None:
    """Whoever waits for something is told exit code or signal, once in the log and as an event."""
    code, number = OPENED[how]
    child = await start(how)
    exited = child.on("exit", Recorder())
    child.send_nowait("go")
    error = await broken(child, WAITS[wait])
    await judge(child, error, code, number, opened=True)
    assert await exited.next() == [(code, number)]
    one_line(caplog, words(code, number), child.pid)
    # And whoever comes late.
    with pytest.raises(ChannelBroken) as late:
        child.send_nowait("x")
    await judge(child, late.value, code, number, opened=True)


@pytest.mark.parametrize(
    ("how", "wait"),
    [(how, "iteration") for how in UNOPENED]
    + [("exits", wait) for wait in ("batches", "recv", "ready", "flush")],
)
async def test_death_of_a_child_that_never_opened_its_channel(
    caplog: pytest.LogCaptureFixture, how: str, wait: str
) -> None:
    """The same, and that the channel was never opened, which sends the reader to its output."""
    text, code, number = UNOPENED[how]
    child = await handleipc.spawn(sys.executable, "-c", text, stderr=QUIET)
    waits = {**WAITS, "ready": lambda child: child.ready()}
    error = await broken(child, waits[wait])
    await judge(child, error, code, number, opened=False)
    one_line(caplog, words(code, number), child.pid, "never opened its channel")


@pytest.mark.parametrize(
    "target", ["no_such_module:function", "children:no_such_function", "children:plain"]
)
async def test_death_of_a_function(start, caplog: pytest.LogCaptureFixture, target: str) -> None:
    """A function that cannot be imported, or ends the process, ends the channel with its code."""
    child = await handleipc.fork(target, stderr=QUIET)
    child.send_nowait("go")
    code = 7 if target == "children:plain" else 1
    await judge(child, await broken(child, _iterate), code, None, opened=True)
    one_line(caplog, words(code, None), child.pid)


async def test_polite_end_and_an_exit_code(start, caplog: pytest.LogCaptureFixture) -> None:
    """A child that says goodbye and then fails ends the iteration, and the log has its code."""
    child = await start("says_goodbye", stdin=PIPE)
    child.send_nowait("go")
    async with asyncio.timeout(30):
        await _iterate(child)
        assert not child.exited
        assert not caplog.records
        child.stdin.close()
        assert await child.wait() == 3
    one_line(caplog, "code 3", child.pid)


async def test_child_that_closes_its_channel_and_lives_on(
    start, caplog: pytest.LogCaptureFixture
) -> None:
    """Its channel has ended, which is no death; what is sent then is refused, without a code."""
    child = await start("closes_and_lives", stdin=PIPE)
    child.send_nowait("go")
    async with asyncio.timeout(30):
        await _iterate(child)
        with pytest.raises(ChannelBroken, match="the peer closed it") as caught:
            await child.send("x")
        assert (caught.value.exit_code, caught.value.signal) == (None, None)
        assert caught.value.opened
        assert not child.exited
        child.stdin.close()
        assert await child.wait() == 0
    assert not caplog.records


async def test_child_that_never_opens_its_channel_and_lives() -> None:
    """``ready`` and ``send`` take a timeout; what was not taken is the caller's."""
    child = await handleipc.spawn("sleep", "600")
    client, served = connection()
    with client:
        with pytest.raises(TimeoutError, match=r"handleipc\.parent"):
            await child.ready(timeout=0.05)
        # What has left is on its way: only the end of the channel brings it back.
        undelivered = child.on("undelivered", Recorder())
        with contextlib.suppress(TimeoutError, HandleNotDelivered):
            await child.send("x", served, timeout=0.05)
        child.kill(signal.SIGKILL)
        async with asyncio.timeout(30):
            await child.wait()
            await child.wait_disconnected()
        assert all(handle is served for _, handle, _ in undelivered.calls)
        assert works(client, served)
        served.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
async def test_child_that_was_asked_to_end(caplog: pytest.LogCaptureFixture, number: int) -> None:
    """An end that this process asked for is no crash: iteration ends, and nothing is logged."""
    child = await handleipc.spawn("sleep", "600")
    iterating = asyncio.ensure_future(_iterate(child))
    await asyncio.sleep(0)
    child.kill(number)
    async with asyncio.timeout(30):
        await iterating
        assert await child.wait() == -number
    assert not caplog.records
    with pytest.raises(ChannelBroken) as caught:
        child.send_nowait("x")
    assert (caught.value.exit_code, caught.value.signal) == (None, number)


async def test_kill_from_elsewhere_is_a_crash(caplog: pytest.LogCaptureFixture) -> None:
    """A signal that somebody else sent has its name in the error and in the log."""
    child = await handleipc.spawn("sleep", "600")
    os.kill(child.pid, signal.SIGKILL)
    await judge(child, await broken(child, _iterate), None, signal.SIGKILL, opened=False)
    one_line(caplog, "SIGKILL", child.pid)


async def test_handles_of_a_child_that_died(start) -> None:
    """A handle that did not arrive is the caller's, and the exception's cause is the death."""
    child = await start("takes_one_and_dies")
    pairs = [connection() for _ in range(40)]
    sends = [asyncio.ensure_future(child.send(n, served)) for n, (_, served) in enumerate(pairs)]
    async with asyncio.timeout(30):
        results = await asyncio.gather(*sends, return_exceptions=True)
    lost = [r for r in results if r is not None]
    assert lost
    for error in lost:
        assert isinstance(error, HandleNotDelivered)
        assert isinstance(error.__cause__, ChannelBroken)
        assert (error.__cause__.exit_code, error.__cause__.signal) == (7, None)
    for (client, served), result in zip(pairs, results, strict=True):
        with client:
            if result is not None:
                assert works(client, served)
                served.close()
    await child.wait()


async def test_handle_in_doubt() -> None:
    """Towards a Node peer that lives, an abort leaves the handle in doubt, and our copy closed."""
    client, served = connection()
    with client:
        async with raw_peer("node") as (channel, peer):
            sending = asyncio.ensure_future(channel.send("x", served))
            assert (await peer.line())["msg"] == "x"
            channel.abort()
            with pytest.raises(handleipc.HandleInDoubt) as caught:
                await sending
            assert caught.value.handle is served
            assert served.closed
            assert isinstance(caught.value.__cause__, handleipc.ChannelClosed)


@both_dialects
async def test_peer_that_is_closing(dialect: str, caplog: pytest.LogCaptureFixture) -> None:
    """A peer shuts its reading side down and then closes: what is written meanwhile is no fault."""
    client, served = connection()
    with client:
        async with raw_peer(dialect) as (channel, peer):
            peer.sock.shutdown(socket.SHUT_RD)
            sending = asyncio.ensure_future(channel.send("x", served))
            flushing = asyncio.ensure_future(channel.flush())
            await turns()
            peer.write([0, "last word"] if dialect == "native" else "last word")
            peer.close()
            async with asyncio.timeout(30):
                assert [message async for message, _ in channel] == ["last word"]
                with pytest.raises(HandleNotDelivered):
                    await sending
                with pytest.raises(ChannelBroken, match="the peer closed it"):
                    await flushing
            assert works(client, served)
            served.close()
    assert not caplog.records


@both_dialects
async def test_peer_that_reads_no_more_and_lives_on(dialect: str) -> None:
    """One that does not close either has broken a rule, and everybody who waits is told."""
    async with raw_peer(dialect) as (channel, peer):
        peer.sock.shutdown(socket.SHUT_RD)
        errors = channel.on("error", Recorder())
        sending = asyncio.ensure_future(channel.send("x"))
        async with asyncio.timeout(30):
            with pytest.raises(ChannelBroken, match="reading side"):
                await sending
            with pytest.raises(handleipc.RemoteProtocolError, match="reading side"):
                await channel.recv()
        assert len(errors.calls) == 1
