"""``Child``: the channel to a child process, and the process itself.

Knows how the process ended, and says so to everybody who waits. Starting it is ``process``', and
taking its exit from the kernel ``reaping``'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal as signals
import socket
import time
from functools import partial
from typing import IO, TYPE_CHECKING, ClassVar

from handleipc.asyncio.channel import Channel
from handleipc.asyncio.events import OnChild
from handleipc.asyncio.logs import log
from handleipc.asyncio.pipes import open_reader, open_writer
from handleipc.asyncio.posting import post
from handleipc.asyncio.reaping import Process
from handleipc.asyncio.waiters import Waiters
from handleipc.exceptions import LocalProtocolError, WorkerExited
from handleipc.limits import Limits
from handleipc.protocol.channel import State
from handleipc.system import close_quietly
from handleipc.wire.peer import Peer

__all__ = ["Child"]

# How long the exit of a child is waited for that has closed its channel and is ending: the kernel
# tells within milliseconds, unless the process dumps its core.
EXIT_PATIENCE = 5.0
# The same where nobody says whether it is ending.
SHORT_PATIENCE = 0.1
# Signals with which a process is asked to end.
ENDING = frozenset(
    {signals.SIGTERM, signals.SIGKILL, signals.SIGINT, signals.SIGHUP, signals.SIGQUIT}
)


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

    if TYPE_CHECKING:
        on: OnChild
        once: OnChild

    EVENTS: ClassVar[frozenset[str]] = Channel.EVENTS | {"exit", "close"}

    _pidfd = -1
    _crashed = False
    """Whether it ended with an error, its channel open, and nobody here had asked it to end."""

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
        self._has_reaper = self._exit_told = self._was_asked_to_end = False
        self._openers = Waiters()
        self._is_new, self._started = True, time.monotonic()
        self._exit_wait: asyncio.TimerHandle | None = None
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
    def peer(self) -> Peer:
        """The process, of which ``pid`` alone is known."""
        return Peer(self.pid, None, None)

    @property
    def exited(self) -> bool:
        """Whether the process has ended, as far as is known here."""
        self._refuse_copy()
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
        self._refuse_copy()
        if not self.exited and self._loop is not asyncio.get_running_loop():
            # Its own loop may never run again, so a thread has to see it.
            self._reap_in_thread(notify=True)
        return await asyncio.wrap_future(self._process.end)

    def kill(self, sig: int = signals.SIGTERM) -> None:
        """Send a signal (SIGTERM). The channel is not touched; nothing happens after the exit.

        An end that was asked for in this way is no crash: iteration just ends, and nothing is
        logged.

        Raises:
            PermissionError: the child runs as somebody else.
            ForkedCopy: this is a forked copy of the process whose child it is.
        """
        self._refuse_copy()
        self._was_asked_to_end = self._was_asked_to_end or sig in ENDING
        self._process.send_signal(sig, self._pidfd)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.kill()

    async def ready(self, timeout: float | None = None) -> None:
        """Wait until the child has opened its channel, and so can take what is sent.

        A handleipc child says so when it calls ``parent()``. A Node.js child opens its channel
        before its program begins, and says nothing: of it, this waits for the first message.

        Args:
            timeout: seconds to wait; None for ever.

        Raises:
            ChannelBroken: the child ended first; ``exit_code`` and ``signal`` say how.
            ChannelClosed: this end has disconnected.
            TimeoutError: ``timeout`` passed.
        """
        self._check_use()
        if self._protocol.was_opened:
            return
        if self._is_closed:
            raise self._why_closed()
        waiter = self._openers.new(self._loop)
        try:
            async with asyncio.timeout(timeout):
                await waiter
        except TimeoutError:
            raise TimeoutError(
                f"the child process {self.pid} has not opened its channel within {timeout} s:"
                " does it call handleipc.parent()?"
            ) from None
        finally:
            self._openers.leave(waiter)

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
        tell = partial(post, self._loop, self._on_exit)
        self._process.reap_in_thread(tell if notify else None)

    def _forget_pidfd(self) -> None:
        if self._pidfd >= 0:
            try:
                self._loop.remove_reader(self._pidfd)
            finally:
                self._close_pidfd()

    def __del__(self) -> None:
        self._close_pidfd()  # its loop was closed without a word

    def _close_pidfd(self) -> None:
        if self._pidfd >= 0:
            fd, self._pidfd = self._pidfd, -1
            close_quietly(fd)

    def _exchange(self) -> bool:
        if self._is_new and self._protocol.was_opened:
            self._is_new = False
            self._openers.wake()
            took = time.monotonic() - self._started
            log.info("child %d is ready after %.3f s (%s)", self.pid, took, self.dialect)
        return super()._exchange()

    def _closed(self) -> None:
        if self._protocol.was_opened:
            self._openers.wake()
        else:
            self._openers.fail(self._why_closed)
        super()._closed()

    def _waits_for_exit(self) -> bool:
        if self._exit_wait is None:
            ending = self._process.is_ending()
            if ending is False:
                return False
            patience = EXIT_PATIENCE if ending else SHORT_PATIENCE
            self._exit_wait = self._loop.call_later(patience, self._end_without_exit)
        return not (self._exit_told or self._exit_wait.cancelled())

    def _end_without_exit(self) -> None:
        assert self._exit_wait is not None
        if self._is_copy:
            return
        self._exit_wait.cancel()
        self._end()

    def _ends_quietly(self) -> bool:
        return super()._ends_quietly() and not self._crashed

    def _give_up(self) -> None:
        super()._give_up()
        self._close_pidfd()
        self._process.forget()

    def _on_exit(self) -> None:
        if self._is_copy or self._exit_told or not self._process.reap(self._pidfd):
            return  # readable for another reason, such as a debugger
        self._exit_told = True
        self._forget_pidfd()
        if self._exit_wait is not None:
            self._exit_wait.cancel()
        # What the process left in the socket is read. Its EOF is not waited for: a grandchild may
        # hold the other end open.
        exited = WorkerExited(self.exit_code, self.signal, opened=self._protocol.was_opened)
        failed = not self._was_asked_to_end and self.returncode not in (0, None)
        self._crashed = failed and self._protocol.state is State.OPEN
        self._end(exited, peer_is_dead=True)
        # Ctrl-C: who pressed it knows.
        level = logging.WARNING if failed and self.signal != signals.SIGINT else logging.INFO
        log.log(level, "%s (pid %d)", exited, self.pid)
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
        if self._is_copy:
            return  # the loop's epoll, and the child, are the original's
        super()._loop_ends()
        if not self._is_closed:
            # Nobody can use it any more: the child learns of it now, not when this is collected.
            self._end(
                LocalProtocolError(
                    "the event loop that started this child has ended, and its channel with it:"
                    " start the child in the loop that uses it"
                )
            )
        for transport in self._transports:
            transport.close()
        ended = self._process.reap(self._pidfd)
        self._forget_pidfd()
        if not ended:
            with contextlib.suppress(RuntimeError):  # the interpreter ends, and all its threads
                self._reap_in_thread(notify=False)

    def _dismiss_keeper(self) -> None:
        """Kept, since the process may outlive the channel."""

    def _abandon(self) -> None:
        """End a child that was not wholly started: kill it, and close all that belongs to it."""
        if self._is_copy:
            return  # the original goes on starting it
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
