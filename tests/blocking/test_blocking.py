"""Channels without an event loop: the same promises, one call at a time, from any thread."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

import handleipc
from handleipc import blocking
from handleipc.asyncio import runner

Program = Callable[[str], Path]

ECHO = """
parent = handleipc.blocking.parent()
for message, handle in parent:
    if message == "end":
        break
    parent.send(message, handle)
"""


@contextmanager
def client(server: blocking.Server) -> Iterator[socket.socket]:
    """A connected client of a server."""
    with socket.create_connection(server.sockname[:2], timeout=20) as sock:
        yield sock


# -- messages -------------------------------------------------------------------------------------


def test_messages_and_the_end(program: Program) -> None:
    """Each call waits; iteration ends with the child, which ends by itself."""
    with blocking.fork(program(ECHO)) as child:
        child.ready(timeout=30)
        assert child.dialect == "native"
        stats = child.stats()
        assert (stats.pid, stats.state, stats.opened) == (child.pid, "open", True)
        assert stats.connections == child.connections == 0
        for message in (1, "two", {"three": [3]}, None):
            child.send(message)
            assert child.recv(timeout=30) == (message, None)
        child.send("end")
        assert list(child) == []
        assert child.wait(timeout=30) == 0
    assert (child.exited, child.exit_code, child.signal) == (True, 0, None)
    assert not child.connected


def test_what_the_end_of_a_program_leaves(program: Program) -> None:
    """Messages leave although the program just ends, and a crash has its name."""
    path = program(
        """
parent = handleipc.blocking.parent()
parent.send("x" * 300000)
parent.send("last")
raise SystemExit(int(sys.argv[1]))
"""
    )
    with blocking.fork(path, "0") as child:
        assert [len(message) for message, _ in child] == [300000, 4]
    with blocking.fork(path, "3") as child:
        assert len(child.recv()[0]) == 300000
        assert child.recv() == ("last", None)
        with pytest.raises(handleipc.ChannelBroken, match="code 3") as broken:
            child.recv()
        assert broken.value.exit_code == 3


def test_timeouts(program: Program) -> None:
    """What waits too long raises, has taken nothing, and goes on."""
    with blocking.fork(program(ECHO)) as child:
        for wait in (child.recv, child.wait, child.wait_disconnected):
            with pytest.raises(TimeoutError):
                wait(timeout=0.01)
        child.send("still there", timeout=30)
        assert child.recv() == ("still there", None)
    with blocking.listen("127.0.0.1", 0) as server, pytest.raises(TimeoutError):
        server.accept(timeout=0.01)


def test_an_exception_kills_the_child(program: Program) -> None:
    """No process outlives its block."""
    with pytest.raises(ZeroDivisionError), blocking.fork(program(ECHO)) as child:
        child.ready()
        raise ZeroDivisionError
    assert child.signal == signal.SIGKILL


def test_files_for_pipes(program: Program) -> None:
    """``PIPE`` gives files, as subprocess does."""
    path = program("sys.stdout.write(sys.stdin.readline().upper())")
    pipe = subprocess.PIPE
    with blocking.fork(path, stdin=pipe, stdout=pipe) as child:
        child.stdin.write(b"words\n")
        assert child.stdout.read() == b"WORDS\n"
        assert child.stderr is None
    assert child.stdin.closed
    assert child.stdout.closed
    with pytest.raises(FileNotFoundError):
        blocking.spawn("/no/program", stdout=pipe, stderr=pipe)


# -- handles --------------------------------------------------------------------------------------


def test_a_connection_is_answered_by_the_child(program: Program) -> None:
    """The first program of the README, without an event loop at either end."""
    path = program(
        """
for message, connection in handleipc.blocking.parent():
    connection.end(b"Child handled it.")
"""
    )
    with blocking.fork(path) as child, blocking.listen("127.0.0.1", 0) as server:
        with client(server) as sock:
            connection = server.accept(timeout=30)
            child.send("socket", connection)
            assert sock.recv(100) == b"Child handled it."
            assert sock.recv(100) == b""
        assert connection.closed
        server.close()
        server.wait_closed(timeout=30)


def test_a_connection_there_and_back(program: Program) -> None:
    """It comes back as a connection of this front, becomes a blocking socket, and is counted."""
    with blocking.fork(program(ECHO)) as child, blocking.listen("127.0.0.1", 0) as server:
        with client(server) as sock:
            child.send("socket", server.accept())
            message, connection = child.recv()
            assert (message, type(connection)) == ("socket", blocking.Connection)
            assert server.get_connections() == 1
            with connection.socket() as served:
                assert served.gettimeout() is None
                sock.sendall(b"hello")
                assert served.recv(5) == b"hello"
            assert server.get_connections() == 0
        server.close()
        server.wait_closed(timeout=30)


def test_a_server_is_handed_over(program: Program) -> None:
    """The child accepts from it, also when it is given away."""
    path = program(
        """
