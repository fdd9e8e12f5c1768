"""What a review of the core found, each as the test that it failed."""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from typing import Any

import pytest

import handleipc
from handleipc import Channel, FileDescriptor, Limits
from handleipc.asyncio import hangups
from handleipc.asyncio.process import _ParentChannel
from handleipc.asyncio.registry import register
from handleipc.exceptions import LocalProtocolError
from handleipc.wire.syscalls import Refused
from tests.asyncio.helpers import (
    ACK,
    NACK,
    RawPeer,
    Recorder,
    ack,
    clean_registry,
    close_all,
    connection,
    join,
    joined,
    raw_peer,
    settle,
    take_rest,
    turns,
    until,
)

SO_SNDBUFFORCE = 32


class Interrupt(BaseException):
    """What a signal handler raises."""


class Thing:
    """An object of the application's with descriptors of its own."""

    def __init__(self, count: int) -> None:
        self.fds = [os.open(os.devnull, os.O_RDONLY) for _ in range(count)]
        self.reads = 0

    def close(self) -> None:
        while self.fds:
            os.close(self.fds.pop())


class Conversion:
    tag = "thing"

    def to_wire(self, thing: Thing) -> tuple[Any, list[int]]:
        thing.reads += 1
        return None, list(thing.fds)

    def from_wire(self, details: Any, fds: list[FileDescriptor]) -> Any:
        return fds[0]


def descriptor() -> FileDescriptor:
    return FileDescriptor(os.open(os.devnull, os.O_RDONLY))


async def write_all(peer: RawPeer, data: bytes) -> float:
    """Write while the channel reads; returns the longest turn of the loop meanwhile."""
    view, longest = memoryview(data), 0.0
    while view:
        try:
            view = view[peer.sock.send(view) :]
        except BlockingIOError:
            pass
        start = time.perf_counter()
        await asyncio.sleep(0)
        longest = max(longest, time.perf_counter() - start)
    return longest


# -- missed wake-ups and busy loops --------------------------------------------------------------


async def test_a_read_without_memory_once() -> None:
    """ENOMEM of one recvmsg passes: the next read takes what there is."""
    async with joined("native") as (a, b):
        real, calls = b._link.read, []

        def read(*args: int) -> Any:
            calls.append(args)
            if len(calls) == 1:
                raise OSError(errno.ENOMEM, "no memory")
            return real(*args)

        b._link.read = read  # type: ignore[method-assign, assignment]
        a.send_nowait("x")
        async with asyncio.timeout(2):
            assert await b.recv() == ("x", None)


async def test_a_handle_to_be_sent_again_behind_a_full_socket() -> None:
    """A node peer that sends handles and reads no ACK costs no CPU."""
    async with raw_peer("node") as (channel, peer):
        channel._link._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        channel.on("message", lambda _, handle: handle and handle.close())
        client, served = connection()
        sent = asyncio.ensure_future(channel.send("h", served))
        assert (await peer.line())["cmd"] == "NODE_HANDLE"
        read, write = os.pipe()
        line = {"cmd": "NODE_HANDLE", "type": "net.Native", "msg": 0}
        for _ in range(60):
            peer.write(line, fds=(write,))
            await turns(5)
            if channel._is_writing:
                break
        os.close(read)
        os.close(write)
        assert channel._is_writing
        peer.write(NACK)
        await until(lambda: channel._protocol.outgoing.node.nacks)
        count = 0
        real = channel._protocol.next_stage

        def counted() -> Any:
            nonlocal count
            count += 1
            return real()

        await asyncio.sleep(0.1)
        channel._protocol.next_stage = counted  # type: ignore[method-assign]
        await asyncio.sleep(0.3)
        channel.abort()
        await asyncio.gather(sent, return_exceptions=True)
        client.close()
        assert count < 20


