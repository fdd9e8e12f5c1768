"""Which descriptors belong to which line.

Bytes and descriptors come in two queues. Facts of the kernel that shape them (Linux 6.18, repeated
in tests/wire/test_kernel.py):

- a read may return plain lines *followed by* the bytes of one descriptor-carrying write, then it
  stops; BSD stops before such a write instead;
- after a short read the rest of a write merges with whatever follows it;
- when descriptors are lost for want of free slots the bytes still arrive, with the first few of the
  descriptors or none, and only MSG_CTRUNC tells.

So descriptors are not paired by chunk, and not counted off a flat list (one loss would shift it for
ever). Each read that brought or lost some makes one *set* with the stream offsets of that read, and
the line that claims descriptors takes the front set, if its own first byte lies inside. What is
done about a handle whose descriptors were lost is said in ``incoming``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from handleipc.exceptions import RemoteProtocolError
from handleipc.wire.framing import DescriptorSet

__all__ = ["Pairing"]


class Pairing:
    """The descriptors that have arrived and not yet been claimed. It owns them.

    Args:
        close: closes one descriptor.
    """

    def __init__(self, close: Callable[[int], None]) -> None:
        self._close_fd = close
        self.sets: list[DescriptorSet] = []
        """Those that no line has claimed."""
        # The set being used up: what arrived, how much of it is claimed, places not claimed.
        self._fds: list[int] = []
        self._claimed = 0
        self.places: int = 0
        """Of the set being used up, that no line has claimed."""
        self._position = 0

    @property
    def waits_since(self) -> int | None:
        """The stream offset of the oldest descriptors that wait for the rest of a line or set.

        None if there are none.
        """
        if self.places:
            return self._position
        return self.sets[0].start if self.sets else None

    def add(self, sets: Sequence[DescriptorSet]) -> None:
        """Own what one receive brought, before any of its lines is looked at."""
        self.sets.extend(sets)

    def check_claimed(self, at: int) -> None:
        """A line begins at stream offset ``at``: sets that ended before it belong to nobody.

        Raises:
            RemoteProtocolError: there is such a set.
        """
        if self.sets and self.sets[0].end <= at:
            raise RemoteProtocolError("the peer sent descriptors that no line claims")

    def check_unfinished(self, at: int) -> None:
        """All lines were taken, and an unfinished one, or none yet, begins at stream offset ``at``.

        Descriptors come with the first byte of their line, so what is left can only be that one's:
        or a peer could have this process keep any number of them by never ending a line.

        Raises:
            RemoteProtocolError: there are others.
        """
        self.check_claimed(at)
        if len(self.sets) > 1 or (self.sets and self.sets[0].start > at):
            raise RemoteProtocolError("the peer sent descriptors in the middle of a line")

    def keep_two(self) -> None:
        """Close what the front set has beyond two descriptors: to be known for too many, they do.

        A line of the node dialect has one, and may take any time to end.
        """
        fds = self.sets[0].fds
        self._close(fds[2:])
        del fds[2:]

    def front_set(self, at: int) -> DescriptorSet | None:
        """Take the set of the read that brought the byte at ``at``, or None. The caller owns it."""
        if self.sets and self.sets[0].start <= at < self.sets[0].end:
            return self.sets.pop(0)
        return None

    def declare(self, count: int, at: int) -> bool:
        """Begin to use up the set whose line declares ``count`` descriptors.

        Returns:
            Whether some of them were lost.

        Raises:
            RemoteProtocolError: there is none here, it holds another number, or the last one was
                not used up.
        """
        if self.places:
            raise RemoteProtocolError("the peer began a set before the last was used up")
        found = self.front_set(at)
        if found is None:
            raise RemoteProtocolError(f"the peer declared {count} descriptors and sent none")
        # Ours first: on an error below they are closed with everything else.
        self._fds, self._claimed = found.fds, 0
        self._position = found.start
        arrived = len(found.fds)
        if arrived > count or (arrived < count and not found.truncated):
            raise RemoteProtocolError(f"the peer declared {count} descriptors and sent {arrived}")
        self.places = count
        return arrived < count

    def claim(self, count: int) -> list[int] | None:
        """Take the descriptors of ``count`` places of the current set; None if some were lost.

        The kernel keeps the first ones of a set, so what is lost is at its end.

        Raises:
            RemoteProtocolError: fewer places are left.
        """
        if self.places < count:
            raise RemoteProtocolError("the peer used more descriptors than it declared")
        self.places -= count
        start = self._claimed
        self._claimed = end = start + count
        fds = self._fds[start:end]
        if len(fds) == count:
            return fds
        self._close(fds)
        return None

    def claim_rest(self) -> list[int]:
        """Take all places of the current set: the descriptors that were not lost."""
        start, self._claimed, self.places = self._claimed, len(self._fds), 0
        return self._fds[start:]

    def close(self) -> None:
        """Close everything that was not claimed."""
        for unclaimed in self.sets:
            self._close(unclaimed.fds)
        self.sets.clear()
        self._close(self._fds[self._claimed :])
        self._fds, self._claimed, self.places = [], 0, 0

    def _close(self, fds: list[int]) -> None:
        for fd in fds:
            self._close_fd(fd)
