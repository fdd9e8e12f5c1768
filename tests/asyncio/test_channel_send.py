"""``send``, ``send_nowait``, ``drain`` and ``flush``: what they promise to the sender."""

from __future__ import annotations

import asyncio
import datetime
import os
import socket
import ssl
from typing import Any

import pytest

import handleipc
from handleipc import (
    ChannelBroken,
    ChannelClosed,
    ChannelFull,
    DescriptorReleased,
    HandleNotDelivered,
    Limits,
    MessageNotSerializable,
    UnsupportedHandle,
)
from handleipc.wire import link
from tests.asyncio.helpers import (
    ACK,
    NACK,
    Recorder,
    ack,
    both_dialects,
    clients,
    connection,
    earned,
    is_open,
    joined,
    raw_peer,
    turns,
    works,
)

VALUES = [
    None,
    True,
    0,
    -1.5,
    2**53 - 1,
    2**70,
    "",
    "line\nbreak \u2028 \U0001f600",
    "lone \ud800 surrogate",
    [],
    {},
    [1, [2, {"a": None}]],
    {"cmd": "mine", "NODE_HANDLE": "NODE_HANDLE"},
    {"cmd": "nODE_HANDLE"},
    [2, 1, 1, "net.Socket", {}],
    [0, "x"],
    "x" * 200_000,
]


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Count calls of ``sendmsg``: (bytes from the offset on, descriptors) of each."""
    calls: list[tuple[int, int]] = []
    real = link.send_with_fds

    def counted(fd: int, data: Any, offset: int, fds: Any) -> Any:
        calls.append((len(data) - offset, len(fds)))
        return real(fd, data, offset, fds)

    monkeypatch.setattr(link, "send_with_fds", counted)
    return calls


# -- plain messages ------------------------------------------------------------------------------


@both_dialects
async def test_values_arrive_unchanged(dialect: str) -> None:
    """Any JSON value arrives as it was, in order, with None for a handle."""
    async with joined(dialect) as (a, b):
        for value in VALUES:
            a.send_nowait(value)
        for value in VALUES:
            assert await b.recv() == (value, None)


@both_dialects
async def test_nan_becomes_null(dialect: str) -> None:
    """NaN and infinities become null, as in JavaScript."""
    async with joined(dialect) as (a, b):
        await a.send([float("nan"), float("inf"), -float("inf"), {"x": float("nan")}])
        assert await b.recv() == ([None, None, None, {"x": None}], None)


async def test_send_returns_when_the_kernel_has_the_message() -> None:
    """A plain ``send`` returns when the message has been written to the kernel."""
    async with raw_peer() as (a, peer):
        await a.send("now")
        assert peer.unread() == b'"now"\n'


async def test_send_waits_for_room_in_the_kernel() -> None:
    """``send`` does not return while a part of the message is not in the kernel."""
    async with raw_peer() as (a, peer):
        sending = asyncio.create_task(a.send("x" * 4_000_000))
        await turns()
        assert not sending.done()
        assert await peer.line() == "x" * 4_000_000
        await sending


@both_dialects
async def test_message_is_taken_at_the_call(dialect: str) -> None:
    """What the caller changes after ``send_nowait`` is not sent."""
    async with joined(dialect) as (a, b):
        message = {"n": 1}
        a.send_nowait(message)
        message["n"] = 2
        assert await b.recv() == ({"n": 1}, None)


@both_dialects
async def test_one_batch_per_loop_turn(dialect: str, writes: list[tuple[int, int]]) -> None:
    """All messages queued in one turn of the loop leave with one ``sendmsg``."""
    async with joined(dialect) as (a, b):
        received = Recorder()
        b.on("message", received)
        await turns()
        writes.clear()
        for n in range(100):
            a.send_nowait(n)
        assert writes == []
        await received.next(100)
        assert [message for message, _ in received.calls] == list(range(100))
        sizes = [size for size, _ in writes if size > 200]
        assert len(sizes) == 1


async def test_many_handles_leave_in_one_sendmsg(writes: list[tuple[int, int]]) -> None:
    """Native: many descriptors and the messages between them leave with one ``sendmsg``."""
    async with joined("native") as (a, b):
        await turns()
        writes.clear()
        with clients(40) as (_, served):
            for n, each in enumerate(served):
                a.send_nowait(n, each)
                a.send_nowait("plain")
            for n in range(40):
                message, handle = await b.recv()
                handle.close()
                assert (message, (await b.recv())[0]) == (n, "plain")
        assert [fds for _, fds in writes if fds] == [40]


async def test_node_dialect_sends_one_handle_at_a_time(writes: list[tuple[int, int]]) -> None:
    """Node dialect: one descriptor per message, one handle in flight, the rest held behind it."""
    async with raw_peer() as (a, peer):
        with clients(2) as (_, served):
            a.send_nowait("one", served[0])
            a.send_nowait("between")
            a.send_nowait("two", served[1])
            first = await peer.line()
            assert (first["cmd"], first["type"], first["msg"]) == (
                "NODE_HANDLE",
                "net.Socket",
                "one",
            )
            await turns()
            assert (peer.unread(), len(peer.fds)) == (b"", 1)
            peer.write(ACK)
            assert await peer.line() == "between"
            assert (await peer.line())["msg"] == "two"
            assert len(peer.fds) == 2
            peer.write(ACK)
            await a.flush()
        assert [fds for _, fds in writes if fds] == [1, 1]


async def test_a_loop_of_sends_does_not_starve_other_tasks() -> None:
    """Awaiting ``send`` again and again lets other tasks run, though it never has to wait."""
    async with joined("native") as (a, b):
        counted = 0

        async def count() -> None:
            nonlocal counted
            while True:
                await asyncio.sleep(0)
                counted += 1

        received = Recorder()
        b.on("message", received)
        task = asyncio.create_task(count())
        for n in range(1000):
            await a.send(n)
        assert counted >= 5
        task.cancel()
        await received.next(1000)


# -- water marks and hard limits -----------------------------------------------------------------


async def test_send_nowait_says_when_the_queue_is_high() -> None:
    """``send_nowait`` returns False above the high-water mark, ``drain`` waits for the low one."""
    limits = Limits(high_water_bytes=10_000, low_water_bytes=2_000)
    async with raw_peer(limits=limits) as (a, peer):
        await a.drain()
        assert a.send_nowait("x" * 4_000) is True
        assert a.send_nowait("x" * 8_000) is False
        await a.drain()  # the kernel took it all
        while a.send_nowait("x" * 1_000):
            await asyncio.sleep(0)
        draining = asyncio.create_task(a.drain())
        await turns()
        assert not draining.done()
        while not draining.done():
            assert await peer.line() in ("x" * 4_000, "x" * 8_000, "x" * 1_000)
        await draining
        assert a.send_nowait("again") is True


async def test_send_nowait_counts_handles() -> None:
    """Handles not acknowledged count towards water marks of their own."""
    limits = Limits(high_water_handles=3, low_water_handles=1)
    async with raw_peer("native", limits) as (a, peer):
        with clients(3) as (_, served):
            assert [a.send_nowait(n, each) for n, each in enumerate(served)] == [True, True, False]
            draining = asyncio.create_task(a.drain())
            await peer.handles(3)
            peer.write(ack(1))
            await turns()
            assert not draining.done()
            peer.write(ack(2))
            await draining
            peer.write(ack(3))
            await a.flush()


async def test_drain_returns_at_once_below_the_high_mark() -> None:
    """``drain`` does not wait while the queue never went above the high-water mark."""
    async with raw_peer() as (a, peer):
        with clients(1) as (_, served):
            a.send_nowait("x", served[0])
            await asyncio.wait_for(a.drain(), 5)
            await peer.line()
            peer.write(ACK)
            await a.flush()


@both_dialects
async def test_channel_full_of_bytes(dialect: str) -> None:
    """At ``Limits.queued_bytes`` both sends raise ``ChannelFull``, and nothing more is queued."""
    async with raw_peer(dialect, Limits(queued_bytes=1_000_000)) as (a, peer):
        sent = 0
        with pytest.raises(ChannelFull, match=r"queued_bytes.*drain\(\)"):
            while sent < 1000:
                a.send_nowait([sent, "x" * 100_000])
                sent += 1
                await asyncio.sleep(0)
        with pytest.raises(ChannelFull):
            await a.send("x" * 100_000)
        for n in range(sent):
            line = await peer.line()
            assert (line[1] if dialect == "native" else line)[0] == n
        await a.send("room again")


async def test_one_message_larger_than_the_queue_is_taken() -> None:
    """One message larger than ``queued_bytes`` is taken when nothing else is queued."""
    async with raw_peer(limits=Limits(queued_bytes=1000)) as (a, peer):
        a.send_nowait("x" * 5_000_000)  # more than the kernel takes
        with pytest.raises(ChannelFull):
            a.send_nowait("y" * 1000)
        assert await peer.line() == "x" * 5_000_000


@both_dialects
async def test_channel_full_of_handles(dialect: str) -> None:
    """At ``Limits.queued_handles`` a handle is refused, stays usable; plain messages still go."""
    async with raw_peer(dialect, Limits(queued_handles=2)) as (a, peer):
        with clients(3) as (sockets, served):
            a.send_nowait(0, served[0])
            a.send_nowait(1, served[1])
            with pytest.raises(ChannelFull, match="queued_handles"):
                a.send_nowait(2, served[2])
            with pytest.raises(ChannelFull):
                await a.send(2, served[2])
            assert works(sockets[2], served[2])
            a.send_nowait("plain")
            undelivered = Recorder()
            a.on("undelivered", undelivered)
            a.abort()
            assert len(undelivered.calls) == 2


async def test_message_longer_than_a_line() -> None:
    """A message that makes a longer line than ``Limits.line`` is refused by ``send``."""
    async with joined("native", Limits(line=10_000)) as (a, b):
        with pytest.raises(MessageNotSerializable, match=r"Limits\.line"):
            await a.send("x" * 10_000)
        await a.send("y" * 5_000)
        assert (await b.recv())[0] == "y" * 5_000


# -- with a handle -------------------------------------------------------------------------------


@both_dialects
async def test_send_returns_after_the_acknowledgement(dialect: str) -> None:
    """With a handle ``send`` returns when the peer acknowledged it; then this copy is closed."""
    async with raw_peer(dialect) as (a, peer):
        client, served = connection()
        with client:
            sending = asyncio.create_task(a.send("take", served))
            while not peer.fds:
                await peer.line()
            await turns()
            assert not sending.done()
            with pytest.raises(DescriptorReleased):
                served.fileno()
            peer.write(ack(1) if dialect == "native" else ACK)
            await sending
            assert served.closed
            assert is_open(client)
            os.close(peer.fds.pop())
            assert not is_open(client)


@both_dialects
async def test_order_of_messages_and_handles(dialect: str) -> None:
    """Messages and handles, waited for or not, arrive in the order of the calls."""
    async with joined(dialect) as (a, b):
        with clients(30) as (sockets, served):
            tasks = []
            for n in range(30):
                a.send_nowait(["plain", n])
                if n % 3 == 0:
                    a.send_nowait(["handle", n], served[n])
                else:
                    tasks.append(asyncio.create_task(a.send(["handle", n], served[n])))
                    await asyncio.sleep(0)
            for n in range(30):
                assert await b.recv() == (["plain", n], None)
                message, handle = await b.recv()
                assert message == ["handle", n]
                assert works(sockets[n], handle)
                handle.close()
            await asyncio.gather(*tasks)


@both_dialects
async def test_keep_open(dialect: str) -> None:
    """With ``keep_open`` the handle stays the caller's, and both ends can use it."""
    async with joined(dialect) as (a, b):
        client, served = connection()
        with client, served:
            sending = asyncio.create_task(a.send("lent", served, keep_open=True))
            _, handle = await b.recv()
            await sending
            assert works(client, handle)
            assert works(client, served)
            handle.close()
            assert is_open(client)