def test_a_second_loop_after_one_closed_without_a_word() -> None:
    """``run_until_complete`` and ``close`` do not end asynchronous generators."""
    ours, theirs = socket.socketpair()
    peer = RawPeer(theirs)

    async def first() -> _ParentChannel:
        channel = _ParentChannel(ours, Limits())
        await turns()
        return channel

    loop = asyncio.new_event_loop()
    channel = loop.run_until_complete(first())
    loop.close()

    async def second() -> Any:
        channel._attach()  # as parent() does
        peer.write("hello")
        try:
            async with asyncio.timeout(2):
                return await channel.recv()
        finally:
            channel.abort()

    try:
        assert asyncio.run(second()) == ("hello", None)
    finally:
        peer.close()


async def test_a_conversion_that_makes_one_object_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a conversion returns may be a token, the same for all."""
    clean_registry(monkeypatch)

    class Token(Conversion):
        def from_wire(self, details: Any, fds: list[FileDescriptor]) -> Any:
            for fd in fds:
                fd.close()
            return "taken"

    register(Thing, Token())
    async with joined("native") as (a, b):
        a.on("undelivered", lambda _, thing, __: thing.close())
        for number in range(200):
            a.send_nowait(number, Thing(2))
        try:
            async with asyncio.timeout(3):
                for _ in range(200):
                    await b.recv()
        finally:
            a.abort()
            b.abort()
            b._protocol.incoming.ready.clear()  # "taken" has no close()
            b._protocol.incoming.deliveries._sizes.clear()


async def test_a_reader_after_an_interrupted_turn() -> None:
    """An exception out of the turn that a ``recv`` begins ends that ``recv`` alone."""
    async with joined("native") as (a, b):
        b._protocol.incoming.deliveries.pace = 0
        a.send_nowait(1, descriptor())
        await until(lambda: b._protocol.incoming.held)
        real = b._exchange

        def exchange() -> bool:
            b._exchange = real  # type: ignore[method-assign]
            raise Interrupt

        b._exchange = exchange  # type: ignore[method-assign]
        with pytest.raises(Interrupt):
            await b.recv()
        try:
            async with asyncio.timeout(2):
                _, handle = await b.recv()
                handle.close()
        finally:
            b._reader = None


def test_waiting_for_an_end_between_two_loops() -> None:
    """``abort()`` after the loop has ended is an end like any other."""
    ours, theirs = socket.socketpair()

    async def first() -> Channel:
        channel = Channel(ours, Limits())
        await turns()
        return channel

    channel = asyncio.run(first())
    channel.abort()
    theirs.close()

    async def second() -> None:
        async with asyncio.timeout(1):
            await channel.wait_disconnected()

    asyncio.run(second())


# -- owners of descriptors -----------------------------------------------------------------------


@pytest.mark.parametrize("what", ["abort", "disconnect"])
async def test_an_end_from_within_a_conversion(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """A conversion of a handle that was held may end the channel: its descriptors are its own."""
    clean_registry(monkeypatch)
    lost: list[int] = []

    class Ending(Conversion):
        def from_wire(self, details: Any, fds: list[FileDescriptor]) -> Any:
            number = fds[0].fileno()
            getattr(b, what)()
            try:
                os.fstat(number)
            except OSError:
                lost.append(number)
                fds[0]._fd = -1  # or it would be closed a second time
            return fds[0]

    register(Thing, Ending())
    async with joined("native") as (a, b):
        b._protocol.incoming.deliveries.pace = 0
        back = Recorder()
        a.on("undelivered", back)
        a.send_nowait(1, Thing(1))
        a.send_nowait(2)
        await until(lambda: b._protocol.incoming.held)
        unexpected = None
        try:
            _, handle = await b.recv()
            handle.close()
        except handleipc.HandleIPCError:
            pass
        except IndexError as error:
            unexpected = error
        await turns()
        b._reader = None
        for _, thing, _ in back.calls:
            thing.close()
        assert not lost and unexpected is None


async def test_an_end_from_within_to_wire(monkeypatch: pytest.MonkeyPatch) -> None:
    """``to_wire`` is called at each write, and may end the channel."""
    clean_registry(monkeypatch)

    class Ending(Conversion):
        def to_wire(self, thing: Thing) -> tuple[Any, list[int]]:
            if thing.reads:
                a.abort()
            return super().to_wire(thing)

    register(Thing, Ending())
    async with joined("native") as (a, _):
        thing = Thing(1)
        try:
            with pytest.raises(handleipc.HandleIPCError):
                await a.send(1, thing)
        finally:
            thing.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="SO_SNDBUFFORCE")
async def test_an_acknowledgement_at_the_end_of_a_long_queue() -> None:
    """What the peer has acknowledged does not come back, however much stands before."""
    async with raw_peer("native") as (channel, peer):
        peer.sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 64 << 20)
        client, served = connection()
        sent = asyncio.ensure_future(channel.send(1, served))
        await peer.handles(1)
        for _ in range(40):
            peer.write({"cmd": "NODE_HANDLEIPC", "unknown": "y" * 100_000})
        peer.write(ack(1))
        channel.abort()
        (result,) = await asyncio.gather(sent, return_exceptions=True)
        client.close()
        if not served.closed:
            served.close()
        assert result is None or isinstance(result, handleipc.HandleInDoubt)


async def test_an_interrupted_write_is_not_repeated() -> None:
    """A signal handler that raises right after the system call: the bytes have left."""
    async with raw_peer("node") as (channel, peer):
        await turns()
        real = channel._link.write

        def write(*stage: Any) -> Any:
            channel._link.write = real  # type: ignore[method-assign]
            real(*stage)
            raise Interrupt

        channel._link.write = write  # type: ignore[method-assign]
        channel.send_nowait("once")
        with pytest.raises(Interrupt):
            channel._turn()
        await turns()
        assert peer.unread().count(b"once") == 1


async def test_an_interrupted_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every held descriptor is closed, whatever a conversion raises."""
    clean_registry(monkeypatch)

    class Interrupted(Conversion):
        def from_wire(self, details: Any, fds: list[FileDescriptor]) -> Any:
            for fd in fds:
                fd.close()
            raise Interrupt

    register(Thing, Interrupted())
    async with raw_peer("native") as (channel, peer):
        channel._protocol.incoming.deliveries.pace = 0
        pipes = [os.pipe() for _ in range(3)]
        for number, (_, write) in enumerate(pipes, 1):
            peer.write(b'[1,1]\n[2,%d,1,"thing",0]\n' % number, fds=(write,))
            os.close(write)
        await until(lambda: len(channel._protocol.incoming.held) == 3)
        held = [item.fds for item in channel._protocol.incoming.held]
        with pytest.raises(Interrupt):
            channel._end(handleipc.HandleIPCError("the peer has ended"), peer_is_dead=True)
        leaked = []
        for fds in held[1:]:
            for fd in fds or ():
                try:
                    os.close(fd)
                    leaked.append(fd)
                except OSError:
                    pass
        for read, _ in pipes:
            os.close(read)
        assert not leaked


