"""``Connection``: the ways of using up a live connection."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import socket
import ssl
import struct
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

import handleipc
from handleipc import DescriptorReleased
from handleipc.asyncio import connection as connections
from handleipc.asyncio import lingering
from handleipc.asyncio.adoption import StandIn
from handleipc.handles.group import Group
from handleipc.wire.syscalls import descriptor_kind
from tests.asyncio.helpers import connection, is_open, turns, until
from tests.conftest import LOOPS
from tests.linger import ON, lingers


async def receive_all(client: socket.socket) -> bytes:
    """Read until EOF."""
    loop = asyncio.get_running_loop()
    client.setblocking(False)
    data = b""
    async with asyncio.timeout(10):
        while chunk := await loop.sock_recv(client, 65536):
            data += chunk
    return data


# -- looking -------------------------------------------------------------------------------------


async def test_peek() -> None:
    """``peek`` consumes nothing; ``BlockingIOError`` when empty, ``b""`` at EOF."""
    client, served = connection()
    with client, served:
        with pytest.raises(BlockingIOError):
            served.peek(10)
        client.send(b"request")
        assert served.peek(3) == b"req"
        assert served.peek(100) == b"request"
        assert served.peek(100) == b"request"
        client.shutdown(socket.SHUT_WR)
        reader, writer = await served.open()
        assert await reader.read() == b"request"
        writer.close()
        await writer.wait_closed()


async def test_peek_at_the_end() -> None:
    """``peek`` is ``b""`` when the client has sent FIN and nothing else."""
    client, served = connection()
    with served:
        client.close()
        assert served.peek(1) == b""


async def test_names() -> None:
    """``family``, ``peername`` and ``sockname`` are the socket's, for TCP over IPv4 and IPv6."""
    for host, family in (("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)):
        async with handleipc.listen(host, 0) as server:
            with socket.create_connection(server.sockname[:2]) as client:
                with await anext(server) as served:
                    assert served.family == family
                    assert served.peername == client.getsockname()
                    assert served.sockname == client.getpeername()
                    assert served.fileno() >= 0


async def test_names_of_a_unix_connection(tmp_path) -> None:
    """A Unix connection has the path as its ``sockname`` and an empty ``peername``."""
    path = str(tmp_path / "socket")
    async with handleipc.listen_unix(path) as server:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            with await anext(server) as served:
                assert served.family == socket.AF_UNIX
                assert served.sockname == path
                assert served.peername in ("", b"")


async def test_makes_nothing_until_asked() -> None:
    """A ``Connection`` owns one descriptor and makes no other."""
    before = len(os.listdir("/proc/self/fd"))
    client, served = connection()
    with client, served:
        assert served.peername is not None
        assert served.sockname is not None
        with pytest.raises(BlockingIOError):
            served.peek(1)
        assert len(os.listdir("/proc/self/fd")) == before + 2


# -- using up ------------------------------------------------------------------------------------


def nobody_lingers() -> bool:
    """Whether all connections that were answered are closed."""
    return not any(one._waiting for one in lingering._lingerers.values())


async def test_end() -> None:
    """``end`` writes everything, sends FIN, returns; the descriptor is closed after the EOF."""
    client, served = connection()
    with client:
        await served.end(b"answer")
        assert served.closed
        assert await receive_all(client) == b"answer"
        client.close()
    await until(nobody_lingers)


async def test_end_without_data() -> None:
    """``end()`` sends FIN alone."""
    client, served = connection()
    with client:
        await served.end()
        assert await receive_all(client) == b""
    await until(nobody_lingers)


async def test_end_of_much_data() -> None:
    """``end`` writes more than the kernel takes at once."""
    client, served = connection()
    data = os.urandom(3_000_000)
    with client:
        received, _ = await asyncio.gather(receive_all(client), served.end(data))
        assert received == data
    await until(nobody_lingers)


async def test_end_answers_a_client_that_still_sends() -> None:
    """The client gets the whole answer and no ECONNRESET, although nobody reads its request."""
    async with handleipc.listen("127.0.0.1", 0) as server:
        for _ in range(20):
            reader, writer = await asyncio.open_connection(*server.sockname)
            writer.write(b"GET / HTTP/1.0\r\n\r\n" + b"x" * 500_000)
            await (await anext(server)).end(b"answer")
            async with asyncio.timeout(10):
                assert await reader.read() == b"answer"
                await writer.drain()
            writer.close()
            await writer.wait_closed()
        async with asyncio.timeout(10):
            server.close()
            await server.wait_closed()


async def test_linger_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that never ends is closed after the linger time, however much it sends."""
    assert lingering.LINGER == 2.0
    monkeypatch.setattr(lingering, "LINGER", 0.1)
    client, served = connection()
    with client:
        start = time.monotonic()
        await served.end(b"answer")
        assert time.monotonic() - start < 0.09
        while is_writable(client):
            await asyncio.sleep(0.01)
        assert 0.05 < time.monotonic() - start < 5


@pytest.mark.parametrize("loop_factory", LOOPS.values(), ids=list(LOOPS))
def test_linger_ends_with_the_loop(loop_factory: Any) -> None:
    """Nobody waits for a client when the loop ends; nothing is left open, and nothing warned of."""
    client, served = connection()
    other, answered = connection()
    with client, other:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(served.end(b"answer"))
            runner.run(answered.end(b"answer"))
        assert not lingering._lingerers
        assert client.recv(10) == other.recv(10) == b"answer"
    assert served.closed


def is_writable(client: socket.socket) -> bool:
    client.setblocking(False)
    try:
        client.send(b"x")
    except BlockingIOError:
        return True
    except OSError:
        return False
    return True


@pytest.mark.parametrize("data", [b"", b"answer", bytes(8 << 20)], ids=["none", "small", "large"])
@pytest.mark.parametrize("looked", [False, True])
async def test_end_after_the_client_reset(data: bytes, looked: bool) -> None:
    """A client that has reset the connection can be told nothing: ``end`` returns, all is closed.

    The kernel says ECONNRESET to whoever asks first, and EPIPE to the others.
    """
    async with handleipc.listen("127.0.0.1", 0) as server:
        client = socket.create_connection(server.sockname)
        served = await anext(server)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        client.close()
        if looked:
            with pytest.raises(ConnectionResetError):
                served.peek(1)
        await served.end(data)
        assert served.closed
        await until(lambda: server.connections == 0)


async def test_end_while_the_client_resets() -> None:
    """So can one that resets while it is written to."""
    async with handleipc.listen("127.0.0.1", 0) as server:
        client = socket.create_connection(server.sockname)
        ending = asyncio.create_task((await anext(server)).end(bytes(32 << 20)))
        await turns()
        assert not ending.done()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        client.close()
        await ending
        await until(lambda: server.connections == 0)


GONE = ["EPIPE", "ECONNRESET", "ETIMEDOUT", "EHOSTUNREACH", "ENETUNREACH", "ECONNABORTED"]


@pytest.mark.parametrize("name", [*GONE, "EBADF", "ENOBUFS", "EIO", "EPERM"])
async def test_end_when_the_write_fails(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A client that is gone is no error, any other failure is; it is closed in any case."""
    error = OSError(getattr(errno, name), name)

    def fails(*_: object) -> int:
        raise error

    client, served = connection()
    with client:
        monkeypatch.setattr(connections, "end_stream", fails)
        if name in GONE:
            await served.end(b"answer")
        else:
            with pytest.raises(OSError, match=name):
                await served.end(b"answer")
        assert not is_open(client)


@pytest.mark.parametrize("data", ["text", 7, None])
async def test_end_of_no_bytes(data: Any) -> None:
    """A wrong argument is said before anything happens: the connection is as it was."""
    client, served = connection()
    with client:
        with pytest.raises(TypeError, match="bytes"):
            await served.end(data)
        await served.end(memoryview(b"answer"))
        assert await receive_all(client) == b"answer"
    await until(nobody_lingers)


RESET = struct.pack("ii", 1, 0)


async def test_cancelled_end_closes() -> None:
    """A cancelled ``end`` closes the connection."""
    client, served = connection()
    with client:
        ending = asyncio.create_task(served.end(b"x" * 5_000_000))
        await turns()
        ending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await ending
        while client.recv(1 << 20):
            pass


@pytest.mark.parametrize("head", [b"", b"head "])
async def test_open(head: bytes) -> None:
    """``open`` gives asyncio streams; ``head`` is read first."""
    client, served = connection(head=head)
    with client:
        client.send(b"body")
        reader, writer = await served.open()
        assert served.head == b""
        assert await reader.readexactly(len(head) + 4) == head + b"body"
        writer.write(b"answer")
        await writer.drain()
        assert client.recv(100) == b"answer"
        writer.close()
        await writer.wait_closed()


# -- what whoever handed it over has set ---------------------------------------------------------


@contextlib.contextmanager
def handed_over(**options: Any) -> Iterator[tuple[socket.socket, handleipc.Connection, Any]]:
    """A TCP client, the connection of it, and the copy of whoever handed that over."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname(), timeout=10)
        accepted, _ = listener.accept()
    with client, accepted, accepted.dup() as copy:
        accepted.setblocking(False)
        kind = descriptor_kind(accepted.fileno())
        yield client, handleipc.Connection(accepted.detach(), kind, **options), copy


async def test_end_of_a_blocking_connection() -> None:
    """The sender's copy, made blocking again, does not hold the loop up."""
    data = os.urandom(8 << 20)
    with handed_over() as (client, served, copy):
        copy.setblocking(True)
        ending = asyncio.create_task(served.end(data))
        await turns()  # would not come back
        copy.close()
        assert await receive_all(client) == data
        await ending
    await until(nobody_lingers)


async def test_write_to_a_blocking_connection(event_loop_name: str) -> None:
    """Nor does it hold up a transport of asyncio's; libuv writes itself."""
    if event_loop_name == "uvloop":
        pytest.skip("cannot be helped")
    data = os.urandom(8 << 20)
    with handed_over() as (client, served, copy):
        reader, writer = await served.open()
        copy.setblocking(True)
        client.sendall(b"x")
        assert await reader.readexactly(1) == b"x"
        writer.write(data)  # would not come back
        writer.close()
        copy.close()
        assert await receive_all(client) == data
        await writer.wait_closed()


@pytest.mark.parametrize("use", ["close", "end", "socket", "open", "drop"])
@pytest.mark.filterwarnings("ignore:unclosed")
async def test_no_close_lingers(use: str) -> None:
    """However it is used up, the SO_LINGER that its sender has set does not hold a close up."""
    with handed_over() as (client, served, copy):
        copy.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ON)
        if use == "close":
            served.close()
        elif use == "end":
            await served.end(b"answer")
            client.close()
            await until(nobody_lingers)
        elif use == "socket":
            served.socket().close()
        elif use == "open":
            _, writer = await served.open()
            writer.close()
            await writer.wait_closed()
        del served
        assert not lingers(copy)


async def test_no_transport_lingers(event_loop_name: str) -> None:
    """Nor does what is set once a transport of asyncio's has it; libuv closes itself."""
    if event_loop_name == "uvloop":
        pytest.skip("cannot be helped")
    with handed_over() as (_, served, copy):
        _, writer = await served.open()
        copy.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ON)
        writer.close()
        await writer.wait_closed()
        assert not lingers(copy)


