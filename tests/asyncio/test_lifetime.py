"""Who outlives whom: parents killed, children hung, interpreters that end with channels open."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import handleipc

Program = Callable[[str, str], Path]

LOOPS = ["asyncio", "uvloop"]
on_both_loops = pytest.mark.parametrize("loop", LOOPS)

# What every program here begins with: run(main) on the wanted loop.
PRELUDE = """
import asyncio, os, signal, sys, time
import handleipc

handleipc.Child  # loads the rest: in the loop, the development mode would say how long it took

def run(main):
    factory = None
    if os.environ.get("TEST_LOOP") == "uvloop":
        import uvloop
        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)

def say(*what):
    print(*what, flush=True)
"""


@pytest.fixture
def write(program: Program) -> Callable[[str, str], Path]:
    """Write a program that begins with ``run`` and ``say``."""
    import inspect

    def write(name: str, text: str) -> Path:
        return program(name, PRELUDE + inspect.cleandoc(text))

    return write


def default_sigint() -> None:
    # A shell in the background ignores it, and so do its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


class Run:
    """A program under test, and the end of a pipe that all its descendants hold."""

    def __init__(self, path: Path, *args: str | Path, loop: str = "asyncio") -> None:
        self._alive, held = os.pipe()
        env = {**os.environ, "TEST_LOOP": loop}
        # As stdin it reaches children of children too: its EOF shows that all have ended.
        self.process = subprocess.Popen(
            [sys.executable, "-X", "dev", "-W", "error", path, *args],
            stdin=held,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            text=True,
            preexec_fn=default_sigint,
        )
        self._said = b""
        os.close(held)

    def line(self) -> list[str]:
        """Return the words of the next line it says."""
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()  # its own buffer would hide from select what it holds
        while b"\n" not in self._said:
            assert select.select([fd], [], [], 20)[0], "it says nothing"
            data = os.read(fd, 4096)
            assert data, f"it ended: {self.process.communicate()}"
            self._said += data
        line, _, self._said = self._said.partition(b"\n")
        return line.decode().split()

    def wait(self, seconds: float = 20) -> tuple[int, str]:
        """Return the code and what was written to stderr, once it has ended."""
        _, err = self.process.communicate(timeout=seconds)
        return self.process.returncode, err

    def all_end(self, seconds: float = 10) -> bool:
        """Say whether it and all it has started end in time."""
        ready, _, _ = select.select([self._alive], [], [], seconds)
        return bool(ready)

    def close(self) -> None:
        """Kill what is left of it; children that live on see their channel end."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        os.close(self._alive)


@contextlib.contextmanager
def started(path: Path, *args: str | Path, loop: str = "asyncio") -> Iterator[Run]:
    """Run a program, and end it whatever happens."""
    one = Run(path, *args, loop=loop)
    try:
        yield one
    finally:
        one.close()


def kill_if_alive(pid: int) -> None:
    """End an orphan that a failing test has left: it is known to be ours."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


POLITE = """
async def main():
    parent = await handleipc.parent()
    parent.on("disconnect", lambda: say("disconnect"))
    await parent.send({"pid": os.getpid()})
    async for message, handle in parent:
        pass
    await parent.wait_disconnected()
    await asyncio.sleep(0)

run(main())
"""

STARTER = """
async def main():
    child = await handleipc.fork(sys.argv[1], exit_with_parent="bound" in sys.argv)
    message, _ = await child.recv()
    say("child", message["pid"])
    await child.wait_disconnected()

run(main())
"""


@on_both_loops
def test_children_of_a_killed_parent_end(write: Program, loop: str) -> None:
    """SIGKILL of the parent: the child sees ``disconnect``, its iteration ends, and so does it."""
    with started(write("p.py", STARTER), write("c.py", POLITE), loop=loop) as run:
        run.line()
        run.process.kill()
        assert run.line() == ["disconnect"]
        assert run.all_end()
        assert run.wait() == (-signal.SIGKILL, "")


BLOCKED = {
    "sleep": "time.sleep(60)",
    "loop": "while time.monotonic() < end: pass",
    "deaf": """
    for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(sig, signal.SIG_IGN)
    time.sleep(60)
""",
}

STUCK = """
async def main():
    parent = await handleipc.parent()
    end = time.monotonic() + 60
    await parent.send({"pid": os.getpid()})
    BLOCKED

run(main())
"""


@on_both_loops
@pytest.mark.parametrize("how", list(BLOCKED))
def test_exit_with_parent(write: Program, loop: str, how: str) -> None:
    """A child that is blocked and cannot see its channel end is killed with its parent."""
    child = write("c.py", STUCK.replace("BLOCKED", BLOCKED[how].strip()))
    with started(write("p.py", STARTER), child, "bound", loop=loop) as run:
        _, pid = run.line()
        try:
            run.process.kill()
            assert run.all_end()
        finally:
            if not run.all_end(0):
                kill_if_alive(int(pid))


def test_exit_with_parent_that_ends_normally(write: Program) -> None:
    """So it is when the parent just comes to its end, and the parent does not wait for it."""
    child = write("c.py", STUCK.replace("BLOCKED", BLOCKED["sleep"]))
    starter = STARTER.replace("await child.wait_disconnected()", "pass")
    with started(write("p.py", starter), child, "bound") as run:
        _, pid = run.line()
        try:
            code, err = run.wait()
            assert (code, err) == (0, "")
            assert run.all_end()
        finally:
            if not run.all_end(0):
                kill_if_alive(int(pid))


FROM_A_THREAD = """
import threading

