"""A connection nobody has read: owned, asked, taken over, given away."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable, Iterator

import pytest

from handleipc.ancillary import descriptor_kind
from handleipc.connection import BaseConnection, CountedSocket, family_of, protocol_of, type_of
from handleipc.exceptions import DescriptorReleased
from handleipc.socketlist import Group

Connect = Callable[..., BaseConnection]


@pytest.fixture
def tcp() -> Iterator[tuple[socket.socket, Connect]]:
    """The client's socket, and a function that makes the connection of the server's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()

    def connect(**options: object) -> BaseConnection:
        kind = descriptor_kind(accepted.fileno())
        return BaseConnection(accepted.detach(), kind, **options)  # type: ignore[arg-type]

    with client, accepted:
        yield client, connect


Tcp = tuple[socket.socket, Connect]


def ends_at(client: socket.socket) -> bool:
    """Say whether the other end of this connection is closed."""
    client.settimeout(10)
    return client.recv(1) == b""


def test_kind_is_taken_apart() -> None:
    """Family and type of a kind are those of the socket."""
    for family, kind in (
        (socket.AF_INET, socket.SOCK_STREAM),
        (socket.AF_INET6, socket.SOCK_DGRAM),
        (socket.AF_UNIX, socket.SOCK_SEQPACKET),
    ):
        with socket.socket(family, kind) as sock:
            value = descriptor_kind(sock.fileno())
            assert (family_of(value), type_of(value)) == (family, kind)
            assert protocol_of(value) == sock.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL)


def test_addresses(tcp: Tcp) -> None:
    """Both addresses are those that the client sees the other way round."""
    client, connect = tcp
    with connect() as connection:
        assert connection.family is socket.AF_INET
        assert connection.peername == client.getsockname()
        assert connection.sockname == client.getpeername()
        assert connection.group is None


def test_peername_that_accept_gave_along(tcp: Tcp) -> None:
    """The address of accept is used, and the kernel is not asked again."""
    client, connect = tcp
    raw = b"\x02\x00" + client.getsockname()[1].to_bytes(2, "big") + bytes([127, 0, 0, 1])
    with connect(raw_peer=raw) as connection:
        client.close()
        assert connection.peername == ("127.0.0.1", int.from_bytes(raw[2:4], "big"))


def test_peername_after_reset(tcp: Tcp) -> None:
    """A connection that was reset has no peer any more, and is still to be closed."""
    client, connect = tcp
    with connect() as connection:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, 0, 0, 0, 0, 0, 0, 0]))
        client.close()
        with pytest.raises(OSError, match="not connected"):
            _ = connection.peername
        assert not connection.closed


def test_addresses_after_close(tcp: Tcp) -> None:
    """A closed connection is not asked for anything."""
    _, connect = tcp
    connection = connect()
    connection.close()
    for ask in (
        lambda: connection.peername,
        lambda: connection.sockname,
        lambda: connection.peek(1),
        connection.fileno,
        connection.socket,
        connection.detach,
    ):
        with pytest.raises(DescriptorReleased, match="this BaseConnection is closed"):
            ask()


def test_peek_does_not_consume(tcp: Tcp) -> None:
    """Peeking shows what has come, again and again, and leaves it."""
    client, connect = tcp
    with connect() as connection:
        with pytest.raises(BlockingIOError):
            connection.peek(10)
        client.sendall(b"request")
        assert connection.peek(3) == b"req"
        assert connection.peek(10) == b"request"
        with connection.socket() as sock:
            assert sock.recv(10) == b"request"


def test_peek_after_fin(tcp: Tcp) -> None:
    """No bytes mean that the client has finished."""
    client, connect = tcp
    with connect() as connection:
        client.close()
        assert connection.peek(10) == b""


def test_asking_leaves_the_descriptor(tcp: Tcp) -> None:
    """Each question borrows the descriptor and gives it back, even if it fails."""
    _, connect = tcp
    with connect() as connection:
        fd = connection.fileno()
        _ = connection.peername, connection.sockname
        with pytest.raises(BlockingIOError):
            connection.peek(1)
        gc.collect()
        assert os.fstat(fd)
        assert connection.fileno() == fd


# -- bytes that were read before -----------------------------------------------------------------


def test_head_is_peeked_first(tcp: Tcp) -> None:
    """Bytes that were read before the handover are seen before those in the kernel."""
    client, connect = tcp
    client.sendall(b"later")
    with connect(head=b"first") as connection:
        assert connection.head == b"first"
        assert connection.peek(2) == b"fi"
        assert connection.take_head() == b"first"
        assert (connection.head, connection.take_head()) == (b"", b"")


