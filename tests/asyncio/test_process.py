"""``fork``, ``spawn`` and ``Child``: starting children, and how they end."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import signal
import socket
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

import handleipc
from handleipc import FileDescriptor, HandleNotDelivered, Limits
from tests.asyncio.helpers import ECHO, Recorder, clients, connection, is_open, turns, until, works

REPORT = """
    import asyncio, os, sys
    import handleipc

    listed = [int(n) for n in os.listdir("/proc/self/fd")]
    fds = sorted(n for n in listed if os.path.exists(f"/proc/self/fd/{n}"))
    channel = int(handleipc.environment.found["NODE_CHANNEL_FD"])

    async def main():
        parent = await handleipc.parent()
        await parent.send({
            "argv": sys.argv[1:], "fds": fds, "channel": channel, "flags": sys.flags.optimize,
            "env": {k: v for k, v in os.environ.items() if k in ("A", "PATH", "HOME")},
            "left": [k for k in os.environ if k.startswith(("NODE_CHANNEL_", "HANDLEIPC_"))],
            "cwd": os.getcwd(),
        })

    asyncio.run(main())
"""

EXIT = "import sys; sys.exit(int(sys.argv[1]))"


async def end(child: Any) -> int:
    """Disconnect, and wait for a child that ends then."""
    child.disconnect()
    async with asyncio.timeout(20):
        return await child.wait()


async def report(child: Any) -> Any:
    async with asyncio.timeout(20):
        message, _ = await child.recv()
        assert await child.wait() == 0
    assert message["left"] == []
    message["dialect"] = child.dialect
    return message


# -- targets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["node", None])
async def test_round_trip(program, dialect: Any) -> None:
    """Messages and handles go to a real child and back, in either dialect."""
    child = await handleipc.fork(program("child.py", ECHO), dialect=dialect)
    client, served = connection()
    with client:
        await child.send("with", served)
        message, handle = await child.recv()
        assert message == "with"
        assert works(client, handle)
        handle.close()
        await child.send("without")
        assert await child.recv() == ("without", None)
    assert child.dialect == (dialect or "native")
    assert await end(child) == 0
    assert (child.exit_code, child.returncode, child.signal) == (0, 0, None)


@pytest.mark.parametrize("make", [str, Path])
async def test_path_is_relative_to_cwd(program, tmp_path: Path, make: Any) -> None:
    """A path, str or PathLike, is relative to ``cwd=``; ``args`` are the child's argv."""
    program("child.py", REPORT)
    child = await handleipc.fork(make("child.py"), "one", "two", cwd=tmp_path)
    told = await report(child)
    assert told["argv"] == ["one", "two"]
    assert Path(told["cwd"]) == tmp_path
    assert told["left"] == []
    assert told["dialect"] == "native"


async def test_dotted_module(program, tmp_path: Path) -> None:
    """A dotted module runs as with ``-m``."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package/__init__.py").touch()
    program("package/child.py", REPORT)
    child = await handleipc.fork("package.child", "x", cwd=tmp_path)
    assert (await report(child))["argv"] == ["x"]


@pytest.mark.parametrize("function", ["coroutine", "plain"])
async def test_function(program, tmp_path: Path, monkeypatch, function: str) -> None:
    """``module:function`` is imported with this process's ``sys.path`` and given the channel."""
    program(
        "workers.py",
        """
        import sys

        async def coroutine(parent):
            await parent.send(["coroutine", sys.argv[1:]])
            async for message, _ in parent:
                await parent.send(message)

        def plain(parent):
            parent.send_nowait(["plain", sys.argv[1:]])
            parent.on("message", lambda message, handle: parent.send_nowait(message))
        """,
    )
    monkeypatch.syspath_prepend(tmp_path)
    child = await handleipc.fork(f"workers:{function}", "arg")
    assert await child.recv() == ([function, ["arg"]], None)
    await child.send("echo")
    assert await child.recv() == ("echo", None)
    assert await end(child) == 0


