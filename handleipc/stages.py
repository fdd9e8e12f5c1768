"""What the sending direction is made of: an *entry* for each send, a *stage* for each write.

Data, and no decisions: when an entry goes into a stage is said in ``outgoing``.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable

from handleipc.framing import LongLine
from handleipc.limits import Limits
from handleipc.pending import PendingHandle
from handleipc.typing import JSON

__all__ = ["LATE_SIZE", "Entry", "EntryState", "Late", "NodeSlot", "Stage"]


class EntryState(enum.Enum):
    """Where an entry is. It only ever moves down this list."""

    QUEUED = enum.auto()
    STAGED = enum.auto()
    SENT = enum.auto()
    """Its first byte has left: it cannot be withdrawn any more."""
    ENDED = enum.auto()


QUEUED = EntryState.QUEUED
# What a message that is made late counts for: about what its entry takes, and the longest key.
LATE_SIZE = 1024


class Entry:
    """One ``send`` that somebody waits for, or that carries a handle.

    ``waiter`` is the front's: whoever is to hear of its success. Of a plain message nobody waits
    for, only its bytes are queued.
    """

    __slots__ = (
        "descriptors",
        "in_doubt",
        "line",
        "message",
        "pending",
        "sequence",
        "size",
        "state",
        "waiter",
    )

    sequence: int
    """Its number, once it has one."""

    def __init__(self, line: bytes, message: JSON, pending: PendingHandle | None) -> None:
        self.line = line
        self.size = len(line) if pending is None else len(line) + len(pending.options)
        """Bytes it occupies while it waits."""
        self.descriptors = 0 if pending is None else pending.fds_needed
        self.message = message
        self.pending = pending
        self.state = QUEUED
        self.in_doubt = False
        """Whether it ended in a way in which the peer may own its handle."""
        self.waiter: object = None


class Late(Entry):
    """A plain message that is made when it is spelled, after the acknowledgements before it.

    Args:
        make: returns its JSON; called again if a stage is taken apart.
        ended: called when it was written, or never will be.
    """

    __slots__ = ("ended", "make")

    def __init__(self, make: Callable[[], bytes], ended: Callable[[], None]) -> None:
        super().__init__(b"", None, None)
        self.size = LATE_SIZE
        self.make = make
        self.ended = ended


class Stage:
    """What one ``sendmsg`` may carry: bytes, and descriptors with the first of them.

    ``marks`` are pairs of an end offset and what the kernel has with everything before it: a
    message somebody waits for, or the number of a control stage.
    ``items`` are the queue items spelled here, so that a stage not begun can be taken apart.
    """

    __slots__ = (
        "data",
        "ends_long",
        "entries",
        "fds",
        "is_control",
        "items",
        "marks",
        "offset",
        "resends",
    )

    def __init__(self, data: bytes, *, is_control: bool = False) -> None:
        self.data: bytes | LongLine = data
        self.ends_long = False
        """Whether the last message in it is too long to be copied."""
        self.offset = 0
        self.is_control = is_control
        self.entries: list[Entry] = []
        self.fds: list[int] = []
        self.items: list[bytes | Entry] = []
        self.marks: deque[tuple[int, Entry | int]] = deque()
        self.resends = False

    def finish(self, lines: list[bytes]) -> Stage | None:
        """Take what was spelled; returns None if that is nothing."""
        if not lines:
            return None
        if self.ends_long:
            *before, body, tail = lines
            self.data = LongLine(b"".join(before), body, tail)
        else:
            self.data = b"".join(lines)
        return self


class NodeSlot:
    """The one handle that a node-dialect end may have unanswered."""

    __slots__ = ("entry", "nacks", "resend_at")

    def __init__(self) -> None:
        self.entry: Entry | None = None
        self.nacks = 0
        self.resend_at: float | None = None

    def put(self, entry: Entry) -> None:
        """This handle is written next."""
        self.entry = entry
        self.nacks = 0

    def clear(self) -> None:
        """It has ended, or went back to the queue."""
        self.entry = self.resend_at = None

    @property
    def waits(self) -> bool:
        """Whether it has left, and its reply has not come."""
        return (
            self.entry is not None
            and self.resend_at is None
            and self.entry.state is EntryState.SENT
        )

    def retry(self, limits: Limits, now: float) -> bool:
        """Take a NACK: send again after a pause. Returns False when it has been tried enough.

        Node sends again at once and uses its tries up within a millisecond; the peer's shortage of
        descriptors lasts longer than that.
        """
        if self.nacks == limits.node_retries:
            return False
        self.resend_at = now + limits.ask_delay * 4.0**self.nacks
        self.nacks += 1
        return True