@both_dialects
async def test_flush_waits_for_acknowledgements(dialect: str) -> None:
    """``flush`` returns when everything is written and every handle acknowledged."""
    async with raw_peer(dialect) as (a, peer):
        await a.flush()  # nothing to do
        with clients(1) as (_, served):
            a.send_nowait("handle", served[0])
            flushing = asyncio.create_task(a.flush())
            while not peer.fds:
                await peer.line()
            await turns()
            assert not flushing.done()
            peer.write(ack(1) if dialect == "native" else ACK)
            await flushing
            assert served[0].closed


# -- when it cannot be sent ----------------------------------------------------------------------


@both_dialects
async def test_send_after_disconnect(dialect: str) -> None:
    """After ``disconnect`` every send raises ``ChannelClosed``, which is not ``ChannelBroken``."""
    async with joined(dialect) as (a, _):
        a.disconnect()
        for ended in (False, True):
            with clients(1) as (_, served):
                with pytest.raises(ChannelClosed) as caught:
                    await a.send("late", served[0])
                assert not isinstance(caught.value, ChannelBroken)
                with pytest.raises(ChannelClosed):
                    a.send_nowait("late", served[0])
                assert served[0].fileno() >= 0
            if not ended:
                await a.wait_disconnected()


@both_dialects
async def test_send_after_the_peer_ended(dialect: str) -> None:
    """After the peer ended, every send raises ``ChannelBroken``, which is a ``ConnectionError``."""
    async with joined(dialect) as (a, b):
        b.disconnect()
        await a.wait_disconnected()
        with pytest.raises(ChannelBroken) as caught:
            await a.send("late")
        assert isinstance(caught.value, ConnectionError)
        with pytest.raises(ChannelBroken):
            a.send_nowait("late")


