"""Node's dialect of handles: one in flight each way, and one ACK or NACK for each.

``NodeSlot`` is the one this end may have unanswered; ``NodeHandles`` are the peer's own, and
``Replies`` what it hears of them, in order.
"""

from __future__ import annotations

from handleipc.exceptions import RemoteProtocolError
from handleipc.handles.refusal import Convert, Refusal
from handleipc.limits import Limits
from handleipc.protocol.deliveries import Deliveries, as_received
from handleipc.protocol.lost import HeldLine
from handleipc.protocol.pairing import Pairing
from handleipc.protocol.stages import Entry, EntryState
from handleipc.protocol.timers import Timer, Timers
from handleipc.system import System
from handleipc.wire import envelope

__all__ = ["PEER_SPEAKS_NODE", "NodeHandles", "NodeSlot", "Replies"]

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
        self.postponed: int = 0
        """Handles whose reply waits for the application to take others."""
        self._since = self._pause = 0.0

    def check_room(self) -> None:
        """Refuse a handle if too many replies wait.

        Raises:
            RemoteProtocolError: the peer does not wait for our replies.
        """
        if len(self.lines) + self.postponed >= self._limits.node_replies:
            raise RemoteProtocolError("the peer sends handles without waiting for the replies")

    def ack(self) -> None:
        """Queue an ACK: the handle is ours."""
        self.lines.append(envelope.ACK)

    def nack(self) -> None:
        """Queue a NACK: the handle is not ours, and the peer may send it again."""
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
        """Say at once what waited for a free slot: this end disconnects."""
        if self._timers.stop(Timer.NACK):
            self.nack()


class NodeHandles:
    """Handles of a node-dialect peer: exactly one reply is due for each.

    They wait for room among ``incoming``'s other lines, in stream order.

    Args:
        limits, system, timers: of the channel.
        convert: makes a handle of descriptors, or raises ``Refusal``.
        deliveries: where what is acknowledged goes.
        pairing: says which descriptors belong to a line.
        errors: where faults are noted that cost one handle.
    """

    __slots__ = (
        "_close_one",
        "_closing",
        "_convert",
        "_deliveries",
        "_errors",
        "_pairing",
        "_window",
        "replies",
    )

    def __init__(
        self,
        limits: Limits,
        system: System,
        timers: Timers,
        *,
        convert: Convert,
        deliveries: Deliveries,
        pairing: Pairing,
        errors: list[Exception],
    ) -> None:
        self._window = limits.window
        self._close_one = system.close
        self._convert = convert
        self._deliveries = deliveries
        self._pairing = pairing
        self._errors = errors
        self._closing = False
        self.replies: Replies = Replies(limits, system, timers)

    def take(self, item: HeldLine, at: int) -> bool:
        """Take a handle whose line begins at stream offset ``at``, and claim its descriptor.

        Returns:
            Whether it is to wait for ``release``. If not, it has had its reply.

        Raises:
            RemoteProtocolError: the peer does not wait for our replies.
        """
        self.replies.check_room()
        found = self._pairing.front_set(at)
        if found is None or not (found.fds or found.truncated):
            self._reject("the peer sent a handle without its descriptor")
            return False
        if len(found.fds) == 1 and not self._closing:
            item.fds = found.fds
            self.replies.postponed += 1
            return True
        self._close(found.fds)
        if self._closing:
            self.replies.nack()
        elif found.fds:
            self._reject(f"the peer sent a handle with {len(found.fds)} descriptors")
        elif self.replies.nack_when_free():
            self._report_lost()
        return False

    @property
    def may_release(self) -> bool:
        """Whether a handle may be acknowledged now: no more than a window of them waits untaken.

        The peer sends no other before its ACK, and reading goes on meanwhile.
        """
        deliveries = self._deliveries
        return deliveries.waiting_descriptors < self._window or deliveries.takes_all

    def release(self, item: HeldLine) -> None:
        """Acknowledge a handle at its arrival, as Node does, or refuse it."""
        fds = item.fds
        assert fds is not None
        self.replies.postponed -= 1
        try:
            handle = self._convert(item.tag, item.options, fds)
        except Refusal as refusal:
            self._reject(str(refusal), refusal)
        except BaseException:  # a signal handler raised, and the conversion has closed it
            self.replies.nack()
            raise
        else:
            self.replies.ack()
            self._deliveries.add_handle(as_received(item.message, handle), item.size)

    def refuse(self, item: HeldLine) -> None:
        """Give a waiting handle back to its sender; its place in the order goes on without it."""
        self._close(item.fds)
        item.fds, item.is_refused = None, True
        self.replies.postponed -= 1
        self.replies.nack()

    @property
    def settled(self) -> bool:
        """Whether no reply is due, now or later."""
        return self.replies.settled

    def on_nack_time(self) -> None:
        """Send the NACK of a lost descriptor, if there is a free slot for the next try."""
        if self.replies.on_time():
            self._report_lost()

    def close(self) -> None:
        """This end disconnects: refuse what still comes."""
        self._closing = True
        self.replies.close()

    def _report_lost(self) -> None:
        why = "a descriptor was lost: this process has no free slot (RLIMIT_NOFILE); asked again"
        self._errors.append(RemoteProtocolError(why))

    def _reject(self, why: str, error: Exception | None = None) -> None:
        self._errors.append(error or RemoteProtocolError(why))
        self.replies.nack()

    def _close(self, fds: list[int] | None) -> None:
        for fd in fds or ():
            self._close_one(fd)


class NodeSlot:
    """The one handle that a node-dialect end may have unanswered."""

    __slots__ = ("_timers", "entry", "is_refused", "nacks")

    def __init__(self, timers: Timers) -> None:
        self._timers = timers
        self.entry: Entry | None = None
        self.nacks: int = 0
        self.is_refused: bool = False
        """Whether it is to leave again, after a pause."""

    def put(self, entry: Entry) -> None:
        """Take the handle that is written next."""
        self.entry = entry
        self.nacks = 0

    def clear(self) -> None:
        """Forget the handle: it has ended, or went back to the queue."""
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
