"""The sending side of a channel for asyncio programs: queueing, waiting, and how it went.

What leaves when is the protocol's; writing is the driver's.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterable
from typing import Any, NoReturn

from handleipc.asyncio.attachment import NO_THREAD
from handleipc.asyncio.logs import log, throttle
from handleipc.asyncio.posting import running_loop
from handleipc.asyncio.tracking import TrackingDriver
from handleipc.asyncio.waiters import Waiters
from handleipc.exceptions import (
    ChannelBusy,
    ChannelFull,
    HandleInDoubt,
    HandleIPCError,
    HandleNotDelivered,
    MessageNotSerializable,
)
from handleipc.protocol.channel import ChannelProtocol, State
from handleipc.protocol.stages import Entry, EntryState
from handleipc.typing import JSON
from handleipc.wire import codec

__all__ = ["Sender"]

NOT_OPENED = "the peer has said nothing yet (a Python child opens its channel with parent())"
OPEN = State.OPEN
_encode = codec.encode

# Sends in a row that never had to wait, after which other tasks get their turn.
SENDS_IN_A_ROW = 64
# Sends in one turn of the loop leave together, but not more than a set of handles or this many
# bytes: beyond that nothing is saved, and the peer would wait while the application goes on.
WRITE_EARLY = 16 * 1024
# Bytes that an envelope of either dialect adds to a message at most, its handle's options aside.
ENVELOPE_BYTES = 256


class Sender(TrackingDriver):
    """A driver with ``send``.

    Args:
        sock: this end of the socket pair; the driver's from here on.
        protocol: the state machine to drive.
    """

    def __init__(self, sock: socket.socket, protocol: ChannelProtocol) -> None:
        super().__init__(sock, protocol)
        self._senders, self._drainers, self._flushers = Waiters(), Waiters(), Waiters()
        self._sends_in_a_row = 0
        self._handle_senders = 0
        self._unwritten = 0
        self._is_pressed = False
        """Whether ``send_nowait`` last said that senders should wait."""
        limits = protocol.limits
        # Copies, since each send looks at them.
        self._shape = limits.shape
        self._longest = limits.line - ENVELOPE_BYTES
        self._handle_share = WRITE_EARLY // limits.set_size + 1

    async def send(
        self,
        message: JSON,
        handle: object = None,
        *,
        keep_open: bool = False,
        transfer: bool = False,
        timeout: float | None = None,
    ) -> None:
        """Send a message, with a handle or without.

        Returns when a plain message has been written to the kernel, or when the peer has
        acknowledged the handle, which from then on is its own: a connection is closed here, unless
        ``keep_open``; listeners, UDP sockets and ``Native`` stay open in any case.

        A call cancelled, or timed out, before the first byte has left is withdrawn, and the handle
        is the caller's. Later it stays on its way; should it fail then, it goes to
        ``"undelivered"``.

        Args:
            message: any JSON value.
            handle: what to hand over; see the table in the README.
            keep_open: keep this end's copy open after delivery.
            transfer: of a ``Server``: stop accepting here when the peer has it. Connections
                accepted before can still be taken.
            timeout: seconds to wait; None for ever.

        Raises:
            HandleNotDelivered: the handle is back and usable; the exception says why, and its
                ``__cause__`` is the channel's end if that was it.
            HandleInDoubt: nobody can say whether a living peer has it; our copy is closed.
            ChannelClosed: this end has disconnected, or its event loop has ended.
            ChannelBroken: the peer ended, before the message was written.
            ChannelFull: more is queued than ``Limits`` allows.
            ChannelBusy: the peer waits for us to read, and nobody does; or this is not the thread
                of the channel's event loop.
            ForkedCopy: this is a forked copy of the process that has the channel.
            MessageNotSerializable, UnsupportedHandle, DescriptorReleased: bad input; nothing was
                sent.
            TimeoutError: ``timeout`` passed. If the handle has been withdrawn, as
                ``HandleNotDelivered`` instead.
        """
        line = self._encode(message)
        if handle is None:
            entry = Entry(line, message, None)
            self._protocol.send(entry)
        else:
            entry, _ = self._send_handle(line, message, handle, keep_open, transfer=transfer)
        waiter = entry.waiter = self._senders.new(self._loop)
        self._handle_senders += entry.descriptors > 0
        try:
            self._turn()
            if waiter.done():
                await self._be_fair()
                waiter.result()
            elif timeout is None:
                await waiter
            else:
                async with asyncio.timeout(timeout):
                    await waiter
        except TimeoutError:
            self._time_out(entry, waiter, timeout)
        except (asyncio.CancelledError, ChannelBusy):
            self._stop_waiting(entry)
            failed = waiter.exception() if waiter.done() and not waiter.cancelled() else None
            if isinstance(failed, HandleNotDelivered | HandleInDoubt):
                # It ended in the very turn in which the caller stopped waiting.
                self._undelivered(entry, failed.reason)
            raise
        finally:
            self._handle_senders -= entry.descriptors > 0
            self._senders.leave(waiter)

    def _stop_waiting(self, entry: Entry) -> bool:
        """Withdraw an entry if it has not left; returns whether it was."""
        entry.waiter = None
        withdrawn = self._protocol.withdraw(entry)
        self._schedule_turn()
        return withdrawn

    def _time_out(self, entry: Entry, waiter: asyncio.Future[None], timeout: float | None) -> None:
        """End a ``send`` whose time is over. Returns or raises as it ended, if that is known."""
        withdrawn = self._stop_waiting(entry)
        if not waiter.cancelled():
            return waiter.result()
        if outcome := self._take_outcome(entry):
            # It ended in a turn that is not over: the caller hears of it, and nobody else.
            _, reason = outcome
            if reason is None:
                return None
            raise self._failure(entry, reason) from None
        if withdrawn and entry.pending is not None:
            why = f"it did not leave within {timeout} s"
            raise HandleNotDelivered(entry.pending.handle, why) from None
        raise TimeoutError(self._why_late(timeout, entry)) from None

    def _why_late(self, timeout: float | None, entry: Entry) -> str:
        what = "message was not written" if entry.pending is None else "handle was not acknowledged"
        if entry.pending is None:
            then = (
                "it has been withdrawn" if entry.state is EntryState.ENDED else "it is on its way"
            )
        else:
            then = "it stays on its way, and goes to 'undelivered' listeners if it fails"
        whose = "the peer does not read" if self._protocol.was_opened else NOT_OPENED
        return f"the {what} within {timeout} s: {whose}; {then}"

    def send_nowait(
        self,
        message: JSON,
        handle: object = None,
        *,
        keep_open: bool = False,
        transfer: bool = False,
    ) -> bool:
        """Queue a message, as Node's ``send``; it leaves with the others of this loop turn.

        Many leave in sets, each as soon as it is full. No listener is called meanwhile.

        A handle that cannot be delivered goes to the ``"undelivered"`` listeners as ``(message,
        handle, reason)``; with no listener it is closed and logged.

        Returns:
            False above the high-water mark: ``await drain()`` before sending more.

        Raises:
            ChannelClosed, ChannelBroken, ChannelBusy, ChannelFull, ForkedCopy,
            MessageNotSerializable, UnsupportedHandle, DescriptorReleased: as ``send``.
        """
        line = self._encode(message)
        if handle is None:
            is_above = self._protocol.send(line)
            self._unwritten += len(line)
        else:
            _, is_above = self._send_handle(line, message, handle, keep_open, transfer=transfer)
            self._unwritten += self._handle_share
        if self._unwritten >= WRITE_EARLY:
            self._unwritten = 0
            self._write_early()
            is_above = self._protocol.is_above_water
        elif not self._turn_scheduled:
            self._schedule_turn()
        if is_above is not self._is_pressed:
            self._note_water(is_above)
        return not is_above

    def _note_water(self, is_above: bool) -> None:
        """Log that senders are to wait, or not any more."""
        self._is_pressed = is_above
        if log.isEnabledFor(logging.DEBUG):
            what = "back-pressure" if is_above else "no more back-pressure"
            levels = self._protocol.levels
            log.debug(
                "%r: %s (%d bytes and %d descriptors wait)",
                self,
                what,
                levels["queued_bytes"].used,
                levels["queued_handles"].used,
            )

    def send_many(self, messages: Iterable[tuple[JSON, object]], *, keep_open: bool = False) -> int:
        """Queue as many ``(message, handle)`` as there is room for, in order; never waits.

        They leave together. ``handle`` is None for a plain message. Each is as of ``send_nowait``.

        Returns:
            How many were taken: fewer than were given above the high-water mark (``await drain()``,
            then send the rest), and before one that cannot be sent. Handles not taken are the
            caller's, as they were.

        Raises:
            ChannelClosed, ChannelBroken, ChannelBusy, ForkedCopy, MessageNotSerializable,
            UnsupportedHandle, DescriptorReleased: the first cannot be sent; nothing was taken.
        """
        taken = 0
        for message, handle in messages:
            try:
                has_room = self.send_nowait(message, handle, keep_open=keep_open)
            except ChannelFull:
                break
            except HandleIPCError:
                if not taken:
                    raise
                break
            taken += 1
            if not has_room:
                break
        return taken

    async def drain(self) -> None:
        """Wait until the queue is below its low-water mark.

        Raises:
            ChannelBroken: the channel ended with messages queued.
            ChannelBusy: the peer waits for us to read, and nobody does.
        """
        self._check_use()
        if self._is_closed or self._protocol.is_above_water:
            await self._wait_in(self._drainers)

    async def flush(self) -> None:
        """Wait until everything is written and every handle acknowledged.

        Raises:
            ChannelBroken: the channel ended before.
            ChannelBusy: the peer waits for us to read, and nobody does.
        """
        self._check_use()
        self._turn()
        if not self._protocol.idle or self._is_closed:
            await self._wait_in(self._flushers)

    # -- queueing --------------------------------------------------------------------------------

    def _encode(self, message: JSON) -> bytes:
        """Return the message as JSON, if it may be queued. Raises as ``send``."""
        protocol = self._protocol
        if running_loop() is not self._loop or self._thread == NO_THREAD:
            self._refuse_use()
        if protocol.state is not OPEN:
            raise self._why_closed()
        line = _encode(message, self._shape)
        if len(line) > self._longest:
            self._refuse_length(len(line))
        return line

    def _send_handle(
        self, line: bytes, message: JSON, handle: object, keep_open: bool, *, transfer: bool
    ) -> tuple[Entry, bool]:
        """Queue a handle with its message.

        Returns:
            Its entry, and whether senders should wait now. Raises as ``send``, and then the handle
            is as it was.
        """
        self._protocol.check_room(len(line), is_handle=True)  # before anything is done to it
        pending = self._prepare_handle(handle, keep_open, transfer)
        entry = Entry(line, message, pending)
        try:
            if entry.size > self._longest:
                self._refuse_length(entry.size)
            return entry, self._protocol.send(entry)
        except HandleIPCError:
            pending.returned()
            raise

    def _refuse_length(self, size: int) -> NoReturn:
        raise MessageNotSerializable(
            f"the message takes {size} bytes with what describes its handle, and Limits.line"
            f" is {self._limits.line}"
        )

    def _check_use(self) -> None:
        """Refuse a caller who is not on the channel's loop. Raises as ``_refuse_use``."""
        if running_loop() is not self._loop or self._thread == NO_THREAD:
            self._refuse_use()

    async def _be_fair(self) -> None:
        """Give other tasks their turn after many sends that never had to wait."""
        self._sends_in_a_row += 1
        if self._sends_in_a_row >= SENDS_IN_A_ROW:
            self._sends_in_a_row = 0
            await asyncio.sleep(0)

    async def _wait_in(self, waiters: Waiters) -> None:
        if self._is_closed:
            if self._protocol.lost_something:
                raise self._why_closed()
            return
        waiter = waiters.new(self._loop)
        try:
            self._turn()
            await waiter
        finally:
            waiters.leave(waiter)

    # -- waiting ---------------------------------------------------------------------------------

    @property
    def _is_waited_for(self) -> bool:
        return bool(self._senders or self._drainers or self._flushers)

    def _watch_waits(self) -> bool:
        """End the waits that are over, and tell the protocol of the others, as ``watch_waits``."""
        protocol = self._protocol
        if self._drainers and not protocol.is_above_water:
            self._drainers.wake()
            if self._is_pressed:
                self._note_water(False)
        if self._flushers and protocol.idle:
            self._flushers.wake()
        for_peer = bool(self._handle_senders or self._flushers or self._drainers)
        may_go_on = protocol.watch_waits(for_peer=for_peer, for_kernel=bool(self._senders))
        if protocol.nobody_reads:
            busy = (
                "nobody reads this channel, and the peer waits for that with what is waited for"
                f" here ({len(protocol.ready)} messages are held): read with recv(), iteration or a"
                " 'message' listener while you send"
            )
            for waiters in (self._senders, self._drainers, self._flushers):
                waiters.fail(lambda: ChannelBusy(busy))
        return may_go_on

    def _end_waits(self) -> None:
        """End what is waited for, now that the channel has ended."""
        for waiters in (self._drainers, self._flushers):
            if self._protocol.lost_something:
                waiters.fail(self._why_closed)
            else:
                waiters.wake()

    # -- telling ---------------------------------------------------------------------------------

    def _report_outcomes(self) -> None:
        outcomes = self._protocol.outcomes
        while outcomes:
            entry, reason = outcomes.popleft()
            waiter = entry.waiter
            if isinstance(waiter, asyncio.Future) and not waiter.done():
                self._senders.discard(waiter)
                if reason is None:
                    waiter.set_result(None)
                else:
                    waiter.set_exception(self._failure(entry, reason))
            elif reason is not None and entry.pending is not None:
                self._undelivered(entry, reason)

    def _take_outcome(self, entry: Entry) -> tuple[Entry, str | None] | None:
        """Take the outcome of ``entry`` out of those to be reported, if it is there."""
        outcomes = self._protocol.outcomes
        found = next((one for one in outcomes if one[0] is entry), None)
        if found is not None:
            outcomes.remove(found)
        return found

    def _failure(self, entry: Entry, reason: str) -> Exception:
        """Return what to raise where this entry was sent."""
        if entry.pending is None:
            return self._why_closed()
        kind = HandleInDoubt if entry.in_doubt else HandleNotDelivered
        error = kind(entry.pending.handle, reason)
        if self._is_closed:
            error.__cause__ = self._why_closed()
        return error

    def _close_unwanted(self, handle: Any) -> None:
        """Close a handle that nobody is to get."""
        close = getattr(handle, "close", None)
        if close is not None:
            try:
                close()
            except Exception as error:
                self._report_close(handle, error)

    def _report_close(self, handle: object, error: Exception) -> None:
        self._loop.call_exception_handler(
            {"message": f"exception in close() of {handle!r}", "exception": error}
        )

    def _undelivered(self, entry: Entry, reason: str) -> None:
        assert entry.pending is not None
        handle = entry.pending.handle
        if entry.in_doubt:
            reason = f"in doubt: {reason}"
        if self._emit("undelivered", entry.message, handle, reason):
            return
        throttle.warning(
            "undelivered", "%r was not delivered and nobody listens for it: %s", handle, reason
        )
        if entry.pending.is_given_away and not entry.in_doubt:
            self._close_unwanted(handle)
