"""What surrounds every test: a count of descriptors and children, and event loops to run on."""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from handleipc.asyncio.logs import throttle
from tests.nodes import NODE_VERSIONS, node_binary

pytest_plugins = ["tests.rotation"]

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop] | None] = {"asyncio": None}
try:
    import uvloop
except ImportError:
    pass
else:
    LOOPS["uvloop"] = uvloop.new_event_loop
    # libuv opens a pipe for signals with the first loop and keeps it for the life of the process.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as warm_up:
        warm_up.run(asyncio.sleep(0))


def open_descriptors() -> dict[int, str]:
    """Return what this process has open, but for the listing itself."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
    return found


def count_descriptors() -> int:
    """Return how many descriptors are open."""
    return len(open_descriptors())


@pytest.fixture(autouse=True)
def log_of_its_own() -> None:
    """Each test may have a line of each kind in the log, though the last had one a moment ago."""
    throttle._kinds.clear()


def end_children() -> None:
    """End what a test left running, or every test after it would fail, and wait for that."""
    for thread in Path("/proc/self/task").iterdir():
        for pid in (thread / "children").read_text().split():
            os.kill(int(pid), signal.SIGKILL)
            os.waitpid(int(pid), 0)


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    """Every test ends with the descriptors it began with, and without child processes."""
    before = open_descriptors()
    yield
    after = open_descriptors()
    if after != before:  # else there is no descriptor in the garbage, which takes long to collect
        gc.collect()
        after = open_descriptors()
    if len(after) != len(before):
        gone = {fd: what for fd, what in before.items() if fd not in after}
        new = {fd: what for fd, what in after.items() if before.get(fd) != what}
        pytest.fail(f"descriptors leaked: new {new}, gone {gone}")
    with pytest.raises(ChildProcessError):
        # Any child left, dead or alive, would be found here. Reapers may need a moment.
        deadline = time.monotonic() + 10
        while True:
            dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if time.monotonic() > deadline:
                end_children()
                pytest.fail(f"a child process was left {'unreaped' if dead else 'running'}")
            time.sleep(0.01)


def pytest_collection_finish() -> None:
    """Keep the collected tests out of the collections around every test: 50 ms each of them."""
    gc.collect()
    gc.freeze()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give coroutine tests an event loop, and the others that ask a Node.js."""
    if inspect.iscoroutinefunction(metafunc.function):
        metafunc.fixturenames.append("event_loop_name")
        metafunc.parametrize("event_loop_name", list(LOOPS))
    if "node" in metafunc.fixturenames:
        metafunc.parametrize("node", NODE_VERSIONS, indirect=True)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a coroutine test, and what its tasks left to the loop's exception handler fails it."""
    function = pyfuncitem.obj
    if not inspect.iscoroutinefunction(function):
        return None
    names = inspect.signature(function).parameters
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    unhandled: list[dict[str, Any]] = []

    async def run() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: unhandled.append(context))
        async with asyncio.timeout(60):
            await function(**arguments)

    factory = LOOPS[pyfuncitem.callspec.params["event_loop_name"]]
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(run())
    expected = pyfuncitem.get_closest_marker("unhandled")
    assert [str(c.get("exception")) for c in unhandled] == list(expected.args if expected else ())
    return True


@pytest.fixture
def node(request: pytest.FixtureRequest) -> str:
    """The path of a Node.js binary, of one of the pinned versions."""
    return str(node_binary(request.param))


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected, non-blocking Unix stream sockets."""
    a, b = socket.socketpair()
    a.setblocking(False)
    b.setblocking(False)
    with a, b:
        yield a, b


@pytest.fixture
def descriptor_limit() -> Iterator[Callable[[int], None]]:
    """Set this process's soft RLIMIT_NOFILE for one test."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def set_limit(limit: int) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))

    yield set_limit
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str, str], Path]:
    """Write a program into the test's directory and return its path."""

    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(inspect.cleandoc(text) + "\n")
        return path

    return write


assert sys.platform == "linux", "the tests count descriptors in /proc"