# -- taking over ---------------------------------------------------------------------------------


class Collector(asyncio.Protocol):
    def __init__(self) -> None:
        self.events: list[Any] = []

    def connection_made(self, transport: Any) -> None:
        self.events.append("made")

    def data_received(self, data: bytes) -> None:
        self.events.append(data)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.events.append("lost")


class BufferedCollector(asyncio.BufferedProtocol):
    def __init__(self) -> None:
        self.events: list[Any] = []
        self._buffer = bytearray(4)

    def connection_made(self, transport: Any) -> None:
        self.events.append("made")

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.events.append(bytes(self._buffer[:nbytes]))

    def connection_lost(self, exc: BaseException | None) -> None:
        self.events.append("lost")


@pytest.mark.parametrize("factory", [Collector, BufferedCollector])
async def test_start(factory: Any) -> None:
    """``start`` takes the connection over with a protocol, which receives ``head`` first."""
    client, served = connection(head=b"early")
    with client:
        client.send(b"late")
        transport, protocol = await served.start(factory)
        await until(lambda: b"".join(protocol.events[1:]) == b"earlylate")
        assert protocol.events[0] == "made"
        transport.close()
        await until(lambda: protocol.events[-1] == "lost")
        assert not is_open(client)


def slotted(base: type) -> type:
    """Return a protocol whose methods cannot be replaced, as aiohttp's and others are."""

    class Slotted(base):  # type: ignore[misc]
        __slots__ = ("_buffer", "events")

        def __init__(self) -> None:
            self.events: list[Any] = []
            self._buffer = bytearray(4)

        connection_made = Collector.connection_made
        connection_lost = Collector.connection_lost
        data_received = Collector.data_received
        get_buffer = BufferedCollector.get_buffer
        buffer_updated = BufferedCollector.buffer_updated

    return Slotted


