"""The sending direction of a channel: what is queued, numbered, written and not yet acknowledged.

Theory of operation
-------------------

A message waits in ``queue`` unspelled. ``next_stage`` spells as much as may leave now into one
*stage*: bytes, and the handles whose descriptors go with its first byte. A stage that the kernel
has not begun can be taken apart again (``withdraw``, a handle closed meanwhile); from its first
byte on it only moves forward, and its descriptors are never attached twice.

node dialect
    one handle in flight (``node``); everything behind it waits, except the replies to the
    peer's own handles, which the protocol writes as control.
native dialect
    handles are numbered when they are staged and wait in ``window`` for a cumulative
    acknowledgement; the peer's grants say how many and how many bytes may leave.

Whatever happens, each entry ends exactly once, in ``outcomes``. Does not write, wait, or read.
"""

from __future__ import annotations

from collections import deque

from handleipc.exceptions import ChannelFull, DescriptorReleased, LocalProtocolError
from handleipc.handles.refusal import refusal_in_words
from handleipc.limits import Invitation, Limits
from handleipc.protocol.front import Faults, Hooks
from handleipc.protocol.node import PEER_SPEAKS_NODE, NodeSlot
from handleipc.protocol.sendqueue import SendQueue
from handleipc.protocol.stages import Entry, EntryState, Late, Stage
from handleipc.protocol.staging import STAGE_BYTES, NativeStages, stage_plain, stage_waited
from handleipc.protocol.timers import Timers
from handleipc.protocol.window import Window
from handleipc.system import InFlight, System
from handleipc.wire import envelope

__all__ = ["Outgoing"]

SENT = EntryState.SENT


