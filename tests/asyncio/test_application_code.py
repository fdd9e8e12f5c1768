"""The application's own code inside a channel: it raises, sends, aborts, and closes what waits."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import handleipc
from handleipc import FileDescriptor, Limits, Native
from handleipc.asyncio.driver import process_system
from handleipc.exceptions import (
    ChannelFull,
    DescriptorReleased,
    HandleNotDelivered,
    MessageNotSerializable,
)
from tests.asyncio.helpers import (
    ACK,
    SWITCH,
    Recorder,
    both_dialects,
    clean_registry,
    connection,
    is_open,
    join,
    joined,
    raw_peer,
    turns,
    until,
)


class Thing:
    """An object with a descriptor, whose conversion does what the test says."""

    def __init__(self, fd: int, details: Any = None) -> None:
        self.fd = fd
        self.details = details
        self.on_close: Callable[[], None] = lambda: None

    def close(self) -> None:
        self.on_close()


class ThingConversion:
    """Descriptors stay the test's; what arrives is closed and becomes ``made``."""

    tag = "thing"

    def __init__(self) -> None:
        self.to_wire_calls = 0
        self.on_to_wire: Callable[[int], None] = lambda calls: None
        self.on_from_wire: Callable[[], None] = lambda: None
        self.made: object = "thing"

    def to_wire(self, obj: Thing) -> tuple[Any, list[int]]:
        self.to_wire_calls += 1
        self.on_to_wire(self.to_wire_calls)
        return obj.details, [obj.fd]

    def from_wire(self, details: Any, fds: list[FileDescriptor]) -> object:
        for fd in fds:
            fd.close()
        self.on_from_wire()
        return self.made


@pytest.fixture
def conversion(monkeypatch: pytest.MonkeyPatch) -> ThingConversion:
    """A clean registry in which ``Thing`` is known."""
    clean_registry(monkeypatch)
    found = ThingConversion()
    handleipc.register(Thing, found)
    return found


@pytest.fixture
def fd() -> Iterator[int]:
    """A descriptor that the test owns."""
    fd = os.open(os.devnull, os.O_RDONLY)
    yield fd
    os.close(fd)


@contextmanager
def loop_errors() -> Iterator[list[BaseException]]:
    """Collect what goes to the event loop's exception handler."""
    loop = asyncio.get_running_loop()
    errors: list[BaseException] = []
    loop.set_exception_handler(lambda _, context: errors.append(context["exception"]))
    try:
        yield errors
    finally:
        loop.set_exception_handler(None)


# -- descriptors are read when they are sent ------------------------------------------------------


@both_dialects
async def test_a_file_closed_while_it_waits(dialect: str) -> None:
    """Its own ValueError costs this handle alone; what was sent with it arrives."""
    async with joined(dialect) as (a, b):
        read, write = os.pipe()
        client, served = connection()
        with client, os.fdopen(write, "wb"):
            file = os.fdopen(read, "rb")
            undelivered = Recorder()
            a.on("undelivered", undelivered)
            wrapped = Native(file)
            a.send_nowait("before")
            a.send_nowait("connection", served)
            a.send_nowait("file", wrapped)
            a.send_nowait("behind")
            file.close()
            assert await b.recv() == ("before", None)
            message, handle = await b.recv()
            assert message == "connection"
            handle.close()
            assert await b.recv() == ("behind", None)
            ((message, handle, reason),) = await undelivered.next()
            assert (message, handle) == ("file", wrapped)
            assert "could not be read" in reason


@pytest.mark.usefixtures("conversion")
@pytest.mark.parametrize(
    "details", [{1: 2}, {1: float("nan")}, {"a": "\ud800", "b": float("inf")}, 2**70]
)
async def test_details_are_json_of_their_moment(fd: int, details: Any) -> None:
    """They are spelled at send: what happens to them later, and how odd they are, is no matter."""
    async with joined("native") as (a, b):
        details = dict(details) if isinstance(details, dict) else details
        a.send_nowait("before")
        a.send_nowait("thing", Thing(fd, details))
        a.send_nowait("behind")
        if isinstance(details, dict):
            details["bytes"] = b"not JSON"
        assert [(await b.recv())[0] for _ in range(3)] == ["before", "thing", "behind"]


