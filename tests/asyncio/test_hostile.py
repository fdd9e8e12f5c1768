"""A hostile peer costs what the bounds allow, and nothing else: each attack with its bound.

``python -m tests.hostile`` measures what they cost a neighbour, and in memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator

import pytest

import handleipc
from handleipc import (
    Channel,
    ChannelBroken,
    FileDescriptor,
    Limits,
    RemoteProtocolError,
)
from handleipc.asyncio import hangups, pace
from handleipc.limits import Invitation
from handleipc.protocol.front import Hooks
from handleipc.protocol.stages import Entry, EntryState
from handleipc.protocol.timers import Timers
from handleipc.protocol.window import Window
from tests.asyncio.helpers import (
    Recorder,
    both_dialects,
    clean_registry,
    raw_peer,
    turns,
    until,
)
from tests.asyncio.test_descriptor_limits import unprivileged

# The most descriptors that one sendmsg carries (SCM_MAX_FD).
SET = 253


@contextlib.contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe, both ends closed at the end."""
    read, write = os.pipe()
    try:
        yield read, write
    finally:
        os.close(read)
        os.close(write)


def open_here() -> int:
    """Return how many descriptors are open, quickly."""
    return len(os.listdir("/proc/self/fd"))


async def most_open(channel: Channel, sock: socket.socket, steps: Iterable[Step]) -> int:
    """Write as long as the channel lives; return the most that was open here meanwhile."""
    most = 0
    for data, fds in steps:
        try:
            while not _sends(sock, data, fds):
                await asyncio.sleep(0)
        except (BrokenPipeError, ConnectionResetError):
            break
        # Read, and what was read is acknowledged.
        for _ in range(3):
            await asyncio.sleep(0)
            most = max(most, open_here())
    return most


def _sends(sock: socket.socket, data: bytes, fds: list[int]) -> bool:
    with contextlib.suppress(BlockingIOError):
        return socket.send_fds(sock, [data], fds) == len(data)
    return False


# -- descriptors ---------------------------------------------------------------------------------

Step = tuple[bytes, list[int]]
UNFINISHED = b"[1,%d" % SET
UNFINISHED_RUN = b'[4,999,"net.Socket",[1'


def _handles(channel: Channel, fd: int, size: int) -> Iterator[Step]:
    """Handles of so many descriptors, as many as are granted."""
    grants = channel._protocol.incoming.credit
    number = sent = 0
    while sent + size <= grants.descriptors or (not sent and grants.ack == number):
        number, sent = number + 1, sent + size
        yield b'[1,%d]\n[2,%d,%d,"many",1]\n' % (size, number, size), [fd] * size


def _runs(channel: Channel, fd: int) -> Iterator[Step]:
    """Runs of handles, as large as a set may be, as many as are granted."""
    grants = channel._protocol.incoming.credit
    number = 1
    while size := min(SET, grants.descriptors - number + 1):
        yield b'[4,%d,"fd",[%b]]\n' % (number, b",".join([b"1"] * size)), [fd] * size
        number += size


class _Many:
    tag = "many"

    def to_wire(self, handle: object) -> tuple[object, list[int]]:
        """Never called."""
        raise NotImplementedError

    def from_wire(self, details: object, fds: list[FileDescriptor]) -> _Held:
        """Take any number."""
        return _Held(fds)


class _Held:
    """Any number of descriptors."""

    def __init__(self, fds: list[FileDescriptor]) -> None:
        self.fds = fds

    def close(self) -> None:
        """Close them all."""
        for fd in self.fds:
            fd.close()


def _then(data: bytes) -> Callable[[Channel, int], Iterator[Step]]:
    """All that is granted, one by one, and then a set of descriptors with this."""

    def steps(channel: Channel, fd: int) -> Iterator[Step]:
        yield from _handles(channel, fd, 1)
        yield data, [fd] * SET
        yield from [(b" " if data in (UNFINISHED, UNFINISHED_RUN) else b"[0,1]\n", [])] * 5

    return steps


