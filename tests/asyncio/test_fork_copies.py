"""fork(2) with channels open: the original goes on undisturbed, and the copy is refused."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import handleipc
from tests.asyncio.helpers import (
    RawPeer,
    connection,
    is_open,
    joined,
    raw_peer,
    take_rest,
    turns,
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