async def test_details_count(conversion: ThingConversion, fd: int) -> None:
    """What describes a handle takes room in the queue, and in the line."""
    limits = Limits(queued_bytes=100_000, line=50_000)
    async with raw_peer("native", limits) as (a, _):
        with pytest.raises(MessageNotSerializable, match="what describes its handle"):
            a.send_nowait("thing", Thing(fd, "x" * 50_000))
        with pytest.raises(ChannelFull):
            for _ in range(10):
                a.send_nowait("thing", Thing(fd, "x" * 20_000))
        queue = a._protocol.outgoing.queue
        assert 60_000 < queue.bytes <= 100_000
        a.on("undelivered", lambda *_: None)
        await until(lambda: queue.bytes == 0)


async def test_a_conversion_that_sends(conversion: ThingConversion, fd: int) -> None:
    """A large message sent by ``to_wire`` in the middle of a write comes behind what waits."""
    async with joined("native") as (a, b):

        def on_to_wire(calls: int) -> None:
            if calls == 2:
                a.send_nowait("inner" + "x" * 20_000)

        conversion.on_to_wire = on_to_wire
        for message, handle in (("before", None), ("thing", Thing(fd)), ("m", None)):
            a.send_nowait(message, handle)
        a.send_nowait("outer" + "x" * 20_000)
        a.send_nowait("behind")
        got = [(await b.recv())[0][:6] for _ in range(6)]
        assert got == ["before", "thing", "m", "outerx", "innerx", "behind"]


# -- conversions run while lines are taken --------------------------------------------------------


@pytest.mark.parametrize("what", ["send", "abort"])
async def test_a_received_handle_that_sends_or_aborts(
    conversion: ThingConversion, fd: int, what: str
) -> None:
    """It does not disturb the lines that are being taken: they arrive whole, in order, once."""
    a, b = join("native")
    client, served = connection()
    with client:
        b.on("undelivered", lambda *_: None)
        await a.send("hello")
        assert await b.recv() == ("hello", None)
        b.send_nowait("a handle is out", served)

        def on_from_wire() -> None:
            if what == "abort":
                b.abort()
            else:
                for _ in range(4):
                    b.send_nowait("x" * 20_000)

        conversion.on_from_wire = on_from_wire
        a.on("message", lambda message, handle: handle and handle.close())
        got: list[Any] = []
        b.on("message", lambda message, handle: got.append(message))
        a.send_nowait("thing", Thing(fd), keep_open=True)
        for i in range(2000):
            a.send_nowait(i)
        if what == "send":
            await until(lambda: len(got) == 2001)
            assert got == ["thing", *range(2000)]
            assert b.connected
        else:
            await b.wait_disconnected()
            assert [one for one in got if one != "thing"] == list(range(2000))[: len(got)]
        a.abort()
        b.abort()
        await a.wait_disconnected()
        await b.wait_disconnected()
        served.close()


async def test_a_conversion_that_makes_nothing(conversion: ThingConversion, fd: int) -> None:
    """A handle that becomes None is taken like any other, however many come."""
    conversion.made = None
    async with joined("native") as (a, b):
        thing = Thing(fd)
        for i in range(100):
            a.send_nowait(i, thing, keep_open=True)
        assert [await b.recv() for _ in range(100)] == [(i, None) for i in range(100)]
        await a.flush()


# -- close() raises --------------------------------------------------------------------------------


def fail() -> None:
    raise OSError(5, "close failed")


@pytest.fixture
def stubborn(conversion: ThingConversion, fd: int) -> Thing:
    """A thing that cannot be closed."""
    thing = Thing(fd)
    thing.on_close = fail
    return thing


