"""``accepting``: what an ordinary server gets, whose connections come through a door."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import handleipc
from handleipc.asyncio import accepting
from tests.asyncio.helpers import both_dialects, connection, joined, turns, until


class Echo(asyncio.Protocol):
    """Answers what it is told with the same."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


async def said(client: socket.socket, data: bytes = b"hello") -> bytes:
    """Send something, and return what comes back."""
    loop = asyncio.get_running_loop()
    client.setblocking(False)
    async with asyncio.timeout(10):
        await loop.sock_sendall(client, data)
        return await loop.sock_recv(client, 1000)


@both_dialects
async def test_a_server_of_asyncio(dialect: str) -> None:
    """``asyncio.start_server`` serves what comes through a channel, and knows nothing of it."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.readline()).upper())
        writer.close()
        await writer.wait_closed()

    async with joined(dialect) as (a, b):
        door = handleipc.accepting(b)
        async with door.patched():
            async with await asyncio.start_server(serve, sock=door.socket) as server:
                assert server.is_serving()
                for _ in range(3):
                    client, handed = connection()
                    with client:
                        await a.send("take it", handed)
                        assert await said(client, b"word\n") == b"WORD\n"
        a.disconnect()
        async with asyncio.timeout(10):
            await b.wait_disconnected()


class Source:
    """An iterator of what the test puts in."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Any] = asyncio.Queue()

    def __aiter__(self) -> Source:
        return self

    async def __anext__(self) -> Any:
        came = await self.queue.get()
        if isinstance(came, BaseException):
            raise came
        return came

    def put(self, *things: Any) -> None:
        for one in things:
            self.queue.put_nowait(one)

    def client(self) -> socket.socket:
        """A new one, whose connection is put in."""
        client, served = connection()
        self.put(served)
        return client


@contextlib.asynccontextmanager
async def serving(
    source: Any, factory: Any = Echo, on_other: Any = None, **options: Any
) -> AsyncIterator[tuple[handleipc.Door, Any]]:
    """A door with a server on it."""
    loop = asyncio.get_running_loop()
    door = handleipc.accepting(source, on_other=on_other)
    async with door.patched():
        server: Any = await loop.create_server(factory, sock=door.socket, **options)
        try:
            yield door, server
        finally:
            server.close()
            server.abort_clients()
            await server.wait_closed()


async def test_everything_a_server_has() -> None:
    """It is an ``asyncio.AbstractServer`` with what ``asyncio.Server`` has."""
    source = Source()
    async with serving(source, start_serving=False) as (door, server):
        assert isinstance(server, asyncio.AbstractServer)
        assert server.get_loop() is asyncio.get_running_loop()
        assert [one.getsockname() for one in server.sockets] == [door.socket.getsockname()]
        with source.client() as first, source.client() as second:
            await turns()
            assert not server.is_serving()
            assert source.queue.qsize() == 2
            await server.start_serving()
            await server.start_serving()
            assert server.is_serving()
            assert await said(first) == await said(second) == b"hello"
            assert "connections=2" in repr(server)
            server.close()
            server.close()
            assert not server.is_serving()
            assert server.sockets == ()
            with pytest.raises(RuntimeError, match="closed"):
                await server.start_serving()
            # Those who are served go on, and are waited for.
            assert await said(first) == b"hello"
            closing = asyncio.create_task(server.wait_closed())
            server.close_clients()
            await closing
            assert first.recv(10) == second.recv(10) == b""


async def test_closing_takes_nothing() -> None:
    """What the source has when the server is closed is for the next one."""
    source = Source()
    async with serving(source) as (door, server):
        await turns()
        with pytest.raises(handleipc.ChannelBusy):
            await server.get_loop().create_server(Echo, sock=door.socket)
        server.close()
        with source.client() as client:
            await turns()
            assert source.queue.qsize() == 1
            again: Any = await server.get_loop().create_server(Echo, sock=door.socket)
            assert await said(client) == b"hello"
            again.close()
        await again.wait_closed()


async def test_one_after_the_other() -> None:
    """The next is taken when the last has started: what cannot be served waits in the source."""
    source = Source()
    started: list[Any] = []

    class Slow(Echo):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            started.append(source.queue.qsize())

    async with serving(source, Slow, start_serving=False) as (_, server):
        with contextlib.ExitStack() as stack:
            for _ in range(5):
                stack.enter_context(source.client())
            await server.start_serving()
            await until(lambda: len(started) == 5)
        assert started == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("error", [StopAsyncIteration(), RuntimeError("broken")], ids=str)
@pytest.mark.parametrize("served", [False, True])
async def test_the_source_ends(error: Exception, served: bool) -> None:
    """Everybody who waits hears of it, and how; who is served goes on."""
    source = Source()
    async with serving(source) as (door, server):
        client = source.client() if served else None
        if client is not None:
            assert await said(client) == b"hello"
        waits = [door.ended(), server.serve_forever(), server.wait_closed()]
        ended, forever, closed = [asyncio.create_task(one) for one in waits]
        await turns()
        source.put(error)
        for one in (ended, forever):
            if isinstance(error, RuntimeError):
                with pytest.raises(RuntimeError, match="broken"):
                    await one
            else:
                await one
        assert not server.is_serving()
        if client is not None:
            assert not closed.done()
            assert await said(client) == b"hello"
            client.close()
        await closed
        if isinstance(error, RuntimeError):
            with pytest.raises(RuntimeError, match="broken"):
                await door.ended()
        else:
            await door.ended()


