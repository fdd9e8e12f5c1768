"""Events of a channel: messages, ends, errors, and handles that did not arrive."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from handleipc import Channel, HandleIPCError, Limits, RemoteProtocolError
from tests.asyncio.helpers import (
    NACK,
    Recorder,
    ack,
    both_dialects,
    clients,
    connection,
    is_open,
    join,
    joined,
    raw_peer,
    turns,
    until,
    works,
)

# -- messages ------------------------------------------------------------------------------------


@both_dialects
async def test_message_listener(dialect: str) -> None:
    """A ``"message"`` listener is called with each message and its handle, in order."""
    async with joined(dialect) as (a, b):
        received = b.on("message", Recorder())
        client, served = connection()
        with client:
            a.send_nowait("one")
            a.send_nowait("two", served)
            a.send_nowait("three")
            one, two, three = await received.next(3)
            assert (one, two[0], three) == (("one", None), "two", ("three", None))
            assert works(client, two[1])
            two[1].close()
            await a.flush()


@both_dialects
async def test_every_listener_gets_every_message(dialect: str) -> None:
    """Several listeners all get each message, in the order they were added."""
    async with joined(dialect) as (a, b):
        order: list[Any] = []
        b.on("message", lambda message, handle: order.append((1, message)))
        last = Recorder()
        b.on("message", lambda message, handle: order.append((2, message)))
        b.on("message", last)
        a.send_nowait("x")
        a.send_nowait("y")
        await last.next(2)
        assert order == [(1, "x"), (2, "x"), (1, "y"), (2, "y")]


@both_dialects
async def test_messages_are_held_for_the_first_listener(dialect: str) -> None:
    """Until there is a listener or a reader, messages are held, never dropped."""
    async with joined(dialect) as (a, b):
        for n in range(10):
            await a.send(n)
        await turns()
        assert await b.recv() == (0, None)
        received = b.on("message", Recorder())
        await received.next(9)
        assert [message for message, _ in received.calls] == list(range(1, 10))


@both_dialects
async def test_listener_is_never_called_from_within_on(dialect: str) -> None:
    """``on`` returns before the listener is called with held messages."""
    async with joined(dialect) as (a, b):
        await a.send("held")
        waiting = asyncio.create_task(b.recv())
        assert (await waiting)[0] == "held"
        a.send_nowait("more")
        await turns()
        received = Recorder()
        b.on("message", received)
        assert received.calls == []
        await received.next()


@both_dialects
async def test_once(dialect: str) -> None:
    """``once`` gets the next message alone; the messages behind it are held."""
    async with joined(dialect) as (a, b):
        for n in range(3):
            a.send_nowait(n)
        received = b.once("message", Recorder())
        assert await received.next() == [(0, None)]
        assert await b.recv() == (1, None)
        assert await b.recv() == (2, None)
        assert received.calls == [(0, None)]


@both_dialects
async def test_off(dialect: str) -> None:
    """After ``off`` messages are held again."""
    async with joined(dialect) as (a, b):
        received = b.on("message", Recorder())
        await a.send("for the listener")
        await received.next()
        b.off("message", received)
        b.off("message", received)  # does nothing
        await a.send("held")
        assert await b.recv() == ("held", None)
        assert len(received.calls) == 1


@both_dialects
async def test_off_within_a_listener(dialect: str) -> None:
    """A listener that removes itself is not called with the messages behind."""
    async with joined(dialect) as (a, b):
        got = []

        def listener(message: Any, handle: Any) -> None:
            got.append(message)
            b.off("message", listener)

        b.on("message", listener)
        for n in range(3):
            a.send_nowait(n)
        await until(lambda: got)
        assert await b.recv() == (1, None)
        assert await b.recv() == (2, None)
        assert got == [0]


@both_dialects
async def test_sending_within_a_listener(dialect: str) -> None:
    """A listener may send, and its answers leave in order."""
    async with joined(dialect) as (a, b):
        b.on("message", lambda message, handle: b.send_nowait(["answer", message]))
        for n in range(50):
            a.send_nowait(n)
        for n in range(50):
            assert await a.recv() == (["answer", n], None)


@both_dialects
async def test_passing_on_within_a_listener(dialect: str) -> None:
    """A listener may send back the very handle it was given."""
    async with joined(dialect) as (a, b):
        b.on("message", lambda message, handle: b.send_nowait(message, handle))
        client, served = connection()
        with client:
            a.send_nowait("there and back", served)
            message, handle = await a.recv()
            assert works(client, handle)
            handle.close()
            await b.flush()


@both_dialects
@pytest.mark.parametrize("how", ["disconnect", "abort"])
async def test_ending_within_a_listener(dialect: str, how: str) -> None:
    """A listener may end the channel; the others of its message still run."""
    async with joined(dialect) as (a, b):
        b.on("message", lambda *_: getattr(b, how)())
        second = b.on("message", Recorder())
        ended = b.on("disconnect", Recorder())
        a.send_nowait("end")
        await ended.next()
        assert second.calls == [("end", None)]
        await a.wait_disconnected()


@both_dialects
async def test_async_listener(dialect: str) -> None:
    """An ``async def`` listener runs as a task, and holds nobody up."""
    async with joined(dialect) as (a, b):
        go = asyncio.Event()
        done = []

        async def listener(message: Any, handle: Any) -> None:
            await go.wait()
            done.append(message)

        b.on("message", listener)
        last = b.on("message", Recorder())
        a.send_nowait(1)
        a.send_nowait(2)
        await last.next(2)
        await turns()  # both tasks have started
        assert done == []
        go.set()
        await until(lambda: done == [1, 2])


@pytest.mark.unhandled("first", "second")
@both_dialects
async def test_exception_in_a_listener(dialect: str) -> None:
    """An exception in a listener goes to the loop's handler; others and later messages go on."""
    async with joined(dialect) as (a, b):

        def listener(message: Any, handle: Any) -> None:
            raise ValueError(message)

        b.on("message", listener)
        received = b.on("message", Recorder())
        a.send_nowait("first")
        a.send_nowait("second")
        await received.next(2)


