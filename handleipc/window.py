"""Numbered handles that the peer has not acknowledged, and how many more it lets us send.

The native dialect's half of ``outgoing``. Judges what the peer says about our handles; what then
becomes of them is the caller's.
"""

from __future__ import annotations

from collections import deque

from handleipc.exceptions import RemoteProtocolError
from handleipc.limits import Limits
from handleipc.stages import Entry, EntryState

__all__ = ["Window"]

# A grant beyond this many handles is as good as none: our own limits are narrower.
MOST_GRANTED = 65_536


class Window:
    """The window of one sending direction.

    Args:
        limits: how often the peer may ask again.
        may_handles, may_bytes: what an invitation granted from the start.
    """

    def __init__(self, limits: Limits, may_handles: int, may_bytes: int) -> None:
        self._limits = limits
        self.may_handles = may_handles
        """Handles may be numbered up to this."""
        self.may_bytes = may_bytes
        """A counted line may begin while fewer bytes than this were sent."""
        self.bytes_sent = 0
        self.numbered = 0
        self.acked = 0
        self.unacked: dict[int, Entry] = {}
        """In the order of their numbers."""
        self._asks: dict[int, int] = {}
        self.resend: deque[int] = deque()
        """Numbers of handles whose descriptors the peer asked for again."""

    def __len__(self) -> int:
        return len(self.unacked)

    def number(self, entries: list[Entry]) -> None:
        """Give handles the next numbers, in order."""
        for sequence, entry in enumerate(entries, self.numbered + 1):
            entry.sequence = sequence
            self.unacked[sequence] = entry
        self.numbered += len(entries)

    def unnumber(self, entry: Entry) -> None:
        """Take the last number back: its line has not left."""
        assert entry.sequence == self.numbered
        del self.unacked[entry.sequence]
        self.numbered -= 1

    def acknowledge(self, ack: int) -> list[Entry]:
        """Take an acknowledgement, and return the handles it ends.

        Raises:
            RemoteProtocolError: one was never sent, or the number went backwards.
        """
        if not self.acked <= ack <= self.numbered:
            raise RemoteProtocolError(
                f"the peer acknowledged handle {ack}, outside of {self.acked}..{self.numbered}"
            )
        unacked = self.unacked
        # Whatever comes before a handle that was sent was sent too.
        last = unacked.get(ack)
        if last is not None and last.state is not EntryState.SENT:
            raise RemoteProtocolError(f"the peer acknowledged handle {ack}, which it does not have")
        ended = []
        for sequence in range(self.acked + 1, ack + 1):
            entry = unacked.pop(sequence, None)
            # None if it was refused.
            if entry is not None:
                ended.append(entry)
        if not unacked:
            unacked.clear()  # or it would keep the room of its busiest moment
        if self._asks:
            self._asks = {sequence: n for sequence, n in self._asks.items() if sequence > ack}
        if self.resend:
            self.resend = deque(sequence for sequence in self.resend if sequence > ack)
        self.acked = ack
        return ended

    def refuse(self, first: int, count: int) -> list[Entry]:
        """Take a refusal, and return the handles that come back.

        Raises:
            RemoteProtocolError: one of them is not outstanding; then none comes back by this.
        """
        refused = [self._outstanding(one, "refused") for one in range(first, first + count)]
        for entry in refused:
            del self.unacked[entry.sequence]
            if entry.sequence in self.resend:
                self.resend.remove(entry.sequence)
        return refused

    def ask_again(self, first: int, count: int) -> None:
        """Send the descriptors of these handles again.

        Raises:
            RemoteProtocolError: one of them is not outstanding, on its way again already, or was
                asked for too often.
        """
        for sequence in range(first, first + count):
            self._outstanding(sequence, "asked again for")
            if sequence in self.resend:
                raise RemoteProtocolError(f"the peer asked twice for handle {sequence}")
            asks = self._asks[sequence] = self._asks.get(sequence, 0) + 1
            if asks > self._limits.asks:
                raise RemoteProtocolError(f"the peer asked for handle {sequence} too often")
            self.resend.append(sequence)

    def grant(self, handles: int, size: int) -> None:
        """Take the peer's grants.

        Raises:
            RemoteProtocolError: they were lowered.
        """
        if handles < self.may_handles or size < self.may_bytes:
            raise RemoteProtocolError("the peer took back a grant")
        self.may_handles = min(handles, max(self.may_handles, self.acked + MOST_GRANTED))
        self.may_bytes = size

    def clear(self) -> list[Entry]:
        """Return everything not acknowledged, in order, and forget it."""
        entries = list(self.unacked.values())
        self.unacked.clear()
        self.resend.clear()
        return entries

    def _outstanding(self, sequence: int, verb: str) -> Entry:
        entry = self.unacked.get(sequence)
        if entry is None or entry.state is not EntryState.SENT:
            raise RemoteProtocolError(f"the peer {verb} handle {sequence}, which it does not have")
        return entry
