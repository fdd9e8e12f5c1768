"""How a channel uses its socket: readiness, batches, what the end of the loop does."""

from __future__ import annotations

import asyncio
import errno
import os
import socket

import pytest

from handleipc import Channel, ChannelBroken, Connection, HandleNotDelivered, Limits
from handleipc.limits import Invitation
from handleipc.wire import link


async def test_more_lines_than_a_report_holds() -> None:
    """Lines left in the buffer are read although the socket is empty and tells nothing."""
    ours, theirs = socket.socketpair()
    with theirs:
        channel = Channel(ours, Limits())
        theirs.send(b"1\n" * 20_000)
        got = [await channel.recv() for _ in range(20_000)]
        assert got == [(1, None)] * 20_000
        channel.disconnect()
        await channel.wait_disconnected()


async def test_more_lines_than_a_report_holds_then_eof() -> None:
    """The last lines before the peer's end are delivered, however many they are."""
    ours, theirs = socket.socketpair()
    channel = Channel(ours, Limits())
    with theirs:
        theirs.send(b"1\n" * 20_000)
    assert len([m async for m, _ in channel]) == 20_000


async def test_lines_left_in_the_buffer_while_reading_was_paused() -> None:
    """Resumed, it goes on with the buffer before it waits for the socket."""
    ours, theirs = socket.socketpair()
    with theirs:
        channel = Channel(ours, Limits(held_messages=10))
        theirs.send(b"1\n" * 20_000)
        await asyncio.sleep(0)
        got = [await channel.recv() for _ in range(20_000)]
        assert len(got) == 20_000
        channel.abort()


async def test_sends_of_one_turn_share_a_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand messages of one loop turn leave in one system call."""
    writes = []
    send = link.send_with_fds

    def counted(fd: int, data: bytes, offset: int, fds: list[int]) -> object:
        writes.append(len(data))
        return send(fd, data, offset, fds)

    ours, theirs = socket.socketpair()
    with theirs:
        channel = Channel(ours, Limits())
        await asyncio.sleep(0)
        monkeypatch.setattr(link, "send_with_fds", counted)
        for i in range(1000):
            channel.send_nowait(i)
        await channel.flush()
        assert len(writes) == 1
        channel.abort()


@pytest.mark.parametrize("code", [errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM])
async def test_a_kernel_short_of_room_is_waited_for(
    code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing fails and nothing is lost: the write is tried again after a pause."""
    left = [3]
    send = link.send_with_fds

    def short(fd: int, data: bytes, offset: int, fds: list[int]) -> object:
        if left[0]:
            left[0] -= 1
            return link.Refused.IN_FLIGHT
        return send(fd, data, offset, fds)

    ours, theirs = socket.socketpair()
    with theirs:
        channel = Channel(ours, Limits(in_flight_delay_max=0.01))
        monkeypatch.setattr(link, "send_with_fds", short)
        await channel.send("plain")
        assert theirs.recv(100) == b'"plain"\n'
        left[0] = 3
        read, write = os.pipe()
        sender, receiver = socket.socketpair()
        with receiver:
            sending = asyncio.create_task(channel.send("handle", sender))
            data, fds = b"", []
            theirs.setblocking(False)
            while not fds:
                await asyncio.sleep(0)
                try:
                    data, fds, _, _ = socket.recv_fds(theirs, 1000, 9)
                except BlockingIOError:
                    continue
            assert b'"msg":"handle"' in data
            for fd in (*fds, read, write):
                os.close(fd)
            theirs.send(b'{"cmd":"NODE_HANDLE_ACK"}\n')
            await sending
        channel.abort()


@pytest.mark.parametrize("code", [errno.EPERM, errno.EINVAL, errno.EBADF])
async def test_a_descriptor_the_kernel_will_not_carry(
    code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handle comes back with the kernel's reason, and the channel goes on."""
    send = link.send_with_fds

    def refusing(fd: int, data: bytes, offset: int, fds: list[int]) -> object:
        if fds:
            raise OSError(code, os.strerror(code))
        return send(fd, data, offset, fds)

    ours, theirs = socket.socketpair()
    with theirs:
        channel = Channel(ours, Limits())
        monkeypatch.setattr(link, "send_with_fds", refusing)
        a, b = socket.socketpair()
        with a, b:
            with pytest.raises(HandleNotDelivered, match=os.strerror(code)):
                await channel.send("handle", a)
            a.send(b"still usable")
        await channel.send("next")
        assert theirs.recv(100) == b'"next"\n'
        channel.abort()


async def test_a_peer_that_reset_the_channel() -> None:
    """ECONNRESET ends iteration like EOF; what it sent before is delivered."""
    ours, theirs = socket.socketpair()
    channel = Channel(ours, Limits())
    await channel.send("never read")
    theirs.send(b'"before"\n')
    theirs.close()
    assert [m async for m, _ in channel] == ["before"]
    with pytest.raises(ChannelBroken):
        channel.send_nowait("after")


async def test_a_line_of_many_reads_grows_the_buffer_and_shrinks_it_again() -> None:
    """A large message arrives whole; its memory does not stay."""
    a, b = socket.socketpair()
    one = Channel(a, Limits(), inviting=True)
    two = Channel(b, Limits(), invited_by=Invitation(8, 1 << 20))
    text = "x" * (16 << 20)
    sending = asyncio.create_task(one.send(text))
    message, _ = await two.recv()
    assert message == text
    await sending
    await two.send("small")
    assert await one.recv() == ("small", None)
    await one.send("small")
    await two.recv()
    assert two._link._receiver._framer.reader.capacity < 1 << 20
    one.disconnect()
    two.disconnect()
    await one.wait_disconnected()
    await two.wait_disconnected()


async def test_an_untaken_connection_is_closed_with_its_channel() -> None:
    """A channel that is dropped with its loop leaks nothing that was on its way."""
    a, b = socket.socketpair()
    one = Channel(a, Limits(), inviting=True)
    two = Channel(b, Limits(), invited_by=Invitation(8, 1 << 20))
    x, y = socket.socketpair()
    with y:
        await one.send("first", x)
        _, connection = await two.recv()
        assert isinstance(connection, Connection)
        connection.close()
    one.abort()
    await two.wait_disconnected()
