"""asyncio's own objects as handles: stream writers, transports and servers."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import socket
import ssl
import struct
import sys
from asyncio import selector_events
from asyncio.trsock import TransportSocket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import handleipc
from handleipc import DescriptorReleased, HandleNotDelivered, UnsupportedHandle
from tests.asyncio.helpers import DIALECTS, Recorder, joined, turns, until
from tests.linger import ON, lingers

both_dialects = pytest.mark.parametrize("dialect", DIALECTS)


@contextlib.asynccontextmanager
async def accepted() -> AsyncIterator[tuple[socket.socket, handleipc.Connection]]:
    """A TCP client that blocks for ten seconds at most, and the connection of it."""
    async with handleipc.listen("127.0.0.1", 0) as server:
        client = socket.create_connection(server.sockname, timeout=10)
        with client:
            connection = await anext(server)
            connection._group = None
            server._group.closed_here()  # these tests do not count
            yield client, connection


async def opened(
    connection: handleipc.Connection, **options: Any
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Return a pair of asyncio's streams, as a program without handleipc would have made it."""
    sock = connection.socket()
    return await asyncio.open_connection(sock=sock, **options)


async def in_thread(function: Any, *args: Any) -> Any:
    """Run a blocking call of the client's."""
    return await asyncio.get_running_loop().run_in_executor(None, function, *args)


class Collector(asyncio.Protocol):
    """Keeps what it gets, and notes in which order."""

    def __init__(self, *, paused: bool = False) -> None:
        self.paused = paused
        self.data = b""
        self.events: list[str] = []
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.events.append("made")
        if self.paused:
            transport.pause_reading()

    def data_received(self, data: bytes) -> None:
        self.data += data
        self.events.append("data")

    def eof_received(self) -> None:
        self.events.append("eof")

    def connection_lost(self, exc: Exception | None) -> None:
        self.events.append("lost")


class Buffered(asyncio.BufferedProtocol):
    """The same, with a buffer of its own that is smaller than what comes."""

    def __init__(self, size: int = 3) -> None:
        self.buffer = bytearray(size)
        self.data = b""
        self.events: list[str] = []

    def connection_made(self, transport: Any) -> None:
        self.events.append("made")

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.data += self.buffer[:nbytes]

    def connection_lost(self, exc: Exception | None) -> None:
        self.events.append("lost")


async def echo_once(client: socket.socket, connection: handleipc.Connection) -> None:
    """Show that this handle is that client's other end."""
    client.sendall(b"ping")
    sock = connection.socket()
    with sock:
        loop = asyncio.get_running_loop()
        assert await loop.sock_recv(sock, 10) == b"ping"
        await loop.sock_sendall(sock, b"pong")
        assert await in_thread(client.recv, 10) == b"pong"


# -- stream writers ------------------------------------------------------------------------------


@both_dialects
async def test_writer(dialect: str) -> None:
    """A ``StreamWriter`` arrives as a ``Connection``, and its client notices nothing."""
    async with joined(dialect) as (a, b), accepted() as (client, connection):
        _, writer = await opened(connection)
        await a.send("writer", writer)
        assert writer.is_closing()
        message, arrived = await b.recv()
        assert (message, type(arrived)) == ("writer", handleipc.Connection)
        assert arrived.head == b""
        assert arrived.peername == client.getsockname()
        client.setblocking(False)
        with pytest.raises(BlockingIOError):  # no FIN, no RST
            client.recv(1)
        client.settimeout(10)
        await echo_once(client, arrived)


@both_dialects
async def test_our_end_is_told(dialect: str) -> None:
    """After delivery the reader here ends, and ``wait_closed`` returns."""
    async with joined(dialect) as (a, b), accepted() as (client, connection):
        reader, writer = await opened(connection)
        await a.send("writer", writer)
        _, arrived = await b.recv()
        assert await asyncio.wait_for(reader.read(), 10) == b""
        await asyncio.wait_for(writer.wait_closed(), 10)
        with pytest.raises(UnsupportedHandle, match="closed"):
            await a.send("again", writer)
        await echo_once(client, arrived)


async def buffered(client: socket.socket, reader: asyncio.StreamReader, data: bytes) -> None:
    """Have this much in the reader's memory."""
    client.sendall(data)
    await until(lambda: len(reader._buffer) >= len(data), "the data")