async def test_interpreter_arguments(program) -> None:
    """``interpreter_args`` come before the target."""
    child = await handleipc.fork(program("child.py", REPORT), interpreter_args=["-O"])
    assert (await report(child))["flags"] == 1


@pytest.mark.parametrize("target", ["", "no dots", "a..b", "a:", ":f", "a:b:c", "a-b", "1:2"])
async def test_bad_targets(target: str) -> None:
    """A target that is none is ``ValueError``, at once."""
    with pytest.raises(ValueError, match="target"):
        await handleipc.fork(target)


async def test_target_in_main() -> None:
    """A function of ``__main__`` cannot be imported elsewhere: ``ValueError``."""
    with pytest.raises(ValueError, match="__main__"):
        await handleipc.fork("__main__:f")


# -- that do not start, or do not stay -----------------------------------------------------------


async def test_missing_program() -> None:
    """A missing program is ``FileNotFoundError``, at once."""
    for name in ("/no/such/program", "no-such-program-at-all"):
        with pytest.raises(FileNotFoundError, match="no"):
            await handleipc.spawn(name)
    with pytest.raises(FileNotFoundError):
        await handleipc.fork("child.py", executable="/no/python")
    with pytest.raises(FileNotFoundError):
        await handleipc.spawn(sys.executable, cwd="/no/such/directory")


async def test_exec_failure(tmp_path: Path) -> None:
    """A program that cannot be executed is an ``OSError``, at once."""
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF nothing of the kind")
    with pytest.raises(PermissionError):
        await handleipc.spawn(program)
    program.chmod(0o755)
    with pytest.raises(OSError, match="format"):
        await handleipc.spawn(program)


async def test_no_program() -> None:
    """``spawn()`` without a program is ``TypeError``."""
    with pytest.raises(TypeError):
        await handleipc.spawn()


async def test_child_that_never_opens_its_channel() -> None:
    """A child that exits without opening its channel ends in events and errors, not in a hang."""
    child = await handleipc.spawn(sys.executable, "-c", EXIT, "7")
    order = []
    child.on("undelivered", lambda *_: order.append("undelivered"))
    for event in ("disconnect", "exit", "close"):
        child.on(event, lambda *args, event=event: order.append((event, *args)))
    closed = child.on("close", Recorder())
    client, served = connection()
    with client, served:
        async with asyncio.timeout(20):
            with pytest.raises(HandleNotDelivered):
                await child.send("x", served)
            assert await child.wait() == 7
            await closed.next()
        assert works(client, served)
    assert order == [("disconnect",), ("exit", 7, None), ("close", 7, None)]
    with pytest.raises(handleipc.ChannelBroken, match="code 7|closed"):
        await child.send("late")


async def test_missing_script() -> None:
    """A script that does not exist: the interpreter exits with code 2, and the channel ends."""
    child = await handleipc.fork("no_such_script.py", stderr=asyncio.subprocess.DEVNULL)
    async with asyncio.timeout(20):
        with pytest.raises(handleipc.ChannelBroken, match="code 2 and never opened"):
            await anext(child)
        assert await child.wait() == 2


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
async def test_crash(program, sig: signal.Signals) -> None:
    """A child ended by a signal has ``signal`` and a negative ``returncode``, no ``exit_code``."""
    child = await handleipc.fork(program("child.py", ECHO))
    await child.send("up")
    await child.recv()
    assert child.returncode is None
    exited = child.on("exit", Recorder())
    child.kill(sig)
    async with asyncio.timeout(20):
        assert await child.wait() == -sig
    assert (child.exit_code, child.returncode, child.signal) == (None, -sig, sig)
    assert await exited.next() == [(None, sig)]
    child.kill()  # does nothing any more
    child.terminate()


