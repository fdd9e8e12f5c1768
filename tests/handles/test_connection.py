"""A connection nobody has read: owned, asked, taken over, given away."""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import ssl
import struct
from collections.abc import Callable, Iterator

import pytest

from handleipc.exceptions import DescriptorReleased, UnsupportedHandle
from handleipc.handles.connection import BaseConnection
from handleipc.handles.sockets import Socket, family_of, protocol_of, type_of
from handleipc.handles.fds import FileDescriptor
from handleipc.handles.group import Group
from handleipc.wire.syscalls import descriptor_kind
from tests.linger import ON, lingers

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
        assert connection._group is None


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
        assert connection._take_head() == b"first"
        assert (connection.head, connection._take_head()) == (b"", b"")


def test_head_is_never_lost(tcp: Tcp) -> None:
    """While there are such bytes nobody takes the descriptor without them."""
    _, connect = tcp
    with connect(head=b"abc") as connection:
        for take in (connection.socket, connection.detach):
            with pytest.raises(DescriptorReleased, match="3 bytes of this connection were read"):
                take()
        assert not connection.closed
        connection._take_head()
        connection.socket().close()


# -- taking over ---------------------------------------------------------------------------------


def test_socket_takes_over(tcp: Tcp) -> None:
    """The socket is a non-blocking one, and the connection is no longer an owner."""
    client, connect = tcp
    connection = connect()
    fd = connection.fileno()
    with connection.socket() as sock:
        assert (type(sock), sock.tag) == (Socket, "net.Socket")
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


# -- from a socket of the caller's ---------------------------------------------------------------


@pytest.fixture
def accepted() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A client, and the socket of the standard library that a server accepted from it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    with client, server:
        yield client, server


@pytest.mark.parametrize("timeout", [None, 0, 5])
def test_from_socket(accepted: tuple[socket.socket, socket.socket], timeout: float | None) -> None:
    """The connection owns the descriptor, non-blocking, and the socket is detached."""
    client, server = accepted
    fd = server.fileno()
    server.settimeout(timeout)
    with BaseConnection.from_socket(server) as connection:
        assert (server.fileno(), connection.fileno()) == (-1, fd)
        assert (connection.family, connection.tag) == (socket.AF_INET, "net.Socket")
        assert connection.peername == client.getsockname()
        assert not os.get_blocking(fd)
    assert ends_at(client)


def test_from_socket_of_the_unix_family(pair: tuple[socket.socket, socket.socket]) -> None:
    """A Unix stream connection is one."""
    with BaseConnection.from_socket(pair[0]) as connection:
        assert connection.family == socket.AF_UNIX


def test_from_socket_that_counts(tcp: Tcp, group: Group) -> None:
    """What a connection became is a connection again, and counts all the time."""
    _, connect = tcp
    sock = connect(group=group).socket()
    with BaseConnection.from_socket(sock) as connection:
        assert (connection._group, group.local) == (group, 1)
    assert group.local == 0


def test_another_front_takes_over(tcp: Tcp, group: Group) -> None:
    """With what it owns: the descriptor, the bytes that were read, and its place in the count."""
    client, connect = tcp
    theirs = connect(head=b"head", group=group)
    fd = theirs.fileno()
    ours = BaseConnection._from(theirs)
    assert (ours.fileno(), ours.head) == (fd, b"head")
    assert theirs.closed
    with pytest.raises(DescriptorReleased, match="was detached"):
        theirs.fileno()
    assert group.local == 1
    ours.close()
    assert group.local == 0
    assert ends_at(client)


def test_from_socket_that_was_reset(accepted: tuple[socket.socket, socket.socket]) -> None:
    """Clients reset when they like: it is a connection still, to be closed like others."""
    client, server = accepted
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    with pytest.raises(ConnectionResetError):
        server.recv(1)
    with BaseConnection.from_socket(server) as connection:
        assert connection.peek(1) == b""


