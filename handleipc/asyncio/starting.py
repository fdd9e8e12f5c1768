"""The one start path of every child: ``subprocess.Popen``, and where its channel goes.

Never ``loop.subprocess_exec``: uvloop's leaks inheritable descriptors. The child begins as Node's
do: no signal is ignored or blocked, and of this process's descriptors it has the standard streams,
the channel and what ``pass_fds`` names.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import resource
import signal as signals
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import IO, Any, TypedDict

from handleipc.commands import frozen_command, python_command
from handleipc.limits import Limits
from handleipc.ownership import in_copies
from handleipc.system import close_quietly
from handleipc.wire.syscalls import exit_with_parent as die_with_parent
from handleipc.wire.syscalls import inherits_signals, reset_signals

__all__ = [
    "Frozen",
    "Options",
    "StdIO",
    "channel_pair",
    "check",
    "check_limits",
    "explained",
    "fork_command",
    "refuse_descriptors",
    "start",
]

StdIO = int | IO[Any] | None

STREAMS = ("stdin", "stdout", "stderr")

# asm-generic/socket.h, Linux 6.16: a receiver that sets it to 0 makes the sender's sendmsg with
# descriptors fail with EPERM.
SO_PASSRIGHTS = 83


class Options(TypedDict, total=False):
    """What ``fork`` and ``spawn`` both take; see ``spawn``."""

    env: Mapping[str, str] | None
    cwd: str | os.PathLike[str] | None
    stdin: StdIO
    stdout: StdIO
    stderr: StdIO
    serialization: str
    channel_fd: int | None
    limits: Limits | None
    accept_handles: bool
    dialect: str | None
    exit_with_parent: bool
    start_new_session: bool
    process_group: int | None
    user: str | int | None
    group: str | int | None
    extra_groups: Iterable[str | int] | None
    umask: int
    pass_fds: Sequence[int]


def channel_pair() -> tuple[socket.socket, socket.socket]:
    """Return both ends of a new channel: never 0, 1 or 2, though these may be free here.

    A daemon closes its standard streams, and what it or its child prints is no message.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        return _lift(ours), _lift(theirs)
    except BaseException:
        close_quietly(ours, theirs)
        raise


def check(limits: Limits | None, options: Mapping[str, Any]) -> None:
    """Refuse options that make no sense, before anything is made.

    Raises:
        TypeError, OSError: one of them is not what it should be.
    """
    check_limits(limits)
    for name in STREAMS:
        stream = options[name]
        if not (stream is None or isinstance(stream, int) or hasattr(stream, "fileno")):
            raise TypeError(f"{name}={stream!r}: give PIPE, DEVNULL, a file or a descriptor number")
    for fd in options["pass_fds"]:
        try:
            os.fstat(fd)
        except OSError as error:
            # The number would be free, and the channel might get it.
            raise OSError(error.errno, f"pass_fds: {fd} is not open here") from None


def check_limits(limits: Limits | None) -> None:
    """Refuse what is no ``Limits``."""
    if not isinstance(limits, Limits | None):
        raise TypeError(f"limits={limits!r}: give handleipc.Limits(...), or None for its defaults")


def _lift(sock: socket.socket) -> socket.socket:
    if sock.fileno() > 2:
        return sock
    fd = fcntl.fcntl(sock, fcntl.F_DUPFD_CLOEXEC, 3)
    close_quietly(sock)
    try:
        return socket.socket(fileno=fd)
    except BaseException:
        close_quietly(fd)
        raise


