"""How a child begins: signals, descriptors, options; and what stays of a start that failed."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import handleipc
from handleipc.asyncio import attachment
from handleipc.wire import link
from tests.asyncio.helpers import ECHO, works

PIPE = subprocess.PIPE

TELLS = """
    import asyncio, os, signal, sys
    import handleipc

    def state():
        status = dict(line.split(":", 1) for line in open("/proc/self/status"))
        return {
            "sigblk": int(status["SigBlk"], 16),
            "sigign": int(status["SigIgn"], 16),
            "channel": int(handleipc.environment.found["NODE_CHANNEL_FD"]),
            "sid": os.getsid(0),
            "pgid": os.getpgid(0),
            "ids": [os.getuid(), os.getgid(), sorted(os.getgroups())],
            "umask": os.umask(0),
            "open": [n for n in range(3, 256) if os.path.exists(f"/proc/self/fd/{n}")],
        }

    told = state()

    async def main():
        parent = await handleipc.parent()
        await parent.send(told)
        async for message, handle in parent:
            await parent.send(message, handle)

    asyncio.run(main())
"""


async def told_by(child: Any) -> dict[str, Any]:
    """Return what the child says of itself, and see it end."""
    async with asyncio.timeout(20):
        message, _ = await child.recv()
        await end(child)
    return message


async def end(child: Any) -> None:
    child.disconnect()
    async with asyncio.timeout(20):
        assert await child.wait() == 0


# -- signals -------------------------------------------------------------------------------------


def bits(*numbers: int) -> int:
    return sum(1 << (number - 1) for number in numbers)


IGNORED_BY_PYTHON = bits(signal.SIGPIPE, signal.SIGXFSZ)
# The C library's own: glibc's posix_spawn ignores them, nobody can set them, and every child has them.
OF_THE_LIBRARY = bits(*set(range(1, signal.NSIG)) - signal.valid_signals())


@contextlib.contextmanager
def hostile_signals(number: signal.Signals) -> Iterator[None]:
    """Block one signal in this thread and ignore it."""
    handler = signal.signal(number, signal.SIG_IGN)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        signal.signal(number, handler)


@pytest.mark.parametrize("options", [{}, {"exit_with_parent": True}, {"channel_fd": 50}], ids=str)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGRTMIN])
async def test_child_begins_with_signals_as_they_are_by_default(
    program, number: signal.Signals, options: dict[str, Any]
) -> None:
    """What the parent blocks or ignores, the child does not; and the parent still does."""
    target = program("child.py", TELLS)
    with hostile_signals(number):
        child = await handleipc.fork(target, **options)
        assert number in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        assert signal.getsignal(number) is signal.SIG_IGN
    told = await told_by(child)
    assert told["sigblk"] == 0
    assert told["sigign"] & ~IGNORED_BY_PYTHON & ~OF_THE_LIBRARY == 0


async def test_terminate_works_whatever_the_parent_blocks(program) -> None:
    """``terminate()`` ends a child of a parent that blocks SIGTERM itself."""
    with hostile_signals(signal.SIGTERM):
        child = await handleipc.fork(program("child.py", TELLS))
        await child.recv()
        child.terminate()
        async with asyncio.timeout(20):
            assert await child.wait() == -signal.SIGTERM


async def test_ordinary_start_runs_no_python_in_the_child(monkeypatch) -> None:
    """Code between fork and exec rules vfork out: there is none where it can be helped."""
    given: list[Any] = []
    real = subprocess.Popen

    def popen(*args: Any, **options: Any) -> Any:
        given.append(options.get("preexec_fn"))
        return real(*args, **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    ignored = [n for n in signal.valid_signals() if signal.getsignal(n) is signal.SIG_IGN]
    ignored = [n for n in ignored if n not in (signal.SIGPIPE, signal.SIGXFSZ)]
    for number in ignored:  # such as SIGINT, where a shell in the background started the tests
        signal.signal(number, signal.SIG_DFL)
    try:
        for options in ({}, {"channel_fd": 700}, {"channel_fd": 0}, {"umask": 0}):
            child = await handleipc.spawn(sys.executable, "-c", "pass", **options)
            assert await child.wait() == 0
    finally:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)
    assert given == [None] * 4


# -- descriptors ---------------------------------------------------------------------------------

CLOSES = """
    import asyncio, contextlib, os, sys
    import handleipc

    said = os.dup(2)
    for number in map(int, sys.argv[2].split(",")):
        os.close(number)

    async def main():
        child = await handleipc.fork(sys.argv[1])
        told, _ = await child.recv()
        with contextlib.suppress(OSError):  # it may be the loop's own by now
            os.write(1, b"not a message\\n")
        await child.send("echo")
        echo, _ = await child.recv()
        child.disconnect()
        os.write(said, f"{told['channel'] > 2} {echo} {await child.wait()}\\n".encode())

    try:
        asyncio.run(main())
    except BaseException as error:
        os.write(said, repr(error).encode())
    os._exit(0)  # standard streams are gone: there is nothing to flush to
