"""Accepts connections in batches and hands them out untouched, one to each who waits.

Makes no Python socket per connection and reads nothing from them. Accepts only while somebody
takes: otherwise the kernel's backlog is the queue, where another process that shares the listener
finds them, and where nobody has promised them anything. Knows no other process; ``server`` does.

In a forked copy of the process (fork(2)) the descriptor stays open, since servers that fork after
they listen inherit it on purpose; the object only closes it there, and tells nobody.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import socket
from collections import deque
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, ClassVar, Self

from handleipc.asyncio.connection import Connection
from handleipc.asyncio.emitter import Emitter
from handleipc.asyncio.events import OnServer
from handleipc.asyncio.logs import throttle
from handleipc.exceptions import ChannelBusy
from handleipc.handles.addresses import Address
from handleipc.handles.group import Group
from handleipc.wire.syscalls import KIND_LISTENING, Acceptor, descriptor_kind, discard

__all__ = ["UNTAKEN", "Listener", "check_untaken"]

# Connections accepted at once, and then given one by one without a turn of the event loop: a turn
# costs about as much as ten accepts. What of them is not taken is the price of a program that ends.
UNTAKEN = 16
# Pause after EMFILE and the like: waiting connections stay in the backlog meanwhile.
ACCEPT_PAUSE = 0.05
# Errors of accept after which a listener will never accept again.
BEYOND_HOPE = {errno.EBADF, errno.EINVAL, errno.ENOTSOCK, errno.EOPNOTSUPP}
_serials = itertools.count(1)


class Listener(Emitter):
    """A listening socket and those it has accepted. ``Server`` is what applications see.

    Args:
        sock: a listening stream socket; this object's from here on.
        untaken: how many connections to accept at once.

    Raises:
        ValueError: ``untaken`` is less than 1.
        OSError: the system refuses. The socket is the caller's still.
    """

    if TYPE_CHECKING:
        on: OnServer
        once: OnServer

    EVENTS: ClassVar[frozenset[str]] = frozenset({"drop", "error"})

    def __init__(self, sock: socket.socket, untaken: int) -> None:
        check_untaken(untaken)
        super().__init__(asyncio.get_running_loop())
        sock.setblocking(False)
        self._sock = sock
        self._address = sock.getsockname()
        # The key is opaque to Node, whose own collide for port 0 (node-wire.md fact 11).
        self._group = Group(
            f"handleipc:{os.getpid()}:{next(_serials)}:{self._address}",
            post=self._post,
        )
        self._max_connections: int | None = None
        # What is accepted is of the listener's family, so it need not be asked what it is.
        self._kind = descriptor_kind(sock.fileno()) & ~KIND_LISTENING
        self._most = untaken
        self._acceptor = Acceptor(untaken)
        self._untaken: deque[Connection] = deque()
        self._is_watching = False
        self._is_paused = False
        self._is_stopping = False
        self._short: asyncio.TimerHandle | None = None
        self._reader: asyncio.Future[None] | None = None
        self._error: OSError | None = None

    # -- what a subclass does --------------------------------------------------------------------

    @property
    def _at_once(self) -> int:
        """How many to accept at once, for somebody who waits."""
        return self._most

    def _stop_listening(self, unlink: bool | None) -> None:
        """Close the listening socket; what was accepted can still be taken."""
        raise NotImplementedError

    # -- the loop --------------------------------------------------------------------------------

    def _enter(self) -> None:
        """Be used in the running loop: it moves there once its last one is closed.

        Raises:
            ForkedCopy: this is a forked copy of the process that listens.
            ChannelBusy: another event loop has it, which is not closed.
        """
        self._refuse_copy()
        loop = asyncio.get_running_loop()
        if loop is self._loop:
            return
        if not self._loop.is_closed():
            raise ChannelBusy(
                "another event loop, which is not closed, has this server: use it there"
            )
        self._loop = loop
        self._attach()

    def _attach(self) -> None:
        """Go on in another loop, where nothing is watched or timed yet."""
        self._is_watching = False
        self._reader = self._short = None
        self._group.take_closes()  # of which the last loop heard nothing any more
        if self._is_stopping and not self.closed:
            self._drain()

    # -- what is known of it ---------------------------------------------------------------------

    @property
    def sockname(self) -> Address:
        """The address it listens at."""
        return self._address

    @property
    def max_connections(self) -> int | None:
        """Connections above which new ones are dropped; None for no such number.

        Counted are those open here and with native peers, which report each close. Node peers
        report none.
        """
        return self._max_connections

    @max_connections.setter
    def max_connections(self, value: int | None) -> None:
        if not (value is None or isinstance(value, int)):
            raise TypeError(f"max_connections={value!r}: give an integer or None")
        self._max_connections = value

    @property
    def connections(self) -> int:
        """Connections of this server that are open in this process."""
        return self._group.local

    @property
    def waiting(self) -> int:
        """Connections accepted and not yet taken: they are answered by nobody until they are."""
        return len(self._untaken)

    @property
    def closed(self) -> bool:
        """Whether it no longer listens."""
        return self._sock.fileno() < 0

    def fileno(self) -> int:
        """Return the listening descriptor, borrowed; -1 once closed."""
        return self._sock.fileno()

    # -- taking ----------------------------------------------------------------------------------

    def pause(self) -> None:
        """Accept nothing until ``resume()``: clients wait in the kernel's backlog.

        Iteration gives what was accepted already, then waits.
        """
        self._is_paused = True
        self._unwatch()

    def resume(self) -> None:
        """Accept again, while somebody takes. Does nothing if it was not paused."""
        self._refuse_copy()
        self._is_paused = False
        if self._reader is not None:
            self._watch()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Connection:
        self._enter()
        if not (self._untaken or await self._wait()):
            raise StopAsyncIteration
        return self._untaken.popleft()

    async def batches(self) -> AsyncIterator[list[Connection]]:
        """Iterate over connections in lists, of all that were accepted each time."""
        self._enter()
        while self._untaken or await self._wait():
            batch = list(self._untaken)
            self._untaken.clear()
            yield batch

    async def _wait(self) -> bool:
        """Wait until there is a connection to take. Returns False if none will ever come."""
        while not self._untaken:
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            if self.closed:
                return False
            if self._reader is not None:
                raise RuntimeError("another task iterates over this server already")
            self._reader = self._loop.create_future()
            self._watch()
            try:
                await self._reader
            finally:
                self._reader = None
        return True

    # -- accepting -------------------------------------------------------------------------------

    def _watch(self) -> None:
        if not (
            self._is_watching or self._is_paused or self._is_stopping or self._short is not None
        ):
            self._is_watching = True
            self._loop.add_reader(self._sock.fileno(), self._on_readable)

    def _unwatch(self) -> None:
        if self._is_watching:
            self._is_watching = False
            if not (self._is_copy or self._loop.is_closed()):
                self._loop.remove_reader(self._sock.fileno())

    def _wake(self) -> None:
        if self._reader is not None and not (self._is_copy or self._reader.done()):
            self._reader.set_result(None)

    def _on_readable(self) -> None:
        if self._reader is None or self._reader.done() or self._is_copy:
            # Whoever waited has something to do. The descriptor stays watched as long as a batch
            # is taken before the next one is there: then the kernel is not told twice for each.
            self._unwatch()
            return
        self._accept(self._at_once)

    def _accept(self, most: int) -> bool:
        """Accept so many at most. Returns whether there may be more; raises nothing."""
        try:
            # Whoever shares the listener may have set it to block, and us with it (O_NONBLOCK
            # belongs to all its descriptors). One who does so just now still can.
            self._sock.setblocking(False)
            accepted = self._acceptor.accept(self._sock.fileno(), most)
        except OSError as error:
            self._accept_failed(error)
            return False
        rest = iter(accepted)
        try:
            for fd, raw_peer in rest:
                if self.closed:  # by a listener for "drop"
                    discard(fd)
                else:
                    self._admit(fd, raw_peer)
        finally:
            discard(*(fd for fd, _ in rest))  # a signal handler raised: nobody will own these
            if self._untaken:
                self._wake()
        return bool(accepted)

    def _admit(self, fd: int, raw_peer: bytes) -> None:
        """Let one in, or drop it: it ends with somebody who takes it, or closed."""
        connection = Connection(fd, self._kind, group=self._group, raw_peer=raw_peer)
        self._group.opened_here()
        most = self._max_connections
        if most is None or self._group.known <= most:
            self._untaken.append(connection)
            return
        try:
            with connection:
                peername = connection.peername
        except OSError as error:
            throttle.warning("drop", "%r could not drop a connection: %s", self, error)
            return
        self._emit("drop", peername)

    def _accept_failed(self, error: OSError) -> None:
        self._unwatch()
        self._cancel_retry()
        if error.errno in BEYOND_HOPE:
            self._error = OSError(
                error.errno,
                f"the server at {self._address!r} cannot accept any more: {error.strerror}."
                " Its listener was shut down or replaced, here or by a process that shares it",
            )
            self._stop_listening(unlink=None)
            return
        # Out of descriptors or memory: connections wait in the backlog until there are some.
        self._short = self._loop.call_later(ACCEPT_PAUSE, self._try_again)
        hint = " (RLIMIT_NOFILE)" if error.errno == errno.EMFILE else ""
        if not self._emit("error", error):
            throttle.warning("accept", "%r cannot accept: %s%s", self, error.strerror, hint)

    def _cancel_retry(self) -> None:
        if self._short is not None:
            self._short.cancel()
            self._short = None

    def _try_again(self) -> None:
        self._short = None
        if self._is_stopping:
            self._drain()
        elif self._reader is not None:
            self._watch()

    def _drain(self) -> None:
        """Accept all who wait, and stop listening when there is none left."""
        while self._accept(self._most):
            pass
        if self._short is None:
            self._stop_listening(unlink=False)  # stop() has removed the path


def check_untaken(untaken: int) -> None:
    """Refuse what is no number of connections to accept at once."""
    if untaken < 1:
        raise ValueError(f"untaken={untaken}: a server accepts at least one connection at once")
