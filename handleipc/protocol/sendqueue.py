"""What waits to be sent, and what became of what was: the two ends of the sending direction.

Counts bytes and handles as they come and go. What leaves when is decided in ``outgoing``.
"""

from __future__ import annotations

from collections import deque

from handleipc.protocol.front import Faults
from handleipc.protocol.stages import Entry, EntryState, Late

__all__ = ["SendQueue"]


class SendQueue:
    """Messages not yet spelled, in order, and the outcomes of those that ended.

    A plain message nobody waits for is its bytes, anything else an ``Entry``. What was withdrawn
    stays in ``items`` as a hole, or a thousand cancellations would cost a million steps.

    Args:
        faults: where handles go that ended well, and then their own ``close`` raised.
    """

    __slots__ = ("_faults", "bytes", "descriptors", "items", "outcomes")

    def __init__(self, faults: Faults) -> None:
        self.items: deque[bytes | Entry] = deque()
        self.bytes: int = 0
        """Of the messages that wait."""
        self.descriptors: int = 0
        """Of the handles that wait."""
        self.outcomes: deque[tuple[Entry, str | None]] = deque()
        """Entries that ended: (entry, None) if delivered or written, else why not. Of successes
        only those that somebody waits for."""
        self._faults = faults

    def head(self) -> bytes | Entry | None:
        """Return what is to leave next, dropping what was withdrawn."""
        items = self.items
        while items:
            head = items[0]
            if not isinstance(head, Entry) or head.state is not EntryState.ENDED:
                return head
            items.popleft()
        return None

    @property
    def native_only_first(self) -> bool:
        """Whether the next message to leave is a handle that only handleipc can receive."""
        head = self.head()
        return isinstance(head, Entry) and head.pending is not None and head.pending.native_only

    def take(self) -> Entry:
        """Take the entry at the head out: it goes into a stage."""
        entry = self.items.popleft()
        assert isinstance(entry, Entry)
        entry.state = EntryState.STAGED
        self.uncount(entry)
        return entry

    def put_back(self, item: bytes | Entry) -> None:
        """Put what was taken last back in front."""
        self.items.appendleft(item)
        if isinstance(item, Entry):
            item.state = EntryState.QUEUED
            self.bytes += item.size
            self.descriptors += item.descriptors
        else:
            self.bytes += len(item)

    def uncount(self, entry: Entry) -> None:
        """This entry does not wait any more."""
        self.bytes -= entry.size
        self.descriptors -= entry.descriptors

    def end(self, entry: Entry, reason: str | None, *, doubtful: bool = False) -> None:
        """An entry ends, for good: delivered or written if ``reason`` is None.

        Args:
            entry: what ended; not counted here any more.
            reason: why it was not delivered, in words.
            doubtful: the peer may own its handle, and lives: at most one owner means that our
                copy goes.
        """
        entry.state = EntryState.ENDED
        entry.in_doubt = doubtful
        pending = entry.pending
        if pending is not None:
            try:
                if reason is None or doubtful:
                    pending.delivered()
                else:
                    pending.returned()
            except Exception as error:  # its own close(): others end all the same
                self._faults.closes.append((pending.handle, error))
        elif isinstance(entry, Late):
            entry.ended()
        if reason is not None or entry.waiter is not None:
            self.outcomes.append((entry, reason))

    def fail_head(self, reason: str) -> None:
        """Give the handle at the head back."""
        entry = self.items.popleft()
        assert isinstance(entry, Entry)
        self.uncount(entry)
        self.end(entry, reason)

    def withdraw(self, entry: Entry) -> None:
        """Take a waiting entry back: it leaves no outcome."""
        self.uncount(entry)
        entry.state = EntryState.ENDED
        if entry.pending is not None:
            entry.pending.returned()

    def settle(self, reason: str) -> None:
        """Nothing leaves any more: what waits ends, in order."""
        for item in self.items:
            if isinstance(item, Entry) and item.state is EntryState.QUEUED:
                self.end(item, reason)
        self.items.clear()
        self.bytes = self.descriptors = 0
