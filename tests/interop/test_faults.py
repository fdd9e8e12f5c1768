"""Peers that break the protocol or die: clear errors, no hang, no leak (contract 5.3, 5.7, 5.8)."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

import handleipc
from tests.interop.children import PATIENCE, spawned
from tests.interop.ends import connect, receive
from tests.interop.raw import ACK, HERE, NACK, PRELUDE, envelope, raw_parent, tcp_pair


Program = Callable[[str, str], Path]

# -- what a peer writes that is no protocol ------------------------------------------------------

JUDGE = """
    async def main(parent):
        errors = []
        parent.on("error", errors.append)
        try:
            async for message, handle in parent:
                print("message", message)
        except handleipc.RemoteProtocolError as error:
            print(type(error).__name__)
            assert str(error)
            assert errors == [error], errors
        else:
            print("end")
            assert errors == [], errors
        assert not parent.connected
"""


@pytest.mark.usefixtures("child_loop")
@pytest.mark.parametrize(
    "line",
    [
        b"garbage\n",
        b"\n",
        b"  \n",
        b"NaN\n",
        b"undefined\n",
        b'{"a":1\n',
        b"\xef\xbb\xbf1\n",
        b'"\xff\xfe"\n',
        b'"\x01"\n',
        b"[" * 1000 + b"]" * 1000 + b"\n",
        b"[" * 200_000 + b"\n",
        b"1 2\n",
    ],
    ids=lambda line: repr(line[:12])[1:],
)
def test_garbage(tmp_path: Path, line: bytes) -> None:
    """A line that is no message ends the channel with ``RemoteProtocolError``; what came before counts."""
    with raw_parent(tmp_path, JUDGE) as raw:
        raw.send(b'"before"\n' + line + b'"after"\n')
        assert raw.rest() == []
        before, error = raw.finish().splitlines()
        assert before == "message before"
        assert error in ("RemoteProtocolError", "MalformedEnvelope")


@pytest.mark.usefixtures("child_loop")
@pytest.mark.parametrize(
    "rest", [b"", b'{"cmd":"NODE_HANDLE","type":"net.So'], ids=["", "mid-line"]
)
def test_end(tmp_path: Path, rest: bytes) -> None:
    """An end of the peer just ends iteration, also within a line: it may have been killed."""
    with raw_parent(tmp_path, JUDGE) as raw, tcp_pair() as (client, accepted):
        raw.send(b'"before"\n')
        if rest:
            raw.send(rest, accepted.fileno())
            accepted.close()
        assert raw.finish() == "message before\nend\n"
        if rest:
            assert client.recv(1) == b"", "the descriptor was closed"


@pytest.mark.usefixtures("child_loop")
def test_descriptor_on_a_plain_message(tmp_path: Path) -> None:
    """A descriptor that no line claims is closed, and ends the channel."""
    with raw_parent(tmp_path, JUDGE) as raw, tcp_pair() as (client, accepted):
        raw.send("plain", accepted.fileno())
        accepted.close()
        raw.send("next")
        assert raw.rest() == []
        assert raw.finish().splitlines()[-1] == "RemoteProtocolError"
        assert client.recv(1) == b""


# -- handles that are refused --------------------------------------------------------------------

REFUSE = """
    async def main(parent):
        errors = []
        parent.on("error", errors.append)
        async for message, handle in parent:
            if handle is not None:
                handle.close()
            report = [type(error).__name__ for error in errors]
            assert all(str(error) for error in errors)
            await parent.send([message, handle is not None, report])
            errors.clear()
