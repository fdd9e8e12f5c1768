"""``fork`` and ``spawn`` start a child with a channel; ``parent`` is the other end of it.

How a process starts is ``starting``'s, and how its exit is taken ``reaping``'s: it is seen through
a pidfd, or by a thread where there is none.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import logging
import os
import shlex
import signal as signals
import subprocess
import sys
from collections.abc import Callable, Coroutine, Generator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, ParamSpec, Unpack

from handleipc.asyncio.channel import Channel
from handleipc.asyncio.child import Child
from handleipc.asyncio.logs import cut, log
from handleipc.asyncio.pipes import to_the_end
from handleipc.asyncio.reaping import Process
from handleipc.asyncio.starting import (
    Options,
    StdIO,
    channel_pair,
    check,
    check_limits,
    explained,
    fork_command,
    refuse_descriptors,
    start,
)
from handleipc.environment import adopt, child_environment, socket_cookie
from handleipc.exceptions import ChannelBusy, HandleIPCError
from handleipc.limits import Limits
from handleipc.system import close_quietly

__all__ = ["Child", "Options", "Starting", "fork", "parent", "spawn"]

PIPE = subprocess.PIPE
P = ParamSpec("P")


class Starting(Coroutine[Any, Any, Child]):
    """What ``fork`` and ``spawn`` return: awaited it gives the child, in ``async with`` it is one.

    Leaving the block disconnects, and waits until the child has ended. An exception in the block,
    or a cancellation while it waits, kills the child first: no process outlives its block.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, Child]) -> None:
        self._coroutine = coroutine
        self._child: Child | None = None

    def __await__(self) -> Generator[Any, Any, Child]:
        return self._coroutine.__await__()

    def send(self, value: Any) -> Any:
        """Go on, as a coroutine does."""
        return self._coroutine.send(value)

    def throw(self, *error: Any) -> Any:
        """Raise an exception where it waits, as a coroutine does."""
        return self._coroutine.throw(*error)

    def close(self) -> None:
        """Give the start up, as a coroutine does."""
        self._coroutine.close()

    async def __aenter__(self) -> Child:
        self._child = await self
        return self._child

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        child = self._child
        assert child is not None
        try:
            if kind is None:
                child.disconnect()
                await child.wait()
        finally:
            if not child.exited:
                child.kill(signals.SIGKILL)
                child.abort()
                await child.wait()


def _starting(start: Callable[P, Coroutine[Any, Any, Child]]) -> Callable[P, Starting]:
    """Have a coroutine function return a ``Starting``."""

    @functools.wraps(start)
    def returns_starting(*args: P.args, **kwargs: P.kwargs) -> Starting:
        return Starting(start(*args, **kwargs))

    return returns_starting


