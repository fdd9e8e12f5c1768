"""What the pure layers may ask of the operating system, as values that a test can replace."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from typing import Protocol

__all__ = ["Closeable", "InFlight", "System", "close_quietly", "free_slots"]


class Closeable(Protocol):
    """What owns a descriptor and closes it."""

    def close(self) -> object:
        """Close it; after an ``OSError`` too it is closed."""
        ...


def close_quietly(*things: int | Closeable) -> None:
    """Close descriptors, and what owns one, that nobody is to get, whatever close(2) says of each.

    The number is free afterwards in any case: Linux releases it before anything can fail. So a
    close that nobody can act on raises nothing, and the next one follows.
    """
    for thing in things:
        try:
            if isinstance(thing, int):
                os.close(thing)
            else:
                thing.close()
        except OSError:
            continue


def free_slots(most: int) -> int:
    """Return how many descriptors this process could open now, counting up to ``most``.

    The only way to know is to try: the limit may change and other threads take slots too.
    """
    source = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC) if most else -1
    probes = [source] if most else []
    try:
        while len(probes) < most:
            probes.append(os.dup(source))
    except OSError:
        pass
    finally:
        close_quietly(*probes)
    return len(probes)


def _free_slots(most: int) -> int:
    try:
        return free_slots(most)
    except OSError:
        return 0


class InFlight:
    """The process-wide budget of unacknowledged descriptors.

    The kernel counts descriptors in flight per user, over all sockets, so one stopped peer must
    not starve the others: a channel may add one while its own count is less than what is free, or
    a handle of any size while its own is zero (handing out first come first served left the fifth
    of five channels nothing).
    """

    def __init__(self) -> None:
        self.total: int = 0
        self._waiting: list[Callable[[], None]] = []

    def allowance(self, own: int, limit: int) -> int:
        """Return how many a channel with ``own`` descriptors in flight may add, up to ``limit``.

        Each one added makes its own count larger and what is free smaller.
        """
        return max(own == 0, (limit - self.total - own + 1) // 2)

    def add(self, count: int) -> None:
        """Count descriptors that are about to be written."""
        self.total += count

    def release(self, count: int) -> None:
        """Count descriptors whose handles ended, and wake the channels that waited for room."""
        self.total -= count
        waiting, self._waiting = self._waiting, []
        for wake in waiting:
            wake()

    def drop(self, count: int) -> None:
        """Uncount what a channel had that was dropped together with its loop, and never settled.

        Wakes nobody, since it is collected at any moment: those that wait look again by themselves.
        """
        self.total -= count

    def wait(self, wake: Callable[[], None]) -> None:
        """Have ``wake`` called once at the next release."""
        if wake not in self._waiting:
            self._waiting.append(wake)

    def forget(self, wake: Callable[[], None]) -> None:
        """Withdraw ``wake``."""
        if wake in self._waiting:
            self._waiting.remove(wake)


@dataclasses.dataclass(slots=True)
class System:
    """The clock, and what may be done with descriptors that a pure layer owns."""

    clock: Callable[[], float] = time.monotonic
    close: Callable[[int], None] = close_quietly
    """Closes a received descriptor that nobody is to get. Never raises."""
    free_slots: Callable[[int], int] = _free_slots
    in_flight: InFlight = dataclasses.field(default_factory=InFlight)
    """The budget of the channels that are made from here on; those that there are keep theirs."""

    def is_copied(self) -> None:
        """Have nothing in flight: of a forked copy no channel is its own yet."""
        self.in_flight = InFlight()