async def test_serve_forever_is_cancelled() -> None:
    """It closes the server, waits for the last connection, and is cancelled."""
    source = Source()
    async with serving(source) as (door, server):
        forever = asyncio.create_task(server.serve_forever())
        with source.client() as client:
            assert await said(client) == b"hello"
            forever.cancel()
            await turns()
            assert not server.is_serving()
            assert not forever.done()
        with pytest.raises(asyncio.CancelledError):
            await forever
        ended = asyncio.create_task(door.ended())
        await turns()
        assert not ended.done()
        ended.cancel()


async def test_serve_forever_of_one_that_is_closed() -> None:
    """Closed by another task, it returns."""
    async with serving(Source()) as (_, server):
        forever = asyncio.create_task(server.serve_forever())
        await turns()
        server.close()
        await forever


async def test_other_calls_are_as_they_were() -> None:
    """Only that very address is diverted, by any number of doors, and only inside."""
    loop = asyncio.get_running_loop()
    before = loop.create_server
    first, second = handleipc.accepting(Source()), handleipc.accepting(Source())
    async with first.patched():
        async with second.patched():
            for door in (first, second):
                made: Any = await loop.create_server(Echo, sock=door.socket)
                assert isinstance(made, accepting.HandedServer)
                assert made._door is door
                made.close()
            other = await loop.create_server(Echo, "127.0.0.1", 0)
            with socket.create_server(("127.0.0.1", 0)) as listener:
                third = await loop.create_server(Echo, sock=listener.dup())
            for one in (other, third):
                assert not isinstance(one, accepting.HandedServer)
                with socket.create_connection(one.sockets[0].getsockname()) as client:
                    assert await said(client) == b"hello"
                one.close()
                await one.wait_closed()
            with pytest.raises(OSError):
                await loop.create_server(Echo, sock=closed_socket())
    assert loop.create_server == before
    assert first.socket.fileno() == second.socket.fileno() == -1
    assert not accepting._doors


def closed_socket() -> socket.socket:
    sock = socket.socket()
    sock.close()
    return sock


async def test_a_copy_of_the_socket_will_do() -> None:
    """As libraries make that take a number."""
    source = Source()
    door = handleipc.accepting(source)
    async with door.patched():
        with door.socket.dup() as copy:
            server: Any = await asyncio.get_running_loop().create_server(Echo, sock=copy)
        with source.client() as client:
            assert await said(client) == b"hello"
        server.close()
        await server.wait_closed()


async def test_options_that_make_no_sense() -> None:
    """They are refused as the loop refuses them."""
    with pytest.raises(TypeError, match="nonsense"):
        async with serving(Source(), nonsense=1):
            pass
    with pytest.raises(ValueError, match="TLS"):
        async with serving(Source(), ssl_handshake_timeout=1):
            pass


@pytest.mark.parametrize("how", ["function", "coroutine", "none"])
@both_dialects
async def test_what_is_no_connection(
    dialect: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It goes to ``on_other``, which owns the handle, and connections go on being served."""
    got: list[Any] = []

    async def later(message: Any, handle: Any) -> None:
        await asyncio.sleep(0)
        got.append((message, handle))

    def now(message: Any, handle: Any) -> None:
        got.append((message, handle))

    on_other = {"function": now, "coroutine": later, "none": None}[how]
    caplog.set_level(logging.WARNING, "handleipc")
    async with joined(dialect) as (a, b), serving(b, on_other=on_other):
        await a.send("plain")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.bind(("127.0.0.1", 0))
            await a.send("with a handle", udp)
        client, handle = connection()
        with client:
            await a.send("connection", handle)
            assert await said(client) == b"hello"
        if how == "none":
            assert "on_other" in caplog.text
            return
        (plain, nothing), (message, sock) = got
        assert (plain, nothing, message) == ("plain", None, "with a handle")
        sock.close()


@pytest.mark.unhandled("no protocol today")
async def test_a_factory_that_raises() -> None:
    """One connection is lost, as in asyncio, and told; the next is served."""
    source = Source()
    made: list[Echo] = []

    def factory() -> Echo:
        made.append(Echo())
        if len(made) == 1:
            raise RuntimeError("no protocol today")
        return made[-1]

    async with serving(source, factory):
        with source.client() as first, source.client() as second:
            assert await said(second) == b"hello"
            assert first.recv(10) == b""


async def test_a_client_that_has_reset() -> None:
    """A client that is gone costs nobody anything."""
    async with handleipc.listen("127.0.0.1", 0) as listener, serving(listener):
        gone = socket.create_connection(listener.sockname)
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        gone.close()
        with socket.create_connection(listener.sockname) as client:
            assert await said(client) == b"hello"
            await until(lambda: listener.connections == 1)
        await until(lambda: listener.connections == 0)


async def test_tls(certificate: Path) -> None:
    """The server's own TLS, and a client that never begins holds nobody up."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    trusting = ssl.create_default_context(cafile=str(certificate))
    async with handleipc.listen("127.0.0.1", 0) as listener:
        async with serving(listener, ssl=context, ssl_handshake_timeout=20) as (_, server):
            with socket.create_connection(listener.sockname):
                await turns()
                async with asyncio.timeout(10):
                    reader, writer = await asyncio.open_connection(
                        *listener.sockname, ssl=trusting, server_hostname="localhost"
                    )
                    writer.write(b"secret")
                    assert await reader.readexactly(6) == b"secret"
                    writer.close()
                    with contextlib.suppress(ConnectionError):
                        await writer.wait_closed()
            server.close()
            async with asyncio.timeout(10):
                await server.wait_closed()


async def test_clients_are_aborted() -> None:
    """``abort_clients`` ends those who are served at once."""
    source = Source()
    async with serving(source) as (_, server):
        with source.client() as client:
            assert await said(client) == b"hello"
            server.close()
            server.abort_clients()
            async with asyncio.timeout(10):
                await server.wait_closed()
            assert client.recv(10) == b""