@both_dialects
async def test_flush_after_messages_were_lost(dialect: str) -> None:
    """``flush`` never says that everything is written when the end of the peer lost a part."""
    async with raw_peer(dialect) as (a, peer):
        a.send_nowait("x" * 4_000_000)
        await turns()
        peer.close()
        await a.wait_disconnected()
        with pytest.raises(ChannelBroken):
            await a.flush()


def _circular() -> Any:
    value: dict[str, Any] = {}
    value["self"] = [value]
    return value


def _deep() -> Any:
    value: Any = 0
    for _ in range(200):
        value = [value]
    return value


REFUSED = {
    "bytes": (b"x", "bytes"),
    "nested bytes": ({"a": [1, {"b": b"x"}]}, "bytes"),
    "bytearray": ([bytearray(b"x")], "bytearray"),
    "set": ({1}, "set"),
    "nested set": ({"a": {1}}, "set"),
    "object": ([object()], "object"),
    "date": ([datetime.date(2024, 1, 1)], "date"),
    "complex": (1j, "complex"),
    "circular": (_circular(), "around|itself|circular"),
    "deep": (_deep(), "deeper"),
    "NODE_HANDLE": ({"cmd": "NODE_HANDLE", "type": "net.Socket"}, "command"),
    "NODE_HANDLE_ACK": ({"cmd": "NODE_HANDLE_ACK"}, "command"),
    "NODE_HANDLE_NACK": ({"cmd": "NODE_HANDLE_NACK"}, "command"),
    "NODE_HANDLEIPC": ({"cmd": "NODE_HANDLEIPC", "native": 2}, "command"),
    "NODE_HANDLE_OTHER": ({"cmd": "NODE_HANDLE_OTHER"}, "command"),
    "NODE_SOCKET_COUNT": ({"cmd": "NODE_SOCKET_COUNT"}, "command"),
}


