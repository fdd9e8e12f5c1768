"""The facts about the kernel on which the design rests, asked of the kernel itself.

Nothing of handleipc runs here. A failure means that the ground has moved: find what was built on
that fact (docs: kernel-and-security, section 2) before anything else.
"""

from __future__ import annotations

import array
import errno
import os
import select
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

SO_COOKIE = 57
SO_PASSRIGHTS = 83
ROOM = socket.CMSG_SPACE(253 * 4)

Pair = tuple[socket.socket, socket.socket]


def send(sock: socket.socket, data: bytes, *sets: list[int]) -> int:
    """Write once, each set of descriptors in a control message of its own."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds)) for fds in sets]
    return sock.sendmsg([data], rights, socket.MSG_NOSIGNAL)


def receive(
    sock: socket.socket,
    size: int = 65536,
    room: int = ROOM,
    flags: int = socket.MSG_CMSG_CLOEXEC,
) -> tuple[bytes, list[int], bool]:
    """Read once: bytes, descriptors, whether the kernel dropped some."""
    data, control, result, _ = sock.recvmsg(size, room, flags)
    fds = array.array("i")
    for level, kind, content in control:
        assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        fds.frombytes(content)
    return data, fds.tolist(), bool(result & socket.MSG_CTRUNC)


def close_all(fds: list[int]) -> None:
    """Close descriptors."""
    for fd in fds:
        os.close(fd)


@contextmanager
def files(count: int) -> Iterator[list[int]]:
    """Several open files that can be told apart by their inodes."""
    fds = [os.memfd_create(f"file-{i}") for i in range(count)]
    try:
        yield fds
    finally:
        close_all(fds)


def inodes(fds: list[int]) -> list[int]:
    """Return what the descriptors refer to."""
    return [os.fstat(fd).st_ino for fd in fds]


@contextmanager
def free_slots(count: int, descriptor_limit: Callable[[int], None]) -> Iterator[None]:
    """Leave as many descriptor slots free as asked for."""
    highest = max(map(int, os.listdir("/proc/self/fd")))
    fillers = [os.open(os.devnull, os.O_RDONLY)]
    descriptor_limit(highest + 32)
    with pytest.raises(OSError, match="Too many open files"):
        while True:
            fillers.append(os.dup(fillers[0]))
    for _ in range(count):
        os.close(fillers.pop())
    try:
        yield
    finally:
        close_all(fillers)


# -- which bytes come with which descriptors -----------------------------------------------------


def test_read_stops_after_a_write_with_fds(pair: Pair) -> None:
    """A read may join plain bytes in front of a write with descriptors, and stops behind it."""
    a, b = pair
    with files(1) as fds:
        for data in (b"m1|", b"H1|", b"m2|", b"H2|", b"m3|"):
            send(a, data, *([fds] if data.startswith(b"H") else []))
    for wanted, count in ((b"m1|H1|", 1), (b"m2|H2|", 1), (b"m3|", 0)):
        data, got, _ = receive(b)
        assert (data, len(got)) == (wanted, count)
        close_all(got)


def test_two_writes_with_fds_never_arrive_in_one_read(pair: Pair) -> None:
    """Two writes with descriptors take two reads, however short they are."""
    a, b = pair
    with files(1) as fds:
        send(a, b"1", fds)
        send(a, b"2", fds)
    for wanted in (b"1", b"2"):
        data, got, _ = receive(b)
        assert data == wanted
        close_all(got)


def test_short_read_leaves_a_remainder_that_joins_the_next_fds(pair: Pair) -> None:
    """Descriptors come with the first byte; what a short read leaves joins the next set."""
    a, b = pair
    with files(2) as fds:
        send(a, b"ABCDEF", fds[:1])
        send(a, b"ghij")
        send(a, b"KLM", fds[1:])
        data, first, _ = receive(b, 1)
        assert (data, inodes(first)) == (b"A", inodes(fds[:1]))
        data, second, _ = receive(b)
        assert (data, inodes(second)) == (b"BCDEFghijKLM", inodes(fds[1:]))
        close_all(first + second)


def test_partial_write_has_sent_all_fds_with_its_first_byte(pair: Pair) -> None:
    """However few bytes the kernel takes, all descriptors have left with the first of them."""
    a, b = pair
    a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
    with files(3) as fds:
        assert 0 < send(a, b"x" * 100_000, fds) < 100_000
    data, got, _ = receive(b, 1)
    assert (data, len(got)) == (b"x", 3)
    close_all(got)
    assert receive(b)[1:] == ([], False)


def test_large_write_has_fds_only_at_its_beginning(pair: Pair) -> None:
    """A write that the kernel cuts into several buffers carries descriptors on the first alone."""
    a, b = pair
    with files(1) as fds:
        sent = send(a, b"x" * 1_000_000, fds)
    counts = []
    while sent:
        data, got, _ = receive(b, 4096)
        counts.append(len(got))
        close_all(got)
        sent -= len(data)
    assert counts[0] == 1
    assert not any(counts[1:])


def test_empty_write_drops_its_fds(pair: Pair) -> None:
    """A stream write without bytes succeeds, and its descriptors are gone without a word."""
    a, b = pair
    with files(1) as fds:
        assert send(a, b"", fds) == 0
    with pytest.raises(BlockingIOError):
        receive(b)


def test_253_fds_fit_and_254_do_not(pair: Pair) -> None:
    """One write carries at most 253 descriptors, counted over all its control messages."""
    a, b = pair
    with files(1) as fds:
        send(a, b"x", fds * 253)
        with pytest.raises(OSError, match="Invalid argument") as refused:
            send(a, b"x", fds * 254)
        assert refused.value.errno == errno.EINVAL
        with pytest.raises(OSError, match="Invalid argument"):
            send(a, b"x", fds * 200, fds * 54)
        send(a, b"y", fds * 2, fds * 3)
    _, got, _ = receive(b, 1)
    assert len(got) == 253
    close_all(got)
    _, control, _, _ = b.recvmsg(10, ROOM, socket.MSG_CMSG_CLOEXEC)
    ((_, _, content),) = control
    close_all(got := array.array("i", content).tolist())
    assert len(got) == 5


# -- what becomes of the descriptors -------------------------------------------------------------


def test_received_fds_are_inheritable_unless_asked(pair: Pair) -> None:
    """Close-on-exec is not on by itself: recvmsg must be asked for it."""
    a, b = pair
    with files(1) as fds:
        send(a, b"1", fds)
        send(a, b"2", fds)
    _, first, _ = receive(b, flags=0)
    _, second, _ = receive(b)
    assert os.get_inheritable(first[0])
    assert not os.get_inheritable(second[0])
    close_all(first + second)


def test_non_blocking_mode_is_shared_with_the_sender(pair: Pair) -> None:
    """O_NONBLOCK belongs to the open file: whoever sets it, sets it for both ends."""
    a, b = pair
    with socket.socket() as sock:
        sock.setblocking(True)
        send(a, b"x", [sock.fileno()])
        _, got, _ = receive(b)
        os.set_blocking(got[0], False)
        assert not os.get_blocking(sock.fileno())
        close_all(got)


def test_plain_recv_drops_fds(pair: Pair) -> None:
    """A read that has no room for control messages closes the descriptors silently."""
    a, b = pair
    reading, writing = os.pipe()
    send(a, b"x", [writing])
    os.close(writing)
    assert b.recv(10) == b"x"
    assert os.read(reading, 1) == b""
    os.close(reading)


def test_peek_duplicates_fds(pair: Pair) -> None:
    """A peek installs the descriptors, and the read behind it installs them again."""
    a, b = pair
    with files(1) as fds:
        send(a, b"x", fds)
    _, first, _ = receive(b, flags=socket.MSG_PEEK)
    _, second, _ = receive(b)
    assert len(first) == len(second) == 1
    assert first != second
    close_all(first + second)


def test_unread_fds_are_closed_with_the_receiver() -> None:
    """Descriptors in the queue of a socket that is closed are closed by the kernel."""
    reading, writing = os.pipe()
    a, b = socket.socketpair()
    with a, b:
        send(a, b"x", [writing])
        os.close(writing)
        os.set_blocking(reading, False)
        with pytest.raises(BlockingIOError):
            os.read(reading, 1)
    assert os.read(reading, 1) == b""
    os.close(reading)


def test_sent_fd_lives_after_the_sender_closed_it(pair: Pair) -> None:
    """On Linux a sender may close its copy at once: the one in flight keeps the file open."""
    a, b = pair
    with files(1) as fds:
        os.write(fds[0], b"kept")
        send(a, b"x", fds)
    _, got, _ = receive(b)
    assert os.pread(got[0], 10, 0) == b"kept"
    close_all(got)


def test_epoll_reports_a_closed_number_while_a_copy_is_open(pair: Pair) -> None:
    """Closing what was sent does not end its epoll registration: unregister before sending."""
    a, b = pair
    reading, writing = os.pipe()
    with select.epoll() as epoll:
        epoll.register(reading, select.EPOLLIN)
        send(a, b"x", [reading])
        os.close(reading)
        _, got, _ = receive(b)
        os.write(writing, b"y")
        assert epoll.poll(0) == [(reading, select.EPOLLIN)]
        close_all(got)
        assert epoll.poll(0) == []
    os.close(writing)


# -- truncation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [1, 2, 4])
def test_truncation_by_a_small_control_buffer_leaves_a_prefix(pair: Pair, room: int) -> None:
    """Of descriptors that do not fit, the first arrive and the rest are closed; bytes arrive."""
    a, b = pair
    with files(5) as fds:
        send(a, b"abc", fds)
        data, got, truncated = receive(b, room=socket.CMSG_LEN(room * 4))
        assert (data, inodes(got), truncated) == (b"abc", inodes(fds[:room]), True)
        close_all(got)


def test_space_for_one_fd_has_room_for_two(pair: Pair) -> None:
    """CMSG_SPACE pads: a caller that expects one descriptor may get a second."""
    a, b = pair
    with files(3) as fds:
        send(a, b"x", fds)
    _, got, truncated = receive(b, room=socket.CMSG_SPACE(4))
    assert (len(got), truncated) == (2, struct.calcsize("P") == 8)
    close_all(got)


@pytest.mark.parametrize("slots", [1, 3])
def test_truncation_by_the_descriptor_limit_leaves_a_prefix(
    pair: Pair, descriptor_limit: Callable[[int], None], slots: int
) -> None:
    """With too few free slots the first descriptors arrive, and only MSG_CTRUNC tells."""
    a, b = pair
    with files(5) as fds:
        send(a, b"abc", fds)
        with free_slots(slots, descriptor_limit):
            data, got, truncated = receive(b)
            assert (data, inodes(got), truncated) == (b"abc", inodes(fds[:slots]), True)
            close_all(got)


def test_truncation_without_a_free_slot_leaves_no_control_message(
    pair: Pair, descriptor_limit: Callable[[int], None]
) -> None:
    """With no free slot bytes and flag arrive, without any control message."""
    a, b = pair
    with files(5) as fds:
        send(a, b"abc", fds)
        with free_slots(0, descriptor_limit):
            data, control, flags, _ = b.recvmsg(10, ROOM, socket.MSG_CMSG_CLOEXEC)
    assert (data, control, flags) == (b"abc", [], socket.MSG_CTRUNC | socket.MSG_CMSG_CLOEXEC)


def test_truncation_leaves_the_next_set_whole(pair: Pair) -> None:
    """A set that was truncated does not touch the one behind it."""
    a, b = pair
    with files(3) as fds:
        send(a, b"1", fds)
        send(a, b"2", fds)
        close_all(receive(b, room=socket.CMSG_LEN(4))[1])
        data, got, truncated = receive(b)
        assert (data, inodes(got), truncated) == (b"2", inodes(fds), False)
        close_all(got)


# -- how a connection ends -----------------------------------------------------------------------


def test_survivor_reads_what_is_queued_although_writing_fails(pair: Pair) -> None:
    """After the peer closed, writes say EPIPE, and what it had sent is still there, in order."""
    a, b = pair
    with files(1) as fds:
        send(b, b"ack1\n")
        send(b, b"ack2\n", fds)
    b.close()
    with pytest.raises(BrokenPipeError):
        send(a, b"x")
    data, got, _ = receive(a)
    assert (data, len(got)) == (b"ack1\nack2\n", 1)
    close_all(got)
    assert receive(a)[0] == b""


def test_survivor_reads_what_is_queued_before_a_reset(pair: Pair) -> None:
    """A peer that left bytes unread resets, once, but only behind what it had sent."""
    a, b = pair
    send(b, b"ack\n")
    send(a, b"never read")
    b.close()
    with pytest.raises(BrokenPipeError):
        send(a, b"x")
    assert receive(a)[0] == b"ack\n"
    with pytest.raises(ConnectionResetError):
        receive(a)
    assert receive(a)[0] == b""


def test_shutdown_of_reading_stops_the_peer_and_keeps_what_is_queued(pair: Pair) -> None:
    """After SHUT_RD the peer's writes fail; bytes and descriptors queued before stay readable."""
    a, b = pair
    with files(1) as fds:
        send(b, b"ack\n", fds)
        a.shutdown(socket.SHUT_RD)
        with pytest.raises(BrokenPipeError):
            send(b, b"late\n")
    data, got, _ = receive(a)
    assert (data, len(got)) == (b"ack\n", 1)
    close_all(got)
    assert receive(a)[0] == b""
    assert send(a, b"still") == 5
    assert receive(b)[0] == b"still"


