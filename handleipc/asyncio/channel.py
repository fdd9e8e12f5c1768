"""``Channel``: the duplex channel between two processes, as asyncio programs use it.

Waits, listeners and limits are here; reading and writing are the driver's, and what a line means is
decided in ``protocol``.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any, ClassVar, Self

from handleipc.asyncio.driver import Aborted, process_system
from handleipc.asyncio.handles import default_registry
from handleipc.asyncio.sender import Sender
from handleipc.deliveries import Internal, Received
from handleipc.exceptions import (
    ChannelBusy,
    ChannelClosed,
    RemoteProtocolError,
)
from handleipc.limits import Limits
from handleipc.protocol import ChannelProtocol, Invitation, State

__all__ = ["Channel"]

log = logging.getLogger("handleipc")

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
                direct=default_registry.direct if accept_handles else None,
                inviting=inviting,
                invited_by=invited_by,
            ),
        )
        self._reader: asyncio.Future[None] | None = None
        self._wants_all = False
        self._disconnect_emitted = False

    def _attach(self) -> None:
        self._ended = asyncio.Event()  # an event belongs to the loop it was first waited in
        super()._attach()

    # -- what the application asks ---------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """Whether messages can be sent. False at once after ``disconnect()``."""
        return self._protocol.state is State.OPEN

    @property
    def dialect(self) -> str:
        """``"node"`` or ``"native"``: how this channel is spelled on the wire, as known so far."""
        return self._protocol.dialect

    async def recv(self) -> Message:
        """Return the next message as ``(message, handle)``; ``handle`` is None for plain ones.

        Cancelled, it has taken nothing.

        Raises:
            ChannelBusy: there is a ``"message"`` listener, or another ``recv`` waits.
            ChannelClosed: this end has disconnected, and everything was read.
            ChannelBroken: the peer has disconnected, and everything was read.
            RemoteProtocolError: the peer broke the protocol.
        """
        await self._wait_ready()
        return self._take()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Message:
        incoming = self._protocol.incoming
        if (
            incoming.ready
            and incoming.deliveries.holds_back
            and self._reader is None
            and not self._has_listeners("message")
        ):
            return self._take()  # as recv(), which would not wait either
        try:
            return await self.recv()
        except ChannelClosed:
            raise StopAsyncIteration from None

    async def batches(self) -> AsyncIterator[list[Message]]:
        """Iterate over messages in lists, of everything that has arrived each time.

        Cheaper than one by one under load. All handles of a list are acknowledged.
        """
        while True:
            self._wants_all = True
            try:
                await self._wait_ready()
            except ChannelClosed:
                return
            finally:
                self._wants_all = False
            batch = self._protocol.incoming.deliveries.take_ready()
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
        limit = self._limits.disconnect_timeout if timeout is None else timeout
        self._protocol.disconnect(limit)
        self._schedule_turn()

    async def wait_disconnected(self) -> None:
        """Wait until the channel has ended, whoever ended it."""
        await self._ended.wait()

    def abort(self) -> None:
        """End now. Handles not acknowledged come back; what is queued is lost.

        Towards a living Node peer the one handle in flight cannot be taken back: this end's copy
        is closed, and it is reported as undelivered ``in doubt``.
        """
        self._abort(Aborted())
        self._turn()

    # -- taking ----------------------------------------------------------------------------------

    async def _wait_ready(self) -> None:
        if self._has_listeners("message"):
            raise ChannelBusy("a 'message' listener takes the messages of this channel: remove it")
        if self._reader is not None:
            raise ChannelBusy("another recv() or iteration waits for the next message already")
        incoming = self._protocol.incoming
        # A listener may have gone since the last turn: what was its own is not for a reader.
        self._say_who_takes()
        while not incoming.ready:
            if self._is_closed:
                if isinstance(self._protocol.error, RemoteProtocolError):
                    raise self._protocol.error
                raise self._why_closed()
            self._reader = self._loop.create_future()
            if incoming.holds or not self._is_reading:
                self._turn()
            else:
                self._say_who_takes()
            try:
                if not incoming.ready and not self._is_closed:
                    await self._reader
            finally:
                self._reader = None

    def _take(self) -> Message:
        received = self._protocol.incoming.deliveries.take()
        self._taken()
        return received

    def _taken(self) -> None:
        """Something was taken, which makes room: a turn, if that lets anything go on."""
        incoming = self._protocol.incoming
        if incoming.holds or incoming.grant_due or not self._is_reading:
            self._schedule_turn()

    def _say_who_takes(self) -> None:
        deliveries = self._protocol.incoming.deliveries
        listened = bool(self._listeners.get("message"))
        if listened is deliveries.holds_back:
            deliveries.hold_back(not listened)
        deliveries.limit = None if listened or self._wants_all else self._limits.ready

    def _add(self, event: str, listener: Callable[..., Any], *, once: bool) -> None:
        if event == "message" and self._reader is not None:
            raise ChannelBusy("recv() or an iteration waits for the next message already")
        super()._add(event, listener, once=once)

    def _listeners_changed(self, event: str) -> None:
        if event == "message":
            self._schedule_turn()

    def _deliver(self) -> bool:
        """Give listeners what is ready; returns whether anything was given."""
        deliveries = self._protocol.incoming.deliveries
        listeners = self._listeners
        ready, urgent = deliveries.ready, deliveries.urgent
        given = False
        while urgent or (ready and listeners.get("message")):
            given = True
            self._give(deliveries.take_urgent() if urgent else deliveries.take())
        if ready and self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
        return given

    def _give(self, received: Received) -> None:
        message, handle = received
        event = "message"
        if type(received) is Internal:
            event = "internal_message"
            self._take_question(message)
        if not self._emit(event, message, handle) and handle is not None:
            # As Node: an internal message without a listener is gone. Its descriptor is not.
            self._close_unwanted(handle)

    # -- what the driver asks --------------------------------------------------------------------

    def _prepare(self) -> None:
        self._say_who_takes()
        self.lists.flush_reports()

    def _exchange(self) -> bool:
        self._report_outcomes()
        given = self._deliver()
        self._report_faults()
        self._wake_waiters()
        return self._ask_for_more() or given

    def _ask_for_more(self) -> bool:
        """Let the peer send on while somebody here still waits. Returns whether it is to be told.

        Only once what could be written was: a send that need not wait must not open the gates.
        """
        incoming = self._protocol.incoming
        wanted, incoming.wants_more = incoming.wants_more, self._is_waited_for
        return incoming.wants_more and not wanted and incoming.native and incoming.grant_due

    # -- telling ---------------------------------------------------------------------------------

    def _report_faults(self) -> None:
        protocol = self._protocol
        for failed in (protocol.outgoing.queue.failed, protocol.incoming.deliveries.failed):
            while failed:
                self._report_close(*failed.popleft())
        if not (protocol.warnings or protocol.incoming.errors):
            return
        warnings, protocol.warnings = protocol.warnings, []
        for text in warnings:
            log.warning("%r %s", self, text)
        errors, protocol.incoming.errors = protocol.incoming.errors, []
        for error in errors:
            if not self._emit("error", error):
                log.warning("%r: %s", self, error)

    # -- ends ------------------------------------------------------------------------------------

    def _closed(self) -> None:
        self._report_outcomes()
        self.lists.ended()
        self._report_faults()
        self._wake_waiters()
        self._give_what_is_left()
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
        error = self._protocol.error
        if isinstance(error, RemoteProtocolError) and not self._emit("error", error):
            log.warning("%r: %s", self, error)
        if not self._loop.is_closed():
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
        return f"<{type(self).__name__} {state} {self.dialect} fd={self._sock.fileno()}>"