message, server = handleipc.blocking.parent().recv()
for connection in server:
    connection.end(message.encode())
    break
"""
    )
    with blocking.listen("127.0.0.1", 0) as server, blocking.fork(path) as child:
        address = server.sockname
        child.send("served", server, transfer=True)
        assert server.closed
        with socket.create_connection(address[:2], timeout=20) as sock:
            assert sock.recv(100) == b"served"


def test_what_is_not_delivered_comes_back(program: Program) -> None:
    """The very object that was sent is in the exception, and usable."""
    path = program("handleipc.blocking.parent(accept_handles=False).recv()")
    with blocking.listen("127.0.0.1", 0) as server, client(server) as sock:
        connection = server.accept()
        with blocking.fork(path) as child:
            child.ready()
            for handle in (connection, server):
                with pytest.raises(handleipc.HandleNotDelivered) as back:
                    child.send("no", handle)
                assert back.value.handle is handle
            with pytest.raises(handleipc.HandleError):
                child.send("no", object())
            child.send("end")
        connection.end(b"still here")
        assert sock.recv(100) == b"still here"
        with client(server) as other:
            server.accept(timeout=20).end(b"and the server")
            assert other.recv(100) == b"and the server"


@pytest.mark.parametrize("data", ["text", 5, None])
def test_what_cannot_be_written_leaves_the_connection(data: object) -> None:
    """As on asyncio, it is as it was."""
    ours, theirs = socket.socketpair()
    with theirs, blocking.Connection.from_socket(ours) as connection:
        with pytest.raises(TypeError):
            connection.end(data)
        connection.end(b"all the same")
        assert theirs.recv(100) == b"all the same"


def test_what_is_refused_before_it_begins(program: Program) -> None:
    """An argument that makes no sense, or a connection that is gone: the caller is told at once."""
    with pytest.raises(ValueError, match="70000 is no port"):
        blocking.listen("127.0.0.1", 70000)
    with pytest.raises(TypeError, match="needs the program"):
        blocking.spawn()
    ours, theirs = socket.socketpair()
    with theirs:
        connection = blocking.Connection.from_socket(ours)
        connection.close()
        with pytest.raises(handleipc.DescriptorReleased, match="this Connection is closed"):
            connection.end(b"late")


def test_a_stopped_server_serves_its_last(program: Program) -> None:
    """Iteration ends behind those who were there; taking one by one says so."""
    server = blocking.listen("127.0.0.1", 0)
    with client(server), client(server):
        server.stop()
        taken = list(server)
        assert len(taken) == 2
        with pytest.raises(handleipc.ChannelClosed, match="this server is closed"):
            server.accept()
        for connection in taken:
            connection.close()


def test_node_on_the_other_side(program: Program, node: str, tmp_path: Path) -> None:
    """A Node child takes the connection, and a Python script is the child of a Node parent."""
    path = tmp_path / "child.js"
    path.write_text(
        "process.on('message', (m, socket) => { socket.end('Node handled it.'); "
        "socket.on('close', () => process.disconnect()) })"
    )
    with blocking.spawn(node, path) as child, blocking.listen("127.0.0.1", 0) as server:
        with client(server) as sock:
            child.send("socket", server.accept())
            assert sock.makefile().read() == "Node handled it."
        assert child.wait(timeout=30) == 0
    script = tmp_path / "parent.js"
    script.write_text(
        f"""
const child = require('child_process').spawn({sys.executable!r}, [{str(program(ECHO))!r}],
    {{stdio: [0, 1, 2, 'ipc']}})