async def test_a_close_that_raises_at_the_acknowledgement(stubborn: Thing) -> None:
    """It is reported; the handles acknowledged with it, and the lines behind, are not lost."""
    async with joined("native") as (a, b):
        with loop_errors() as errors:
            pairs = [connection() for _ in range(3)]
            got: list[Any] = []
            a.on("message", lambda message, _: got.append(message))
            a.send_nowait("thing", stubborn)
            sends = [asyncio.ensure_future(a.send("c", served)) for _, served in pairs]
            await turns(2)
            for i in range(5):
                b.send_nowait(i)
            for _ in range(4):
                _, handle = await b.recv()
                if handle != "thing":
                    handle.close()
            async with asyncio.timeout(10):
                await asyncio.gather(*sends)
            await until(lambda: len(got) == 5)
            assert [str(error) for error in errors] == ["[Errno 5] close failed"]
            for client, _ in pairs:
                client.close()
    assert process_system.in_flight.total == 0


async def test_a_close_that_raises_when_it_was_not_delivered(stubborn: Thing) -> None:
    """Nobody listens, so it is closed; the error is reported and the channel ends as always."""
    async with raw_peer("native") as (a, peer):
        with loop_errors() as errors:
            a.send_nowait("thing", stubborn)
            a.send_nowait("thing", stubborn)
            await peer.line()
            peer.sock.close()
            async with asyncio.timeout(10):
                await a.wait_disconnected()
            assert len(errors) == 2


async def test_a_close_that_raises_for_handles_never_given(
    conversion: ThingConversion, fd: int
) -> None:
    """The others that ``abort`` finds unacknowledged are closed all the same."""
    made: list[Thing] = []

    def on_from_wire() -> None:
        conversion.made = thing = Thing(-1)
        made.append(thing)
        thing.on_close = fail

    conversion.on_from_wire = on_from_wire
    async with raw_peer("native") as (a, peer):
        with loop_errors() as errors:
            # In one line, which one turn takes whole.
            lines = b'[4,1,"thing",[1,2]]\n'
            ours = os.open(os.devnull, os.O_RDONLY)
            # Its write is blocked, so that no acknowledgement leaves.
            a._link._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
            a.send_nowait("x" * 1_000_000)
            await turns()
            peer.write(lines, fds=(ours, ours))
            os.close(ours)
            await until(lambda: len(made) == 2)
            a.abort()
            await a.wait_disconnected()
            assert len(errors) == 2


async def test_an_internal_message_with_a_thing_that_cannot_be_closed(
    conversion: ThingConversion, fd: int
) -> None:
    """Nobody listens for it; what comes behind it is given in the same turn."""
    conversion.made = object()
    async with joined("native") as (a, b):
        with loop_errors() as errors:
            a.send_nowait({"cmd": "NODE_x"}, Thing(fd), keep_open=True)
            a.send_nowait("behind")
            assert await b.recv() == ("behind", None)
            assert not errors