async def test_bytes_read_travel_with_it() -> None:
    """What asyncio has read already is ``head`` there, can be peeked at, and is read first."""
    async with joined("native") as (a, b), accepted() as (client, connection):
        reader, writer = await opened(connection)
        await buffered(client, reader, b"GET / HTTP/1.1\r\n\r\n\0\xff")
        assert await reader.readuntil(b"GET ") == b"GET "
        await a.send("writer", writer)
        client.sendall(b"later")
        _, arrived = await b.recv()
        assert arrived.head == b"/ HTTP/1.1\r\n\r\n\0\xff"
        assert arrived.peek(3) == b"/ H"
        assert arrived.peek(1000) == arrived.head
        new_reader, new_writer = await arrived.open()
        assert arrived.head == b""
        assert await new_reader.readexactly(21) == b"/ HTTP/1.1\r\n\r\n\0\xfflater"
        new_writer.write(b"answer")
        assert await in_thread(client.recv, 10) == b"answer"
        new_writer.close()
        await new_writer.wait_closed()


@pytest.mark.parametrize("protocol", [Collector, Buffered])
async def test_head_reaches_a_protocol_first(protocol: type[Collector | Buffered]) -> None:
    """A protocol of either kind gets the bytes right after its connection, and the rest after."""
    async with joined("native") as (a, b), accepted() as (client, connection):
        reader, writer = await opened(connection)
        await buffered(client, reader, b"0123456789")
        await a.send("writer", writer)
        _, arrived = await b.recv()
        client.sendall(b"abc")
        transport, receiver = await arrived.start(protocol)
        assert receiver.data[:10] == b"0123456789"
        assert receiver.events[0] == "made"
        await until(lambda: receiver.data == b"0123456789abc", "the data")
        transport.close()
        await until(lambda: receiver.events[-1] == "lost", "the end")


async def test_head_must_be_taken() -> None:
    """``detach`` and ``socket`` would lose the bytes: they raise until these are taken."""
    async with joined("native") as (a, b), accepted() as (client, connection):
        reader, writer = await opened(connection)
        await buffered(client, reader, b"head")
        await a.send("writer", writer)
        _, arrived = await b.recv()
        with pytest.raises(DescriptorReleased, match="4 bytes"):
            arrived.detach()
        with pytest.raises(DescriptorReleased, match="4 bytes"):
            arrived.socket()
        assert not arrived.closed
        assert arrived._take_head() == b"head"
        assert (arrived.head, arrived._take_head()) == (b"", b"")
        await echo_once(client, arrived)


async def test_head_travels_on() -> None:
    """Handed on again untouched, the bytes go along."""
    async with joined("native") as (a, b), joined("native") as (c, d):
        async with accepted() as (client, connection):
            reader, writer = await opened(connection)
            await buffered(client, reader, b"head")
            await a.send("writer", writer)
            _, arrived = await b.recv()
            await c.send("on", arrived)
            _, far = await d.recv()
            assert far.head == b"head"
            new_reader, new_writer = await far.open()
            client.sendall(b"!")
            assert await new_reader.readexactly(5) == b"head!"
            new_writer.close()
            await new_writer.wait_closed()


async def test_head_is_nothing_for_end() -> None:
    """``end`` answers without reading, so the bytes are dropped with it."""
    async with joined("native") as (a, b), accepted() as (client, connection):
        reader, writer = await opened(connection)
        await buffered(client, reader, b"request")
        await a.send("writer", writer)
        _, arrived = await b.recv()
        await arrived.end(b"answer")
        assert await in_thread(client.recv, 10) == b"answer"
        assert await in_thread(client.recv, 10) == b""


async def test_large_head() -> None:
    """As much as a stream holds travels: all of 64 KiB, and every byte value."""
    data = bytes(range(256)) * 256
    async with joined("native") as (a, b), accepted() as (client, connection):
        reader, writer = await opened(connection)
        await buffered(client, reader, data)
        await a.send("writer", writer)
        _, arrived = await b.recv()
        assert arrived.head == data
        arrived._take_head()
        await echo_once(client, arrived)


async def test_bytes_read_are_refused_towards_node() -> None:
    """Node has no word for them: refused at once, and the writer reads and writes as before."""
    async with joined("node") as (a, b), accepted() as (client, connection):
        reader, writer = await opened(connection)
        await buffered(client, reader, b"read ")
        with pytest.raises((UnsupportedHandle, HandleNotDelivered), match="node"):
            await a.send("writer", writer)
        assert not writer.is_closing()
        assert writer.transport.is_reading()
        client.sendall(b"before")
        assert await reader.readexactly(11) == b"read before"
        writer.write(b"still here")
        assert await in_thread(client.recv, 20) == b"still here"
        # Emptied, it can go.
        await a.send("writer", writer)
        _, arrived = await b.recv()
        await echo_once(client, arrived)


