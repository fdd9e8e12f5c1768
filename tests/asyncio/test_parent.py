"""``parent``: a child adopts the channel it was started with, and nothing else."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import handleipc
from handleipc import ChannelBusy, Limits, NoChannel
from handleipc.asyncio import process


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not asked for its channel yet."""
    monkeypatch.setattr(process, "_parent", None)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # adopting a channel changes it
    for name in list(os.environ):
        if name.startswith(("NODE_CHANNEL_", "HANDLEIPC_")):
            monkeypatch.delenv(name)


@pytest.fixture
def inherited(monkeypatch: pytest.MonkeyPatch):
    """A socket as a parent passes it, and the parent's end; the variable names it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.set_inheritable(True)
        monkeypatch.setenv("NODE_CHANNEL_FD", str(theirs.fileno()))
        monkeypatch.setenv("NODE_CHANNEL_SERIALIZATION_MODE", "json")
        yield ours, theirs


def _end(channel: handleipc.Channel, theirs: socket.socket) -> None:
    channel.abort()
    theirs.detach()


async def test_no_variable() -> None:
    """A process started without a channel has none, and is told how to get one."""
    with pytest.raises(NoChannel, match="fork"):
        await handleipc.parent()


@pytest.mark.parametrize("text", ["", "three", "3x", "-1", " 3", "3.0", "0x3", "\u0663"])
async def test_no_number(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no descriptor number names no channel, and the variable goes."""
    monkeypatch.setenv("NODE_CHANNEL_FD", text)
    with pytest.raises(NoChannel):
        await handleipc.parent()
    assert "NODE_CHANNEL_FD" not in os.environ


async def test_huge_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number beyond every descriptor names no channel."""
    for text in ("1000000", str(2**31), str(2**70)):
        monkeypatch.setenv("NODE_CHANNEL_FD", text)
        with pytest.raises(NoChannel):
            await handleipc.parent()


async def test_closed_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that is not open names no channel."""
    fd = os.open(os.devnull, os.O_RDONLY)
    os.close(fd)
    monkeypatch.setenv("NODE_CHANNEL_FD", str(fd))
    with pytest.raises(NoChannel, match="not open"):
        await handleipc.parent()


async def test_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is no channel, and stays as it was."""
    with open(tmp_path / "file", "w") as file:
        os.set_inheritable(file.fileno(), True)
        monkeypatch.setenv("NODE_CHANNEL_FD", str(file.fileno()))
        with pytest.raises(NoChannel, match="not a socket"):
            await handleipc.parent()
        assert os.get_inheritable(file.fileno())
        file.write("still open")


@pytest.mark.parametrize("kind", ["tcp", "datagram", "unconnected", "listening"])
async def test_other_sockets(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket that is not a connected Unix stream is no channel, and stays open."""
    others = []
    if kind == "tcp":
        listener = socket.create_server(("127.0.0.1", 0))
        sock = socket.create_connection(listener.getsockname())
        others = [listener]
    elif kind == "datagram":
        sock, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        others = [other]
    else:
        sock = socket.socket(socket.AF_UNIX)
        if kind == "listening":
            sock.bind(str(tmp_path / "socket"))
            sock.listen()
    with sock:
        sock.set_inheritable(True)
        monkeypatch.setenv("NODE_CHANNEL_FD", str(sock.fileno()))
        with pytest.raises(NoChannel):
            await handleipc.parent()
        assert os.fstat(sock.fileno())
    for other in others:
        other.close()