async def test_a_drop_listener_that_closes_the_server() -> None:
    """A closed server takes nobody in."""
    server = await handleipc.listen("127.0.0.1", 0)
    server.max_connections = 1
    server.on("drop", lambda *_: server.close())
    waiting = [socket.create_connection(server.sockname) for _ in range(3)]
    got = []
    async with asyncio.timeout(5):
        async for served in server:
            got.append(served)
            served.close()
    for client in waiting:
        client.close()
    server.close()
    assert not got


def in_a_copy(take: Any) -> int:
    """Fork, begin to wait in the copy, and return 0 if it was refused, 1 if it got something."""
    pid = os.fork()
    if pid == 0:
        code = 9
        try:
            take().send(None)
        except handleipc.ForkedCopy:
            code = 0
        except StopIteration:
            code = 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


async def test_a_copy_iterates_over_a_channel() -> None:
    """What has arrived is the original's, which takes it too."""
    async with joined("native") as (a, b):
        a.send_nowait(1)
        await until(lambda: b._protocol.incoming.ready)
        code = in_a_copy(b.__anext__)
        assert await b.recv() == (1, None)
        assert code == 0


async def test_a_copy_iterates_over_a_server() -> None:
    """A connection that was accepted before the fork has one owner."""
    server = await handleipc.listen("127.0.0.1", 0)
    waiting = [socket.create_connection(server.sockname) for _ in range(2)]
    (await anext(server)).close()
    assert server.waiting
    code = in_a_copy(server.__anext__)
    server.close()
    for client in waiting:
        client.close()
    assert code == 0