async def test_crash_with_handles_on_their_way(program) -> None:
    """Handles a stopped child had not acknowledged come back when it is killed."""
    child = await handleipc.fork(program("child.py", ECHO))
    await child.send("up")
    await child.recv()
    child.kill(signal.SIGSTOP)
    with clients(20) as (sockets, served):
        undelivered = child.on("undelivered", Recorder())
        for n, each in enumerate(served):
            child.send_nowait(n, each)
        await turns()
        child.kill(signal.SIGKILL)
        async with asyncio.timeout(20):
            await child.wait()
            calls = await undelivered.next(20)
        assert [(n, h) for n, h, _ in calls] == list(enumerate(served))
        assert all(works(c, h) for c, h in zip(sockets, served, strict=True))


async def test_messages_before_a_crash_arrive() -> None:
    """What a child wrote before it died is delivered, then ``disconnect``, ``exit``, ``close``."""
    code = """
import asyncio, os, handleipc
async def main():
    parent = await handleipc.parent()
    for n in range(500):
        await parent.send([n, "x" * 100])
    os.abort()
asyncio.run(main())
"""
    child = await handleipc.spawn(sys.executable, "-c", code, stderr=asyncio.subprocess.DEVNULL)
    order: list[Any] = []
    child.on("message", lambda message, handle: order.append(message[0]))
    for event in ("disconnect", "exit", "close"):
        child.on(event, lambda *args, event=event: order.append(event))
    closed = child.on("close", Recorder())
    assert await closed.next() == [(None, signal.SIGABRT)]
    assert order == [*range(500), "disconnect", "exit", "close"]


@pytest.mark.parametrize("how", ["child", "parent", "abort", "exit"])
async def test_events_once_and_in_order(program, how: str) -> None:
    """``disconnect``, ``exit`` and ``close`` come exactly once each and in order, whoever ends."""
    child = await handleipc.fork(
        program(
            "child.py",
            """
            import asyncio, sys
            import handleipc

            async def main():
                parent = await handleipc.parent()
                async for message, handle in parent:
                    if message == "child":
                        parent.disconnect()
                    if message == "exit":
                        sys.exit(3)

            asyncio.run(main())
            """,
        )
    )
    order: list[Any] = []
    for event in ("disconnect", "exit", "close"):
        child.on(event, lambda *args, event=event: order.append(event))
    closed = child.on("close", Recorder())
    await child.send(how)
    if how == "parent":
        child.disconnect()
    elif how == "abort":
        child.abort()
    await closed.next()
    await turns()
    assert order == ["disconnect", "exit", "close"]
    assert closed.calls == [(3 if how == "exit" else 0, None)]


async def test_wait_is_shared_and_cancellable(program) -> None:
    """Several tasks may ``wait``; one of them cancelled does not disturb the others."""
    child = await handleipc.fork(program("child.py", ECHO))
    waits = [asyncio.create_task(child.wait()) for _ in range(3)]
    await turns()
    waits[0].cancel()
    await asyncio.wait(waits[:1])
    assert await end(child) == 0
    assert await asyncio.gather(*waits[1:]) == [0, 0]
    assert await child.wait() == 0


async def test_grandchild_does_not_delay_the_exit() -> None:
    """A grandchild that holds the other end open delays neither ``exit`` nor ``disconnect``."""
    code = """
import asyncio, os, sys, subprocess
import handleipc
fd = int(handleipc.environment.found["NODE_CHANNEL_FD"])
grandchild = subprocess.Popen(
    [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=int(sys.argv[1]), pass_fds=[fd]
)
async def main():
    parent = await handleipc.parent()
    await parent.send("last words")
    os._exit(5)
asyncio.run(main())
"""
    read, write = os.pipe()
    os.set_inheritable(read, True)
    with FileDescriptor(write):
        with FileDescriptor(read):
            child = await handleipc.spawn(sys.executable, "-c", code, "0", stdin=read)
        exited = child.on("exit", Recorder())
        closed = child.on("close", Recorder())
        async with asyncio.timeout(20):
            assert await anext(child) == ("last words", None)
            with pytest.raises(handleipc.ChannelBroken, match="code 5"):
                await anext(child)
            assert await exited.next() == [(5, None)]
            assert await closed.next() == [(5, None)]


# -- exits that nobody saw, and who may wait -----------------------------------------------------


