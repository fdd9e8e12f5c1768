"""``Connection``: the ways of using up a live connection."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import threading
import time
import warnings
from typing import Any

import pytest

import handleipc
from handleipc import DescriptorReleased
from handleipc.asyncio import lingering
from tests.asyncio.helpers import connection, is_open, turns, until
from tests.conftest import LOOPS


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


async def test_end_after_the_client_reset() -> None:
    """``end`` to a client that has reset raises ``OSError`` at most, and closes."""
    async with handleipc.listen("127.0.0.1", 0) as server:
        client = socket.create_connection(server.sockname)
        served = await anext(server)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
        try:
            await served.end(b"x")
        except ConnectionError:
            pass
        assert served.closed
        await until(lambda: server.connections == 0)


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
