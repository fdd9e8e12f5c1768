"""A peer that breaks the protocol loses its own channel, with an error that says how."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from typing import Any

import pytest

from handleipc import (
    Channel,
    ChannelBroken,
    HandleInDoubt,
    HandleNotDelivered,
    Limits,
    MalformedEnvelope,
    RemoteProtocolError,
)
from tests.asyncio.helpers import (
    ACK,
    NACK,
    SWITCH,
    Recorder,
    ack,
    both_dialects,
    connection,
    is_open,
    joined,
    raw_peer,
    turns,
    until,
    works,
)

HANDLE = {"cmd": "NODE_HANDLE", "type": "net.Socket", "msg": "x"}


async def broken(a: Channel) -> RemoteProtocolError:
    """Wait until the channel has ended by a fault of its peer; return what iteration raises."""
    async with asyncio.timeout(10):
        await a.wait_disconnected()
    assert not a.connected
    with pytest.raises(ChannelBroken):
        a.send_nowait("late")
    with pytest.raises(RemoteProtocolError) as caught:
        async for _, handle in a:
            if handle is not None:
                handle.close()
    return caught.value


# -- lines that are none -------------------------------------------------------------------------

GARBAGE = {
    "empty line": b"\n",
    "spaces": b"   \n",
    "not JSON": b"{nope}\n",
    "NaN": b"NaN\n",
    "byte order mark": b'\xef\xbb\xbf"x"\n',
    "not UTF-8": b'"\xff"\n',
    "two values": b"1 2\n",
    "control character": b'"a\x01b"\n',
    "binary": os.urandom(64).replace(b"\n", b"") + b"\x80\n",
    "HTTP": b"GET / HTTP/1.1\r\n\r\n",
    "unfinished": b'{"a":\n',
}


@both_dialects
@pytest.mark.parametrize("what", GARBAGE)
async def test_garbage(dialect: str, what: str) -> None:
    """A line that is not JSON ends the channel; what came whole before it is delivered."""
    async with raw_peer(dialect) as (a, peer):
        received = a.on("message", Recorder())
        peer.write([0, "good"] if dialect == "native" else "good", GARBAGE[what])
        await received.next()
        a.off("message", received)
        assert isinstance(await broken(a), MalformedEnvelope)
        assert received.calls == [("good", None)]


@both_dialects
async def test_garbage_touches_nothing_else(dialect: str) -> None:
    """Other channels of the process go on, and handles on their way come back."""
    async with raw_peer(dialect) as (a, peer), joined(dialect) as (other, end):
        client, served = connection()
        with client, served:
            sending = asyncio.create_task(a.send("x", served))
            while not peer.fds:
                await peer.line()
            peer.write(b"garbage\n")
            # A living node peer may own it.
            with pytest.raises(HandleNotDelivered if dialect == "native" else HandleInDoubt):
                await sending
            assert served.closed is (dialect == "node")
            if dialect == "native":
                assert works(client, served)
            await broken(a)
        await other.send("x")
        assert await end.recv() == ("x", None)


# -- native: every rule of the dialect -----------------------------------------------------------

CONTROL: dict[str, Any] = {"cmd": "NODE_HANDLEIPC"}
GRANTS = {"ack": 0, "descriptors": 500, "bytes": 1 << 27}

# lines, descriptors that come with them
NATIVE_FAULTS: dict[str, tuple[list[Any], int]] = {
    "unknown tag": ([[9, "x"]], 0),
    "a bare message": (["x"], 0),
    "null": ([None], 0),
    "an empty list": ([[]], 0),
    "message without a message": ([[0]], 0),
    "an object that is no command": ([{"cmd": "other"}], 0),
    "a set without descriptors": ([[1, 1]], 0),
    "a set of zero": ([[1, 0]], 0),
    "a set of too many": ([[1, 254]], 0),
    "a set of text": ([[1, "1"]], 0),
    "a set with fewer than declared": ([[1, 2], [2, 1, 2, "net.Socket", 0]], 1),
    "a set with more than declared": ([[1, 1], [2, 1, 1, "net.Socket", 0]], 2),
    "a set not used up": (
        [[1, 2], [2, 1, 1, "net.Socket", 0], [1, 1]],
        2,
    ),
    "unclaimed descriptors": ([[0, "x"], [0, "y"]], 1),
    "handle out of order": ([[1, 1], [2, 2, 1, "net.Socket", 0]], 1),
    "handle zero": ([[1, 1], [2, 0, 1, "net.Socket", 0]], 1),
    "handle without a set": ([[2, 1, 1, "net.Socket", 0]], 0),
    "handle without descriptors": ([[1, 1], [2, 1, 0, "net.Socket", 0]], 1),
    "handle with too many descriptors": ([[1, 1], [2, 1, 2, "net.Socket", 0]], 1),
    "again that was not asked": ([[1, 1], [3, 1, 1]], 1),
    "NODE_HANDLE after the switch": ([HANDLE], 1),
    "a stray ACK": ([ACK], 0),
    "a stray NACK": ([NACK], 0),
    "ack beyond what was sent": ([{**CONTROL, **GRANTS, "ack": 1}], 0),
    "ack of a negative number": ([{**CONTROL, **GRANTS, "ack": -1}], 0),
    "ack of text": ([{**CONTROL, **GRANTS, "ack": "1"}], 0),
    "ack of a fraction": ([{**CONTROL, **GRANTS, "ack": 0.5}], 0),
    "ack of true": ([{**CONTROL, **GRANTS, "ack": True}], 0),
    "ack without grants": ([{**CONTROL, "ack": 0}], 0),
    "handles taken back": ([{**CONTROL, **GRANTS, "descriptors": 1}], 0),
    "bytes taken back": ([{**CONTROL, **GRANTS, "bytes": 1}], 0),
    "refusal of nothing": ([{**CONTROL, "refuse": [[1, 1, "kind"]]}], 0),
    "refusal of no list": ([{**CONTROL, "refuse": 1}], 0),
    "refusal of an odd list": ([{**CONTROL, "refuse": [[1]]}], 0),
    "request for nothing": ([{**CONTROL, "again": [1, 1]}], 0),
    "request of text": ([{**CONTROL, "again": "x"}], 0),
    "a second switch": ([SWITCH], 0),
    "a switch to another version": ([{**SWITCH, "native": 1}], 0),
}


@pytest.mark.parametrize("what", NATIVE_FAULTS)
async def test_native_faults(what: str) -> None:
    """Each broken rule of the native dialect ends the channel; all that was received is closed."""
    lines, count = NATIVE_FAULTS[what]
    async with raw_peer("native") as (a, peer):
        client, served = connection()
        with client:
            if count:
                peer.write(*lines, fds=(served.fileno(),) * count)
            else:
                peer.write(*lines)
            served.close()
            error = await broken(a)
            assert str(error)
            assert not is_open(client)


async def test_handles_beyond_the_grant() -> None:
    """Native: a handle numbered above the grant ends the channel."""
    async with raw_peer("native", Limits(window=4)) as (a, peer):
        client, served = connection()
        with client:
            lines = [[2, n, 1, "net.Socket", n] for n in range(1, 60)]
            peer.write([1, 59], *lines, fds=(served.fileno(),) * 59)
            served.close()
            await broken(a)
            assert not is_open(client)


async def test_bytes_beyond_the_grant() -> None:
    """Native: lines started beyond the byte grant by more than one end the channel."""
    async with raw_peer("native", Limits(bytes=1000)) as (a, peer):
        line = json.dumps([0, "x" * 500]).encode() + b"\n"
        peer.write(line * 50)
        await broken(a)


async def test_too_many_requests() -> None:
    """Native: a peer that asks for the same descriptors again and again loses its channel."""
    async with raw_peer("native", Limits(asks=5)) as (a, peer):
        client, served = connection()
        with client, served:
            sending = asyncio.create_task(a.send("x", served))
            while not peer.fds:
                await peer.line()
            error = a.on("error", Recorder())
            for n in range(10):
                if error.calls:
                    break
                try:
                    peer.write({**CONTROL, "again": [1, 1]})
                except OSError:
                    break
                await turns(30)
                peer.unread()
            await error.next()
            with pytest.raises(HandleNotDelivered):
                await sending
            assert isinstance(error.calls[0][0], RemoteProtocolError)
            assert n <= 6
            assert works(client, served)


async def test_switch_out_of_place() -> None:
    """A switch that is not the first line of an invited peer, or comes uninvited, is a fault."""
    async with raw_peer("invited") as (a, peer):
        peer.write("first", SWITCH)
        await broken(a)
    async with raw_peer("node") as (a, peer):
        peer.write(SWITCH)
        await broken(a)


async def test_control_line_before_the_switch() -> None:
    """A control line from a peer that has not switched is a fault."""
    async with raw_peer("invited") as (a, peer):
        peer.write(ack(0))
        await broken(a)


# -- node ----------------------------------------------------------------------------------------


async def test_stray_replies_are_warnings(caplog: pytest.LogCaptureFixture) -> None:
    """Node dialect: a stray ACK or NACK is a warning, one a minute, and the channel lives."""
    async with raw_peer() as (a, peer):
        peer.write(ACK, NACK, "next")
        assert await a.recv() == ("next", None)
        assert a.connected
        assert ["stray" in record.getMessage() for record in caplog.records] == [True]


async def test_node_handle_without_a_descriptor() -> None:
    """Node dialect: a missing descriptor is a NACK; the line is not delivered, the channel lives."""
    async with raw_peer() as (a, peer):
        peer.write(HANDLE, "next")
        assert await peer.line() == NACK
        assert await a.recv() == ("next", None)


async def test_retried_node_handle_is_unwrapped() -> None:
    """A handle that Node sends again has one more envelope: it is ACKed once and delivered."""
    async with raw_peer() as (a, peer):
        client, served = connection()
        with client:
            retry = {"cmd": "NODE_HANDLE", "type": "net.Native", "msg": HANDLE}
            peer.write(retry, fds=(served.fileno(),))
            served.close()
            assert await peer.line() == ACK
            message, handle = await a.recv()
            assert message == "x"
            assert works(client, handle)
            handle.close()
            await turns()
            assert peer.unread() == b""


NODE_FAULTS: dict[str, tuple[list[Any], int]] = {
    "unclaimed descriptors": (["x", "y"], 1),
    "two descriptors for one handle": ([HANDLE, "x", "y"], 2),
}


@pytest.mark.parametrize("what", NODE_FAULTS)
async def test_node_descriptors_that_do_not_fit(what: str) -> None:
    """Node dialect: descriptors that no line claims are closed, never given to another message."""
    lines, count = NODE_FAULTS[what]
    async with raw_peer() as (a, peer):
        a.on("error", Recorder())
        got: list[Any] = []
        a.on("message", lambda message, handle: got.append(handle))
        client, served = connection()
        with client:
            peer.write(*lines, fds=(served.fileno(),) * count)
            served.close()
            await until(lambda: not is_open(client), "the end of the descriptors")
            assert all(handle is None for handle in got)


async def test_odd_envelopes() -> None:
    """Odd fields of a NODE_HANDLE are refused by NACK, never by a crash."""
    async with raw_peer() as (a, peer):
        error = a.on("error", Recorder())
        client, served = connection()
        with client:
            for type_ in (None, 5, ["net.Socket"], {}, "", "dgram.Socket", "net.Server"):
                peer.write({**HANDLE, "type": type_}, fds=(served.fileno(),))
                assert await peer.line() == NACK
            await error.next(7)
            served.close()
            assert not is_open(client)
        peer.write("next")
        assert await a.recv() == ("next", None)


async def test_handle_without_a_message() -> None:
    """A NODE_HANDLE without ``msg`` is delivered with None, as undefined would be."""
    async with raw_peer() as (a, peer):
        client, served = connection()
        with client:
            peer.write({"cmd": "NODE_HANDLE", "type": "net.Socket"}, fds=(served.fileno(),))
            served.close()
            assert await peer.line() == ACK
            message, handle = await a.recv()
            assert message is None
            assert works(client, handle)
            handle.close()


async def test_reply_that_cannot_be_written() -> None:
    """A peer that ends before our reply is no error of ours: iteration just ends."""
    async with raw_peer() as (a, peer):
        errors = a.on("error", Recorder())
        client, served = connection()
        with client:
            peer.write(HANDLE, fds=(served.fileno(),))
            served.close()
            peer.close()
            got = [handle async for _, handle in a]
            for handle in got:
                handle.close()
            assert errors.calls == []
            assert not is_open(client)


# -- bytes in any pieces -------------------------------------------------------------------------


@both_dialects
async def test_byte_by_byte(dialect: str) -> None:
    """Lines that arrive byte by byte, with a descriptor at the first, are whole messages."""
    async with raw_peer(dialect) as (a, peer):
        client, served = connection()
        with client:
            if dialect == "native":
                lines: list[Any] = [[1, 1], [2, 1, 1, "net.Socket", "h\u00e9"], [0, "\U0001f600"]]
            else:
                lines = [{**HANDLE, "msg": "h\u00e9"}, "\U0001f600"]
            data = "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines).encode()
            socket.send_fds(peer.sock, [data[:1]], [served.fileno()])
            served.close()
            for byte in data[1:]:
                peer.write(bytes([byte]))
                await asyncio.sleep(0)
            message, handle = await a.recv()
            assert message == "h\u00e9"
            assert works(client, handle)
            handle.close()
            assert await a.recv() == ("\U0001f600", None)