@both_dialects
async def test_undelivered_reads_again(dialect: str) -> None:
    """Given back since the channel ended, it reads again and has lost nothing."""
    async with joined(dialect) as (a, b), accepted() as (client, connection):
        reader, writer = await opened(connection)
        b.abort()
        with pytest.raises((HandleNotDelivered, handleipc.ChannelClosed)) as raised:
            await a.send("writer", writer)
        if isinstance(raised.value, HandleNotDelivered):
            assert raised.value.handle is writer
        assert not writer.is_closing()
        client.sendall(b"go on")
        assert await asyncio.wait_for(reader.readexactly(5), 10) == b"go on"
        assert writer.transport.is_reading()
        writer.close()
        await writer.wait_closed()


@both_dialects
async def test_undelivered_in_the_queue(dialect: str) -> None:
    """Sent without waiting, it pauses meanwhile, and goes to the listener reading again."""
    async with joined(dialect) as (a, b), accepted() as (client, connection):
        undelivered = Recorder()
        a.on("undelivered", undelivered)
        reader, writer = await opened(connection)
        a.send_nowait("writer", writer)
        assert not writer.transport.is_reading()
        a.abort()
        ((message, handle, _),) = await undelivered.next()
        assert (message, handle) == ("writer", writer)
        client.sendall(b"go on")
        assert await asyncio.wait_for(reader.readexactly(5), 10) == b"go on"
        writer.close()
        await writer.wait_closed()


async def test_refused_by_the_peer_reads_again() -> None:
    """A peer whose channel takes no handles gives it back, and it reads again."""
    ours, theirs = socket.socketpair()
    a = handleipc.Channel(ours, handleipc.Limits())
    b = handleipc.Channel(theirs, handleipc.Limits(), accept_handles=False)
    async with accepted() as (client, connection):
        reader, writer = await opened(connection)
        with pytest.raises(HandleNotDelivered):
            await a.send("writer", writer)
        client.sendall(b"go on")
        assert await asyncio.wait_for(reader.readexactly(5), 10) == b"go on"
        writer.close()
        await writer.wait_closed()
    for channel in (a, b):
        channel.abort()
        await channel.wait_disconnected()


@both_dialects
async def test_keep_open_reads_on(dialect: str) -> None:
    """With ``keep_open`` it stays the caller's, paused only until it has been delivered."""
    async with joined(dialect) as (a, b), accepted() as (client, connection):
        reader, writer = await opened(connection)
        await a.send("writer", writer, keep_open=True)
        assert not writer.is_closing()
        assert writer.transport.is_reading()
        _, copy = await b.recv()
        copy.close()
        client.sendall(b"here")
        assert await asyncio.wait_for(reader.readexactly(4), 10) == b"here"
        writer.close()
        await writer.wait_closed()


@both_dialects
async def test_paused_by_its_reader(dialect: str) -> None:
    """A writer whose own flow control had paused it stays paused when it comes back."""
    async with joined(dialect) as (a, b), accepted() as (client, connection):
        reader, writer = await opened(connection, limit=10)
        await buffered(client, reader, b"more than the reader wants")
        assert not writer.transport.is_reading()
        with contextlib.suppress(UnsupportedHandle):  # node has no word for its bytes
            a.send_nowait("writer", writer)
        a.on("undelivered", lambda *_: None)
        a.abort()
        await a.wait_disconnected()
        assert not writer.transport.is_reading()
        writer.close()
        await writer.wait_closed()


async def test_paused_by_the_application() -> None:
    """One that was paused from outside goes, with what it had read and what it had not."""
    async with joined("native") as (a, b), accepted() as (client, connection):
        reader, writer = await opened(connection)
        await buffered(client, reader, b"early ")
        writer.transport.pause_reading()
        client.sendall(b"late")
        await a.send("writer", writer)
        _, arrived = await b.recv()
        new_reader, new_writer = await arrived.open()
        assert await new_reader.readexactly(10) == b"early late"
        new_writer.close()
        await new_writer.wait_closed()


