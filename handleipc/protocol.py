"""One end of a channel as a state machine: lines and descriptors in, stages and messages out.

Pure: reads no socket and starts no timer. The caller reports what happened (``received``,
``wrote``, ``write_refused``, ``receive_eof``, ``on_deadline``), writes what ``next_stage`` returns,
takes what ``incoming.ready`` and ``outgoing.outcomes`` hold, and comes back at ``deadline()``.

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
closed. The rules were found with an executable model; docs/wire.md states them for the wire.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

from handleipc import codec, envelope
from handleipc.deliveries import Received
from handleipc.exceptions import (
    DescriptorReleased,
    HandleIPCError,
    LocalProtocolError,
    RemoteProtocolError,
)
from handleipc.framing import Batch
from handleipc.incoming import Convert, Direct, Incoming, Invitation
from handleipc.limits import Limits
from handleipc.outgoing import Outgoing
from handleipc.stages import Entry, Stage
from handleipc.system import System

__all__ = ["ChannelProtocol", "Invitation", "State"]


class State(enum.Enum):
    """The life of a channel."""

    OPEN = enum.auto()
    CLOSING = enum.auto()
    CLOSED = enum.auto()


_decode_short, _decode = codec.decode_short, envelope.decode_node

# As many as there are deadlines.
_NEVER = (None,) * 7


class ChannelProtocol:
    """The protocol of one end.

    Args:
        limits: the bounds of this end.
        system: the clock, descriptors, and the process-wide budget.
        convert, direct: make handles of received descriptors.
        inviting: this end has invited the peer, with its own limits as the first grants.
        invited_by: the invitation this end was started with, if it was.
    """

    def __init__(
        self,
        limits: Limits,
        system: System,
        convert: Convert,
        *,
        direct: Direct | None = None,
        inviting: bool = False,
        invited_by: Invitation | None = None,
    ) -> None:
        self.limits = limits
        self._shape = limits.shape
        self._system = system
        self.state = State.OPEN
        self.error: HandleIPCError | None = None
        """Why the channel ended, if it did not end politely."""
        self.ended_here = False
        """Whether this end's ``disconnect`` ended it."""
        self.warnings: list[str] = []
        """What the peer did wrong without consequence: a stray reply."""

        grants = invited_by or Invitation(0, 0)
        self.outgoing = Outgoing(limits, system, grants.handles, grants.bytes)
        gave = Invitation(limits.window, limits.bytes) if inviting else Invitation(0, 0)
        self.incoming = Incoming(limits, system, convert, direct, gave)
        self.outgoing.hold_native_only = self._inviting = inviting
        self._may_switch = invited_by is not None
        self._peer_switched = False
        self._seen_a_line = False
        self._write_dead = False

        self.on_wake: Callable[[], None] = lambda: None
        """Called when another channel's progress lets this one go on: call ``next_stage``."""
        self._retry_at: float | None = None
        self._retry_delay = 0.0
        self._progress_at: float | None = None
        self._hello_at: float | None = None
        self._disconnect_at: float | None = None

    @property
    def dialect(self) -> str:
        """``native`` once either direction is, since the other follows; else ``node``."""
        return "native" if self.incoming.native or self.outgoing.native else "node"

    @property
    def may_become_native(self) -> bool:
        """Whether handles that only handleipc can receive may be sent, now or after the switch."""
        return self._may_switch or self.outgoing.hold_native_only

    # -- sending ---------------------------------------------------------------------------------

    def send(self, item: bytes | Entry) -> None:
        """Queue a message that is encoded already. The caller checked the state and the limits."""
        self.outgoing.queue.push(item)

    def next_stage(self) -> Stage | None:
        """Return what to write now, or None.

        A begun stage is finished first; control goes before data, even before a stage that the
        kernel refused, since the peer may need it to make room.
        """
        if self.state is State.CLOSED or self._write_dead:
            return None
        outgoing = self.outgoing
        stage = outgoing.stage
        if stage is not None and (stage.offset or stage.is_control):
            return stage
        control = self._control()
        if control is not None:
            outgoing.park()
            outgoing.stage = control
            return control
        if stage is not None:
            outgoing.park()
        if self._retry_at is not None:
            return None
        try:
            outgoing.stage = outgoing.next_data()
        except DescriptorReleased:
            self._fail(LocalProtocolError("a handle was closed while the peer asked for it again"))
            return None
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
        stage.offset += count
        while stage.marks and stage.marks[0][0] <= stage.offset:
            what = stage.marks.popleft()[1]
            if isinstance(what, Entry):
                outgoing.written(what)
            else:
                self.incoming.deliveries.control_passed(what)
        if stage.offset == len(stage.data):
            outgoing.stage = None
        if stage.is_control:
            self.incoming.pump()

    def write_refused(self) -> None:
        """The kernel takes no descriptors for a while (ETOOMANYREFS); the socket stays writable."""
        limits = self.limits
        self.outgoing.park()
        self._retry_delay = min(
            max(limits.in_flight_delay, 2 * self._retry_delay), limits.in_flight_delay_max
        )
        self._retry_at = self._system.clock() + self._retry_delay
        self._system.in_flight.wait(self.retry_now)

    def retry_now(self) -> None:
        """Some handle in this process was acknowledged: there may be room."""
        if self._retry_at is not None:
            self._retry_at = None
            self.on_wake()

    def handles_refused(self, reason: str) -> None:
        """The kernel will never carry the descriptors of this stage: its handles come back."""
        try:
            self.outgoing.refuse_stage(reason)
        except LocalProtocolError as error:
            self._fail(error)

    def write_failed(self) -> None:
        """EPIPE and the like: nothing more can be said. What the peer said is still to be read."""
        self._write_dead = True

    def _control(self) -> Stage | None:
        """Everything that is due and is not data, in one stage; it needs no credit."""
        incoming, outgoing = self.incoming, self.outgoing
        switches = self._may_switch and not outgoing.native and outgoing.node.entry is None
        speaks = self._may_switch and (
            switches or incoming.owes or incoming.holes.ask is not None or incoming.grant_due
        )
        if not (speaks or incoming.replies):
            return None
        lines = []
        if speaks:
            if switches:
                self._switch()
            fields = {"native": envelope.VERSION} if switches else {}
            lines.append(envelope.spell_control({**fields, **incoming.take_control()}))
        lines += incoming.replies.take()
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
        incoming.pairing.add(batch.sets)
        if self.state is State.CLOSED:
            incoming.pairing.close()
            return
        try:
            read = 0 if incoming.native else self._node_lines(batch)
            incoming.native_lines(batch, read, self._command)
            incoming.pairing.check_unfinished(batch.offset + batch.start_of(len(batch.ends)))
        except HandleIPCError as error:
            self._fail(error)
            return
        except BaseException as error:
            # The rest of the batch is lost: a signal handler raised, or this is a defect.
            self._fail(LocalProtocolError(f"reading was interrupted: {error!r}"))
            raise
        incoming.pump()
        self._watch_progress(batch)

    def _node_lines(self, batch: Batch) -> int:
        """Take the lines of a batch, up to one that switches to native; returns how many."""
        view, offset, start = batch.view, batch.offset, batch.start
        incoming, pairing = self.incoming, self.incoming.pairing
        sets, shape = pairing.sets, self._shape
        run: list[Received] = []
        sizes: list[int] = []
        at_once = self._seen_a_line and incoming.takes_runs
        try:
            for index, end in enumerate(batch.ends):
                if sets:
                    pairing.check_claimed(offset + start)
                raw, size = view[start : end - 1], end - start
                try:
                    value = _decode_short(raw) if size <= shape.short else _decode(raw, shape)
                except codec.DECODE_ERRORS:
                    value = _decode(raw, shape)
                if at_once and not (type(value) is dict and "cmd" in value):
                    run.append((value, None))
                    sizes.append(size)
                else:
                    if run:
                        incoming.deliveries.add_run(run, sizes)
                    self._node_line(value, offset + start, size)
                    if incoming.native:
                        return index + 1
                    at_once = incoming.takes_runs
                start = end
        finally:
            if run:
                incoming.deliveries.add_run(run, sizes)
        return len(batch.ends)

    def _node_line(self, value: Any, at: int, size: int) -> None:
        first, self._seen_a_line = not self._seen_a_line, True
        if envelope.is_command(value):
            self._command(value, at, size, first)
        else:
            self.incoming.message(value, size)
        if first and not self._peer_switched:
            # The peer speaks node, and will not learn another language later.
            self.outgoing.hold_native_only = False

    def _command(self, value: dict[str, Any], at: int, size: int, first: bool = False) -> None:
        command = value["cmd"]
        if command == envelope.COMMAND_NATIVE:
            self._control_line(envelope.decode_control(value), first)
        elif command == envelope.COMMAND_HANDLE:
            if self.incoming.native:
                raise RemoteProtocolError("the peer sent a NODE_HANDLE after its switch to native")
            self._node_handle(value, at, size)
        else:
            self._node_reply(acked=command == envelope.COMMAND_ACK)

    def _node_handle(self, value: dict[str, Any], at: int, size: int) -> None:
        # Node wraps an envelope once more when it sends a handle again (node-wire.md 3.6): the
        # inner one is meant, and one reply is due for both.
        inner = value.get("msg")
        if envelope.is_command(inner) and inner["cmd"] == envelope.COMMAND_HANDLE:  # type: ignore[index]
            value = inner  # type: ignore[assignment]
        tag = value.get("type")
        name = tag if isinstance(tag, str) else repr(tag)
        options = {k: v for k, v in value.items() if k not in ("cmd", "type", "msg")}
        self.incoming.node_handle(name, value.get("msg"), options or None, at, size)

    def _node_reply(self, *, acked: bool) -> None:
        if self.outgoing.node_reply(acked=acked):
            return
        reply = "ACK" if acked else "NACK"
        if self._peer_switched:
            raise RemoteProtocolError(f"the peer sent an {reply} that nothing waited for")
        # Node asserts here and dies (node-wire.md fact 1); nothing of ours depends on it.
        self.warnings.append(f"ignored a stray {reply} of the peer")

    def _control_line(self, control: envelope.Control, first: bool) -> None:
        outgoing = self.outgoing
        if control.native:
            self._peer_switch(control.native, first)
        elif not (self._peer_switched or outgoing.native):
            raise RemoteProtocolError("the peer sent a control line, and nobody switched to native")
        for sequence, count, code in control.refuse:
            outgoing.refused(sequence, count, code)
        if control.ack is not None:
            outgoing.acknowledge(control.ack)
            outgoing.window.grant(control.handles, control.bytes)
        if control.again is not None:
            outgoing.window.ask_again(*control.again)

    def _peer_switch(self, version: int, first: bool) -> None:
        if version != envelope.VERSION:
            raise RemoteProtocolError(f"the peer switched to version {version}, and 1 was offered")
        # Right as the first line of an end we invited, or as the answer to our own switch.
        invited = first and self._inviting
        if self._peer_switched or not (invited or self.outgoing.native):
            raise RemoteProtocolError("the peer switched to the native dialect out of place")
        self._peer_switched = self.incoming.native = self._may_switch = True
        self.incoming.owes = True

    def receive_eof(self, *, peer_is_dead: bool = False) -> None:
        """The peer closed, or the read failed: everything it left has been received.

        Args:
            peer_is_dead: its process is known to have ended, so that a handle of which our
                acknowledgement did not arrive is ours all the same.
        """
        speaks_node = not (self._peer_switched or self._may_switch)
        self._settle(deliver_unacked=speaks_node or peer_is_dead, in_doubt=False)

    # -- ends ------------------------------------------------------------------------------------

    def disconnect(self, timeout: float) -> None:
        """Send nothing new, flush what is queued, then end. Does nothing the second time."""
        if self.state is State.OPEN:
            self.state = State.CLOSING
            self._disconnect_at = self._system.clock() + timeout
            self.incoming.close()
            self.incoming.pump()

    @property
    def finished(self) -> bool:
        """Whether a disconnecting end has said and released everything: time to close."""
        return self.state is State.CLOSING and self.outgoing.idle and self.incoming.settled

    def finish(self) -> None:
        """End politely: the caller is about to close the socket."""
        self.ended_here = True
        self._settle(deliver_unacked=False, in_doubt=False)

    def abort(self, error: HandleIPCError, *, peer_is_dead: bool = False) -> None:
        """End now. The caller has shut the reading side down and reported what was left in it."""
        if self.state is not State.CLOSED:
            self._fail(error, peer_is_dead=peer_is_dead)

    def _fail(self, error: HandleIPCError, *, peer_is_dead: bool = False) -> None:
        self.error = error
        speaks_node = not self._peer_switched
        self._settle(deliver_unacked=peer_is_dead, in_doubt=speaks_node and not peer_is_dead)

    def _settle(self, *, deliver_unacked: bool, in_doubt: bool) -> None:
        if self.state is State.CLOSED:
            return
        self.state = State.CLOSED
        self._retry_at = self._progress_at = self._hello_at = self._disconnect_at = None
        self._system.in_flight.forget(self.retry_now)
        self.outgoing.settle(
            str(self.error) if self.error else "the channel ended before it was acknowledged",
            in_doubt=in_doubt,
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
        # After EPIPE what is left is finite, and EOF is behind it.
        if incoming.native or self._write_dead or self.state is State.CLOSING:
            return True
        if incoming.deliveries.bytes_waiting >= limits.node_hard:
            return False
        if self.outgoing.handles_out and incoming.deliveries.bytes < limits.node_hard:
            return True
        if waiting:
            return incoming.deliveries.bytes < limits.held_hard
        return (
            incoming.deliveries.bytes < limits.held_bytes
            and len(incoming.ready) < limits.held_messages
        )

    @property
    def nobody_reads(self) -> bool:
        """Whether so much is held that a local wait must not go on reading for its own sake."""
        return self.incoming.deliveries.bytes_held >= self.limits.held_hard

    # -- time ------------------------------------------------------------------------------------

    def deadline(self) -> float | None:
        """Return when ``on_deadline`` is to be called, on the system's clock; None for never."""
        times = (
            self._retry_at,
            self._progress_at,
            self._hello_at,
            self._disconnect_at,
            self.incoming.holes.ask_at,
            self.incoming.replies.nack_at,
            self.outgoing.node.resend_at,
        )
        if times == _NEVER:
            return None
        return min(at for at in times if at is not None)

    def on_deadline(self) -> None:
        """Do what has become due; afterwards there may be something to write."""
        now = self._system.clock()
        incoming = self.incoming
        if self._retry_at is not None and now >= self._retry_at:
            self._retry_at = None
        if incoming.holes.ask_at is not None and now >= incoming.holes.ask_at:
            incoming.on_ask_time()
            incoming.pump()
        nack_at = incoming.replies.nack_at
        if nack_at is not None and now >= nack_at:
            incoming.on_nack_time()
        if self._hello_at is not None and now >= self._hello_at:
            self._hello_at = None
            self.outgoing.hold_native_only = False
        if self._progress_at is not None and now >= self._progress_at:
            self._fail(
                RemoteProtocolError(
                    "the peer left a line or a set of descriptors unfinished for"
                    f" {self.limits.incomplete_timeout:g} s"
                )
            )
        elif self._disconnect_at is not None and now >= self._disconnect_at:
            self._fail(LocalProtocolError("disconnect() could not flush within its timeout"))

    def pause_progress_watch(self) -> None:
        """We stopped reading: what is unfinished is our own doing."""
        self._progress_at = None

    def _watch_progress(self, batch: Batch) -> None:
        if batch.tail or self.incoming.pairing.incomplete:
            self._progress_at = self._system.clock() + self.limits.incomplete_timeout
        else:
            self._progress_at = None

    def _watch_hello(self) -> None:
        outgoing = self.outgoing
        waits = outgoing.hold_native_only and outgoing.native_only_first
        if not waits:
            self._hello_at = None
        elif self._hello_at is None:
            self._hello_at = self._system.clock() + self.limits.hello_timeout
