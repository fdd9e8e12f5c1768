"""fork(2) with channels open: the original goes on undisturbed, and the copy is refused."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import handleipc
from handleipc.asyncio.attachment import process_system
from handleipc.protocol.channel import State
from tests.asyncio.helpers import (
    ECHO,
    both_dialects,
    connection,
    is_open,
    joined,
    settle,
    until,
    works,
)
from tests.conftest import LOOPS

ROOT = Path(__file__).parents[2]

# Plays an original with sends in every state, of both ends and in both dialects, and its copy.
STATES = '''
import asyncio, gc, multiprocessing, os, subprocess, sys, threading, time
from concurrent.futures import ProcessPoolExecutor

import handleipc
from handleipc import Limits
from tests.asyncio.helpers import clients, join, settle

HOW, LOOP, PATH = sys.argv[1:4] if __name__ == "__main__" else ("", "", "")
LARGE = "x" * (1 << 20)
STATES = ("queued", "parked", "half written", "unacknowledged", "acknowledged")


async def echo(parent):
    async for message, _ in parent:
        await parent.send(message)


def work(number):
    return number * 2


class Pair:
    """A sender in some state and a receiver that nobody reads yet."""

    def __init__(self, dialect, side, state):
        self.name = f"{dialect} {side} {state}"
        self.state = state
        ends = join(dialect)
        self.ends = ends
        self.sender, self.receiver = ends if side == "parent" else reversed(ends)
        self.tasks = []
        self.expected = []

    def send(self, message, handle=None):
        self.expected.append((message, handle is not None))
        self.tasks.append(asyncio.ensure_future(self.sender.send(message, handle)))

    async def prepare(self, served):
        await settle(*self.ends)
        self.served = served
        if self.state == "acknowledged":
            self.send(0, served.pop())
            got, handle = await self.receiver.recv()
            assert got == 0
            self.handles = [handle]
            await self.tasks[0]
            return
        self.handles = []

    def begin(self):
        """Bring it into its state; nothing runs from here to the fork but ``first_steps``."""
        if self.state == "parked":
            self.send(LARGE)
            self.send(1, self.served.pop())
            self.send(2)
            self.send(3, self.served.pop())
        elif self.state == "half written":
            self.send(LARGE)
            self.send(1)
        elif self.state == "unacknowledged":
            self.send(1, self.served.pop())
            self.send(2)

    def begin_last(self):
        if self.state == "queued":
            for number in range(3):
                self.sender.send_nowait(number)
                self.expected.append((number, False))
            self.sender.send_nowait(3, self.served.pop())
            self.expected.append((3, True))

    async def check(self):
        self.sender.send_nowait("last")
        self.expected.append(("last", False))
        got = [(0, True)] if self.state == "acknowledged" else []
        while not got or got[-1][0] != "last":
            message, handle = await self.receiver.recv()
            got.append((message, handle is not None))
            if handle is not None:
                self.handles.append(handle)
        assert got == self.expected, self.name
        await asyncio.gather(*self.tasks)
        await self.sender.flush()
        for handle in self.handles:
            handle.fileno()
            handle.close()
        self.sender.disconnect()
        await self.receiver.wait_disconnected()
        await self.sender.wait_disconnected()
        try:
            extra = await self.receiver.recv()
        except handleipc.ChannelClosed:
            return
        raise AssertionError(f"{self.name}: {extra}")


def fork(then):
    pid = os.fork()
    if pid == 0:
        then()
        raise AssertionError("never here")
    return pid


async def copies():
    """Let a copy come and go. Returns what the original waits for."""
    if HOW == "exit":
        return [fork(sys.exit)]
    if HOW == "exception":
        def fail():
            raise KeyError("of the copy")
        return [fork(fail)]
    if HOW == "_exit":
        return [fork(lambda: os._exit(0))]
    if HOW == "exec":
        return [fork(lambda: os.execv(sys.executable, [sys.executable, "-c", "pass"]))]
    if HOW == "double fork":
        def again():
            os.waitpid(fork(lambda: os._exit(0)), 0)
            os._exit(0)
        return [fork(again)]
    if HOW == "collected":
        def collect():
            gc.collect()
            for name in list(globals()):
                if name not in ("os", "gc", "PAIRS"):
                    globals().pop(name)
            PAIRS.clear()
            gc.collect()
            os._exit(0)
        return [fork(collect)]
    if HOW == "multiprocessing":
        process = multiprocessing.get_context("fork").Process(target=work, args=(1,))
        process.start()
        process.join()
        assert process.exitcode == 0
        process.close()
    elif HOW == "pool":
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
            assert list(pool.map(work, range(4))) == [0, 2, 4, 6]
    elif HOW == "preexec":
        subprocess.run(
            [sys.executable, "-c", "pass"], preexec_fn=lambda: None, pass_fds=[1], check=True
        )
    elif HOW == "own spawn":
        child = await handleipc.spawn("true", exit_with_parent=True, channel_fd=OURS.fileno())
        assert await child.wait() == 0
    return []


PAIRS = []


async def main():
    global OURS
    child = await handleipc.fork("states:echo", start_new_session=True)
    OURS = child._link
    await child.send("before")
    assert await child.recv() == ("before", None)
    server = await handleipc.listen_unix(PATH)
    names = [(d, e, s) for d in ("node", "native") for e in ("parent", "child") for s in STATES]
    with clients(2 * len(names)) as (_, served):
        PAIRS.extend(Pair(*name) for name in names)
        for pair in PAIRS:
            await pair.prepare(served)
        for pair in PAIRS:
            pair.begin()
        await asyncio.sleep(0)  # each send takes its first step, and nobody has read yet
        for pair in PAIRS:
            pair.begin_last()
        pids = await copies()
        for pid in pids:
            os.waitpid(pid, 0)
        for pair in PAIRS:
            await pair.check()
    assert os.path.exists(PATH)
    assert not child.exited
    await child.send("after")
    assert await child.recv() == ("after", None)
    if not (HOW in ("exit", "exception")):
        # What a copy that unwinds asyncio.run does to these is asyncio's own, see the test.
        assert await asyncio.to_thread(work, 2) == 4
        import socket
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(PATH)
            (await anext(server)).close()
    server.close()
    assert not os.path.exists(PATH)
    child.disconnect()
    assert await child.wait() == 0
    print("all is well", flush=True)


if __name__ == "__main__":
    factory = None
    if LOOP == "uvloop":
        import uvloop
        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())
'''

UNWINDING = ["exit", "exception"]
HOWS = [
    *UNWINDING,
    "_exit",
    "exec",
    "double fork",
    "collected",
    "multiprocessing",
    "pool",
    "preexec",
    "own spawn",
]


@pytest.mark.parametrize(
    ("how", "loop"),
    [(how, loop) for how in HOWS for loop in LOOPS if how not in UNWINDING or loop == "asyncio"],
)
def test_original_goes_on_undisturbed(program, tmp_path: Path, how: str, loop: str) -> None:
    """Whatever a copy does and however it ends, the original's sends arrive once and in order.

    In every state of a send, from either end and in both dialects. Its paths stay, its child is
    not reaped, and nothing is printed in its name.

    Not ours, and not mended here: a copy that unwinds ``asyncio.run`` runs and closes a loop whose
    epoll it shares with the original. asyncio takes its self-pipe off it, so calls from other
    threads wake the original no more (https://bugs.python.org/issue21998). uvloop shares a ring of
    io_uring, too, and libuv aborts both at the first change that fails there. So a copy of a
    running loop leaves by ``os._exit``, as multiprocessing's do.
    """
    done = subprocess.run(
        # Those of Popen, which a copy would give for a child that is not its own.
        [sys.executable, "-W", "always:subprocess:ResourceWarning"]
        + [str(program("states.py", STATES)), how, loop, str(tmp_path / "socket")],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    told = done.stderr
    if how == "exception":
        # The copy's own words, and nobody else's.
        assert told.count("Traceback") == 1
        assert told.endswith("KeyError: 'of the copy'\n")
        told = ""
    assert (done.stdout, done.returncode, told) == ("all is well\n", 0, "")


# -- in the copy ---------------------------------------------------------------------------------


def in_a_copy(function: Callable[[], Any]) -> Any:
    """Run a function in a forked copy, and return what it returned there."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # Of threads, which other tests may have left to the executor.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            result = json.dumps(function())
        except BaseException as error:
            result = json.dumps(repr(error))
        with open(writing, "w") as file:
            file.write(result)
        os._exit(0)
    os.close(writing)
    with open(reading) as file:
        text = file.read()
    assert os.waitpid(pid, 0)[1] == 0
    return json.loads(text)


def refusals(uses: dict[str, Callable[[], Any]], loop: str) -> dict[str, str]:
    """Try each use, each in a loop of its own, and return what was not refused as it ought to."""
    wrong = {}
    for name, use in uses.items():

        async def run(use: Callable[[], Any] = use) -> Any:
            async with asyncio.timeout(10):
                result = use()
                if hasattr(result, "__aiter__") and not hasattr(result, "fileno"):
                    async for value in result:
                        return value
                return await result if inspect.isawaitable(result) else result

        try:
            with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
                result = runner.run(run())
        except handleipc.ForkedCopy as error:
            if "fork(2)" not in str(error):
                wrong[name] = str(error)
        except Exception as error:
            wrong[name] = repr(error)
        else:
            wrong[name] = f"returned {result!r}"
    return wrong


def channel_uses(channel: Any) -> dict[str, Callable[[], Any]]:
    return {
        "send": lambda: channel.send("x"),
        "send_nowait": lambda: channel.send_nowait("x"),
        "recv": channel.recv,
        "iteration": lambda: anext(channel),
        "batches": channel.batches,
        "drain": channel.drain,
        "flush": channel.flush,
        "disconnect": channel.disconnect,
        "abort": channel.abort,
        "on": lambda: channel.on("message", print),
        "once": lambda: channel.once("disconnect", print),
        "wait_disconnected": channel.wait_disconnected,
    }


@both_dialects
@pytest.mark.parametrize("state", ["open", "closing", "closed"])
async def test_every_use_of_a_channel_is_refused(
    dialect: str, state: str, event_loop_name: str
) -> None:
    """In a copy each use of a channel raises ``ForkedCopy``, also with messages to be taken."""
    client, served = connection()
    with client:
        async with joined(dialect) as (a, b):
            for number in range(3):
                b.send_nowait(number)
            assert await a.recv() == (0, None)
            await until(lambda: len(a._protocol.incoming.ready) == 2)
            if state == "closing":
                a.send_nowait("x" * (1 << 22))  # which has no room in the socket
                a.disconnect()
                assert a._protocol.state is State.CLOSING
            elif state == "closed":
                b.disconnect()
                await a.wait_disconnected()
            uses = {**channel_uses(a), "send a handle": lambda: a.send("x", served)}
            assert in_a_copy(lambda: refusals(uses, event_loop_name)) == {}
            assert in_a_copy(lambda: [a.connected, a._link.fileno()]) == [False, -1]
            assert [(await a.recv())[0] for _ in range(2)] == [1, 2]
        served.close()


async def test_every_use_of_a_child_is_refused(event_loop_name: str) -> None:
    """In a copy nothing is asked of the child of another process, and no signal is sent to it."""
    child = await handleipc.spawn("sleep", "600")
    uses = {
        **channel_uses(child),
        "kill": child.kill,
        "terminate": child.terminate,
        "wait": child.wait,
        "ready": child.ready,
        "exited": lambda: child.exited,
        "returncode": lambda: child.returncode,
        "exit_code": lambda: child.exit_code,
        "signal": lambda: child.signal,
    }
    assert in_a_copy(lambda: refusals(uses, event_loop_name)) == {}
    assert in_a_copy(lambda: in_a_copy(lambda: refusals(uses, event_loop_name))) == {}
    assert in_a_copy(lambda: [child.pid, child._pidfd]) == [child.pid, -1]
    assert not child.exited
    child.kill(signal.SIGKILL)
    assert await child.wait() == -signal.SIGKILL
    assert in_a_copy(lambda: refusals(uses, event_loop_name)) == {}


async def test_copy_with_the_process_id_of_the_original(monkeypatch, event_loop_name: str) -> None:
    """A copy in a PID namespace of its own may have the original's number, and is a copy still."""
    async with joined("native") as (a, _):
        number = os.getpid()

        def in_the_copy() -> Any:
            monkeypatch.setattr(os, "getpid", lambda: number)
            return refusals(channel_uses(a), event_loop_name)

        assert in_a_copy(in_the_copy) == {}


async def test_server_in_a_copy(tmp_path: Path, event_loop_name: str) -> None:
    """A copy takes none of a server's connections, and ``close()`` closes its descriptor alone."""
    path = str(tmp_path / "socket")
    server = await handleipc.listen_unix(path)
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(path)
        taken = await anext(server)
        assert server.waiting == 2
        uses = {
            "iteration": lambda: anext(server),
            "batches": server.batches,
            "stop": server.stop,
            "resume": server.resume,
            "get_connections": server.get_connections,
            "wait_closed": server.wait_closed,
        }
        assert in_a_copy(lambda: refusals(uses, event_loop_name)) == {}
        assert in_a_copy(lambda: [server.close(), server.fileno()]) == [2, -1]
        assert os.path.exists(path)
        for connected in (taken, await anext(server), await anext(server)):
            assert not connected.closed
            connected.close()
        client = stack.enter_context(socket.socket(socket.AF_UNIX))
        client.connect(path)
        (await anext(server)).close()
        assert await server.get_connections() == 0
    server.close()
    await server.wait_closed()
    assert not os.path.exists(path)


async def test_descriptors_stay_open_in_a_copy(tmp_path: Path) -> None:
    """Listeners, connections and other descriptors can be used in a copy: prefork servers do."""
    path = str(tmp_path / "socket")
    reading, writing = map(handleipc.FileDescriptor, os.pipe())
    client, served = connection()
    with client, reading, served, contextlib.closing(await handleipc.listen_unix(path)) as server:

        def in_the_copy() -> Any:
            os.write(writing.fileno(), b"from the copy")
            with served.socket() as sock:
                sock.send(b"from the copy")
            with server.socket() as listener, socket.socket(socket.AF_UNIX) as other:
                other.connect(path)
                listener.accept()[0].close()
                return other.recv(1).decode()

        assert in_a_copy(in_the_copy) == ""
        writing.close()
        assert os.read(reading.fileno(), 100) == b"from the copy"
        assert client.recv(100) == b"from the copy"
        assert is_open(client)
        assert works(client, served)


async def test_copy_starts_channels_of_its_own(program, event_loop_name: str) -> None:
    """A copy starts children of its own; descriptors in flight of the original do not count."""
    path = program("echo.py", ECHO)
    client, served = connection()
    with client:
        async with joined("native") as (a, b):
            sending = asyncio.ensure_future(a.send("kept", served))
            await asyncio.sleep(0)  # it is written, and was not read yet
            assert process_system.in_flight.total == 1

            async def talk() -> Any:
                in_flight = process_system.in_flight.total
                child = await handleipc.fork(path, exit_with_parent=True)
                with socket.socket() as sock:
                    sock.bind(("127.0.0.1", 0))
                    sock.listen()
                    await child.send("listener", sock)
                    message, handle = await child.recv()
                    same = handle.sockname == sock.getsockname()
                    handle.close()
                child.disconnect()
                return [in_flight, message, same, await child.wait()]

            def in_the_copy() -> Any:
                with asyncio.Runner(loop_factory=LOOPS[event_loop_name]) as runner:
                    return runner.run(talk())

            assert in_a_copy(in_the_copy) == [0, "listener", True, 0]
            message, handle = await b.recv()
            assert message == "kept"
            await sending
            assert works(client, handle)
            handle.close()
            assert process_system.in_flight.total == 0


async def test_copy_drops_a_channel_with_descriptors_in_flight() -> None:
    """They were never the copy's: what it has in flight itself stays counted."""
    client, served = connection()
    with client:
        async with joined("native") as (a, b):
            a._watch(reading=False, writing=False)  # its acknowledgement is not read
            sending = asyncio.ensure_future(a.send("kept", served))
            await asyncio.sleep(0)
            outgoing = a._protocol.outgoing

            def in_the_copy() -> list[int]:
                process_system.in_flight.add(5)
                outgoing.__del__()
                return [process_system.in_flight.total]

            assert in_a_copy(in_the_copy) == [5]
            assert process_system.in_flight.total == 1
            a._turn(reading=True)
            _, handle = await b.recv()
            await sending
            handle.close()


# -- the end of a channel ------------------------------------------------------------------------


async def collect(channel: Any) -> list[Any]:
    """Iterate over a channel to its end."""
    return [message async for message, _ in channel]


@contextlib.contextmanager
def copy_without_hooks(channel: Any) -> Iterator[None]:
    """Another process that has the channel's socket: a program, in which no hook has run."""
    fd = channel._link.fileno()
    holder = subprocess.Popen(["sleep", "600"], pass_fds=[fd])
    try:
        yield
    finally:
        holder.kill()
        holder.wait()


@contextlib.contextmanager
def forked_copy() -> Iterator[None]:
    """A copy made by multiprocessing, which lives on."""
    holding = multiprocessing.get_context("fork").Event()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        process = multiprocessing.get_context("fork").Process(target=holding.wait)
        process.start()
    try:
        yield
    finally:
        holding.set()
        process.join()
        process.close()


@both_dialects
@pytest.mark.parametrize("how", ["disconnect", "abort"])
@pytest.mark.parametrize("holder", ["copy", "program"])
@pytest.mark.parametrize("side", [0, 1])
async def test_end_reaches_the_peer(dialect: str, how: str, holder: str, side: int) -> None:
    """The end of a channel reaches the peer though another process holds a copy of the socket."""
    async with joined(dialect) as ends:
        ours, peer = ends[side], ends[1 - side]
        with copy_without_hooks(ours) if holder == "program" else forked_copy():
            getattr(ours, how)()
            async with asyncio.timeout(20):
                await peer.wait_disconnected()
                await ours.wait_disconnected()
                assert await collect(peer) == []


WORKER = """
import asyncio, handleipc, multiprocessing, os, signal, sys

async def main():
    parent = await handleipc.parent()
    process = multiprocessing.get_context("fork").Process(target=signal.pause)
    process.start()
    await parent.send(process.pid)
    if sys.argv[1] == "disconnects":
        parent.disconnect()
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("how", ["disconnects", "dies"])
async def test_end_of_a_worker_with_a_copy(program, how: str) -> None:
    """A worker's goodbye, and its death, reach the parent though a copy of the worker lives on."""
    child = await handleipc.fork(program("worker.py", WORKER), how)
    pid, _ = await child.recv()
    try:
        if how == "dies":
            child.kill(signal.SIGKILL)
        async with asyncio.timeout(20):
            assert await collect(child) == []
            await child.wait_disconnected()
        assert child.exited == (how == "dies")
        os.kill(pid, 0)  # the copy lives
    finally:
        os.kill(pid, signal.SIGKILL)
        child.kill(signal.SIGKILL)
        await child.wait()


POOL_PARENT = """
import asyncio, handleipc, multiprocessing, os, signal, sys
from concurrent.futures import ProcessPoolExecutor

async def main():
    child = await handleipc.fork(sys.argv[1])
    await child.ready()
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork"))
    worker = await asyncio.get_running_loop().run_in_executor(pool, os.getpid)
    print(worker, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""

ORPHAN = """
import asyncio, handleipc

async def main():
    parent = await handleipc.parent()
    async for message, handle in parent:
        pass
    print("saw the end", flush=True)

asyncio.run(main())
"""


async def test_parent_killed_while_its_pool_lives(program) -> None:
    """The children of a parent that was killed learn of it though its process pool lives on."""
    parent = subprocess.Popen(
        [sys.executable, program("parent.py", POOL_PARENT), program("orphan.py", ORPHAN)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    with parent.stdout:
        worker = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
        assert await asyncio.to_thread(parent.stdout.readline) == "saw the end\n"
        os.kill(worker, signal.SIGKILL)  # it was there all the time


# -- starting programs ---------------------------------------------------------------------------


async def test_programs_started_with_a_hook(program) -> None:
    """``preexec_fn`` and ``pass_fds`` work: only channels are closed before the program runs."""
    client, served = connection()
    with client, served:
        async with joined("native") as (a, b):
            fds = [served.fileno(), a._link.fileno()]
            shown = subprocess.run(
                [sys.executable, "-c", SHOW, *map(str, fds)],
                preexec_fn=lambda: None,
                pass_fds=fds[:1],
                capture_output=True,
                text=True,
                check=True,
            )
            assert shown.stdout == "True False\n"
            child = await handleipc.fork(
                program("echo.py", ECHO),
                exit_with_parent=True,
                channel_fd=b._link.fileno(),
                pass_fds=fds[:1],
            )
            await child.send("x")
            assert await child.recv() == ("x", None)
            child.disconnect()
            assert await child.wait() == 0
            await settle(a, b)


SHOW = """
import os, sys
print(*(os.path.exists(f"/proc/self/fd/{fd}") for fd in sys.argv[1:]))
"""