async def test_close_on_exec_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    """A close-on-exec socket was opened by this very process: it is no channel."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        monkeypatch.setenv("NODE_CHANNEL_FD", str(theirs.fileno()))
        with pytest.raises(NoChannel, match="own"):
            await handleipc.parent()
        theirs.send(b"x")
        assert ours.recv(1) == b"x"


async def test_unknown_serialization(inherited, monkeypatch: pytest.MonkeyPatch) -> None:
    """A serialization nobody here speaks is refused by name."""
    monkeypatch.setenv("NODE_CHANNEL_SERIALIZATION_MODE", "advanced")
    with pytest.raises(NoChannel, match="advanced"):
        await handleipc.parent()


async def test_adoption(inherited, monkeypatch: pytest.MonkeyPatch) -> None:
    """The channel is made close-on-exec and non-blocking, and all its variables go."""
    ours, theirs = inherited
    monkeypatch.setenv("HANDLEIPC_CHANNEL", "nonsense")
    monkeypatch.setenv("HANDLEIPC_OTHER", "x")
    monkeypatch.setenv("NODE_OPTIONS", "mine")
    channel = await handleipc.parent()
    try:
        assert not os.get_inheritable(theirs.fileno())
        assert not os.get_blocking(theirs.fileno())
        left = [k for k in os.environ if k.startswith(("NODE_CHANNEL_", "HANDLEIPC_"))]
        assert left == []
        assert os.environ["NODE_OPTIONS"] == "mine"
        await channel.send("up")
        assert ours.recv(100) == b'"up"\n'
        assert channel.dialect == "node"
    finally:
        _end(channel, theirs)


@pytest.mark.parametrize(
    "invitation",
    [
        "",
        "1",
        "1 2 3",
        "2 12345 128 1048576",
        "9 {cookie} 128 1048576",
        "2 {cookie} x y",
        "x y z w",
    ],
)
async def test_invitations_that_are_none(inherited, monkeypatch, invitation: str) -> None:
    """An invitation for another socket, another version, or broken, invites nobody."""
    ours, theirs = inherited
    cookie = handleipc.spawn.__globals__["socket_cookie"](theirs)
    monkeypatch.setenv("HANDLEIPC_CHANNEL", invitation.format(cookie=cookie))
    channel = await handleipc.parent()
    try:
        await channel.send("first")
        assert ours.recv(1000) == b'"first"\n'
    finally:
        _end(channel, theirs)


async def test_invitation(inherited, monkeypatch) -> None:
    """An invited child begins with the switch line."""
    ours, theirs = inherited
    cookie = handleipc.spawn.__globals__["socket_cookie"](theirs)
    monkeypatch.setenv("HANDLEIPC_CHANNEL", f"3,2 {cookie} 128 1048576")
    channel = await handleipc.parent()
    try:
        await channel.send("first")
        switch, first, _ = ours.recv(1000).split(b"\n")
        assert switch.startswith(b'{"cmd":"NODE_HANDLEIPC","native":2')
        assert first == b'[0,"first"]'
    finally:
        _end(channel, theirs)


async def test_same_object_twice(inherited) -> None:
    """A second call returns the same object, also after the channel has ended."""
    _, theirs = inherited
    channel, again = await asyncio.gather(handleipc.parent(), handleipc.parent())
    assert channel is again
    assert await handleipc.parent() is channel
    _end(channel, theirs)
    assert await handleipc.parent() is channel


def test_moves_to_a_new_loop(inherited) -> None:
    """If its loop is closed and the channel open, the next call moves it to the running loop."""
    ours, theirs = inherited
    seen = []

    async def first() -> None:
        channel = await handleipc.parent()
        seen.append(channel)
        ours.send(b'"one"\n"two"\n')
        assert await channel.recv() == ("one", None)
        channel.send_nowait("from the first")

    async def second() -> None:
        channel = await handleipc.parent()
        assert channel is seen[0]
        assert channel.connected
        assert await channel.recv() == ("two", None)
        ours.send(b'"three"\n')
        assert await channel.recv() == ("three", None)
        await channel.send("from the second")
        ended = asyncio.create_task(channel.wait_disconnected())
        channel.disconnect()
        await asyncio.wait_for(ended, 10)

    asyncio.run(first())
    asyncio.run(second())
    assert ours.recv(1000) == b'"from the first"\n"from the second"\n'
    theirs.detach()


def test_another_live_loop_is_busy(inherited) -> None:
    """Another live loop gets ``ChannelBusy``."""
    _, theirs = inherited
    caught: list[BaseException] = []

    async def ask() -> None:
        try:
            await handleipc.parent()
        except ChannelBusy as error:
            caught.append(error)

    async def main() -> None:
        channel = await handleipc.parent()
        thread = threading.Thread(target=lambda: asyncio.run(ask()))
        thread.start()
        await asyncio.get_running_loop().run_in_executor(None, thread.join)
        assert len(caught) == 1
        _end(channel, theirs)

    asyncio.run(main())


STALE = """
    import asyncio, os
    import handleipc

    async def main():
        try:
            await handleipc.parent()
        except handleipc.NoChannel as error:
            print("no channel")

    asyncio.run(main())