@pytest.fixture
def no_sigchld():
    """As in a daemon that ignores SIGCHLD: the kernel reaps, and tells nobody."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGCHLD, before)


def no_pidfd(*_: Any) -> int:
    raise OSError(errno.EMFILE, "none free")


seen_by = pytest.mark.parametrize("seen_by", ["pidfd", "thread"])


def see(seen_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if seen_by == "thread":
        monkeypatch.setattr(os, "pidfd_open", no_pidfd)


async def exit_is_unknown(child: Any, caplog: pytest.LogCaptureFixture) -> None:
    exited, closed = child.on("exit", Recorder()), child.on("close", Recorder())
    async with asyncio.timeout(20):
        assert await child.wait() is None
    assert await exited.next() == [(None, None)]
    assert await closed.next() == [(None, None)]
    assert child.exited
    assert (child.returncode, child.exit_code, child.signal) == (None, None, None)
    warnings = [r.getMessage() for r in caplog.records if r.name == "handleipc"]
    assert len([text for text in warnings if f"process {child.pid} is unknown" in text]) == 1
    child.kill()  # nobody, whoever has the number now


@seen_by
@pytest.mark.parametrize("argv", [("7",), ("0",)])
async def test_exit_that_the_kernel_reaped(
    no_sigchld, caplog, monkeypatch, seen_by: str, argv: tuple[str]
) -> None:
    """With SIGCHLD ignored an exit is unknown: never 0, and said once."""
    see(seen_by, monkeypatch)
    child = await handleipc.spawn(sys.executable, "-c", EXIT, *argv)
    assert not child.exited
    await exit_is_unknown(child, caplog)


@seen_by
async def test_exit_that_somebody_else_reaped(caplog, monkeypatch, seen_by: str) -> None:
    """So is one that other code of this process waited for."""
    see(seen_by, monkeypatch)
    child = await handleipc.spawn(sys.executable, "-c", "import sys; sys.stdin.read()", stdin=-1)
    child.kill(signal.SIGKILL)
    try:
        os.waitpid(child.pid, 0)
    except ChildProcessError:
        assert seen_by == "thread"  # that was faster, and saw it
        assert await child.wait() == -signal.SIGKILL
    else:
        await exit_is_unknown(child, caplog)
    child.stdin.close()


async def test_exit_reaped_before_it_was_watched(caplog, monkeypatch) -> None:
    """And one that was over before this end could look."""
    real = subprocess.Popen

    def popen(*args: Any, **options: Any) -> Any:
        process = real(*args, **options)
        os.waitpid(process.pid, 0)
        return process

    monkeypatch.setattr(subprocess, "Popen", popen)
    child = await handleipc.spawn(sys.executable, "-c", EXIT, "7")
    await exit_is_unknown(child, caplog)


async def test_unknown_exit_in_words(no_sigchld) -> None:
    """A channel that ended with an unknown exit says so."""
    child = await handleipc.spawn("sleep", "60")
    child.kill(signal.SIGKILL)
    await child.wait()
    await child.wait_disconnected()
    assert "exit status unknown" in str(handleipc.WorkerExited(child.exit_code, child.signal))


async def test_signal_after_an_exit_that_was_not_seen_yet() -> None:
    """A signal to a child that has just ended costs its exit status nothing."""
    child = await handleipc.spawn(sys.executable, "-c", EXIT, "7")
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    child.kill()
    child.kill(0)
    assert await child.wait() == 7


@seen_by
def test_wait_in_other_loops(monkeypatch, seen_by: str) -> None:
    """Any loop may wait for the exit: beside the child's own, or when that has ended."""
    see(seen_by, monkeypatch)

    async def start() -> Any:
        return await handleipc.spawn(sys.executable, "-c", "import sys; sys.stdin.read()", stdin=-1)

    async def wait(child: Any) -> Any:
        async with asyncio.timeout(20):
            return await child.wait()

    async def beside() -> Any:
        child = await start()
        elsewhere = asyncio.create_task(asyncio.to_thread(asyncio.run, wait(child)))
        await asyncio.sleep(0)
        child.kill(signal.SIGTERM)
        codes = [await child.wait(), await elsewhere]
        child.stdin.close()
        return codes

    assert asyncio.run(beside()) == [-signal.SIGTERM] * 2
    child = asyncio.run(start())  # its channel and stdin end with the loop, and so does it
    assert asyncio.run(wait(child)) == 0
    assert asyncio.run(wait(child)) == 0
    assert (child.exited, child.returncode) == (True, 0)