"""


@contextmanager
def descriptors() -> Iterator[dict[str, int]]:
    """One of each kind of descriptor."""
    with (
        tcp_pair() as (_, tcp),
        socket.create_server(("127.0.0.1", 0)) as listening,
        socket.socket(type=socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as unix_dgram,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as seqpacket,
        open(os.devnull, "rb") as device,
        open(__file__, "rb") as file,
    ):
        udp.bind(("127.0.0.1", 0))
        reading, writing = os.pipe()
        with open(reading, "rb"), open(writing, "wb"):
            yield {
                "tcp": tcp.fileno(),
                "listening": listening.fileno(),
                "udp": udp.fileno(),
                "unix dgram": unix_dgram.fileno(),
                "seqpacket": seqpacket.fileno(),
                "pipe": reading,
                "device": device.fileno(),
                "file": file.fileno(),
            }


UDP4 = {"dgramType": "udp4"}


@pytest.mark.usefixtures("child_loop")
@pytest.mark.parametrize(
    ("kind", "more", "names"),
    [
        ("net.Socket", {}, []),
        ("net.Socket", {}, ["tcp", "tcp"]),
        ("net.Socket", {}, ["listening"]),
        ("net.Socket", {}, ["udp"]),
        ("net.Socket", {}, ["pipe"]),
        ("net.Socket", {}, ["file"]),
        ("net.Server", {}, ["tcp"]),
        ("net.Server", {}, ["unix dgram"]),
        ("net.Native", {}, ["udp"]),
        ("net.Native", {}, ["device"]),
        ("net.Native", {}, ["seqpacket"]),
        ("dgram.Socket", UDP4, ["tcp"]),
        ("dgram.Socket", {"dgramType": "udp6"}, ["udp"]),
        ("dgram.Socket", {"dgramType": 4}, ["udp"]),
        ("dgram.Socket", {}, ["udp"]),
        ("dgram.Native", {}, ["unix dgram"]),
        ("unknown", {}, ["tcp"]),
        ("", {}, ["tcp"]),
        (None, {}, ["tcp"]),
        (["net.Socket"], {}, ["tcp"]),
    ],
    ids=repr,
)
def test_refused_handle(tmp_path: Path, kind: Any, more: dict[str, Any], names: list[str]) -> None:
    """Missing or surplus descriptor, unknown type, wrong kind: one NACK, "error", the channel lives."""
    with raw_parent(tmp_path, REFUSE) as raw, descriptors() as fds:
        raw.send(envelope(kind, "refused", **more), *(fds[name] for name in names))
        assert raw.recv() == NACK
        raw.send("plain")
        message, handle, errors = raw.recv()
        assert (message, handle, len(errors)) == ("plain", False, 1)
        raw.send(envelope("net.Socket", "good"), fds["tcp"])
        assert raw.recv() == ACK
        assert raw.recv() == ["good", True, []]
        assert raw.disconnect() == []
        raw.finish()


# -- a child that breaks the protocol --------------------------------------------------------------

RAW_CHILD = """
    import os, socket, sys
    sock = socket.socket(fileno=int(os.environ["NODE_CHANNEL_FD"]))
    sock.sendall(eval(sys.argv[1]))
    try:
        sock.recv(1)  # until the parent ends the channel
    except ConnectionResetError:
        pass  # without having read all of it
    print("seen", flush=True)
