"""Node's kinds of handle: what each needs to be sent, and what may arrive under its tag."""

from __future__ import annotations

import errno
import json
import os
import select
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handleipc.exceptions import DescriptorReleased, HandleNotDelivered, UnsupportedHandle
from handleipc.handles import kinds
from handleipc.handles.connection import BaseConnection
from handleipc.handles.sockets import Socket
from handleipc.handles.fds import FileDescriptor
from handleipc.handles.group import Group
from handleipc.handles.kinds import BoundSocket, Native, is_expected, prepare_native, prepare_socket
from handleipc.handles.pending import PendingHandle
from handleipc.wire.syscalls import (
    KIND_FIFO,
    KIND_LISTENING,
    KIND_OTHER,
    KIND_SOCKET,
    descriptor_kind,
)
from tests.linger import ON, lingers


def kind(family: int, type: int, flags: int = 0) -> int:
    """Return a kind as the C core spells it."""
    return KIND_SOCKET | family << 8 | type | flags


TCP = kind(socket.AF_INET, socket.SOCK_STREAM)
TCP6 = kind(socket.AF_INET6, socket.SOCK_STREAM)
UNIX = kind(socket.AF_UNIX, socket.SOCK_STREAM)
UDP = kind(socket.AF_INET, socket.SOCK_DGRAM)
UDP6 = kind(socket.AF_INET6, socket.SOCK_DGRAM)
STREAMS = {TCP, TCP6, UNIX}
LISTENERS = {stream | KIND_LISTENING for stream in STREAMS}
OTHERS = {
    kind(socket.AF_UNIX, socket.SOCK_DGRAM),
    kind(socket.AF_UNIX, socket.SOCK_SEQPACKET),
    kind(socket.AF_INET, socket.SOCK_RAW),
    kind(socket.AF_NETLINK, socket.SOCK_DGRAM),
    kind(socket.AF_VSOCK, socket.SOCK_STREAM),
    KIND_OTHER,
    -9,
}
ALL = STREAMS | LISTENERS | {UDP, UDP6, KIND_FIFO} | OTHERS


@pytest.mark.parametrize(
    ("tag", "options", "wanted"),
    [
        ("net.Socket", None, STREAMS),
        ("net.Server", None, LISTENERS),
        ("net.Native", None, STREAMS | LISTENERS | {KIND_FIFO}),
        ("net.BoundSocket", None, STREAMS),
        ("dgram.Native", None, {UDP, UDP6}),
        ("dgram.Socket", {"dgramType": "udp4"}, {UDP}),
        ("dgram.Socket", {"dgramType": "udp6"}, {UDP6}),
        ("dgram.Socket", {"dgramType": "udp5"}, set()),
        ("dgram.Socket", {"dgramType": ["udp4"]}, set()),
        ("dgram.Socket", {}, set()),
        ("dgram.Socket", None, set()),
        ("fd", None, set()),
        ("tls.Socket", None, set()),
        ("", None, set()),
    ],
)
def test_is_expected(tag: str, options: dict[str, object] | None, wanted: set[int]) -> None:
    """Under each tag exactly the kinds may arrive that Node would send, and never abort on."""
    assert {k for k in ALL if is_expected(tag, k, options)} == wanted


def test_tags_are_those_of_node() -> None:
    """Six tags are Node's; ours is none of them."""
    assert len(kinds.NODE_TAGS) == 6
    assert kinds.FD not in kinds.NODE_TAGS


# -- sending sockets -----------------------------------------------------------------------------


@contextmanager
def tcp_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected TCP sockets."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    with client, server:
        yield client, server


def is_closed_on_delivery(pending: PendingHandle, sock: socket.socket) -> bool:
    """Deliver a handle, and say whether the socket is closed then."""
    assert pending.is_given_away is (pending.on_delivered is not None)
    pending.delivered()
    return sock.fileno() < 0


@pytest.mark.parametrize("keep_open", [False, True])
def test_prepare_connected_socket(keep_open: bool) -> None:
    """A connected stream socket is a net.Socket, closed at the acknowledgement unless kept."""
    for pair in (tcp_pair(), ExitStack()):
        with pair as found:
            ours, peer = found if isinstance(found, tuple) else socket.socketpair()
            with peer, ours:
                ours.settimeout(5)
                pending = prepare_socket(ours, keep_open)
                assert (pending.tag, pending.options, pending.native_only) == (
                    "net.Socket",
                    b"",
                    False,
                )
                assert pending.filenos() == [ours.fileno()]
                assert not os.get_blocking(ours.fileno())
                assert is_closed_on_delivery(pending, ours) is not keep_open