def test_shutdown_of_writing_lets_the_peer_answer(pair: Pair) -> None:
    """After SHUT_WR the peer reads all there was, then EOF, and may still write."""
    a, b = pair
    send(a, b"last\n")
    a.shutdown(socket.SHUT_WR)
    assert receive(b)[0] == b"last\n"
    assert receive(b)[0] == b""
    assert send(b, b"ack\n") == 4
    assert receive(a)[0] == b"ack\n"


# -- limits of the kernel ------------------------------------------------------------------------

IN_FLIGHT = """
    import array, errno, os, resource, select, socket

    def pair():
        a, b = socket.socketpair()
        a.setblocking(False)
        b.setblocking(False)
        return a, b

    def send(sock, count):
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file] * count))
        try:
            return sock.sendmsg([b"x"], [rights] if count else [])
        except OSError as error:
            return error.errno

    def take(sock):
        try:
            data, control, _, _ = sock.recvmsg(1, socket.CMSG_SPACE(1012))
        except BlockingIOError:
            return 0
        fds = [fd for _, _, content in control for fd in array.array("i", content)]
        for fd in fds:
            os.close(fd)
        return len(fds)

    # The limit is per user: nobody else should be this one. Root is not limited at all.
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    file = os.memfd_create("file")
    a, b = pair()
    sent = 0
    while (result := send(a, 20)) == 1:
        sent += 20
        assert sent < 1000
    # Refused as a whole, on a socket that poll calls writable and that takes plain bytes.
    assert result == errno.ETOOMANYREFS, result
    assert 60 <= sent <= 84, sent
    assert select.select([], [a], [], 0)[1] == [a]
    assert send(a, 0) == 1

    # It is the user's limit: a fresh socket, and another process of the user, are refused too.
    c, d = pair()
    assert send(c, 1) == errno.ETOOMANYREFS
    pid = os.fork()
    if pid == 0:
        e, f = pair()
        os._exit(0 if send(e, 1) == errno.ETOOMANYREFS else 1)
    assert os.waitpid(pid, 0)[1] == 0
    try:
        d.recv(1)
    except BlockingIOError:
        pass
    else:
        raise AssertionError("a byte left although its descriptors were refused")

    # Each descriptor that is received makes room again.
    got = 0
    while got < sent:
        got += take(b)
    assert got == sent
    assert send(c, 1) == 1
    assert take(d) == 1
    print("done")
"""