PINNING: dict[str, Callable[[Channel, int], Iterator[Step]]] = {
    "small handles": lambda channel, fd: _handles(channel, fd, 1),
    "handles of 60": lambda channel, fd: _handles(channel, fd, 60),
    "handles of a whole set": lambda channel, fd: _handles(channel, fd, SET),
    "runs": _runs,
    "a line that never ends": _then(UNFINISHED),
    "a run that never ends": _then(UNFINISHED_RUN),
    "a set never used up": _then(UNFINISHED + b"]\n"),
}


@pytest.mark.parametrize("read", [0, 1, 32], ids=["never read", "read once", "well read"])
@pytest.mark.parametrize("attack", PINNING)
async def test_native_descriptors_are_bounded(attack: str, read: int, monkeypatch) -> None:
    """A native peer pins a window and the larger of ``ready`` and one set, whatever it sends.

    Whether the application never read, or did before, and earned acknowledging ahead.
    """
    clean_registry(monkeypatch)
    handleipc.register(_Held, _Many())
    limits = Limits(window=256)
    async with raw_peer("native", limits) as (a, peer):
        with pipe() as (fd, _):
            a.on("error", Recorder())
            a._protocol.incoming.deliveries.pace = read
            before = open_here()
            most = await most_open(a, peer.sock, PINNING[attack](a, fd)) - before
            assert most >= 240
            assert most <= limits.window + max(limits.ready, SET)


@pytest.mark.parametrize("waits", [True, False], ids=["waits", "does not wait"])
@pytest.mark.parametrize("last", [1, SET], ids=["one", "a line that never ends"])
async def test_node_descriptors_are_bounded(last: int, waits: bool) -> None:
    """A node-dialect peer pins a window and one set, whether it waits for replies or not."""
    limits = Limits(window=256)
    line = b'{"cmd":"NODE_HANDLE","type":"net.Native","msg":1}\n'
    async with raw_peer("node", limits) as (a, peer):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            a.on("error", Recorder())
            steps = [(line, [sock.fileno()])] * (limits.window + (0 if waits else 63))
            before = open_here()
            most = await most_open(a, peer.sock, [*steps, (line[:20], [sock.fileno()] * last)])
            assert limits.window <= most - before <= limits.window + max(limits.ready, SET)


async def test_again_without_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that asks again for all its handles, and reads nothing, gets one answer into flight."""
    clean_registry(monkeypatch)
    count = 60
    async with raw_peer("native", handles=1000) as (a, peer):
        with pipe() as (fd, _):
            a.on("undelivered", lambda message, handle, reason: handle.close())
            for n in range(count):
                a.send_nowait(n, FileDescriptor(os.dup(fd)))
            await turns()
            for _ in range(9):
                # The second time its first answer lies unread, which is an end.
                with contextlib.suppress(BrokenPipeError):
                    peer.write({"cmd": "NODE_HANDLEIPC", "again": [1, count]})
                await turns(10)
            # Nothing was read so far: all of this is in the kernel.
            unread = -1
            while unread < len(peer.unread()):
                unread = len(peer.unread())
            assert count <= len(peer.fds) <= count + Limits().set_size


STARVES = """
    import asyncio, os, resource, socket
    import handleipc
    from handleipc import Channel, Connection, FileDescriptor, Limits
    from handleipc.wire.syscalls import descriptor_kind

    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
    SWITCH = b'{"cmd":"NODE_HANDLEIPC","native":2,"ack":0,"descriptors":65536,"bytes":1099511627776}\\n'

    class Many:
        def __init__(self, fd):
            self.fd = fd

    class Conversion:
        tag = "many"

        def to_wire(self, many):
            return None, [many.fd] * 60

        def from_wire(self, details, fds):
            raise NotImplementedError

    handleipc.register(Many, Conversion())

    def ends():
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        channel = Channel(ours, Limits(), inviting=True)
        theirs.send(SWITCH)
        return channel, theirs

    async def acknowledge(sock):
        # An honest neighbour: it reads, and acknowledges what comes.
        loop, count = asyncio.get_running_loop(), 0
        while True:
            await asyncio.sleep(0.001)
            try:
                data, fds, _, _ = socket.recv_fds(sock, 65536, 253)
            except BlockingIOError:
                continue
            for fd in fds:
                os.close(fd)
            count += len(fds)
            if fds:
                sock.send(b'{"cmd":"NODE_HANDLEIPC","ack":%d,"descriptors":65536,"bytes":1099511627776}\\n' % count)

    async def main():
        stopped, theirs = ends()
        good, nice = ends()
        while good.dialect != "native" or stopped.dialect != "native":
            await asyncio.sleep(0)
        reading = asyncio.ensure_future(acknowledge(nice))
        stopped.on("undelivered", lambda *what: None)
        near, far = socket.socketpair()
        for n in range(24):
            stopped.send_nowait(n, Many(near.fileno()))
        while stopped._turn_scheduled:
            await asyncio.sleep(0)
        for n in range(50):
            client, served = socket.socketpair()
            served.setblocking(False)
            connection = Connection(served.detach(), descriptor_kind(near.fileno()))
            await good.send(n, connection, timeout=20)
            client.close()
        print("done")
        stopped.abort()
        good.abort()
        reading.cancel()

    asyncio.run(main())