@pytest.mark.parametrize(("keep_open", "options"), [(False, b'{"key":"k"}'), (True, b"")])
def test_prepare_counted_socket(
    connection: Callable[..., BaseConnection], keep_open: bool, options: object
) -> None:
    """A socket that took a server's connection over travels with the key, unless it stays."""
    group = Group("k")
    group.opened_here()
    with connection(group=group).socket() as sock:
        assert isinstance(sock, Socket)
        assert prepare_socket(sock, keep_open).options == options


@pytest.mark.parametrize("keep_open", [False, True])
def test_prepare_listening_socket(tmp_path: Path, keep_open: bool) -> None:
    """A listener is a net.Server and stays the caller's."""
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "socket"))
        unix.listen()
        for listener in (tcp, unix):
            pending = prepare_socket(listener, keep_open)
            assert (pending.tag, pending.is_given_away) == ("net.Server", False)
            assert not is_closed_on_delivery(pending, listener)


@pytest.mark.parametrize(
    ("family", "host", "spelled"),
    [(socket.AF_INET, "127.0.0.1", "udp4"), (socket.AF_INET6, "::1", "udp6")],
)
def test_prepare_udp_socket(family: socket.AddressFamily, host: str, spelled: str) -> None:
    """A bound UDP socket is a dgram.Socket with its type beside it, and stays the caller's."""
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        with pytest.raises(UnsupportedHandle, match="not bound"):
            prepare_socket(sock, False)
        try:
            sock.bind((host, 0))
        except OSError:
            pytest.skip(f"{host} is not to be had here")
        pending = prepare_socket(sock, False)
        assert (pending.tag, pending.options) == (
            "dgram.Socket",
            b'{"dgramType":"%b"}' % spelled.encode(),
        )
        assert not is_closed_on_delivery(pending, sock)


def test_prepare_socket_that_is_not_connected() -> None:
    """A stream socket that is neither connected nor listening cannot be sent."""
    with socket.socket() as fresh, socket.socket(socket.AF_UNIX) as unix:
        for sock in (fresh, unix):
            with pytest.raises(UnsupportedHandle, match="neither connected nor listening"):
                prepare_socket(sock, False)


def test_prepare_bare_bound_socket(tmp_path: Path) -> None:
    """A bound socket is refused, in words that say which Node knows the kind, and how to send it."""
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix:
        tcp.bind(("127.0.0.1", 0))
        unix.bind(str(tmp_path / "socket"))
        for sock in (tcp, unix):
            with pytest.raises(UnsupportedHandle, match="BoundSocket .* Node of version 26"):
                prepare_socket(sock, False)


def test_prepare_socket_that_its_client_has_reset() -> None:
    """The handle is no wrong one: the error says what became of its client, and gives it back."""
    for linger in (RESET, None):
        with tcp_pair() as (client, server):
            server.send(b"unread")
            if linger:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            client.close()
            until_hung_up(server)
            with pytest.raises(HandleNotDelivered, match="client has reset") as caught:
                prepare_socket(server, False)
            assert caught.value.handle is server
            assert server.fileno() >= 0


def test_prepare_socket_that_still_connects() -> None:
    """A socket that waits for the answer to its first packet is not connected, and not reset."""
    with socket.socket() as listener, socket.socket() as filler, socket.socket() as sock:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        filler.connect(listener.getsockname())
        sock.setblocking(False)
        # The queue is full, so nobody answers this one.
        assert sock.connect_ex(listener.getsockname()) == errno.EINPROGRESS
        with pytest.raises(UnsupportedHandle, match="neither connected nor listening"):
            prepare_socket(sock, False)


RESET = struct.pack("ii", 1, 0)


def until_hung_up(sock: socket.socket) -> None:
    """Wait until the kernel knows that the other end is gone."""
    poll = select.poll()
    poll.register(sock, 0)
    assert poll.poll(10_000), "the client is still there"


@pytest.mark.parametrize("keep_open", [False, True])
def test_prepare_socket_that_was_blocking(keep_open: bool) -> None:
    """The object is told that it does not block any more, and blocks again if it comes back."""
    with tcp_pair() as (client, server):
        pending = prepare_socket(server, keep_open)
        assert (server.gettimeout(), os.get_blocking(server.fileno())) == (0, False)
        pending.returned()
        assert (server.gettimeout(), os.get_blocking(server.fileno())) == (None, True)
        client.settimeout(5)
        prepare_socket(client, keep_open).returned()
        assert client.gettimeout() == 5
        pending = prepare_socket(server, keep_open)
        server.close()
        pending.returned()


