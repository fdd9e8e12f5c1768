"""How channels end: order of events, disconnecting, what keeps a child alive."""

from __future__ import annotations

import asyncio
import socket

import pytest

import handleipc
from tests.conformance.peers import (
    clients,
    collect_events,
    connection,
    event,
    goodbye,
    receive_all,
)
from tests.conformance.record import BETTER, also, node_test


@node_test(
    "test-child-process-fork-close",
    expects="message, then exit, then close, each once",
    ours="the same, with disconnect before exit",
    why="all that the child wrote is delivered before its end is told",
)
async def test_order_of_the_end(peer) -> None:
    """message, disconnect, exit, close."""
    javascript = "process.send('hello');"
    python = """
        async def main(parent):
            await parent.send("hello")
    """
    async with peer(javascript, python) as child:
        events = collect_events(child)
        child.on("message", lambda message, handle: events.append(message))
        await event(child, "close")
    assert events == ["hello", ["disconnect", False], ["exit", False, 0, None],
                      ["close", False, 0, None]]  # fmt: skip


@also("test-child-process-fork-close")
def test_order_of_the_end_under_node(under_node) -> None:
    """The same as a Node parent sees it."""
    javascript = "events(fork()).on('message', show);"
    python = """
        async def main(parent):
            await parent.send("hello")
    """
    end = [["disconnect", False], ["exit", False, 0, None], ["close", False, 0, None]]
    assert under_node(javascript, python) == ["hello", *end]


@node_test(
    "test-child-process-fork-ref",
    expects="a 'disconnect' listener keeps the child alive, and is called after the parent's"
    " `disconnect()`",
    ours="the listener is called likewise; what keeps a Python child alive is what its `main` awaits:"
    " `wait_disconnected()`, `recv()` or iteration",
    why="an asyncio program lasts as long as its main coroutine; listeners do not prolong it",
)
async def test_disconnect_listener(peer) -> None:
    """A child that waits for the end is alive until then, and hears of it."""
    javascript = """
        process.on('disconnect', () => { process.exitCode = 3; });
        process.send('up');
    """
    python = """
        async def main(parent):
            parent.on("disconnect", lambda: heard.append(parent.connected))
            heard = []
            await parent.send("up")
            await parent.wait_disconnected()
            await asyncio.sleep(0)
            sys.exit(3 if heard == [False] else 4)
    """
    async with peer(javascript, python) as child:
        assert await child.recv() == ("up", None)
        child.disconnect()
        assert await child.wait() == 3


@also("test-child-process-fork-ref")
def test_disconnect_listener_under_node(under_node, tmp_path) -> None:
    """The same under Node; and a plain ``module:function`` stays until disconnect by itself."""
    javascript = """
        const child = fork();
        child.on('message', (m) => { show(m); child.disconnect(); });
        child.on('exit', show);
    """
    python = """
        async def main(parent):
            heard = []
            parent.on("disconnect", lambda: heard.append(parent.connected))
            await parent.send("up")
            await parent.wait_disconnected()
            await asyncio.sleep(0)
            sys.exit(3 if heard == [False] else 4)
    """
    assert under_node(javascript, python) == ["up", 3]


def stays(parent: handleipc.Channel) -> None:
    """A child's function: returns at once."""
    parent.on("message", lambda message, handle: parent.send_nowait(message))


@also("test-child-process-fork-ref")
async def test_plain_function_stays_until_disconnect() -> None:
    """A child that only adds listeners lives until the parent disconnects, as Node's does."""
    child = await handleipc.fork(f"{__name__}:stays")
    await child.send("still here")
    assert await child.recv() == ("still here", None)
    await goodbye(child)


@node_test(
    "test-child-process-fork-ref2",
    expects="after the child's own `disconnect()` a new 'message' listener neither keeps it alive nor"
    " crashes it",
    ours="the same: the listener is taken, nothing comes, the child exits 0",
    why="a listener says who reads, not who lives",
)
async def test_listener_after_disconnect(peer) -> None:
    """Listening to a channel one has closed is harmless."""
    javascript = """
        process.disconnect();
        process.on('message', () => {});
    """
    python = """
        async def main(parent):
            parent.disconnect()
            parent.on("message", lambda message, handle: None)
    """
    async with peer(javascript, python) as child:
        events = collect_events(child)
        assert [message async for message in child] == []
        assert await child.wait() == 0
        await asyncio.sleep(0)
    assert events[:2] == [["disconnect", False], ["exit", False, 0, None]]


