"""Descriptors that the peer lost and asks for again: which, how often, and one answer at a time.

Needs no credit, so it is bounded by itself: a handle is asked for so many times at most, and one
answer at most lies unread in the socket. A peer that asked on and on, and read nothing, would fill
the kernel's count of descriptors in flight, which all processes of the user share.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from handleipc.exceptions import RemoteProtocolError
from handleipc.limits import Limits
from handleipc.protocol.front import Hooks
from handleipc.protocol.timers import Timer, Timers

__all__ = ["Resends"]


class Resends:
    """What was asked for again, by numbers of handles.

    Args:
        limits: how often a peer may ask.
        timers: where to note when to look again.
        hooks: say whether the peer has read.
    """

    __slots__ = ("_asks", "_hooks", "_limits", "_order", "_timers", "due", "unread")

    def __init__(self, limits: Limits, timers: Timers, hooks: Hooks) -> None:
        self._limits = limits
        self._hooks = hooks
        self._timers = timers
        self._asks: dict[int, int] = {}
        # In the order asked for; what has ended meanwhile is passed over.
        self._order: deque[int] = deque()
        self.due: set[int] = set()
        """Those that are to leave again."""
        self.unread: set[int] = set()
        """Those that left again, and may still lie unread in the peer's socket."""

    @property
    def were_asked(self) -> bool:
        """Whether anything is known of a handle that has not ended."""
        return bool(self._asks)

    def ask(self, sequence: int) -> None:
        """Take the peer's asking for one that is outstanding.

        Raises:
            RemoteProtocolError: it is on its way again already, or was asked for too often.
        """
        if sequence in self.due:
            raise RemoteProtocolError(f"the peer asked twice for handle {sequence}")
        asks = self._asks[sequence] = self._asks.get(sequence, 0) + 1
        if asks > self._limits.asks:
            raise RemoteProtocolError(f"the peer asked for handle {sequence} too often")
        self._order.append(sequence)
        self.due.add(sequence)

    def may_leave(self) -> bool:
        """Say whether an answer may leave now.

        It may when the handles of the last one have ended, or when the peer has read all that was
        written: an honest peer reads on while it has a hole, and then asks.
        """
        if self.unread:
            if not self._hooks.peer_has_read():
                self._timers.start(Timer.LOOK, self._limits.in_flight_delay_max)
                return False
            self.unread.clear()
        self._timers.stop(Timer.LOOK)
        return True

    def next(self) -> int | None:
        """Return the number that is due next; ``staged`` then takes it out."""
        order = self._order
        while order:
            if order[0] in self.due:
                return order[0]
            order.popleft()
        return None

    def staged(self) -> None:
        """Take out what ``next`` returned: it goes into a stage."""
        self.due.discard(self._order.popleft())

    def put_back(self, sequence: int) -> None:
        """Put one back in front: its stage has not left."""
        self._order.appendleft(sequence)
        self.due.add(sequence)

    def left(self, sequences: Iterable[int]) -> None:
        """Count these as on their way."""
        self.unread.update(sequences)

    def forget(self, sequence: int) -> None:
        """Forget one that has ended."""
        if self._asks.pop(sequence, None) is not None:
            self.unread.discard(sequence)
            self.due.discard(sequence)

    def clear(self) -> None:
        """Forget everything."""
        self._timers.stop(Timer.LOOK)
        self._order.clear()
        self.due.clear()
        self.unread.clear()