"""


async def test_line_too_long(program: Program) -> None:
    """A line longer than ``Limits.line`` ends the channel with ``LineTooLong``; the child lives on."""
    limits = handleipc.Limits(line=10_000)
    child_program = program("child.py", RAW_CHILD)
    argv: list[str | Path] = [sys.executable, child_program, "b'1\\n\"' + b'x' * 10_001"]
    async with spawned(*argv, limits=limits, stdout=subprocess.PIPE) as child:
        errors: list[BaseException] = []
        child.on("error", errors.append)
        assert await child.recv() == (1, None)
        with pytest.raises(handleipc.LineTooLong, match="10000") as caught:
            await child.recv()
        assert caught.value.limit == 10_000
        assert errors == [caught.value]
        assert child.stdout is not None
        assert await child.stdout.read() == b"seen\n"
        assert await child.wait() == 0


async def test_broken_child_does_not_touch_another(node: str, program: Program) -> None:
    """A child that writes garbage loses its own channel; another child notices nothing."""
    echo = program("echo.js", "process.on('message', (m) => process.send(m));")
    child_program = program("child.py", RAW_CHILD)
    argv: list[str | Path] = [sys.executable, child_program, "b'garbage\\n'"]
    async with spawned(node, echo) as good, spawned(*argv, stdout=subprocess.DEVNULL) as bad:
        bad.on("error", lambda error: None)
        with pytest.raises(handleipc.RemoteProtocolError):
            await bad.recv()
        with pytest.raises(handleipc.ChannelBroken):
            await bad.send("late")
        await good.send("hello")
        assert await good.recv() == ("hello", None)
        good.disconnect()
        assert await good.wait() == 0
        assert await bad.wait() == 0


# -- deaths --------------------------------------------------------------------------------------

STOPS = "process.on('message', (m) => { if (m === 'stop') process.kill(process.pid, 'SIGSTOP'); });"


async def stopped(pid: int) -> None:
    """Wait until a child process has stopped itself."""
    await asyncio.to_thread(os.waitid, os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)


async def pairs(count: int) -> list[tuple[socket.socket, handleipc.Connection]]:
    """Return clients, each with the connection accepted from it."""
    found = []
    async with handleipc.listen("127.0.0.1", 0) as server:
        for _ in range(count):
            client = connect(server.sockname, socket.AF_INET)
            found.append((client, await anext(server)))
    return found


async def test_node_child_killed_with_handles_in_flight(node: str, program: Program) -> None:
    """A child dies before it could acknowledge: every handle comes back, usable, and nothing hangs."""
    async with spawned(node, program("child.js", STOPS)) as child:
        events: list[str] = []
        child.on("disconnect", lambda: events.append("disconnect"))
        child.on("exit", lambda code, sig: events.append("exit"))
        child.on("close", lambda code, sig: events.append("close"))
        await child.send("stop")
        await stopped(child.pid)
        given = await pairs(3)
        sends = [
            asyncio.create_task(child.send(n, connection))
            for n, (_, connection) in enumerate(given)
        ]
        plain = asyncio.create_task(child.send("behind"))
        flush = asyncio.create_task(child.flush())
        await asyncio.sleep(0)
        child.kill(signal.SIGKILL)
        outcomes = await asyncio.gather(*sends, return_exceptions=True)
        for (client, connection), outcome in zip(given, outcomes, strict=True):
            assert isinstance(outcome, handleipc.HandleNotDelivered), outcome
            assert outcome.handle is connection
            assert outcome.reason
            await connection.end(b"back")
            assert await receive(client) == b"back"
            client.close()
        with pytest.raises(handleipc.ChannelBroken):
            await plain
        with pytest.raises(handleipc.ChannelBroken):
            await flush
        assert [m async for m in child] == []
        assert await child.wait() == -signal.SIGKILL
    assert events == ["disconnect", "exit", "close"]


async def test_node_child_killed_under_load(node: str, program: Program) -> None:
    """A child is killed in a stream of handles: each is delivered or given back, none is lost."""
    text = """
        let taken = 0;
        process.on('message', (m, socket) => {
          if (++taken === 20) process.kill(process.pid, 'SIGKILL');
        });
    """
    async with spawned(node, program("child.js", text)) as child:
        given = await pairs(50)
        outcomes = await asyncio.gather(
            *(child.send(n, connection) for n, (_, connection) in enumerate(given)),
            return_exceptions=True,
        )
        delivered = outcomes.count(None)
        assert 19 <= delivered < 50
        for (client, connection), outcome in zip(given, outcomes, strict=True):
            if outcome is None:
                assert connection.closed
                assert await receive(client) == b"", "closed with the child that had it"
            else:
                assert isinstance(outcome, handleipc.HandleNotDelivered), outcome
                await connection.end(b"back")
                assert await receive(client) == b"back"
            client.close()
        assert await child.wait() == -signal.SIGKILL


def expect_line(stream: IO[str], line: str) -> None:
    """Read one line and compare."""
    assert stream.readline() == line + "\n"


@contextmanager
def family(*argv: str | Path) -> Iterator[subprocess.Popen[str]]:
    """Run a parent whose child shares its pipes, so that their end is the end of both."""
    with subprocess.Popen(
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(HERE)},
    ) as parent:
        try:
            yield parent
        finally:
            parent.kill()


NODE_PARENT = """
    const child = require('child_process')
      .spawn(process.argv[2], process.argv.slice(3), { stdio: [0, 1, 2, 'ipc'] });
    child.on('message', (m) => { if (m === 'stop') process.kill(process.pid, 'SIGSTOP'); });
