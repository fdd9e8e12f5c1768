"""Messages: what ``send`` takes and returns, and what arrives."""

from __future__ import annotations

import asyncio

import pytest

import handleipc
from handleipc import Limits
from tests.conformance.peers import ACK, event, goodbye, raw_peer, sockets
from tests.conformance.record import BETTER, also, node_test


@node_test(
    "test-child-process-send-cb",
    expects="the callback of `send` gets null",
    ours="`await send()` returns None",
    why="an awaitable instead of a callback: an error is raised",
)
async def test_send_returns_none(peer) -> None:
    """In the parent and in the child."""
    javascript = "process.send('ok', (error) => process.send([error]));"
    python = """
        async def main(parent):
            await parent.send([await parent.send("ok")])
    """
    async with peer(javascript, python) as child:
        assert await child.recv() == ("ok", None)
        assert await child.recv() == ([None], None)
        assert await child.wait() == 0


@node_test(
    "test-child-process-send-returns-boolean",
    expects="`send` returns true at first, false behind a handle that waits for its acknowledgement,"
    " true again afterwards",
    ours="`send_nowait` returns False from the high-water marks of `Limits` on, in bytes and in"
    " handles, and True again after `drain()`",
    verdict=BETTER,
    why="one rule that can be set and waited for; with `Limits(high_water_handles=1)` it is Node's",
)
async def test_send_returns_boolean() -> None:
    """True, false behind handles, true when they have been acknowledged."""
    limits = Limits(high_water_handles=1, low_water_handles=0)
    with sockets() as (_, given):
        async with raw_peer(limits) as (channel, raw):
            assert channel.send_nowait("first") is True
            assert channel.send_nowait("handle", given) is False
            assert channel.send_nowait("behind it") is False
            draining = asyncio.create_task(channel.drain())
            assert await raw.read() == "first"
            assert (await raw.read())["msg"] == "handle"
            assert raw.nothing_came()
            assert not draining.done()
            raw.write(ACK)
            await draining
            assert channel.send_nowait("last") is True
            assert [await raw.read(), await raw.read()] == ["behind it", "last"]


@node_test(
    "test-child-process-send-type-error",
    expects="options null, a string or a number are `ERR_INVALID_ARG_TYPE`, a string as handle"
    " `ERR_INVALID_HANDLE_TYPE`; in parent and child",
    ours="options are keywords: anything else is `TypeError`; a string as handle is"
    " `UnsupportedHandle`; in parent and child",
    why="raised by the call; nothing was sent and the channel goes on",
)
async def test_send_type_error(python_peer) -> None:
    """Wrong handles and options are refused at once, at both ends."""
    python = """
        async def main(parent):
            errors = []
            for handle in ("string", 1, {}, object()):
                try:
                    await parent.send("message", handle)
                except handleipc.UnsupportedHandle as error:
                    errors.append(isinstance(error, TypeError))
            try:
                await parent.send("message", None, "options")
            except TypeError:
                errors.append(True)
            await parent.send(errors)
    """
    async with python_peer("", python) as child:
        for handle in ("string", 1, {}, float("nan"), object()):
            with pytest.raises(handleipc.UnsupportedHandle):
                await child.send("message", handle)
            with pytest.raises(handleipc.UnsupportedHandle):
                child.send_nowait("message", handle)
        for options in (None, "options", 1):
            with pytest.raises(TypeError):
                await child.send("message", None, options)
        with pytest.raises(TypeError):
            await child.send("message", no_such_option=True)
        assert await child.recv() == ([True] * 5, None)
        await goodbye(child)


@also("test-child-process-send-type-error")
def test_send_type_error_under_node(under_node) -> None:
    """The child's side of it with a Node parent."""
    python = """
        async def main(parent):
            try:
                await parent.send("message", "string")
            except handleipc.UnsupportedHandle:
                await parent.send("refused")
    """
    assert under_node("fork().on('message', show);", python) == ["refused"]


LONG = "ßü" * 200_000


@node_test(
    "test-child-process-send-utf8",
    expects="400,000 two-byte characters survive being cut into chunks",
    ours="the same, in both roles and both ways",
    why="lines are cut at newlines, never inside a character",
)
async def test_utf8(peer) -> None:
    """There and back."""
    javascript = "process.on('message', (m) => process.send(m));"
    python = """
        async def main(parent):
            async for message, handle in parent:
                await parent.send(message)
    """
    async with peer(javascript, python) as child:
        await child.send(LONG)
        assert await child.recv() == (LONG, None)
        await goodbye(child)


