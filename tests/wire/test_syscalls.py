"""Bytes with descriptors through real sockets, and accept: the skins over the C core."""

from __future__ import annotations

import errno
import faulthandler
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from handleipc.exceptions import LineTooLong
from handleipc.wire import framing, syscalls
from handleipc.wire.framing import Batch, LineFramer, LongLine
from handleipc.wire.syscalls import (
    Acceptor,
    Receiver,
    Refused,
    close_received,
    descriptor_kind,
    discard,
    end_stream,
    exit_with_parent,
    inherits_signals,
    reset_signals,
    send_with_fds,
)

Pair = tuple[socket.socket, socket.socket]


@contextmanager
def file() -> Iterator[int]:
    """A descriptor of a file."""
    fd = os.memfd_create("file")
    try:
        yield fd
    finally:
        os.close(fd)


def lines_of(batch: Batch) -> list[bytes]:
    """Return the lines of a batch."""
    starts = [batch.start, *batch.ends]
    return [bytes(batch.view[s : e - 1]) for s, e in zip(starts, batch.ends, strict=False)]


def close_sets(batch: Batch) -> list[int]:
    """Close the descriptors of a batch and return how many each set had."""
    for received in batch.sets:
        for fd in received.fds:
            os.close(fd)
    return [len(received.fds) for received in batch.sets]


# -- send_with_fds -------------------------------------------------------------------------------


def test_send_then_receive(pair: Pair) -> None:
    """What is written arrives, as lines and as descriptor sets with offsets."""
    a, b = pair
    receiver = Receiver(LineFramer(100))
    with file() as fd:
        assert send_with_fds(a.fileno(), b"..first\n", 2, [fd]) == 6
        assert send_with_fds(a.fileno(), b"second\n", 0, [fd, a.fileno()]) == 7
        batch = receiver.receive(b.fileno())
    assert lines_of(batch) == [b"first", b"second"]
    (received,) = batch.sets
    assert (received.start, received.end, received.truncated) == (0, 13, False)
    assert syscalls.adopt(received.fds[0]) == syscalls.KIND_OTHER
    assert syscalls.adopt(received.fds[1]) & syscalls.KIND_SOCKET
    assert not os.get_inheritable(received.fds[0])
    close_sets(batch)
    assert receiver.drained
    assert not receiver.at_eof
    assert receiver.position == 13


def test_send_to_full_socket(pair: Pair) -> None:
    """A full socket takes a part, then nothing until it is writable."""
    a, b = pair
    a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
    data = b"x" * 100_000
    sent = send_with_fds(a.fileno(), data, 0, [])
    assert isinstance(sent, int)
    assert 0 < sent < len(data)
    assert send_with_fds(a.fileno(), data, sent, []) is Refused.AGAIN
    assert len(b.recv(len(data))) == sent


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (errno.EAGAIN, Refused.AGAIN),
        (errno.ETOOMANYREFS, Refused.IN_FLIGHT),
        (errno.ENOBUFS, Refused.NO_MEMORY),
        (errno.ENOMEM, Refused.NO_MEMORY),
    ],
)
def test_send_when_the_kernel_asks_to_wait(
    monkeypatch: pytest.MonkeyPatch, error: int, refused: Refused
) -> None:
    """Errors that pass are no exceptions: they say what to wait for."""
    monkeypatch.setattr(syscalls, "_hipc_send", lambda *_: -error)
    assert send_with_fds(0, b"x", 0, []) is refused
    assert refused.value


@pytest.mark.parametrize("fds", [[], [0]])
def test_send_to_closed_peer(pair: Pair, fds: list[int]) -> None:
    """A peer that is gone is a BrokenPipeError, and no signal."""
    a, b = pair
    b.close()
    with pytest.raises(BrokenPipeError, match="Broken pipe"):
        send_with_fds(a.fileno(), b"x", 0, fds)


def test_discard() -> None:
    """Closes all of them, whatever close(2) says of one."""
    fds = [os.memfd_create("file") for _ in range(3)]
    os.close(fds[0])
    discard(*fds)
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_send_of_fds_without_bytes(pair: Pair) -> None:
    """Descriptors need a byte to ride on."""
    with pytest.raises(OSError, match="Invalid argument") as caught:
        send_with_fds(pair[0].fileno(), b"", 0, [0])
    assert caught.value.errno == errno.EINVAL


