"""What can be handed over, as what it arrives, and whose the sender's copy is."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any

import pytest

import handleipc
from handleipc import (
    Connection,
    Conversion,
    FileDescriptor,
    HandleNotDelivered,
    Native,
    Server,
    UnsupportedHandle,
)
from handleipc.asyncio.registry import default_registry
from tests.asyncio.helpers import (
    ACK,
    Recorder,
    both_dialects,
    clean_registry,
    clients,
    connection,
    is_open,
    joined,
    raw_peer,
    turns,
    works,
)


async def hand_over(a: Any, b: Any, handle: Any, **options: Any) -> Any:
    """Send a handle, take it at the other end, wait for the acknowledgement."""
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        receiving = group.create_task(b.recv())
        await a.send("handle", handle, **options)
    message, received = receiving.result()
    assert message == "handle"
    return received


# -- connections ---------------------------------------------------------------------------------


@both_dialects
async def test_connection(dialect: str) -> None:
    """A ``Connection`` arrives as one, close-on-exec and non-blocking; the copy is closed."""
    async with joined(dialect) as (a, b), handleipc.listen("127.0.0.1", 0) as server:
        client = socket.create_connection(server.sockname)
        with client:
            served = await anext(server)
            received = await hand_over(a, b, served)
            assert isinstance(received, Connection)
            assert served.closed
            assert received.peername == client.getsockname()
            assert received.sockname == client.getpeername()
            assert not os.get_inheritable(received.fileno())
            assert not os.get_blocking(received.fileno())
            await received.end(b"answer")
            client.settimeout(5)
            loop = asyncio.get_running_loop()
            assert await loop.run_in_executor(None, client.recv, 100) == b"answer"


@both_dialects
@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_connected_socket(dialect: str, kind: str) -> None:
    """A connected ``socket.socket`` arrives as a ``Connection``; it is closed at the ack."""
    async with joined(dialect) as (a, b):
        if kind == "tcp":
            with socket.create_server(("127.0.0.1", 0)) as listener:
                client = socket.create_connection(listener.getsockname())
                sock, _ = listener.accept()
        else:
            client, sock = socket.socketpair()
        with client:
            received = await hand_over(a, b, sock)
            assert isinstance(received, Connection)
            assert sock.fileno() == -1
            assert received.family == (socket.AF_INET if kind == "tcp" else socket.AF_UNIX)
            assert works(client, received)
            received.close()
            assert not is_open(client)


@both_dialects
async def test_connected_socket_kept_open(dialect: str) -> None:
    """With ``keep_open`` a connected socket stays open here."""
    async with joined(dialect) as (a, b):
        client, sock = socket.socketpair()
        with client, sock:
            received = await hand_over(a, b, sock, keep_open=True)
            assert works(client, sock)
            assert works(client, received)
            received.close()


@both_dialects
async def test_stream_writer(dialect: str) -> None:
    """An asyncio ``StreamWriter`` nobody has read from travels as its connection."""
    async with joined(dialect) as (a, b):
        client, sock = socket.socketpair()
        with client:
            _, writer = await asyncio.open_unix_connection(sock=sock)
            writer.transport.pause_reading()
            try:
                received = await hand_over(a, b, writer)
                assert isinstance(received, Connection)
                assert works(client, received)
                received.close()
            finally:
                writer.close()
            await turns()
            assert not is_open(client)


@both_dialects
async def test_paused_transport(dialect: str, event_loop_name: str) -> None:
    """A transport whose reading was paused since accept travels as its connection."""
    async with joined(dialect) as (a, b):

        class Paused(asyncio.Protocol):
            def connection_made(self, transport: Any) -> None:
                transport.pause_reading()

        client, served = connection()
        with client:
            transport, _ = await served.start(Paused)
            try:
                if event_loop_name == "uvloop":  # forgets a pause within connection_made
                    with pytest.raises(UnsupportedHandle, match="reading"):
                        a.send_nowait("x", transport)
                    return
                received = await hand_over(a, b, transport)
                assert works(client, received)
                received.close()
            finally:
                transport.close()
                await turns()


async def test_unread_bytes_travel_natively() -> None:
    """Native: bytes already read travel with the connection, and are read first."""
    async with joined("native") as (a, b):
        client, served = connection(head=b"early ")
        with client:
            received = await hand_over(a, b, served)
            client.send(b"late")
            assert received.head == b"early "
            reader, writer = await received.open()
            assert await reader.readexactly(10) == b"early late"
            writer.close()
            await writer.wait_closed()


async def test_unread_bytes_are_refused_towards_node() -> None:
    """Node dialect: a connection some of whose bytes were read is refused, and usable."""
    async with joined("node") as (a, _):
        client, served = connection(head=b"early ")
        with client, served:
            with pytest.raises(UnsupportedHandle):
                a.send_nowait("x", served)
            assert served.head == b"early "
            assert works(client, served)


# -- shared kinds --------------------------------------------------------------------------------


async def answer(server: Any) -> bytes:
    """Connect to a server and return what the accepting end says."""
    reader, writer = await asyncio.open_connection(*server.sockname[:2])
    try:
        return await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()
        await writer.wait_closed()


@both_dialects
async def test_server_is_shared(dialect: str) -> None:
    """A ``Server`` arrives as a ``Server``, stays open here, and both ends accept."""
    async with joined(dialect) as (a, b), handleipc.listen("127.0.0.1", 0) as server:
        shared = await hand_over(a, b, server)
        assert isinstance(shared, Server)
        assert not server.closed
        assert shared.sockname == server.sockname
        asking = asyncio.create_task(answer(server))
        await (await anext(shared)).end(b"hi")
        assert await asking == b"hi"
        shared.close()
        asking = asyncio.create_task(answer(server))
        await (await anext(server)).end(b"still here")
        assert await asking == b"still here"


@both_dialects
async def test_shared_server_outlives_the_sender(dialect: str) -> None:
    """Closing the sender's server does not stop the receiver's."""
    async with joined(dialect) as (a, b):
        server = await handleipc.listen("127.0.0.1", 0)
        shared = await hand_over(a, b, server)
        server.close()
        async with shared:
            asking = asyncio.create_task(answer(shared))
            await (await anext(shared)).end(b"hi")
            assert await asking == b"hi"


@both_dialects
async def test_listening_socket(dialect: str) -> None:
    """A listening ``socket.socket`` arrives as a ``Server`` and stays open here."""
    async with joined(dialect) as (a, b):
        with socket.create_server(("127.0.0.1", 0)) as sock:
            shared = await hand_over(a, b, sock)
            async with shared:
                assert isinstance(shared, Server)
                assert sock.fileno() >= 0
                assert shared.sockname == sock.getsockname()


@both_dialects
async def test_asyncio_server(dialect: str) -> None:
    """An ``asyncio.Server`` with one socket arrives as a ``Server``."""
    async with joined(dialect) as (a, b):
        server = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0)
        async with server:
            shared = await hand_over(a, b, server)
            assert isinstance(shared, Server)
            shared.close()


@both_dialects
async def test_closed_server_is_refused(dialect: str) -> None:
    """A closed ``Server`` is refused synchronously."""
    async with joined(dialect) as (a, _):
        server = await handleipc.listen("127.0.0.1", 0)
        server.close()
        with pytest.raises(UnsupportedHandle, match="closed"):
            a.send_nowait("x", server)


@both_dialects
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
async def test_udp_socket(dialect: str, family: int) -> None:
    """A bound UDP socket arrives as a non-blocking ``socket.socket``; both ends may receive."""
    host = "127.0.0.1" if family == socket.AF_INET else "::1"
    async with joined(dialect) as (a, b):
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.bind((host, 0))
            received = await hand_over(a, b, sock)
            with received, socket.socket(family, socket.SOCK_DGRAM) as sender:
                assert isinstance(received, socket.socket)
                assert received.gettimeout() == 0
                assert not received.get_inheritable()
                assert received.getsockname() == sock.getsockname()
                sender.sendto(b"one", sock.getsockname())
                assert received.recv(10) == b"one"
                sender.sendto(b"two", sock.getsockname())
                assert sock.recv(10) == b"two"


# -- raw kinds -----------------------------------------------------------------------------------


@both_dialects
@pytest.mark.parametrize("kind", ["tcp", "listening", "unix", "udp"])
async def test_native_socket(dialect: str, kind: str) -> None:
    """``Native(socket)`` arrives as a ``socket.socket``; the wrapped one stays the caller's."""
    async with joined(dialect) as (a, b):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            other = socket.create_connection(listener.getsockname())
            accepted, _ = listener.accept()
            unix, other_unix = socket.socketpair()
            with accepted, other, unix, other_unix, socket.socket(type=socket.SOCK_DGRAM) as udp:
                udp.bind(("127.0.0.1", 0))
                sock = {"tcp": accepted, "listening": listener, "unix": unix, "udp": udp}[kind]
                received = await hand_over(a, b, Native(sock))
                with received:
                    assert isinstance(received, socket.socket)
                    assert received.gettimeout() == 0
                    assert received.getsockname() == sock.getsockname()
                    assert received.type == sock.type
                assert sock.fileno() >= 0


