"""Handles that arrived without their descriptors, and asking for those again.

The kernel drops descriptors for which the receiver has no free slot, or which a security module
denies it; the lines come all the same. The first such handle is the *hole*: all behind it waits,
and the descriptors of later handles are closed on arrival, since they would take the slots that the
hole needs (keeping them made 68 handles fail where closing them made one).

Asking is a pull: only the receiver knows when there is room, so the sender keeps no timer.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque

from handleipc.exceptions import RemoteProtocolError
from handleipc.limits import Limits
from handleipc.protocol.timers import Timer, Timers
from handleipc.system import System
from handleipc.typing import JSON, Options
from handleipc.wire import envelope

__all__ = ["HeldLine", "HeldLines", "Lost"]

# Slots counted, and handles asked for, at most at once: enough to go on, cheap to count.
PROBES = 16
# Losses in spite of free slots after which it is not a shortage.
DENIED_AFTER = 3


@dataclasses.dataclass(slots=True)
class HeldLine:
    """A line in stream order. ``sequence`` is 0 for plain messages; ``fds`` None while missing.

    A handle of the node dialect has descriptors and no number.
    """

    size: int
    message: JSON = None
    sequence: int = 0
    n_fds: int = 0
    tag: str = ""
    options: Options | None = None
    fds: list[int] | None = None
    is_refused: bool = False


class HeldLines(deque[HeldLine]):
    """Lines in stream order, and what they amount to."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: int = 0
        self.internal: int = 0
        """How many of them are internal messages."""

    def append(self, line: HeldLine) -> None:
        """Hold a line behind all others."""
        super().append(line)
        self.bytes += line.size
        self.internal += envelope.is_internal(line.message)

    def popleft(self) -> HeldLine:
        """Take the first one out."""
        line = super().popleft()
        self.bytes -= line.size
        self.internal -= envelope.is_internal(line.message)
        return line


class Lost:
    """The first handle that lacks descriptors, and what was asked for.

    Args:
        limits: pauses, and when to give up.
        system: the clock, and the count of free slots.
        timers: where to note when to ask.
        held: the lines not yet released, in stream order; looked at, never changed.
    """

    def __init__(self, limits: Limits, system: System, timers: Timers, held: HeldLines) -> None:
        self._limits = limits
        self._system = system
        self._timers = timers
        self._held = held
        self.first: HeldLine | None = None
        self.ask: tuple[int, int] | None = None
        """What to ask for in the next control line: first handle, number of handles."""
        self._asked = 0
        self._each = 0
        self._tries = 0
        self._denied = 0
        # One clock for an outage, however many handles are lost in it: when it began, and when the
        # lack of a slot was last seen.
        self._since = self._seen = -math.inf

    @property
    def awaited(self) -> int:
        """How many descriptors were asked for and have not come."""
        return self._asked * self._each

    def open(self, line: HeldLine) -> None:
        """Take this handle as the first that lacks descriptors."""
        self.first = line
        self._tries = self._denied = 0
        now = self._system.clock()
        if now - self._seen > self._limits.retry_time:
            self._since = now
        self._seen = now
        self._arm()

    def next(self) -> None:
        """The hole is filled or given up: the next one is the first now, if there is one."""
        self._forget_first()
        for line in self._held:
            if line.sequence and line.fds is None and not line.is_refused:
                self.open(line)
                return

    def answer(self, sequence: int, fds: list[int] | None) -> bool:
        """Take descriptors that came again; None if they were lost again.

        Returns:
            Whether they are used. If not, they are the caller's to close: their handle was refused
            meanwhile, or stands behind another hole.

        Raises:
            RemoteProtocolError: nobody asked. The descriptors are the caller's.
        """
        if not self._asked:
            raise RemoteProtocolError("the peer sent descriptors again that nobody asked for")
        self._asked -= 1
        hole = self.first
        if hole is not None and hole.sequence == sequence:
            if fds is not None:
                hole.fds = fds
                self._seen = -math.inf
                self.next()
                return True
            self._denied += 1
        self._arm()
        return False

    def on_ask_time(self) -> str | None:
        """Ask for as many handles as there are slots.

        Returns:
            The code with which to refuse the hole if it is to be given up, else None.
        """
        hole = self.first
        if hole is None or self._asked:
            return None
        if self._denied >= DENIED_AFTER:
            return "denied"
        missing = self._missing(hole)
        free = self._system.free_slots(min(max(PROBES, hole.n_fds), missing * hole.n_fds))
        # All that fit the first time; then one, since the slots were not enough.
        count = min(missing if self._tries <= 1 else 1, free // hole.n_fds)
        if count:
            self.ask = (hole.sequence, count)
            self._asked, self._each = count, hole.n_fds
            return None
        self._seen = self._system.clock()
        if self._seen - self._since >= self._limits.retry_time:
            return "descriptors"
        self._arm()
        return None

    def close(self) -> None:
        """Ask for nothing any more. What is not yet written is withdrawn.

        The peer would answer for handles that it has back by then.
        """
        if self.ask is not None:
            self.ask, self._asked = None, 0
        self._forget_first()

    def _forget_first(self) -> None:
        self.first = None
        self._timers.stop(Timer.ASK)

    def _missing(self, hole: HeldLine) -> int:
        """Count handles from the hole on, without a gap, that lack as many descriptors each."""
        count = 0
        for line in self._held:
            if not line.sequence or line.sequence < hole.sequence:
                continue
            if line.fds is not None or line.is_refused or line.n_fds != hole.n_fds:
                break
            count += 1
            if count == PROBES:
                break
        return count

    def _arm(self) -> None:
        if self.first is not None and not self._asked:
            limits = self._limits
            pause = min(limits.ask_delay * 2.0 ** min(self._tries, 30), limits.ask_delay_max)
            self._tries += 1
            self._timers.start(Timer.ASK, pause)