def test_head_is_never_lost(tcp: Tcp) -> None:
    """While there are such bytes nobody takes the descriptor without them."""
    _, connect = tcp
    with connect(head=b"abc") as connection:
        for take in (connection.socket, connection.detach):
            with pytest.raises(DescriptorReleased, match="3 bytes of this connection were read"):
                take()
        assert not connection.closed
        connection.take_head()
        connection.socket().close()


# -- taking over ---------------------------------------------------------------------------------


def test_socket_takes_over(tcp: Tcp) -> None:
    """The socket is a plain non-blocking one, and the connection is no longer an owner."""
    client, connect = tcp
    connection = connect()
    fd = connection.fileno()
    with connection.socket() as sock:
        assert type(sock) is socket.socket
        assert (sock.fileno(), sock.gettimeout(), sock.family, sock.type) == (
            fd,
            0,
            socket.AF_INET,
            socket.SOCK_STREAM,
        )
        assert not os.get_blocking(fd)
        assert connection.closed
        with pytest.raises(DescriptorReleased, match="was detached"):
            connection.fileno()
        sock.send(b"hi")
        assert client.recv(2) == b"hi"
    assert ends_at(client)


def test_socket_knows_its_protocol(tcp: Tcp) -> None:
    """The socket says that it is TCP: asyncio sets TCP_NODELAY only on one that does."""
    _, connect = tcp
    with connect().socket() as sock:
        assert sock.proto == socket.IPPROTO_TCP


def test_detach(tcp: Tcp) -> None:
    """The descriptor is the caller's, open."""
    client, connect = tcp
    fd = connect().detach()
    os.write(fd, b"hi")
    assert client.recv(2) == b"hi"
    os.close(fd)


# -- counting ------------------------------------------------------------------------------------


@pytest.fixture
def group() -> Group:
    """A server's group, which counts one connection."""
    group = Group("4:127.0.0.1:80")
    group.opened_here()
    return group


@pytest.mark.parametrize("end", ["close", "detach", "drop"])
def test_end_is_counted_once(tcp: Tcp, group: Group, end: str) -> None:
    """However the connection ends here, it is counted down exactly once."""
    _, connect = tcp
    connection = connect(group=group)
    assert connection.group is group
    fd = connection.fileno()
    if end == "drop":
        with pytest.warns(ResourceWarning, match="unclosed <BaseConnection"):
            del connection
        assert group.local == 0
        return
    getattr(connection, end)()
    if end == "detach":
        os.close(fd)
    assert (group.local, connection.group) == (0, None)
    connection.close()
    assert group.local == 0


def test_end_is_not_counted_while_it_travels(tcp: Tcp, group: Group) -> None:
    """A connection on its way counts as open here until it comes back and ends."""
    _, connect = tcp
    connection = connect(group=group)
    connection.restore(connection.move())
    assert group.local == 1
    connection.close()
    assert group.local == 0


@pytest.mark.parametrize("end", ["close", "detach"])
def test_end_is_counted_by_the_socket(tcp: Tcp, group: Group, end: str) -> None:
    """The connection counts as open until the socket that took over is closed or detached."""
    _, connect = tcp
    sock = connect(group=group).socket()
    assert isinstance(sock, CountedSocket)
    gc.collect()
    assert group.local == 1
    fd = sock.fileno()
    getattr(sock, end)()
    assert group.local == 0
    sock.close()
    assert group.local == 0
    if end == "detach":
        os.close(fd)


def test_end_is_counted_by_a_socket_that_is_dropped(tcp: Tcp, group: Group) -> None:
    """A socket that is forgotten says so, is closed, and counted down."""
    client, connect = tcp
    sock = connect(group=group).socket()
    with pytest.warns(ResourceWarning, match="unclosed <handleipc.connection.CountedSocket"):
        del sock
    assert group.local == 0
    assert ends_at(client)


def test_end_is_counted_by_the_last_file_of_the_socket(tcp: Tcp, group: Group) -> None:
    """A socket that files of makefile() keep open still counts."""
    _, connect = tcp
    sock = connect(group=group).socket()
    with sock.makefile("rb"):
        sock.close()
        assert group.local == 1
    assert group.local == 0


def test_duplicate_of_the_socket(tcp: Tcp, group: Group) -> None:
    """A duplicate of the socket is a socket of its own: it can be closed, and counts nothing."""
    _, connect = tcp
    with connect(group=group).socket() as sock:
        sock.dup().close()
        assert group.local == 1
    assert group.local == 0


def test_socket_without_a_group_is_plain(tcp: Tcp) -> None:
    """Nobody pays for counting that nobody asked for."""
    _, connect = tcp
    with connect().socket() as plain:
        assert type(plain) is socket.socket


def test_no_descriptor() -> None:
    """A negative number is an error of somebody, and owns nothing."""
    with pytest.raises(ValueError, match="not a descriptor"):
        BaseConnection(-1, 0)