async def test_writer_sent_by_a_protocol_of_its_own(event_loop_name: str) -> None:
    """A protocol may make a stream of itself and send that in connection_made()."""

    class Sending(asyncio.StreamReaderProtocol):
        refused: UnsupportedHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            loop = asyncio.get_running_loop()
            writer = asyncio.StreamWriter(transport, self, reader, loop)
            try:
                a.send_nowait("writer", writer)
            except UnsupportedHandle as error:
                self.refused = error

    loop = asyncio.get_running_loop()
    async with joined("native") as (a, b), accepted() as (client, connection):
        client.sendall(b"hello")
        reader = asyncio.StreamReader()
        transport, protocol = await loop.connect_accepted_socket(
            lambda: Sending(reader), connection.socket()
        )
        if event_loop_name == "uvloop":
            assert "from a coroutine" in str(protocol.refused)
            transport.abort()
            await turns()
        else:
            _, arrived = await b.recv()
            new_reader, new_writer = await arrived.open()
            assert await new_reader.readexactly(5) == b"hello"
            new_writer.close()
            await new_writer.wait_closed()


@pytest.mark.parametrize("early", [False, True])
async def test_writer_sent_by_the_callback_itself(early: bool, event_loop_name: str) -> None:
    """A plain callback of ``start_server`` runs before the stream reads: not a byte is lost.

    asyncio of some versions (3.11.2) and uvloop begin to read after it, paused or not.
    """
    async with joined("native") as (a, b):
        refused: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()

        def on_connection(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                a.send_nowait("writer", writer)
            except UnsupportedHandle:
                refused.put_nowait(writer)

        server = await asyncio.start_server(on_connection, "127.0.0.1", 0)
        with socket.create_connection(server.sockets[0].getsockname(), timeout=10) as client:
            if early:
                client.sendall(b"hello")
            if event_loop_name == "uvloop":
                (await refused.get()).close()
            else:
                _, arrived = await b.recv()
                if not early:
                    client.sendall(b"hello")
                reader, writer = await arrived.open()
                assert await reader.readexactly(5) == b"hello"
                writer.close()
                await writer.wait_closed()
        server.close()
        await server.wait_closed()


async def test_writer_whose_protocol_was_replaced(event_loop_name: str) -> None:
    """Its reader does not have what came since: refused, unless nothing has been read."""
    async with joined("native") as (a, b), accepted() as (client, connection):
        reader, writer = await opened(connection)
        other = Collector()
        writer.transport.set_protocol(other)
        client.sendall(b"to the other")
        await until(lambda: other.data == b"to the other", "the data")
        for paused in (False, True):
            if paused:
                writer.transport.pause_reading()
            with pytest.raises(UnsupportedHandle, match=r"protocol (may have|has)"):
                await a.send("writer", writer)
        writer.close()
        await until(lambda: other.events[-1] == "lost", "the end")


async def test_writer_of_another_protocol_that_has_read_nothing(event_loop_name: str) -> None:
    """A writer without a reader goes as its transport would."""
    if event_loop_name == "uvloop":
        pytest.skip("such transports are refused")
    async with joined("native") as (a, b), accepted() as (client, connection):
        client.sendall(b"early")
        collector = Collector(paused=True)
        transport, _ = await connection.start(lambda: collector)
        writer = asyncio.StreamWriter(
            transport,
            collector,  # type: ignore[arg-type]
            None,
            asyncio.get_running_loop(),
        )
        await a.send("writer", writer)
        _, arrived = await b.recv()
        assert arrived.peek(10) == b"early"
        arrived.close()
        await until(lambda: collector.events[-1] == "lost", "the end here")


@both_dialects
async def test_writer_whose_client_has_reset(dialect: str) -> None:
    """The handle is no wrong one: the error says what became of its client."""
    async with joined(dialect) as (a, _), accepted() as (client, connection):
        reader, writer = await opened(connection)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        await until(lambda: reader.exception() is not None, "the reset")
        with pytest.raises(HandleNotDelivered, match="client has reset") as caught:
            await a.send("writer", writer)
        assert caught.value.handle is writer


async def test_our_copy_of_a_writer_does_not_linger() -> None:
    """The peer that has it may have set it to linger: ours is closed without waiting."""
    async with joined("native") as (a, b), accepted() as (_, connection):
        _, writer = await opened(connection)
        with socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno())) as copy:
            copy.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ON)
            await a.send("writer", writer)
            await writer.wait_closed()
            assert not lingers(copy)
        _, arrived = await b.recv()
        arrived.close()


