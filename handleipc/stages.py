"""What the sending direction is made of: an *entry* for each send, a *stage* for each write.

Data only. When an entry goes into a stage is decided in ``outgoing``.
"""

from __future__ import annotations

import enum
from collections import deque

from handleipc.pending import PendingHandle
from handleipc.typing import JSON

__all__ = ["Entry", "EntryState", "Stage"]


class EntryState(enum.Enum):
    """Where an entry is. It only ever moves down this list."""

    QUEUED = enum.auto()
    STAGED = enum.auto()
    SENT = enum.auto()
    """Its first byte has left: it cannot be withdrawn any more."""
    ENDED = enum.auto()


class Entry:
    """One ``send`` that somebody waits for, or that carries a handle.

    ``waiter`` is the front's and not looked at here. Of a plain message nobody waits for, only its
    bytes are queued.
    """

    __slots__ = ("asks", "line", "message", "pending", "sequence", "state", "waiter")

    def __init__(self, line: bytes, message: JSON, pending: PendingHandle | None) -> None:
        self.line = line
        self.message = message
        self.pending = pending
        self.state = EntryState.QUEUED
        self.sequence = 0
        self.asks = 0
        self.waiter: object = None


class Stage:
    """What one ``sendmsg`` may carry: bytes, and descriptors with the first of them.

    ``marks`` are pairs of an end offset and what to do when the kernel has everything before it.
    ``items`` are the queue items spelled here, so that a stage not begun can be taken apart.
    """

    __slots__ = ("data", "entries", "fds", "is_control", "items", "marks", "offset", "resends")

    def __init__(self, data: bytes, *, is_control: bool = False) -> None:
        self.data = data
        self.offset = 0
        self.is_control = is_control
        self.entries: list[Entry] = []
        self.fds: list[int] = []
        self.items: list[bytes | Entry] = []
        self.marks: deque[tuple[int, object]] = deque()
        self.resends = False
