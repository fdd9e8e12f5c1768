"""How much one channel does in one turn of the event loop, so that its neighbours get theirs."""

from __future__ import annotations

import time

from handleipc.wire.framing import MAX_ENDS
from handleipc.wire.syscalls import READ_BUDGET

__all__ = ["WRITE_BUDGET", "Pace"]

# What one turn may take, in seconds of processor time. A turn has some 25 microseconds of its own,
# so in a long one they are a sixth and in a short one half: short ones cost a flood a fifth of its
# messages, and are for an end whose neighbours wait for it (tests/hostile measures both).
LONG, SHORT = 0.00015, 0.00006
# Bytes that one turn may read. Copying so many takes a turn of either kind.
LONG_BYTES, SHORT_BYTES = READ_BUDGET, 64 * 1024
# Bytes that one turn may write. Not tuned.
WRITE_BUDGET = 1024 * 1024
READING = 0.000001  # seconds at least that a reader takes for a message left to it
FIRST = 64  # lines of the first turn
# For so many turns an end that had little to read is taken for a neighbour that waits. Not tuned.
MEMORY = 64


class Pace:
    """What one read may take, by what the last ones took and by who else reads.

    Lines as a turn allows, and at least one, which may be a run.
    """

    __slots__ = ("_began", "_left", "is_short", "lines", "taken")

    _turns = 0  # of all ends of this process: threads share the processor, too
    _light: Pace | None = None
    """The end that last had little to read; when; and when another than this one had."""
    _light_at = _other_at = -MEMORY

    def __init__(self) -> None:
        self._began = 0.0
        self._left = 0
        self.is_short: bool = False
        """Whether this turn is a short one, since a neighbour may wait for its end."""
        self.lines: int = FIRST
        """To be taken in the next turn."""
        self.taken: int = 0
        """That were taken in this one."""

    @property
    def bytes(self) -> int:
        """Those that this turn may read."""
        return SHORT_BYTES if self.is_short else LONG_BYTES

    def begin(self, left: int) -> None:
        """A turn begins that reads, while so many messages are left to a reader."""
        Pace._turns += 1
        neighbour_at = Pace._other_at if Pace._light is self else Pace._light_at
        self.is_short = Pace._turns - neighbour_at <= MEMORY
        self.taken = 0
        self._left = left
        self._began = time.thread_time()  # not lost with the processor, as on a busy machine

    def end(self, left: int, *, more: bool) -> None:
        """It ends: so many are left to a reader, and perhaps there is more to read."""
        took = time.thread_time() - self._began + READING * max(1, left - self._left)
        most = SHORT if self.is_short else LONG
        # A lone message that took long says nothing of how many may be taken: a process that slept
        # finds its caches cold.
        if took > most and (more or self.taken > 1):
            self.lines = max(1, int(min(self.lines, self.taken) * max(most / took, 0.5)))
        elif self.taken >= self.lines:
            self.lines = min(MAX_ENDS, max(self.lines, int(self.lines * min(most / took, 2.0))))
        if took < SHORT and not more:
            if Pace._light is not self:
                Pace._light, Pace._other_at = self, Pace._light_at
            Pace._light_at = Pace._turns
