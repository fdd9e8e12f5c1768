"""Drives one protocol on one socket of the event loop: reads, writes, keeps its deadlines, ends it.

On the raw descriptor with ``add_reader`` and ``add_writer``, the one interface that asyncio and
uvloop share for a socket whose descriptors must not be lost: a transport would read with ``recv``,
which drops them. Knows no message and no listener; ``channel`` does.

Everything that happens goes through ``_turn``, so an exception of a read, a deadline or a turn is
caught in one place, where it becomes the end of the channel. Every end goes through ``_end``, whose
steps come in one order and run whatever the one before did.
"""

from __future__ import annotations

import contextlib
import errno
import math
import socket
import sys
import time
from collections.abc import Callable
from functools import partial

from handleipc.asyncio.attachment import NO_THREAD, Attachment, process_system
from handleipc.asyncio.pace import WRITE_BUDGET, Pace
from handleipc.asyncio.reasons import why_closed
from handleipc.exceptions import (
    ChannelClosed,
    HandleIPCError,
    LocalProtocolError,
    RemoteProtocolError,
    WorkerExited,
)
from handleipc.protocol.channel import ChannelProtocol, State
from handleipc.wire.framing import Batch
from handleipc.wire.link import Link
from handleipc.wire.peer import Peer
from handleipc.wire.syscalls import Refused

__all__ = ["Driver", "process_system"]

CLOSED, CLOSING = State.CLOSED, State.CLOSING
# How long the end of the event loop is held up to write what is queued.
LAST_FLUSH = 1.0
# How long a peer that reads no more may take to close.
CLOSING_PATIENCE = 1.0
# Errors of a read that pass by themselves.
NO_MEMORY = frozenset({errno.ENOBUFS, errno.ENOMEM})


