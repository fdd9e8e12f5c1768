"""What the pure layers may ask of the operating system, as values that a test can replace."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable

__all__ = ["InFlight", "System", "close_all", "close_quietly", "free_slots"]


def close_quietly(fd: int) -> None:
    """Close a descriptor that nobody is to get, whatever close(2) says.

    The number is free afterwards in any case: Linux releases it before anything can fail.
    """
    try:
        os.close(fd)
    except OSError:
        pass


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors that nobody is to get: one that fails does not keep the others open."""
    for fd in fds:
        close_quietly(fd)


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
        for fd in probes:
            os.close(fd)
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
        self.total = 0
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

    def start_again(self) -> None:
        """Forget everything: of a forked copy none of the channels is its own."""
        self.total = 0
        self._waiting.clear()

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
