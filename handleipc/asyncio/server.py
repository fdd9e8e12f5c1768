"""``Server``: who has a listener, how it ends, and how many connections it has, wherever they are.

How connections are accepted and given out is the ``Listener``'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket as stdlib_socket
from asyncio.trsock import TransportSocket
from collections import deque
from typing import ClassVar, Self

from handleipc.asyncio.listener import UNTAKEN, Listener
from handleipc.asyncio.registry import default_registry
from handleipc.asyncio.socketpath import BoundPath, remove_socket
from handleipc.exceptions import DescriptorReleased, UnsupportedHandle
from handleipc.handles.kinds import NET_SERVER, prepare_held
from handleipc.handles.pending import Held, PendingHandle
from handleipc.handles.sockets import own
from handleipc.handles.tracking import SocketLists
from handleipc.system import close_quietly
from handleipc.typing import Options
from handleipc.wire import codec

__all__ = ["ConnectionCount", "Server"]

# Travels with a listener that the sender gives up, and shares with nobody.
SOLE = codec.spell({"sole": True})
# How long get_connections waits for a process that does not answer, unless told otherwise.
COUNT_TIMEOUT = 10.0


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


class Server(Listener):
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
        ValueError, OSError: as ``Listener``; the socket and its path are the caller's still.
    """

    tag: ClassVar[str] = NET_SERVER
    """What it travels as."""

    def __init__(
        self, sock: stdlib_socket.socket, *, unlink: BoundPath | None = None, untaken: int = UNTAKEN
    ) -> None:
        super().__init__(sock, untaken)
        self._path = unlink
        self._sharers: list[SocketLists] = []
        self._shared: bool | None = None
        self._closed = asyncio.Event()
        self._emptied = asyncio.Event()

    def _attach(self) -> None:
        # An event belongs to the loop it was first waited in.
        closed, emptied = self._closed, self._emptied
        self._closed, self._emptied = asyncio.Event(), asyncio.Event()
        for old, new in ((closed, self._closed), (emptied, self._emptied)):
            if old.is_set():
                new.set()
        super()._attach()

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
        self._enter()
        answered = asyncio.Event()
        tally = self._group.count(lambda _: answered.set())
        try:
            async with asyncio.timeout(timeout):
                await answered.wait()
        except TimeoutError:
            pass
        finally:
            tally.give_up()
        return ConnectionCount(tally.count, tuple(one.peer for one in tally.missing))

    def stop(self, *, unlink: bool | None = None) -> None:
        """Stop listening without losing a client: iteration ends after the last of those here.

        Accepts at once all who wait in the kernel's backlog, which closing a listener would reset,
        and then closes it; new clients are refused. If another process accepts from the same
        listener, those who wait are left to it. Go on iterating, to serve who was accepted.
        Without descriptors for all it goes on when there are some, and closes then. Does nothing
        when it no longer listens.

        Args:
            unlink: as of ``close``.

        Raises:
            ForkedCopy: this is a forked copy of the process that listens: ``close()`` closes the
                copy's descriptor.
        """
        self._refuse_copy()
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

    def detach(self) -> int:
        """Give the listening descriptor away: the caller owns it, and this server has stopped.

        Those who were accepted can still be taken. The path of a Unix socket stays.

        Raises:
            DescriptorReleased: it no longer listens.
        """
        if self.closed:
            raise DescriptorReleased("this server is closed")
        self._unwatch()
        self._cancel_retry()
        fd = self._sock.detach()
        self._has_stopped()
        return fd

    def socket(self) -> stdlib_socket.socket:
        """Return a non-blocking ``socket.socket`` that takes the descriptor over, as ``detach``.

        For a library that accepts by itself, as ``asyncio.start_server(..., sock=)`` does.

        Raises:
            DescriptorReleased: it no longer listens.
        """
        old = self._sock
        sock = stdlib_socket.socket(old.family, old.type, old.proto, fileno=self.detach())
        sock.setblocking(False)
        return sock

    @property
    def sockets(self) -> tuple[TransportSocket, ...]:
        """The listening socket, to look at, as ``asyncio.Server.sockets``; none once closed."""
        return () if self.closed else (TransportSocket(self._sock),)

    def _stop_listening(self, unlink: bool | None) -> None:
        if self.closed:
            return
        with contextlib.ExitStack() as steps:  # as in close()
            steps.callback(self._has_stopped)
            steps.callback(close_quietly, self._sock)
            steps.callback(self._unwatch)
            steps.callback(self._cancel_retry)
            steps.callback(self._remove_path, unlink)

    def _has_stopped(self) -> None:
        with contextlib.ExitStack() as steps:
            steps.callback(self._group.when_empty, self._on_empty)
            steps.callback(self._closed.set)
            steps.callback(self._wake)

    def _remove_path(self, unlink: bool | None) -> None:
        if unlink is False or self._is_copy:
            return
        if self._path is not None:
            self._path.remove()
        elif unlink and self._sock.family == stdlib_socket.AF_UNIX:
            remove_socket(self._address)

    def _transfer(self, pending: Held) -> None:
        """Have the listener stop here when the peer has it. Used by ``send(transfer=True)``.

        The path of a Unix socket stays: the peer goes on accepting there. It is told if nobody else
        does, so that it knows whose the clients in the kernel's backlog are.
        """
        if not self.shared:
            pending.options = SOLE
        pending.on_delivered = self._transferred

    def _transferred(self) -> None:
        self._stop_listening(unlink=False)

    @property
    def _at_once(self) -> int:
        return 1 if self.shared else self._most

    def _share(self, lists: SocketLists, options: Options | None = None) -> None:
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
        for one in list(self._group.lists):
            one.forget()
        self._emptied.set()

    async def wait_closed(self) -> None:
        """Wait until the server is closed and the last of its connections has, wherever it is.

        As Node's ``close(callback)``: connections handed to other processes are waited for too;
        those of a process that has ended are closed.
        """
        self._enter()
        await self._closed.wait()
        await self._emptied.wait()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"fd={self._sock.fileno()}"
        counts = f"connections={self.connections} waiting={self.waiting}"
        return f"<Server {state} {self._address!r} {counts}>"


def _build_server(fd: int, kind: int, options: Options | None) -> Server:
    sock = own(fd, kind)
    try:
        # Its path, if it has one, is not ours to remove: another process bound it.
        return Server(sock)
    except BaseException:
        sock.detach()
        raise


def _prepare_server(server: Server, keep_open: bool) -> PendingHandle:
    if server.closed:
        raise UnsupportedHandle("this server is closed")
    return prepare_held(server, NET_SERVER, server)


default_registry.add_builder(NET_SERVER, _build_server)
default_registry.add_preparer(Server, _prepare_server)
