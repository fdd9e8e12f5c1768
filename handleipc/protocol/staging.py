"""What of the queue goes into a stage, and how it is spelled.

Plain messages of both dialects, and the handles of the native one; a handle of the node dialect
has a stage of its own, which ``outgoing`` makes. Many messages make one line, and so do handles
that differ in their descriptors and messages alone: what a line costs to write and to read is paid
once for all of them.

Takes entries from the queue and numbers them; neither writes nor ends any.
"""

from __future__ import annotations

from collections import deque

from handleipc.exceptions import DescriptorReleased
from handleipc.limits import Limits
from handleipc.protocol.sendqueue import SendQueue
from handleipc.protocol.stages import Entry, EntryState, Late, Stage
from handleipc.protocol.window import Window
from handleipc.system import InFlight
from handleipc.wire import envelope

__all__ = ["STAGE_BYTES", "NativeStages", "stage_plain", "stage_waited"]

# One stage spells this much; a longer line ends its stage, and is not copied into it.
STAGE_BYTES = 64 * 1024
# What spelling adds to a plain message, in node and in native.
PLAIN_BYTES = [len(envelope.spell_message(b"", native)) for native in (False, True)]
# Bytes of the messages in one line, with a comma each: a run's own, less what is around them.
MESSAGES_BYTES = envelope.RUN_BYTES - len(envelope.spell_messages([b"", b""], True)) + 2
# The same of handles, with their options; a number and a type of so many characters are around,
# which take 12 bytes each if one of them is half a surrogate pair.
LONGEST_TYPE = 64
HANDLES_BYTES = envelope.RUN_BYTES - 12 * LONGEST_TYPE - 32
QUEUED, STAGED = EntryState.QUEUED, EntryState.STAGED


def stage_plain(
    queue: SendQueue, stage: Stage, lines: list[bytes], most: int, *, native: bool
) -> int:
    """Spell the plain messages at the head of the queue that nobody waits for, in one line.

    One, or those that fit into ``most`` bytes; returns the bytes.
    """
    items = queue.items
    if native:
        most = min(most, MESSAGES_BYTES)
    run: list[bytes] = []
    size = 0
    most_messages = envelope.RUN_MESSAGES if native else len(items)
    while items and len(run) < most_messages and type(line := items[0]) is bytes:
        longer = size + len(line) + 1
        if longer > most and run:
            break
        size = longer
        run.append(line)
        items.popleft()
    stage.items += run
    queue.bytes -= size - len(run)
    if len(run) == 1:
        return _spell_one(run[0], stage, lines, native=native)
    lines.append(envelope.spell_messages(run, native))
    stage.counted += envelope.RUN_MESSAGE_COST * len(run)
    return len(lines[-1])


def stage_waited(
    queue: SendQueue, stage: Stage, lines: list[bytes], before: int, *, native: bool
) -> int:
    """Spell the plain message at the head of the queue, for which somebody waits.

    Returns the bytes; ``before`` are those of the stage so far.
    """
    entry = queue.take()
    line = entry.make() if isinstance(entry, Late) else entry.line
    size = _spell_one(line, stage, lines, native=native)
    stage.entries.append(entry)
    stage.items.append(entry)
    stage.marks.append((before + size, entry))
    return size


def _spell_one(line: bytes, stage: Stage, lines: list[bytes], *, native: bool) -> int:
    if len(line) >= STAGE_BYTES:
        lines += envelope.spell_long(line, native)
        stage.ends_long = True
    else:
        lines.append(envelope.spell_message(line, native))
    return len(line) + PLAIN_BYTES[native]