# -- hostile peers -------------------------------------------------------------------------------


async def test_a_node_peer_floods_behind_its_handle() -> None:
    """Reading pauses, wherever the messages of a node peer wait."""
    limits = Limits(window=4, held_messages=100, held_bytes=10_000)
    async with raw_peer("node", limits) as (channel, peer):
        read, write = os.pipe()
        for number in range(5):
            line = {"cmd": "NODE_HANDLE", "type": "net.Native", "msg": number}
            peer.write(line, fds=(write,))
            if number < 4:
                assert await peer.line() == ACK
        os.close(read)
        os.close(write)
        await until(lambda: channel._protocol.incoming.held)
        for _ in range(200):
            try:
                peer.sock.send(b"1\n" * 5000)
            except BlockingIOError:
                pass
            await asyncio.sleep(0)
        assert len(channel._protocol.incoming.held) <= 5000


async def test_internal_messages_behind_held_ones() -> None:
    """8 KB of the peer's are no seconds of CPU."""
    async with raw_peer("native") as (channel, peer):
        channel._protocol.incoming.deliveries.pace = 0
        seen = Recorder()
        channel.on("internal_message", seen)
        read, write = os.pipe()
        peer.write(b'[1,1]\n[2,1,1,"fd",0]\n', fds=(write,))
        os.close(read)
        os.close(write)
        await write_all(peer, b"[0,1]\n" * 60_000)
        await until(lambda: len(channel._protocol.incoming.held) == 60_001)
        start = time.process_time()
        await write_all(peer, b'[0,{"cmd":"NODE_x"}]\n' * 400)
        await seen.next(400)
        assert time.process_time() - start < 0.5


async def test_questions_with_long_keys() -> None:
    """A key of that length is none, and is not kept for an answer."""
    async with raw_peer("node", Limits(queued_bytes=1 << 20)) as (channel, peer):
        errors = Recorder()
        channel.on("error", errors)
        line = b'{"cmd":"NODE_SOCKET_GET_COUNT","key":"%b"}\n' % (b"k" * 100_000)
        for _ in range(100):  # 10 MB
            await write_all(peer, line)
        await errors.next(100)
        assert channel.connected
        assert channel._protocol.outgoing.unsent_bytes == 0


async def test_a_question_behind_a_large_message_of_ours() -> None:
    """One message may be larger than ``queued_bytes``; asking for a count then ends nothing."""
    async with joined("native", Limits(queued_bytes=100_000)) as (a, b):
        server = await handleipc.listen("127.0.0.1", 0)
        client = socket.create_connection(server.sockname)
        sent = asyncio.ensure_future(a.send(1, await anext(server)))
        _, served = await b.recv()
        await sent
        a.send_nowait("x" * 3_000_000)
        counted = asyncio.ensure_future(server.get_connections(timeout=5))
        reading = asyncio.ensure_future(b.recv())
        await asyncio.gather(reading, counted, return_exceptions=True)
        ended = not a.connected
        served.close()
        client.close()
        server.close()
        assert not ended


async def test_a_long_refusal() -> None:
    """What a peer says is cut before it is repeated."""
    async with raw_peer("native") as (channel, peer):
        client, served = connection()
        sent = asyncio.ensure_future(channel.send(1, served))
        await peer.handles(1)
        refusal = {**ack(1), "refuse": [[1, 1, "x" * 1_000_000]]}
        await write_all(peer, json.dumps(refusal).encode() + b"\n")
        (error,) = await asyncio.gather(sent, return_exceptions=True)
        client.close()
        served.close()
        assert len(str(error)) < 1000


