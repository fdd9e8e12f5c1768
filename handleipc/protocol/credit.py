"""What a native peer may send: descriptors and bytes, granted in advance, counted as they come.

Everything that may come has a place here before it leaves there, so a native end never stops
reading. Judges what comes against what was granted; who takes it is ``deliveries``' business.
"""

from __future__ import annotations

from handleipc.exceptions import RemoteProtocolError
from handleipc.limits import Limits

__all__ = ["Credit"]


class Credit:
    """The grants of one receiving direction.

    Args:
        limits: how much is granted.
        descriptors, size: what an invitation granted from the start.
    """

    __slots__ = (
        "_ack_said",
        "_done_descriptors",
        "_seen_descriptors",
        "_size",
        "_window",
        "_window_size",
        "ack",
        "bytes_in",
        "descriptors",
        "due_at",
        "seen",
        "size",
    )

    def __init__(self, limits: Limits, descriptors: int, size: int) -> None:
        self._window = self._window_size = limits.window
        self._size = limits.bytes
        self.descriptors: int = descriptors
        """The peer may number handles whose descriptors, of all so far, are no more than this."""
        self.size: int = size
        """The peer may begin a counted line while it has sent fewer bytes than this."""
        self.bytes_in: int = 0
        self.seen: int = 0
        self._seen_descriptors = self._ack_said = 0
        self.ack: int = 0
        """Every handle up to this is acknowledged or refused."""
        self._done_descriptors = 0
        self._watch_for_half()

    def _watch_for_half(self) -> None:
        self.due_at: int = self.size - self._size + max(1, self._size // 2)
        """Bytes taken from which on more are granted: with half a window free, and no less, or ends
        that take each line at once would send a grant for each (docs/wire.md, section 4: an endless
        ping-pong)."""

    def take_bytes(self, size: int) -> None:
        """Count a line.

        Raises:
            RemoteProtocolError: it began beyond the grant. One line may overshoot.
        """
        if self.bytes_in >= self.size:
            raise RemoteProtocolError(
                f"the peer sent {self.bytes_in} bytes, and was granted {self.size}"
            )
        self.bytes_in += size

    def take_handles(self, sequence: int, number: int, count: int) -> None:
        """Count so many handles, from one with this number on, with ``count`` descriptors in all.

        One that is larger than the grant is right when all before it are acknowledged, so that a
        peer has this process keep the larger of a window and one handle.

        Raises:
            RemoteProtocolError: its number is out of order, or it is beyond the grant.
        """
        if sequence != self.seen + 1:
            raise RemoteProtocolError(f"the peer sent handle {sequence} after {self.seen}")
        self._seen_descriptors += count
        alone = number == 1 and self._ack_said == self.seen
        if self._seen_descriptors > self.descriptors and not alone:
            raise RemoteProtocolError(
                f"the peer sent {self._seen_descriptors} descriptors, and was granted"
                f" {self.descriptors}"
            )
        self.seen += number

    def check_set(self, count: int, asked: int) -> None:
        """Judge descriptors that are here before the lines of their handles.

        Lines that come byte by byte, or never, must not have this process keep more than handles
        would.

        Args:
            count: how many there are.
            asked: how many the peer was asked for again.

        Raises:
            RemoteProtocolError: no handles that were granted have so many.
        """
        room = max(0, self.descriptors - self._seen_descriptors)
        if count > room + asked and self._ack_said != self.seen:
            raise RemoteProtocolError(
                f"the peer sent {count} descriptors at once, and {room} were left of its grant"
            )

    def done(self, sequence: int, count: int) -> None:
        """Count a handle as acknowledged or refused: what it occupied is granted again."""
        self.ack = sequence
        self._done_descriptors += count

    def lost_some(self) -> None:
        """Halve the window: descriptors were lost for want of free slots."""
        self._window = max(1, self._window // 2)

    def say(self, taken: int) -> tuple[int, int, int]:
        """Return what is acknowledged and granted now, and count it as said. It never falls."""
        self.descriptors = max(self.descriptors, self._done_descriptors + self._window)
        self.size = max(self.size, taken + self._size)
        self._watch_for_half()
        self._window = min(self._window_size, self._window + 1)
        self._ack_said = self.ack
        return self.ack, self.descriptors, self.size