@also("test-child-process-send-utf8")
def test_utf8_under_node(under_node) -> None:
    """A Python child echoes what a Node parent sends."""
    javascript = """
        const long = 'ßü'.repeat(200000);
        const child = fork();
        child.send(long);
        child.on('message', (m) => { show([m === long, m.length]); child.disconnect(); });
    """
    python = """
        async def main(parent):
            async for message, handle in parent:
                await parent.send(message)
    """
    assert under_node(javascript, python) == [[True, 400_000]]


@node_test(
    "test-child-process-internal",
    expects="`{cmd: 'fooNODE_'}` goes to 'message', `{cmd: 'NODE_bar'}` to 'internalMessage'",
    ours='the same, with the event `"internal_message"`, in both roles',
    why="Node and its libraries use the prefix; programs must not be surprised by it",
)
async def test_internal_message(peer) -> None:
    """The prefix decides which event a message goes to."""
    javascript = """
        process.send({ cmd: 'fooNODE_' });
        process.send({ cmd: 'NODE_bar' });
        process.on('message', (m) => process.send(['user', m]));
        process.on('internalMessage', (m) => process.send(['internal', m]));
    """
    python = """
        async def main(parent):
            await parent.send({"cmd": "fooNODE_"})
            await parent.send({"cmd": "NODE_bar"})
            parent.on("message", lambda m, handle: parent.send_nowait(["user", m]))
            parent.on("internal_message", lambda m, handle: parent.send_nowait(["internal", m]))
            await parent.wait_disconnected()
    """
    async with peer(javascript, python) as child:
        internal = []
        child.on("internal_message", lambda *args: internal.append(args))
        assert await child.recv() == ({"cmd": "fooNODE_"}, None)
        for message in ({"cmd": "fooNODE_"}, {"cmd": "NODE_bar"}):
            await child.send(message)
        assert await child.recv() == (["user", {"cmd": "fooNODE_"}], None)
        assert await child.recv() == (["internal", {"cmd": "NODE_bar"}], None)
        assert internal == [({"cmd": "NODE_bar"}, None)]
        await goodbye(child)


@also("test-child-process-internal")
def test_internal_message_under_node(under_node) -> None:
    """The same with the roles exchanged."""
    javascript = """
        const child = fork();
        child.on('message', (m) => show(['user', m]));
        child.on('internalMessage', (m) => show(['internal', m]));
        child.send({ cmd: 'fooNODE_' });
        child.send({ cmd: 'NODE_bar' });
    """
    python = """
        async def main(parent):
            internal = asyncio.get_running_loop().create_future()
            parent.on("internal_message", lambda message, handle: internal.set_result(message))
            message, handle = await parent.recv()
            await parent.send(message)
            await parent.send(await internal)
    """
    lines = under_node(javascript, python)
    assert lines == [["user", {"cmd": "fooNODE_"}], ["internal", {"cmd": "NODE_bar"}]]


@node_test(
    "test-child-process-ipc-next-tick",
    expects="every message is delivered, though the listener throws each time",
    ours="the same: each exception goes to the loop's exception handler",
    why="one listener's mistake must not cost others their messages",
)
@pytest.mark.unhandled(*["boom"] * 10)
async def test_listener_raises(peer) -> None:
    """All ten come."""
    javascript = "for (let n = 0; n < 10; n++) process.send(n);"
    python = """
        async def main(parent):
            for n in range(10):
                parent.send_nowait(n)
    """
    seen = []

    def listener(message, handle) -> None:
        seen.append(message)
        raise RuntimeError("boom")

    async with peer(javascript, python) as child:
        child.on("message", listener)
        await event(child, "close")
    assert seen == list(range(10))


@also("test-child-process-ipc-next-tick")
def test_listener_raises_under_node(under_node) -> None:
    """A Python child whose listener raises gets all of Node's messages."""
    javascript = """
        const child = fork();
        for (let n = 0; n < 10; n++) child.send(n);
        child.on('message', show);
    """
    python = """
        seen, handled = [], []

        def listener(message, handle):
            seen.append(message)
            if len(seen) == 10:
                done.set()
            raise RuntimeError("boom")

        async def main(parent):
            global done
            done = asyncio.Event()
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(lambda _, context: handled.append(str(context["exception"])))
            parent.on("message", listener)
            await done.wait()
            await asyncio.sleep(0)
            await parent.send([seen, handled])
    """
    assert under_node(javascript, python) == [[list(range(10)), ["boom"] * 10]]