"""


@pytest.mark.parametrize("closed", ["0", "1", "2", "0,1", "0,1,2"])
def test_closed_standard_streams(program, closed: str) -> None:
    """Where 0, 1 or 2 are closed here, the channel takes their place neither here nor there."""
    child = program("child.py", TELLS.replace("told = state()", "told = state(); print('noise')"))
    done = subprocess.run(
        [sys.executable, program("parent.py", CLOSES), child, closed],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr.splitlines()[-1] == "True echo 0"


async def test_pass_fds(program) -> None:
    """``pass_fds`` keep their numbers in the child, beside the channel, whatever number it has."""
    target = program("child.py", TELLS)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for channel_fd in (None, 50, 1):
            child = await handleipc.fork(target, pass_fds=[theirs.fileno()], channel_fd=channel_fd)
            told = await told_by(child)
            assert told["channel"] == (channel_fd or told["channel"])
            expected = {theirs.fileno(), told["channel"]} - {1}
            assert expected <= set(told["open"])
            assert ours.fileno() not in told["open"]
        with pytest.raises(ValueError, match="pass_fds"):
            await handleipc.fork(target, pass_fds=[theirs.fileno()], channel_fd=theirs.fileno())
        assert works(ours, theirs)
    closed = os.open(os.devnull, os.O_RDONLY)
    os.close(closed)
    with pytest.raises(OSError, match=f"pass_fds: {closed} is not open") as caught:
        await handleipc.fork(target, pass_fds=[closed])
    assert caught.value.errno == errno.EBADF


async def test_node_child_with_a_pipe(node: str) -> None:
    """A Node program finds what was passed at its number."""
    reading, writing = os.pipe()
    code = f"require('fs').writeSync({writing}, 'from node'); process.disconnect();"
    child = await handleipc.spawn(node, "-e", code, pass_fds=(writing,))
    os.close(writing)
    with open(reading) as pipe:
        assert await asyncio.to_thread(pipe.read) == "from node"
    async with asyncio.timeout(20):
        assert await child.wait() == 0


# -- what subprocess has -------------------------------------------------------------------------


async def test_groups_and_sessions(program) -> None:
    """``start_new_session`` and ``process_group`` mean what they do in ``subprocess``."""
    target = program("child.py", TELLS)
    child = await handleipc.fork(target)
    assert (await told_by(child))["pgid"] == os.getpgid(0)
    child = await handleipc.fork(target, start_new_session=True)
    told = await told_by(child)
    assert (told["sid"], told["pgid"]) == (child.pid, child.pid)
    child = await handleipc.fork(target, process_group=0)
    told = await told_by(child)
    assert (told["sid"], told["pgid"]) == (os.getsid(0), child.pid)


async def test_umask(program) -> None:
    """``umask`` is the child's; without it it has ours."""
    target = program("child.py", TELLS)
    ours = os.umask(0o022)
    os.umask(ours)
    assert (await told_by(await handleipc.fork(target)))["umask"] == ours
    assert (await told_by(await handleipc.fork(target, umask=0o027)))["umask"] == 0o027


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody else")
@pytest.mark.parametrize("bound", [False, True])
async def test_users_and_groups(tmp_path: Path, bound: bool) -> None:
    """``user``, ``group`` and ``extra_groups``: the channel works for whoever the child becomes."""
    code = (
        "import os, sys; sock = __import__('socket').socket(fileno=int(os.environ['NODE_CHANNEL_FD']));"
        "sock.sendall(repr(os.getuid()).encode() + b'\\n' + repr(os.getgid()).encode() + b'\\n'"
        " + repr(os.getgroups()).encode() + b'\\n')"
    )
    child = await handleipc.spawn(
        *("/usr/bin/env", "python3", "-c", code),
        **{"user": 65534, "group": 65533, "extra_groups": [65532], "exit_with_parent": bound},
    )
    async with asyncio.timeout(20):
        assert [m async for m, _ in child] == [65534, 65533, [65532]]
        assert await child.wait() == 0


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"limits": 7}, TypeError, r"limits=7: give handleipc.Limits\("),
        ({"limits": {"line": 7}}, TypeError, "limits="),
        ({"stdout": "pipe"}, TypeError, "stdout='pipe': give PIPE"),
        ({"user": "nobody-of-this-name"}, (KeyError, ValueError), "nobody"),
        ({"pass_fds": [-1]}, OSError, "pass_fds: -1 is not open"),
    ],
    ids=str,
)
async def test_options_that_make_no_sense(options: Any, error: Any, text: str) -> None:
    """What is no value of an option is refused in words, before anything is made."""
    with pytest.raises(error, match=text):
        await handleipc.fork("child.py", **options)