@both_dialects
@pytest.mark.parametrize("what", REFUSED)
async def test_refused_messages(dialect: str, what: str) -> None:
    """A message that is no JSON value is refused at once, by name; its handle stays usable."""
    message, why = REFUSED[what]
    async with joined(dialect) as (a, b):
        with clients(1) as (sockets, served):
            for handle in (None, served[0]):
                with pytest.raises(MessageNotSerializable, match=why) as caught:
                    a.send_nowait(message, handle)
                assert isinstance(caught.value, TypeError)
                with pytest.raises(MessageNotSerializable, match=why):
                    await a.send(message, handle)
            assert works(sockets[0], served[0])
            await a.send("next")
            assert await b.recv() == ("next", None)


def _closed() -> socket.socket:
    sock = socket.socket()
    sock.close()
    return sock


def _half() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    return ours


BAD_HANDLES: dict[str, tuple[Any, str]] = {
    "closed socket": (_closed, "closed"),
    "unconnected": (socket.socket, "connected"),
    "unbound UDP": (lambda: socket.socket(type=socket.SOCK_DGRAM), "bound"),
    "seqpacket": (_half, "cannot be sent"),
    "object": (object, "object is no handle"),
    "int": (lambda: 3, "int is no handle"),
    "zero": (lambda: 0, "int is no handle"),
    "str": (lambda: "handle", "str is no handle"),
    "class": (lambda: socket.socket, "type is no handle"),
}