@pytest.mark.parametrize("base", [asyncio.Protocol, asyncio.BufferedProtocol])
async def test_start_with_slots(base: type) -> None:
    """A protocol with ``__slots__`` gets ``head`` as well."""
    client, served = connection(head=b"early")
    with client:
        client.send(b"late")
        transport, protocol = await served.start(slotted(base))
        assert not hasattr(protocol, "__dict__")
        await until(lambda: b"".join(protocol.events[1:]) == b"earlylate")
        transport.close()
        await until(lambda: protocol.events[-1] == "lost")


class Failing(Collector):
    """Raises in one of its methods."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        if where == "factory":
            raise LookupError(where)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if self.where == "connection_made":
            raise LookupError(self.where)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.where == "data_received":
            raise LookupError(self.where)


@pytest.mark.parametrize("where", ["factory", "connection_made", "data_received"])
@pytest.mark.parametrize("grouped", [False, True])
async def test_start_that_fails(where: str, grouped: bool) -> None:
    """The connection is as it was, ``head`` and what came meanwhile included, and counted once."""
    group = Group("k") if grouped else None
    if group is not None:
        group.opened_here()
    client, served = connection(head=b"head ", group=group)
    protocols: list[Failing] = []
    with client:
        client.send(b"body ")

        def build() -> Failing:
            protocols.append(Failing(where))
            return protocols[0]

        with pytest.raises(LookupError, match=where):
            await served.start(build)
        if protocols:
            await until(lambda: protocols[0].events[-1] == "lost")
        assert not served.closed
        assert served._group is group
        assert group is None or group.local == 1
        client.send(b"more")
        reader, writer = await served.open()
        assert await reader.readexactly(14) == b"head body more"
        writer.write(b"answer")
        assert client.recv(100) == b"answer"
        writer.close()
        await writer.wait_closed()
        assert group is None or group.local == 0


async def test_start_that_is_cancelled() -> None:
    """Cancelled at any moment it is either taken over, or as it was."""
    for count in range(1, 6):
        client, served = connection(head=b"head ")
        with client:
            client.send(b"body")
            starting = asyncio.create_task(served.start(Collector))
            await turns(count)
            starting.cancel()
            try:
                transport, protocol = await starting
            except asyncio.CancelledError:
                assert not served.closed
                reader, writer = await served.open()
                assert await reader.readexactly(9) == b"head body"
                writer.close()
                await writer.wait_closed()
            else:
                await until(lambda: b"".join(protocol.events[1:]) == b"head body")
                transport.close()
                await until(lambda: protocol.events[-1] == "lost")


async def test_start_where_the_loop_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that takes no transport leaves the connection alone."""

    async def refuse(*_: object) -> None:
        raise RuntimeError("no more transports")

    class Loop:
        connect_accepted_socket = staticmethod(refuse)

    client, served = connection(head=b"head")
    with client:
        with monkeypatch.context() as patch:
            patch.setattr(asyncio, "get_running_loop", Loop)
            with pytest.raises(RuntimeError, match="no more"):
                await served.start(Collector)
        assert served.head == b"head"
        assert served._take_head() == b"head"
        served.socket().close()
        assert not is_open(client)