started = {}

async def start():
    child = await handleipc.fork(sys.argv[1], exit_with_parent=True)
    started["message"] = await child.recv()
    started["child"] = child

def thread():
    # The loop stays open: it is the thread alone that ends.
    loop = started["loop"] = asyncio.new_event_loop()
    loop.run_until_complete(start())

one = threading.Thread(target=thread)
one.start()
one.join()
say("child", started["message"][0]["pid"])
loop, child = started["loop"], started["child"]
asyncio.set_event_loop(loop)

async def ask():
    await child.send("still there?")
    say(*(await child.recv())[0])
    child.disconnect()
    say("exit", await child.wait())
    await child.wait_disconnected()

loop.run_until_complete(ask())
loop.run_until_complete(loop.shutdown_asyncgens())
loop.close()
"""

ANSWERS = """
async def main():
    parent = await handleipc.parent()
    await parent.send({"pid": os.getpid()})
    async for message, handle in parent:
        try:
            await parent.send(["yes", "here"])
        except handleipc.ChannelClosed:
            break  # the parent ends when it likes

run(main())
"""


def test_exit_with_parent_is_not_exit_with_thread(write: Program) -> None:
    """Started from the loop of a thread that ends, the child lives on with the process."""
    with started(write("p.py", FROM_A_THREAD), write("c.py", ANSWERS)) as run:
        run.line()
        assert run.line() == ["yes", "here"]
        assert run.line() == ["exit", "0"]
        assert run.wait() == (0, "")


@on_both_loops
@pytest.mark.parametrize("queued", [False, True])
def test_hung_child_does_not_hang_the_end(write: Program, loop: str, queued: bool) -> None:
    """``asyncio.run`` ends, however much a child that hangs for a minute has not read."""
    send = """
    for _ in range(100):
        child.send_nowait("x" * 100_000)
    child.disconnect()
""".strip()
    starter = f"""
async def main():
    child = await handleipc.fork(sys.argv[1])
    message, _ = await child.recv()
    say("child", message["pid"])
    {send if queued else "pass"}
    say("end")

run(main())
say("over")
"""
    child = write("c.py", STUCK.replace("BLOCKED", BLOCKED["sleep"]))
    with started(write("p.py", starter), child, loop=loop) as run:
        pid = int(run.line()[1])
        try:
            assert run.line() == ["end"]
            assert run.line() == ["over"]
            assert run.process.wait(20) == 0
        finally:
            kill_if_alive(pid)
            assert run.all_end()
        _, err = run.wait()
        # In debug mode asyncio itself says how long a callback took, such as the last flush.
        assert [line for line in err.splitlines() if not line.startswith("Executing <")] == []


ENDS = {
    "returns": "return",
    "raises": "raise SystemExit(3)",
    "cancelled": "task.cancel(); await asyncio.sleep(10)",
    "receives": "asyncio.get_running_loop().call_soon(task.cancel); await child.recv()",
    "sends": """
    asyncio.get_running_loop().call_soon(task.cancel)
    await child.send("x", server)
""".strip(),
    "iterates": """
    asyncio.get_running_loop().call_soon(task.cancel)
    async for message, handle in child: pass
""".strip(),
    "accepts": """
    asyncio.get_running_loop().call_soon(task.cancel)
    async for connection in server: pass
""".strip(),
    "counts": """
    asyncio.get_running_loop().call_soon(task.cancel)
    await asyncio.gather(server.get_connections(), server.wait_closed())
""".strip(),
    "disconnects": "child.disconnect()",
    "aborts": "child.abort()",
}

MANY_ENDS = """
async def main():
    task = asyncio.current_task()
    child = await handleipc.fork(sys.argv[1])
    await child.recv()
    async with handleipc.listen("127.0.0.1", 0) as server:
        END

try:
    run(main())
except asyncio.CancelledError:
    pass
say("over")
"""


@on_both_loops
@pytest.mark.parametrize("how", list(ENDS))
def test_ends_without_noise(write: Program, loop: str, how: str) -> None:
    """However ``main`` ends, nothing is said about it, the child ends too, and nothing leaks."""
    text = MANY_ENDS.replace("END", ENDS[how].replace("\n", "\n    "))
    with started(write("p.py", text), write("c.py", ANSWERS), loop=loop) as run:
        code, err = run.wait()
        assert (code, err) == (3 if how == "raises" else 0, "")
        assert run.all_end()


INTERRUPTED = {
    "receiving": "await child.recv()",
    "sleeping": "await asyncio.sleep(60)",
    "accepting": "await anext(server)",
    "waiting": "await child.wait()",
}

INTERRUPTED_PARENT = """
async def main():
    child = await handleipc.fork(sys.argv[1])
    await child.recv()
    async with handleipc.listen("127.0.0.1", 0) as server:
        asyncio.get_running_loop().call_soon(say, "ready")
        WAIT