@both_dialects
async def test_client_that_is_gone(dialect: str) -> None:
    """A reader that is at EOF can be handed over still: the other direction may be open."""
    async with joined(dialect) as (a, b), accepted() as (client, connection):
        reader, writer = await opened(connection)
        client.shutdown(socket.SHUT_WR)
        assert await reader.read() == b""
        await a.send("writer", writer)
        _, arrived = await b.recv()
        await arrived.end(b"answer")
        assert await in_thread(client.recv, 10) == b"answer"


@both_dialects
async def test_unwritten_bytes(dialect: str) -> None:
    """A writer that holds bytes is refused, keeps them, and goes on writing and reading."""
    async with joined(dialect) as (a, _), accepted() as (client, connection):
        reader, writer = await opened(connection)
        data = b"x" * (16 << 20)
        writer.write(data)
        assert writer.transport.get_write_buffer_size()
        with pytest.raises(UnsupportedHandle, match="not yet written"):
            await a.send("writer", writer)
        assert writer.transport.is_reading()

        def read_all() -> int:
            got = 0
            while got < len(data) and (some := client.recv(1 << 20)):
                got += len(some)
            return got

        assert await in_thread(read_all) == len(data)
        client.sendall(b"in")
        assert await reader.readexactly(2) == b"in"
        writer.close()
        await writer.wait_closed()


@both_dialects
async def test_small_unflushed_writes(dialect: str) -> None:
    """What was written and not drained reaches the client, or the handle is refused."""
    async with joined(dialect) as (a, b), accepted() as (client, connection):
        _, writer = await opened(connection)
        writer.write(b"first ")
        try:
            await a.send("writer", writer)
        except UnsupportedHandle:
            await asyncio.sleep(0)  # uvloop writes at the end of the turn
            await a.send("writer", writer)
        _, arrived = await b.recv()
        await arrived.end(b"second")
        got = b""
        while data := await in_thread(client.recv, 100):
            got += data
        assert got == b"first second"


async def test_closed_writer() -> None:
    """A closed writer is refused with these words."""
    async with joined("native") as (a, _), accepted() as (_, connection):
        _, writer = await opened(connection)
        writer.close()
        with pytest.raises(UnsupportedHandle, match="StreamWriter is closed"):
            a.send_nowait("writer", writer)
        await writer.wait_closed()


async def test_pipe_is_no_connection() -> None:
    """The writer of a pipe is refused, and so is its transport: it is no stream connection."""
    loop = asyncio.get_running_loop()
    read, write = os.pipe()
    lost = asyncio.Event()

    class Pipe(asyncio.streams.FlowControlMixin):
        def connection_lost(self, exc: Exception | None) -> None:
            lost.set()

        def _get_close_waiter(self, stream: object) -> asyncio.Future[None]:
            done: asyncio.Future[None] = loop.create_future()
            done.set_result(None)
            return done

    async with joined("native") as (a, _):
        transport, protocol = await loop.connect_write_pipe(Pipe, open(write, "wb", 0))
        writer = asyncio.StreamWriter(transport, protocol, None, loop)
        errors = []
        for one in (writer, transport):
            try:
                await a.send("pipe", one)
            except Exception as error:
                errors.append(error)
        writer.close()
        await lost.wait()
        os.close(read)
        assert [type(error) for error in errors] == [UnsupportedHandle] * 2


async def test_datagram_transport() -> None:
    """A UDP transport is refused, with a word on what it is."""
    loop = asyncio.get_running_loop()
    async with joined("native") as (a, _):
        transport, _ = await loop.create_datagram_endpoint(
            asyncio.DatagramProtocol, ("127.0.0.1", 0)
        )
        with pytest.raises(UnsupportedHandle, match=r"bind a socket.socket, send that"):
            await a.send("transport", transport)
        transport.abort()
        await turns()


async def test_parts_of_a_stream() -> None:
    """What belongs to a connection that could be sent is refused, with the part that is sent."""
    async with joined("native") as (a, _), accepted() as (_, connection):
        reader, writer = await opened(connection)

        class SocketStream:
            """As anyio's."""

            extra_attributes: dict[str, object] = {}

        for part, advice in (
            (reader, "send the StreamWriter of the pair"),
            ((reader, writer), "of two streams the writer"),
            (writer.get_extra_info("socket"), "belongs to a transport.*send a StreamWriter"),
            (SocketStream(), "anyio.*send the socket.socket before"),
        ):
            name = type(part).__name__
            with pytest.raises(UnsupportedHandle, match=f"a {name} is no handle: .*{advice}"):
                await a.send("part", part)
        writer.close()
        await writer.wait_closed()