async def test_program_given_as_a_list() -> None:
    """Who gives one list is told how to give it."""
    with pytest.raises(TypeError, match="one by one"):
        await handleipc.spawn(["node", "x.js"])


# -- starts that fail ----------------------------------------------------------------------------


def failing(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: BaseException) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(owner, name, fail)


NO_MEMORY = OSError(errno.ENOMEM, "Cannot allocate memory")

FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "socketpair": lambda m: failing(m, socket, "socketpair", OSError(errno.EMFILE, "full")),
    "fcntl": lambda m: failing(m, fcntl, "fcntl", NO_MEMORY),
    "fork": lambda m: failing(m, subprocess, "Popen", OSError(errno.EAGAIN, "too many")),
    "thread": lambda m: failing(m, threading.Thread, "start", RuntimeError("no thread")),
    "pidfd": lambda m: failing(m, os, "pidfd_open", OSError(errno.EMFILE, "full")),
    "buffers": lambda m: failing(m, link, "Receiver", NO_MEMORY),
    "memory": lambda m: failing(m, link, "LineFramer", MemoryError()),
    "keeper": lambda m: failing(m, attachment, "_until_the_loop_ends", KeyboardInterrupt()),
}


@pytest.mark.parametrize(
    "options", [{}, {"channel_fd": 40}, {"stdin": PIPE, "stdout": PIPE}], ids=str
)
@pytest.mark.parametrize("faults", [[name] for name in FAULTS] + [["pidfd", "thread"]], ids=str)
async def test_start_that_fails(monkeypatch, faults: list[str], options: dict[str, Any]) -> None:
    """Whatever fails: a child that works, or an error, and neither process nor descriptor stays."""
    argv = (sys.executable, "-c", "import time; time.sleep(600)")
    child = None
    with monkeypatch.context() as patched:
        for name in faults:
            FAULTS[name](patched)
        try:
            child = await handleipc.spawn(*argv, **options)
        except (OSError, MemoryError, RuntimeError, KeyboardInterrupt):
            pass
    if child is not None:
        child.kill(signal.SIGKILL)
        async with asyncio.timeout(20):
            assert await child.wait() == -signal.SIGKILL
        for stream in (child.stdin, child.stdout):
            if isinstance(stream, asyncio.StreamWriter):
                stream.close()
            elif stream is not None:
                await stream.read()
    # The fixture counts descriptors and children.


