"""One end of a channel as a state machine: lines and descriptors in, stages and messages out.

Pure: reads no socket and starts no timer. The caller reports what happened (``received``,
``wrote``, ``write_refused``, ``receive_eof``, ``on_deadline``), writes what ``next_stage`` returns,
takes what ``incoming.ready`` and ``outgoing.outcomes`` hold, comes back at ``deadline()``, and ends
the channel when ``give_up`` says why.

Theory of operation
-------------------

A channel is two independent directions, ``Outgoing`` and ``Incoming``; each speaks *node* or
*native*. This module joins them: it reads lines and tells the half they concern, writes the control
lines in which one half speaks of the other, and knows the life of the whole.

The switch to native is bound to the order of lines, not to time. An invited end makes a switch line
its very first; the other end answers with one as soon as none of its own NODE_HANDLEs is
unanswered; every later line of that direction is native. A Node peer never sees one: as a child it
does not begin, as a parent it does not invite.

    OPEN ── disconnect ──> CLOSING ── all flushed, or EOF, error, abort ──> CLOSED
      └────────────── EOF, error, abort ──────────────────────────────────────┘

CLOSED is where everything is settled: unacknowledged handles are back, unclaimed descriptors
closed. Before it is, ``before_settling`` is called, whoever ends the channel and why: the caller
shuts its reading side down there, so that an acknowledgement which the peer has not written by then
fails at the peer, and no handle has two owners. The rules were found with an executable model;
docs/wire.md states them for the wire.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

from handleipc.exceptions import (
    DescriptorReleased,
    HandleIPCError,
    LocalProtocolError,
    RemoteProtocolError,
)
from handleipc.handles.refusal import Check, Convert, Maker
from handleipc.limits import Invitation, Limits
from handleipc.protocol.dispatch import Dispatch
from handleipc.protocol.incoming import Incoming
from handleipc.protocol.outgoing import Outgoing
from handleipc.protocol.stages import Entry, Stage
from handleipc.protocol.timers import Timer, Timers
from handleipc.system import System
from handleipc.wire import VERSION
from handleipc.wire.framing import Batch

__all__ = ["ChannelProtocol", "Invitation", "State"]


class State(enum.Enum):
    """The life of a channel."""

    OPEN = enum.auto()
    CLOSING = enum.auto()
    CLOSED = enum.auto()


class ChannelProtocol:
    """The protocol of one end.

    Args:
        limits: the bounds of this end.
        system: the clock, descriptors, and the process-wide budget.
        convert, maker, check: make handles of received descriptors, or say that they cannot.
        inviting: this end has invited the peer, with its own limits as the first grants.
        invited_by: the invitation this end was started with, if it was.
    """

    def __init__(
        self,
        limits: Limits,
        system: System,
        convert: Convert,
        *,
        maker: Maker | None = None,
        check: Check | None = None,
        inviting: bool = False,
        invited_by: Invitation | None = None,
    ) -> None:
        self.limits = limits
        self._system = system
        self.state = State.OPEN
        self.error: HandleIPCError | None = None
        """Why the channel ended, if it did not end politely."""
        self.ended_here = False
        """Whether this end's ``disconnect`` ended it."""
        timers = self.timers = Timers(system.clock)
        self.deadline = timers.deadline
        """Returns when ``on_deadline`` is to be called, on the system's clock; None for never."""
        granted = invited_by or Invitation(0, 0)
        self.outgoing = Outgoing(limits, system, timers, granted)
        gave = Invitation(limits.window, limits.bytes) if inviting else Invitation(0, 0)
        self.incoming = Incoming(limits, system, timers, convert, gave, maker=maker, check=check)
        self.outgoing.hold_native_only = inviting
        self.peer = Dispatch(
            limits, self.incoming, self.outgoing, inviting=inviting, invited=invited_by is not None
        )
        self._write_dead = False
        self.has_hung_up = False
        """Whether the peer has closed, as poll(2) tells: what is left to read is finite."""
        self.is_deaf = False
        """Whether what the peer says next can no longer be understood."""
        self.give_up: HandleIPCError | None = None
        """Why the caller is to end the channel now, in ``Driver._end``'s order."""

        self.on_wake: Callable[[], None] = lambda: None
        """Called when another channel's progress lets this one go on: call ``next_stage``."""
        self.before_settling: Callable[[], None] = lambda: None
        """Called once, before anything is settled: shut the reading side of the socket down."""
        self.nobody_takes = False
        """Whether a local wait was for a peer that waits for us to take its handles, too long."""
        self._retry_delay = 0.0
        self._no_memory_since: float | None = None
        self._busy_key: object = None
        self._waits_since: tuple[int | None, float] = (None, 0.0)

    @property
    def dialect(self) -> str:
        """``native`` once either direction is, since the other follows; else ``node``."""
        return "native" if self.incoming.native or self.outgoing.native else "node"

    @property
    def may_become_native(self) -> bool:
        """Whether handles that only handleipc can receive may be sent, now or after the switch."""
        return self.peer.may_switch or self.outgoing.hold_native_only

    # -- sending ---------------------------------------------------------------------------------

    def send(self, item: bytes | Entry) -> None:
        """Queue a message that is encoded already. The caller checked the state and the limits."""
        self.outgoing.queue.push(item)

    def next_stage(self) -> Stage | None:
        """Return what to write now, or None.

        A begun stage is finished first; control goes before data, even before a stage that the
        kernel refused, since the peer may need it to make room.
        """
        if self.state is State.CLOSED or self._write_dead or self.give_up is not None:
            return None
        outgoing = self.outgoing
        stage = outgoing.stage
        if stage is not None and (stage.offset or stage.is_control):
            return stage
        incoming = self.incoming
        if incoming.news.is_due or incoming.node.replies.lines or not outgoing.native:
            control = self._control()
            if control is not None:
                outgoing.park()
                outgoing.stage = control
                return control
        if stage is not None:
            outgoing.park()
        if Timer.RETRY in self.timers.running:
            return None
        try:
            outgoing.stage = outgoing.next_data()
        except DescriptorReleased:
            self._give_up("a handle was closed while the peer asked for it again")
            return None
        if outgoing.hold_native_only or Timer.HELLO in self.timers.running:
            self._watch_hello()
        return outgoing.stage

    def wrote(self, count: int) -> None:
        """The kernel took ``count`` more bytes of the current stage."""
        outgoing = self.outgoing
        stage = outgoing.stage
        assert stage is not None
        if not stage.offset:
            outgoing.begun(stage)
            self._retry_delay = 0.0
        self._no_memory_since = None
        stage.offset += count
        while stage.marks and stage.marks[0][0] <= stage.offset:
            what = stage.marks.popleft()[1]
            if isinstance(what, Entry):
                outgoing.written(what)
            else:
                self.incoming.deliveries.control_passed(what)
        if stage.offset == len(stage.data):
            outgoing.stage = None
        if stage.is_control and self.incoming.held:
            self.incoming.pump()

    def write_refused(self) -> None:
        """The kernel takes no descriptors for a while (ETOOMANYREFS); the socket stays writable."""
        limits = self.limits
        self.outgoing.park()
        self._retry_delay = min(
            max(limits.in_flight_delay, 2 * self._retry_delay), limits.in_flight_delay_max
        )
        self.timers.start(Timer.RETRY, self._retry_delay)
        self.outgoing.in_flight.wait(self.retry_now)

    def out_of_memory(self) -> bool:
        """The kernel had no memory for the stage (ENOBUFS, ENOMEM), while the socket is writable.

        Waits for some; or, after ``Limits.retry_time``, takes it for a set that never fits (musl
        before 1.2.4 has no room for 253 descriptors, for one): it is split, and a handle that does
        not fit alone comes back.

        Returns:
            False if there is nothing to split and nothing to wait for any more: the write failed.
        """
        now = self._system.clock()
        if self._no_memory_since is None:
            self._no_memory_since = now
        if now - self._no_memory_since < self.limits.retry_time:
            self.write_refused()
            return True
        stage = self.outgoing.stage
        if stage is None or stage.offset or not stage.fds:
            return False
        self.handles_refused("the kernel has no memory for so many descriptors at once")
        return True

    def retry_now(self) -> None:
        """Some handle in this process was acknowledged: there may be room."""
        if self.timers.stop(Timer.RETRY):
            self.on_wake()

    def handles_refused(self, reason: str) -> None:
        """The kernel will never carry the descriptors of this stage: its handles come back."""
        try:
            self.outgoing.refuse_stage(reason)
        except LocalProtocolError as error:
            self._give_up(str(error))

    def write_failed(self) -> None:
        """Nothing more can be said: the caller ends the channel, and reads what the peer said."""
        self._write_dead = True

    def _give_up(self, why: str) -> None:
        """Have the caller end the channel: the fault is not the peer's."""
        if self.give_up is None and self.state is not State.CLOSED:
            self.give_up = LocalProtocolError(why)

    def _control(self) -> Stage | None:
        """Everything that is due and is not data, in one stage; it needs no credit."""
        incoming, outgoing = self.incoming, self.outgoing
        switches = self.peer.may_switch and not outgoing.native and outgoing.node.entry is None
        speaks = self.peer.may_switch and (switches or incoming.news.is_due)
        if not (speaks or incoming.node.replies.lines):
            return None
        lines = []
        if speaks:
            if switches:
                self._switch()
            lines.append(incoming.news.take({"native": VERSION} if switches else {}))
        lines += incoming.node.replies.take()
        stage = Stage(b"".join(lines), is_control=True)
        stage.marks.append((len(stage.data), incoming.deliveries.control_staged()))
        return stage

    def _switch(self) -> None:
        """From here on this direction is native, and what is not begun is spelled anew."""
        outgoing = self.outgoing
        outgoing.take_back_parked()
        outgoing.native = True
        outgoing.hold_native_only = False

    # -- receiving -------------------------------------------------------------------------------

    def received(self, batch: Batch) -> None:
        """Take the lines and descriptors of one read. Faults of the peer end the channel."""
        incoming = self.incoming
        if batch.sets:
            incoming.pairing.add(batch.sets)
        if self.state is State.CLOSED or self.is_deaf:
            incoming.pairing.close()
            return
        try:
            self.peer.take(batch)
        except HandleIPCError as error:
            self._fail(error)
            return
        except BaseException as error:
            # The rest of the batch is lost, and with it what it acknowledged: a signal handler
            # raised, or this is a defect.
            self.is_deaf = True
            self._give_up(f"reading was interrupted: {error!r:.200}")
            raise
        if incoming.held:
            incoming.pump()
        pairing = incoming.pairing
        if pairing.sets or pairing.places or Timer.PROGRESS in self.timers.running:
            self._watch_progress()

    def receive_eof(self, *, peer_is_dead: bool = False) -> None:
        """The peer closed, or the read failed: everything it left has been received.

        Args:
            peer_is_dead: its process is known to have ended, so that a handle of which our
                acknowledgement did not arrive is ours all the same.
        """
        speaks_node = not (self.peer.has_switched or self.peer.may_switch)
        self._settle(deliver_unacked=speaks_node or peer_is_dead)

    # -- ends ------------------------------------------------------------------------------------

    def disconnect(self, timeout: float) -> None:
        """Send nothing new, flush what is queued, then end. Does nothing the second time."""
        if self.state is State.OPEN:
            self.state = State.CLOSING
            self.timers.start(Timer.DISCONNECT, timeout)
            self.incoming.close()
            self.incoming.pump()

    @property
    def finished(self) -> bool:
        """Whether a disconnecting end has said and released everything: time to close."""
        return self.state is State.CLOSING and self.outgoing.idle and self.incoming.settled

    def finish(self) -> None:
        """End politely: the caller is about to close the socket."""
        self.ended_here = True
        self._settle(deliver_unacked=False)

    def abort(
        self, error: HandleIPCError, *, peer_is_dead: bool = False, unread: bool = False
    ) -> None:
        """End now. The caller has shut the reading side down and reported what was left in it.

        Args:
            error: why.
            peer_is_dead: as of ``receive_eof``.
            unread: what was left could not be read, so the peer may own what is unacknowledged.
        """
        if self.state is not State.CLOSED:
            self._fail(error, peer_is_dead=peer_is_dead, unread=unread or self.is_deaf)

    def _fail(
        self, error: HandleIPCError, *, peer_is_dead: bool = False, unread: bool = False
    ) -> None:
        self.error = error
        speaks_node = not self.peer.has_switched
        self._settle(
            deliver_unacked=peer_is_dead,
            node_in_doubt=speaks_node and not peer_is_dead,
            all_in_doubt=unread and not peer_is_dead,
        )

    def _settle(
        self, *, deliver_unacked: bool, node_in_doubt: bool = False, all_in_doubt: bool = False
    ) -> None:
        if self.state is State.CLOSED:
            return
        self.state = State.CLOSED
        self.timers.stop_all()
        self.outgoing.in_flight.forget(self.retry_now)
        self.before_settling()
        self.outgoing.settle(
            str(self.error) if self.error else "the channel ended before it was acknowledged",
            node_in_doubt=node_in_doubt,
            all_in_doubt=all_in_doubt,
        )
        self.incoming.settle(deliver_unacked=deliver_unacked)

    # -- reading or not --------------------------------------------------------------------------

    def want_read(self, *, waiting: bool) -> bool:
        """Say whether the socket should be read now.

        A native end always reads: all that may come is granted, and the acknowledgements in it are
        needed. From a node-dialect peer reading pauses while the application takes nothing, but
        never for what waits for our own reply, and not while a handle of ours is unanswered.

        Args:
            waiting: a local send, flush or disconnect waits, whose end may depend on reading.
        """
        if self.state is State.CLOSED:
            return False
        incoming, limits = self.incoming, self.limits
        # After a hang-up what is left is finite, and EOF is behind it.
        if incoming.native or self.has_hung_up or self.state is State.CLOSING:
            return True
        deliveries = incoming.deliveries
        if deliveries.bytes_waiting >= limits.node_hard:
            return False
        # An answer may be behind what is held; and so may the switch of a peer that invited us.
        awaits = self.outgoing.handles_out or self.outgoing.native
        if awaits and incoming.cost < limits.node_hard:
            return True
        if waiting or incoming.listens_internal:
            return incoming.cost < limits.held_hard
        return not incoming.is_full

    @property
    def nobody_reads(self) -> bool:
        """Whether so much is held that a local wait must not go on reading for its own sake."""
        return self.nobody_takes or self.incoming.cost >= self.limits.held_hard

    @property
    def has_faults(self) -> bool:
        """Whether there are warnings, errors or failed closes that nobody was told of."""
        incoming = self.incoming
        return bool(
            incoming.errors
            or self.peer.warnings
            or incoming.deliveries.failed
            or self.outgoing.queue.failed
        )

    @property
    def is_waited_for(self) -> bool:
        """Whether ``watch_waits`` was last told of a wait that depends on the peer."""
        return self.incoming.deliveries.is_awaited or self.nobody_takes

    def watch_waits(self, *, for_peer: bool, for_kernel: bool) -> bool:
        """Say what is waited for here, when all was written that may leave.

        While something depends on the peer, its handles are acknowledged up to ``Limits.ready``
        though nobody reads. If that many wait untaken without progress for ``Limits.retry_time``,
        ``nobody_takes`` is set: two ends that never read would wait for each other for ever.

        Args:
            for_peer: an acknowledgement is, or a flush, or a drain.
            for_kernel: a message is, to be written: one behind a handle depends on the peer, too.

        Returns:
            Whether handles of the peer may go on for that reason: ``pump``.
        """
        incoming, outgoing, deliveries = self.incoming, self.outgoing, self.incoming.deliveries
        depends = for_peer or (for_kernel and outgoing.queue.items)
        awaited = bool(depends and outgoing.waiting_descriptors)
        begins = awaited and not deliveries.is_awaited and bool(incoming.held)
        deliveries.is_awaited = awaited
        if not (awaited and incoming.waits_for_a_reader):
            self.nobody_takes = False
            self.timers.stop(Timer.BUSY)
            return begins
        key = (outgoing.window.acked, deliveries.bytes_taken, deliveries.pace)
        if Timer.BUSY not in self.timers.running or key != self._busy_key:
            self._busy_key = key
            self.timers.start(Timer.BUSY, self.limits.retry_time)
        return begins

    # -- time ------------------------------------------------------------------------------------

    def on_deadline(self) -> None:
        """Do what has become due; afterwards there may be something to write."""
        for timer in self.timers.due():  # those without a case held something back till now
            if self.timers.stop(timer):
                self._do(timer)

    def _do(self, timer: Timer) -> None:
        match timer:
            case Timer.ASK:
                self.incoming.on_ask_time()
                self.incoming.pump()
            case Timer.NACK:
                self.incoming.node.on_nack_time()
            case Timer.HELLO:
                self.outgoing.hold_native_only = False
            case Timer.BUSY:
                self.nobody_takes = True
            case Timer.PROGRESS:
                patience = self.limits.incomplete_timeout
                why = "the peer sent descriptors and left their line or set unfinished"
                why += f" (Limits.incomplete_timeout is {patience:g} s)"
                self._fail(RemoteProtocolError(why))
            case Timer.DISCONNECT:
                self._give_up("disconnect() could not flush within its timeout")

    def _watch_progress(self) -> None:
        """Bound how long a native peer may have us keep descriptors of what it does not finish.

        A Node peer may stop for any time in the middle of a large line, and pins one set at most.
        """
        since = self.incoming.pairing.waits_since if self.incoming.native else None
        if since is None:
            self.timers.stop(Timer.PROGRESS)
            return
        now, patience = self._system.clock(), self.limits.incomplete_timeout
        if Timer.PROGRESS not in self.timers.running or self._waits_since[0] != since:
            self._waits_since = since, now
        self.timers.start(Timer.PROGRESS, min(patience, self._waits_since[1] + 10 * patience - now))

    def _watch_hello(self) -> None:
        outgoing = self.outgoing
        if not (outgoing.hold_native_only and outgoing.queue.native_only_first):
            self.timers.stop(Timer.HELLO)
        elif Timer.HELLO not in self.timers.running:
            self.timers.start(Timer.HELLO, self.limits.hello_timeout)