@both_dialects
async def test_native_fifo(dialect: str) -> None:
    """``Native(pipe)`` arrives as a ``FileDescriptor``."""
    async with joined(dialect) as (a, b):
        read, write = os.pipe()
        with FileDescriptor(read) as pipe, FileDescriptor(write):
            received = await hand_over(a, b, Native(pipe))
            with received:
                assert isinstance(received, FileDescriptor)
                os.write(write, b"x")
                assert os.read(received.fileno(), 10) == b"x"
                assert not os.get_inheritable(received.fileno())
            assert pipe.fileno() == read


@both_dialects
async def test_native_of_what_makes_node_abort(dialect: str, tmp_path) -> None:
    """``Native`` of a file, a device or an epoll is refused synchronously."""
    async with joined(dialect) as (a, _):
        with open(tmp_path / "file", "w") as file, open(os.devnull) as device:
            for source in (file, device):
                with pytest.raises(UnsupportedHandle):
                    a.send_nowait("x", Native(source))


# -- our own kinds -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "pipe", "memfd", "eventfd"])
async def test_file_descriptor(kind: str, tmp_path) -> None:
    """Native: any descriptor travels as ``FileDescriptor``, and is closed here at the ack."""
    path = tmp_path / "file"
    path.write_text("content")
    write = -1
    if kind == "file":
        fd = os.open(path, os.O_RDONLY)
    elif kind == "pipe":
        fd, write = os.pipe()
    else:
        fd = os.memfd_create("x") if kind == "memfd" else os.eventfd(0)
    async with joined("native") as (a, b):
        handle = FileDescriptor(fd)
        what = os.fstat(fd)
        received = await hand_over(a, b, handle)
        with received:
            assert isinstance(received, FileDescriptor)
            assert handle.closed
            same = os.fstat(received.fileno())
            assert (same.st_dev, same.st_ino) == (what.st_dev, what.st_ino)
            assert not os.get_inheritable(received.fileno())
        if write >= 0:
            with pytest.raises(BrokenPipeError):
                os.write(write, b"x")  # nobody holds the reading end any more
            os.close(write)