"""


def test_a_stopped_peer_leaves_others_their_share(program) -> None:
    """Handles of 60 descriptors to a peer that reads nothing do not stop those of another.

    The kernel counts descriptors in flight by user, not by process and not by channel.
    """
    path = program("starves.py", STARVES)
    done = subprocess.run(
        unprivileged([sys.executable, str(path)]),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


async def test_water_marks_come_before_the_table_is_full(descriptor_limit) -> None:
    """With few descriptors ``send_nowait`` says stop while there are some left."""
    descriptor_limit(128)
    async with raw_peer("native") as (a, _):
        a.on("undelivered", lambda message, handle, reason: handle.close())
        with pipe() as (fd, _):
            before = open_here()
            while a.send_nowait("x", FileDescriptor(os.dup(fd))):
                pass
            assert open_here() - before <= 64
            a.abort()
            await a.wait_disconnected()


# -- ends ----------------------------------------------------------------------------------------


@both_dialects
@pytest.mark.parametrize("what", ["send", "flush"])
async def test_a_peer_that_shuts_its_reading_side(dialect: str, what: str) -> None:
    """What was asked to be said raises, and the channel is no longer connected."""
    async with raw_peer(dialect) as (a, peer):
        peer.sock.shutdown(socket.SHUT_RD)
        async with asyncio.timeout(10):
            with pytest.raises(ChannelBroken, match="shut its reading side"):
                if what == "send":
                    await a.send("x")
                else:
                    a.send_nowait("x")
                    await a.flush()
            assert not a.connected
            with pytest.raises(ChannelBroken):
                a.send_nowait("y")
            with pytest.raises(ChannelBroken):
                await a.flush()
            await a.wait_disconnected()


async def test_nothing_is_held_once_nothing_can_be_said() -> None:
    """A node peer that shuts its reading side and floods meets a closed channel, not a full one."""
    async with raw_peer("node") as (a, peer):
        peer.sock.shutdown(socket.SHUT_RD)
        a.send_nowait("anything")
        await a.wait_disconnected()
        with pytest.raises(BrokenPipeError):
            while True:
                await asyncio.sleep(0)
                with contextlib.suppress(BlockingIOError):
                    peer.sock.send(b'"' + b"x" * 1000 + b'"\n')
        assert a._protocol.incoming.cost <= Limits().held_bytes


@both_dialects
@pytest.mark.parametrize("by", ["epoll", "polling"])
async def test_a_peer_that_ends_while_nobody_reads(
    dialect: str, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end is told behind any number of messages that nobody takes."""
    if by == "polling":
        monkeypatch.delattr("select.epoll")
        monkeypatch.setattr(hangups, "INTERVAL", 0.01)
    line = b'"%s"\n' if dialect == "node" else b'[0,"%s"]\n'
    async with raw_peer(dialect) as (a, peer):
        more = 3 * Limits().held_bytes
        for _ in range(more // 1000 if dialect == "node" else 900):
            if not _sends(peer.sock, line % (b"x" * 1000), []):
                await turns(5)
                if not a._is_reading:
                    break
        else:
            assert dialect == "native"  # which is read on, since all of it was granted
        peer.close()
        async with asyncio.timeout(10):
            await a.wait_disconnected()
        assert not a.connected


@pytest.mark.parametrize("end", ["aborts", "nothing is left to tell"])
async def test_polling_ends_with_the_last_paused_channel(
    end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an epoll, each paused channel is told by itself, and then nothing is polled."""
    monkeypatch.delattr("select.epoll")
    monkeypatch.setattr(hangups, "INTERVAL", 0.01)
    loop = asyncio.get_running_loop()
    async with raw_peer("node") as (a, first), raw_peer("node") as (b, second):
        for channel, peer in ((a, first), (b, second)):
            while not channel._watches_hangup:
                _sends(peer.sock, b'"' + b"x" * 1000 + b'"\n', [])
                await asyncio.sleep(0)
        watcher = hangups._watchers[loop]
        first.close()
        async with asyncio.timeout(10):
            await a.wait_disconnected()
        assert b.connected
        assert watcher._timer is not None
        if end == "aborts":
            b.abort()
        else:
            second.close()
        async with asyncio.timeout(10):
            await b.wait_disconnected()
        assert watcher._timer is None


async def test_a_node_peer_stopped_in_the_middle_of_a_line() -> None:
    """A Node peer that is busy for longer than ``incomplete_timeout`` keeps channel and handle."""
    limits = Limits(incomplete_timeout=0.02)
    line = b'{"cmd":"NODE_HANDLE","type":"net.Native","msg":1}\n'
    async with raw_peer("node", limits) as (a, peer):
        with socket.socket(socket.AF_UNIX) as sock:
            peer.write(line[:30], fds=(sock.fileno(),))
            await until(lambda: a._protocol.incoming.pairing.sets)
            asyncio.get_running_loop().call_later(0.3, peer.write, line[30:])
            message, handle = await a.recv()
            assert message == 1
            handle.close()


async def test_a_native_peer_that_never_ends_a_line() -> None:
    """Descriptors of an unfinished line are given up, although a byte comes now and then."""
    limits = Limits(incomplete_timeout=0.05)
    async with raw_peer("native", limits) as (a, peer):
        with pipe() as (fd, _):
            before = open_here()
            a.on("error", Recorder())
            peer.write(UNFINISHED, fds=(fd,) * 200)
            start = time.monotonic()
            while a.connected:
                assert time.monotonic() - start < 20
                _sends(peer.sock, b" ", [])
                await asyncio.sleep(0.01)
            await a.wait_disconnected()
            assert open_here() <= before
            with pytest.raises(RemoteProtocolError, match="unfinished"):
                await a.recv()


async def test_an_outage_has_one_clock(descriptor_limit) -> None:
    """Ten handles lost in one outage cost ``retry_time`` once, and so do the messages behind."""
    retry = 0.5
    async with raw_peer("native", Limits(retry_time=retry)) as (a, peer):
        a.on("error", Recorder())
        with pipe() as (fd, _):
            lines = [b'[2,%d,1,"fd",1]\n' % n for n in range(1, 11)]
            hogs: list[int] = []
            descriptor_limit(64)
            try:
                with contextlib.suppress(OSError):
                    while True:
                        hogs.append(os.dup(fd))
                start = time.monotonic()
                peer.write(b"[1,10]\n" + b"".join(lines) + b'[0,"behind"]\n', fds=(fd,) * 10)
                async with asyncio.timeout(20):
                    assert await a.recv() == ("behind", None)
                assert time.monotonic() - start < 5 * retry
            finally:
                for hog in hogs:
                    os.close(hog)


# -- memory --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "how", "most"),
    [
        ("node lines", "nobody", 16),
        ("node lines", "waits", 48),
        ("native lines", "waits", 48),
        ("native runs", "waits", 48),
        ("native text of 1 MiB", "waits", 128),
        ("native text of 64 MiB", "iteration", 320),
        ("native lists, 64 MiB", "listener", 128),
        ("node questions", "nobody", 256),
        ("native questions", "nobody", 256),
    ],
)
def test_memory_is_bounded(kind: str, how: str, most: int) -> None:
    """A flood takes no more MiB than stated: half of that is what was measured."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile.measure", kind, how, "2"],
        stdout=subprocess.PIPE,
        timeout=100,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["memory"] <= most
    # Nobody's descriptors either.
    assert found["descriptors"] <= 8


# -- half a surrogate pair -----------------------------------------------------------------------

HALVES = {
    "in a tag": b'[2,1,1,"\\ud800",1]\n',
    "in the name of an option": b'[2,1,1,"net.Socket",1,{"\\ud800":1}]\n',
    "in a code": b'{"cmd":"NODE_HANDLEIPC","refuse":[[1,1,"\\ud800"]],"ack":0}\n',
    "in the name of a control field": b'{"cmd":"NODE_HANDLEIPC","\\ud800":1}\n',
    "in a command": b'{"cmd":"\\ud800"}\n',
    "as a line": b'"\\ud800"\n',
}


@pytest.mark.parametrize("where", HALVES)
async def test_half_a_surrogate_pair(where: str) -> None:
    """It is answered with the documented errors, and everybody who waits is told."""
    line = HALVES[where]
    async with raw_peer("native") as (a, peer):
        errors = a.on("error", Recorder())
        receiving = asyncio.create_task(a.recv())
        await turns()
        with pipe() as (fd, _):
            if line.startswith(b"[2"):
                peer.write(b"[1,1]\n" + line, b'[0,"after"]\n', fds=(fd,))
            else:
                peer.write(line, b'[0,"after"]\n')
        try:
            async with asyncio.timeout(10):
                message, handle = await receiving
            assert message in (1, "after")
            if handle is not None:
                handle.close()
        except RemoteProtocolError:
            assert not a.connected
            assert len(errors.calls) == 1


# -- time ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def full_tcp() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A TCP connection with as much unsent as it takes, and the end that reads nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as far:
            near, _ = server.accept()
            with near:
                near.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        near.send(b"x" * 65536)
                yield near, far


@pytest.mark.parametrize("tag", ["nobody knows", "net.Server", "net.Socket"])
@both_dialects
async def test_a_close_never_waits(dialect: str, tag: str) -> None:
    """A connection that its sender made linger is closed at once, refused or taken."""
    with full_tcp() as (near, _):
        near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 30))
        async with raw_peer(dialect) as (a, peer):
            a.on("error", Recorder())
            a.on("message", lambda message, handle: handle is None or handle.close())
            line = b'{"cmd":"NODE_HANDLE","type":"%b","msg":1}\n{"n":2}\n'
            if dialect == "native":
                line = b'[1,1]\n[2,1,1,"%b",1]\n[0,{"n":2}]\n'
            with near:
                peer.write(line % tag.encode(), fds=(near.fileno(),))
            start = time.monotonic()
            while not a._protocol.incoming.deliveries.bytes_taken:
                await asyncio.sleep(0)
            await turns()
            assert time.monotonic() - start < 10  # and not thirty


