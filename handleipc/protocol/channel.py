"""One end of a channel as a state machine: lines and descriptors in, stages and messages out.

Pure: reads no socket and starts no timer. This is all that a front knows of the protocol:

    of the socket       it reports ``received`` and ``wrote``, writes what ``next_stage`` returns,
                        and reads while ``want_read``
    of time             it comes back at ``deadline`` and calls ``on_deadline``
    of the application  it passes on ``send`` (``check_room`` first, if that costs anything),
                        ``withdraw``, ``take`` and ``take_all``, and says who takes (``set_taker``,
                        ``begin_turn``) and who waits (``watch_waits``)
    of the end          ``disconnect`` begins a polite one; ``end`` is every end, when ``finished``,
                        when ``give_up`` says why, at EOF, or when the front knows better

What there is to tell it finds in ``ready``, ``urgent``, ``outcomes`` and ``faults`` after each of
those calls, and what there is to write in ``next_stage``; ``hooks`` are called meanwhile.

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
closed. Before it is, ``hooks.settling`` is called, whoever ends the channel and why: the caller
shuts its reading side down there, so that an acknowledgement which the peer has not written by then
fails at the peer, and no handle has two owners. The rules were found with an executable model;
docs/wire.md states them for the wire.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable

from handleipc.exceptions import (
    DescriptorReleased,
    HandleIPCError,
    LocalProtocolError,
    RemoteProtocolError,
)
from handleipc.handles.refusal import Check, Convert, Maker
from handleipc.limits import Invitation, Limits
from handleipc.protocol.deliveries import Internal, Received
from handleipc.protocol.dispatch import Dispatch
from handleipc.protocol.front import Faults, Hooks
from handleipc.protocol.incoming import Incoming
from handleipc.protocol.outgoing import Outgoing
from handleipc.protocol.stages import Entry, Stage
from handleipc.protocol.timers import Timer, Timers
from handleipc.protocol.waits import Waits
from handleipc.protocol.writes import Writes
from handleipc.stats import Level
from handleipc.system import System
from handleipc.wire import VERSION
from handleipc.wire.framing import Batch
from handleipc.wire.syscalls import Refused

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
        self.state: State = State.OPEN
        self.error: HandleIPCError | None = None
        """Why the channel ended, if it did not end politely."""
        self.ended_here: bool = False
        """Whether this end's ``disconnect`` ended it."""
        self.give_up: HandleIPCError | None = None
        """Why the front is to ``end`` the channel now."""
        self.is_deaf: bool = False
        """Whether what the peer says next can no longer be understood."""
        self.hooks: Hooks = Hooks()
        self.faults: Faults = Faults()
        self.timers: Timers = Timers(system.clock)
        timers = self.timers
        granted = invited_by or Invitation(0, 0)
        gave = Invitation(limits.window, limits.bytes) if inviting else Invitation(0, 0)
        self.outgoing: Outgoing = Outgoing(
            limits, system, timers, granted, hooks=self.hooks, faults=self.faults
        )
        self.incoming: Incoming = Incoming(
            limits,
            system,
            timers,
            convert,
            gave,
            hooks=self.hooks,
            faults=self.faults,
            maker=maker,
            check=check,
        )
        self.outgoing.hold_native_only = inviting
        self.peer: Dispatch = Dispatch(
            limits,
            self.incoming,
            self.outgoing,
            faults=self.faults,
            inviting=inviting,
            invited=invited_by is not None,
        )
        self.waits: Waits = Waits(limits, timers, self.incoming, self.outgoing)
        self.writes: Writes = Writes(
            limits,
            system,
            timers,
            self.incoming,
            self.outgoing,
            hooks=self.hooks,
            give_up=self._give_up,
        )
        self._waits_since: tuple[int | None, float] = (None, 0.0)

        # Verbs of one part alone, some of them for each message: without a call in between.
        deliveries = self.incoming.deliveries
        self.send: Callable[[bytes | Entry], bool] = self.outgoing.send
        self.check_room: Callable[..., None] = self.outgoing.check_room
        self.withdraw: Callable[[Entry], bool] = self.outgoing.withdraw
        self.wrote: Callable[[int | Refused | OSError], OSError | None] = self.writes.wrote
        self.take: Callable[..., Received] = deliveries.take
        self.take_all: Callable[[], list[Received]] = deliveries.take_all
        self.begin_turn: Callable[..., None] = deliveries.begin_turn
        self.set_taker: Callable[..., None] = self.incoming.set_taker
        self.watch_waits: Callable[..., bool] = self.waits.watch
        self.ready: deque[Received] = deliveries.ready
        self.urgent: deque[tuple[Internal, int]] = deliveries.urgent
        self.outcomes: deque[tuple[Entry, str | None]] = self.outgoing.outcomes

    @property
    def dialect(self) -> str:
        """``native`` once either direction is, since the other follows; else ``node``."""
        return "native" if self.incoming.native or self.outgoing.native else "node"

    @property
    def may_become_native(self) -> bool:
        """Whether handles that only handleipc can receive may be sent, now or after the switch."""
        return self.peer.may_switch or self.outgoing.hold_native_only

    @property
    def deadline(self) -> float | None:
        """When ``on_deadline`` is to be called, on the system's clock; None for never."""
        return self.timers.deadline()

    @property
    def peer_is_native(self) -> bool:
        """Whether the peer speaks native, so that it understands reports of closes."""
        return self.incoming.native

    @property
    def was_opened(self) -> bool:
        """Whether the peer has said anything."""
        return self.peer.was_opened

    @property
    def idle(self) -> bool:
        """Whether everything was written and every handle acknowledged."""
        return self.outgoing.idle

    @property
    def is_above_water(self) -> bool:
        """Whether senders should wait: from the high-water mark until below the low one."""
        return self.outgoing.is_above_water

    @property
    def handles_out(self) -> int:
        """Handles of which the peer has not said what became of them."""
        return self.outgoing.handles_out

    @property
    def lost_something(self) -> bool:
        """Whether the channel ended with something queued or unacknowledged."""
        return self.outgoing.lost_something

    @property
    def levels(self) -> dict[str, Level]:
        """How full each queue is, by the name of the limit that bounds it."""
        limits, outgoing, incoming = self.limits, self.outgoing, self.incoming
        deliveries, held = incoming.deliveries, incoming.held
        unacknowledged = sum([len(item.fds or ()) for item in held])
        return {
            "queued_bytes": Level(outgoing.unsent_bytes, limits.queued_bytes),
            "queued_handles": Level(outgoing.waiting_descriptors, limits.queued_handles),
            "held_messages": Level(deliveries.count + len(held), limits.held_messages),
            "held_bytes": Level(
                deliveries.bytes_held + held.bytes,
                limits.bytes if incoming.native else limits.held_bytes,
            ),
            "ready": Level(deliveries.waiting_descriptors, limits.ready),
            "window": Level(unacknowledged, limits.window),
        }

    # -- sending ---------------------------------------------------------------------------------

    def next_stage(self) -> Stage | None:
        """Return what to write now, or None.

        A begun stage is finished first; control goes before data, even before a stage that the
        kernel refused, since the peer may need it to make room.
        """
        if self.state is State.CLOSED or self.writes.are_dead or self.give_up is not None:
            return None
        incoming, outgoing = self.incoming, self.outgoing
        if incoming.held:
            incoming.pump()
        stage = outgoing.stage
        if stage is not None and (stage.offset or stage.is_control):
            return stage
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

    def _give_up(self, why: str) -> None:
        """Have the front end the channel: the fault is not the peer's."""
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

    def end(
        self,
        error: HandleIPCError | None = None,
        *,
        politely: bool = False,
        peer_is_dead: bool = False,
        unread: bool = False,
    ) -> None:
        """End now, and settle everything. Does nothing the second time.

        What the peer had written has been reported, as far as it could be read.

        Args:
            error: why, if it is not the peer's closing.
            politely: this end has disconnected, and is ``finished``.
            peer_is_dead: its process is known to have ended, so that a handle of which our
                acknowledgement did not arrive is ours all the same.
            unread: what was left could not be read, so the peer may own what is unacknowledged.
        """
        if self.state is State.CLOSED:
            return
        unread = unread or self.is_deaf
        if politely:
            self.ended_here = True
            self._settle(deliver_unacked=False)
        elif error is None and not (unread and self.outgoing.handles_out):
            speaks_node = not (self.peer.has_switched or self.peer.may_switch)
            self._settle(deliver_unacked=speaks_node or peer_is_dead)
        else:
            error = error or LocalProtocolError("what the peer had written could not be read")
            self._fail(error, peer_is_dead=peer_is_dead, unread=unread)

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
        self.state = State.CLOSED
        self.timers.stop_all()
        self.writes.close()
        self.hooks.settling()
        self.outgoing.settle(
            str(self.error) if self.error else "the channel ended before it was acknowledged",
            node_in_doubt=node_in_doubt,
            all_in_doubt=all_in_doubt,
        )
        self.incoming.settle(deliver_unacked=deliver_unacked)

    # -- reading or not --------------------------------------------------------------------------

    def want_read(self, *, waiting: bool, is_finite: bool = False) -> bool:
        """Say whether the socket should be read now.

        A native end always reads: all that may come is granted, and the acknowledgements in it are
        needed. From a node-dialect peer reading pauses while the application takes nothing, but
        never for what waits for our own reply, and not while a handle of ours is unanswered.

        Args:
            waiting: a local send, flush or disconnect waits, whose end may depend on reading.
            is_finite: the peer has closed, as poll(2) tells: EOF is behind what is left.
        """
        if self.state is State.CLOSED:
            return False
        incoming, limits = self.incoming, self.limits
        if incoming.native or is_finite or self.state is State.CLOSING:
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
    def may_go_on(self) -> bool:
        """Whether something taken now lets something else go on, in a turn."""
        return bool(self.incoming.held) or self.incoming.news.grants

    @property
    def nobody_reads(self) -> bool:
        """Whether waits must end, since so much is held for their sake."""
        return self.waits.are_vain

    @property
    def is_waited_for(self) -> bool:
        """Whether ``watch_waits`` was last told of a wait: it is to be told of its end, too."""
        return self.waits.are_known

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
                self.waits.nobody_takes = True
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