def test_prepare_socket_does_not_linger() -> None:
    """The peer that has it may have set it to linger: our copy is closed without waiting."""
    with tcp_pair() as (_, server), server.dup() as copy:
        pending = prepare_socket(server, False)
        copy.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ON)
        pending.delivered()
        assert server.fileno() < 0
        assert not lingers(copy)
    with tcp_pair() as (_, server):
        pending = prepare_socket(server, False)
        server.close()  # the caller's doing
        pending.delivered()


def test_prepare_socket_that_is_closed() -> None:
    """A closed socket cannot be sent, whoever closed it."""
    sock = socket.socket()
    sock.close()
    with pytest.raises(UnsupportedHandle, match="this socket is closed"):
        prepare_socket(sock, False)
    a, b = socket.socketpair()
    with a:
        os.close(b.fileno())
        with pytest.raises(UnsupportedHandle, match="not open: Bad file descriptor"):
            prepare_socket(b, False)
        b.detach()


@pytest.mark.parametrize("type", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_prepare_socket_of_another_family(type: socket.SocketKind) -> None:
    """Other sockets have no word on the wire; the message says what to do."""
    a, b = socket.socketpair(socket.AF_UNIX, type)
    with a, b, pytest.raises(UnsupportedHandle, match="wrap its descriptor in a FileDescriptor"):
        prepare_socket(a, False)


@pytest.fixture
def tls() -> Iterator[ssl.SSLSocket]:
    """A TLS socket before its handshake."""
    context = ssl.create_default_context()
    with tcp_pair() as (client, _):
        wrapped = context.wrap_socket(
            client, server_hostname="localhost", do_handshake_on_connect=False
        )
        with wrapped:
            yield wrapped


def test_prepare_tls_socket(tls: ssl.SSLSocket) -> None:
    """A TLS socket cannot be sent, wrapped or not: its keys live here."""
    with pytest.raises(UnsupportedHandle, match="TLS"):
        prepare_socket(tls, False)
    with pytest.raises(UnsupportedHandle, match="TLS"):
        prepare_native(Native(tls), False)


def test_prepare_reads_the_number_when_it_is_written(pair: tuple[socket.socket, ...]) -> None:
    """A socket that was closed while it waited is not sent, nor what has its number now."""
    sock = pair[0]
    pending = prepare_socket(sock, False)
    fd = sock.fileno()
    sock.close()
    other = os.memfd_create("other")
    assert other == fd
    with pytest.raises(DescriptorReleased, match="closed while it waited"):
        pending.filenos()
    os.close(other)


# -- sending raw handles -------------------------------------------------------------------------


class Source:
    """An object with a descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def fileno(self) -> int:
        """Return the descriptor."""
        return self.fd

    def __repr__(self) -> str:
        return "<source>"


def test_native_wraps_an_object() -> None:
    """A Native has the descriptor of what it wraps, and names it."""
    native = Native(Source(7))
    assert native.fileno() == 7
    assert repr(native) == "Native(<source>)"


@pytest.mark.parametrize("keep_open", [False, True])
def test_prepare_native(pair: tuple[socket.socket, ...], keep_open: bool) -> None:
    """Stream sockets, listeners and FIFOs are net.Native, UDP is dgram.Native; all stay open."""
    reading, writing = os.pipe()
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.socket(type=socket.SOCK_DGRAM) as udp,
        FileDescriptor(reading) as fifo,
        FileDescriptor(writing),
    ):
        for source, tag in (
            (pair[0], "net.Native"),
            (listener, "net.Native"),
            (fifo, "net.Native"),
            (udp, "dgram.Native"),
        ):
            pending = prepare_native(Native(source), keep_open)
            assert (pending.tag, pending.is_given_away, pending.native_only) == (tag, False, False)
            assert pending.filenos() == [source.fileno()]
            assert not os.get_blocking(source.fileno())
            pending.delivered()
            assert source.fileno() >= 0


def test_prepare_native_of_what_node_aborts_on() -> None:
    """Files and other sockets are refused: a Node peer would not survive them."""
    a, b = socket.socketpair(type=socket.SOCK_SEQPACKET)
    with FileDescriptor(os.memfd_create("file")) as file, a, b:
        for source in (file, a):
            with pytest.raises(UnsupportedHandle, match="Node aborts") as caught:
                prepare_native(Native(source), False)
            assert repr(source) in str(caught.value)


def test_prepare_native_that_is_closed() -> None:
    """What is wrapped must be open."""
    with pytest.raises(UnsupportedHandle, match="this object is closed"):
        prepare_native(Native(Source(-1)), False)
    with pytest.raises(UnsupportedHandle, match="this object is not open"):
        prepare_native(Native(Source(10**6)), False)


def test_prepare_native_that_was_blocking() -> None:
    """What is wrapped stays the caller's: it knows that it does not block, or blocks again."""
    reading, writing = os.pipe()
    with tcp_pair() as (_, server), FileDescriptor(reading) as fifo, FileDescriptor(writing):
        for source in (server, fifo):
            pending = prepare_native(Native(source), False)
            assert not os.get_blocking(source.fileno())
            pending.returned()
            assert os.get_blocking(source.fileno())
        prepare_native(Native(server), False).delivered()
        assert server.gettimeout() == 0


# -- sending bound sockets -----------------------------------------------------------------------


@pytest.mark.parametrize("keep_open", [False, True])
def test_prepare_bound(tmp_path: Path, keep_open: bool) -> None:
    """A bound socket travels, and is closed here unless kept; with a path to handleipc alone."""
    for family, address in (
        (socket.AF_INET, ("127.0.0.1", 0)),
        (socket.AF_UNIX, str(tmp_path / "socket")),
    ):
        with socket.socket(family) as sock:
            sock.bind(address)
            bound = BoundSocket(sock)
            assert bound.fileno() == sock.fileno()
            assert repr(bound) == f"BoundSocket({sock!r})"
            pending = kinds.prepare_bound(bound, keep_open)
            assert (pending.handle, pending.tag) == (bound, "net.BoundSocket")
            assert pending.native_only is (family == socket.AF_UNIX)
            assert pending.filenos() == [sock.fileno()]
            assert not os.get_blocking(sock.fileno())
            pending.delivered()
            assert (sock.fileno() < 0) is not keep_open
            bound.close()
            assert sock.fileno() < 0


def test_prepare_bound_of_other_sockets(pair: tuple[socket.socket, ...]) -> None:
    """Only a stream socket that is bound, and no more than that, is one."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.socket() as fresh,
        socket.socket(type=socket.SOCK_DGRAM) as udp,
        tcp_pair() as (client, _),
    ):
        udp.bind(("127.0.0.1", 0))
        for sock, why in (
            (listener, "bound and not listening"),
            (fresh, "bound and not listening"),
            (pair[0], "bound and not listening"),
            (udp, "bound and not listening"),
            (client, "is connected"),
            (Source(7), "holds a socket.socket"),
        ):
            with pytest.raises(UnsupportedHandle, match=why):
                kinds.prepare_bound(BoundSocket(sock), False)  # type: ignore[arg-type]


# -- sending owners ------------------------------------------------------------------------------


@pytest.fixture
def connection() -> Iterator[Callable[..., BaseConnection]]:
    """A function that makes one connection."""
    with tcp_pair() as (_, server):

        def make(**options: object) -> BaseConnection:
            kind = descriptor_kind(server.fileno())
            return BaseConnection(server.detach(), kind, **options)  # type: ignore[arg-type]

        yield make


@pytest.mark.parametrize(("group", "options"), [(None, b""), (Group("k"), b'{"key":"k"}')])
def test_prepare_connection_moves_it(
    connection: Callable[..., BaseConnection], group: Group | None, options: object
) -> None:
    """A connection leaves with its server's key, and is out of reach meanwhile."""
    ours = connection(group=group)
    fd = ours.fileno()
    pending = kinds.prepare_connection(ours, False)
    assert (pending.tag, pending.options, pending.native_only) == ("net.Socket", options, False)
    assert (pending.is_given_away, pending.filenos()) == (True, [fd])
    with pytest.raises(DescriptorReleased, match="on its way"):
        ours.fileno()
    pending.returned()
    assert ours.fileno() == fd
    ours.close()


def test_prepare_connection_lends_it(connection: Callable[..., BaseConnection]) -> None:
    """With keep_open the connection stays usable and counted here, and travels without a key."""
    ours = connection(group=Group("k"))
    pending = kinds.prepare_connection(ours, True)
    assert (pending.options, pending.is_given_away) == (b"", False)
    assert pending.filenos() == [ours.fileno()]
    pending.delivered()
    ours.close()
    with pytest.raises(DescriptorReleased):
        pending.filenos()


@pytest.mark.parametrize("keep_open", [False, True])
def test_prepare_connection_that_is_closed(
    connection: Callable[..., BaseConnection], keep_open: bool
) -> None:
    """A closed connection is refused at once."""
    ours = connection()
    ours.close()
    with pytest.raises(DescriptorReleased, match="is closed"):
        kinds.prepare_connection(ours, keep_open)


@pytest.mark.parametrize("keep_open", [False, True])
def test_prepare_connection_with_bytes_already_read(
    connection: Callable[..., BaseConnection], keep_open: bool
) -> None:
    """Bytes that were read before travel with the connection, which Node has no word for."""
    with connection(head=b"GET /") as ours:
        pending = kinds.prepare_connection(ours, keep_open)
        pending.returned()
        assert kinds.read_unread(json.loads(pending.options)) == b"GET /"
        assert pending.native_only


@given(st.binary())
def test_unread_round_trip(data: bytes) -> None:
    """Any bytes go through JSON and back."""
    assert kinds.read_unread({"unread": kinds.spell_unread(data)}) == data


@pytest.mark.parametrize(
    "options", [None, {}, {"unread": 7}, {"unread": ["QQ=="]}, {"unread": "!"}, {"unread": "Q"}]
)
def test_unread_that_makes_no_sense(options: dict[str, object] | None) -> None:
    """What is not there, or not base64, is no bytes."""
    assert kinds.read_unread(options) == b""


@pytest.mark.parametrize("keep_open", [False, True])
def test_prepare_fd(keep_open: bool) -> None:
    """A FileDescriptor travels between two ends of this package only, moved or lent."""
    owner = FileDescriptor(fd := os.memfd_create("file"))
    pending = kinds.prepare_fd(owner, keep_open)
    assert (pending.tag, pending.native_only, pending.filenos()) == ("fd", True, [fd])
    assert owner.closed is pending.is_given_away is not keep_open
    pending.delivered()
    assert owner.closed is not keep_open
    owner.close()
    with pytest.raises(DescriptorReleased):
        kinds.prepare_fd(owner, keep_open)


# -- receiving -----------------------------------------------------------------------------------


def test_build_socket(pair: tuple[socket.socket, ...]) -> None:
    """What is made of a socket is non-blocking, of its kind, and owns the descriptor."""
    with tcp_pair() as (client, server):
        value = descriptor_kind(server.fileno())
        server.setblocking(True)
        with kinds.build_socket("net.BoundSocket", server.detach(), value, None) as sock:
            assert (type(sock), sock.tag) == (Socket, "net.BoundSocket")
            assert (sock.family, sock.type) == (socket.AF_INET, socket.SOCK_STREAM)
            assert sock.gettimeout() == 0
            assert not os.get_blocking(sock.fileno())
            assert sock.getpeername() == client.getsockname()


def test_build_socket_that_knows_its_protocol() -> None:
    """The socket says that it is TCP: asyncio sets TCP_NODELAY only on one that does."""
    with tcp_pair() as (_, server):
        value = descriptor_kind(server.fileno())
        with kinds.build_socket("net.Native", server.detach(), value, None) as sock:
            assert sock.proto == socket.IPPROTO_TCP


def test_build_native() -> None:
    """A raw handle becomes a socket, or a FileDescriptor for a FIFO."""
    reading, writing = os.pipe()
    built = kinds.build_native("net.Native", reading, descriptor_kind(reading), None)
    assert isinstance(built, FileDescriptor)
    assert built.tag == "net.Native"
    built.close()
    os.close(writing)
    with socket.socket(type=socket.SOCK_DGRAM) as udp:
        value = descriptor_kind(udp.fileno())
        sock = kinds.build_native("dgram.Native", udp.detach(), value, None)
        assert isinstance(sock, Socket)
        assert (sock.type, sock.tag) == (socket.SOCK_DGRAM, "dgram.Native")
        sock.close()


def test_build_fd() -> None:
    """Any descriptor becomes a FileDescriptor."""
    fd = os.memfd_create("file")
    with kinds.build_fd(fd, KIND_OTHER, None) as owner:
        assert (owner.fileno(), owner.tag) == (fd, "fd")
