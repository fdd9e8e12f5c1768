"""``fork`` and ``spawn`` start a child with a channel; ``parent`` is the other end of it.

One start path on every event loop: ``subprocess.Popen``, and the exit seen through a pidfd (a
thread where there is none). Never ``loop.subprocess_exec``: uvloop's leaks inheritable descriptors.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import fcntl
import functools
import os
import signal as signals
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import IO, Any, ClassVar, TypedDict, Unpack

from handleipc.ancillary import exit_with_parent as die_with_parent
from handleipc.asyncio.channel import Channel
from handleipc.exceptions import ChannelBusy, LocalProtocolError, WorkerExited
from handleipc.limits import Limits
from handleipc.spawn import adopt, child_environment, python_command, socket_cookie

__all__ = ["Child", "Options", "fork", "parent", "spawn"]

PIPE = subprocess.PIPE
StdIO = int | IO[Any] | None

# asm-generic/socket.h, Linux 6.16: a receiver that sets it to 0 makes the sender's sendmsg with
# descriptors fail with EPERM.
_SO_PASSRIGHTS = 83


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

    stdin: asyncio.StreamWriter | None = None
    stdout: asyncio.StreamReader | None = None
    stderr: asyncio.StreamReader | None = None

    def __init__(
        self,
        sock: socket.socket,
        limits: Limits,
        process: subprocess.Popen[bytes],
        *,
        invited: bool,
        accept_handles: bool,
    ) -> None:
        self._process = process
        self._exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._pidfd = -1
        self._pipes: list[asyncio.Future[None]] = []
        self._transports: list[asyncio.BaseTransport] = []
        self._unopened: list[IO[bytes]] = []
        super().__init__(sock, limits, inviting=invited, accept_handles=accept_handles)
        self._watch_process()

    @property
    def pid(self) -> int:
        """The process id; it stays the child's until its exit has been seen."""
        return self._process.pid

    @property
    def _peer_pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, minus the signal's number if a signal ended it, None while it runs."""
        return self._exited.result() if self._exited.done() else None

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

    async def wait(self) -> int:
        """Wait until the process has ended, and return ``returncode``.

        The channel and piped stdio may have more to read.
        """
        return await asyncio.shield(self._exited)

    def kill(self, sig: int = signals.SIGTERM) -> None:
        """Send a signal (SIGTERM). The channel is not touched; nothing happens after the exit."""
        if not self._exited.done():
            self._process.send_signal(sig)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.kill()

    def __repr__(self) -> str:
        return f"<Child pid={self.pid} {self._protocol.state.name.lower()} {self.dialect}>"

    # -- the process -----------------------------------------------------------------------------

    def _watch_process(self) -> None:
        try:
            self._pidfd = os.pidfd_open(self._process.pid)
        except (AttributeError, OSError):
            # No pidfd on this system, or none free: a thread waits.
            self._reap_in_thread(notify=True)
        else:
            self._loop.add_reader(self._pidfd, self._on_exit)

    def _reap_in_thread(self, *, notify: bool) -> None:
        loop, process, on_exit = self._loop, self._process, self._on_exit

        def wait() -> None:
            process.wait()
            if notify:
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(on_exit)

        threading.Thread(target=wait, name="handleipc-reaper", daemon=True).start()

    def _forget_pidfd(self) -> None:
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _on_exit(self) -> None:
        code = self._process.poll()
        if code is None:
            return  # readable for another reason, such as a debugger
        self._forget_pidfd()
        self._exited.set_result(code)
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
        if not self._exited.done():
            self._forget_pidfd()
            if self._process.poll() is None:
                self._reap_in_thread(notify=False)

    def _dismiss_keeper(self) -> None:
        """Kept, since the process may outlive the channel."""

    def give_up(self) -> None:
        """End a child that was not wholly started: kill it, and close all that belongs to it."""
        self.kill(signals.SIGKILL)
        self.abort()
        for transport in self._transports:
            transport.close()
        # Transports close what they took over.
        for pipe in self._unopened:
            with contextlib.suppress(OSError):
                pipe.close()

    # -- piped stdio -----------------------------------------------------------------------------

    async def _open_pipes(self) -> None:
        process = self._process
        pipes = (process.stdin, process.stdout, process.stderr)
        self._unopened = [pipe for pipe in pipes if pipe is not None]
        if process.stdin is not None:
            self.stdin = await self._open_writer(process.stdin)
        if process.stdout is not None:
            self.stdout = await self._open_reader(process.stdout)
        if process.stderr is not None:
            self.stderr = await self._open_reader(process.stderr)

    async def _open_writer(self, pipe: IO[bytes]) -> asyncio.StreamWriter:
        loop = self._loop
        reader = asyncio.StreamReader(loop=loop)
        transport, protocol = await loop.connect_write_pipe(
            lambda: asyncio.StreamReaderProtocol(reader, loop=loop), pipe
        )
        self._transports.append(transport)
        self._unopened.remove(pipe)
        return asyncio.StreamWriter(transport, protocol, reader, loop)

    async def _open_reader(self, pipe: IO[bytes]) -> asyncio.StreamReader:
        loop = self._loop
        reader = asyncio.StreamReader(loop=loop)
        closed = loop.create_future()
        protocol = _PipeProtocol(reader, loop, closed)
        transport, _ = await loop.connect_read_pipe(lambda: protocol, pipe)
        self._transports.append(transport)
        self._unopened.remove(pipe)
        self._pipes.append(closed)
        return reader


