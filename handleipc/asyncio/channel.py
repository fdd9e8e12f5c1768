"""``Channel``: the duplex channel between two processes, as asyncio programs use it.

Waits, listeners and limits are here; reading and writing are the driver's, and what a line means is
decided in ``protocol``.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from handleipc.asyncio.attachment import NO_THREAD, process_system
from handleipc.asyncio.events import OnChannel
from handleipc.asyncio.logs import log, throttle
from handleipc.asyncio.posting import running_loop
from handleipc.asyncio.reasons import Aborted
from handleipc.asyncio.registry import default_registry
from handleipc.asyncio.sender import Sender
from handleipc.asyncio.starting import check_limits, refuse_descriptors
from handleipc.exceptions import (
    ChannelBusy,
    ChannelClosed,
    RemoteProtocolError,
)
from handleipc.handles.group import COUNTING
from handleipc.limits import Invitation, Limits
from handleipc.protocol.channel import ChannelProtocol, State
from handleipc.protocol.deliveries import Internal, Received
from handleipc.stats import ChannelStats

__all__ = ["Channel"]

Message = Received


class Channel(Sender):
    """One end of a channel. Made by ``fork``, ``spawn`` and ``parent``, not by hand.

    It is its own iterator: ``async for message, handle in channel`` ends when the peer disconnects.

    Args:
        sock: this end of the socket pair; the channel's from here on.
        limits: the bounds of this end.
        inviting: the peer was invited to the native dialect.
        invited_by: the invitation this process was started with.
        accept_handles: False gives every handle back to the peer.
    """

    if TYPE_CHECKING:
        on: OnChannel
        once: OnChannel

    EVENTS: ClassVar[frozenset[str]] = frozenset(
        {"message", "internal_message", "disconnect", "error", "undelivered"}
    )

    def __init__(
        self,
        sock: socket.socket,
        limits: Limits,
        *,
        inviting: bool = False,
        invited_by: Invitation | None = None,
        accept_handles: bool = True,
    ) -> None:
        super().__init__(
            sock,
            ChannelProtocol(
                limits,
                process_system,
                self._convert if accept_handles else default_registry.refuse,
                maker=self._maker if accept_handles else None,
                check=default_registry.check if accept_handles else default_registry.refuse_all,
                inviting=inviting,
                invited_by=invited_by,
            ),
        )
        self._reader: asyncio.Future[None] | None = None
        self._wants_all = False
        self._takers_changed = True
        self._listens_internal = False
        self._disconnect_emitted = False

    @classmethod
    def over(
        cls,
        sock: socket.socket,
        *,
        role: Literal["parent", "child"],
        limits: Limits | None = None,
        accept_handles: bool = True,
    ) -> Channel:
        """Make a channel of a connected Unix stream socket, between any two handleipc processes.

        Of a ``socket.socketpair()``, or of a socket that another program connected. The channel
        owns it from here on, and ``sock`` is detached. They speak the native dialect. Who may be at
        the other end is for the caller to say: ``peer`` tells, and ``connect`` and
        ``listen_channels`` ask.

        Args:
            sock: the socket, of which nothing was read or written yet.
            role: ``"parent"`` at one end and ``"child"`` at the other, whoever started whom.
            limits: the bounds of this end; None for the defaults.
            accept_handles: False refuses descriptors from the peer, as ``spawn`` does.

        Raises:
            TypeError, ValueError: it is no such socket, or an argument makes no sense; it is the
                caller's still.
        """
        if role not in ("parent", "child"):
            raise ValueError(f"role={role!r}: one end is the 'parent', the other the 'child'")
        check_limits(limits)
        if not isinstance(sock, socket.socket):
            raise TypeError(f"a channel needs a socket.socket, not a {type(sock).__name__}")
        if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
            raise ValueError(f"{sock!r} cannot carry descriptors: a Unix stream socket can")
        try:
            sock.getpeername()
        except OSError as error:
            raise ValueError(f"{sock!r} is not connected: {error.strerror}") from None
        asyncio.get_running_loop()  # raises where there is none, while all is as it was
        if not accept_handles:
            refuse_descriptors(sock)
        return Channel(
            socket.socket(fileno=sock.detach()),
            limits or Limits(),
            inviting=role == "parent",
            invited_by=Invitation(0, 0) if role == "child" else None,
            accept_handles=accept_handles,
        )

    def _attach(self) -> None:
        self._ended = asyncio.Event()  # an event belongs to the loop it was first waited in
        super()._attach()

    # -- what the application asks ---------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """Whether messages can be sent. False at once after ``disconnect()``, and in copies."""
        is_open = self._protocol.state is State.OPEN and self._end_after is None
        return is_open and not self._link.at_eof and not self._is_copy

    @property
    def dialect(self) -> str:
        """``"node"`` or ``"native"``: how this channel is spelled on the wire, as known so far."""
        return self._protocol.dialect

    @property
    def connections(self) -> int:
        """Connections of this process's servers that the peer has, as far as it has told.

        A handleipc peer tells of each close, a Node.js peer when the last one has closed.
        """
        return sum([one.open for one in self.lists.sent_lists.values()])

    def stats(self) -> ChannelStats:
        """Return what the channel holds now: each bounded queue, and its limit."""
        protocol = self._protocol
        return ChannelStats(
            pid=self.peer.pid,
            state=protocol.state.name.lower(),
            dialect=protocol.dialect,
            opened=protocol.was_opened,
            connections=self.connections,
            above_water=protocol.is_above_water,
            **protocol.levels,
        )

    async def recv(self) -> Message:
        """Return the next message as ``(message, handle)``; ``handle`` is None for plain ones.

        Cancelled, it has taken nothing.

        Raises:
            ChannelBusy: there is a ``"message"`` listener, or another ``recv`` waits, or another
                event loop has the channel.
            ChannelClosed: this end has disconnected, and everything was read; or the event loop of
                the channel has ended.
            ChannelBroken: the peer has disconnected, and everything was read.
            RemoteProtocolError: the peer broke the protocol.
            ForkedCopy: this is a forked copy of the process that has the channel.
        """
        await self._wait_ready()
        return self._take()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Message:
        if (
            self._protocol.ready
            and self._reader is None
            and not self._takers_changed
            and not self._has_listeners("message")
            and running_loop() is self._loop
            and self._thread != NO_THREAD
        ):
            return self._take()  # as recv(), which would not wait either
        try:
            return await self.recv()
        except ChannelClosed:
            if not self._ends_quietly():
                raise
            raise StopAsyncIteration from None

    async def batches(self) -> AsyncIterator[list[Message]]:
        """Iterate over messages in lists, of everything that has arrived each time.

        Cheaper than one by one under load. All handles of a list are acknowledged.
        """
        while True:
            self._wants_all = self._takers_changed = True
            try:
                await self._wait_ready()
            except ChannelClosed:
                if not self._ends_quietly():
                    raise
                return
            finally:
                self._wants_all, self._takers_changed = False, True
            batch = self._protocol.take_all()
            self._say_who_takes()
            self._taken()
            yield batch

    def disconnect(self, *, timeout: float | None = None) -> None:
        """End politely: what was sent before is flushed, then the channel closes.

        ``connected`` is False at once; ``"disconnect"`` follows. Messages that arrived and were
        not taken stay readable. Handles of the peer that were not acknowledged go back to it.
        Does nothing the second time. The end of ``asyncio.run`` right after it flushes for one
        second at most.

        Args:
            timeout: seconds to flush, then ``abort()``; None means ``Limits.disconnect_timeout``.
        """
        self._check_use()
        if self._in_protocol:
            # A conversion asked for it, in the middle of what it changes.
            self._loop.call_soon(partial(self.disconnect, timeout=timeout))
            return
        limit = self._limits.disconnect_timeout if timeout is None else timeout
        self._protocol.disconnect(limit)
        self._schedule_turn()

    async def wait_disconnected(self) -> None:
        """Wait until the channel has ended, whoever ended it."""
        self._check_use()
        await self._ended.wait()

    def abort(self) -> None:
        """End now. Handles not acknowledged come back; what is queued is lost.

        Towards a living Node peer the one handle in flight cannot be taken back: this end's copy
        is closed, and it is reported as undelivered ``in doubt``, or as ``HandleInDoubt``.
        """
        self._refuse_copy()
        if self._thread != NO_THREAD and not self._loop.is_closed():
            self._check_use()
        self._end(Aborted())

    # -- taking ----------------------------------------------------------------------------------

    def _ends_quietly(self) -> bool:
        """Say whether an iteration just ends now that the channel has, and does not raise."""
        return self._is_closed

    async def _wait_ready(self) -> None:
        self._check_use()
        if self._has_listeners("message"):
            raise ChannelBusy("a 'message' listener takes the messages of this channel: remove it")
        if self._reader is not None:
            raise ChannelBusy("another recv() or iteration waits for the next message already")
        protocol = self._protocol
        if self._takers_changed:
            # A listener has gone since the last turn: what was its own is not for a reader.
            self._say_who_takes()
        while not protocol.ready:
            if self._is_closed:
                if isinstance(protocol.error, RemoteProtocolError):
                    raise protocol.error
                raise self._why_closed()
            self._reader = self._loop.create_future()
            try:
                if protocol.may_go_on or not self._is_reading:
                    self._turn()
                elif self._takers_changed:
                    self._say_who_takes()
                if not protocol.ready and not self._is_closed:
                    await self._reader
            finally:
                self._reader = None

    def _take(self) -> Message:
        received = self._protocol.take()
        self._taken()
        return received

    def _taken(self) -> None:
        """Something was taken, which makes room: a turn, if that lets anything go on."""
        if self._protocol.may_go_on or not self._is_reading:
            self._schedule_turn()

    def _say_who_takes(self) -> None:
        """Tell the protocol, after a listener came or went, or ``batches`` waits."""
        self._takers_changed = False
        self._protocol.set_taker(
            listens=bool(self._listeners.get("message")),
            takes_all=self._wants_all,
            listens_internal=self._listens_internal,
        )

    def _add(self, event: str, listener: Callable[..., Any], *, once: bool) -> None:
        self._refuse_copy()
        if event == "message" and self._reader is not None:
            raise ChannelBusy("recv() or an iteration waits for the next message already")
        super()._add(event, listener, once=once)

    def _listeners_changed(self, event: str) -> None:
        if event == "message":
            self._takers_changed = True
            self._schedule_turn()

    def _deliver(self) -> bool:
        """Give listeners what is ready; returns whether anything was given."""
        protocol, listeners = self._protocol, self._listeners
        ready, urgent = protocol.ready, protocol.urgent
        given = False
        while urgent or (ready and listeners.get("message")):
            given = True
            self._give(protocol.take(urgent=bool(urgent)))
        if ready:
            self._wake_reader()
        return given

    def _give(self, received: Received) -> None:
        message, handle = received
        event = "message"
        if type(received) is Internal:
            event = "internal_message"
            if message["cmd"] in COUNTING and handle is None:
                self._take_question(message)
                return  # between the two ends, and nobody else's
        if not self._emit(event, message, handle) and handle is not None:
            # As Node: an internal message without a listener is gone. Its descriptor is not.
            self._close_unwanted(handle)

    # -- what the driver asks --------------------------------------------------------------------

    def _begin_turn(self) -> None:
        self._protocol.begin_turn(reader_waits=self._reader is not None)

    def _prepare(self) -> None:
        lists = self.lists
        listens_internal = bool(
            lists.sent_lists or lists.received_lists or self._listeners.get("internal_message")
        )
        if self._takers_changed or listens_internal is not self._listens_internal:
            self._listens_internal = listens_internal
            self._say_who_takes()
        if lists.reports:
            lists.flush_reports()

    def _exchange(self) -> bool:
        protocol = self._protocol
        given = False
        if protocol.outcomes:
            self._report_outcomes()
        if protocol.ready or protocol.urgent:
            given = self._deliver()
        if protocol.faults:
            self._report_faults()
        # Only for what is still waited for, now that all was written that could be: a send that
        # need not wait must not open the gates.
        if self._is_waited_for or protocol.is_waited_for:
            given = self._watch_waits() or given
        return given

    # -- telling ---------------------------------------------------------------------------------

    def _report_faults(self) -> None:
        faults = self._protocol.faults
        while faults.closes:
            self._report_close(*faults.closes.pop(0))
        while faults.warnings:
            throttle.warning("stray reply", "%r %s", self, faults.warnings.pop(0))
        while faults.errors:
            error = faults.errors.pop(0)
            if not self._emit("error", error):
                throttle.warning(f"error {type(error).__name__}", "%r: %s", self, error)

    # -- ends ------------------------------------------------------------------------------------

    def _closed(self) -> None:
        with contextlib.ExitStack() as steps:
            # Everybody is told, whatever another's listener did. The last one pushed runs first.
            steps.callback(self._tell_the_end)
            steps.callback(self._wake_reader)
            steps.callback(self._give_what_is_left)
            steps.callback(self._end_waits)
            steps.callback(self._report_faults)
            steps.callback(self.lists.ended)
            steps.callback(self._report_outcomes)

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _tell_the_end(self) -> None:
        error = self._protocol.error
        log.debug("%r has ended: %s", self, error or "politely")
        if isinstance(error, RemoteProtocolError) and not self._emit("error", error):
            throttle.warning(f"end {type(error).__name__}", "%r: %s", self, error)
        if self._loop.is_closed():
            self._emit_disconnect()
        else:
            self._loop.call_soon(self._emit_disconnect)

    def _give_what_is_left(self) -> None:
        self._say_who_takes()
        self._deliver()

    def _emit_disconnect(self) -> None:
        if not self._disconnect_emitted:
            self._disconnect_emitted = True
            try:
                self._emit("disconnect")
            finally:
                self._ended.set()

    def __repr__(self) -> str:
        state = self._protocol.state.name.lower()
        pid = self.peer.pid or "?"
        return f"<{type(self).__name__} {state} {self.dialect} peer={pid} fd={self._link.fileno()}>"