def test_wait_for_a_child_of_an_idle_loop() -> None:
    """The child's own loop need not run for that, nor learn of it before it does."""
    exited = Recorder()

    async def start() -> Any:
        child = await handleipc.spawn(sys.executable, "-c", EXIT, "7")
        child.on("exit", exited)
        return child

    async def wait(child: Any) -> Any:
        async with asyncio.timeout(20):
            return await child.wait()

    with asyncio.Runner() as runner:
        child = runner.run(start())
        assert asyncio.run(wait(child)) == 7
        assert exited.calls == []
        assert runner.run(exited.next()) == [(7, None)]
    assert exited.calls == [(7, None)]


def test_exit_after_a_loop_that_was_just_closed() -> None:
    """A loop closed without a word leaves nobody who watches: whoever asks looks himself."""
    loop = asyncio.new_event_loop()
    child = loop.run_until_complete(handleipc.spawn(sys.executable, "-c", EXIT, "7"))
    loop.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert child.exited
    assert child.returncode == 7
    child._link._sock.close()
    del child
    gc.collect()  # and the fixture counts descriptors


# -- options -------------------------------------------------------------------------------------


async def test_piped_stdio(program) -> None:
    """With ``PIPE`` the child's stdin, stdout and stderr are streams, beside the channel."""
    pipe = asyncio.subprocess.PIPE
    child = await handleipc.fork(
        program(
            "child.py",
            """
            import asyncio, sys
            import handleipc

            async def main():
                parent = await handleipc.parent()
                text = sys.stdin.read()
                print("out", text, end="")
                print("err", text, end="", file=sys.stderr)
                await parent.send(text)

            asyncio.run(main())
            """,
        ),
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
    )
    closed = child.on("close", Recorder())
    child.stdin.write(b"typed")
    child.stdin.close()
    assert await child.recv() == ("typed", None)
    assert await child.stdout.read() == b"out typed"
    assert await child.stderr.read() == b"err typed"
    assert await child.wait() == 0
    await closed.next()
    await child.stdin.wait_closed()


async def test_close_waits_for_piped_stdio(program) -> None:
    """``close`` waits for piped stdio, ``exit`` does not."""
    code = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read(); print('end')"])