child.on('message', m => {{ console.log(m); child.disconnect() }})
child.send('from Node')
"""
    )
    done = subprocess.run([node, script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("from Node\n", "")


# -- threads and interruptions --------------------------------------------------------------------


def test_many_threads_send_while_one_receives(program: Program) -> None:
    """One thread runs the loop for all, and whoever still waits takes over from it."""
    with blocking.fork(program(ECHO)) as child:
        got = []

        def receive() -> None:
            got.extend(child.recv()[0] for _ in range(400))

        def send(first: int) -> None:
            for number in range(first, first + 100):
                child.send(number)

        threads = [threading.Thread(target=receive)]
        threads += [threading.Thread(target=send, args=(n * 100,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted(got) == list(range(400))
        for first in range(0, 400, 100):  # each thread's in its order
            assert [n for n in got if first <= n < first + 100] == list(range(first, first + 100))


def test_a_reader_that_leads_hands_the_loop_on(program: Program) -> None:
    """The thread that runs the loop returns, and the call of the other goes on."""
    with blocking.fork(program(ECHO)) as child:
        ended = threading.Thread(target=child.wait)
        ended.start()
        for number in range(20):
            child.send(number)
            assert child.recv() == (number, None)
        child.send("end")
        ended.join(30)
        assert not ended.is_alive()


def test_one_reader_at_a_time(program: Program) -> None:
    """Two that wait for the next message would share it by chance."""
    with blocking.fork(program(ECHO)) as child:
        child.ready()
        waits = threading.Thread(target=child.recv)
        waits.start()
        deadline = time.monotonic() + 30
        while True:
            try:
                child.recv(timeout=0.001)
            except handleipc.ChannelBusy:
                break
            except TimeoutError:
                assert time.monotonic() < deadline
        child.send("for the first")
        waits.join(30)
        assert not waits.is_alive()


class Stop(Exception):
    """What a signal handler raises."""


@contextmanager
def interrupted_by_usr1() -> Iterator[None]:
    """Have SIGUSR1 raise ``Stop`` where a call waits; a program has more such places."""

    def stop(_: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code is runner._Selector.select.__code__:
                raise Stop
            frame = frame.f_back

    before = signal.signal(signal.SIGUSR1, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_an_interrupted_call_loses_nothing(program: Program) -> None:
    """A handler that raises ends the call wherever it is; what had come is there for the next."""
    path = program(
        """
parent = handleipc.blocking.parent()
ours, theirs = socket.socketpair()
for number in range(200):
    parent.send(number, handleipc.FileDescriptor(os.dup(ours.fileno())))
    os.kill(os.getppid(), signal.SIGUSR1)
parent.send("end")
parent.recv()
"""
    )
    with interrupted_by_usr1(), blocking.fork(path) as child:
        got = []
        stops = 0
        while "end" not in got:
            try:
                message, handle = child.recv(timeout=60)
                got.append(message)
                if handle is not None:
                    handle.close()
            except Stop:
                stops += 1
        assert [n for n in got if n != "end"] == sorted(set(range(200)) & set(got))
        child.send("end")
    assert stops


def test_an_interrupted_send_leaves_the_handle_here(program: Program) -> None:
    """Before its first byte has left it is withdrawn, as a cancelled one."""
    path = program("handleipc.blocking.parent(); print('up', flush=True); time.sleep(60)")
    with interrupted_by_usr1(), blocking.fork(path, stdout=subprocess.PIPE) as child:
        assert child.stdout.read(3) == b"up\n"
        with pytest.raises(TimeoutError):
            child.send("fills" * 100000, timeout=0.05)
        ours, theirs = socket.socketpair()
        connection = blocking.Connection.from_socket(ours)
        timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1))
        timer.start()
        with pytest.raises(Stop):
            child.send("x", connection)
        timer.join()
        child.kill(signal.SIGKILL)
        child.wait()
        if not connection.closed:
            connection.close()
        theirs.close()


def test_inside_an_event_loop_it_is_refused(program: Program) -> None:
    """There it would stand still; the text says what to use."""

    async def main() -> None:
        with pytest.raises(RuntimeError, match="use handleipc itself, with await"):
            blocking.listen("127.0.0.1", 0)

    asyncio.run(main())


# -- silence, copies, ends ------------------------------------------------------------------------


def test_silence_between_calls_breaks_nothing(program: Program) -> None:
    """Clocks over the peer start when somebody looks: it had no chance to be answered before."""
    limits = handleipc.Limits(incomplete_timeout=0.05)
    path = program(
        """