@also("test-child-process-fork-ref2")
def test_listener_after_disconnect_under_node(under_node) -> None:
    """The same under Node."""
    python = """
        async def main(parent):
            parent.disconnect()
            parent.on("message", lambda message, handle: None)
    """
    end = [["disconnect", False], ["exit", False, 0, None], ["close", False, 0, None]]
    assert under_node("events(fork());", python) == end


@node_test(
    "test-child-process-disconnect",
    expects="'disconnect' comes later, with `connected` false on both sides at once; a second call is"
    " the error `ERR_IPC_DISCONNECTED`; the child ends by itself",
    ours="the same, but that a second `disconnect()` does nothing",
    verdict=BETTER,
    why="closing twice is no error in asyncio; two parts of a program may both want the end",
)
async def test_disconnect(peer) -> None:
    """The event is asynchronous and comes once, on both sides."""
    javascript = """
        process.on('disconnect', () => { process.exitCode = process.connected ? 4 : 3; });
        process.on('message', () => {});
        process.send('up');
    """
    python = """
        async def main(parent):
            heard = []
            parent.on("disconnect", lambda: heard.append(parent.connected))
            await parent.send("up")
            async for message in parent:
                pass
            parent.disconnect()
            await parent.wait_disconnected()
            await asyncio.sleep(0)
            sys.exit(3 if heard == [False] else 4)
    """
    async with peer(javascript, python) as child:
        events = collect_events(child)
        assert await child.recv() == ("up", None)
        assert child.connected
        child.disconnect()
        assert not child.connected
        child.disconnect()
        assert events == []
        await event(child, "close")
        child.disconnect()
    end = [["disconnect", False], ["exit", False, 3, None], ["close", False, 3, None]]
    assert events == end


@also("test-child-process-disconnect")
def test_disconnect_under_node(under_node) -> None:
    """A Python child disconnects: Node hears of it, and the child goes on without."""
    python = """
        async def main(parent):
            heard = []
            parent.on("disconnect", lambda: heard.append(parent.connected))
            parent.disconnect()
            assert not parent.connected and not heard
            parent.disconnect()
            await parent.wait_disconnected()
            await asyncio.sleep(0)
            sys.exit(3 if heard == [False] else 4)
    """
    end = [["disconnect", False], ["exit", False, 3, None], ["close", False, 3, None]]
    assert under_node("events(fork());", python) == end


@node_test(
    "test-child-process-send-after-close",
    expects="after 'close', `send` returns false, and both the 'error' event and the callback get"
    " `ERR_IPC_CHANNEL_CLOSED`, 'Channel closed'",
    ours="`send` and `send_nowait` raise `ChannelBroken` (`ChannelClosed` after an own `disconnect()`)",
    verdict=BETTER,
    why="an exception where the mistake is, instead of an event that kills a program without listener",
)
async def test_send_after_close(peer) -> None:
    """Each way to send raises, at once, and the handle stays the caller's."""
    async with peer("process.exit(0)", "async def main(parent): pass") as child:
        await event(child, "close")
        with pytest.raises(handleipc.ChannelBroken):
            await child.send("late")
        with pytest.raises(handleipc.ChannelBroken):
            child.send_nowait("late")
        async with connection() as (_, accepted):
            with pytest.raises(handleipc.ChannelBroken):
                await child.send("late", accepted)
            assert not accepted.closed


@also("test-child-process-send-after-close")
def test_send_after_close_under_node(under_node) -> None:
    """A Python child whose Node parent has disconnected; and one that has itself."""
    javascript = "const child = fork(); child.disconnect(); child.on('exit', show);"
    python = """
        async def main(parent):
            assert [message async for message in parent] == []
            try:
                await parent.send("late")
            except handleipc.ChannelBroken:
                parent.disconnect()
            try:
                parent.send_nowait("late")
            except handleipc.ChannelClosed:
                sys.exit(3)
    """
    assert under_node(javascript, python) == [3]


@node_test(
    "test-child-process-fork-closed-channel-segfault",
    expects="the child exits at the first handle while a second is queued: no crash, `channel` is"
    " null at 'close', only known errors",
    ours="no crash; each handle was acknowledged or comes back with `HandleNotDelivered`; at `close`"
    " the channel is not connected",
    verdict=BETTER,
    why="Node loses the second connection: its client waits for ever",
)
async def test_child_exits_at_the_first_handle(peer) -> None:
    """Whatever was not taken comes back, usable."""
    javascript = "process.on('message', () => process.exit(1));"
    python = """
        async def main(parent):
            await parent.recv()
            os._exit(1)
    """
    limits = handleipc.Limits(window=1)
    async with peer(javascript, python, limits=limits) as child, connection() as (one, first):
        async with connection() as (two, second):
            events, closed = collect_events(child), event(child, "close")
            sends = [asyncio.create_task(child.send(n, c)) for n, c in enumerate((first, second))]
            outcomes = await asyncio.gather(*sends, return_exceptions=True)
            await closed
            assert events[-1] == ["close", False, 1, None]
            for outcome, given in zip(outcomes, (first, second), strict=True):
                if outcome is None:
                    assert given.closed
                else:
                    assert isinstance(outcome, handleipc.HandleNotDelivered)
                    assert outcome.handle is given
                    assert not given.closed