def test_too_many_fds_in_flight(program: Callable[[str, str], Path]) -> None:
    """ETOOMANYREFS: all or nothing, for the whole user, and the socket stays writable."""
    done = subprocess.run(
        [sys.executable, program("in_flight.py", IN_FLIGHT)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("done\n", "")


def test_peer_that_forbids_fds_refuses_them(pair: Pair) -> None:
    """With SO_PASSRIGHTS off at the receiver, a write with descriptors fails, plain ones pass."""
    a, b = pair
    try:
        b.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
    except OSError as error:
        assert error.errno == errno.ENOPROTOOPT
        pytest.skip("this kernel has no SO_PASSRIGHTS (Linux 6.16)")
    with files(1) as fds, pytest.raises(PermissionError):
        send(a, b"x", fds)
    assert send(a, b"y") == 1
    assert receive(b) == (b"y", [], False)


def test_cookie_is_equal_on_both_sides_of_an_exec() -> None:
    """A socket that a child inherits has the cookie there that its parent sees."""
    with ExitStack() as stack:
        a, b = (stack.enter_context(sock) for sock in socket.socketpair())
        cookie = b.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8)
        assert a.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8) != cookie
        code = (
            "import socket, sys; s = socket.socket(fileno=int(sys.argv[1]));"
            f"print(s.getsockopt(socket.SOL_SOCKET, {SO_COOKIE}, 8).hex(), end=''); s.detach()"
        )
        seen = subprocess.run(
            [sys.executable, "-c", code, str(b.fileno())],
            pass_fds=[b.fileno()],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    assert seen.stdout == cookie.hex()


def test_exec_keeps_no_close_on_exec_flag() -> None:
    """What a program was started with is not close-on-exec: else it would not be there."""
    a, b = socket.socketpair()
    with a, b:
        code = "import os, sys; print(os.get_inheritable(int(sys.argv[1])), end='')"
        seen = subprocess.run(
            [sys.executable, "-c", code, str(b.fileno())],
            pass_fds=[b.fileno()],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    assert seen.stdout == "True"
