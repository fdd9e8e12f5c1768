"""A peer that says ``net.Socket`` of something else: who reads goes on, and the log stays short."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Iterator

import pytest

import handleipc
from handleipc import Channel, Connection, HandleNotDelivered
from tests.asyncio.helpers import joined, raw_peer, settle, turns


@contextlib.contextmanager
def a_pipe() -> Iterator[int]:
    """Lend the reading end of a pipe: no connection."""
    reading, writing = os.pipe()
    try:
        yield reading
    finally:
        os.close(reading)
        os.close(writing)


def say(first: int, count: int = 1) -> bytes:
    return b'[4,%d,"net.Socket",[%b]]\n' % (first, b",".join([b'"c"'] * count))


async def test_a_relay_runs_on() -> None:
    """One that copes with clients that left copes with a lie between two good ones."""
    passed: list[str] = []

    async def relay(source: Channel, target: Channel) -> None:
        async for message, connection in source:
            try:
                await target.send(message, connection)
                passed.append("good")
            except HandleNotDelivered:
                passed.append("lie")
                connection.close()

    async with raw_peer("native") as (channel, peer), joined("native") as (a, b):
        await settle(a, b)
        task = asyncio.create_task(relay(channel, a))
        clients = []
        for number in (1, 2, 3):
            if number == 2:
                with a_pipe() as fd:
                    peer.write(say(number), fds=(fd,))
            else:
                ours, client = socket.socketpair()
                clients.append(client)
                with ours:
                    peer.write(say(number), fds=(ours.fileno(),))
        for _ in range(2):
            _, received = await b.recv()
            received.close()
        assert passed[:2] == ["good", "lie"]
        task.cancel()
        for client in clients:
            client.close()


@pytest.mark.parametrize("how", ["end", "start", "open", "peek_until"])
async def test_each_use_says_so_as_of_a_client_that_left(how: str) -> None:
    """An ``OSError``, which all of them document."""
    async with raw_peer("native") as (channel, peer):
        with a_pipe() as fd:
            peer.write(say(1), fds=(fd,))
        _, connection = await channel.recv()
        assert isinstance(connection, Connection)
        with pytest.raises(ConnectionAbortedError, match="descriptor of another kind"):
            if how == "start":
                await connection.start(asyncio.Protocol)
            elif how == "peek_until":
                await connection.peek_until(b"x")
            else:
                await getattr(connection, how)()
        connection.close()


async def test_a_door_is_not_made_to_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """A hundred lies to a server that takes handed connections: a line, not a hundred."""
    caplog.set_level(logging.WARNING)
    async with raw_peer("native") as (channel, peer):
        door = handleipc.accepting(channel)
        async with door.patched():
            server = await asyncio.start_server(lambda r, w: w.close(), sock=door.socket)
            for number in range(1, 101):
                with a_pipe() as fd:
                    peer.write(say(number), fds=(fd,))
                await turns(3)
            await turns(50)
            server.close()
        assert len(caplog.records) <= 2
        assert all(len(record.getMessage()) <= 300 for record in caplog.records)


@pytest.mark.parametrize("blocking", [True, False])
async def test_a_blocking_socket_does_not_block_here(blocking: bool) -> None:
    """However the peer has set it: from its first use on it is non-blocking."""
    async with raw_peer("native") as (channel, peer):
        ours, client = socket.socketpair()
        ours.setblocking(blocking)
        with ours, client:
            peer.write(say(1), fds=(ours.fileno(),))
            _, connection = await channel.recv()
            with connection.socket() as sock:
                assert sock.gettimeout() == 0
                assert not os.get_blocking(sock.fileno())