async def test_file_descriptor_kept_open() -> None:
    """``keep_open`` of a ``FileDescriptor`` leaves it the caller's."""
    async with joined("native") as (a, b):
        with FileDescriptor(os.eventfd(0)) as handle:
            received = await hand_over(a, b, handle, keep_open=True)
            os.eventfd_write(received.fileno(), 7)
            received.close()
            assert os.eventfd_read(handle.fileno()) == 7


async def test_file_descriptor_towards_node() -> None:
    """A ``FileDescriptor`` is refused synchronously when the peer is known to speak node."""
    async with joined("node") as (a, _):
        with FileDescriptor(os.eventfd(0)) as handle:
            for send in (a.send_nowait, a.send):
                with pytest.raises(UnsupportedHandle, match="node"):
                    result = send("x", handle)
                    if result is not None:
                        await result
            assert handle.fileno() >= 0


async def test_file_descriptor_towards_a_child_that_turns_out_to_speak_node() -> None:
    """Sent before the child's first line, it fails alone when that line is no switch."""
    async with raw_peer("invited") as (a, peer):
        undelivered = a.on("undelivered", Recorder())
        with FileDescriptor(os.eventfd(0)) as one, FileDescriptor(os.eventfd(0)) as two:
            a.send_nowait("before")
            a.send_nowait("early", one)
            sending = asyncio.create_task(a.send("early too", two))
            a.send_nowait("behind")
            assert await peer.line() == "before"
            await turns()
            assert peer.unread() == b""
            peer.write("I speak node")
            with pytest.raises(HandleNotDelivered, match="node"):
                await sending
            ((message, handle, reason),) = await undelivered.next()
            assert (message, handle) == ("early", one)
            assert "node" in reason
            assert one.fileno() >= 0
            assert await peer.line() == "behind"
            assert a.dialect == "node"
            with pytest.raises(UnsupportedHandle):
                a.send_nowait("late", one)