@also("test-child-process-fork-closed-channel-segfault")
def test_python_child_exits_at_the_first_handle(under_node) -> None:
    """Node survives a Python child that dies so, with no error but those it knows."""
    javascript = """
        const child = fork();
        const known = ['ERR_IPC_CHANNEL_CLOSED', 'ECONNRESET', 'ECONNREFUSED', 'EPIPE'];
        child.on('error', (error) => assert(known.includes(error.code), error));
        child.on('close', (code) => { show([code, child.channel]); process.exit(); });
        const server = net.createServer().listen(0, '127.0.0.1', () => {
          for (let n = 0; n < 2; n++) net.connect(server.address()).on('error', () => {});
        });
        server.on('connection', (socket) => child.send('take', socket));
    """
    python = """
        async def main(parent):
            taken = await parent.recv()
            os._exit(1)
    """
    assert under_node(javascript, python) == [[1, None]]


@node_test(
    "fork-regr-gh-2847",
    expects="(older) handles sent to a worker that dies meet a null channel: no crash, only known"
    " errors",
    ours="the same: `HandleNotDelivered` or `ChannelBroken` for each, nothing else",
    why="each handle comes back, and nothing reaches the loop's exception handler",
)
async def test_sends_to_a_dying_child(peer) -> None:
    """Sends of every kind, before, while and after a child dies."""
    javascript = "process.once('message', () => process.exit(0));"
    python = """
        async def main(parent):
            await parent.recv()
            os._exit(0)
    """
    with socket.socket(type=socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        async with peer(javascript, python) as child:
            child.send_nowait("die")
            with pytest.raises((handleipc.HandleNotDelivered, handleipc.ChannelBroken)) as caught:
                for _ in range(1000):
                    await child.send("more", udp)
            if isinstance(caught.value, handleipc.HandleNotDelivered):
                assert caught.value.handle is udp
            assert await child.wait() == 0
            with pytest.raises(handleipc.ChannelBroken):
                child.send_nowait("more", udp)
            assert udp.fileno() >= 0


@node_test(
    "fork-net2",
    expects="(older) `disconnect()` right after sending sockets: all arrive first, the child ends,"
    " and the server's `close` waits for them",
    ours="the same, in both roles",
    why="`disconnect()` flushes what was sent before it",
)
async def test_queued_disconnect(peer) -> None:
    """Sockets sent without waiting, then an end: nothing is lost."""
    javascript = """
        process.on('message', (n, socket) => socket.end(String(n)));
    """
    python = """
        async def main(parent):
            async for n, connection in parent:
                await connection.end(str(n).encode())
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                await task
    """
    async with peer(javascript, python) as child:
        server = await handleipc.listen("127.0.0.1", 0)
        async with clients(server.sockname, 8) as connected:
            for n in range(8):
                child.send_nowait(n, await anext(server))
            child.disconnect()
            server.close()
            answers = [await receive_all(client) for client in connected]
            assert sorted(answers) == [str(n).encode() for n in range(8)]
            for client in connected:
                client.close()
            assert await child.wait() == 0
            await asyncio.wait_for(server.wait_closed(), 10)


@also("fork-net2")
def test_queued_disconnect_under_node(under_node) -> None:
    """A Node parent sends sockets and disconnects at once."""
    javascript = """
        const child = fork();
        const server = net.createServer({ pauseOnConnect: true }).listen(0, '127.0.0.1', () => {
          for (let n = 0; n < 4; n++)
            net.connect(server.address()).on('data', (data) => show(String(data)));
        });
        let count = 0;
        server.on('connection', (socket) => {
          child.send(count++, socket);
          if (count === 4) { child.disconnect(); server.close(() => show('closed')); }
        });
    """
    python = """
        async def main(parent):
            async for n, connection in parent:
                await connection.end(str(n).encode())
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                await task
    """
    assert sorted(under_node(javascript, python)) == ["0", "1", "2", "3", "closed"]