class NativeStages:
    """Makes the stages of the native dialect.

    Args:
        limits: the bounds of the channel.
        in_flight: the process-wide budget.
        queue: what waits.
        window: numbers handles, and knows what the peer grants.
    """

    def __init__(
        self, limits: Limits, in_flight: InFlight, queue: SendQueue, window: Window
    ) -> None:
        self._limits = limits
        self._in_flight = in_flight
        self._queue = queue
        self._window = window
        self.one_by_one = False
        """Whether the kernel refused a set, and the handle to blame is being looked for."""

    def next_data(self) -> Stage | None:
        """Spell what the peer's grants let leave now, or return None."""
        queue, window = self._queue, self._window
        stage = Stage(b"")
        lines: list[bytes] = []
        size, most = 0, min(STAGE_BYTES, window.may_bytes - window.bytes_sent)
        while size + stage.counted < most and (item := queue.head()) is not None:
            if not isinstance(item, Entry):
                size += stage_plain(queue, stage, lines, most - size, native=True)
            elif item.pending is None:
                size += stage_waited(queue, stage, lines, size, native=True)
            else:
                room = self._descriptors_allowed(item.descriptors, stage) - len(stage.fds)
                if item.descriptors > room or stage.is_run:
                    break
                size += self._stage_handles(stage, lines, room)
        stage.counted += size
        window.bytes_sent += stage.counted
        if stage.fds and not stage.is_run:
            head = envelope.spell_count(len(stage.fds))
            lines.insert(0, head)
            stage.marks = deque((end + len(head), what) for end, what in stage.marks)
        return stage.finish(lines)

    def next_answers(self) -> Stage | None:
        """Spell the descriptors that the peer lost, again: they need no credit."""
        answers = self._window.resends
        if not answers.may_leave():
            return None
        stage = Stage(b"")
        stage.resends = True
        lines: list[bytes] = []
        while (entry := self._window.next_answer()) is not None:
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

    def put_back(self, stage: Stage) -> None:
        """Count the bytes of a stage as not sent: its lines are to be spelled again."""
        self._window.bytes_sent -= stage.counted

    def _descriptors_allowed(self, first: int, stage: Stage) -> int:
        """Return how many descriptors one stage may carry now, whose next handle has ``first``."""
        if self.one_by_one:
            return 0 if stage.fds else first
        window, limits = self._window, self._limits
        out = window.descriptors_out
        most = min(
            limits.set_size,
            window.room() + len(stage.fds),
            self._in_flight.allowance(out, limits.in_flight) + len(stage.fds),
        )
        # One handle may be larger than any of them, when it is alone on its way.
        return most if out else max(most, first)

    def _stage_handles(self, stage: Stage, lines: list[bytes], room: int) -> int:
        """Number and spell the handle at the head of the queue, or a run that begins the stage.

        Args:
            stage: it gets their descriptors.
            lines: of the stage so far.
            room: descriptors that they may have.

        Returns:
            The bytes. They are 0 if the handle was closed meanwhile: it has ended.
        """
        is_run = not lines and self._run_begins()
        entries = self._take_handles(stage, room if is_run else 1)
        if not entries:
            return 0
        stage.is_run = is_run
        first = entries[0]
        pending = first.pending
        assert pending is not None
        if is_run:
            messages = [entry.line for entry in entries]
            line = envelope.spell_run(first.sequence, pending.tag, messages, pending.options)
        else:
            line = envelope.spell_handle(
                first.sequence, first.descriptors, pending.tag, first.line, pending.options
            )
        lines.append(line)
        return len(line)

    def _run_begins(self) -> bool:
        """Say whether the handle at the head of the queue is to begin a run.

        Not if something else is behind it: both could leave with one write, but for a run.
        """
        items = self._queue.items
        first = items[0]
        assert isinstance(first, Entry)
        assert first.pending is not None
        if first.descriptors != 1 or first.size > HANDLES_BYTES // 2:
            return False
        if len(first.pending.tag) > LONGEST_TYPE:
            return False
        return len(items) == 1 or _are_alike(first, items[1])

    def _take_handles(self, stage: Stage, most: int) -> list[Entry]:
        """Put the handle at the head of the queue into the stage, and number it.

        With ``most`` above 1, as many as are like it and fit into the line of a run.
        """
        queue, fds = self._queue, stage.fds
        items = queue.items
        first = items[0]
        assert isinstance(first, Entry)
        taken: list[Entry] = []
        size = count = 0
        room = HANDLES_BYTES - (len(first.pending.options) if first.pending else 0)
        if self.one_by_one:
            most = 1
        entry = first
        while True:
            room -= len(entry.line) + 1
            if taken and room < 0:
                break
            try:
                if entry.descriptors == 1:
                    fds.append(entry.pending.fileno())  # type: ignore[union-attr]
                else:
                    fds += entry.pending.filenos()  # type: ignore[union-attr]
            except DescriptorReleased as error:
                queue.fail_head(str(error))
                break  # the room may have been made for this one alone
            items.popleft()
            entry.state = STAGED
            taken.append(entry)
            size += entry.size
            count += entry.descriptors
            if len(taken) >= most or not items or not _are_alike(first, items[0]):
                break
            entry = items[0]  # type: ignore[assignment]
        queue.bytes -= size
        queue.descriptors -= count
        self._window.number(taken)
        self._in_flight.add(count)
        stage.items += taken
        stage.entries += taken
        return taken


def _are_alike(first: Entry, other: bytes | Entry) -> bool:
    """Say whether another handle may be in one run with the first, which has one descriptor."""
    if type(other) is not Entry or other.descriptors != 1 or other.state is not QUEUED:
        return False
    one, two = first.pending, other.pending
    return one.tag == two.tag and one.options == two.options  # type: ignore[union-attr]