@pytest.mark.unhandled("in a task")
@both_dialects
async def test_exception_in_an_async_listener(dialect: str) -> None:
    """An exception in an ``async def`` listener goes to the loop's handler too."""
    async with joined(dialect) as (a, b):

        async def listener(message: Any, handle: Any) -> None:
            await asyncio.sleep(0)
            raise ValueError(message)

        b.on("message", listener)
        received = b.on("message", Recorder())
        a.send_nowait("in a task")
        await received.next()
        await turns()


async def test_unknown_event() -> None:
    """Listening for an event that does not exist raises ``ValueError`` and names those there are."""
    async with joined("native") as (a, _):
        for add in (a.on, a.once):
            with pytest.raises(ValueError, match="massage.*disconnect"):
                add("massage", print)
        with pytest.raises(ValueError, match="exit"):
            a.on("exit", print)


# -- internal messages ---------------------------------------------------------------------------


@both_dialects
async def test_internal_messages(dialect: str) -> None:
    """``cmd`` that begins with NODE_ is internal, ``fooNODE_`` is a message, as in Node."""
    async with joined(dialect) as (a, b):
        internal = b.on("internal_message", Recorder())
        received = b.on("message", Recorder())
        a.send_nowait({"cmd": "NODE_bar"})
        a.send_nowait({"cmd": "fooNODE_"})
        a.send_nowait({"cmd": 1})
        a.send_nowait({"type": "NODE_bar"})
        a.send_nowait(["NODE_bar"])
        await received.next(4)
        assert internal.calls == [({"cmd": "NODE_bar"}, None)]
        assert received.calls[0] == ({"cmd": "fooNODE_"}, None)


