"""``peek_until``: waiting for what a client says first, without reading it."""

from __future__ import annotations

import asyncio
import gc
import os
import select
import socket
import struct

import pytest

import handleipc
from handleipc.asyncio import arrivals
from handleipc.wire.syscalls import descriptor_kind
from tests.asyncio.helpers import connection, turns

REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
END = b"\r\n\r\n"


async def test_what_is_there_already() -> None:
    """What has come is returned up to the separator, and can be read afterwards."""
    client, served = connection()
    with client:
        client.send(REQUEST + b"body")
        assert await served.peek_until(END) == REQUEST
        assert not arrivals._watchers
        assert served.peek(100) == REQUEST + b"body"
        reader, writer = await served.open()
        assert await reader.readexactly(len(REQUEST) + 4) == REQUEST + b"body"
        writer.close()
        await writer.wait_closed()


async def test_every_split() -> None:
    """It waits for the last byte, whatever pieces come."""
    for at in range(1, len(REQUEST)):
        client, served = connection()
        with client, served:
            client.send(REQUEST[:at])
            waiting = asyncio.create_task(served.peek_until(END))
            await turns()
            assert not waiting.done()
            client.send(REQUEST[at:] + b"more")
            assert await waiting == REQUEST
    assert not arrivals._watchers


async def test_nobody_is_woken_by_bytes_that_stay() -> None:
    """Bytes that wait unread do not keep the loop busy."""
    client, served = connection()
    with client, served:
        client.send(b"GET /")
        waiting = asyncio.create_task(served.peek_until(END))
        await turns()
        (watcher,) = arrivals._watchers.values()
        told = []
        watcher._tell = told.append
        watcher._epoll._tell = told.append
        for _ in range(50):
            await asyncio.sleep(0)
        assert not told
        client.send(b" HTTP/1.0")
        while not told:
            await asyncio.sleep(0)
        assert told == [served.fileno()]
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    assert not arrivals._watchers


@pytest.mark.parametrize("said", [b"", b"GET /"])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
async def test_client_ends(said: bytes, when: str) -> None:
    """A FIN before the separator is told at once, with what came."""
    client, served = connection()
    with client, served:
        client.send(said)
        if when == "before":
            client.shutdown(socket.SHUT_WR)
        waiting = asyncio.create_task(served.peek_until(END))
        await turns()
        if when == "meanwhile":
            assert not waiting.done()
            client.shutdown(socket.SHUT_WR)
        with pytest.raises(asyncio.IncompleteReadError) as caught:
            await waiting
        assert caught.value.partial == said


@pytest.mark.parametrize("when", ["before", "meanwhile"])
async def test_client_resets(when: str) -> None:
    """A reset is an OSError, before or while it is waited for."""
    async with handleipc.listen("127.0.0.1", 0) as server:
        client = socket.create_connection(server.sockname)
        with await anext(server) as served:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if when == "before":
                client.close()
            waiting = asyncio.create_task(served.peek_until(END))
            await turns()
            client.close()
            with pytest.raises(OSError, match="reset"):
                await waiting


async def test_limit() -> None:
    """``limit`` bytes without the separator are an error, and stay readable."""
    client, served = connection()
    with client, served:
        client.send(b"x" * 99)
        waiting = asyncio.create_task(served.peek_until(END, limit=100))
        await turns()
        client.send(b"\r\n\r\n")
        with pytest.raises(asyncio.LimitOverrunError, match="100 bytes") as caught:
            await waiting
        assert caught.value.consumed == 100
        assert len(served.peek(1000)) == 103
        assert await served.peek_until(END, limit=103) == b"x" * 99 + END


async def test_timeout() -> None:
    """A silent client costs ``timeout`` seconds, and the connection is as it was."""
    client, served = connection()
    with client, served:
        with pytest.raises(TimeoutError):
            await served.peek_until(END, timeout=0.01)
        client.send(REQUEST)
        assert await served.peek_until(END, timeout=None) == REQUEST


async def test_head_comes_first() -> None:
    """Bytes that were read before count, also where the separator begins in them."""
    client, served = connection(head=b"GET / HTTP/1.0\r\n\r")
    with client:
        waiting = asyncio.create_task(served.peek_until(END))
        await turns()
        assert not waiting.done()
        client.send(b"\nbody")
        assert await waiting == b"GET / HTTP/1.0\r\n\r\n"
        assert await served.peek_until(b"/") == b"GET /"
        await served.end()


@pytest.mark.parametrize(("separator", "limit"), [(b"", 10), (b"ab", 1)])
async def test_separators_that_cannot_be(separator: bytes, limit: int) -> None:
    """An empty separator, or one longer than the limit, is refused."""
    client, served = connection()
    with client, served, pytest.raises(ValueError, match="separator"):
        await served.peek_until(separator, limit=limit)


async def test_closed_meanwhile() -> None:
    """A connection that is closed while somebody waits says so at the latest at the timeout."""
    client, served = connection()
    with client:
        waiting = asyncio.create_task(served.peek_until(END, timeout=0.05))
        await turns()
        served.close()
        with pytest.raises(TimeoutError):
            await waiting
        with pytest.raises(handleipc.DescriptorReleased):
            await served.peek_until(END)


async def test_number_of_a_closed_one_is_used_again() -> None:
    """The next connection with the same number is watched, whoever forgot the last one."""
    client, served = connection()
    other, spare = connection()
    number = served.fileno()
    first = asyncio.create_task(served.peek_until(END, timeout=10))
    await turns()
    served.close()
    with client, other, spare:
        kind = descriptor_kind(os.dup2(spare.fileno(), number))
        with handleipc.Connection(number, kind) as again:
            second = asyncio.create_task(again.peek_until(END))
            await turns()
            first.cancel()
            await turns()
            other.send(REQUEST)
            assert await second == REQUEST


@pytest.mark.parametrize("missing", ["epoll", "descriptors"])
async def test_without_epoll(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """Where there is no epoll, or no descriptor for one, it is looked again and again."""

    def refuse() -> None:
        raise OSError(24, "Too many open files")

    if missing == "epoll":
        monkeypatch.delattr(select, "epoll")
    else:
        monkeypatch.setattr(select, "epoll", refuse)
    client, served = connection()
    with client, served:
        waiting = asyncio.create_task(served.peek_until(END))
        await turns()
        client.send(REQUEST)
        assert await waiting == REQUEST
    assert not arrivals._watchers


async def test_many_at_once() -> None:
    """Hundreds of silent clients are held by one epoll, and none is mixed up."""
    before = len(os.listdir("/proc/self/fd"))
    pairs = [connection() for _ in range(200)]
    waiting = [asyncio.create_task(served.peek_until(b"\n")) for _, served in pairs]
    await turns()
    assert len(os.listdir("/proc/self/fd")) == before + 2 * len(pairs) + 1
    for n, (client, _) in reversed(list(enumerate(pairs))):
        client.send(b"%d\n" % n)
    assert await asyncio.gather(*waiting) == [b"%d\n" % n for n in range(200)]
    for client, served in pairs:
        client.close()
        served.close()
    gc.collect()