async def test_nonsense_is_cut() -> None:
    """Likewise of what makes no sense: millions of values cost seconds."""
    async with raw_peer("native") as (channel, peer):
        server = await handleipc.listen("127.0.0.1", 0)
        client = socket.create_connection(server.sockname)
        sent = asyncio.ensure_future(channel.send(1, await anext(server)))
        await peer.handles(1)
        peer.write(ack(1))
        await sent
        errors = Recorder()
        channel.on("error", errors)
        key = server._group.key
        answer = [0, {"cmd": "NODE_SOCKET_COUNT", "key": key, "count": [1] * 100_000}]
        await write_all(peer, json.dumps(answer, separators=(",", ":")).encode() + b"\n")
        ((error,),) = await errors.next()
        client.close()
        server.close()
        assert len(str(error)) < 1000


# -- loops and threads ---------------------------------------------------------------------------


def test_a_second_loop_of_the_same_thread() -> None:
    """A loop that is neither running nor closed has the channel: ``ChannelBusy`` says so."""

    async def first() -> tuple[Channel, Channel]:
        return join("native")

    one, two = asyncio.new_event_loop(), asyncio.new_event_loop()
    a, b = one.run_until_complete(first())
    try:
        with pytest.raises(handleipc.ChannelBusy):
            two.run_until_complete(b.recv())
    finally:
        one.run_until_complete(close_all(a, b))
        one.run_until_complete(one.shutdown_asyncgens())
        one.close()
        two.close()