async def test_a_write_never_waits(event_loop_name: str) -> None:
    """A connection that its sender made blocking again does not block who has it now."""
    if event_loop_name == "uvloop":
        pytest.skip("libuv writes itself")
    with socket.create_server(("127.0.0.1", 0)) as server:
        far = socket.create_connection(server.getsockname())
        near, _ = server.accept()
        with far, near:
            async with raw_peer("native") as (a, peer):
                peer.write(b'[1,1]\n[2,1,1,"net.Socket",1]\n', fds=(near.fileno(),))
                _, served = await a.recv()
                _, writer = await served.open()
                near.setblocking(True)
                # Should it block, this thread sees to it that the test ends.
                rescue = threading.Timer(20, lambda: far.shutdown(socket.SHUT_RDWR))
                rescue.start()
                start = time.monotonic()
                writer.write(b"x" * (32 << 20))
                await turns()
                assert time.monotonic() - start < 10
                rescue.cancel()
                writer.transport.abort()


@both_dialects
@pytest.mark.parametrize("taken_by", ["listener", "iteration"])
async def test_a_turn_is_as_long_as_a_slice(
    dialect: str, taken_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flood is taken in turns of ``LONG``, measured by what its lines cost, and others run."""
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(pace.time, "thread_time", lambda: clock.now)
    # Of a line; a reader's cost is counted by the message.
    cost = pace.LONG / 50
    monkeypatch.setattr(pace, "READING", cost)
    async with raw_peer(dialect) as (a, peer):
        most = 0

        def take(message: object, handle: object) -> None:
            clock.now += cost

        async def read() -> None:
            async for _ in a:
                pass

        if taken_by == "listener":
            a.on("message", take)
        else:
            reading = asyncio.create_task(read())
        line = b"1\n" if dialect == "node" else b"[0,1]\n"
        for lines in range(40):
            while not _sends(peer.sock, line * 1000, []):
                await asyncio.sleep(0)
            before = a._protocol.incoming.deliveries.bytes_taken
            await asyncio.sleep(0)
            if lines >= 20:
                most = max(most, a._protocol.incoming.deliveries.bytes_taken - before)
        assert 1 <= a._pace.lines <= 50
        assert most <= 2 * 50 * len(line)
        if taken_by == "iteration":
            reading.cancel()


async def test_runs_are_taken_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line may be a run: if it costs more than a slice, a turn takes no other."""
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(pace.time, "thread_time", lambda: clock.now)
    async with raw_peer("native") as (a, peer):

        def take(message: object, handle: object) -> None:
            clock.now += pace.LONG / 10

        a.on("message", take)
        line = b"[5,[%b]]\n" % b",".join([b"1"] * 60)
        most = 0
        for sent in range(30):
            while not _sends(peer.sock, line * 20, []):
                await asyncio.sleep(0)
            before = clock.now
            await asyncio.sleep(0)
            if sent >= 20:
                most = max(most, clock.now - before)
        assert a._pace.lines == 1
        assert most < 2 * pace.LONG * 60 / 10 + pace.LONG / 10


def test_acknowledgements_are_linear() -> None:
    """`again` for all, and then an acknowledgement for each, take time for each once."""

    def steps(count: int) -> int:
        window = Window(Limits(), Timers(float), Invitation(1 << 20, 1 << 40), Hooks())
        entries = [Entry(b"", None, None) for _ in range(count)]
        window.number(entries)
        for entry in entries:
            entry.state = EntryState.SENT
        seen = 0

        def count_one(frame: object, event: str, what: object) -> None:
            nonlocal seen
            seen += 1

        window.ask_again(1, count)
        sys.setprofile(count_one)
        try:
            for number in range(1, count + 1):
                window.acknowledge(number)
        finally:
            sys.setprofile(None)
        return seen

    assert steps(2000) <= 2 * steps(1000) + 100
    start = time.process_time()
    steps(20_000)
    assert time.process_time() - start < 5  # 28 s were it quadratic


# -- the log -------------------------------------------------------------------------------------

LOUD = {
    "stray reply": (b'{"cmd":"NODE_HANDLE_ACK"}\n', 0),
    "no descriptor": (b'{"cmd":"NODE_HANDLE","type":"net.Socket"}\n', 0),
    "a long type": (b'{"cmd":"NODE_HANDLE","type":"%b"}\n' % (b"A" * 50_000), 1),
    "a statement without a key": (b'{"cmd":"NODE_SOCKET_GET_COUNT"}\n', 0),
    "a long command": (b'{"cmd":"NODE_HANDLE%b"}\n' % (b"A" * 50_000), 0),
}


@pytest.mark.parametrize("attack", LOUD)
async def test_the_log_is_bounded(attack: str, caplog: pytest.LogCaptureFixture) -> None:
    """No line is longer than 300 characters, and there is one of a kind a minute."""
    line, fds = LOUD[attack]
    async with raw_peer("node") as (a, peer):
        with pipe() as (fd, _):
            for _ in range(100):
                try:
                    while not _sends(peer.sock, line, [fd] * fds):
                        await asyncio.sleep(0)
                except (BrokenPipeError, ConnectionResetError):
                    break
                await asyncio.sleep(0)
                peer.unread()
            await turns()
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) <= 3
    assert all(len(text) <= 300 for text in texts)