def test_from_socket_of_others(accepted: tuple[socket.socket, socket.socket]) -> None:
    """What is no connection is refused, and stays the caller's as it was."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.socket() as fresh,
        socket.socket(type=socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_UNIX) as unix,
        FileDescriptor(os.memfd_create("file")) as file,
        ssl.create_default_context().wrap_socket(
            accepted[0], server_hostname="localhost", do_handshake_on_connect=False
        ) as tls,
    ):
        for sock, why in (
            (listener, "is no connection"),
            (udp, "is no connection"),
            (fresh, "is not connected"),
            (unix, "is not connected"),
            (file, "a FileDescriptor is none"),
            (tls, "TLS"),
        ):
            with pytest.raises(UnsupportedHandle, match=why):
                BaseConnection.from_socket(sock)  # type: ignore[arg-type]
            assert os.fstat(sock.fileno())
            if isinstance(sock, socket.socket):
                assert sock.gettimeout() is None
    with pytest.raises(UnsupportedHandle, match="is closed"):
        BaseConnection.from_socket(fresh)


# -- what others have set ------------------------------------------------------------------------


Handed = tuple[Socket, socket.socket]


@pytest.fixture
def handed(tcp: Tcp) -> Iterator[Handed]:
    """A socket, and the copy of whoever handed it over."""
    _, connect = tcp
    with connect().socket() as sock, socket.socket(fileno=os.dup(sock.fileno())) as copy:
        yield sock, copy


WAITING_CALLS: dict[str, Callable[[Socket], object]] = {
    "recv": lambda sock: sock.recv(1),
    "recv_into": lambda sock: sock.recv_into(bytearray(1)),
    "recvfrom": lambda sock: sock.recvfrom(1),
    "recvfrom_into": lambda sock: sock.recvfrom_into(bytearray(1)),
    "recvmsg": lambda sock: sock.recvmsg(1),
    "recvmsg_into": lambda sock: sock.recvmsg_into([bytearray(1)]),
    "send": lambda sock: sock.send(b"x"),
    "sendall": lambda sock: sock.sendall(b"x"),
    "sendto": lambda sock: sock.sendto(b"x", ("127.0.0.1", 1)),
    "sendto with flags": lambda sock: sock.sendto(b"x", 0, ("127.0.0.1", 1)),
    "sendmsg": lambda sock: sock.sendmsg([b"x"]),
}


@pytest.mark.parametrize("call", WAITING_CALLS)
def test_nothing_waits(handed: Handed, call: str) -> None:
    """A copy that was made blocking elsewhere does not make a non-blocking socket wait."""
    sock, copy = handed
    if call.startswith("send"):
        with pytest.raises(BlockingIOError):
            while True:
                sock.send(bytes(1 << 16))
    copy.setblocking(True)
    assert os.get_blocking(sock.fileno())
    with pytest.raises(BlockingIOError):
        WAITING_CALLS[call](sock)


def test_waits_if_told_to(tcp: Tcp, handed: Handed) -> None:
    """Made blocking by its owner, it is a blocking socket like any other."""
    client, _ = tcp
    sock, _ = handed
    sock.settimeout(10)
    client.send(b"a")
    assert sock.recv(1) == b"a"
    sock.settimeout(None)
    client.send(b"bc")
    assert sock.recv(2, socket.MSG_WAITALL) == b"bc"


READING_CALLS = [call for call in WAITING_CALLS if call.startswith("recv")]


@pytest.mark.parametrize("call", READING_CALLS)
def test_knows_whether_it_was_read(tcp: Tcp, handed: Handed, call: str) -> None:
    """A byte that was read through the object is remembered; one that was looked at is not."""
    client, _ = tcp
    sock, _ = handed
    with pytest.raises(BlockingIOError):
        WAITING_CALLS[call](sock)
    client.send(b"x")
    sock.settimeout(10)
    sock.recv(1, socket.MSG_PEEK)
    assert not sock.has_read
    WAITING_CALLS[call](sock)
    assert sock.has_read


def test_sends_without_a_signal(tcp: Tcp, handed: Handed) -> None:
    """Where SIGPIPE is at its default, a client that is gone is an error and no death."""
    client, _ = tcp
    sock, _ = handed
    client.close()
    sock.shutdown(socket.SHUT_WR)
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        for call in (call for name, call in WAITING_CALLS.items() if name.startswith("send")):
            with pytest.raises(BrokenPipeError):
                call(sock)
    finally:
        signal.signal(signal.SIGPIPE, before)


@pytest.mark.parametrize("end", ["close", "drop"])
@pytest.mark.filterwarnings("ignore:unclosed")
def test_socket_does_not_linger(tcp: Tcp, end: str) -> None:
    """Whatever the sender has set, the close of a socket does not wait for the client."""
    _, connect = tcp
    sock = connect().socket()
    with socket.socket(fileno=os.dup(sock.fileno())) as copy:
        copy.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ON)
        if end == "close":
            sock.close()
        del sock
        gc.collect()
        assert not lingers(copy)


def test_connection_does_not_linger(tcp: Tcp) -> None:
    """Nor does that of a connection."""
    _, connect = tcp
    connection = connect()
    with socket.socket(fileno=os.dup(connection.fileno())) as copy:
        copy.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ON)
        connection.close()
        assert not lingers(copy)


def test_socket_resets_if_told_to(tcp: Tcp) -> None:
    """A program that wants its close to reset the connection, which waits for nobody, gets it."""
    client, connect = tcp
    sock = connect().socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.close()
    client.settimeout(10)
    with pytest.raises(ConnectionResetError):
        client.recv(1)


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
    assert connection._group is group
    fd = connection.fileno()
    if end == "drop":
        with pytest.warns(ResourceWarning, match="unclosed <BaseConnection"):
            del connection
        assert group.local == 0
        return
    getattr(connection, end)()
    if end == "detach":
        os.close(fd)
    assert (group.local, connection._group) == (0, None)
    connection.close()
    assert group.local == 0


def test_end_is_not_counted_while_it_travels(tcp: Tcp, group: Group) -> None:
    """A connection on its way counts as open here until it comes back and ends."""
    _, connect = tcp
    connection = connect(group=group)
    connection._restore(connection._move())
    assert group.local == 1
    connection.close()
    assert group.local == 0


@pytest.mark.parametrize("end", ["close", "detach"])
def test_end_is_counted_by_the_socket(tcp: Tcp, group: Group, end: str) -> None:
    """The connection counts as open until the socket that took over is closed or detached."""
    _, connect = tcp
    sock = connect(group=group).socket()
    assert isinstance(sock, Socket)
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
    with pytest.warns(ResourceWarning, match="unclosed <handleipc.handles.sockets.Socket"):
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


def test_no_descriptor() -> None:
    """A negative number is an error of somebody, and owns nothing."""
    with pytest.raises(ValueError, match="not a descriptor"):
        BaseConnection(-1, 0)


# -- one owner, whatever the system refuses ------------------------------------------------------


def test_socket_that_the_system_refuses(tcp: Tcp, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that cannot become a socket still is the connection, and the only owner."""
    client, connect = tcp

    def refuse(self: Socket, value: float | None) -> None:
        raise OSError("no memory")

    with connect() as connection:
        with monkeypatch.context() as patch:
            patch.setattr(Socket, "settimeout", refuse)
            with pytest.raises(OSError, match="no memory"):
                connection.socket()
        gc.collect()
        client.sendall(b"x")
        with connection.socket() as sock:
            sock.setblocking(True)
            assert sock.recv(1) == b"x"