class _PipeProtocol(asyncio.StreamReaderProtocol):
    """A reader's protocol that also tells when the pipe has ended."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        loop: asyncio.AbstractEventLoop,
        closed: asyncio.Future[None],
    ) -> None:
        super().__init__(reader, loop=loop)
        self._pipe_closed = closed

    def eof_received(self) -> bool:
        """Let the transport close itself: uvloop would keep it for the sake of a half-close."""
        super().eof_received()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the reader, and who waits for the pipe."""
        super().connection_lost(exc)
        if not self._pipe_closed.done():
            self._pipe_closed.set_result(None)


async def _to_the_end(coroutine: Coroutine[Any, Any, None]) -> None:
    """Await something short that must not be cancelled half way, then pass the cancellation on.

    uvloop closes the descriptor of a pipe whose connecting is cancelled under the pipe's object.
    """
    task = asyncio.ensure_future(coroutine)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    task.result()


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

    Raises:
        FileNotFoundError, PermissionError: the program cannot be started.
        ValueError: an option makes no sense.
        TypeError: no program was named.
    """
    if not argv:
        raise TypeError("spawn() needs the program to start")
    if serialization != "json":
        raise ValueError(f"serialization={serialization!r} is not supported yet: use 'json'")
    if dialect not in (None, "node"):
        raise ValueError(f"dialect={dialect!r}: give 'node', or None to let both ends agree")
    limits = limits or Limits()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    child: Child | None = None
    try:
        if not accept_handles:
            with contextlib.suppress(OSError):  # an older kernel: refused on receipt instead
                ours.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
        with theirs:
            invite = socket_cookie(theirs) if dialect is None else None
            start = partial(
                _start,
                [os.fspath(arg) for arg in argv],
                theirs,
                channel_fd,
                lambda fd: child_environment(
                    dict(os.environ if env is None else env), fd, limits, invite
                ),
                {"cwd": cwd, "stdin": stdin, "stdout": stdout, "stderr": stderr},
                exit_with_parent=exit_with_parent,
            )
            # The kernel's notice follows the thread that forks: one that lives as long as we do.
            process = _starter().submit(start).result() if exit_with_parent else start()
        child = Child(
            ours, limits, process, invited=invite is not None, accept_handles=accept_handles
        )
        if PIPE in (stdin, stdout, stderr):
            await _to_the_end(child._open_pipes())
    except BaseException:
        # Cancelled or failed half way: nothing of the child stays.
        if child is None:
            ours.close()
        else:
            child.give_up()
        raise
    return child


def _start(
    argv: list[str],
    theirs: socket.socket,
    channel_fd: int | None,
    environment: Callable[[int], dict[str, str]],
    options: dict[str, Any],
    *,
    exit_with_parent: bool,
) -> subprocess.Popen[bytes]:
    """Run the program with the socket at the wanted number."""
    in_child: list[Callable[[], object]] = []
    if exit_with_parent:
        in_child.append(partial(die_with_parent, signals.SIGKILL, os.getpid()))
    if channel_fd is None:
        fd = theirs.fileno()
        return _popen(argv, environment(fd), (fd,), options, in_child)
    if channel_fd < 0:
        raise ValueError(f"channel_fd={channel_fd} is no descriptor number")
    env = environment(channel_fd)
    if channel_fd <= 2:
        name = ("stdin", "stdout", "stderr")[channel_fd]
        if options[name] is not None:
            raise ValueError(f"channel_fd={channel_fd} takes the place of {name}=, which is given")
        return _popen(argv, env, (), {**options, name: theirs}, in_child)
    slot = fcntl.fcntl(theirs, fcntl.F_DUPFD_CLOEXEC, channel_fd)
    try:
        if slot == channel_fd:
            return _popen(argv, env, (slot,), options, in_child)
        # This process uses the number itself, so it is not the one of Popen's error pipe either,
        # and may be replaced in the child. (Were it free, it could be: hence the other way above.)
        in_child.append(partial(os.dup2, slot, channel_fd))
        return _popen(argv, env, (channel_fd,), options, in_child)
    finally:
        os.close(slot)


def _popen(
    argv: list[str],
    env: dict[str, str],
    pass_fds: tuple[int, ...],
    options: dict[str, Any],
    in_child: list[Callable[[], object]],
) -> subprocess.Popen[bytes]:
    # Python code between fork and exec only where it cannot be helped: it rules vfork out.
    if in_child:
        options = {**options, "preexec_fn": partial(_call_all, in_child)}
    return subprocess.Popen(argv, env=env, pass_fds=pass_fds, bufsize=0, **options)


def _call_all(functions: list[Callable[[], object]]) -> None:
    for function in functions:
        function()


@functools.cache
def _starter() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="handleipc-starter")


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

    Raises:
        FileNotFoundError, PermissionError: the interpreter cannot be started.
        ValueError: the target or an option makes no sense.
    """
    command = python_command(target, args, executable or sys.executable, interpreter_args, sys.path)
    return await spawn(*command, **options)


_parent: Channel | None = None


async def parent() -> Channel:
    """Return the channel to the process that started this one.

    The first call adopts the descriptor that NODE_CHANNEL_FD names and removes the variables;
    later calls return the same object. A channel whose loop was closed moves to the running one.

    Raises:
        NoChannel: this process was started without one, or what is named is not a channel.
        ChannelBusy: another event loop that still runs has it.
    """
    global _parent
    if _parent is None:
        found = adopt(os.environ)
        _parent = Channel(found.sock, Limits(), invited_by=found.invited_by)
        # A program may end with its channel open, between two loops or for good.
        atexit.register(found.sock.close)
    elif _parent._loop is not asyncio.get_running_loop():
        if not _parent._loop.is_closed():
            raise ChannelBusy("another event loop, which is not closed, has this channel")
        if not _parent._is_closed:
            _parent._attach()
    return _parent