def test_a_wake_on_the_right_thread() -> None:
    """The budget is the process's: who waits for it may be on another thread."""
    woken: list[int] = []
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def there(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(20)

    async def wait_for_room() -> tuple[Channel, Channel]:
        a, b = join("native")
        await settle(a, b)
        a._schedule_turn = lambda: woken.append(threading.get_ident())  # type: ignore[method-assign]
        a._protocol.wrote(Refused.IN_FLIGHT)  # as after ETOOMANYREFS
        return a, b

    async def deliver() -> None:
        async with joined("native") as (a, b):
            sent = asyncio.ensure_future(a.send(1, descriptor()))
            (await b.recv())[1].close()
            await sent

    channels = there(wait_for_room())
    try:
        asyncio.run(deliver())
    finally:
        there(close_all(*channels))
        there(loop.shutdown_asyncgens())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
    assert all(ident == thread.ident for ident in woken)


def test_loops_are_forgotten() -> None:
    """A loop in which a channel was paused is collected like any other."""

    async def pause() -> weakref.ref[asyncio.AbstractEventLoop]:
        async with raw_peer("node", Limits(held_messages=10)) as (channel, peer):
            peer.write(*range(100))
            await until(lambda: channel._watches_hangup)
            return weakref.ref(asyncio.get_running_loop())

    loop = asyncio.run(pause())
    gc.collect()
    assert loop() is None


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_an_abort_between_loops_with_a_server_unread() -> None:
    """``abort()`` raises nothing, whatever lies in the socket."""
    ours, theirs = socket.socketpair()
    peer = RawPeer(theirs)

    async def first() -> Channel:
        channel = Channel(ours, Limits())
        await turns()
        return channel

    channel = asyncio.run(first())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        line = {"cmd": "NODE_HANDLE", "type": "net.Server", "msg": 0}
        peer.write(line, fds=(listener.fileno(),))
    try:
        channel.abort()
    finally:
        peer.close()
        asyncio.run(take_rest(channel))
        gc.collect()


# -- what is told --------------------------------------------------------------------------------


async def test_a_child_that_opened_its_channel_and_ended() -> None:
    """Its exit and its first message are seen in one turn: it did open its channel."""
    program = "import asyncio, handleipc\nasyncio.run(handleipc.parent())"
    child = await handleipc.spawn(
        sys.executable, "-c", program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # the program is busy meanwhile
    child._on_exit()
    await child.wait()
    await child.wait_disconnected()
    assert child._protocol.peer.was_opened
    assert "never opened" not in str(child._protocol.error)


async def test_send_nowait_calls_no_listener() -> None:
    """As its docstring says, of a peer that has closed, too."""
    async with raw_peer("native") as (channel, peer):
        inside, calls = False, []
        channel.on("message", lambda message, _: calls.append((message, inside)))
        peer.write(b"[0,1]\n[0,2]\n")
        peer.close()
        inside = True
        channel.send_nowait("x" * 20_000)
        inside = False
        await turns()
        assert calls == [(1, False), (2, False)]


async def test_an_interrupted_acknowledgement(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal handler that raises while copies are closed: every sender is told all the same."""
    clean_registry(monkeypatch)
    register(Thing, Conversion())

    class Interrupting(Thing):
        def close(self) -> None:
            super().close()
            raise Interrupt

    async with raw_peer("native") as (channel, peer):
        first, second = Interrupting(1), Thing(1)
        sent = [asyncio.ensure_future(channel.send(1, thing)) for thing in (first, second)]
        await turns()
        await peer.handles(2)
        peer.write(ack(2))
        channel._watch(reading=False, writing=False)
        with pytest.raises(Interrupt):
            channel._turn(reading=True)
        await turns()
        told = [task.done() for task in sent]
        for task in sent:
            task.cancel()
        await asyncio.gather(*sent, return_exceptions=True)
        second.close()
        assert told[1] and channel._protocol.outgoing.handles_out == 0


async def test_a_child_that_disconnects_where_proc_is_hidden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With hidepid, without /proc, or with ``user=``: a polite end is told at once."""

    def refuse(*_: Any) -> Any:
        raise FileNotFoundError(errno.ENOENT, "hidepid")

    monkeypatch.setattr("handleipc.asyncio.reaping.open", refuse, raising=False)
    program = (
        "import asyncio, handleipc, sys\n"
        "async def main():\n"
        "    (await handleipc.parent()).disconnect()\n"
        "    await asyncio.to_thread(sys.stdin.read)\n"
        "asyncio.run(main())"
    )
    child = await handleipc.spawn(sys.executable, "-c", program, stdin=subprocess.PIPE)
    try:
        await until(lambda: child._link.at_eof)
        async with asyncio.timeout(2):
            await child.wait_disconnected()
    finally:
        child.kill()
        await child.wait()
        assert child.stdin is not None
        child.stdin.close()


async def test_ready_of_a_child_that_opened_and_closed() -> None:
    """It was ready, whatever it did then: its first line and its EOF may come in one read."""
    read, write = os.pipe()
    program = (
        "import asyncio, handleipc, os, sys\n"
        "async def main():\n"
        "    channel = await handleipc.parent()\n"
        "    channel.disconnect()\n"
        "    await channel.wait_disconnected()\n"
        f"    os.write({write}, b'.')\n"
        "    await asyncio.to_thread(sys.stdin.read)\n"
        "asyncio.run(main())"
    )
    child = await handleipc.spawn(
        sys.executable, "-c", program, stdin=subprocess.PIPE, pass_fds=[write]
    )
    try:
        os.read(read, 1)  # this program is busy until then
        await child.ready(20)
    finally:
        os.close(read)
        os.close(write)
        child.kill()
        await child.wait()
        await child.wait_disconnected()
        assert child.stdin is not None
        child.stdin.close()


@pytest.mark.parametrize("then", ["moves on", "aborts"])
def test_closed_loops_are_forgotten(then: str) -> None:
    """So is one that was closed without a word, with what a paused channel had watched there."""

    async def pause() -> tuple[_ParentChannel, RawPeer]:
        ours, theirs = socket.socketpair()
        channel, peer = _ParentChannel(ours, Limits(held_messages=10)), RawPeer(theirs)
        peer.write(*range(100))
        await until(lambda: channel._watches_hangup)
        return channel, peer

    async def move_on() -> None:
        channel._attach()  # as parent() does
        assert loop not in hangups._watchers
        assert await channel.recv() == (0, None)
        channel.abort()

    loop = asyncio.new_event_loop()
    channel, peer = loop.run_until_complete(pause())
    loop.close()
    if then == "moves on":
        asyncio.run(move_on())
    else:
        channel._end(LocalProtocolError("over"))
        assert loop not in hangups._watchers
    peer.close()