# -- TLS -----------------------------------------------------------------------------------------


@both_dialects
async def test_tls_is_refused(dialect: str, certificate: Path) -> None:
    """A TLS stream and its transport are refused, with the reason, and go on working."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    trusting = ssl.create_default_context(cafile=str(certificate))
    trusting.check_hostname = False
    made: asyncio.Queue[Any] = asyncio.Queue()
    server = await asyncio.start_server(
        lambda r, w: made.put_nowait((r, w)), "127.0.0.1", 0, ssl=context
    )
    async with joined(dialect) as (a, _):
        address = server.sockets[0].getsockname()
        client_reader, client = await asyncio.open_connection(*address, ssl=trusting)
        reader, writer = await made.get()
        for one in (writer, writer.transport, client, client.transport):
            with pytest.raises(UnsupportedHandle, match="TLS"):
                await a.send("tls", one)
        client.write(b"secret")
        assert await reader.readexactly(6) == b"secret"
        writer.write(b"answer")
        assert await client_reader.readexactly(6) == b"answer"
        for one in (client, writer):
            one.close()
            with contextlib.suppress(ssl.SSLError, ConnectionError):
                await one.wait_closed()
    server.close()
    await server.wait_closed()


# -- transports ----------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def served(protocol: Any, path: Path | None = None) -> AsyncIterator[socket.socket]:
    """A client of a server of the loop's own, which has a protocol and knows nothing of handles."""
    loop = asyncio.get_running_loop()
    if path is None:
        server = await loop.create_server(lambda: protocol, "127.0.0.1", 0)
        client = socket.socket()
    else:
        server = await loop.create_unix_server(lambda: protocol, path)
        client = socket.socket(socket.AF_UNIX)
    client.settimeout(10)
    try:
        with client:
            client.connect(server.sockets[0].getsockname())
            client.sendall(b"early")
            await until(lambda: protocol.transport is not None, "the connection")
            yield client
    finally:
        server.close()
        if protocol.transport is not None:
            protocol.transport.abort()
    await server.wait_closed()


def keeps_paused() -> bool:
    """Say whether this asyncio leaves a transport alone that was paused in connection_made."""
    source = inspect.getsource(selector_events)
    return "if not self.is_reading():" in source


@both_dialects
@pytest.mark.parametrize("fin", [False, True])
async def test_paused_transport(dialect: str, fin: bool, event_loop_name: str) -> None:
    """A transport that has read nothing goes with all its bytes still in the kernel.

    Where asyncio has read although it was paused (3.11.2), it is refused, and nothing is lost.
    """
    protocol = Collector(paused=True)
    async with joined(dialect) as (a, b), served(protocol) as client:
        if fin:
            client.shutdown(socket.SHUT_WR)
        await turns()
        if event_loop_name == "uvloop" or not keeps_paused():
            words = r"handleipc.listen\(\)|is closed" if fin else r"handleipc.listen\(\)"
            with pytest.raises(UnsupportedHandle, match=words):
                await a.send("transport", protocol.transport)
            protocol.transport.abort()
        else:
            await a.send("transport", protocol.transport)
            _, arrived = await b.recv()
            assert arrived.head == b""
            reader, writer = await arrived.open()
            assert await reader.readexactly(5) == b"early"
            client.setblocking(False)
            if not fin:
                with pytest.raises(BlockingIOError):
                    client.recv(1)
            writer.close()
            await writer.wait_closed()
        await until(lambda: protocol.events[-1] == "lost", "the end here")


@both_dialects
@pytest.mark.parametrize("family", ["TCP", "Unix"])
async def test_transport_of_a_connection(dialect: str, family: str, tmp_path: Path) -> None:
    """One that ``Connection.start`` has made knows on asyncio what it has read, of every family."""
    path = str(tmp_path / "socket")
    listening = (
        handleipc.listen_unix(path) if family == "Unix" else handleipc.listen("127.0.0.1", 0)
    )
    async with joined(dialect) as (a, b), listening as server:
        with socket.socket(server_family(server)) as client:
            client.settimeout(10)
            client.connect(server.sockname)
            client.sendall(b"early")
            protocol = Collector(paused=True)
            transport, _ = await (await anext(server)).start(lambda: protocol)
            await turns()
            if type(transport).__module__ == "uvloop.loop":
                with pytest.raises(UnsupportedHandle, match=r"uvloop.*handleipc.listen\(\)"):
                    await a.send("transport", transport)
                transport.abort()
            else:
                await a.send("transport", transport)
                _, arrived = await b.recv()
                assert arrived.peek(10) == b"early"
                arrived.close()
            await until(lambda: protocol.events[-1] == "lost", "the end here")