"""


def test_node_parent_killed_with_a_handle_in_flight(
    node: str, program: Program, child_loop: str
) -> None:
    """Node dies before it could acknowledge: the handle comes back, the channel ends, no leak."""
    child = program("child_program.py", "pass")
    child.write_text(
        PRELUDE
        + program(
            "text.py",
            """
            async def main(parent):
                events = []
                parent.on("disconnect", lambda: events.append("disconnect"))
                client, accepted = socket.socketpair()
                with client, accepted:
                    await parent.send("stop")
                    sys.stdin.readline()
                    send = asyncio.create_task(parent.send("take it", accepted))
                    behind = asyncio.create_task(parent.send("behind"))
                    await asyncio.sleep(0)
                    print("sent", flush=True)
                    try:
                        await send
                    except handleipc.HandleNotDelivered as error:
                        assert error.handle is accepted
                        accepted.sendall(b"still usable")
                        assert client.recv(100) == b"still usable"
                    else:
                        raise AssertionError("nobody can have acknowledged it")
                    try:
                        await behind
                    except handleipc.ChannelBroken:
                        pass
                    assert [m async for m in parent] == []
                    await asyncio.sleep(0)
                    assert events == ["disconnect"], events
                print("well", flush=True)
            """,
        ).read_text()
        + "\nrun(main)\n"
    )
    argv: list[str | Path] = [
        node,
        program("parent.js", NODE_PARENT),
        sys.executable,
        "-W",
        "error",
        child,
    ]
    with family(*argv) as parent:
        os.waitid(os.P_PID, parent.pid, os.WSTOPPED | os.WNOWAIT)
        assert parent.stdin is not None and parent.stdout is not None
        parent.stdin.write("go\n")
        parent.stdin.flush()
        expect_line(parent.stdout, "sent")
        parent.kill()
        assert parent.communicate(timeout=PATIENCE) == ("well\n", "")


def test_node_parent_killed_before_we_read_its_handle(
    node: str, program: Program, child_loop: str
) -> None:
    """A handle of a Node that died meanwhile is delivered or closed; iteration ends, no leak."""
    child = program("child_program.py", "pass")
    child.write_text(
        PRELUDE
        + program(
            "text.py",
            """
            async def main(parent):
                await parent.send("go")
                sys.stdin.readline()  # reads nothing meanwhile
                async for message, handle in parent:
                    if handle is not None:
                        handle.close()
                print("end", flush=True)
            """,
        ).read_text()
        + "\nrun(main)\n"
    )
    text = """
        const net = require('net');
        const child = require('child_process')
          .spawn(process.argv[2], process.argv.slice(3), { stdio: [0, 1, 2, 'ipc'] });
        const server = net.createServer({ pauseOnConnect: true }).listen(0, '127.0.0.1', () => {
          net.connect(server.address());
          server.on('connection', (socket) => child.once('message', () => {
            child.send('plain');
            child.send('handle', socket, () => process.kill(process.pid, 'SIGSTOP'));
          }));
        });
    """
    argv: list[str | Path] = [
        node,
        program("parent.js", text),
        sys.executable,
        "-W",
        "error",
        child,
    ]
    with family(*argv) as parent:
        os.waitid(os.P_PID, parent.pid, os.WSTOPPED | os.WNOWAIT)
        parent.kill()
        os.waitid(os.P_PID, parent.pid, os.WEXITED | os.WNOWAIT)
        assert parent.communicate("go\n", timeout=PATIENCE) == ("end\n", "")


def test_python_child_killed_under_node(node: str, program: Program, child_loop: str) -> None:
    """A Python child is killed in a stream of handles: its Node parent survives and learns of it."""
    child = program(
        "child_program.py",
        """
        import os
        from child import run

        async def main(parent):
            for _ in range(3):
                await parent.recv()
            os.kill(os.getpid(), 9)

        run(main)
        """,
    )
    text = """
        const net = require('net');
        const child = require('child_process')
          .spawn(process.argv[2], process.argv.slice(3), { stdio: [0, 1, 2, 'ipc'] });
        child.on('close', (code, signal) => { console.log(code, signal); process.exit(); });
        const server = net.createServer({ pauseOnConnect: true }).listen(0, '127.0.0.1', () => {
          for (let i = 0; i < 10; i++) net.connect(server.address()).on('error', () => {});
        });
        server.on('connection', (socket) => child.send('take', socket, () => {}));
    """
    with family(node, program("parent.js", text), sys.executable, child) as parent:
        assert parent.communicate(timeout=PATIENCE) == ("null SIGKILL\n", "")
        assert parent.returncode == 0


def test_python_parent_killed_over_node(node: str, program: Program) -> None:
    """When a Python parent is killed, its Node child sees "disconnect" and can end."""
    child = program(
        "child.js",
        """
        process.on('message', (m, server) => { server.close(); process.send('up'); });
        process.on('disconnect', () => require('fs').writeSync(1, 'disconnect\\n'));
        """,
    )
    parent_program = program(
        "parent.py",
        """
        import asyncio, os, signal, sys
        import handleipc

        async def main():
            child = await handleipc.spawn(*sys.argv[1:])
            async with handleipc.listen("127.0.0.1", 0) as server:
                await child.send("server", server)
                assert await child.recv() == ("up", None)
                os.kill(os.getpid(), signal.SIGKILL)

        asyncio.run(main())
        """,
    )
    with family(sys.executable, parent_program, node, child) as parent:
        assert parent.communicate(timeout=PATIENCE) == ("disconnect\n", "")
        assert parent.returncode == -signal.SIGKILL


async def test_child_that_never_opens_its_channel(program: Program) -> None:
    """A child that ends without opening its channel gives every handle back: an error, no hang."""
    ((client, connection),) = await pairs(1)
    with client:
        async with spawned(sys.executable, program("child.py", "import sys; sys.exit(5)")) as child:
            with pytest.raises(handleipc.HandleNotDelivered) as caught:
                await child.send("take it", connection)
            assert caught.value.handle is connection
            assert await child.wait() == 5
        await connection.end(b"back")
        assert await receive(client) == b"back"