def test_socket_of_a_bad_descriptor() -> None:
    """A socket that could not be made owns nothing."""
    fd = os.memfd_create("file")
    os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        Socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=fd)
    with pytest.raises(OSError, match="type not supported|Invalid argument"):
        Socket(socket.AF_UNIX, 77)


def test_close_of_a_socket_raises_nothing() -> None:
    """What close(2) says of a socket is nobody's business: event loops call this."""
    sock = Socket(socket.AF_UNIX, socket.SOCK_STREAM)
    os.close(sock.fileno())
    sock.close()
    assert sock.fileno() == -1


@pytest.mark.parametrize("end", ["close", "detach"])
def test_end_of_a_socket_is_told_once(tcp: Tcp, end: str) -> None:
    """Whoever asked hears that it was closed or given away, and nothing of it afterwards."""
    _, connect = tcp
    sock = connect().socket()
    told: list[int] = []
    sock._on_end = lambda: told.append(sock.fileno())
    if end == "close":
        sock.close()
    else:
        os.close(sock.detach())
    sock.close()
    assert told == [-1]


# -- one that came, and at which nobody has looked -------------------------------------------------

USES: dict[str, Callable[[BaseConnection], object]] = {
    "fileno": BaseConnection.fileno,
    "family": lambda connection: connection.family,
    "peername": lambda connection: connection.peername,
    "sockname": lambda connection: connection.sockname,
    "peek": lambda connection: connection.peek(1),
    "socket": BaseConnection.socket,
    "detach": BaseConnection.detach,
    "move": BaseConnection._move,
}