@pytest.mark.parametrize("error", [ValueError("a defect"), KeyboardInterrupt()])
async def test_a_turn_that_fails(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """A defect ends the channel with its text; what a signal handler raises costs nothing."""
    async with joined("node") as (a, b):
        real = a._prepare

        def fail_once() -> None:
            monkeypatch.setattr(a, "_prepare", real)
            raise error

        monkeypatch.setattr(a, "_prepare", fail_once)
        with pytest.raises(type(error)):
            a._turn()
        if isinstance(error, ValueError):
            async with asyncio.timeout(10):
                await a.wait_disconnected()
            assert "the channel failed: ValueError('a defect')" in str(a._protocol.error)
        else:
            a.send_nowait("goes on")
            assert await b.recv() == ("goes on", None)


# -- listeners and readers -------------------------------------------------------------------------


@both_dialects
async def test_a_reader_never_gets_what_is_for_listeners(dialect: str) -> None:
    """A listener takes one message and goes; the task it woke reads plain messages alone."""
    async with joined(dialect) as (a, b):
        first: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def listener(message: Any, _: Any) -> None:
            b.off("message", listener)
            first.set_result(message)

        b.on("message", listener)
        a.send_nowait("first")
        a._send_internal({"cmd": "NODE_SOCKET_GET_COUNT", "key": "k"})  # public sends refuse it
        a.send_nowait("second")
        assert await first == "first"
        assert await b.recv() == ("second", None)


async def test_once_and_off_together() -> None:
    """A listener that removes another, and is the last of "disconnect", breaks nothing."""
    async with joined("node") as (a, b):
        calls = []

        def first() -> None:
            calls.append("first")
            a.off("disconnect", second)

        def second() -> None:
            calls.append("second")

        a.once("disconnect", first)
        a.once("disconnect", second)
        a.abort()
        async with asyncio.timeout(10):
            await a.wait_disconnected()
        assert calls == ["first"]
        b.abort()


# -- connections -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["open", "start", "end"])
async def test_bytes_of_a_connection_on_its_way_are_kept(how: str) -> None:
    """Using it meanwhile is refused, and loses nothing of what was read before."""
    async with raw_peer("native") as (a, peer):
        client, served = connection(head=b"GET /")
        with client:
            sending = asyncio.ensure_future(a.send("c", served))
            await peer.line()
            with pytest.raises(DescriptorReleased, match="on its way"):
                if how == "open":
                    await served.open()
                elif how == "start":
                    await served.start(asyncio.Protocol)
                else:
                    await served.end(b"answer")
            peer.close()
            with pytest.raises(HandleNotDelivered):
                await sending
            assert served.head == b"GET /"
            assert is_open(client)
            served.close()


async def test_a_buffer_of_no_bytes() -> None:
    """A BufferedProtocol without room for the bytes read before is told so, as asyncio does."""

    class NoRoom(asyncio.BufferedProtocol):
        def get_buffer(self, sizehint: int) -> bytearray:
            return bytearray()

        def buffer_updated(self, nbytes: int) -> None:
            raise AssertionError

    client, served = connection(head=b"GET /")
    with client, loop_errors() as errors:
        transport = None
        try:
            transport, _ = await served.start(NoRoom)
            await until(lambda: errors)
        except RuntimeError as error:
            errors.append(error)
        assert "empty buffer" in str(errors[0])
        if transport is not None:
            transport.close()
        await turns()
        served.close()  # it could not be started, and is as it was


async def test_a_connection_closed_by_another_thread() -> None:
    """The peer learns of it at once, whatever the loop waits for."""
    server = await handleipc.listen("127.0.0.1", 0)
    async with joined("native") as (a, b):
        with socket.create_connection(server.sockname):
            await a.send("c", await anext(server))
            _, served = await b.recv()
            await turns()
            thread = threading.Thread(target=served.close)
            thread.start()
            async with asyncio.timeout(10):
                server.close()
                await server.wait_closed()
            thread.join()


# -- bounds ----------------------------------------------------------------------------------------


@both_dialects
async def test_a_line_that_never_ends_keeps_one_set(dialect: str) -> None:
    """Or a peer could have this process keep any number of descriptors."""
    async with raw_peer(dialect) as (a, peer):
        ours = os.open(os.devnull, os.O_RDONLY)
        peer.write(b"[", fds=(ours,))
        await turns()
        assert a.connected
        peer.write(b"1", fds=(ours,))
        os.close(ours)
        async with asyncio.timeout(10):
            await a.wait_disconnected()
        assert "in the middle of a line" in str(a._protocol.error)


@both_dialects
async def test_descriptors_of_a_line_too_long(dialect: str) -> None:
    """They are closed with the channel (the fixture counts)."""
    async with raw_peer(dialect, Limits(line=10_000)) as (a, peer):
        ours = os.open(os.devnull, os.O_RDONLY)
        peer.write(b"[" + b"x" * 11_000, fds=(ours,) * 50)
        os.close(ours)
        async with asyncio.timeout(10):
            await a.wait_disconnected()
        assert "more than 10000 bytes" in str(a._protocol.error)


async def test_a_buffer_that_cannot_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory for a long line is an error of its own, not a peer that left."""
    async with raw_peer() as (a, peer):

        def no_memory(self: object, capacity: int) -> None:
            raise OSError(12, "Cannot allocate memory")

        monkeypatch.setattr("handleipc.wire.framing.LineFramer._resize", no_memory)
        sending = asyncio.get_running_loop().sock_sendall(peer.sock, b'"' + b"x" * 300_000)
        with pytest.raises(OSError):  # noqa: PT011 - the channel is gone before all is written
            await sending
            await asyncio.get_running_loop().sock_sendall(peer.sock, b"x" * 1_000_000)
        await a.wait_disconnected()
        assert "no memory for a line" in str(a._protocol.error)


async def test_a_refusal_of_more_than_was_sent() -> None:
    """None of it counts: every handle comes back once, and no budget is lost."""
    async with raw_peer("native") as (a, peer):
        pairs = [connection() for _ in range(3)]
        sends = [asyncio.ensure_future(a.send(i, served)) for i, (_, served) in enumerate(pairs)]
        await peer.line()
        peer.write({**SWITCH, "native": 0, "refuse": [[1, 9, "kind"]]})
        for one in sends:
            with pytest.raises(HandleNotDelivered):
                await one
        assert process_system.in_flight.total == 0
        for client, served in pairs:
            assert is_open(client)
            client.close()
            served.close()


async def test_questions_about_keys_nobody_knows() -> None:
    """A peer that asks and never reads is given up before it fills our memory."""
    async with raw_peer("node", Limits(queued_bytes=100_000)) as (a, peer):
        question = {"cmd": "NODE_SOCKET_GET_COUNT", "key": "k"}
        a._link._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        peer.sock.setblocking(False)
        loop = asyncio.get_running_loop()
        asked = b"".join(
            b'{"cmd":"%b","key":"%d"}\n' % (question["cmd"].encode(), i) for i in range(2000)
        )
        with pytest.raises(OSError):  # noqa: PT011 - EPIPE or ECONNRESET
            for _ in range(100):
                await loop.sock_sendall(peer.sock, asked)
        await a.wait_disconnected()
        assert "does not read the answers" in str(a._protocol.error)


async def test_plain_messages_behind_an_ack_that_cannot_leave() -> None:
    """They count: reading pauses at the hard bound, and goes on when the ack has left."""
    limits = Limits(held_bytes=100_000, held_hard=1_000_000, node_hard=1_000_000)
    async with raw_peer("node", limits) as (a, peer):
        a._link._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        a.send_nowait("x" * 1_000_000)
        await turns()
        ours, theirs = socket.socketpair()
        peer.write({"cmd": "NODE_HANDLE", "type": "net.Socket", "msg": "h"}, fds=(ours.fileno(),))
        ours.close()
        theirs.close()
        sent = 0
        line = b'"' + b"y" * 10_000 + b'"\n'
        for _ in range(2000):
            try:
                sent += peer.sock.send(line)
            except BlockingIOError:
                if not a._is_reading:
                    break
            await asyncio.sleep(0)
        assert not a._is_reading
        assert sent < 3_000_000
        assert a._protocol.incoming.deliveries.bytes_waiting >= 1_000_000
        rest = asyncio.ensure_future(take_until_ack(peer))
        _, handle = await a.recv()
        handle.close()
        await rest
        assert a._protocol.incoming.deliveries.bytes_waiting == 0


async def take_until_ack(peer: Any) -> None:
    while await peer.line() != ACK:
        pass


async def test_sending_does_not_read_beyond_the_bounds() -> None:
    """A loop that sends and never waits reads acknowledgements early, but no more than may be."""
    limits = Limits(held_bytes=50_000, held_hard=100_000, node_hard=100_000, queued_bytes=1 << 30)
    async with raw_peer("node", limits) as (a, peer):
        client, served = connection()
        with client:
            a.on("undelivered", lambda *_: None)
            a.send_nowait("handle", served)
            await peer.line()
            line = b'"' + b"y" * 10_000 + b'"\n'
            for _ in range(100):
                try:
                    while True:
                        peer.sock.send(line)
                except BlockingIOError:
                    pass
                a.send_nowait("x" * 20_000)
            assert a._protocol.incoming.deliveries.bytes < 100_000 + 512 * 1024
            a.abort()
            await a.wait_disconnected()
            gc.collect()
