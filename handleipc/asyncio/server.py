"""``Server``: accepts connections in batches and hands them out untouched.

Makes no Python socket per connection and reads nothing from them. Accepts only while somebody
takes: otherwise the kernel's backlog is the queue, where another process that shares the listener
finds them, and where nobody has promised them anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import socket
from collections import deque
from functools import partial
from types import TracebackType
from typing import ClassVar, Self

from handleipc import codec
from handleipc.addresses import Address
from handleipc.ancillary import KIND_LISTENING, Acceptor, descriptor_kind
from handleipc.asyncio.connection import Connection
from handleipc.asyncio.emitter import Emitter
from handleipc.asyncio.handles import default_registry
from handleipc.asyncio.logs import throttle
from handleipc.asyncio.posting import post
from handleipc.asyncio.socketpath import BoundPath, remove_socket
from handleipc.connection import family_of, protocol_of, type_of
from handleipc.conversions import NET_SERVER, pend_held
from handleipc.exceptions import UnsupportedHandle
from handleipc.pending import Held, PendingHandle
from handleipc.socketlist import Group
from handleipc.socketlists import SocketLists
from handleipc.typing import Options

__all__ = ["UNTAKEN", "ConnectionCount", "Server", "check_untaken"]

# Connections accepted at once, and then given one by one without a turn of the event loop: a turn
# costs about as much as ten accepts. What of them is not taken is the price of a program that ends.
UNTAKEN = 16
# Pause after EMFILE and the like: waiting connections stay in the backlog meanwhile.
ACCEPT_PAUSE = 0.05
# Errors of accept after which a listener will never accept again.
BEYOND_HOPE = {errno.EBADF, errno.EINVAL, errno.ENOTSOCK, errno.EOPNOTSUPP}
# Travels with a listener that the sender gives up, and shares with nobody.
SOLE = codec.spell({"sole": True})
# How long get_connections waits for a process that does not answer, unless told otherwise.
COUNT_TIMEOUT = 10.0

_serials = itertools.count(1)


class ConnectionCount(int):
    """A number of connections, and who did not say how many it has.

    Attributes:
        missing: the channels whose peer did not answer in time, or not sensibly.
    """

    missing: tuple[object, ...]

    def __new__(cls, count: int, missing: tuple[object, ...] = ()) -> Self:
        """Make a count."""
        self = super().__new__(cls, count)
        self.missing = missing
        return self


class Server(Emitter):
    """A listening socket, and an iterator over the connections it accepts.

    It accepts only while somebody waits for a connection, ``untaken`` at most at once. Those
    accepted and not yet taken survive a ``break``; ``waiting`` says how many they are. ``stop()``
    serves them and those who wait in the kernel, ``close()`` serves neither.

    Events: ``"drop"(peername)`` when a connection was closed because of ``max_connections``,
    ``"error"(exc)`` when accepting failed for want of descriptors or memory; it goes on by itself.

    Args:
        sock: a listening stream socket; the server's from here on.
        unlink: the path of a Unix socket that this process bound, which ``close()`` is to remove;
            or None.
        untaken: how many connections to accept at once.

    Raises:
        ValueError: ``untaken`` is less than 1.
    """

    EVENTS: ClassVar[frozenset[str]] = frozenset({"drop", "error"})

    def __init__(
        self, sock: socket.socket, *, unlink: str | None = None, untaken: int = UNTAKEN
    ) -> None:
        check_untaken(untaken)
        super().__init__(asyncio.get_running_loop())
        sock.setblocking(False)
        self._sock = sock
        self._path = BoundPath(unlink) if unlink is not None else None
        self._address = sock.getsockname()
        # The key is opaque to Node, whose own collide for port 0 (node-wire.md fact 11).
        self.group = Group(
            f"handleipc:{os.getpid()}:{next(_serials)}:{self._address}",
            post=partial(post, self._loop),
        )
        self.max_connections: int | None = None
        """Connections above which new ones are dropped: those open here and with native peers,
        which report each close. Node peers report none."""
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
        self._sharers: list[SocketLists] = []
        self._shared: bool | None = None
        self._closed = asyncio.Event()
        self._emptied = asyncio.Event()

    @property
    def sockname(self) -> Address:
        """The address it listens at."""
        return self._address

    @property
    def connections(self) -> int:
        """Connections of this server that are open in this process."""
        return self.group.local

    @property
    def waiting(self) -> int:
        """Connections accepted and not yet taken: they are answered by nobody until they are."""
        return len(self._untaken)

    @property
    def shared(self) -> bool:
        """Whether another process may accept from the same listener, so far as is known.

        True once it was sent to one, or came from one; then connections are accepted one by one,
        so that none waits here while another process is idle. Set it if the listener was shared by
        other means (``fork(2)``, ``pass_fds``), or is no longer.
        """
        return bool(self._sharers) if self._shared is None else self._shared

    @shared.setter
    def shared(self, value: bool) -> None:
        self._shared = value

    async def get_connections(self, *, timeout: float | None = COUNT_TIMEOUT) -> ConnectionCount:
        """Count the connections of this server, here and in every process they were handed to.

        A process that has ended holds none. One that does not answer in time, or nonsense, is
        named in the result's ``missing``, and not counted.

        Args:
            timeout: seconds to wait for answers; None for ever.
        """
        answered = asyncio.Event()
        tally = self.group.count(lambda _: answered.set())
        try:
            async with asyncio.timeout(timeout):
                await answered.wait()
        except TimeoutError:
            pass
        finally:
            tally.give_up()
        return ConnectionCount(tally.count, tuple(one.peer for one in tally.missing))

    @property
    def closed(self) -> bool:
        """Whether it no longer listens."""
        return self._sock.fileno() < 0

    def fileno(self) -> int:
        """Return the listening descriptor, borrowed; -1 once closed."""
        return self._sock.fileno()

    def pause(self) -> None:
        """Accept nothing until ``resume()``: clients wait in the kernel's backlog.

        Iteration gives what was accepted already, then waits.
        """
        self._is_paused = True
        self._unwatch()

    def resume(self) -> None:
        """Accept again, while somebody takes. Does nothing if it was not paused."""
        self._is_paused = False
        if self._reader is not None:
            self._watch()

    def stop(self, *, unlink: bool | None = None) -> None:
        """Stop listening without losing a client: iteration ends after the last of those here.

        Accepts at once all who wait in the kernel's backlog, which closing a listener would reset,
        and then closes it; new clients are refused. If another process accepts from the same
        listener, those who wait are left to it. Go on iterating, to serve who was accepted.
        Without descriptors for all it goes on when there are some, and closes then. Does nothing
        when it no longer listens.

        Args:
            unlink: as of ``close``.
        """
        if self.closed or self._is_stopping:
            return
        if self._is_elsewhere:
            self._stop_listening(unlink)
            return
        self._is_stopping = True
        with contextlib.ExitStack() as steps:  # as in close()
            steps.callback(self._drain)
            # Nobody new, while there are no descriptors for the old.
            steps.callback(self._sock.listen, 0)
            steps.callback(self._unwatch)
            steps.callback(self._cancel_retry)
            steps.callback(self._remove_path, unlink)

    def close(self, *, unlink: bool | None = None) -> int:
        """Stop listening, and close the connections nobody has taken. Others live on.

        Clients who wait in the kernel's backlog are reset, unless another process accepts from the
        same listener. ``stop()`` loses none. Does nothing the second time.

        Args:
            unlink: whether to remove the path of a Unix socket. None: if this process bound it,
                and it was not transferred. False: leave it, since another process goes on
                accepting there. True: also if the listener came from another process, whose word
                its path is; it must be absolute, and a socket be there.

        Returns:
            How many connections had been accepted, were not taken, and are closed now.

        Raises:
            ValueError: ``unlink=True`` for a path that is not absolute. All the rest was done.
        """
        untaken, self._untaken = self._untaken, deque()
        # Each step runs, whatever another raises; the last one first.
        with contextlib.ExitStack() as steps:
            for connection in reversed(untaken):
                steps.callback(connection.close)
            steps.callback(self._stop_listening, unlink)
        return len(untaken)

    def _stop_listening(self, unlink: bool | None) -> None:
        """Close the listening socket; what was accepted can still be taken."""
        if self.closed:
            return
        with contextlib.ExitStack() as steps:  # as in close()
            steps.callback(self.group.when_empty, self._on_empty)
            steps.callback(self._closed.set)
            steps.callback(self._wake)
            steps.callback(self._sock.close)
            steps.callback(self._unwatch)
            steps.callback(self._cancel_retry)
            steps.callback(self._remove_path, unlink)

    def _remove_path(self, unlink: bool | None) -> None:
        if unlink is False:
            return
        if self._path is not None:
            self._path.remove()
        elif unlink and self._sock.family == socket.AF_UNIX:
            remove_socket(self._address)

    def transfer(self, pending: Held) -> None:
        """Have the listener stop here when the peer has it. Used by ``send(transfer=True)``.

        The path of a Unix socket stays: the peer goes on accepting there. It is told if nobody else
        does, so that it knows whose the clients in the kernel's backlog are.
        """
        if not self.shared:
            pending.options = SOLE
        pending.on_delivered = self._transferred

    def _transferred(self) -> None:
        self._stop_listening(unlink=False)

    def share(self, lists: SocketLists, options: Options | None = None) -> None:
        """The process behind a channel has the listener, too. Used by channels.

        Args:
            lists: says when the channel has ended.
            options: what the listener came with, if it came.
        """
        if options is not None and options.get("sole") is True:
            return
        self._sharers = [one for one in self._sharers if not one.has_ended]
        self._sharers.append(lists)
        self._shared = self._shared or None

    @property
    def _is_elsewhere(self) -> bool:
        """Whether another process still has the listener, so far as is known.

        One whose channel has ended may have it all the same. Then we take what it might have
        taken, which costs nobody anything; the other way round clients would be reset.
        """
        if self._shared is not None:
            return self._shared
        return any(not one.has_ended for one in self._sharers)

    def _on_empty(self) -> None:
        for one in list(self.group.lists):
            one.forget()
        self._emptied.set()

    async def wait_closed(self) -> None:
        """Wait until the server is closed and the last of its connections has, wherever it is.

        As Node's ``close(callback)``: connections handed to other processes are waited for too;
        those of a process that has ended are closed.
        """
        await self._closed.wait()
        await self._emptied.wait()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Connection:
        while not self._untaken:
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            if self.closed:
                raise StopAsyncIteration
            if self._reader is not None:
                raise RuntimeError("another task iterates over this server already")
            self._reader = self._loop.create_future()
            self._watch()
            try:
                await self._reader
            finally:
                self._reader = None
        return self._untaken.popleft()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"fd={self._sock.fileno()}"
        counts = f"connections={self.connections} waiting={self.waiting}"
        return f"<Server {state} {self._address!r} {counts}>"

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
            if not self._loop.is_closed():
                self._loop.remove_reader(self._sock.fileno())

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _on_readable(self) -> None:
        if self._reader is None or self._reader.done():
            # Whoever waited has something to do. The descriptor stays watched as long as a batch
            # is taken before the next one is there: then the kernel is not told twice for each.
            self._unwatch()
            return
        self._accept(1 if self.shared else self._most)

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
                self._admit(fd, raw_peer)
        finally:
            for fd, _ in rest:
                os.close(fd)  # a signal handler raised: nobody will ever own these
            if self._untaken:
                self._wake()
        return bool(accepted)

    def _admit(self, fd: int, raw_peer: bytes) -> None:
        """Let one in, or drop it: it ends with somebody who takes it, or closed."""
        connection = Connection(fd, self._kind, group=self.group, raw_peer=raw_peer)
        self.group.opened_here()
        most = self.max_connections
        if most is None or self.group.known <= most:
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


def _build_server(fd: int, kind: int, options: Options | None) -> Server:
    # Its path, if it has one, is not ours to remove: another process bound it.
    return Server(socket.socket(family_of(kind), type_of(kind), protocol_of(kind), fileno=fd))


def _pend_server(server: Server, keep_open: bool) -> PendingHandle:
    if server.closed:
        raise UnsupportedHandle("this server is closed")
    return pend_held(server, NET_SERVER, server)


default_registry.add_builder(NET_SERVER, _build_server, direct=False)
default_registry.add_pender(Server, _pend_server)