@both_dialects
async def test_internal_message_without_a_listener_is_gone(dialect: str) -> None:
    """An internal message nobody listens for is dropped, and its descriptor is closed."""
    async with joined(dialect) as (a, b):
        client, served = connection()
        with client:
            a.send_nowait({"cmd": "NODE_foo"}, served)
            a.send_nowait("next")
            assert await b.recv() == ("next", None)
            await a.flush()
            assert not is_open(client)


@both_dialects
async def test_internal_message_passes_held_messages(dialect: str) -> None:
    """Messages held for want of a reader do not hold internal ones up."""
    async with joined(dialect) as (a, b):
        internal = b.on("internal_message", Recorder())
        a.send_nowait("held")
        a.send_nowait({"cmd": "NODE_foo"})
        await internal.next()
        assert await b.recv() == ("held", None)


@both_dialects
async def test_internal_message_keeps_its_place_for_listeners(dialect: str) -> None:
    """With listeners for both, internal messages and others are given in order."""
    async with joined(dialect) as (a, b):
        order: list[Any] = []
        last = Recorder()
        b.on("internal_message", lambda message, handle: order.append(message["n"]))
        b.on("message", lambda message, handle: order.append(message["n"]))
        b.on("message", last)
        for n in range(10):
            a.send_nowait({"cmd": "NODE_x" if n % 2 == 0 else "x", "n": n})
        await last.next(5)
        assert order == list(range(10))


# -- ends ----------------------------------------------------------------------------------------


@both_dialects
@pytest.mark.parametrize("who", ["here", "there"])
@pytest.mark.parametrize("how", ["disconnect", "abort"])
async def test_disconnect_event(dialect: str, who: str, how: str) -> None:
    """``"disconnect"`` comes exactly once at both ends, later than the call."""
    async with joined(dialect) as (a, b):
        events = [a.on("disconnect", Recorder()), b.on("disconnect", Recorder())]
        getattr(a if who == "here" else b, how)()
        assert [event.calls for event in events] == [[], []]
        for event in events:
            assert await event.next() == [()]
        assert not (a.connected or b.connected)
        a.disconnect()
        b.abort()
        await turns()
        assert [event.calls for event in events] == [[()], [()]]


@both_dialects
async def test_messages_before_the_disconnect_event(dialect: str) -> None:
    """Listeners get every message before ``"disconnect"``."""
    async with joined(dialect) as (a, b):
        order: list[Any] = []
        b.on("message", lambda message, handle: order.append(message))
        ended = Recorder()
        b.on("disconnect", lambda: order.append("disconnect"))
        b.on("disconnect", ended)
        for n in range(100):
            a.send_nowait(n)
        a.disconnect()
        await ended.next()
        assert order == [*range(100), "disconnect"]


# -- errors --------------------------------------------------------------------------------------


async def test_error_event() -> None:
    """A fault of the peer is an ``"error"`` event with the exception that says how."""
    async with raw_peer() as (a, peer):
        order: list[Any] = []
        error = a.on("error", Recorder())
        a.on("error", lambda e: order.append("error"))
        a.on("disconnect", lambda: order.append("disconnect"))
        peer.write(b"{not json\n")
        ((caught,),) = await error.next()
        assert isinstance(caught, RemoteProtocolError)
        await a.wait_disconnected()
        await turns()
        assert order == ["error", "disconnect"]