@pytest.mark.parametrize(
    ("argv", "options", "words"),
    [
        (
            ["node x.js"],
            {},
            "cannot start 'node x.js': there is no such program: give its arg.*one by",
        ),
        (["no-such-program"], {}, "there is no such program in PATH: install it, or give its path"),
        (["/no/such"], {}, "cannot start '/no/such': there is no such file"),
        (["true"], {"cwd": "/no/such"}, "cannot start 'true': it cannot work in cwd='/no/such'"),
        (["./plain"], {}, "'./plain': Permission denied: make it executable, or give its interp"),
        (["./nameless"], {}, "Exec format error: a script needs a first line like #!"),
        (["./lost"], {}, "the interpreter that its first line names does not exist"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
async def test_words_of_a_start_that_failed(tmp_path, monkeypatch, argv, options, words) -> None:
    """They name the program, what is wrong, and what helps."""
    monkeypatch.chdir(tmp_path)
    for name, mode, text in (
        ("plain", 0o644, "#!/bin/sh\n"),
        ("nameless", 0o755, "exit 0\n"),
        ("lost", 0o755, "#!/no/interpreter\n"),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(mode)
    with pytest.raises(OSError, match=words):
        await handleipc.spawn(*argv, **options)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EMFILE, r"no free descriptor: close some, or raise RLIMIT_NOFILE, which is \d+"),
        (errno.ENFILE, "the system has no free descriptor"),
        (errno.EAGAIN, "may have no more processes"),
        (errno.EPERM, "cannot start 'true': Operation not permitted$"),
    ],
)
@pytest.mark.parametrize("owner", [(socket, "socketpair"), (subprocess, "Popen")], ids=str)
async def test_words_of_what_is_short(monkeypatch, owner, number: int, words: str) -> None:
    """Whatever has no room: the limit is named."""
    with monkeypatch.context() as patched:
        failing(patched, *owner, OSError(number, os.strerror(number)))
        with pytest.raises(OSError, match=words) as caught:
            await handleipc.spawn("true")
    assert caught.value.errno == number


# -- as a block ----------------------------------------------------------------------------------


async def test_block(program) -> None:
    """``async with`` gives the child; leaving it disconnects, and waits for its end."""
    async with asyncio.timeout(30):
        async with handleipc.fork(program("echo.py", ECHO)) as child:
            await child.send("hello")
            assert await child.recv() == ("hello", None)
        assert child.returncode == 0


class Left(Exception):
    """What leaves the block."""


@pytest.mark.parametrize("how", ["exception", "cancelled inside", "cancelled as it waits"])
async def test_block_left_in_another_way(how: str) -> None:
    """No process outlives its block: one that does not end by itself is killed."""
    inside = asyncio.Event()
    children = []

    async def block() -> None:
        async with handleipc.spawn("sleep", "600") as child:
            children.append(child)
            inside.set()
            if how == "exception":
                raise Left
            if how == "cancelled inside":
                await asyncio.Event().wait()

    task = asyncio.create_task(block())
    await inside.wait()
    if how == "exception":
        with pytest.raises(Left):
            await task
    else:
        if how == "cancelled as it waits":
            await children[0].wait_disconnected()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert children[0].returncode == -signal.SIGKILL


async def test_start_is_a_coroutine() -> None:
    """A start that was only begun can be a task, or be given up."""
    child = await asyncio.create_task(handleipc.spawn("true"))
    assert await child.wait() == 0
    handleipc.spawn("true").close()
    with pytest.raises(FileNotFoundError):
        async with handleipc.spawn("/no/such"):
            raise AssertionError


async def test_reader_that_cannot_be_added(monkeypatch) -> None:
    """No room in epoll for the pidfd: a thread sees the exit instead."""
    loop = asyncio.get_running_loop()
    if not isinstance(loop, asyncio.SelectorEventLoop):
        pytest.skip("libuv aborts the process when the kernel refuses")
    real, calls = loop.add_reader, []

    def add_reader(fd: int, *args: Any) -> None:
        calls.append(fd)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd, *args)

    monkeypatch.setattr(loop, "add_reader", add_reader)
    child = await handleipc.spawn(sys.executable, "-c", "import sys; sys.exit(7)")
    async with asyncio.timeout(20):
        assert await child.wait() == 7
        await child.wait_disconnected()


