"""The kinds of handle, and what each says it was sent as."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest

import handleipc
from handleipc import BoundSocket, HandleNotDelivered, Native, Socket, UnsupportedHandle
from tests.asyncio.helpers import DIALECTS, connection, joined

both_dialects = pytest.mark.parametrize("dialect", DIALECTS)


def bound(type: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    """Return a socket with an address."""
    sock = socket.socket(type=type)
    sock.bind(("127.0.0.1", 0))
    return sock


@both_dialects
async def test_tags(dialect: str) -> None:
    """Every handle says what it was sent as, and sockets that are no connection are ``Socket``."""
    ours, theirs = socket.socketpair()
    reading, writing = os.pipe()
    client, served = connection()
    with ours, theirs, open(reading), client:
        with (
            bound(socket.SOCK_DGRAM) as udp,
            socket.create_server(("127.0.0.1", 0)) as listener,
            handleipc.FileDescriptor(writing) as fifo,
            bound() as tcp,
        ):
            async with joined(dialect) as (a, b):
                kinds: list[tuple[Any, str, type]] = [
                    (served, "net.Socket", handleipc.Connection),
                    (listener, "net.Server", handleipc.Server),
                    (Native(theirs), "net.Native", Socket),
                    (Native(listener), "net.Native", Socket),
                    (Native(fifo), "net.Native", handleipc.FileDescriptor),
                    (BoundSocket(tcp), "net.BoundSocket", Socket),
                    (udp, "dgram.Socket", Socket),
                    (Native(udp), "dgram.Native", Socket),
                ]
                if dialect == "native":
                    kinds.append((fifo, "fd", handleipc.FileDescriptor))
                for handle, tag, python_type in kinds:
                    await a.send(tag, handle)
                    message, arrived = await b.recv()
                    assert (message, arrived.tag, type(arrived)) == (tag, tag, python_type)
                    if isinstance(arrived, Socket):
                        assert arrived.gettimeout() == 0
                    arrived.close()


@both_dialects
async def test_bound_socket(dialect: str) -> None:
    """An address that was claimed here is listened at there, and the socket here is closed."""
    async with joined(dialect) as (a, b):
        sock = bound()
        address = sock.getsockname()
        with pytest.raises(UnsupportedHandle, match="Node of version 26"):
            await a.send("bare", sock)
        await a.send("kept", BoundSocket(sock), keep_open=True)
        _, copy = await b.recv()
        copy.close()
        await a.send("bound", BoundSocket(sock))
        assert sock.fileno() < 0
        _, arrived = await b.recv()
        with arrived:
            arrived.listen()
            with socket.create_connection(address):
                pass


@both_dialects
async def test_socket_that_its_client_has_reset(dialect: str) -> None:
    """It is not delivered, it is the caller's still, and the channel goes on."""
    async with joined(dialect) as (a, b):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            client = socket.create_connection(listener.getsockname())
            accepted, _ = listener.accept()
        with accepted:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.close()
            for send in (a.send, a.send_nowait):
                with pytest.raises(HandleNotDelivered, match="client has reset") as caught:
                    await send("reset", accepted)  # type: ignore[misc]
                assert caught.value.handle is accepted
            await a.send("next")
            assert await b.recv() == ("next", None)


@both_dialects
async def test_blocking_socket_that_stays(dialect: str) -> None:
    """What stays here knows that it does not block any more; what comes back blocks as it did."""
    async with joined(dialect) as (a, b):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            await a.send("listener", listener)
            _, shared = await b.recv()
            shared.close()
            assert not listener.getblocking()
            with pytest.raises(BlockingIOError):
                listener.accept()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            b.abort()
            with pytest.raises((HandleNotDelivered, handleipc.ChannelClosed)):
                await a.send("back", ours)
            theirs.send(b"x")
            assert ours.getblocking()
            assert os.get_blocking(ours.fileno())
            assert ours.recv(1) == b"x"