async def test_error_without_a_listener_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Without a listener the error is logged, and nothing is raised."""
    async with raw_peer() as (a, peer):
        peer.write(b"{not json\n")
        await a.wait_disconnected()
        assert any("JSON" in record.getMessage() for record in caplog.records)
        assert all(record.levelno >= logging.WARNING for record in caplog.records)


@both_dialects
async def test_polite_end_is_no_error(dialect: str, caplog: pytest.LogCaptureFixture) -> None:
    """A plain end is no error at either end."""
    async with joined(dialect) as (a, b):
        errors = [a.on("error", Recorder()), b.on("error", Recorder())]
        a.disconnect()
        await b.wait_disconnected()
        await a.wait_disconnected()
        assert [e.calls for e in errors] == [[], []]
    assert caplog.records == []


async def test_handle_of_an_unknown_type_is_an_error_event() -> None:
    """An unknown type is NACKed, closed and an ``"error"``; the channel lives."""
    async with raw_peer() as (a, peer):
        error = a.on("error", Recorder())
        with clients(1) as (sockets, served):
            peer.write(
                {"cmd": "NODE_HANDLE", "type": "no.Such", "msg": "x"}, fds=(served[0].fileno(),)
            )
            assert await peer.line() == NACK
            ((caught,),) = await error.next()
            assert isinstance(caught, HandleIPCError)
            served[0].close()
            assert not is_open(sockets[0])
        peer.write("alive")
        assert await a.recv() == ("alive", None)


# -- undelivered ---------------------------------------------------------------------------------


@both_dialects
async def test_undelivered_event(dialect: str) -> None:
    """A ``send_nowait`` that fails goes to ``"undelivered"`` with message, handle and reason."""
    async with raw_peer(dialect, Limits(node_retries=0)) as (a, peer):
        client, served = connection()
        with client, served:
            undelivered = a.on("undelivered", Recorder())
            a.send_nowait({"a": 1}, served)
            while not peer.fds:
                await peer.line()
            peer.write({**ack(1), "refuse": [[1, 1, "type"]]} if dialect == "native" else NACK)
            ((message, handle, reason),) = await undelivered.next()
            assert (message, handle) == ({"a": 1}, served)
            assert reason
            assert works(client, served)
            await a.send("alive")


@both_dialects
async def test_undelivered_without_a_listener(
    dialect: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With no ``"undelivered"`` listener the handle is closed and logged."""
    async with raw_peer(dialect, Limits(node_retries=0)) as (a, peer):
        client, served = connection()
        with client:
            a.send_nowait("x", served)
            while not peer.fds:
                await peer.line()
            peer.write({**ack(1), "refuse": [[1, 1, "type"]]} if dialect == "native" else NACK)
            await a.flush()
            await until(lambda: served.closed)
            peer.close()
            assert not is_open(client)
            assert any("not delivered" in record.getMessage() for record in caplog.records)


@both_dialects
async def test_undelivered_lent_handle_is_not_closed(dialect: str) -> None:
    """A handle sent with ``keep_open`` is the caller's: undelivered, it is not closed."""
    async with raw_peer(dialect) as (a, peer):
        client, served = connection()
        with client, served:
            a.send_nowait("x", served, keep_open=True)
            while not peer.fds:
                await peer.line()
            peer.close()
            await a.wait_disconnected()
            assert works(client, served)


@both_dialects
async def test_undelivered_in_order(dialect: str) -> None:
    """When the channel dies, unacknowledged and queued handles come back in order."""
    async with raw_peer(dialect, handles=2) as (a, peer):
        undelivered = a.on("undelivered", Recorder())
        with clients(5) as (sockets, served):
            for n, each in enumerate(served):
                a.send_nowait(n, each)
            while not peer.fds:
                await peer.line()
            peer.close()
            calls = await undelivered.next(5)
            assert [(m, h) for m, h, _ in calls] == list(enumerate(served))
            for client, each in zip(sockets, served, strict=True):
                assert works(client, each)


@pytest.mark.unhandled("mine")
@both_dialects
async def test_exception_in_an_undelivered_listener(dialect: str) -> None:
    """An exception in an ``"undelivered"`` listener does not keep the end from coming."""
    async with raw_peer(dialect) as (a, peer):
        client, served = connection()
        with client, served:

            def listener(*_: Any) -> None:
                raise RuntimeError("mine")

            a.on("undelivered", listener)
            ended = a.on("disconnect", Recorder())
            a.send_nowait("x", served)
            await turns()
            peer.close()
            await ended.next()
            assert works(client, served)


async def test_channel_events_are_those_of_the_contract() -> None:
    """A channel has exactly these events."""
    a, b = join("native")
    assert a.EVENTS == {"message", "internal_message", "disconnect", "error", "undelivered"}
    assert isinstance(a, Channel)
    a.abort()
    b.abort()