def server_family(server: handleipc.Server) -> socket.AddressFamily:
    """Return the family of a server's address."""
    return socket.AF_UNIX if isinstance(server.sockname, str) else socket.AF_INET


@both_dialects
async def test_paused_after_it_has_read(dialect: str) -> None:
    """One that was paused later is refused: its protocol has the first bytes, and nobody else."""
    async with joined(dialect) as (a, _):
        async with accepted() as (client, connection):
            protocol = Collector()
            transport, _ = await connection.start(lambda: protocol)
            client.sendall(b"early")
            await until(lambda: protocol.data == b"early", "the data")
            transport.pause_reading()
            client.sendall(b"late")
            with pytest.raises(UnsupportedHandle, match="protocol"):
                await a.send("transport", transport)
            transport.resume_reading()
            await until(lambda: protocol.data == b"earlylate", "the rest")
            transport.abort()
            await until(lambda: protocol.events[-1] == "lost", "the end")
        protocol = Collector()
        async with served(protocol) as client:
            await until(lambda: protocol.data == b"early", "the data")
            protocol.transport.pause_reading()
            client.sendall(b"late")
            with pytest.raises(UnsupportedHandle, match="protocol"):
                await a.send("transport", protocol.transport)
            protocol.transport.abort()
            await until(lambda: protocol.events[-1] == "lost", "the end")


async def test_unix_transport_of_others(tmp_path: Path) -> None:
    """Of a Unix connection nobody knows whether it was read: refused, with the way that works."""
    protocol = Collector(paused=True)
    async with joined("native") as (a, _), served(protocol, tmp_path / "socket"):
        with pytest.raises(UnsupportedHandle, match=r"listen_unix\(\)"):
            await a.send("transport", protocol.transport)
        protocol.transport.abort()
        await until(lambda: protocol.events[-1] == "lost", "the end")


@pytest.mark.parametrize("answer", [OSError("no"), bytes(104)])
async def test_kernel_that_does_not_know(
    monkeypatch: pytest.MonkeyPatch, answer: Any, event_loop_name: str
) -> None:
    """Where the kernel does not tell what was read, nothing is taken for granted."""
    if event_loop_name == "uvloop":
        pytest.skip("refused in any case")
    protocol = Collector(paused=True)

    def getsockopt(self: Any, level: int, option: int, *size: int) -> Any:
        if (level, option) == (socket.SOL_SOCKET, socket.SO_PROTOCOL):
            return socket.IPPROTO_TCP
        if isinstance(answer, OSError):
            raise answer
        return answer

    async with joined("native") as (a, _), served(protocol):
        monkeypatch.setattr(TransportSocket, "getsockopt", getsockopt)
        with pytest.raises(UnsupportedHandle, match="may have read"):
            await a.send("transport", protocol.transport)
        monkeypatch.setattr(sys, "platform", "freebsd14")
        with pytest.raises(UnsupportedHandle, match="may have read"):
            await a.send("transport", protocol.transport)
        protocol.transport.abort()
        await until(lambda: protocol.events[-1] == "lost", "the end")


async def test_transport_sent_in_connection_made(event_loop_name: str) -> None:
    """Before asyncio begins to read: it does not, on any version, and not a byte is lost."""
    if event_loop_name == "uvloop":
        pytest.skip("refused in any case")

    class Sending(Collector):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            a.send_nowait("transport", transport)

    async with joined("native") as (a, b):
        protocol = Sending(paused=True)
        async with served(protocol) as client:
            client.sendall(b" late")
            _, arrived = await b.recv()
            reader, writer = await arrived.open()
            assert await reader.readexactly(10) == b"early late"
            assert protocol.data == b""
            writer.close()
            await writer.wait_closed()
            await until(lambda: protocol.events[-1] == "lost", "the end")


