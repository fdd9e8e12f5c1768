"""Tells of peers that hang up while nobody reads their channel.

``add_reader`` asks for readability, which a paused channel must not be woken for, and cannot ask
for EPOLLRDHUP alone. So an epoll of ours in each loop holds the paused channels. Without one (on
BSD, or where no descriptor is free) they are polled each second.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
from collections.abc import Callable

from handleipc.asyncio.nested import NestedEpoll

__all__ = ["unwatch", "watch"]

# How often paused channels are polled where there is no epoll, in seconds.
INTERVAL = 1.0
# Not in ``select`` where the system does not have them.
_RDHUP: int = getattr(select, "EPOLLRDHUP", 0)
_POLLRDHUP: int = getattr(select, "POLLRDHUP", 0)

# Of the loops that have something paused.
_watchers: dict[asyncio.AbstractEventLoop, _Watcher] = {}


def watch(loop: asyncio.AbstractEventLoop, fd: int, callback: Callable[[], None]) -> None:
    """Call ``callback`` once, when the peer of the socket ``fd`` has hung up."""
    watcher = _watchers.get(loop)
    if watcher is None:
        watcher = _watchers[loop] = _Watcher(loop)
    watcher.add(fd, callback)


def unwatch(loop: asyncio.AbstractEventLoop, fd: int) -> None:
    """Forget ``fd``, before it is closed."""
    watcher = _watchers.get(loop)
    if watcher is not None:
        watcher.remove(fd)


class _Watcher:
    """The paused channels of one loop. Holds nothing open while there are none."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._epoll = NestedEpoll(loop, self._tell)
        self._timer: asyncio.TimerHandle | None = None

    def add(self, fd: int, callback: Callable[[], None]) -> None:
        """Watch one more."""
        self._callbacks[fd] = callback
        try:
            self._epoll.add(fd, _RDHUP)
        except (AttributeError, OSError):
            if self._timer is None:
                self._timer = self._loop.call_later(INTERVAL, self._poll)

    def remove(self, fd: int) -> None:
        """Watch it no longer."""
        if self._callbacks.pop(fd, None) is None:
            return
        if not self._callbacks:
            _watchers.pop(self._loop, None)
        self._epoll.remove(fd)
        if self._timer is not None and not self._callbacks:
            self._timer.cancel()
            self._timer = None

    def _poll(self) -> None:
        self._timer = None
        poll = select.poll()
        for fd in self._callbacks:
            poll.register(fd, _POLLRDHUP)
        events: list[tuple[int, int]] = []
        with contextlib.suppress(OSError):  # no memory: the next time
            events = poll.poll(0)
        for fd, _ in events:
            self._tell(fd)
        if self._callbacks and self._timer is None:
            self._timer = self._loop.call_later(INTERVAL, self._poll)

    def _tell(self, fd: int) -> None:
        callback = self._callbacks.get(fd)
        self.remove(fd)
        if callback is not None:
            callback()
