"""Numbered handles that the peer has not acknowledged, and how many more it lets us send.

The native dialect's half of ``outgoing``. Judges what the peer says about our handles; what then
becomes of them is the caller's. Handles have numbers; what is granted and counted is descriptors.
"""

from __future__ import annotations

from handleipc.exceptions import RemoteProtocolError
from handleipc.limits import Invitation, Limits
from handleipc.protocol.front import Hooks
from handleipc.protocol.resends import Resends
from handleipc.protocol.stages import Entry, EntryState
from handleipc.protocol.timers import Timers

__all__ = ["Window"]

# A grant beyond this many descriptors is as good as none: our own limits are narrower.
MOST_GRANTED = 65_536


class Window:
    """The window of one sending direction.

    Args:
        limits: how often the peer may ask again.
        timers: of the channel.
        granted: what an invitation granted from the start.
        hooks: say whether the peer has read.
    """

    def __init__(self, limits: Limits, timers: Timers, granted: Invitation, hooks: Hooks) -> None:
        self.may_descriptors: int = granted.descriptors
        """Handles may be numbered while their descriptors, of all so far, are no more than this."""
        self.may_bytes: int = granted.bytes
        """A counted line may begin while fewer bytes than this were sent."""
        self.bytes_sent = 0
        self.numbered: int = 0
        self.descriptors_sent: int = 0
        """Of all numbered handles."""
        self.descriptors_out: int = 0
        """Of those not acknowledged."""
        self.acked: int = 0
        self.unacked: dict[int, Entry] = {}
        """In the order of their numbers."""
        self.resends: Resends = Resends(limits, timers, hooks)
        """Handles whose descriptors the peer asked for again."""

    def __len__(self) -> int:
        return len(self.unacked)

    def room(self) -> int:
        """Return how many descriptors the peer's grant still covers; negative after a larger one.

        A handle with more may leave when nothing of this direction is unacknowledged, so a peer
        holds the larger of its window and one handle at most.
        """
        return self.may_descriptors - self.descriptors_sent

    def number(self, entries: list[Entry]) -> None:
        """Give handles the next numbers, in order."""
        count = 0
        for sequence, entry in enumerate(entries, self.numbered + 1):
            entry.sequence = sequence
            self.unacked[sequence] = entry
            count += entry.descriptors
        self.numbered += len(entries)
        self.descriptors_sent += count
        self.descriptors_out += count

    def unnumber(self, entry: Entry) -> None:
        """Take the last number back: its line has not left."""
        assert entry.sequence == self.numbered
        del self.unacked[entry.sequence]
        self.numbered -= 1
        self.descriptors_sent -= entry.descriptors
        self.descriptors_out -= entry.descriptors

    def acknowledge(self, ack: int) -> list[Entry]:
        """Take an acknowledgement, and return the handles it ends, in order.

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
        if ack == self.numbered:
            ended = list(unacked.values())
            unacked.clear()
            self.descriptors_out = 0
        else:
            ended = []
            for sequence in range(self.acked + 1, ack + 1):
                entry = unacked.pop(sequence, None)
                if entry is not None:  # else it was refused
                    ended.append(entry)
                    self.descriptors_out -= entry.descriptors
            if not unacked:
                unacked.clear()  # or it would keep the room of its busiest moment
        if self.resends.were_asked:
            for entry in ended:
                self.resends.forget(entry.sequence)
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
            self.descriptors_out -= entry.descriptors
            self.resends.forget(entry.sequence)
        return refused

    def ask_again(self, first: int, count: int) -> None:
        """Send the descriptors of these handles again.

        Raises:
            RemoteProtocolError: one of them is not outstanding, on its way again already, or was
                asked for too often.
        """
        for sequence in range(first, first + count):
            self._outstanding(sequence, "asked again for")
            self.resends.ask(sequence)

    def next_answer(self) -> Entry | None:
        """Return the handle that is to be sent again next."""
        sequence = self.resends.next()
        return None if sequence is None else self.unacked[sequence]

    def grant(self, descriptors: int, size: int) -> None:
        """Take the peer's grants.

        Raises:
            RemoteProtocolError: they were lowered.
        """
        if descriptors < self.may_descriptors or size < self.may_bytes:
            raise RemoteProtocolError("the peer took back a grant")
        most = max(self.may_descriptors, self.descriptors_sent + MOST_GRANTED)
        self.may_descriptors = min(descriptors, most)
        self.may_bytes = size

    def clear(self) -> list[Entry]:
        """Return everything not acknowledged, in order, and forget it."""
        entries = list(self.unacked.values())
        self.unacked.clear()
        self.resends.clear()
        self.descriptors_out = 0
        return entries

    def _outstanding(self, sequence: int, verb: str) -> Entry:
        entry = self.unacked.get(sequence)
        if entry is None or entry.state is not EntryState.SENT:
            raise RemoteProtocolError(f"the peer {verb} handle {sequence}, which it does not have")
        return entry