@both_dialects
async def test_reading_transport(dialect: str) -> None:
    """One that reads is refused, since nobody knows what its protocol has: told what to do."""
    async with joined(dialect) as (a, _), accepted() as (client, connection):
        protocol = Collector()
        transport, _ = await connection.start(lambda: protocol)
        with pytest.raises(UnsupportedHandle, match=r"handleipc.listen\(\)"):
            await a.send("transport", transport)
        client.sendall(b"data")
        await until(lambda: protocol.data == b"data", "the data")
        transport.close()
        await until(lambda: protocol.events[-1] == "lost", "the end")


@both_dialects
async def test_undelivered_transport_stays_paused(dialect: str) -> None:
    """The caller had paused it, so it is the caller who resumes it; nothing is lost."""
    async with joined(dialect) as (a, b), accepted() as (client, connection):
        protocol = Collector(paused=True)
        transport, _ = await connection.start(lambda: protocol)
        transport.pause_reading()  # uvloop may read meanwhile
        b.abort()
        with pytest.raises((HandleNotDelivered, UnsupportedHandle, handleipc.ChannelClosed)):
            await a.send("transport", transport)
        assert not transport.is_reading()
        assert not transport.is_closing()
        client.sendall(b"data")
        transport.resume_reading()
        await until(lambda: protocol.data == b"data", "the data")
        transport.close()
        await until(lambda: protocol.events[-1] == "lost", "the end")


async def test_closed_transport() -> None:
    """A closed transport is refused."""
    async with joined("native") as (a, _), accepted() as (_, connection):
        protocol = Collector(paused=True)
        transport, _ = await connection.start(lambda: protocol)
        transport.close()
        with pytest.raises(UnsupportedHandle, match="closed"):
            await a.send("transport", transport)
        await until(lambda: protocol.events[-1] == "lost", "the end")


@both_dialects
async def test_counted_writer(dialect: str) -> None:
    """A stream of a ``Server``'s connection is counted once, wherever it goes."""
    async with joined(dialect) as (a, b), handleipc.listen("127.0.0.1", 0) as server:
        with socket.create_connection(server.sockname):
            _, writer = await (await anext(server)).open()
            assert await server.get_connections() == 1
            await a.send("writer", writer)
            await writer.wait_closed()
            assert server.connections == 0
            _, arrived = await b.recv()
            # A key travels only with a Connection or its socket: what asyncio took over is gone
            # from the books with the transport here, or counted there, but never twice.
            assert await server.get_connections() in (0, 1)
            arrived.close()
            assert await server.get_connections() == 0


# -- asyncio.Server ------------------------------------------------------------------------------


@both_dialects
async def test_asyncio_server(dialect: str) -> None:
    """With one socket it goes as a listener that both accept from, and stays the caller's."""
    met = Recorder()
    server = await asyncio.start_server(lambda _, writer: met(writer), "127.0.0.1", 0)
    address = server.sockets[0].getsockname()
    async with joined(dialect) as (a, b):
        await a.send("server", server)
        assert server.is_serving()
        _, shared = await b.recv()
        assert isinstance(shared, handleipc.Server)
        assert shared.sockname == address
        with socket.create_connection(address):
            ((writer,),) = await met.next()
            writer.close()
            await writer.wait_closed()
        server.close()
        await server.wait_closed()
        with socket.create_connection(address):
            (await anext(shared)).close()
        shared.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)


async def test_asyncio_server_with_two_sockets() -> None:
    """One handle is one socket: refused, and told to send each."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        server = await asyncio.start_server(lambda *_: None, ["127.0.0.1", "127.0.0.2"], 0)
        assert len(server.sockets) == 2
        async with joined("native") as (a, b):
            with pytest.raises(UnsupportedHandle, match="2 sockets"):
                await a.send("server", server)
            await a.send("plain", one)
            _, arrived = await b.recv()
            arrived.close()
        server.close()
        await server.wait_closed()


async def test_closed_asyncio_server() -> None:
    """A closed one listens on nothing, and is refused."""
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    server.close()
    await server.wait_closed()
    async with joined("native") as (a, _):
        with pytest.raises(UnsupportedHandle):
            await a.send("server", server)


@pytest.mark.parametrize("what", [asyncio.Event, asyncio.Queue, object, dict])
async def test_other_objects(what: type) -> None:
    """What is no handle is refused by name, and nothing is sent."""
    async with joined("native") as (a, b):
        with pytest.raises(UnsupportedHandle, match=f"a {what.__name__} is no handle"):
            await a.send("x", what())
        await a.send("next")
        assert await b.recv() == ("next", None)
