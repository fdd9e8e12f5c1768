"""Drives one protocol on one socket of the event loop: reads, writes, keeps its deadlines.

On the raw descriptor with ``add_reader`` and ``add_writer``, the one interface that asyncio and
uvloop share for a socket whose descriptors must not be lost: a transport would read with ``recv``,
which drops them. Knows no message and no listener; ``channel`` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import threading
import time
from collections.abc import AsyncGenerator

from handleipc.ancillary import Receiver, Refused, send_with_fds
from handleipc.asyncio.emitter import Emitter
from handleipc.asyncio.gaps import creator, has_unread, loses_descriptors
from handleipc.exceptions import (
    ChannelBroken,
    ChannelClosed,
    HandleIPCError,
    LocalProtocolError,
)
from handleipc.framing import Batch, LineFramer
from handleipc.protocol import ChannelProtocol, State
from handleipc.stages import Stage
from handleipc.system import System

__all__ = ["Aborted", "Driver", "process_system"]

# One process, one budget of descriptors in flight.
process_system = System()

# Bytes written before the event loop gets its turn.
WRITE_BUDGET = 1024 * 1024
# How long the end of the event loop is held up to write what is queued.
LAST_FLUSH = 1.0
# The kernel keeps four bytes of buffer accounting or fewer for each byte it can hold.
BUFFER_FACTOR = 4


class Aborted(HandleIPCError):
    """The reason of an ``abort()``; never raised."""

    def __str__(self) -> str:
        return "this end aborted the channel"


class Driver(Emitter):
    """What a channel does with its socket. Subclasses say what to do with messages.

    Args:
        sock: this end of the socket pair; the driver's from here on.
        protocol: the state machine to drive.
    """

    def __init__(self, sock: socket.socket, protocol: ChannelProtocol) -> None:
        super().__init__(asyncio.get_running_loop())
        sock.setblocking(False)
        self._sock = sock
        self._fd = sock.fileno()
        self._limits = protocol.limits
        self._protocol = protocol
        protocol.on_wake = self._schedule_turn
        self._receiver = Receiver(LineFramer(protocol.limits.line))
        self._is_reading = self._is_writing = False
        self._in_turn = False
        self._in_read = False
        """Whether lines are being taken: conversions run then, and those are the application's."""
        self._abort_after_read: HandleIPCError | None = None
        self._turn_scheduled = self._read_scheduled = False
        self._timer: asyncio.TimerHandle | None = None
        self._needs_gaps: bool | None = None
        """Whether handles wait until the peer has read what is before them; None: not known yet."""
        self._attach()

    # -- what a subclass does --------------------------------------------------------------------

    def _prepare(self) -> None:
        """Tell the protocol how the application takes messages now."""

    def _exchange(self) -> bool:
        """Give the application what there is for it. Returns whether it took a message."""
        raise NotImplementedError

    def _closed(self) -> None:
        """The protocol and the socket are closed. Called once."""

    def _give_what_is_left(self) -> None:
        """Called by turns after the end: somebody may have begun to listen."""

    @property
    def _is_waited_for(self) -> bool:
        """Whether a local wait may depend on what the peer has sent."""
        return False

    @property
    def _peer_pid(self) -> int:
        """The process at the other end; 0 if that is not known."""
        return creator(self._sock)

    @property
    def _is_closed(self) -> bool:
        return self._protocol.state is State.CLOSED

    def _why_closed(self) -> ChannelClosed:
        if self._protocol.state is State.CLOSING:
            return ChannelClosed("this end has disconnected: nothing more can be sent")
        error = self._protocol.error
        if isinstance(error, Aborted):
            return ChannelClosed("this end has aborted the channel")
        if error is None and self._protocol.ended_here:
            return ChannelClosed("this end has disconnected: nothing more can be sent")
        broken = ChannelBroken(f"the channel has ended: {error or 'the peer closed it'}")
        broken.__cause__ = error
        return broken

    # -- the event loop --------------------------------------------------------------------------

    def _attach(self) -> None:
        """Serve the channel on the running loop, until it ends or the loop does."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._keeper = _until_the_loop_ends(self)
        # Runs up to its yield, which never suspends: now the loop will close it when it ends.
        with contextlib.suppress(StopIteration):
            self._keeper.__anext__().send(None)
        self._turn_scheduled = self._read_scheduled = False
        self._schedule_turn()

    def _dismiss_keeper(self) -> None:
        with contextlib.suppress(StopIteration, RuntimeError):  # RuntimeError: it is running us
            self._keeper.aclose().send(None)

    def _detach(self) -> None:
        """Take everything off the loop; the socket stays open."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._watch(reading=False, writing=False)

    def _watch(self, *, reading: bool, writing: bool) -> None:
        if reading is not self._is_reading:
            self._is_reading = reading
            if reading:
                self._loop.add_reader(self._fd, self._on_readable)
            else:
                self._loop.remove_reader(self._fd)
        if writing is not self._is_writing:
            self._is_writing = writing
            if writing:
                self._loop.add_writer(self._fd, self._turn)
            else:
                self._loop.remove_writer(self._fd)

    def _on_readable(self) -> None:
        if self._is_reading:
            self._read()
            self._turn()

    def _schedule_read(self) -> None:
        if not self._read_scheduled:
            self._read_scheduled = True
            self._loop.call_soon(self._scheduled_read)

    def _scheduled_read(self) -> None:
        self._read_scheduled = False
        self._on_readable()

    def _schedule_turn(self) -> None:
        if not self._turn_scheduled and not self._loop.is_closed():
            self._turn_scheduled = True
            self._loop.call_soon(self._scheduled_turn)

    def _scheduled_turn(self) -> None:
        self._turn_scheduled = False
        self._turn()

    def _turn(self) -> None:
        """Do everything that can be done now: write, give, settle, and watch for the rest."""
        if self._in_turn or self._in_read:
            # A listener or a conversion asked for it: what it wants is done when it returns.
            self._schedule_turn()
            return
        self._in_turn = True
        try:
            if self._sock.fileno() < 0:
                self._give_what_is_left()
                return
            writing = self._go_on()
            if self._is_closed:
                self._end()
                return
        except Exception as error:
            # A defect. The channel ends with it, rather than stall or try for ever.
            self._protocol.abort(LocalProtocolError(f"the channel failed: {error!r}"))
            self._schedule_turn()
            raise
        except BaseException:
            self._schedule_turn()  # a signal handler raised: for what was not done yet
            raise
        finally:
            self._in_turn = False
        reading = self._protocol.want_read(waiting=self._is_waited_for)
        if not reading:
            self._protocol.pause_progress_watch()
        self._watch(reading=reading, writing=writing)
        if reading and self._receiver.must_go_on:
            self._schedule_read()
        self._arm_timer()

    def _write_early(self) -> None:
        """Write without giving the application anything, in the middle of its own doing.

        What the peer has said is read first, since it may let more leave; it is given in the turn
        that follows.
        """
        self._schedule_turn()
        if self._in_turn or self._in_read or self._is_writing or self._is_closed:
            return
        # As in a turn: what it calls may send, too.
        self._in_turn = True
        try:
            protocol = self._protocol
            if (
                self._is_reading
                and protocol.outgoing.handles_out
                and protocol.want_read(waiting=self._is_waited_for)
            ):
                self._read()
            self._write()
        finally:
            self._in_turn = False

    def _go_on(self) -> bool:
        """Write and give in turns, since each makes room for the other. Returns ``_write``'s."""
        protocol = self._protocol
        self._prepare()
        while True:
            protocol.incoming.pump()
            writing = self._write()
            given = self._exchange()
            if protocol.finished:
                protocol.finish()
            if not given or self._is_closed:
                return writing

    def _arm_timer(self) -> None:
        deadline = self._protocol.deadline()
        if deadline is None:
            return
        when = deadline - process_system.clock() + self._loop.time()
        # An earlier timer that fires for nothing costs less than one rearmed at every read.
        if self._timer is None or self._timer.when() > when:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(when, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._protocol.on_deadline()
        self._turn()

    # -- the socket ------------------------------------------------------------------------------

    def _read(self, *, peer_is_dead: bool = False) -> None:
        protocol = self._protocol
        try:
            batch = self._receiver.receive(self._fd)
        except HandleIPCError as error:
            protocol.abort(error)
            return
        except OSError:
            # ECONNRESET: the peer closed with something of ours unread. What it had sent was
            # delivered before this.
            protocol.receive_eof(peer_is_dead=peer_is_dead)
            return
        self._take_lines(batch)
        if self._receiver.at_eof:
            protocol.receive_eof(peer_is_dead=peer_is_dead)
        elif self._abort_after_read is not None:
            self._abort(self._abort_after_read)

    def _take_lines(self, batch: Batch) -> None:
        # Whatever a conversion does meanwhile: the lines are in the buffer of the next read.
        self._in_read = True
        try:
            self._protocol.received(batch)
        finally:
            self._in_read = False

    def _read_rest(self, *, peer_is_dead: bool = False) -> None:
        """Read what is in the socket now, one buffer at most, without waiting for EOF."""
        buffer = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) * BUFFER_FACTOR
        most = self._receiver.position + buffer
        while not self._is_closed and self._receiver.position < most:
            self._read(peer_is_dead=peer_is_dead)
            if self._receiver.drained or self._receiver.at_eof:
                return

    def _write(self) -> bool:
        """Write what may leave. Returns whether to call again when the socket is writable."""
        protocol = self._protocol
        budget = WRITE_BUDGET
        while (stage := protocol.next_stage()) is not None:
            if budget <= 0:
                self._schedule_turn()
                return False
            if stage.fds and self._needs_gaps is not False and self._must_leave_gap():
                protocol.write_refused()
                continue
            try:
                written = send_with_fds(self._fd, stage.data, stage.offset, stage.fds)
            except OSError as error:
                self._write_failed(stage, error)
                continue
            if written is Refused.AGAIN:
                return True
            if written is Refused.IN_FLIGHT:
                if not stage.fds:
                    # No memory for a few bytes, and yet the socket may be writable.
                    self._loop.call_later(self._limits.in_flight_delay_max, self._schedule_turn)
                    return False
                protocol.write_refused()
                continue
            assert isinstance(written, int)
            budget -= written
            protocol.wrote(written)
            if protocol.outgoing.stage is stage:
                return True  # the kernel took a part, so it is full
        return False

    def _must_leave_gap(self) -> bool:
        """Whether the peer would lose the descriptors of the next write."""
        if self._needs_gaps is None:
            if self._protocol.outgoing.native:
                self._needs_gaps = False
                return False
            needs = loses_descriptors(self._peer_pid)
            if self._receiver.position:
                # It has spoken. Before, it may have been a program that starts the one we mean.
                self._needs_gaps = needs
            if not needs:
                return False
        return has_unread(self._fd)

    def _write_failed(self, stage: Stage, error: OSError) -> None:
        if stage.fds and not stage.offset and not isinstance(error, ConnectionError):
            # EPERM: the peer has SO_PASSRIGHTS off. EBADF, EINVAL: not a descriptor that travels.
            self._protocol.handles_refused(f"the kernel does not pass it on: {error.strerror}")
        else:
            self._protocol.write_failed()
            self._schedule_read()

    # -- ends ------------------------------------------------------------------------------------

    def _abort(self, error: HandleIPCError) -> None:
        if self._is_closed:
            return
        if self._in_read:
            self._abort_after_read = error
            return
        # The peer's later acknowledgements fail there, and those it has sent are read here: no
        # handle ends with two owners. Linux keeps what is queued readable after SHUT_RD.
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RD)
        while not (self._is_closed or self._receiver.at_eof):
            self._read_before_abort(error)
        self._protocol.abort(error)

    def _read_before_abort(self, error: HandleIPCError) -> None:
        try:
            batch = self._receiver.receive(self._fd)
        except (OSError, HandleIPCError):
            self._protocol.abort(error)
            return
        self._take_lines(batch)

    def _end(self) -> None:
        """The protocol is closed: close the socket, then tell everybody, once."""
        if self._sock.fileno() < 0:
            return
        self._detach()
        self._receiver.close()
        self._sock.close()
        self._dismiss_keeper()
        self._closed()

    def _loop_ends(self) -> None:
        """The event loop is about to close: write what is queued, within a second."""
        if self._is_closed:
            return
        self._in_turn = True
        try:
            self._go_on_blocking(time.monotonic() + LAST_FLUSH)
            if self._protocol.state is State.CLOSING:
                self._protocol.abort(LocalProtocolError("the event loop ended before the flush"))
            if self._is_closed:
                self._end()
            else:
                self._detach()
        finally:
            self._in_turn = False

    def _go_on_blocking(self, deadline: float) -> None:
        protocol = self._protocol
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        while True:
            writing = self._go_on()
            left = deadline - time.monotonic()
            if self._is_closed or left <= 0:
                return
            if protocol.state is State.OPEN and protocol.outgoing.idle:
                return
            poll.modify(self._fd, select.POLLIN | (select.POLLOUT if writing else 0))
            due = protocol.deadline()
            wait = left if due is None else min(left, max(0.0, due - process_system.clock()))
            events = poll.poll(int(wait * 1000) + 1)
            if self._receiver.must_go_on or (events and events[0][1] & ~select.POLLOUT):
                self._read()
            protocol.on_deadline()


async def _until_the_loop_ends(driver: Driver) -> AsyncGenerator[None, None]:
    # An asynchronous generator, since loops close those when they end (shutdown_asyncgens, which
    # asyncio.run calls last), and say nothing about one that was dropped.
    try:
        yield
    finally:
        driver._loop_ends()