async def test_start_without_a_free_descriptor(descriptor_limit: Any) -> None:
    """It works with a full table too; then a failure closes the connection."""
    for failing in (False, True):
        client, served = connection(head=b"head")
        with client:
            probe = os.dup(client.fileno())
            os.close(probe)
            descriptor_limit(probe)
            try:
                if failing:
                    with pytest.raises(LookupError):
                        await served.start(lambda: Failing("connection_made"))
                    assert served.closed
                    await turns()
                else:
                    transport, protocol = await served.start(Collector)
                    assert protocol.events[:2] == ["made", b"head"]
                    transport.abort()
                    await until(lambda: protocol.events[-1] == "lost")
            finally:
                descriptor_limit(1024)
            assert not is_open(client)


class Ending(Collector):
    """Notes the client's FIN too, and says whether it wants to go on."""

    def __init__(self, go_on: bool) -> None:
        super().__init__()
        self.go_on = go_on

    def eof_received(self) -> bool:
        self.events.append("eof")
        return self.go_on


@pytest.mark.parametrize("go_on", [False, True])
async def test_start_after_fin(go_on: bool) -> None:
    """All of a client that has sent and finished is told in its order, on every loop."""
    client, served = connection(head=b"head")
    with client:
        client.send(b" body")
        client.shutdown(socket.SHUT_WR)
        transport, protocol = await served.start(lambda: Ending(go_on))
        await until(lambda: "eof" in protocol.events)
        assert b"".join(e for e in protocol.events if isinstance(e, bytes)) == b"head body"
        assert (protocol.events[0], protocol.events[-1]) == ("made", "eof") or not go_on
        if go_on:
            cast(Any, transport).write(b"answer")
            assert client.recv(10) == b"answer"
            transport.close()
        await until(lambda: protocol.events[-1] == "lost")
        assert protocol.events.count("lost") == 1