"""
    pipe = asyncio.subprocess.PIPE
    child = await handleipc.spawn(sys.executable, "-c", code, stdin=pipe, stdout=pipe)
    exited, closed = child.on("exit", Recorder()), child.on("close", Recorder())
    await exited.next()
    await turns(50)
    assert closed.calls == []
    child.stdin.close()
    assert await child.stdout.read() == b"end\n"
    await closed.next()


async def test_redirected_stdio(tmp_path: Path) -> None:
    """Files and DEVNULL work as for ``asyncio.subprocess``; then there is no stream."""
    with open(tmp_path / "out", "wb") as out:
        child = await handleipc.spawn(
            sys.executable, "-c", "print('hi')", stdout=out, stdin=asyncio.subprocess.DEVNULL
        )
        assert await child.wait() == 0
    assert (child.stdin, child.stdout, child.stderr) == (None, None, None)
    assert (tmp_path / "out").read_text() == "hi\n"


@pytest.mark.parametrize("fd", [0, 1, 2, 3, 10, 90])
async def test_channel_fd(program, fd: int) -> None:
    """``channel_fd`` asks for that number in the child."""
    child = await handleipc.fork(program("child.py", REPORT), channel_fd=fd)
    told = await report(child)
    assert told["channel"] == fd
    assert told["fds"] == sorted({0, 1, 2, fd})


async def test_channel_fd_that_is_busy_here(program) -> None:
    """A number that this process uses itself can be asked for, and stays ours here."""
    child_program = program("child.py", REPORT)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = await handleipc.fork(child_program, channel_fd=ours.fileno())
        assert (await report(child))["channel"] == ours.fileno()
        assert works(theirs, ours)


async def test_channel_fd_that_is_high_and_free(program) -> None:
    """A high, free number can be asked for."""
    child = await handleipc.fork(program("child.py", REPORT), channel_fd=700)
    assert (await report(child))["channel"] == 700


async def test_channel_fd_that_makes_no_sense(program) -> None:
    """A negative number, or one whose standard stream is given too, is ``ValueError``."""
    target = program("child.py", REPORT)
    with pytest.raises(ValueError, match="-1"):
        await handleipc.fork(target, channel_fd=-1)
    with pytest.raises(ValueError, match="stdout"):
        await handleipc.fork(target, channel_fd=1, stdout=asyncio.subprocess.PIPE)


async def test_no_descriptor_leaks_into_the_child(program) -> None:
    """Of this process's descriptors, inheritable or not, the child has stdio and the channel."""
    target = program("child.py", REPORT)
    ours, theirs = socket.socketpair()
    ours.set_inheritable(True)
    with ours, theirs:
        others = [await handleipc.fork(program("echo.py", ECHO)) for _ in range(2)]
        child = await handleipc.fork(target)
        told = await report(child)
        assert told["fds"] == [0, 1, 2, told["channel"]]
        for other in others:
            assert await end(other) == 0


async def test_environment(program) -> None:
    """``env`` replaces the environment; without it the child has a copy of ours."""
    target = program("child.py", REPORT)
    told = await report(await handleipc.fork(target, env={"A": "1"}))
    assert told["env"] == {"A": "1"}
    assert told["dialect"] == "native"
    told = await report(await handleipc.fork(target))
    assert told["env"]["PATH"] == os.environ["PATH"]


async def test_channel_of_this_process_is_not_passed_on(program, monkeypatch) -> None:
    """Variables of a channel of ours, in the environment or in ``env``, are not the child's."""
    stale = {"NODE_CHANNEL_FD": "99", "HANDLEIPC_CHANNEL": "1 2 3 4", "HANDLEIPC_OTHER": "x"}
    for name, value in stale.items():
        monkeypatch.setenv(name, value)
    target = program("child.py", REPORT)
    for env in (None, {**os.environ, **stale}):
        told = await report(await handleipc.fork(target, env=env))
        assert told["channel"] != 99
        assert told["left"] == []
        assert told["dialect"] == "native"


async def test_advanced_serialization_is_refused(program) -> None:
    """``serialization="advanced"`` is refused by name; so is what is no serialization."""
    target = program("child.py", EXIT)
    for name in ("advanced", "pickle"):
        with pytest.raises(ValueError, match=name):
            await handleipc.fork(target, serialization=name)
    with pytest.raises(ValueError, match="esperanto"):
        await handleipc.fork(target, dialect="esperanto")


async def test_node_dialect_by_name(program) -> None:
    """``dialect="node"`` keeps the channel to Node's wire: the child is not invited."""
    child = await handleipc.fork(program("child.py", REPORT), dialect="node")
    assert (await report(child))["dialect"] == "node"
    assert child.dialect == "node"


@pytest.mark.parametrize("dialect", ["node", None])
async def test_handles_not_accepted(program, dialect: Any) -> None:
    """``accept_handles=False``: the child's send fails, its handle is usable, messages go on."""
    child = await handleipc.fork(
        program(
            "child.py",
            """
            import asyncio, socket
            import handleipc

            async def main():
                parent = await handleipc.parent()
                ours, theirs = socket.socketpair()
                try:
                    await parent.send("handle", ours)
                except handleipc.HandleNotDelivered as error:
                    ours.send(b"works")
                    await parent.send([theirs.recv(10).decode(), bool(error.reason)])
                await parent.send("end")

            asyncio.run(main())
            """,
        ),
        accept_handles=False,
        dialect=dialect,
    )
    child.on("error", Recorder())
    client, served = connection()
    with client:
        async with asyncio.timeout(20):
            assert await child.recv() == (["works", True], None)
            assert await child.recv() == ("end", None)
            assert await child.wait() == 0
        served.close()


