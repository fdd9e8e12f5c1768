"""How much one channel does in one turn of the event loop, so that its neighbours get theirs."""

from __future__ import annotations

import time

from handleipc.wire.framing import MAX_ENDS

__all__ = ["Pace"]

# What one turn may take, in seconds of processor time: an exchange of a neighbour's meets two or
# three such turns (tests/hostile measures it).
SLICE = 0.00015
READING = 0.000001  # seconds at least that a reader takes for a message left to it


class Pace:
    """The lines that one read may take, by what the last ones took.

    As many as a slice allows, and at least one, which may be a run of 64 messages.
    """

    __slots__ = ("_began", "lines", "taken")

    def __init__(self) -> None:
        self._began = 0.0
        self.lines = MAX_ENDS
        """To be taken in the next turn."""
        self.taken = 0
        """That were taken in this one."""

    def begin(self) -> None:
        """A turn begins that reads."""
        self.taken = 0
        self._began = time.thread_time()  # not lost with the processor, as on a busy machine

    def end(self, left: int) -> None:
        """It ends, and so many messages are left to a reader."""
        took = time.thread_time() - self._began + READING * left
        if took > SLICE:
            self.lines = max(1, min(self.lines, self.taken) // 2)
        elif self.lines < MAX_ENDS and took < SLICE / 2:
            self.lines = min(MAX_ENDS, 2 * self.lines)