class Outgoing:
    """The sending half of ``ChannelProtocol``, which is its only caller.

    Args:
        limits: the bounds of the channel.
        system: the process-wide budget.
        timers: of the channel.
        granted: what an invitation granted from the start.
        hooks: say whether the peer has read.
        faults: where failed closes go.
    """

    def __init__(
        self,
        limits: Limits,
        system: System,
        timers: Timers,
        granted: Invitation,
        *,
        hooks: Hooks,
        faults: Faults,
    ) -> None:
        self._limits = limits
        self.in_flight: InFlight = system.in_flight
        self.native = False
        self.queue: SendQueue = SendQueue(faults)
        self.outcomes: deque[tuple[Entry, str | None]] = self.queue.outcomes
        self._above_water = False
        self.window: Window = Window(limits, timers, granted, hooks)
        self._native = NativeStages(limits, system.in_flight, self.queue, self.window)
        self.node: NodeSlot = NodeSlot(timers)
        self.stage: Stage | None = None
        self.parked: Stage | None = None
        """A data stage that the kernel refused whole, overtaken by control."""
        self.lost_something: bool = False
        """Whether the channel ended with something queued or unacknowledged."""
        self.hold_native_only = False
        """Whether handles that only handleipc can receive may still hope for a switch."""

    # -- what the application sends --------------------------------------------------------------

    def send(self, item: bytes | Entry) -> bool:
        """Queue a message that is encoded already.

        Args:
            item: its bytes; or an entry, if somebody waits for it or it has a handle.

        Returns:
            Whether senders should wait now, as ``is_above_water``.

        Raises:
            ChannelFull: as ``check_room``. A handle is the caller's still, to be ``returned``.
        """
        limits, queue = self._limits, self.queue
        size = len(item) if type(item) is bytes else item.size  # type: ignore[union-attr]
        is_whole = self.stage is None and self.parked is None
        if (queue.bytes + size > limits.queued_bytes or not is_whole) and type(item) is not Late:
            self.check_room(size)  # answers are bounded where they are made
        queue.items.append(item)
        queue.bytes += size
        # One handle may be in the node dialect's slot: near the mark it is counted exactly.
        waiting = self.window.descriptors_out + 1
        if isinstance(item, Entry):
            queue.descriptors += item.descriptors
        waiting += queue.descriptors
        return (
            self._above_water
            or not is_whole
            or queue.bytes >= limits.high_water_bytes
            or waiting >= limits.high_water_handles
        ) and self.is_above_water

    def check_room(self, size: int, *, is_handle: bool = False) -> None:
        """Say whether a message of so many bytes may be queued, with a handle or without.

        Raises:
            ChannelFull: there is no room (``Limits.queued_bytes``, ``queued_handles``).
        """
        limits, queue = self._limits, self.queue
        if (
            self.stage is None
            and self.parked is None
            and queue.bytes + size <= limits.queued_bytes
            and queue.descriptors + self.window.descriptors_out + 1 < limits.queued_handles
        ):
            return  # as nearly always
        unsent, waiting = self.unsent_bytes, self.waiting_descriptors
        if is_handle and waiting >= limits.queued_handles:
            queued = f"handles with {waiting} descriptors are queued, and Limits.queued_handles is"
            queued += f" {limits.queued_handles}"
        elif unsent and unsent + size > limits.queued_bytes:
            queued = f"{unsent} bytes are queued, and Limits.queued_bytes is {limits.queued_bytes}"
        else:
            return
        raise ChannelFull(f"{queued}: await drain() before sending more")

    def withdraw(self, entry: Entry) -> bool:
        """Take a message back whose first byte has not left. Says whether that was possible."""
        if entry.state is EntryState.STAGED:
            self.take_back_parked()
        if entry.state is not EntryState.QUEUED:
            return False
        self.queue.withdraw(entry)
        return True

    @property
    def idle(self) -> bool:
        """Whether everything was written and every handle acknowledged."""
        return self.stage is None and not self._owes_data

    @property
    def _owes_data(self) -> bool:
        """Whether the peer does not have all that was sent; our own control does not count."""
        has_stage = self.stage is not None and not self.stage.is_control
        return bool(has_stage or self.parked or self.window or self.node.entry or self.queue.head())

    @property
    def unsent_bytes(self) -> int:
        """Bytes that the kernel does not have yet."""
        size = self.queue.bytes
        for stage in (self.stage, self.parked):
            if stage is not None:
                size += len(stage.data) - stage.offset
        return size

    @property
    def handles_out(self) -> int:
        """Handles of which the peer has not said what became of them."""
        return len(self.window) + (self.node.entry is not None)

    @property
    def waiting_descriptors(self) -> int:
        """Descriptors of handles queued or not yet acknowledged."""
        return self.queue.descriptors + self.window.descriptors_out + (self.node.entry is not None)

    @property
    def is_above_water(self) -> bool:
        """Whether senders should wait: from the high-water mark until below the low one."""
        limits = self._limits
        size, waiting = self.unsent_bytes, self.waiting_descriptors
        if self._above_water:
            self._above_water = size > limits.low_water_bytes or waiting > limits.low_water_handles
        elif size >= limits.high_water_bytes or waiting >= limits.high_water_handles:
            self._above_water = True
        return self._above_water

    # -- stages ----------------------------------------------------------------------------------

    def next_data(self) -> Stage | None:
        """Spell the next data that may leave now, or return None."""
        if self.parked is not None:
            stage, self.parked = self.parked, None
            if self._still_open(stage):
                return stage
            self._put_back(stage)
        if not self.native:
            return self._node_stage()
        answers = self._native.next_answers() if self.window.resends.due else None
        return answers or (self._native.next_data() if self.queue.items else None)

    def begun(self, stage: Stage) -> None:
        """Count a stage whose first byte the kernel took, and all descriptors with it."""
        stage.fds = []
        stage.items.clear()
        if stage.resends and self.native:
            self.window.resends.left(entry.sequence for entry in stage.entries)
        for entry in stage.entries:
            entry.state = SENT

    def written(self, entry: Entry) -> None:
        """The kernel has the whole line of a plain message somebody waits for."""
        self.queue.end(entry, None)

    def _node_stage(self) -> Stage | None:
        if self.node.entry is not None:
            if not self.node.may_leave_again:
                return None
            again = self._node_handle_stage(self.node.entry)
            if again is not None:
                return again
        lines: list[bytes] = []
        stage = Stage(b"")
        size = 0
        while size < STAGE_BYTES and (item := self.queue.head()) is not None:
            if isinstance(item, Entry) and item.pending is not None:
                if lines:
                    break
                if item.pending.native_only:
                    if self.hold_native_only:
                        return None
                    self.queue.fail_head(PEER_SPEAKS_NODE)
                    continue
                self.queue.take()
                self.node.put(item)
                self.in_flight.add(1)
                handle_stage = self._node_handle_stage(item)
                if handle_stage is not None:
                    return handle_stage
                continue
            if isinstance(item, Entry):
                size += stage_waited(self.queue, stage, lines, size, native=False)
            else:
                most = STAGE_BYTES - size
                size += stage_plain(self.queue, stage, lines, most, native=False)
        return stage.finish(lines)

    def _node_handle_stage(self, entry: Entry) -> Stage | None:
        pending = entry.pending
        assert pending is not None
        try:
            fds = pending.filenos()
        except DescriptorReleased as error:
            self._end_node(str(error))
            return None
        stage = Stage(envelope.spell_node_handle(pending.tag, entry.line, pending.options))
        stage.fds = fds
        # An envelope that goes out again has left before: it is not taken apart any more.
        if self.node.is_refused:
            self.node.is_refused = False
            stage.resends = True
        else:
            stage.items.append(entry)
            entry.state = EntryState.STAGED
        stage.entries.append(entry)
        return stage

    # -- taking apart ----------------------------------------------------------------------------

    def park(self) -> None:
        """The kernel refused the stage whole: let control overtake it."""
        if self.stage is not None and self.stage.offset == 0 and not self.stage.is_control:
            self.parked, self.stage = self.stage, None

    def _still_open(self, stage: Stage) -> bool:
        """Read the descriptors again, as they are at this write.

        Returns False if the stage must be spelled anew: an object was closed, or, where handles
        are sent again, the peer may have given some of them back meanwhile.
        """
        if stage.resends:
            return False
        try:
            stage.fds = [
                fd
                for entry in stage.entries
                if entry.pending is not None
                for fd in entry.pending.filenos()
            ]
        except DescriptorReleased:
            return False
        return True

    def take_back_parked(self) -> None:
        """Queue what a stage not begun had spelled, to be spelled again in its turn."""
        self.park()
        if self.parked is not None:
            stage, self.parked = self.parked, None
            self._put_back(stage)

    def _put_back(self, stage: Stage) -> None:
        if stage.resends:
            for entry in reversed(stage.entries):
                if entry is self.node.entry:
                    self.node.is_refused = True
                elif entry.state is SENT:
                    self.window.resends.put_back(entry.sequence)
            return
        for item in reversed(stage.items):
            if isinstance(item, Entry):
                if item is self.node.entry:
                    self.node.clear()
                    self.in_flight.release(1)
                elif item.pending is not None:
                    self.window.unnumber(item)
                    self.in_flight.release(item.descriptors)
            self.queue.put_back(item)
        if self.native:
            self._native.put_back(stage)

    def refuse_stage(self, reason: str) -> None:
        """The kernel will not carry the descriptors of this stage: give its handles back."""
        self.park()
        stage, self.parked = self.parked, None
        assert stage is not None
        refused = [entry for entry in stage.entries if entry.pending is not None]
        if self.node.entry in refused:
            self._end_node(reason)
            return
        if stage.resends:
            raise LocalProtocolError(f"descriptors the peer asked for again cannot leave: {reason}")
        self._put_back(stage)
        # Of several one may be to blame: alone, each will show.
        self._native.one_by_one = len(refused) > 1
        if not self._native.one_by_one:
            # It stays in the queue, as a hole.
            self.queue.uncount(refused[0])
            self.queue.end(refused[0], reason)

    def __del__(self) -> None:
        self.in_flight.drop(self.window.descriptors_out + (self.node.entry is not None))

    # -- what the peer says ----------------------------------------------------------------------

    def node_reply(self, *, acked: bool) -> bool:
        """Take an ACK or NACK. Returns False if nothing waited for it."""
        slot = self.node
        if slot.entry is None or not slot.waits:
            return False
        if acked:
            self._end_node(None)
        elif not slot.retry(self._limits):
            times = f"the peer could not take it, {slot.nacks + 1} times"
            self._end_node(f"{times} (NACK: it has no free descriptor, or refuses this kind)")
        return True

    def acknowledge(self, ack: int) -> None:
        """Every handle up to ``ack`` is the peer's. Raises as ``Window.acknowledge``."""
        before = self.window.descriptors_out
        ended = self.window.acknowledge(ack)
        try:
            for entry in ended:
                self.queue.end(entry, None)
            ended.clear()
        finally:
            # If a signal handler raised in a handle's close(), the others end all the same.
            for entry in ended:
                if entry.state is not EntryState.ENDED:
                    self.queue.end(entry, None)
            if before != self.window.descriptors_out:
                self.in_flight.release(before - self.window.descriptors_out)

    def refused(self, first: int, count: int, code: str) -> None:
        """Handles that the peer gives back. Raises as ``Window.refuse``."""
        for entry in self.window.refuse(first, count):
            self.queue.end(entry, f"refused by the peer: {refusal_in_words(code)}")
            self.in_flight.release(entry.descriptors)

    # -- ends ------------------------------------------------------------------------------------

    def settle(self, reason: str, *, node_in_doubt: bool, all_in_doubt: bool = False) -> None:
        """The channel has ended: everything not acknowledged comes back, in order.

        Two owners are worse than none, so what the peer may own is closed here.

        Args:
            reason: why, in words.
            node_in_doubt: True if a node-dialect peer lives on: it may own the handle in flight.
            all_in_doubt: True if the peer lives on, and the acknowledgements that it had written
                could not be read.
        """
        self.lost_something = self._owes_data
        for stage in (self.stage, self.parked):
            if stage is not None:
                for entry in stage.entries:
                    if entry.pending is None and entry.state is not EntryState.ENDED:
                        self.queue.end(entry, reason)
        if self.node.entry is not None:
            doubtful = (node_in_doubt or all_in_doubt) and self.node.entry.state is SENT
            self._end_node(reason, doubtful=doubtful)
        self.in_flight.release(self.window.descriptors_out)
        for entry in self.window.clear():
            self.queue.end(entry, reason, doubtful=all_in_doubt and entry.state is SENT)
        self.queue.settle(reason)
        self.stage = self.parked = None

    def _end_node(self, reason: str | None, *, doubtful: bool = False) -> None:
        entry = self.node.entry
        assert entry is not None
        self.node.clear()
        self.in_flight.release(1)
        self.queue.end(entry, reason, doubtful=doubtful)