run(main())
"""


@on_both_loops
@pytest.mark.parametrize("how", list(INTERRUPTED))
def test_keyboard_interrupt(write: Program, loop: str, how: str) -> None:
    """^C says ``KeyboardInterrupt``, as Python does, and nothing else; the child ends."""
    text = INTERRUPTED_PARENT.replace("WAIT", INTERRUPTED[how])
    with started(write("p.py", text), write("c.py", ANSWERS), loop=loop) as run:
        assert run.line() == ["ready"]
        run.process.send_signal(signal.SIGINT)
        code, err = run.wait()
        assert code == -signal.SIGINT
        assert err.rstrip().endswith("KeyboardInterrupt")
        assert "Warning" not in err
        assert "never retrieved" not in err
        assert "Exception ignored" not in err
        assert "Task was destroyed" not in err
        assert err.count("KeyboardInterrupt\n") <= 1
        assert run.all_end()


@on_both_loops
def test_keyboard_interrupt_for_all(write: Program, loop: str) -> None:
    """A terminal sends ^C to child and parent at once: neither leaves the other behind."""
    text = INTERRUPTED_PARENT.replace("await child.recv()", "pid = (await child.recv())[0]['pid']")
    text = text.replace('say, "ready"', 'say, "ready", pid').replace("WAIT", "await child.recv()")
    with started(write("p.py", text), write("c.py", ANSWERS), loop=loop) as run:
        _, pid = run.line()
        for one in (int(pid), run.process.pid):
            os.kill(one, signal.SIGINT)
        code, err = run.wait()
        # The child's end may be seen before the signal: then recv() says so.
        assert code in (-signal.SIGINT, 1)
        for noise in ("Warning", "never retrieved", "Exception ignored", "was destroyed"):
            assert noise not in err
        assert run.all_end()


SHUTDOWN = """
child = None

async def main():
    global child, server, connection, waiting
    child = await handleipc.fork(sys.argv[1])
    await child.recv()
    child.on("message", print)
    child.on("disconnect", lambda: None)
    child.on("exit", lambda *_: None)
    server = await handleipc.listen("127.0.0.1", 0)
    server.close()

run(main())
say("over")
"""


@on_both_loops
def test_interpreter_shutdown_with_globals(write: Program, loop: str) -> None:
    """Channels that live in globals until the interpreter ends end without a word."""
    with started(write("p.py", SHUTDOWN), write("c.py", ANSWERS), loop=loop) as run:
        assert run.line() == ["over"]
        assert run.wait() == (0, "")
        assert run.all_end()


CHILD_SHUTDOWN = """
async def main():
    parent = await handleipc.parent()
    parent.on("message", lambda *_: None)
    await parent.send({"pid": os.getpid()})
    HOW

run(main())
"""


@on_both_loops
@pytest.mark.parametrize("how", ["return", "sys.exit(0)", "parent.disconnect()", "parent.abort()"])
def test_child_that_ends_first(write: Program, loop: str, how: str) -> None:
    """A child that ends by itself says nothing, and its parent's iteration and wait end."""
    starter = """
async def main():
    child = await handleipc.fork(sys.argv[1])
    said = [message async for message, _ in child]
    say("said", len(said), await child.wait())
    await child.wait_disconnected()

run(main())
"""
    child = write("c.py", CHILD_SHUTDOWN.replace("HOW", how))
    with started(write("p.py", starter), child, loop=loop) as run:
        assert run.line() == ["said", "1", "0"]
        assert run.wait() == (0, "")
        assert run.all_end()


async def test_cancelled_while_forking(write: Program) -> None:
    """Cancelled while it starts, a child does not stay."""
    path = write("c.py", ANSWERS)
    for turns in range(4):
        task = asyncio.create_task(
            handleipc.fork(path, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        )
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        try:
            child = await task
        except asyncio.CancelledError:
            continue
        child.kill(signal.SIGKILL)
        await child.wait()
        await child.wait_disconnected()
        if child.stdin is not None:
            child.stdin.close()
            with contextlib.suppress(ConnectionError):
                await child.stdin.wait_closed()


async def test_exit_with_parent_options(write: Program) -> None:
    """A child bound to us works like any other, with its channel at any number."""
    path = write("c.py", ANSWERS)
    for number in (None, 3, 50):
        child = await handleipc.fork(path, exit_with_parent=True, channel_fd=number)
        message, _ = await child.recv()
        assert message == {"pid": child.pid}
        child.disconnect()
        assert await child.wait() == 0
        await child.wait_disconnected()


async def test_exit_with_parent_and_no_program() -> None:
    """A missing program is ``FileNotFoundError`` at once, bound to us or not."""
    began = time.monotonic()
    for bound in (False, True):
        with pytest.raises(FileNotFoundError):
            await handleipc.spawn("/no/such/program", exit_with_parent=bound)
    assert time.monotonic() - began < 5