async def test_cancelled_at_any_turn_while_starting(program) -> None:
    """However early a ``fork`` is cancelled, no process and no descriptor stays."""
    target = program("child.py", ECHO)
    pipe = asyncio.subprocess.PIPE
    for turn in range(5):
        forking = asyncio.create_task(handleipc.fork(target, stdin=pipe, stdout=pipe))
        for _ in range(turn):
            await asyncio.sleep(0)
        forking.cancel()
        await asyncio.wait([forking])
        if not forking.cancelled():
            child = forking.result()
            child.kill(signal.SIGKILL)
            await child.wait()
            child.stdin.close()
            await child.stdout.read()


async def test_two_children(program) -> None:
    """Two children are two channels: what one does is nothing to the other."""
    target = program("child.py", ECHO)
    one, two = await asyncio.gather(handleipc.fork(target), handleipc.fork(target))
    assert one.pid != two.pid
    await one.send(1)
    await two.send(2)
    assert (await one.recv(), await two.recv()) == ((1, None), (2, None))
    client, served = connection()
    with client:
        await one.send("first", served)
        _, handle = await one.recv()
        await two.send("second", handle)
        one.kill(signal.SIGKILL)
        await one.wait()
        _, handle = await two.recv()
        assert works(client, handle)
        handle.close()
        await until(lambda: not is_open(client), "the end of every copy")
    assert await end(two) == 0


def test_loop_that_ends_with_a_live_child(program) -> None:
    """A loop that ends with a live child leaks nothing: the child learns that it is alone."""
    target = program("child.py", ECHO)

    async def main() -> None:
        child = await handleipc.fork(target)
        await child.send("x")

    asyncio.run(main())


# -- volume --------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_volume_of_messages(program) -> None:
    """100,000 plain messages each way: in order, none lost, memory flat."""
    count = 100_000
    child = await handleipc.fork(program("child.py", ECHO))
    await child.send("warm up")
    await child.recv()

    async def send_all() -> None:
        for n in range(count):
            if not child.send_nowait(n):
                await child.drain()

    tracemalloc.start()
    try:
        sending = asyncio.create_task(send_all())
        for n in range(count):
            assert await child.recv() == (n, None)
        await sending
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40 << 20
    assert await end(child) == 0


@pytest.mark.slow
async def test_volume_of_handles(program) -> None:
    """5,000 handles each way: in order, none lost, as many descriptors after as before.

    So many that each limit and each number of descriptors is met many times over, and few enough
    for a machine that gives this test a tenth of a processor.
    """
    count = 5_000
    child = await handleipc.fork(program("child.py", ECHO))
    await child.send("warm up")
    await child.recv()
    before = len(os.listdir("/proc/self/fd"))
    their_before = len(os.listdir(f"/proc/{child.pid}/fd"))
    client, served = socket.socketpair()
    with client, served:

        async def send_all() -> None:
            for n in range(count):
                if not child.send_nowait(n, FileDescriptor(os.dup(served.fileno()))):
                    await child.drain()

        sending = asyncio.create_task(send_all())
        for n in range(count):
            message, handle = await child.recv()
            assert message == n
            handle.close()
        await sending
        await child.flush()
    assert child.dialect == "native"
    assert len(os.listdir("/proc/self/fd")) == before
    await child.send("settle")
    await child.recv()
    assert len(os.listdir(f"/proc/{child.pid}/fd")) == their_before
    assert await end(child) == 0


async def test_own_limits(program) -> None:
    """``limits=`` bounds this end."""
    child = await handleipc.fork(program("child.py", ECHO), limits=Limits(queued_handles=0))
    with clients(1) as (_, served):
        with pytest.raises(handleipc.ChannelFull):
            child.send_nowait("x", served[0])
    assert await end(child) == 0