async def test_start_after_reset() -> None:
    """A client that has reset is told as asyncio tells it: made, then lost."""
    async with handleipc.listen("127.0.0.1", 0) as server:
        client = socket.create_connection(server.sockname)
        served = await anext(server)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        client.close()
        _, protocol = await served.start(Collector)
        await until(lambda: protocol.events == ["made", "lost"])


def test_stand_in_replays_everything() -> None:
    """What came before the protocol is told it, also where a loop reads before it can be asked."""

    class Transport:
        protocol: Any = None
        closed = False

        def set_protocol(self, protocol: Any) -> None:
            self.protocol = protocol

        def get_protocol(self) -> Any:
            return self.protocol

        def is_closing(self) -> bool:
            return self.closed

        def close(self) -> None:
            self.closed = True

    async def run(lost: bool) -> list[Any]:
        transport: Any = Transport()
        stand_in = StandIn(b"head ")
        stand_in.connection_made(transport)
        stand_in.data_received(b"body")
        assert stand_in.eof_received()
        if lost:
            transport.closed = True
            stand_in.connection_lost(ConnectionResetError())
        protocol = Ending(go_on=False)
        stand_in.give_way(protocol)
        assert transport.closed
        await turns(2)
        return protocol.events

    assert asyncio.run(run(lost=False)) == ["made", b"head body", "eof"]
    assert asyncio.run(run(lost=True)) == ["made", b"head body", "eof", "lost"]


async def test_start_with_a_protocol_that_closes() -> None:
    """A protocol that does not want the connection gets nothing of it."""

    class Closing(Collector):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.close()

    client, served = connection(head=b"head")
    with client:
        _, protocol = await served.start(Closing)
        await until(lambda: protocol.events == ["made", "lost"])
        assert not is_open(client)


async def test_start_with_a_protocol_that_steps_aside() -> None:
    """A protocol that puts another in its place leaves ``head`` to that one."""
    other = Collector()

    class First(Collector):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.set_protocol(other)

    client, served = connection(head=b"head")
    with client:
        transport, protocol = await served.start(First)
        assert (protocol.events, other.events) == (["made"], [b"head"])
        transport.close()
        await until(lambda: other.events[-1] == "lost")


async def test_start_with_a_protocol_that_pauses(event_loop_name: str) -> None:
    """On asyncio, of whichever version, a protocol that pauses at once has read nothing."""
    if event_loop_name == "uvloop":
        pytest.skip("reads before it can be paused")

    class Pausing(Collector):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.pause_reading()

    client, served = connection()
    with client:
        client.send(b"data")
        transport, protocol = await served.start(Pausing)
        await turns()
        assert protocol.events == ["made"]
        transport.resume_reading()
        await until(lambda: protocol.events == ["made", b"data"])
        transport.close()
        await until(lambda: protocol.events[-1] == "lost")


async def test_buffer_of_nothing() -> None:
    """A protocol that gives no room for its bytes is told so, as by asyncio."""

    class NoRoom(BufferedCollector):
        def get_buffer(self, sizehint: int) -> bytearray:
            return bytearray()

    client, served = connection(head=b"head")
    with client:
        with pytest.raises(RuntimeError, match="empty buffer"):
            await served.start(NoRoom)
        assert served.head == b"head"
        served.close()


# -- TLS -----------------------------------------------------------------------------------------