@pytest.mark.parametrize("name", ["connect_write_pipe", "connect_read_pipe"])
async def test_pipes_that_cannot_be_opened(monkeypatch, name: str) -> None:
    """Piped stdio that cannot be had ends the child too."""
    loop = asyncio.get_running_loop()
    if not isinstance(loop, asyncio.SelectorEventLoop):
        pytest.skip("uvloop's methods cannot be replaced")

    async def fail(*_: Any) -> Any:
        raise NO_MEMORY

    monkeypatch.setattr(loop, name, fail)
    with pytest.raises(OSError, match="allocate"):
        await handleipc.spawn(sys.executable, "-c", "input()", stdin=PIPE, stdout=PIPE, stderr=PIPE)


@pytest.mark.parametrize("refusals", [1, 1000])
@pytest.mark.unhandled("[Errno 28] No space left on device")
async def test_pipes_that_cannot_be_watched(monkeypatch, refusals: int) -> None:
    """Nor is a pipe left that nobody reads, though asyncio says nothing to who asked for it."""
    loop = asyncio.get_running_loop()
    if not isinstance(loop, asyncio.SelectorEventLoop):
        loop.call_exception_handler({"exception": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))})
        pytest.skip("libuv aborts the process when the kernel refuses")
    real, left = loop._add_reader, [refusals]

    def add_reader(fd: int, callback: Any, *args: Any) -> Any:
        if "ReadPipe" in repr(callback) and left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, callback, *args)

    monkeypatch.setattr(loop, "_add_reader", add_reader)
    starting = handleipc.spawn(sys.executable, "-c", "print(input())", stdin=PIPE, stdout=PIPE)
    if refusals > 1:
        with pytest.raises(OSError, match="No space"):
            await starting
        return
    child = await starting
    child.stdin.write(b"x\n")
    async with asyncio.timeout(20):
        assert await child.stdout.read() == b"x\n"
        assert await child.wait() == 0
    child.stdin.close()


@pytest.mark.skipif(
    sys.version_info < (3, 11, 4), reason="subprocess leaks the pipes of a start that fails there"
)
async def test_no_descriptor_left_to_start_with(descriptor_limit) -> None:
    """With fewer and fewer descriptors free a start works or fails, and leaves nothing."""
    lowest = os.dup(0)
    os.close(lowest)
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    outcomes = []
    for free in range(16):
        descriptor_limit(lowest + free)
        try:
            child = await handleipc.spawn("true", stdin=PIPE, stdout=PIPE)
        except OSError as error:
            assert error.errno == errno.EMFILE
            outcomes.append("refused")
        else:
            await child.wait()
            child.stdin.close()
            await child.stdout.read()
            outcomes.append("works")
        finally:
            descriptor_limit(soft)
    assert outcomes[0] == "refused"
    assert outcomes[-1] == "works"


# -- bound to a process --------------------------------------------------------------------------

FORKS = """
    import asyncio, os, sys
    import handleipc

    async def start(where):
        child = await handleipc.spawn("true", exit_with_parent=True)
        print(where, await child.wait(), flush=True)

    def go(where):
        if sys.argv[1] == "uvloop":
            import uvloop
            uvloop.run(start(where))
        else:
            asyncio.run(start(where))

    go("first")
    if (pid := os.fork()) == 0:
        go("copy")
        if (pid := os.fork()) == 0:
            go("copy of the copy")
            os._exit(0)
        os.waitpid(pid, 0)
        os._exit(0)
    os.waitpid(pid, 0)
    go("first again")
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_exit_with_parent_in_a_forked_process(program, loop: str) -> None:
    """The thread that starts bound children belongs to a process: a copy makes its own."""
    done = subprocess.run(
        # This Python's warning is of the thread, which os.fork() leaves behind.
        [sys.executable, "-W", "ignore", program("p.py", FORKS), loop],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["first 0", "copy 0", "copy of the copy 0", "first again 0"]
