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

from handleipc.exceptions import DescriptorReleased, LocalProtocolError
from handleipc.handles.refusal import refusal_in_words
from handleipc.limits import Invitation, Limits
from handleipc.protocol.node import PEER_SPEAKS_NODE, NodeSlot
from handleipc.protocol.sendqueue import SendQueue
from handleipc.protocol.stages import Entry, EntryState, Late, Stage
from handleipc.protocol.timers import Timers
from handleipc.protocol.window import Window
from handleipc.system import System
from handleipc.wire import envelope

__all__ = ["Outgoing"]

# One stage spells this much; a longer line ends its stage, and is not copied into it.
STAGE_BYTES = 64 * 1024
QUEUED, STAGED, SENT = EntryState.QUEUED, EntryState.STAGED, EntryState.SENT
NET_SOCKET = "net.Socket"
# What spelling adds to a plain message, in node and in native.
PLAIN_BYTES = [len(envelope.spell_message(b"", native)) for native in (False, True)]


class Outgoing:
    """The sending half of ``ChannelProtocol``, which is its only caller.

    Args:
        limits: the bounds of the channel.
        system: the process-wide budget.
        timers: of the channel.
        granted: what an invitation granted from the start.
    """

    def __init__(self, limits: Limits, system: System, timers: Timers, granted: Invitation) -> None:
        self._limits = limits
        self.in_flight = system.in_flight
        self.native = False
        self.queue = SendQueue()
        self.outcomes = self.queue.outcomes
        self._above_water = False
        self._one_by_one = False
        """Whether the kernel refused a set, and the handle to blame is being looked for."""
        self.window = Window(limits, timers, granted)
        self.node = NodeSlot(timers)
        self.stage: Stage | None = None
        self.parked: Stage | None = None
        """A data stage that the kernel refused whole, overtaken by control."""
        self.lost_something = False
        """Whether the channel ended with something queued or unacknowledged."""
        self.hold_native_only = False
        """Whether handles that only handleipc can receive may still hope for a switch."""

    # -- what the application sends --------------------------------------------------------------

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

    def is_above_water(self) -> bool:
        """Say whether senders should wait: from the high-water mark until below the low one."""
        limits = self._limits
        is_whole = self.stage is None and self.parked is None
        size = self.queue.bytes if is_whole else self.unsent_bytes
        waiting = self.waiting_descriptors
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
        answers = self._answer_stage() if self.window.resends.due else None
        return answers or (self._native_stage() if self.queue.items else None)

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
                size += self._stage_waited(stage, lines, size)
            else:
                size += self._stage_plain(stage, lines, STAGE_BYTES - size)
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

    def _native_stage(self) -> Stage | None:
        window = self.window
        stage = Stage(b"")
        lines: list[bytes] = []
        size, most = 0, min(STAGE_BYTES, window.may_bytes - window.bytes_sent)
        while size < most and (item := self.queue.head()) is not None:
            if not isinstance(item, Entry):
                size += self._stage_plain(stage, lines, most - size)
            elif item.pending is None:
                size += self._stage_waited(stage, lines, size)
            else:
                room = self._descriptors_allowed(item.descriptors, stage) - len(stage.fds)
                if item.descriptors > room:
                    break
                size += self._stage_handles(stage, lines, most - size, room)
        window.bytes_sent += size
        if stage.fds:
            head = envelope.spell_count(len(stage.fds))
            lines.insert(0, head)
            stage.marks = deque((end + len(head), what) for end, what in stage.marks)
        return stage.finish(lines)

    def _descriptors_allowed(self, first: int, stage: Stage) -> int:
        """Return how many descriptors one stage may carry now, whose next handle has ``first``."""
        if self._one_by_one:
            return 0 if stage.fds else first
        window, limits = self.window, self._limits
        out = window.descriptors_out
        most = min(
            limits.set_size,
            window.room() + len(stage.fds),
            self.in_flight.allowance(out, limits.in_flight) + len(stage.fds),
        )
        # One handle may be larger than any of them, when it is alone on its way.
        return most if out else max(most, first)

    def _stage_plain(self, stage: Stage, lines: list[bytes], most: int) -> int:
        """Spell the plain messages at the head of the queue that nobody waits for.

        Stops at ``most`` bytes or what is no such message; returns the bytes.
        """
        items = self.queue.items
        spelling = PLAIN_BYTES[self.native]
        run: list[bytes] = []
        size = 0
        while size < most and items and type(line := items[0]) is bytes:
            run.append(line)
            size += len(line) + spelling
            items.popleft()
        stage.items += run
        self.queue.bytes -= size - spelling * len(run)
        long = run.pop() if len(run[-1]) >= STAGE_BYTES else None
        if run:
            lines.append(envelope.spell_messages(run, self.native))
        if long is not None:
            lines += envelope.spell_long(long, self.native)
            stage.ends_long = True
        return size

    def _stage_handles(self, stage: Stage, lines: list[bytes], most: int, room: int) -> int:
        """Number and spell the handles at its head, up to ``room`` descriptors. As above."""
        queue, fds = self.queue, stage.fds
        items = queue.items
        run: list[Entry] = []
        size = queued = 0
        sequence, before = self.window.numbered, len(fds)
        room += before
        while size < most and items:
            entry = items[0]
            if type(entry) is not Entry or entry.state is not QUEUED or entry.pending is None:
                break
            pending = entry.pending
            count = entry.descriptors
            if len(fds) + count > room:
                break
            try:
                if count == 1:
                    fds.append(pending.fileno())
                else:
                    fds += pending.filenos()
            except DescriptorReleased as error:
                queue.fail_head(str(error))
                break  # the room may have been made for this one alone
            items.popleft()
            entry.state = STAGED
            sequence += 1
            if not pending.options and pending.tag == NET_SOCKET and count == 1:
                # Nearly all of them: as spell_handle, without the call.
                line = b'[2,%d,1,"net.Socket",%b]\n' % (sequence, entry.line)
            else:
                line = envelope.spell_handle(
                    sequence, count, pending.tag, entry.line, pending.options
                )
            lines.append(line)
            run.append(entry)
            size += len(line)
            queued += entry.size
            if self._one_by_one:
                break
        queue.bytes -= queued
        count = len(fds) - before
        queue.descriptors -= count
        self.window.number(run)
        self.in_flight.add(count)
        stage.items += run
        stage.entries += run
        return size

    def _stage_waited(self, stage: Stage, lines: list[bytes], before: int) -> int:
        """Spell the plain message at the head of the queue, for which somebody waits.

        Returns the bytes; ``before`` are those of the stage so far.
        """
        entry = self.queue.take()
        line = entry.make() if isinstance(entry, Late) else entry.line
        if len(line) >= STAGE_BYTES:
            lines += envelope.spell_long(line, self.native)
            stage.ends_long = True
        else:
            lines.append(envelope.spell_message(line, self.native))
        size = len(line) + PLAIN_BYTES[self.native]
        stage.entries.append(entry)
        stage.items.append(entry)
        stage.marks.append((before + size, entry))
        return size

    def _answer_stage(self) -> Stage | None:
        """The descriptors that the peer lost, again; they need no credit and go before data."""
        answers = self.window.resends
        if not answers.may_leave():
            return None
        stage = Stage(b"")
        stage.resends = True
        lines: list[bytes] = []
        while (entry := self.window.next_answer()) is not None:
            assert entry.pending is not None
            if stage.fds and len(stage.fds) + entry.descriptors > self._limits.set_size:
                break
            # Raises if the application closed what it had handed over: the channel is given up.
            fds = entry.pending.filenos()
            answers.staged()
            lines.append(envelope.spell_again(entry.sequence, len(fds)))
            stage.fds += fds
            stage.entries.append(entry)
        lines.insert(0, envelope.spell_count(len(stage.fds)))
        return stage.finish(lines)

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
            head = len(envelope.spell_count(len(stage.fds))) if stage.fds else 0
            self.window.bytes_sent -= len(stage.data) - head

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
        self._one_by_one = len(refused) > 1
        if not self._one_by_one:
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
        finally:
            # If a signal handler raised in a handle's close(), the others end all the same.
            for entry in [one for one in ended if one.state is not EntryState.ENDED]:
                self.queue.end(entry, None)
            if ended:
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
