"""``fork`` and ``spawn`` start a child with a channel; ``parent`` is the other end of it.

How a process starts is ``starting``'s, and how its exit is taken ``reaping``'s: it is seen through
a pidfd, or by a thread where there is none.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import signal as signals
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import IO, ClassVar, NamedTuple, Unpack

from handleipc.asyncio.channel import Channel
from handleipc.asyncio.pipes import open_reader, open_writer, to_the_end
from handleipc.asyncio.reaping import Process
from handleipc.asyncio.starting import (
    Options,
    StdIO,
    channel_pair,
    check,
    check_limits,
    fork_command,
    refuse_descriptors,
    start,
)
from handleipc.exceptions import ChannelBusy, LocalProtocolError, WorkerExited
from handleipc.limits import Limits
from handleipc.spawn import (
    adopt,
    child_environment,
    socket_cookie,
)

__all__ = ["Child", "Options", "fork", "parent", "spawn"]

PIPE = subprocess.PIPE


class Child(Channel):
    """A child process and the channel to it.

    Events beside those of ``Channel``: ``"exit"(code, signal)`` when the process has ended,
    ``"close"(code, signal)`` when its piped stdio has ended too. Each comes once, in Node's order:
    ``disconnect``, ``exit``, ``close``.

    Attributes:
        stdin: a ``StreamWriter`` if ``stdin=PIPE`` was asked for, else None.
        stdout: a ``StreamReader`` if ``stdout=PIPE`` was asked for, else None.
        stderr: likewise.
    """

    EVENTS: ClassVar[frozenset[str]] = Channel.EVENTS | {"exit", "close"}

    _pidfd = -1

    stdin: asyncio.StreamWriter | None = None
    stdout: asyncio.StreamReader | None = None
    stderr: asyncio.StreamReader | None = None

    def __init__(
        self,
        sock: socket.socket,
        limits: Limits,
        process: Process,
        *,
        invited: bool,
        accept_handles: bool,
    ) -> None:
        self._process = process
        self._has_reaper = self._exit_told = False
        self._pipes: list[asyncio.Future[None]] = []
        self._transports: list[asyncio.BaseTransport] = []
        super().__init__(sock, limits, inviting=invited, accept_handles=accept_handles)
        try:
            self._watch_process()
        except BaseException:
            self.abort()
            raise

    @property
    def pid(self) -> int:
        """The process id; it stays the child's until its exit has been seen."""
        return self._process.pid

    @property
    def exited(self) -> bool:
        """Whether the process has ended, as far as is known here."""
        if not self._process.ended and self._loop.is_closed():
            self._process.reap(self._pidfd)  # nobody watches it any more
        return self._process.ended

    @property
    def returncode(self) -> int | None:
        """The exit code, or minus the signal's number if a signal ended it.

        None while it runs, and if its exit was not seen: ``exited`` tells these apart.
        """
        return self._process.end.result() if self.exited else None

    @property
    def exit_code(self) -> int | None:
        """The exit code; None while it runs, or if a signal ended it."""
        code = self.returncode
        return code if code is not None and code >= 0 else None

    @property
    def signal(self) -> int | None:
        """The signal that ended it, or None."""
        code = self.returncode
        return -code if code is not None and code < 0 else None

    async def wait(self) -> int | None:
        """Wait until the process has ended, and return ``returncode``.

        None means that its exit was not seen, and nobody can tell how it ended: this process
        ignores SIGCHLD, or other code in it waited for the child. The channel and piped stdio may
        have more to read. Any event loop may wait, also after the child's own has ended.
        """
        if not self.exited and self._loop is not asyncio.get_running_loop():
            # Its own loop may never run again, so a thread has to see it.
            self._reap_in_thread(notify=True)
        return await asyncio.wrap_future(self._process.end)

    def kill(self, sig: int = signals.SIGTERM) -> None:
        """Send a signal (SIGTERM). The channel is not touched; nothing happens after the exit."""
        self._process.send_signal(sig, self._pidfd)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.kill()

    def __repr__(self) -> str:
        return f"<Child pid={self.pid} {self._protocol.state.name.lower()} {self.dialect}>"

    # -- the process -----------------------------------------------------------------------------

    def _watch_process(self) -> None:
        try:
            self._pidfd = os.pidfd_open(self.pid)
            self._loop.add_reader(self._pidfd, self._on_exit)
        except (AttributeError, OSError):
            # No pidfd on this system, none free, none of a process that somebody has reaped
            # already, or no room to watch it: a thread waits.
            self._close_pidfd()
            self._reap_in_thread(notify=True)

    def _reap_in_thread(self, *, notify: bool) -> None:
        if self._has_reaper:
            return
        self._has_reaper = True
        loop, on_exit = self._loop, self._on_exit

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(on_exit)

        self._process.reap_in_thread(tell if notify else None)

    def _forget_pidfd(self) -> None:
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            self._close_pidfd()

    def __del__(self) -> None:
        self._close_pidfd()  # its loop was closed without a word

    def _close_pidfd(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def _on_exit(self) -> None:
        if self._exit_told or not self._process.reap(self._pidfd):
            return  # readable for another reason, such as a debugger
        self._exit_told = True
        self._forget_pidfd()
        if not self._is_closed:
            # What the process left in the socket is read. Its EOF is not waited for: a grandchild
            # may hold the other end open.
            self._read_rest(peer_is_dead=True)
            self._protocol.receive_eof(peer_is_dead=True)
            self._protocol.error = self._protocol.error or WorkerExited(self.exit_code, self.signal)
            self._turn()
        self._emit_disconnect()
        self._emit("exit", self.exit_code, self.signal)
        self._emit_close()

    def _emit_close(self, _: object = None) -> None:
        """Emit ``close`` when the last piped stream has ended."""
        for pipe in self._pipes:
            if not pipe.done():
                pipe.add_done_callback(self._emit_close)
                return
        self._emit("close", self.exit_code, self.signal)

    def _loop_ends(self) -> None:
        super()._loop_ends()
        if not self._is_closed:
            # Nobody can use it any more: the child learns of it now, not when this is collected.
            self._protocol.abort(LocalProtocolError("the event loop has ended"))
            self._end()
        for transport in self._transports:
            transport.close()
        ended = self._process.reap(self._pidfd)
        self._forget_pidfd()
        if not ended:
            with contextlib.suppress(RuntimeError):  # the interpreter ends, and all its threads
                self._reap_in_thread(notify=False)

    def _dismiss_keeper(self) -> None:
        """Kept, since the process may outlive the channel."""

    def give_up(self) -> None:
        """End a child that was not wholly started: kill it, and close all that belongs to it."""
        self.kill(signals.SIGKILL)
        self.abort()
        for transport in self._transports:
            transport.close()
        self._process.close_pipes()  # those that no transport took over

    # -- piped stdio -----------------------------------------------------------------------------

    async def _open_pipes(self) -> None:
        process = self._process
        if process.stdin is not None:
            transport, self.stdin = await open_writer(process.stdin)
            self._opened(process.stdin, transport)
        for name in ("stdout", "stderr"):
            pipe = getattr(process, name)
            if pipe is not None:
                transport, reader, ended = await open_reader(pipe)
                setattr(self, name, reader)
                self._pipes.append(ended)
                self._opened(pipe, transport)

    def _opened(self, pipe: IO[bytes], transport: asyncio.BaseTransport) -> None:
        self._transports.append(transport)
        self._process.pipes.remove(pipe)


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
    ours, theirs = channel_pair()
    child: Child | None = None
    process: Process | None = None
    try:
        with theirs:
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
        if PIPE in (stdin, stdout, stderr):
            await to_the_end(child._open_pipes())
    except BaseException:
        # Cancelled or failed half way: nothing of the child stays.
        if child is not None:
            child.give_up()
        else:
            ours.close()
            if process is not None:
                process.give_up()
        raise
    return child


async def fork(
    target: str | os.PathLike[str],
    *args: str,
    executable: str | None = None,
    interpreter_args: Sequence[str] = (),
    **options: Unpack[Options],
) -> Child:
    """Start a fresh Python interpreter with a channel: Node's ``fork``, not fork(2).

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
    channel = Channel(
        found.sock, limits, invited_by=found.invited_by, accept_handles=accept_handles
    )
    if sys.excepthook is sys.__excepthook__ and not sys.flags.dev_mode:
        sys.excepthook = _show_unless_interrupted
    # A program may end with its channel open, between two loops or for good.
    atexit.register(found.sock.close)
    return channel


def _show_unless_interrupted(
    kind: type[BaseException], error: BaseException, where: TracebackType | None
) -> None:
    """Show an exception that nobody caught, but not Ctrl-C, which every process of a terminal gets.

    One that has a parent ends of it as ever (the parent sees SIGINT), without a word.
    """
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, where)