def test_send_of_254_fds(pair: Pair) -> None:
    """More descriptors than one message can carry are refused."""
    with file() as fd, pytest.raises(OSError, match="Invalid argument"):
        send_with_fds(pair[0].fileno(), b"x", 0, [fd] * 254)


@pytest.mark.parametrize("offset", range(10))
def test_send_of_a_long_line(pair: Pair, offset: int) -> None:
    """Its parts leave in a row, from any byte on; descriptors with the first alone."""
    a, b = pair
    line = LongLine(b"[0,", b"body", b"]\n")
    assert (len(line), bytes(line)) == (9, b"[0,body]\n")
    with file() as fd:
        fds = [fd] if offset < len(line) else []
        assert send_with_fds(a.fileno(), line, offset, fds) == 9 - offset
        if offset < len(line):
            data, got, _, _ = socket.recv_fds(b, 100, 9)
            assert data == bytes(line)[offset:]
            assert len(got) == (offset == 0)
            for one in got:
                os.close(one)


def test_send_of_a_long_line_to_full_socket(pair: Pair) -> None:
    """It refuses in the same way."""
    a, _ = pair
    line = LongLine(b"[0,", b"x" * 1_000_000, b"]\n")
    sent = send_with_fds(a.fileno(), line, 0, [])
    assert isinstance(sent, int)
    assert 0 < sent < len(line)
    assert send_with_fds(a.fileno(), line, sent, []) is Refused.AGAIN


# -- Receiver ------------------------------------------------------------------------------------


def test_receive_when_nothing_came(pair: Pair) -> None:
    """An empty socket is drained, and no error."""
    receiver = Receiver(LineFramer(100))
    batch = receiver.receive(pair[1].fileno())
    assert (batch.ends, receiver.drained, receiver.at_eof) == ([], True, False)


def test_receive_of_every_split(pair: Pair) -> None:
    """The lines and the sets are the same however the stream was written."""
    a, b = pair
    with file() as fd:
        for cut in range(1, 12):
            receiver = Receiver(LineFramer(100))
            a.send(b"one\ntwo\nend\n"[:cut])
            first = receiver.receive(b.fileno())
            lines = lines_of(first)
            send_with_fds(a.fileno(), b"one\ntwo\nend\n"[cut:], 0, [fd])
            second = receiver.receive(b.fileno())
            assert lines + lines_of(second) == [b"one", b"two", b"end"]
            assert second.sets[0].start == cut
            assert close_sets(second) == [1]


def test_receive_at_eof(pair: Pair) -> None:
    """The end of the stream comes with the lines before it, and again when asked again."""
    a, b = pair
    a.send(b"last\nhalf")
    a.close()
    receiver = Receiver(LineFramer(100))
    batch = receiver.receive(b.fileno())
    assert (lines_of(batch), batch.tail, receiver.at_eof) == ([b"last"], 4, True)
    assert lines_of(receiver.receive(b.fileno())) == []
    assert receiver.at_eof


def test_receive_with_budget(pair: Pair) -> None:
    """Above the budget reading stops, neither drained nor at the end."""
    a, b = pair
    a.send(b"one\n")
    receiver = Receiver(LineFramer(100))
    assert lines_of(receiver.receive(b.fileno(), 1)) == [b"one"]
    assert not receiver.drained
    assert not receiver.at_eof
    receiver.receive(b.fileno(), 1)
    assert receiver.drained


def test_receive_of_line_longer_than_the_buffer(pair: Pair) -> None:
    """A line that fills the buffer makes it grow, and comes out whole."""
    a, b = pair
    a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * framing.INITIAL_CAPACITY)
    line = b"y" * (framing.INITIAL_CAPACITY + 10)
    receiver = Receiver(LineFramer(2 * framing.INITIAL_CAPACITY))
    lines: list[bytes] = []
    for data in (line[:100_000], line[100_000:200_000], line[200_000:] + b"\n"):
        assert send_with_fds(a.fileno(), data, 0, []) == len(data)
        for _ in range(10):
            lines += lines_of(receiver.receive(b.fileno()))
            if receiver.drained:
                break
    assert lines == [line]


