"""What the sending direction is made of: an *entry* for each send, a *stage* for each write.

Data, and no decisions: when an entry goes into a stage is said in ``outgoing``.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable

from handleipc.handles.pending import PendingHandle
from handleipc.typing import JSON
from handleipc.wire.framing import LongLine

__all__ = ["LATE_SIZE", "Entry", "EntryState", "Late", "Stage"]


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
        self.line: bytes = line
        self.size: int = len(line) if pending is None else len(line) + len(pending.options)
        """Bytes it occupies while it waits."""
        self.descriptors: int = 0 if pending is None else pending.fds_needed
        self.message: JSON = message
        self.pending: PendingHandle | None = pending
        self.state: EntryState = QUEUED
        self.in_doubt: bool = False
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
        self.make: Callable[[], bytes] = make
        self.ended: Callable[[], None] = ended


class Stage:
    """What one ``sendmsg`` may carry: bytes, and descriptors with the first of them.

    ``marks`` are pairs of an end offset and what the kernel has with everything before it: a
    message somebody waits for, or the number of a control stage.
    ``items`` are the queue items spelled here, so that a stage not begun can be taken apart.
    """

    __slots__ = (
        "counted",
        "data",
        "ends_long",
        "entries",
        "fds",
        "is_control",
        "is_run",
        "items",
        "marks",
        "offset",
        "resends",
    )

    def __init__(self, data: bytes, *, is_control: bool = False) -> None:
        self.data: bytes | LongLine = data
        self.ends_long: bool = False
        """Whether the last message in it is too long to be copied."""
        self.counted: int = 0
        """Bytes of it that the peer grants, in the native dialect."""
        self.offset: int = 0
        self.is_control: bool = is_control
        self.is_run: bool = False
        """Whether its descriptors are those of a run, which its first line counts itself."""
        self.entries: list[Entry] = []
        self.fds: list[int] = []
        self.items: list[bytes | Entry] = []
        self.marks: deque[tuple[int, Entry | int]] = deque()
        self.resends: bool = False

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