@_starting
async def spawn(
    *argv: str | os.PathLike[str],
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    stdin: StdIO = None,
    stdout: StdIO = None,
    stderr: StdIO = None,
    serialization: str = "json",
    channel_fd: int | None = None,
    limits: Limits | None = None,
    accept_handles: bool = True,
    dialect: str | None = None,
    exit_with_parent: bool = False,
    start_new_session: bool = False,
    process_group: int | None = None,
    user: str | int | None = None,
    group: str | int | None = None,
    extra_groups: Iterable[str | int] | None = None,
    umask: int = -1,
    pass_fds: Sequence[int] = (),
) -> Child:
    """Start any program that speaks the channel: Node, Python, another language.

    ``child = await spawn(...)``, or ``async with spawn(...) as child``, which ends the child when
    the block is left: politely, or by SIGKILL after an exception.

    Args:
        argv: the program and its arguments; a name without a slash is looked up in PATH.
        env: its environment, instead of a copy of this process's. The variables that name the
            channel are added.
        cwd: its working directory.
        stdin, stdout, stderr: as for ``asyncio.create_subprocess_exec``; with ``PIPE`` the
            child's attribute of the same name is a stream.
        serialization: ``"json"``, the only one so far.
        channel_fd: the descriptor number of the channel in the child; None for any. 0, 1 and 2
            take the place of that standard stream.
        limits: the bounds of this end.
        accept_handles: False refuses descriptors from the child, in the kernel where it can
            (Linux 6.16). A Node child that sends one all the same does not notice the kernel's
            refusal, and waits for ever before it sends anything else.
        dialect: ``"node"`` keeps the channel to Node's own wire; None speaks the native dialect
            if the child does.
        exit_with_parent: have the kernel kill the child when this process ends, even if it is
            blocked (Linux). Without it a child sees ``disconnect`` and ends when it likes.
        start_new_session, process_group, user, group, extra_groups, umask, pass_fds: as
            ``subprocess.Popen`` has them. A terminal's Ctrl-C, and a signal to this process's
            group, reach a child in a session or group of its own (``process_group=0``) no more.

    The child begins with no signal ignored or blocked, whatever this process does about its own.

    Raises:
        FileNotFoundError, PermissionError: the program cannot be started.
        ValueError: an option makes no sense.
        TypeError: no program was named, or an option is not what it should be.
        OSError: a descriptor of ``pass_fds`` is not open, or the system has no room for more.
    """
    if not argv:
        raise TypeError("spawn() needs the program to start")
    if isinstance(argv[0], list | tuple):
        raise TypeError("give the program and its arguments one by one: spawn('node', 'x.js')")
    for number, arg in enumerate(argv, 1):
        if not isinstance(arg, str | bytes | os.PathLike):
            raise TypeError(f"spawn(): argument {number} is {arg!r}: give strings or paths")
    if serialization != "json":
        raise ValueError(f"serialization={serialization!r} is not supported yet: use 'json'")
    if dialect not in (None, "node"):
        raise ValueError(f"dialect={dialect!r}: give 'node', or None to let both ends agree")
    popen_options = {
        "cwd": cwd,
        "stdin": stdin,
        "stdout": stdout,
        "stderr": stderr,
        "start_new_session": start_new_session,
        "process_group": process_group,
        "user": user,
        "group": group,
        "extra_groups": extra_groups,
        "umask": umask,
        "pass_fds": pass_fds,
    }
    check(limits, popen_options)
    limits = limits or Limits()
    program = os.fsdecode(argv[0])
    with explained(program, cwd):
        ours, theirs = channel_pair()
    child: Child | None = None
    process: Process | None = None
    try:
        with contextlib.ExitStack() as steps:
            steps.callback(close_quietly, theirs)
            steps.enter_context(explained(program, cwd))
            if not accept_handles:
                refuse_descriptors(ours)
            invite = socket_cookie(theirs) if dialect is None else None
            popen = start(
                [os.fspath(arg) for arg in argv],
                theirs,
                channel_fd,
                lambda fd: child_environment(
                    dict(os.environ if env is None else env), fd, limits, invite
                ),
                popen_options,
                exit_with_parent=exit_with_parent,
            )
            process = Process(popen)
        child = Child(
            ours, limits, process, invited=invite is not None, accept_handles=accept_handles
        )
        if log.isEnabledFor(logging.INFO):
            words = shlex.join([os.fspath(arg) for arg in argv])
            log.info("child %d started: %s", child.pid, cut(words))
        if PIPE in (stdin, stdout, stderr):
            await to_the_end(child._open_pipes())
    except BaseException:
        # Cancelled or failed half way: nothing of the child stays.
        if child is not None:
            child._abandon()
        else:
            close_quietly(ours)
            if process is not None:
                process.give_up()
        raise
    return child


@_starting
async def fork(
    target: str | os.PathLike[str],
    *args: str,
    executable: str | None = None,
    interpreter_args: Sequence[str] = (),
    **options: Unpack[Options],
) -> Child:
    """Start a fresh Python interpreter with a channel: Node's ``fork``, not fork(2).

    ``child = await fork(...)``, or ``async with fork(...) as child``, as ``spawn``.

    Args:
        target: a ``.py`` file (relative to ``cwd``), a dotted module (run as with ``-m``), or
            ``"module:function"``: the module is imported with this process's ``sys.path``, and
            ``function(parent)`` is called with the channel, and awaited if it is a coroutine
            function. After a plain function the process stays until disconnect.
        args: the child's ``sys.argv[1:]``.
        executable: the interpreter, instead of this process's.
        interpreter_args: its options, before the target.
        options: as for ``spawn``.

    A program that was frozen into an executable calls ``freeze_support()`` first, or names an
    interpreter.

    Raises:
        FileNotFoundError, PermissionError: the interpreter cannot be started.
        ValueError, TypeError: the target or an option makes no sense.
        RuntimeError: this program is frozen and did not call ``freeze_support()``, or it is
            embedded in another, and no interpreter is named.
    """
    command = fork_command(target, args, executable, interpreter_args)
    return await spawn(*command, **options)