@both_dialects
@pytest.mark.parametrize("what", BAD_HANDLES)
async def test_refused_handles(dialect: str, what: str) -> None:
    """What cannot be sent is refused synchronously, naming the reason; it is not closed."""
    make, why = BAD_HANDLES[what]
    async with joined(dialect) as (a, b):
        handle = make()
        was_open = isinstance(handle, socket.socket) and handle.fileno() >= 0
        try:
            with pytest.raises(UnsupportedHandle, match=why):
                a.send_nowait("x", handle)
            with pytest.raises(UnsupportedHandle, match=why):
                await a.send("x", handle)
            assert not was_open or handle.fileno() >= 0
        finally:
            if was_open:
                handle.close()
        await a.send("next")
        assert await b.recv() == ("next", None)


@both_dialects
async def test_tls_sockets_are_refused(dialect: str) -> None:
    """A TLS socket, wrapped in ``Native`` or not, is refused by name and stays open."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    async with joined(dialect) as (a, _):
        ours, theirs = socket.socketpair()
        with theirs, context.wrap_socket(ours, do_handshake_on_connect=False) as tls:
            for handle in (tls, handleipc.Native(tls)):
                with pytest.raises(UnsupportedHandle, match="TLS"):
                    a.send_nowait("x", handle)
                with pytest.raises(UnsupportedHandle, match="TLS"):
                    await a.send("x", handle)
            assert tls.fileno() >= 0


@both_dialects
async def test_connection_is_sent_once(dialect: str) -> None:
    """A ``Connection`` already on its way, or already sent, cannot be sent again."""
    async with joined(dialect) as (a, b):
        client, served = connection()
        with client:
            a.send_nowait("first", served)
            with pytest.raises(DescriptorReleased, match="on its way"):
                a.send_nowait("second", served)
            with pytest.raises(DescriptorReleased, match="on its way"):
                await a.send("second", served, keep_open=True)
            with pytest.raises(DescriptorReleased):
                served.close()
            _, handle = await b.recv()
            await a.flush()
            with pytest.raises(DescriptorReleased, match="another process"):
                a.send_nowait("third", served)
            assert works(client, handle)
            handle.close()


@both_dialects
async def test_closed_connection_is_refused(dialect: str) -> None:
    """A closed or detached ``Connection`` is refused synchronously."""
    async with joined(dialect) as (a, _):
        with clients(2) as (_, served):
            served[0].close()
            fd = served[1].detach()
            for each in served:
                with pytest.raises(DescriptorReleased):
                    a.send_nowait("x", each)
            os.close(fd)


@both_dialects
async def test_closed_while_it_waited(dialect: str) -> None:
    """A held object closed before its line is written is ``HandleNotDelivered``; the rest goes."""
    async with joined(dialect) as (a, b):
        ours, theirs = socket.socketpair()
        with theirs:
            undelivered = Recorder()
            a.on("undelivered", undelivered)
            a.send_nowait("before")
            a.send_nowait("handle", ours)
            a.send_nowait("after")
            ours.close()
            assert await b.recv() == ("before", None)
            assert await b.recv() == ("after", None)
            ((message, handle, reason),) = await undelivered.next()
            assert (message, handle) == ("handle", ours)
            assert "closed" in reason


@both_dialects
async def test_closed_while_send_waits_behind_others(dialect: str) -> None:
    """The same for a waiting ``send``: it raises ``HandleNotDelivered``."""
    async with raw_peer(dialect, handles=1) as (a, peer):
        with clients(1) as (_, served):
            a.send_nowait("first", served[0])
            ours, theirs = socket.socketpair()
            with theirs:
                sending = asyncio.create_task(a.send("second", ours))
                while not peer.fds:
                    await peer.line()
                ours.close()
                peer.write(ack(1) if dialect == "native" else ACK)
                with pytest.raises(HandleNotDelivered, match="closed"):
                    await sending


# -- refused by the peer -------------------------------------------------------------------------


async def test_nack_is_retried_then_given_back() -> None:
    """Node dialect: after a NACK the same envelope goes again, 3 times; then the handle is back."""
    async with raw_peer() as (a, peer):
        client, served = connection()
        with client, served:
            sending = asyncio.create_task(a.send("m", served))
            seen = []
            for _ in range(4):
                seen.append(await peer.line())
                peer.write(NACK)
            with pytest.raises(HandleNotDelivered) as caught:
                await sending
            assert seen == [seen[0]] * 4
            assert seen[0]["type"] == "net.Socket"
            assert caught.value.handle is served
            assert works(client, served)
            assert len(peer.fds) == 4
            await a.send("alive")


@pytest.mark.parametrize("code", ["descriptors", "denied", "kind", "type", "closing", "policy"])
async def test_native_refusal(code: str) -> None:
    """Native: a refusal gives the handle back at once, and the channel lives."""
    async with raw_peer("native") as (a, peer):
        client, served = connection()
        with client, served:
            sending = asyncio.create_task(a.send("m", served))
            while not peer.fds:
                await peer.line()
            peer.write({**ack(1), "refuse": [[1, 1, code]]})
            with pytest.raises(HandleNotDelivered) as caught:
                await sending
            assert caught.value.handle is served
            assert caught.value.reason
            assert works(client, served)
            await a.send("alive")


# -- cancellation and timeout --------------------------------------------------------------------


async def _blocked(a: handleipc.Channel, peer: Any, served: Any, dialect: str) -> None:
    """Send a handle that stays unacknowledged, so that what follows cannot leave."""
    a.send_nowait("blocker", served)
    while not peer.fds:
        await peer.line()


@both_dialects
async def test_cancelled_before_the_first_byte(dialect: str) -> None:
    """A ``send`` cancelled before its first byte left is withdrawn, and the handle is usable."""
    async with raw_peer(dialect, handles=1) as (a, peer):
        with clients(3) as (sockets, served):
            await _blocked(a, peer, served[0], dialect)
            sending = asyncio.create_task(a.send("withdrawn", served[1]))
            await turns()
            a.send_nowait("after", served[2])
            sending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sending
            assert works(sockets[1], served[1])
            peer.write(ack(1) if dialect == "native" else ACK)
            lines = []
            while len(peer.fds) < 2:
                lines.append(str(await peer.line()))
            text = "".join(lines) + peer.unread().decode()
            assert "after" in text
            assert "withdrawn" not in text
            peer.write(ack(2) if dialect == "native" else ACK)
            await a.flush()


@both_dialects
async def test_plain_send_cancelled_before_the_first_byte(dialect: str) -> None:
    """A plain ``send`` behind others is withdrawn too."""
    async with raw_peer(dialect, handles=1) as (a, peer):
        with clients(2) as (_, served):
            await _blocked(a, peer, served[0], dialect)
            a.send_nowait("blocked", served[1])
            sending = asyncio.create_task(a.send("withdrawn"))
            await turns()
            sending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sending
            peer.write(ack(1) if dialect == "native" else ACK)
            while len(peer.fds) < 2:
                await peer.line()
            peer.write(ack(2) if dialect == "native" else ACK)
            a.send_nowait("last")
            text = ""
            while "last" not in text:
                text += str(await peer.line())
            assert "withdrawn" not in text


@both_dialects
async def test_timeout_before_the_first_byte(dialect: str) -> None:
    """``timeout=`` before the first byte: ``HandleNotDelivered``, and the handle is usable."""
    async with raw_peer(dialect, handles=1) as (a, peer):
        with clients(2) as (sockets, served):
            await _blocked(a, peer, served[0], dialect)
            with pytest.raises(HandleNotDelivered) as caught:
                await a.send("late", served[1], timeout=0.02)
            assert caught.value.handle is served[1]
            assert works(sockets[1], served[1])
            with pytest.raises(TimeoutError):
                await a.send("x" * 5_000_000, timeout=0.02)
            peer.write(ack(1) if dialect == "native" else ACK)


async def _ended(sending: asyncio.Task[None], handle: Any, b: handleipc.Channel, ends: str) -> None:
    """Have the peer take the handle, or end without; the caller hears which."""
    if ends == "taken":
        _, received = await b.recv()
        received.close()
        await sending
        assert handle.closed
    else:
        await turns()
        b.abort()
        with pytest.raises((handleipc.HandleNotDelivered, handleipc.HandleInDoubt)):
            await sending


@both_dialects
@pytest.mark.parametrize("ends", ["refused", "taken"])
async def test_timeout_of_what_has_ended(dialect: str, ends: str) -> None:
    """A handle whose fate is known and not told yet is told to the caller, and to nobody else."""
    undelivered = []
    async with joined(dialect) as (a, b):
        a.on("undelivered", lambda *told: undelivered.append(told))
        reporting = a._report_outcomes
        a._report_outcomes = lambda: None  # a turn that is not over when the time is
        client, handle = connection()
        with client:
            if ends == "refused":
                b._turn = lambda **_: None  # type: ignore[method-assign]  # acknowledges nothing
            sending = asyncio.create_task(a.send("message", handle, timeout=0.1))
            await _ended(sending, handle, b, ends)
        a._report_outcomes = reporting
        a._report_outcomes()
        assert not undelivered
        handle.close()


@both_dialects
@pytest.mark.parametrize("ends", ["refused", "taken"])
async def test_timeout_in_the_turn_of_the_end(
    monkeypatch: pytest.MonkeyPatch, dialect: str, ends: str
) -> None:
    """A handle that ended in the turn in which the time was over: the caller hears how."""
    timeouts = []

    def timeout(delay: float) -> asyncio.Timeout:
        timeouts.append(asyncio.Timeout(asyncio.get_running_loop().time() + delay))
        return timeouts[-1]

    undelivered = []
    async with joined(dialect) as (a, b):
        a.on("undelivered", lambda *told: undelivered.append(told))
        client, handle = connection()
        with client:
            report = a._report_outcomes

            def late() -> None:
                if a._protocol.outgoing.outcomes:
                    timeouts[0].reschedule(0)  # runs before the sender can
                report()

            a._report_outcomes = late
            if ends == "refused":
                b._turn = lambda **_: None  # type: ignore[method-assign]  # acknowledges nothing
            monkeypatch.setattr(asyncio, "timeout", timeout)
            sending = asyncio.create_task(a.send("message", handle, timeout=60))
            await asyncio.sleep(0)
            monkeypatch.undo()
            await _ended(sending, handle, b, ends)
            assert timeouts[0].expired()
        assert not undelivered
        handle.close()


@both_dialects
async def test_timeout_of_a_plain_send(dialect: str) -> None:
    """``timeout=`` of a plain ``send``: ``TimeoutError``; begun, the message still goes whole."""
    async with raw_peer(dialect) as (a, peer):
        with pytest.raises(TimeoutError):
            await a.send("x" * 3_000_000, timeout=0.02)
        await turns()
        line = await peer.line()
        assert (line[1] if dialect == "native" else line) == "x" * 3_000_000
        await a.send("next")
        line = await peer.line()
        assert (line[1] if dialect == "native" else line) == "next"


@both_dialects
@pytest.mark.parametrize("how", ["cancel", "timeout"])
async def test_given_up_after_the_first_byte(dialect: str, how: str) -> None:
    """Given up later, a ``send`` goes on, and its failure goes to ``"undelivered"``."""
    async with raw_peer(dialect, Limits(node_retries=0)) as (a, peer):
        client, served = connection()
        with client, served:
            undelivered = Recorder()
            a.on("undelivered", undelivered)
            sending = asyncio.create_task(
                a.send("begun", served, timeout=0.05 if how == "timeout" else None)
            )
            while not peer.fds:
                await peer.line()
            if how == "cancel":
                sending.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await sending
            else:
                with pytest.raises(TimeoutError):
                    await sending
            with pytest.raises(DescriptorReleased):
                served.fileno()
            peer.write({**ack(1), "refuse": [[1, 1, "kind"]]} if dialect == "native" else NACK)
            ((message, handle, reason),) = await undelivered.next()
            assert (message, handle) == ("begun", served)
            assert isinstance(reason, str)
            assert works(client, served)


@both_dialects
async def test_given_up_after_the_first_byte_and_delivered(dialect: str) -> None:
    """Given up after its first byte and delivered all the same: no event, the copy is closed."""
    async with raw_peer(dialect) as (a, peer):
        client, served = connection()
        with client:
            undelivered = Recorder()
            a.on("undelivered", undelivered)
            sending = asyncio.create_task(a.send("begun", served))
            while not peer.fds:
                await peer.line()
            sending.cancel()
            await asyncio.wait([sending])
            peer.write(ack(1) if dialect == "native" else ACK)
            await a.flush()
            assert served.closed
            assert undelivered.calls == []
            assert is_open(client)


@both_dialects
async def test_cancelled_at_every_turn(dialect: str) -> None:
    """Whenever a ``send`` is cancelled, the handle ends with exactly one owner."""
    async with joined(dialect) as (a, b):
        received = Recorder()
        b.on("message", received)
        undelivered = Recorder()
        a.on("undelivered", undelivered)
        for after in range(12):
            client, served = connection()
            with client:
                received.calls.clear()
                sending = asyncio.create_task(a.send(after, served))
                for _ in range(after):
                    await asyncio.sleep(0)
                sending.cancel()
                await asyncio.wait([sending])
                await a.flush()
                if received.calls or served.closed:
                    ((message, handle),) = await received.next()
                    assert message == after
                    assert works(client, handle)
                    handle.close()
                    assert served.closed
                else:
                    assert works(client, served)
                    served.close()
        assert undelivered.calls == []


@both_dialects
@pytest.mark.parametrize("wait", ["drain", "flush"])
async def test_cancelled_drain_and_flush(dialect: str, wait: str) -> None:
    """A cancelled ``drain`` or ``flush`` leaves the channel as it was."""
    limits = Limits(high_water_handles=1, low_water_handles=0)
    async with raw_peer(dialect, limits) as (a, peer):
        with clients(1) as (_, served):
            a.send_nowait("x", served[0])
            waiting = asyncio.create_task(getattr(a, wait)())
            await turns()
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            while not peer.fds:
                await peer.line()
            peer.write(ack(1) if dialect == "native" else ACK)
            await getattr(a, wait)()
            assert served[0].closed


@both_dialects
@pytest.mark.parametrize("wait", ["drain", "flush"])
async def test_drain_and_flush_when_the_channel_breaks(dialect: str, wait: str) -> None:
    """A waiting ``drain`` or ``flush`` raises ``ChannelBroken`` when the peer ends."""
    limits = Limits(high_water_handles=1, low_water_handles=0)
    async with raw_peer(dialect, limits) as (a, peer):
        with clients(1) as (sockets, served):
            a.on("undelivered", Recorder())
            a.send_nowait("x", served[0])
            waiting = asyncio.create_task(getattr(a, wait)())
            while not peer.fds:
                await peer.line()
            peer.close()
            with pytest.raises(ChannelBroken):
                await waiting
            assert works(sockets[0], served[0])


# -- many at once ---------------------------------------------------------------------------------


async def test_send_many_leaves_in_order() -> None:
    """Messages and handles, up to the last."""
    async with joined("native") as (a, b):
        with clients(2) as (ours, served):
            earned(b)
            assert a.send_many([(1, None), (2, served[0]), (3, None), (4, served[1])]) == 4
            got = [await b.recv() for _ in range(4)]
            assert [message for message, _ in got] == [1, 2, 3, 4]
            for client, (_, connection) in zip(ours, got[1::2], strict=True):
                with connection as received:
                    assert works(client, received)
            assert a.send_many([]) == 0


async def test_send_many_stops_where_there_is_no_room() -> None:
    """At the high-water mark, and at a hard limit; the rest is the caller's, to be sent later."""
    limits = Limits(high_water_handles=3, low_water_handles=1, queued_handles=4)
    async with raw_peer("native", limits) as (a, peer):
        with clients(6) as (_, served):
            rest = list(enumerate(served))
            for taken in (3, 1, 0):
                assert a.send_many(rest) == taken
                rest = rest[taken:]
            assert [one.closed for one in served] == [True] * 4 + [False] * 2
            await peer.handles(4)
            peer.write(ack(4))
            await a.drain()
            assert a.send_many(rest, keep_open=True) == 2
            await peer.handles(6)
            peer.write(ack(6))
            await a.flush()
            assert not served[4].closed


async def test_send_many_stops_before_what_cannot_be_sent() -> None:
    """It says how far it came; the fault is told by the call that begins with it."""
    async with joined("native") as (a, b):
        messages = [(1, None), ({2}, None), (3, object()), (4, None)]
        assert a.send_many(messages) == 1
        with pytest.raises(MessageNotSerializable):
            a.send_many(messages[1:])
        with pytest.raises(UnsupportedHandle):
            a.send_many(messages[2:])
        assert a.send_many(messages[3:]) == 1
        assert [await b.recv(), await b.recv()] == [(1, None), (4, None)]
    with pytest.raises(ChannelClosed):
        a.send_many([(1, None)])