def test_receive_of_line_longer_than_the_limit(pair: Pair) -> None:
    """A line over the limit is an error, once the buffer is full of it."""
    a, b = pair
    a.send(b"x" * 11 + b"\n")
    receiver = Receiver(LineFramer(10))
    with pytest.raises(LineTooLong):
        receiver.receive(b.fileno())


def test_receive_when_the_read_fails(pair: Pair) -> None:
    """An error with nothing before it is raised as what it is."""
    a, b = pair
    b.send(b"never read")
    a.close()
    receiver = Receiver(LineFramer(100))
    with pytest.raises(ConnectionResetError, match="reset"):
        receiver.receive(b.fileno())
    with pytest.raises(OSError, match="Bad file descriptor"):
        receiver.receive(-1)


def test_receive_when_the_read_fails_behind_lines(pair: Pair) -> None:
    """Lines in front of a reset are delivered first; then the stream has ended."""
    a, b = pair
    a.send(b"ack\n")
    b.send(b"never read")
    a.close()
    receiver = Receiver(LineFramer(100))
    assert lines_of(receiver.receive(b.fileno())) == [b"ack"]
    assert not receiver.at_eof
    assert not receiver.drained
    receiver.receive(b.fileno())
    assert receiver.at_eof


def test_receive_without_free_slots(pair: Pair, descriptor_limit: Callable[[int], None]) -> None:
    """Without a free slot the bytes come with an empty set that says so."""
    a, b = pair
    receiver = Receiver(LineFramer(100))
    with file() as fd:
        send_with_fds(a.fileno(), b"lost\n", 0, [fd])
    fillers = [os.open(os.devnull, os.O_RDONLY)]
    descriptor_limit(fillers[0] + 20)
    with pytest.raises(OSError, match="Too many open files"):
        while True:
            fillers.append(os.dup(fillers[0]))
    batch = receiver.receive(b.fileno())
    for filler in fillers:
        os.close(filler)
    (received,) = batch.sets
    assert (lines_of(batch), received.fds, received.truncated) == ([b"lost"], [], True)


def test_must_go_on_with_lines_the_report_had_no_room_for(pair: Pair) -> None:
    """Lines beyond one report stay in the buffer, and no readiness will tell of them."""
    a, b = pair
    count = framing.MAX_ENDS + 1
    assert a.send(b"\n" * count) == count
    receiver = Receiver(LineFramer(framing.INITIAL_CAPACITY))
    assert len(receiver.receive(b.fileno()).ends) == framing.MAX_ENDS
    assert receiver.must_go_on
    assert len(receiver.receive(b.fileno()).ends) == 1
    assert not receiver.must_go_on


def test_a_full_report_of_all_that_was_there_leaves_no_question(pair: Pair) -> None:
    """The socket is known to be empty: no turn of the event loop is needed to learn it."""
    a, b = pair
    receiver = Receiver(LineFramer(100))
    a.send(b"1\n")
    assert len(receiver.receive(b.fileno(), lines=1).ends) == 1
    assert receiver.drained
    a.send(b"2\n3\n")
    assert len(receiver.receive(b.fileno(), lines=1).ends) == 1
    assert receiver.must_go_on
    assert len(receiver.receive(b.fileno(), lines=1).ends) == 1
    assert receiver.drained


def test_descriptors_behind_a_full_report_are_in_it(pair: Pair) -> None:
    """The line that they belong to is in the next one, and both ends of their read are right."""
    a, b = pair
    receiver = Receiver(LineFramer(100))
    a.send(b"1\n")
    socket.send_fds(a, [b"22\n"], [a.fileno()])
    first = receiver.receive(b.fileno(), lines=1)
    assert (lines_of(first), first.is_all) == ([b"1"], False)
    (received,) = first.sets
    assert received.end == 5  # where it starts is the kernel's: it may join both in one read
    os.close(received.fds[0])
    assert lines_of(receiver.receive(b.fileno(), lines=1)) == [b"22"]