class _ParentChannel(Channel):
    """The channel to the parent: it ends with the process that made it, whoever holds a copy."""

    _pidfd = -1

    def _attach(self) -> None:
        super()._attach()
        self._pidfd = self._link.peer_pidfd()
        if self._pidfd >= 0:
            try:
                self._loop.add_reader(self._pidfd, self._on_exit)
            except OSError:
                self._close_pidfd()  # no room in the epoll: EOF tells, where nobody holds a copy

    def _detach(self) -> None:
        super()._detach()
        if self._pidfd >= 0:
            if not self._loop.is_closed():
                self._loop.remove_reader(self._pidfd)
            self._close_pidfd()

    def _give_up(self) -> None:
        super()._give_up()
        if self._pidfd >= 0:
            self._close_pidfd()

    def _close_pidfd(self) -> None:
        fd, self._pidfd = self._pidfd, -1
        close_quietly(fd)

    def _on_exit(self) -> None:
        if not self._is_copy:
            self._end(HandleIPCError("the parent process has ended"), peer_is_dead=True)


class _Parent(NamedTuple):
    """The channel to the parent, in the process that adopted it."""

    channel: Channel
    accept_handles: bool
    before: _Parent | None
    """What this one was forked with (fork(2)): not its own, and never collected."""
    pid: int


_parent: _Parent | None = None


async def parent(*, limits: Limits | None = None, accept_handles: bool = True) -> Channel:
    """Return the channel to the process that started this one.

    The first call adopts the descriptor that NODE_CHANNEL_FD names: what it named when handleipc
    was imported, or what it names now. Later calls return the same object. A channel whose loop was
    closed moves to the running one.

    Ctrl-C reaches every process of a terminal. From here on it ends this one as ever, but without a
    traceback, unless ``sys.excepthook`` is the program's own or Python is in its development mode.

    Args:
        limits: the bounds of this end; None for the defaults, or for those of the first call.
        accept_handles: False refuses descriptors from the parent, as ``spawn`` does.

    Raises:
        NoChannel: this process was started without one, what is named is not a channel, or this
            process is a forked copy (fork(2)) of the one that it belongs to.
        ChannelBusy: another event loop that still runs has it.
        ValueError: an earlier call gave other options.
        TypeError: ``limits`` is none.
    """
    global _parent
    check_limits(limits)
    if _parent is None or _parent.pid != os.getpid():
        _parent = _Parent(
            _adopt(limits or Limits(), accept_handles), accept_handles, _parent, os.getpid()
        )
        return _parent.channel
    channel = _parent.channel
    if limits not in (None, channel._limits) or (_parent.accept_handles and not accept_handles):
        raise ValueError(
            "parent() was called before with other options, and there is one channel: give limits="
            " and accept_handles= at the first call"
        )
    if channel._loop is not asyncio.get_running_loop():
        if not channel._loop.is_closed():
            raise ChannelBusy("another event loop, which is not closed, has this channel")
        if not channel._is_closed:
            channel._attach()
    return channel


def _adopt(limits: Limits, accept_handles: bool) -> Channel:
    found = adopt(os.environ)
    if not accept_handles:
        refuse_descriptors(found.sock)
    channel = _ParentChannel(
        found.sock, limits, invited_by=found.invited_by, accept_handles=accept_handles
    )
    if sys.excepthook is sys.__excepthook__ and not sys.flags.dev_mode:
        sys.excepthook = _show_unless_interrupted
    # A program may end with its channel open, between two loops or for good. The kernel closes it
    # then, when all can see that the process ends: were it closed now, a crash would look like a
    # goodbye from a process that lives on.
    atexit.register(found.sock.detach)
    return channel


def _show_unless_interrupted(
    kind: type[BaseException], error: BaseException, where: TracebackType | None
) -> None:
    """Show an exception that nobody caught, but not Ctrl-C, which every process of a terminal gets.

    One that has a parent ends of it as ever (the parent sees SIGINT), without a word.
    """
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, where)