def context_of(certificate: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return the contexts of a server with this certificate, and of a client that trusts it."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    trusting = ssl.create_default_context(cafile=str(certificate))
    trusting.check_hostname = False
    return context, trusting


def talk(client: socket.socket, trusting: ssl.SSLContext) -> bytes:
    """Be a TLS client: send a request, and return the answer."""
    with trusting.wrap_socket(client, suppress_ragged_eofs=True) as encrypted:
        encrypted.sendall(b"secret")
        return encrypted.recv(100)


@pytest.mark.parametrize("read", [0, 1, 5, 100, 100_000])
async def test_open_with_tls(certificate: Path, read: int) -> None:
    """The handshake is the server's; what was read of it before is taken first."""
    context, trusting = context_of(certificate)
    loop = asyncio.get_running_loop()
    with handed_over() as (client, served, copy):
        talking = loop.run_in_executor(None, talk, client, trusting)
        if read:
            copy.settimeout(10)
            served._head = await loop.run_in_executor(None, copy.recv, read)
        copy.close()
        reader, writer = await served.open(ssl=context)
        assert writer.get_extra_info("ssl_object").server_side
        assert await reader.readexactly(6) == b"secret"
        writer.write(b"answer")
        assert await talking == b"answer"
        writer.close()
        with contextlib.suppress(ssl.SSLError, ConnectionError):
            await writer.wait_closed()


@pytest.mark.parametrize("factory", [Collector, BufferedCollector])
async def test_start_with_tls(certificate: Path, factory: Any) -> None:
    """A protocol is connected once the handshake is done, and gets what is encrypted in it."""
    context, trusting = context_of(certificate)
    loop = asyncio.get_running_loop()
    with handed_over() as (client, served, copy):
        copy.close()
        talking = loop.run_in_executor(None, talk, client, trusting)
        transport, protocol = await served.start(
            factory, ssl=context, ssl_handshake_timeout=10, ssl_shutdown_timeout=1
        )
        assert transport.get_extra_info("ssl_object").version().startswith("TLS")
        await until(lambda: b"".join(protocol.events[1:]) == b"secret")
        transport.write(b"answer")
        assert await talking == b"answer"
        transport.close()
        await until(lambda: protocol.events[-1] == "lost")


async def test_open_then_start_tls(certificate: Path) -> None:
    """The streams of ``open`` are a server's: ``start_tls`` waits for the client's handshake."""
    context, trusting = context_of(certificate)
    loop = asyncio.get_running_loop()
    with handed_over() as (client, served, copy):
        copy.close()
        reader, writer = await served.open()
        client.sendall(b"STARTTLS")
        assert await reader.readexactly(8) == b"STARTTLS"
        talking = loop.run_in_executor(None, talk, client, trusting)
        await writer.start_tls(context)
        assert await reader.readexactly(6) == b"secret"
        writer.write(b"answer")
        assert await talking == b"answer"
        writer.close()
        with contextlib.suppress(ssl.SSLError, ConnectionError):
            await writer.wait_closed()


@pytest.mark.parametrize("head", [b"", b"GET / HTTP/1.0\r\n\r\n"])
async def test_handshake_that_fails(certificate: Path, head: bytes) -> None:
    """A client that speaks something else is an ``OSError``, and the connection is used up."""
    context, _ = context_of(certificate)
    protocol = Collector()
    with handed_over(head=head) as (client, served, copy):
        copy.close()
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        with pytest.raises(OSError):
            await served.start(lambda: protocol, ssl=context)
        assert served.closed
        assert protocol.events == []
        await until(lambda: not is_open_or_reset(client))


async def test_handshake_of_a_client_that_leaves(certificate: Path) -> None:
    """So is one that goes away, or sends nothing for too long."""
    context, _ = context_of(certificate)
    for leaves in (True, False):
        with handed_over() as (client, served, copy):
            copy.close()
            if leaves:
                client.close()
            with pytest.raises(OSError):
                await served.open(ssl=context, ssl_handshake_timeout=5 if leaves else 0.05)
            assert served.closed


def is_open_or_reset(client: socket.socket) -> bool:
    """Say whether the other end is there still."""
    try:
        return bool(client.recv(1 << 16, socket.MSG_DONTWAIT)) or False
    except BlockingIOError:
        return True
    except ConnectionError:
        return False


async def test_tls_that_cannot_be(certificate: Path) -> None:
    """What is wrong with the arguments is said before anything is taken."""
    context, trusting = context_of(certificate)
    client, served = connection(head=b"head")
    with client:
        for options, error in (
            ({"ssl": True}, TypeError),
            ({"ssl": trusting}, ssl.SSLError),
            ({"ssl": context, "ssl_handshake_timeout": 0}, ValueError),
            ({"ssl": context, "ssl_shutdown_timeout": -1}, ValueError),
            ({"ssl_handshake_timeout": 1}, ValueError),
            ({"ssl_shutdown_timeout": 1}, ValueError),
        ):
            with pytest.raises(error):
                await served.open(**options)
            assert served.head == b"head"
        served.close()


async def test_from_socket() -> None:
    """A server of the standard library's hands its connections on as well."""
    ours, client = socket.socketpair()
    with client:
        served = handleipc.Connection.from_socket(ours)
        assert (type(served), ours.fileno()) == (handleipc.Connection, -1)
        client.settimeout(10)
        await served.end(b"answer")
        assert client.recv(10) == b"answer"
    await until(nobody_lingers)


async def test_socket() -> None:
    """``socket`` gives a non-blocking ``socket.socket`` that owns the descriptor."""
    client, served = connection()
    with client, served.socket() as sock:
        assert served.closed
        assert sock.gettimeout() == 0
        client.send(b"x")
        assert sock.recv(10) == b"x"


async def test_detach() -> None:
    """``detach`` gives the descriptor away."""
    client, served = connection()
    with client:
        fd = served.detach()
        client.send(b"x")
        assert os.read(fd, 10) == b"x"
        os.close(fd)


@pytest.mark.parametrize("use", ["socket", "detach"])
async def test_unread_head_is_not_lost(use: str) -> None:
    """``socket`` and ``detach`` raise until the bytes in ``head`` are taken."""
    client, served = connection(head=b"head")
    with client:
        with pytest.raises(DescriptorReleased, match="4 bytes"):
            getattr(served, use)()
        assert served.head == b"head"
        served.close()


USES = {
    "fileno": lambda c: c.fileno(),
    "peername": lambda c: c.peername,
    "sockname": lambda c: c.sockname,
    "peek": lambda c: c.peek(1),
    "socket": lambda c: c.socket(),
    "detach": lambda c: c.detach(),
    "open": lambda c: c.open(),
    "start": lambda c: c.start(Collector),
    "end": lambda c: c.end(b"x"),
}


@pytest.mark.parametrize("use", USES)
async def test_use_after_the_end(use: str) -> None:
    """A closed ``Connection`` raises ``DescriptorReleased`` whatever is asked of it."""
    client, served = connection()
    with client:
        served.close()
        served.close()
        with pytest.raises(DescriptorReleased):
            result = USES[use](served)
            if asyncio.iscoroutine(result):
                await result


async def test_dropped_connection_warns_and_closes() -> None:
    """A ``Connection`` that is dropped warns with ``ResourceWarning`` and is closed."""
    client, served = connection()
    with client:
        with pytest.warns(ResourceWarning, match="Connection"):
            del served
        assert not is_open(client)


async def test_linger_when_every_task_is_cancelled() -> None:
    """The task that ends the waiting, cancelled before it began, leaves nothing behind."""
    client, served = connection()
    with client:
        await served.end(b"answer")
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await until(nobody_lingers)
        assert asyncio.get_running_loop() not in lingering._lingerers
        client.settimeout(10)
        assert client.recv(100) == b"answer"
        assert client.recv(100) == b""
    client, served = connection()
    with client:
        await served.end(b"answer")
        assert not nobody_lingers()
    await until(nobody_lingers)


async def test_linger_of_a_loop_that_was_closed() -> None:
    """Without asyncio.run nobody cancels its task: the next one to linger closes its sockets."""
    client, served = connection()
    with client:

        def run() -> None:
            loop = asyncio.new_event_loop()
            loop.run_until_complete(served.end(b"answer"))
            loop.close()

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
            closed = next(loop for loop in lingering._lingerers if loop.is_closed())
            lingering._lingerers[closed]._task._log_destroy_pending = False  # type: ignore[attr-defined]
            del closed
            other, second = connection()
            with other:
                await second.end(b"answer")
            await until(nobody_lingers)
            assert client.recv(100) == b"answer"
            gc.collect()
