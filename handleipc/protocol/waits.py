"""What is waited for here that depends on the peer, while the peer may wait for us.

Two ends that each send before they read would wait for each other for ever. So while something here
depends on the peer, its handles are acknowledged up to ``Limits.ready`` though nobody reads, and it
may send on as long as that can be held. If that is not enough, the waits fail after a while.
"""

from __future__ import annotations

from handleipc.limits import Limits
from handleipc.protocol.incoming import Incoming
from handleipc.protocol.outgoing import Outgoing
from handleipc.protocol.timers import Timer, Timers

__all__ = ["Waits"]


class Waits:
    """The local waits of one channel.

    Args:
        limits: how much is held for their sake, and how long.
        timers: of the channel.
        incoming, outgoing: its halves.
    """

    __slots__ = ("_incoming", "_key", "_limits", "_outgoing", "_timers", "nobody_takes")

    def __init__(
        self, limits: Limits, timers: Timers, incoming: Incoming, outgoing: Outgoing
    ) -> None:
        self._limits = limits
        self._timers = timers
        self._incoming = incoming
        self._outgoing = outgoing
        self._key: object = None
        self.nobody_takes: bool = False
        """Whether a local wait was for a peer that waits for us to take its handles, too long."""

    @property
    def are_vain(self) -> bool:
        """Whether so much is held, or for so long, that no wait must go on for its own sake."""
        return self.nobody_takes or self._incoming.cost >= self._limits.held_hard

    @property
    def are_known(self) -> bool:
        """Whether ``watch`` was last told of a wait: it is to be told of its end, too."""
        incoming = self._incoming
        return incoming.wants_more or incoming.deliveries.is_awaited or self.nobody_takes

    def watch(self, *, for_peer: bool, for_kernel: bool) -> bool:
        """Take what is waited for here, when all was written that may leave.

        Args:
            for_peer: an acknowledgement is, or a flush, or a drain.
            for_kernel: a message is, to be written: one behind a handle depends on the peer, too.

        Returns:
            Whether something may go on for that reason: there may be more to write.
        """
        incoming, outgoing, deliveries = self._incoming, self._outgoing, self._incoming.deliveries
        wanted, incoming.wants_more = incoming.wants_more, for_peer or for_kernel
        more = incoming.wants_more and not wanted and incoming.native and incoming.news.grants
        depends = for_peer or (for_kernel and outgoing.queue.items)
        awaited = bool(depends and outgoing.waiting_descriptors)
        begins = awaited and not deliveries.is_awaited and bool(incoming.held)
        deliveries.is_awaited = awaited
        if not (awaited and incoming.waits_for_a_reader):
            self.nobody_takes = False
            self._timers.stop(Timer.BUSY)
            return begins or more
        key = (outgoing.window.acked, deliveries.bytes_taken, deliveries.pace)
        if Timer.BUSY not in self._timers.running or key != self._key:
            self._key = key
            self._timers.start(Timer.BUSY, self._limits.retry_time)
        return begins or more