parent = handleipc.blocking.parent()
fd = parent._channel._link.fd
null = os.open(os.devnull, os.O_RDONLY)
sock = socket.socket(fileno=os.dup(fd))
parent.send("half")
sock.sendmsg([b'[1,1]\\n'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, null.to_bytes(4, sys.byteorder))])
sys.stdin.readline()
sock.sendall(b'[2,1,1,"fd","whole"]\\n')
sys.stdout.write("sent")
sys.stdout.flush()
sys.stdin.readline()
"""
    )
    pipe = subprocess.PIPE
    with blocking.fork(path, limits=limits, stdin=pipe, stdout=pipe) as child:
        assert child.recv() == ("half", None)
        time.sleep(0.1)  # longer than the limit: nobody looks
        child.stdin.write(b"\n")
        assert child.stdout.read(4) == b"sent"
        message, handle = child.recv(timeout=20)
        handle.close()
        assert message == "whole"
        child.stdin.write(b"\n")


def test_a_forked_copy_owns_nothing(program: Program) -> None:
    """It is refused, may have channels of its own, and its end touches none of the original's."""
    path = program(ECHO)
    with blocking.fork(path) as child, blocking.listen("127.0.0.1", 0) as server:
        child.send(1)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                with pytest.raises(handleipc.ForkedCopy):
                    child.send(2)
                with pytest.raises(handleipc.ForkedCopy):
                    child.recv()
                with pytest.raises(handleipc.ForkedCopy):
                    child.kill()
                with blocking.fork(path) as own:
                    own.send("own")
                    code = 0 if own.recv(timeout=30) == ("own", None) else 2
                runner._close()
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert child.recv() == (1, None)
        child.send(3)
        assert child.recv() == (3, None)
        with client(server):
            server.accept(timeout=20).close()


def test_a_copy_of_a_program_ends_without_a_word(program: Program) -> None:
    """fork(2) in a script with a channel: the copy's end says nothing, and the original works."""
    script = program(
        f"""
child = handleipc.blocking.fork({str(program(ECHO))!r})
child.send(1)
pid = os.fork()
if pid == 0:
    sys.exit(0)
assert os.waitpid(pid, 0)[1] == 0
print(child.recv()[0])
child.send("end")
print(child.wait())
"""
    )
    done = subprocess.run(
        [sys.executable, "-X", "dev", script], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("1\n0\n", "")


def test_ctrl_c_ends_a_script(program: Program) -> None:
    """The call that waits raises KeyboardInterrupt, and the block ends its child."""
    script = program(
        f"""
with handleipc.blocking.fork({str(program(ECHO))!r}) as child:
    child.ready()
    print(child.pid, flush=True)
    child.recv()
"""
    )
    with subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that started the tests in the background has it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as running:
        try:
            pid = int(running.stdout.readline())
            running.send_signal(signal.SIGINT)
            _, said = running.communicate(timeout=60)
        finally:
            running.kill()
    assert said.rstrip().endswith("KeyboardInterrupt")
    assert running.returncode == -signal.SIGINT
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_what_is_written_is_that_of_the_asyncio_front() -> None:
    """Both fronts have the same words, but for what only an event loop can do."""
    only_asyncio = {
        "Channel": {"batches", "drain", "off", "on", "once", "send_many", "send_nowait", "EVENTS"},
        "Connection": {"open", "start"},
        "Server": {"batches", "off", "on", "once", "pause", "resume", "EVENTS", "tag"},
    }
    only_asyncio["Child"] = only_asyncio["Channel"]
    for name, missing in only_asyncio.items():
        theirs = {n for n in dir(getattr(handleipc, name)) if not n.startswith("_")}
        ours = {n for n in dir(getattr(blocking, name)) if not n.startswith("_")}
        assert theirs - ours == missing | ({"lists"} & theirs), name
        assert ours - theirs <= {"accept"}, name


def test_the_blocking_front_gives_the_message() -> None:
    """``recv`` does not look: the object does, when it is used."""
    ours, theirs = socket.socketpair()
    channel = blocking.Channel.over(ours, role="parent")
    channel._channel._protocol.incoming.deliveries.pace = 32  # one that has read all the time
    hello = b'{"cmd":"NODE_HANDLEIPC","native":2,"ack":0,"descriptors":100,"bytes":1000000}\n'
    with theirs:
        theirs.sendall(hello)
        reading, writing = os.pipe()
        socket.send_fds(theirs, [b'[4,1,"net.Socket",["c"]]\n'], [reading])
        os.close(reading)
        os.close(writing)
        theirs.sendall(b'[0,"plain"]\n')
        message, connection = channel.recv(timeout=30)
        assert message == "c"
        with pytest.raises(ConnectionAbortedError):
            connection.fileno()
        connection.close()
        assert channel.recv(timeout=30) == ("plain", None)
        channel.abort()