@pytest.mark.parametrize("use", USES)
def test_the_first_use_looks(tcp: Tcp, use: str) -> None:
    """It is what it should be, and does not block from then on."""
    client, connect = tcp
    client.sendall(b"x")
    fd = connect().detach()
    os.set_blocking(fd, True)
    select.select([fd], [], [], 10)
    connection = BaseConnection(fd)
    assert os.get_blocking(fd)
    made = USES[use](connection)
    assert not os.get_blocking(fd)
    assert connection.family == socket.AF_INET
    if hasattr(made, "close"):
        made.close()
    elif use in {"detach", "move"}:
        os.close(fd)
        connection._moved()
    connection.close()


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("what", ["pipe", "udp", "listening", "seqpacket", "closed"])
def test_the_first_use_finds_a_lie(what: str, use: str) -> None:
    """A peer may say what it likes: the object is no connection, whatever is tried, and closes."""
    with contextlib.ExitStack() as stack:
        if what == "pipe":
            fd, other = os.pipe()
            stack.callback(os.close, other)
        elif what == "listening":
            fd = socket.create_server(("127.0.0.1", 0)).detach()
        elif what == "udp":
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.bind(("127.0.0.1", 0))
            sock.connect(sock.getsockname())
            fd = sock.detach()
        else:
            one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.enter_context(two)
            fd = one.detach()
        connection = BaseConnection(fd)
        if what == "closed":
            os.close(fd)
        for _ in range(2):
            # As of a client that is gone: whoever copes with those copes with this.
            with pytest.raises(OSError, match=r"descriptor of another kind|Bad file desc") as told:
                USES[use](connection)
            assert isinstance(told.value, ConnectionAbortedError) is (what != "closed")
        assert not connection.closed
        with contextlib.suppress(OSError):  # EBADF of one that somebody closed
            connection.close()
        assert connection.closed
        with pytest.raises(DescriptorReleased, match="is closed"):
            USES[use](connection)


def test_another_fronts_object_is_made_without_a_look() -> None:
    """Who takes a message of a liar gets it, and learns of the lie at the first use."""
    reading, writing = os.pipe()
    os.close(writing)
    connection = BaseConnection(reading, head=b"x")
    with BaseConnection._from(connection) as made:
        assert connection.closed
        assert made.head == b"x"
        with pytest.raises(ConnectionAbortedError):
            made.fileno()
    with pytest.raises(DescriptorReleased, match="detached"):
        connection.fileno()


def test_closed_without_a_look(tcp: Tcp) -> None:
    """Nobody asks what it was."""
    client, connect = tcp
    connection = BaseConnection(connect().detach())
    connection.close()
    assert ends_at(client)