async def test_handle_sent_before_the_switch() -> None:
    """Handles sent before the switch get node acknowledgements, and the order is kept."""
    async with raw_peer("invited") as (a, peer):
        with clients(2) as (_, served):
            a.send_nowait("first", served[0])
            a.send_nowait("plain")
            a.send_nowait("second", served[1])
            assert (await peer.line())["cmd"] == "NODE_HANDLE"
            peer.write(
                {"cmd": "NODE_HANDLEIPC", "native": 2, "ack": 0, "descriptors": 9, "bytes": 999}
            )
            peer.write(ACK)
            assert (await peer.line(control=True))["native"] == 2
            lines = [await peer.line() for _ in range(3)]
            assert sorted(map(str, lines)) == sorted(
                map(str, ([1, 1], [0, "plain"], [2, 1, 1, "net.Socket", "second"]))
            )
            peer.write({"cmd": "NODE_HANDLEIPC", "ack": 1, "descriptors": 9, "bytes": 999})
            await a.flush()
            assert a.dialect == "native"


# -- registered kinds ----------------------------------------------------------------------------


class Pair:
    """Two descriptors and a name."""

    def __init__(self, name: str, fds: list[FileDescriptor]) -> None:
        self.name = name
        self.fds = fds

    def close(self) -> None:
        for fd in self.fds:
            fd.close()


class PairConversion:
    tag = "tests.Pair"

    def to_wire(self, obj: Pair) -> tuple[Any, list[int]]:
        return {"name": obj.name}, [fd.fileno() for fd in obj.fds]

    def from_wire(self, details: Any, fds: list[FileDescriptor]) -> Pair:
        if details["name"] == "bad":
            raise RuntimeError("from_wire failed")
        return Pair(details["name"], fds)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch):
    """A clean registry in which ``Pair`` is known."""
    clean_registry(monkeypatch)
    conversion: Conversion[Pair] = PairConversion()
    handleipc.register(Pair, conversion)


def _pair(name: str) -> Pair:
    return Pair(name, [FileDescriptor(os.eventfd(1)), FileDescriptor(os.eventfd(2))])


@pytest.mark.usefixtures("registered")
async def test_registered_kind() -> None:
    """A registered kind arrives by its conversion with all its descriptors, in their order."""
    async with joined("native") as (a, b):
        pair = _pair("good")
        received = await hand_over(a, b, pair)
        assert isinstance(received, Pair)
        assert received.name == "good"
        assert [os.eventfd_read(fd.fileno()) for fd in received.fds] == [1, 2]
        received.close()
        assert all(fd.closed for fd in pair.fds)


@pytest.mark.usefixtures("registered")
async def test_subclass_of_a_registered_kind() -> None:
    """A subclass travels by the conversion of its base."""

    class Special(Pair):
        pass

    async with joined("native") as (a, b):
        received = await hand_over(a, b, Special("x", [FileDescriptor(os.eventfd(5))]))
        assert type(received) is Pair
        assert os.eventfd_read(received.fds[0].fileno()) == 5
        received.close()


@pytest.mark.usefixtures("registered")
async def test_registered_kind_kept_open() -> None:
    """``keep_open`` holds for registered kinds."""
    async with joined("native") as (a, b):
        pair = _pair("kept")
        received = await hand_over(a, b, pair, keep_open=True)
        received.close()
        assert not any(fd.closed for fd in pair.fds)
        pair.close()


@pytest.mark.usefixtures("registered")
async def test_failing_conversion_gives_the_handle_back() -> None:
    """A ``from_wire`` that raises refuses the handle; descriptors are closed, the channel lives."""
    async with joined("native") as (a, b):
        error = b.on("error", Recorder())
        pair = _pair("bad")
        with pytest.raises(HandleNotDelivered) as caught:
            await a.send("x", pair)
        assert caught.value.handle is pair
        assert "conver" in caught.value.reason or "kind" in caught.value.reason
        assert [os.eventfd_read(fd.fileno()) for fd in pair.fds] == [1, 2]
        assert "from_wire failed" in str((await error.next())[0][0])
        pair.close()
        await a.send("alive")
        assert await b.recv() == ("alive", None)


