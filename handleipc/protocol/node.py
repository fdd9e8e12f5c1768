"""Node's dialect of handles: one in flight each way, and one ACK or NACK for each.

``NodeSlot`` is the one this end may have unanswered; ``Replies`` is what the peer hears of its own,
in order. Says when; what a handle deserves is decided in ``incoming``.
"""

from __future__ import annotations

from handleipc.exceptions import RemoteProtocolError
from handleipc.limits import Limits
from handleipc.protocol.stages import Entry, EntryState
from handleipc.protocol.timers import Timer, Timers
from handleipc.system import System
from handleipc.wire import envelope

__all__ = ["PEER_SPEAKS_NODE", "NodeSlot", "Replies"]

PEER_SPEAKS_NODE = "the peer speaks the node dialect, which has no word for this kind of handle"


class Replies:
    """Replies that are due.

    Args:
        limits: how many may wait, and how long for a free descriptor slot.
        system: the clock, and the count of free slots.
        timers: where to note when to look for one again.
    """

    __slots__ = ("_limits", "_pause", "_since", "_system", "_timers", "lines", "postponed")

    def __init__(self, limits: Limits, system: System, timers: Timers) -> None:
        self._limits = limits
        self._system = system
        self._timers = timers
        self.lines: list[bytes] = []
        """What is due now."""
        self.postponed = 0
        """Handles whose reply waits for the application to take others."""
        self._since = self._pause = 0.0

    def check_room(self) -> None:
        """A handle has come.

        Raises:
            RemoteProtocolError: the peer does not wait for our replies.
        """
        if len(self.lines) + self.postponed >= self._limits.node_replies:
            raise RemoteProtocolError("the peer sends handles without waiting for the replies")

    def ack(self) -> None:
        """The handle is ours."""
        self.lines.append(envelope.ACK)

    def nack(self) -> None:
        """It is not, and the peer may send it again."""
        self.lines.append(envelope.NACK)

    def nack_when_free(self) -> bool:
        """Its descriptor was lost. Returns whether the NACK is due now, as ``on_time``.

        The sender is stalled until it gets our NACK and sends again then: said when there is room.
        Node itself would answer at once, four times in a millisecond.
        """
        self._since = self._system.clock()
        self._pause = self._limits.ask_delay
        return self.on_time()

    def on_time(self) -> bool:
        """Send the NACK of a lost descriptor, if there is a free slot for the next try."""
        outage = self._system.clock() - self._since >= self._limits.retry_time
        if not outage and not self._system.free_slots(1):
            self._timers.start(Timer.NACK, self._pause)
            self._pause = min(2 * self._pause, self._limits.ask_delay_max)
            return False
        self.nack()
        return True

    def take(self) -> list[bytes]:
        """Return what is due now, and count it as said."""
        lines, self.lines = self.lines, []
        return lines

    @property
    def settled(self) -> bool:
        """Whether nothing is due, now or later."""
        return not (self.lines or self.postponed or Timer.NACK in self._timers.running)

    def close(self) -> None:
        """This end disconnects: what waited for room is said at once."""
        if self._timers.stop(Timer.NACK):
            self.nack()


class NodeSlot:
    """The one handle that a node-dialect end may have unanswered."""

    __slots__ = ("_timers", "entry", "is_refused", "nacks")

    def __init__(self, timers: Timers) -> None:
        self._timers = timers
        self.entry: Entry | None = None
        self.nacks = 0
        self.is_refused = False
        """Whether it is to leave again, after a pause."""

    def put(self, entry: Entry) -> None:
        """This handle is written next."""
        self.entry = entry
        self.nacks = 0

    def clear(self) -> None:
        """It has ended, or went back to the queue."""
        self.entry, self.is_refused = None, False
        self._timers.stop(Timer.RESEND)

    @property
    def may_leave_again(self) -> bool:
        """Whether it was refused, and the pause is over."""
        return self.is_refused and Timer.RESEND not in self._timers.running

    @property
    def waits(self) -> bool:
        """Whether it has left, and its reply has not come."""
        return (
            self.entry is not None and not self.is_refused and self.entry.state is EntryState.SENT
        )

    def retry(self, limits: Limits) -> bool:
        """Take a NACK: send again after a pause. Returns False when it has been tried enough.

        Node sends again at once and uses its tries up within a millisecond; the peer's shortage of
        descriptors lasts longer than that.
        """
        if self.nacks == limits.node_retries:
            return False
        self.is_refused = True
        self._timers.start(Timer.RESEND, limits.ask_delay * 4.0**self.nacks)
        self.nacks += 1
        return True