def test_must_go_on_after_a_read_that_failed(pair: Pair) -> None:
    """A reset behind lines is told by the next call, not by readiness."""
    a, b = pair
    a.send(b"ack\n")
    b.send(b"never read")
    a.close()
    receiver = Receiver(LineFramer(100))
    receiver.receive(b.fileno())
    assert receiver.must_go_on
    receiver.receive(b.fileno())
    assert receiver.at_eof
    assert not receiver.must_go_on


def test_receive_gives_the_memory_of_a_large_line_back(pair: Pair) -> None:
    """The call after a large line finds the buffer in its usual size."""
    a, b = pair
    framer = LineFramer(2 * framing.SHRINK_ABOVE)
    framer.feed(b"x" * framing.SHRINK_ABOVE + b"\n")
    assert framer.reader.capacity > framing.SHRINK_ABOVE
    a.send(b"next\n")
    assert lines_of(Receiver(framer).receive(b.fileno())) == [b"next"]
    assert framer.reader.capacity == framing.INITIAL_CAPACITY


def test_close_of_receiver_closes_what_was_not_taken(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Descriptors of a report that nobody took, after an interrupt, are closed in the end."""
    a, b = pair
    framer = LineFramer(100)
    receiver = Receiver(framer)
    reading, writing = os.pipe()
    send_with_fds(a.fileno(), b"x\n", 0, [writing])
    os.close(writing)

    def interrupt() -> Batch:
        raise KeyboardInterrupt

    monkeypatch.setattr(framer, "take_batch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        receiver.receive(b.fileno())
    receiver.close()
    assert os.read(reading, 1) == b""
    os.close(reading)
    receiver.close()


def test_close_of_receiver_closes_the_rest_whatever_one_says(pair: Pair) -> None:
    """A descriptor that cannot be closed does not keep the others open."""
    a, b = pair
    framer = LineFramer(100)
    reading, writing = os.pipe()
    send_with_fds(a.fileno(), b"x\n", 0, [writing, writing])
    os.close(writing)
    assert framing.lib.hipc_receive(b.fileno(), framer.reader, 1) == syscalls.MORE
    os.close(framer.reader.fds[0])
    Receiver(framer).close()
    assert os.read(reading, 1) == b""
    os.close(reading)


# -- descriptor_kind -----------------------------------------------------------------------------


def test_kind_of_sockets() -> None:
    """Sockets tell family, type and whether they listen."""
    with ExitStack() as stack:
        tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        udp = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        wanted = syscalls.KIND_SOCKET | socket.AF_INET << 8
        assert descriptor_kind(tcp.fileno()) == (
            wanted | socket.SOCK_STREAM | syscalls.KIND_LISTENING
        )
        assert descriptor_kind(udp.fileno()) == wanted | socket.SOCK_DGRAM


def test_kind_of_others() -> None:
    """Pipes are FIFOs, files are others, and closed numbers are errors."""
    reading, writing = os.pipe()
    assert descriptor_kind(reading) == syscalls.KIND_FIFO
    os.close(reading)
    os.close(writing)
    with pytest.raises(OSError, match="Bad file descriptor"):
        descriptor_kind(reading)
    with file() as fd:
        assert descriptor_kind(fd) == syscalls.KIND_OTHER


# -- close_received ------------------------------------------------------------------------------


def test_close_received_clears_what_would_make_it_wait() -> None:
    """SO_LINGER of the sender goes first; a copy of the descriptor shows it."""
    with socket.socket() as kept:
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 3600))
        received = os.dup(kept.fileno())
        close_received(received)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(received)
        assert kept.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)[:4] == bytes(4)


def test_close_received_of_others() -> None:
    """What is no socket is closed just so, and a number that is not open is an error."""
    reading, writing = os.pipe()
    close_received(writing)
    assert os.read(reading, 1) == b""
    close_received(reading)
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        close_received(reading)
    assert caught.value.errno == errno.EBADF


# -- exit_with_parent ---------------------------------------------------------------------------


@pytest.mark.parametrize(("parent", "code"), [(os.getpid, 0), (lambda: 1, 1)])
def test_exit_with_parent(parent: Callable[[], int], code: int) -> None:
    """A new process goes on if its parent is there, and ends at once if it has ended already."""
    program = (
        "import sys; from handleipc.wire.syscalls import exit_with_parent;"
        "exit_with_parent(15, int(sys.argv[1])); print('went on', end='')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(parent())],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (code, "" if code else "went on")


def test_exit_with_parent_asks_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same without a process of its own; signal 0 takes the request back."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    exit_with_parent(0, os.getppid())
    assert codes == []
    exit_with_parent(0, os.getpid())
    assert codes == [1]


# -- signals -------------------------------------------------------------------------------------


@pytest.fixture
def signals_come_back() -> Iterator[None]:
    """Whatever the test does to signals, afterwards they are as they were."""
    enabled = faulthandler.is_enabled()
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    yield
    for number, handler in handlers.items():
        if handler is not None and number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    if enabled:
        faulthandler.disable()
        faulthandler.enable(file=sys.__stderr__)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGRTMAX])
def test_signals(signals_come_back: None, number: signal.Signals) -> None:
    """Blocked and ignored signals are seen, and neither is left after the reset."""
    reset_signals()
    assert not inherits_signals()
    signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    assert inherits_signals()
    reset_signals()
    assert not inherits_signals()
    signal.signal(number, signal.SIG_IGN)
    assert inherits_signals()
    reset_signals()
    assert not inherits_signals()


# -- Acceptor ------------------------------------------------------------------------------------


def test_accept_in_batches(tmp_path: Path) -> None:
    """At most the batch and the limit are accepted at once; nobody waiting is an empty list."""
    acceptor = Acceptor(3)
    path = str(tmp_path / "socket")
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        listener.listen()
        listener.setblocking(False)
        assert acceptor.accept(listener.fileno(), 10) == []
        for _ in range(6):
            stack.enter_context(socket.socket(socket.AF_UNIX)).connect(path)
        for limit, wanted in ((0, 0), (2, 2), (10, 3), (10, 1), (10, 0)):
            accepted = acceptor.accept(listener.fileno(), limit)
            assert len(accepted) == wanted
            for fd, raw in accepted:
                assert not os.get_blocking(fd)
                assert not os.get_inheritable(fd)
                assert raw == socket.AF_UNIX.to_bytes(2, "little")
                os.close(fd)


def test_accept_gives_the_peers_address() -> None:
    """Each connection comes with the kernel's bytes of its own peer."""
    acceptor = Acceptor(4)
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        listener.setblocking(False)
        clients = [
            stack.enter_context(socket.create_connection(listener.getsockname())) for _ in range(3)
        ]
        accepted = acceptor.accept(listener.fileno(), 4)
        for fd, _ in accepted:
            os.close(fd)
        ports = [int.from_bytes(raw[2:4], "big") for _, raw in accepted]
        assert ports == [client.getsockname()[1] for client in clients]
        assert all(raw[4:8] == bytes([127, 0, 0, 1]) and len(raw) == 16 for _, raw in accepted)


def test_accept_on_what_does_not_listen(pair: Pair) -> None:
    """An error of the listener is raised."""
    with pytest.raises(OSError, match="Invalid argument"):
        Acceptor(1).accept(pair[0].fileno(), 1)


def test_end_stream(pair: Pair) -> None:
    """All of the bytes and the FIN; one more once the other end has sent its own."""
    a, b = pair
    b.send(b"request")
    assert end_stream(a.fileno(), b"answer") == 6
    assert b.recv(10) == b"answer"
    assert b.recv(10) == b""
    with pytest.raises(BlockingIOError):
        a.recv(10)
    b.shutdown(socket.SHUT_WR)
    assert end_stream(a.fileno(), b"") == 1


def test_end_stream_of_a_full_socket(pair: Pair) -> None:
    """What the kernel does not take is not written, and has no FIN behind it."""
    a, b = pair
    data = bytes(8 << 20)
    written = end_stream(a.fileno(), data)
    assert 0 < written < len(data)
    received = 0
    while received < written:
        received += len(b.recv(1 << 20))
    with pytest.raises(BlockingIOError):
        b.recv(1)


def test_end_stream_of_no_connection() -> None:
    """The system's error, as an exception."""
    with pytest.raises(OSError) as caught:
        end_stream(-1, b"x")
    assert caught.value.errno == errno.EBADF