@pytest.mark.usefixtures("registered")
async def test_unknown_tag_gives_the_handle_back() -> None:
    """A tag nobody registered there never crashes either end; the handle comes back in order."""
    async with joined("native") as (a, b):
        del default_registry._custom["tests.Pair"]
        error = b.on("error", Recorder())
        undelivered = a.on("undelivered", Recorder())
        pair = _pair("unknown")
        a.send_nowait("before")
        a.send_nowait("pair", pair)
        a.send_nowait("after")
        assert await b.recv() == ("before", None)
        assert await b.recv() == ("after", None)
        ((message, handle, reason),) = await undelivered.next()
        assert (message, handle) == ("pair", pair)
        assert "type" in reason or "know" in reason
        assert "tests.Pair" in str((await error.next())[0][0])
        assert not any(fd.closed for fd in pair.fds)
        pair.close()


@pytest.mark.usefixtures("registered")
async def test_registered_kind_towards_node() -> None:
    """A registered kind is refused synchronously towards a node-dialect peer."""
    async with joined("node") as (a, _):
        pair = _pair("x")
        with pytest.raises(UnsupportedHandle):
            a.send_nowait("x", pair)
        assert not any(fd.closed for fd in pair.fds)
        pair.close()


@pytest.mark.usefixtures("registered")
async def test_registered_kind_without_descriptors_is_refused() -> None:
    """1 to 253 descriptors travel together: none at all is refused synchronously."""
    async with joined("native") as (a, _):
        with pytest.raises(UnsupportedHandle):
            a.send_nowait("x", Pair("none", []))


@pytest.mark.usefixtures("registered")
async def test_registered_kind_with_many_descriptors() -> None:
    """253 descriptors travel with one handle."""
    async with joined("native") as (a, b):
        fds = [FileDescriptor(os.eventfd(n)) for n in range(1, 254)]
        received = await hand_over(a, b, Pair("many", fds))
        assert [os.eventfd_read(fd.fileno()) for fd in received.fds] == list(range(1, 254))
        received.close()


@pytest.mark.usefixtures("registered")
async def test_bad_registrations() -> None:
    """A built-in or empty tag is refused by ``register``."""
    for tag in ("net.Socket", "fd", ""):
        conversion = PairConversion()
        conversion.tag = tag
        with pytest.raises(ValueError, match="tag"):
            handleipc.register(Pair, conversion)


@pytest.mark.usefixtures("registered")
async def test_failing_to_wire_is_the_callers() -> None:
    """A ``to_wire`` that raises does so in ``send``; nothing was sent."""
    async with joined("native") as (a, b):
        pair = _pair("x")
        pair.close()
        with pytest.raises(handleipc.DescriptorReleased):
            a.send_nowait("x", pair)
        a.send_nowait("alive")
        assert await b.recv() == ("alive", None)


# -- what Node would send ------------------------------------------------------------------------


@both_dialects
async def test_handle_of_another_kind_is_refused(dialect: str) -> None:
    """A descriptor that is not what the envelope says is NACKed and closed, with an ``"error"``."""
    if dialect == "native":
        async with raw_peer("native") as (a, peer):
            error = a.on("error", Recorder())
            fd = os.eventfd(0)
            peer.write([1, 1], [2, 1, 1, "net.Socket", "x"], [0, "alive"], fds=(fd,))
            os.close(fd)
            line = await peer.line(control=True)
            while "refuse" not in line:
                line = await peer.line(control=True)
            assert line["refuse"] == [[1, 1, "kind"]]
            await error.next()
            assert await a.recv() == ("alive", None)
        return
    async with raw_peer() as (a, peer):
        error = a.on("error", Recorder())
        fd = os.eventfd(0)
        peer.write({"cmd": "NODE_HANDLE", "type": "net.Socket", "msg": "x"}, fds=(fd,))
        os.close(fd)
        assert await peer.line() == {"cmd": "NODE_HANDLE_NACK"}
        await error.next()
        peer.write("alive")
        assert await a.recv() == ("alive", None)