def refuse_descriptors(sock: socket.socket) -> None:
    """Have the kernel refuse descriptors sent to ``sock``; an older one leaves it to the reader."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)


@contextlib.contextmanager
def explained(program: str, cwd: str | os.PathLike[str] | None) -> Iterator[None]:
    """Have an error of a start name the program, whose fault it is, and what helps."""
    try:
        yield
    except OSError as error:
        why = _why_not_started(error, program, cwd)
        raise OSError(error.errno, f"cannot start {program!r}: {why}") from error


def _why_not_started(error: OSError, program: str, cwd: str | os.PathLike[str] | None) -> str:
    why = error.strerror or str(error)
    match error.errno:
        case errno.EMFILE:
            soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            return (
                "this process has no free descriptor: close some, or raise RLIMIT_NOFILE, which is"
                f" {soft}"
            )
        case errno.ENFILE:
            return "the system has no free descriptor (/proc/sys/fs/file-max)"
        case errno.EAGAIN:
            return f"{why}: the user may have no more processes (RLIMIT_NPROC, or a cgroup's pids)"
    if cwd is not None and error.filename == cwd:
        return f"it cannot work in cwd={os.fspath(cwd)!r}: {why}"
    path = os.path.join(os.fspath(cwd or ""), program)
    match error.errno:
        case errno.ENOENT if " " in program:
            return "there is no such program: give its arguments one by one: spawn('node', 'x.js')"
        case errno.ENOENT if "/" not in program:
            return "there is no such program in PATH: install it, or give its path"
        case errno.ENOENT if os.path.exists(path):
            return "the interpreter that its first line names does not exist"
        case errno.ENOENT:
            return "there is no such file"
        case errno.EACCES if os.path.isfile(path):
            return f"{why}: make it executable, or give its interpreter before it"
        case errno.ENOEXEC:
            return f"{why}: a script needs a first line like #!/usr/bin/env python3"
    return why


def start(
    argv: list[str],
    theirs: socket.socket,
    channel_fd: int | None,
    environment: Callable[[int], dict[str, str]],
    options: dict[str, Any],
    *,
    exit_with_parent: bool,
) -> subprocess.Popen[bytes]:
    """Run a program with the socket at the wanted number.

    Args:
        argv: the program and its arguments.
        theirs: the child's end of the channel, *borrowed*.
        channel_fd: its number in the child; None for any.
        environment: called with that number, returns the child's environment.
        options: of ``Popen``.
        exit_with_parent: have the kernel kill it when this process ends.

    Raises:
        FileNotFoundError, PermissionError, OSError: the program cannot be started.
        ValueError: ``channel_fd`` makes no sense.
    """
    run = partial(_start, argv, theirs, channel_fd, environment, options)
    if not exit_with_parent:
        return run(in_child=[])
    # The kernel's notice follows the thread that forks: one that lives as long as we do.
    in_child = [partial(die_with_parent, signals.SIGKILL, os.getpid())]
    return _starter(os.getpid()).submit(run, in_child=in_child).result()


def _start(
    argv: list[str],
    theirs: socket.socket,
    channel_fd: int | None,
    environment: Callable[[int], dict[str, str]],
    options: dict[str, Any],
    *,
    in_child: list[Callable[[], object]],
) -> subprocess.Popen[bytes]:
    passed = tuple(options["pass_fds"])
    options = {**options, "pass_fds": passed}
    if channel_fd is None:
        fd = theirs.fileno()
        return _popen(argv, environment(fd), {**options, "pass_fds": (fd, *passed)}, in_child)
    if channel_fd < 0:
        raise ValueError(f"channel_fd={channel_fd} is no descriptor number")
    if channel_fd in passed:
        raise ValueError(f"channel_fd={channel_fd} is in pass_fds= too: give it another number")
    env = environment(channel_fd)
    if channel_fd <= 2:
        name = STREAMS[channel_fd]
        if options[name] is not None:
            raise ValueError(f"channel_fd={channel_fd} takes the place of {name}=, which is given")
        return _popen(argv, env, {**options, name: theirs}, in_child)
    options["pass_fds"] = (channel_fd, *passed)
    slot = fcntl.fcntl(theirs, fcntl.F_DUPFD_CLOEXEC, channel_fd)
    _moving.append((slot, channel_fd))
    try:
        if slot != channel_fd:
            # This process uses the number itself, so it is not the one of Popen's error pipe
            # either, and may be replaced in the child. (Were it free, it could be.)
            in_child = [*in_child, partial(os.dup2, slot, channel_fd)]
        return _popen(argv, env, options, in_child)
    finally:
        _moving.remove((slot, channel_fd))
        close_quietly(slot)


# Channels of children that are being started, and the numbers that they are to get.
_moving: list[tuple[int, int]] = []


def _keep_numbers() -> None:
    # In the child, before its preexec_fn, subprocess wants every number of pass_fds to be open. If
    # it was one of our own channels, that has been closed there as in any copy.
    for slot, number in _moving:
        try:
            os.fstat(number)
        except OSError:
            os.dup2(slot, number, inheritable=False)


in_copies(_keep_numbers)


def _popen(
    argv: list[str],
    env: dict[str, str],
    options: dict[str, Any],
    in_child: list[Callable[[], object]],
) -> subprocess.Popen[bytes]:
    # Python code between fork and exec only where it cannot be helped: it rules vfork out, which
    # costs 7 ms and 70 ms for each gigabyte of this process, where there were 0.2 ms.
    if inherits_signals():
        in_child = [reset_signals, *in_child]
    if in_child:
        options = {**options, "preexec_fn": partial(_call_all, in_child)}
    return subprocess.Popen(argv, env=env, bufsize=0, **options)


def _call_all(functions: list[Callable[[], object]]) -> None:
    for function in functions:
        function()


@functools.cache
def _starter(pid: int) -> ThreadPoolExecutor:
    """Return the thread that starts processes bound to this one: a forked copy has no threads."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="handleipc-starter")


class Frozen:
    """What this process knows of having been frozen into an executable."""

    is_supported = False
    """Whether ``freeze_support()`` was called."""


def fork_command(
    target: str | os.PathLike[str],
    args: Sequence[str],
    executable: str | None,
    interpreter_args: Sequence[str],
) -> list[str]:
    """Return the command line of ``fork``: an interpreter's, or a frozen program's own.

    Raises:
        ValueError, TypeError: the target or an option makes no sense.
        RuntimeError: there is no interpreter that could run it.
    """
    frozen = executable is None and getattr(sys, "frozen", False)
    executable = executable or sys.executable
    if not executable:
        raise RuntimeError(
            "this interpreter is embedded in another program (sys.executable is empty): say which"
            " one runs the child, with executable="
        )
    if not frozen:
        return python_command(target, args, executable, interpreter_args, sys.path)
    if not Frozen.is_supported:
        # sys.executable is this very program: it would start itself again, without end.
        raise RuntimeError(
            "this program is frozen: call handleipc.freeze_support() first in its main module,"
            " under `if __name__ == '__main__':`, or name an interpreter with executable="
        )
    if interpreter_args:
        raise ValueError("a frozen program has no interpreter to give interpreter_args= to")
    return frozen_command(target, args, executable)