"""


@pytest.mark.parametrize("fd", [3, 4, 5, 6, 7])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_stale_number_is_never_the_loops_own(program, fd: int, loop: str) -> None:
    """A stale number, which may be the loop's own self-pipe, is no channel."""
    text = STALE
    if loop == "uvloop":
        pytest.importorskip("uvloop")
        text = text.replace("asyncio.run(main())", "import uvloop; uvloop.run(main())")
    done = subprocess.run(
        [sys.executable, "-W", "error", program("child.py", text)],
        env={**os.environ, "NODE_CHANNEL_FD": str(fd)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.stdout, done.returncode) == ("no channel\n", 0), done.stderr


async def test_grandchild_is_told_nothing(program) -> None:
    """A program that a child starts plainly gets no variable and no descriptor of its channel."""
    child = await handleipc.fork(
        program(
            "child.py",
            """
            import asyncio, subprocess, sys
            import handleipc

            async def main():
                parent = await handleipc.parent()
                done = subprocess.run(
                    [sys.executable, "grandchild.py"], capture_output=True, text=True
                )
                await parent.send(done.stdout)

            asyncio.run(main())
            """,
        ),
        cwd=program("grandchild.py", STALE).parent,
    )
    assert await child.recv() == ("no channel\n", None)
    assert await child.wait() == 0


async def test_programs_that_run_before_parent(program) -> None:
    """What a child runs before it asks for its channel knows nothing of it: no name, no number."""
    child = await handleipc.fork(
        program(
            "child.py",
            """
            import asyncio, os, subprocess, sys
            import handleipc

            said = subprocess.run(
                [sys.executable, "grandchild.py"], capture_output=True, text=True
            ).stdout
            by_shell = os.popen(f"{sys.executable} grandchild.py").read()

            async def main():
                parent = await handleipc.parent()
                await parent.send([said, by_shell])
                async for message, _ in parent:
                    await parent.send(message)

            asyncio.run(main())
            """,
        ),
        cwd=program("grandchild.py", STALE).parent,
    )
    await child.send("for the child alone")
    assert await child.recv() == (["no channel\n", "no channel\n"], None)
    assert await child.recv() == ("for the child alone", None)
    assert child.dialect == "native"
    child.disconnect()
    assert await child.wait() == 0


FORKED = """
import asyncio, os, socket, sys
import handleipc

async def ask(where):
    try:
        channel = await handleipc.parent()
    except handleipc.NoChannel as error:
        return [where, str(error)]
    await channel.send(where)
    channel.disconnect()
    await channel.wait_disconnected()
    return [where, "has it"]

def in_a_copy(where, **environment):
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.environ.update(environment)
        os.write(writing, "|".join(asyncio.run(ask(where))).encode())
        os._exit(0)
    os.close(writing)
    os.wait()
    with open(reading) as file:
        return file.read().split("|")

async def main(*before):
    parent = await handleipc.parent()
    await parent.send([os.getpid(), *before, *after])
    async for message, _ in parent:
        await parent.send(message)

number = int(handleipc.environment.found["NODE_CHANNEL_FD"])
ours, theirs = socket.socketpair()
theirs.set_inheritable(True)
before = in_a_copy("before")
own = in_a_copy("own", NODE_CHANNEL_FD=str(theirs.fileno()))
own.append(ours.recv(100).decode())
after = []
if "adopted" in sys.argv:
    async def adopt():
        await handleipc.parent()
    asyncio.run(adopt())
    after = [in_a_copy("after")]
asyncio.run(main(before, own))
"""


@pytest.mark.parametrize("when", ["found", "adopted"])
async def test_forked_copies_have_no_channel(program, when: str) -> None:
    """A copy made by fork(2), before or after, is told whose the channel is; or has its own."""
    child = await handleipc.fork(program("child.py", FORKED), when)
    (pid, before, own, *after), _ = await child.recv()
    assert pid == child.pid
    for where, reason in (before, *after):
        assert where in ("before", "after")
        assert f"from process {pid}" in reason
    assert own == ["own", "has it", '"own"\n']
    assert len(after) == (when == "adopted")
    await child.send("still there")
    assert await child.recv() == ("still there", None)
    child.disconnect()
    assert await child.wait() == 0


# -- options -------------------------------------------------------------------------------------


async def test_limits(inherited) -> None:
    """``limits=`` bounds this end of the channel."""
    _, theirs = inherited
    channel = await handleipc.parent(limits=Limits(queued_handles=0))
    sock, other = socket.socketpair()
    with sock, other, pytest.raises(handleipc.ChannelFull):
        channel.send_nowait("x", sock)
    _end(channel, theirs)


async def test_handles_not_accepted(inherited) -> None:
    """``accept_handles=False``: a descriptor of the parent does not reach the application."""
    ours, theirs = inherited
    channel = await handleipc.parent(accept_handles=False)
    channel.on("error", lambda error: None)
    line = b'{"cmd":"NODE_HANDLE","type":"net.Native","msg":"handle"}\n"after"\n'
    try:
        with open(os.devnull) as file:
            socket.send_fds(ours, [line], [file.fileno()])
    except PermissionError:  # SO_PASSRIGHTS: the kernel itself refuses
        ours.send(b'"after"\n')
    assert await channel.recv() == ("after", None)
    _end(channel, theirs)


async def test_options_of_a_second_call(inherited) -> None:
    """A later call may leave the options out or repeat them; others are ``ValueError``."""
    _, theirs = inherited
    limits = Limits(line=1000)
    channel = await handleipc.parent(limits=limits)
    assert await handleipc.parent() is channel
    assert await handleipc.parent(limits=Limits(line=1000)) is channel
    for options in ({"limits": Limits()}, {"accept_handles": False}):
        with pytest.raises(ValueError, match="first call"):
            await handleipc.parent(**options)
    with pytest.raises(TypeError, match=r"limits=7.*Limits\("):
        await handleipc.parent(limits=7)
    _end(channel, theirs)
