"""When a channel is to be looked at again although nothing comes: one table for all reasons.

Pure: no timer runs here. Whoever has something to wait for notes it, the front comes back at
``deadline``, and ``ChannelProtocol.on_deadline`` does what has become due.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

__all__ = ["Timer", "Timers"]


class Timer(enum.IntEnum):
    """What is waited for, in the order in which it is done when several are due."""

    RETRY = enum.auto()
    """The kernel took no descriptors: try again."""
    RESEND = enum.auto()
    """The peer refused the handle of the node dialect: send it again."""
    LOOK = enum.auto()
    """Look whether the peer has read the last descriptors that it asked for again."""
    ASK = enum.auto()
    """Ask for descriptors that were lost, if there is room for them."""
    NACK = enum.auto()
    """Refuse a handle of the node dialect whose descriptor was lost, if there is room."""
    HELLO = enum.auto()
    """The peer has not switched to native: what only that can carry fails."""
    BUSY = enum.auto()
    """A wait here is for a peer that waits for us: it fails."""
    PROGRESS = enum.auto()
    """The peer has not finished what it began: the channel fails."""
    DISCONNECT = enum.auto()
    """The last flush takes too long: the channel ends."""


class Timers:
    """The timers of one channel; each runs once at most.

    Args:
        clock: the system's, in seconds.
    """

    __slots__ = ("_clock", "running")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.running: dict[Timer, float] = {}
        """When each is due; to be looked at, and changed by the methods alone."""

    def start(self, timer: Timer, delay: float) -> None:
        """Let it be due in ``delay`` seconds, whenever it was before."""
        self.running[timer] = self._clock() + delay

    def stop(self, timer: Timer) -> bool:
        """Let it not be due. Returns whether it ran."""
        return self.running.pop(timer, None) is not None

    def stop_all(self) -> None:
        """Let none be due."""
        self.running.clear()

    def deadline(self) -> float | None:
        """Return when the next is due, on the clock; None for never."""
        return min(self.running.values()) if self.running else None

    def due(self) -> list[Timer]:
        """Return those whose time has come, in their order; they run on until each is stopped."""
        now = self._clock()
        return sorted(timer for timer, at in self.running.items() if at <= now)