class Driver(Attachment):
    """What a channel does with its socket. Subclasses say what to do with messages.

    Args:
        sock: this end of the socket pair; the driver's from here on.
        protocol: the state machine to drive.
    """

    def __init__(self, sock: socket.socket, protocol: ChannelProtocol) -> None:
        self._link = Link(sock, protocol.limits.line, self._node_pid)
        super().__init__(self._link.fd)
        self._limits = protocol.limits
        self._protocol = protocol
        hooks = protocol.hooks
        hooks.wake, hooks.settling = self._wake, self._stop_receiving
        hooks.peer_has_read = self._link.peer_has_read
        self._pace = Pace()
        self._in_turn = False
        self._in_protocol = False
        """Whether the protocol is at work, which calls the application's conversions and ``close``:
        what they ask for is done afterwards."""
        self._has_hung_up = self._has_ended = False
        self._end_after: Callable[[], None] | None = None  # that was asked for meanwhile
        self._is_unsure = False
        """Whether a write was interrupted: nobody can say how much has left."""
        self._no_memory_since: float | None = None
        self._read_again_at: float | None = None
        self._attach()

    # -- what a subclass does --------------------------------------------------------------------

    def _begin_turn(self) -> None:
        """Look at what the application did since the last turn."""

    def _prepare(self) -> None:
        """Tell the protocol how the application takes messages now."""

    def _exchange(self) -> bool:
        """Give the application what there is for it. Returns whether it took a message."""
        raise NotImplementedError

    def _closed(self) -> None:
        """The protocol and the socket are closed. Called once."""

    def _give_what_is_left(self) -> None:
        """Give listeners what is held after the end: somebody may have begun to listen."""

    def _waits_for_exit(self) -> bool:
        """Say whether the peer has closed since its process ends: ``_end`` comes when that has."""
        return False

    @property
    def _is_waited_for(self) -> bool:
        """Whether a local wait may depend on what the peer has sent."""
        return False

    @property
    def peer(self) -> Peer:
        """Who made the other end: ``pid`` (0: hidden), ``uid``, ``gid`` (None: not known)."""
        return self._link.peer

    def _node_pid(self) -> int:
        return 0 if self._protocol.dialect == "native" else self.peer.pid

    @property
    def _is_closed(self) -> bool:
        return self._protocol.state is State.CLOSED

    def _why_closed(self) -> ChannelClosed:
        return why_closed(self._protocol)

    # -- turns -----------------------------------------------------------------------------------

    def _on_hangup(self) -> None:
        self._watches_hangup = False
        self._has_hung_up = True
        self._turn()

    def _turn(self, *, reading: bool = False, due: bool = False) -> None:
        """Do everything that can be done now: read, write, give, settle, and watch for the rest.

        Args:
            reading: the socket is readable, or the buffer holds more lines.
            due: a deadline may have come.
        """
        if self._is_copy:
            return  # the loop's epoll is the original's too
        if self._in_turn or self._in_protocol:
            # A listener or a conversion asked for it: what it wants is done when it returns.
            self._schedule_turn()
            return
        self._in_turn = True
        try:
            if self._has_ended:
                self._give_what_is_left()
                return
            self._begin_turn()
            if due:
                self._protocol.on_deadline()
            if reading or (due and self._read_again_at is not None):
                self._read_slice()
            else:
                self._work()
        except Exception as error:
            if self._failed(error):
                raise
        except BaseException:
            # A signal handler raised. What was not done yet is done in the next turn.
            if self._is_unsure:
                self._end(LocalProtocolError("a write was interrupted, and nobody knows how far"))
            self._schedule_turn()
            raise
        finally:
            self._in_turn = False

    def _failed(self, error: Exception) -> bool:
        """End the channel with an exception of a turn, rather than stall or try for ever.

        Returns whether it is a defect, which the event loop is told of too, and not the system's
        refusal of what the channel needs, such as room in the epoll.
        """
        self._end(LocalProtocolError(f"the channel failed: {error!r:.200}"))
        return not isinstance(error, OSError)

    def _read_slice(self) -> None:
        """Read, and go on with what came, for about as long as a turn may take."""
        pace, ready = self._pace, self._protocol.ready
        pace.begin(len(ready))
        self._read()
        self._work()
        pace.end(len(ready), more=self._link.has_more)

    def _work(self) -> None:
        """Write and give what there is, then end the channel or watch for what comes next."""
        if self._end_after is not None:
            self._end_after()
        writing = None if self._is_over else self._go_on()
        if writing is None:
            self._end()
            return
        protocol = self._protocol
        if protocol.give_up is not None:
            self._end(protocol.give_up)
            return
        reading = self._read_again_at is None and self._wants_to_read()
        if not reading or writing or not self._is_reading or self._is_writing:
            paused = not (reading or self._has_hung_up)
            self._watch(reading=reading, writing=writing, hangup=paused)
        if reading and self._link.has_more:
            self._schedule_read()
        deadline = protocol.deadline
        if self._read_again_at is not None:
            deadline = min(deadline or math.inf, self._read_again_at)
        if deadline is not None:
            self._arm_timer(deadline)

    @property
    def _is_over(self) -> bool:
        """Whether nothing is left to do but to end."""
        return self._has_ended or self._protocol.state is CLOSED or self._link.at_eof

    def _write_early(self) -> None:
        """Write without giving the application anything, in the middle of its own doing.

        What the peer has said is read first, since it may let more leave; it is given in the turn
        that follows.
        """
        self._schedule_turn()
        if self._in_turn or self._in_protocol or self._is_writing or self._is_over:
            return
        # As in a turn: what it calls may send, too. And an end, which is told to everybody, waits.
        self._in_turn = self._in_protocol = True
        try:
            protocol = self._protocol
            if self._is_reading and protocol.handles_out and self._wants_to_read():
                self._read()
            if not self._is_over:
                self._write()
        except Exception as error:
            if self._failed(error):
                raise
        finally:
            self._in_turn = self._in_protocol = False

    def _go_on(self) -> bool | None:
        """Write and give in turns, since each makes room for the other.

        Returns what ``_write`` does; None if the channel is over.
        """
        protocol = self._protocol
        self._prepare()
        while True:
            self._in_protocol = True
            try:
                writing = self._write()
            finally:
                self._in_protocol = False
            if self._end_after is not None:
                self._end_after()
                return None
            given = self._exchange()
            if self._is_over:
                return None
            if protocol.state is CLOSING and protocol.finished:
                self._end(politely=True)
                return None
            if not given:
                return writing

    # -- the socket ------------------------------------------------------------------------------

    def _wants_to_read(self) -> bool:
        return self._protocol.want_read(waiting=self._is_waited_for, is_finite=self._has_hung_up)

    def _read(self) -> None:
        """Take what has come."""
        if self._read_again_at is not None and process_system.clock() < self._read_again_at:
            return
        self._read_again_at = None
        try:
            batch = self._link.read(self._pace.lines, self._pace.bytes)
        except RemoteProtocolError as error:
            self._protocol.end(error, unread=True)
            return
        except HandleIPCError as error:
            self._end(error)
            return
        except OSError as error:
            self._read_failed(error)
            return
        self._no_memory_since = None
        self._pace.taken += len(batch.ends)
        self._take_lines(batch)

    def _read_failed(self, error: OSError) -> None:
        now = process_system.clock()
        if error.errno in NO_MEMORY:
            if self._no_memory_since is None:
                self._no_memory_since = now
            if now - self._no_memory_since < self._limits.retry_time:
                self._read_again_at = now + self._limits.in_flight_delay_max
                return
        if isinstance(error, ConnectionError) and not self._link.peer_lives():
            # ECONNRESET: the peer closed with something of ours unread.
            self._end()
        else:
            self._end(LocalProtocolError(f"the channel cannot be read: {error.strerror}"))

    def _take_lines(self, batch: Batch) -> None:
        # Whatever a conversion does meanwhile: the lines are in the buffer of the next read.
        self._in_protocol = True
        try:
            self._protocol.received(batch)
        finally:
            self._in_protocol = False

    def _write(self) -> bool:
        """Write what may leave. Returns whether to call again when the socket is writable."""
        protocol = self._protocol
        budget = WRITE_BUDGET
        outcome: int | Refused | OSError
        while (stage := protocol.next_stage()) is not None:
            if budget <= 0:
                self._schedule_turn()
                return False
            self._is_unsure = True
            try:
                outcome = self._link.write(stage.data, stage.offset, stage.fds)
            except OSError as error:
                outcome = error
            self._is_unsure = isinstance(outcome, int)
            if outcome is Refused.AGAIN:
                return True
            failed = protocol.wrote(outcome)
            self._is_unsure = False
            if isinstance(outcome, int):
                budget -= outcome
                if stage.offset < len(stage.data):
                    return True  # the kernel took a part, so it is full
            elif failed is not None:
                self._write_failed(failed)
            elif stage.offset or stage.is_control:
                return False  # a few bytes of control, or the rest of a stage: on time
        return False

    def _write_failed(self, error: OSError) -> None:
        if not isinstance(error, ConnectionError):
            self._end(LocalProtocolError(f"the channel cannot be written: {error.strerror}"))
        elif self._link.peer_lives():
            # It is about to close, as far as anybody can tell: every end of ours shuts its reading
            # side down first, and may lose the processor before it goes on.
            self._loop.call_later(CLOSING_PATIENCE, self._peer_is_deaf)
        else:
            self._end()

    def _peer_is_deaf(self) -> None:
        if not self._is_copy:
            why = "the peer has shut its reading side down and lives on, so nothing can be said"
            self._end(RemoteProtocolError(why))

    # -- ends ------------------------------------------------------------------------------------

    def _end(
        self,
        error: HandleIPCError | None = None,
        *,
        politely: bool = False,
        peer_is_dead: bool = False,
    ) -> None:
        """End the channel: every end passes here, once, and every step runs whatever others did.

        The reading side is shut down first: later acknowledgements fail at the peer, and those that
        it has written are still read here (Linux keeps them readable), so no handle gets two
        owners. Only then is everything settled. The writing side is shut down before the socket is
        closed, or the end would not reach a peer while a forked copy holds the socket open.

        Args:
            error: why, if neither end closed it on purpose.
            politely: this end has disconnected, and everything is flushed.
            peer_is_dead: the peer's process is known to have ended.
        """
        if self._has_ended:
            return
        if self._in_protocol:
            self._end_after = self._end_after or partial(
                self._end, error, politely=politely, peer_is_dead=peer_is_dead
            )
            return
        if error is None and not (politely or peer_is_dead) and self._waits_for_exit():
            self._detach()
            return
        self._has_ended = True
        unread = True

        def read() -> None:
            nonlocal unread
            unread = not self._read_to_the_end()

        def settle() -> None:
            protocol = self._protocol
            if isinstance(error, WorkerExited):
                error.opened = protocol.was_opened  # its last words are read by now
            protocol.end(error, politely=politely, peer_is_dead=peer_is_dead, unread=unread)

        with contextlib.ExitStack() as steps:
            # The last one pushed runs first.
            steps.callback(self._closed)
            steps.callback(self._dismiss_keeper)
            steps.callback(self._link.close)
            steps.callback(self._detach)
            steps.callback(settle)
            if not self._is_closed:
                steps.callback(read)
            steps.callback(self._stop_receiving)

    def _stop_receiving(self) -> None:
        if sys.platform != "linux" and not self._is_closed:
            self._read_to_the_end()  # BSD drops what is queued
        self._link.stop_receiving()

    def _read_to_the_end(self) -> bool:
        """Take everything that the peer has written, without waiting. Returns whether it was all.

        The reading side is shut down, so there is an end; should that have failed, one socket
        buffer is read at most.
        """
        protocol, link = self._protocol, self._link
        most = link.rest()
        while not (self._is_closed or protocol.is_deaf):
            if link.at_eof:
                return True
            try:
                batch = link.read_rest()
            except (OSError, HandleIPCError):
                return False
            self._take_lines(batch)
            if not (link.has_rest(most) or link.must_go_on):
                return True
        return not protocol.is_deaf

    def _give_up(self) -> None:
        """Close the copy's socket: the end must not wait for this process."""
        self._thread = NO_THREAD
        self._link.forget()

    def _loop_ends(self) -> None:
        """The event loop is about to close: write what is queued, within a second."""
        if self._has_ended or self._is_copy:
            return
        self._in_turn = True
        try:
            self._go_on_blocking(time.monotonic() + LAST_FLUSH)
            if self._has_ended:
                return
            if self._protocol.state is State.CLOSING:
                self._end(LocalProtocolError("the event loop ended before the flush"))
            elif self._is_over:
                self._end()
            else:
                self._detach()
                self._thread = NO_THREAD
        except Exception as error:
            if self._failed(error):
                raise
        finally:
            self._in_turn = self._in_protocol = False

    def _go_on_blocking(self, deadline: float) -> None:
        protocol = self._protocol
        while True:
            writing = self._go_on()
            left = deadline - time.monotonic()
            is_idle = protocol.state is State.OPEN and protocol.idle
            if is_idle or self._is_over or left <= 0:
                return
            due = protocol.deadline
            wait = left if due is None else min(left, max(0.0, due - process_system.clock()))
            if self._link.wait(wait, writing=bool(writing)) or self._link.must_go_on:
                self._read()
            protocol.on_deadline()
