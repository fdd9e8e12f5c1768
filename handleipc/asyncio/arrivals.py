"""Tells of bytes that arrive on a connection, while nobody reads them.

``add_reader`` would say again and again that there are some. Where there is no epoll (BSD, or no
free descriptor) it is time to look every few milliseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
from collections.abc import Iterator

from handleipc.asyncio.nested import NestedEpoll

__all__ = ["arrivals", "has_ended"]

# How often to look where there is no epoll, in seconds. Not tuned.
INTERVAL = 0.01
# Not in ``select`` where the system does not have them.
_EACH_TIME: int = (
    select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET if hasattr(select, "EPOLLET") else 0
)
_HAS_ENDED: int = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR

# Of the loops in which somebody waits.
_watchers: dict[asyncio.AbstractEventLoop, _Watcher] = {}


@contextlib.contextmanager
def arrivals(fd: int) -> Iterator[asyncio.Event]:
    """Set an event each time when something comes on ``fd``: bytes, a FIN, a reset.

    It may be set although nothing has come.
    """
    loop = asyncio.get_running_loop()
    watcher = _watchers.get(loop)
    if watcher is None:
        watcher = _watchers[loop] = _Watcher(loop)
    event = asyncio.Event()
    watcher.add(fd, event)
    try:
        yield event
    finally:
        watcher.remove(fd, event)


def has_ended(fd: int) -> bool:
    """Say whether the other end has sent its FIN, behind whatever bytes still wait here.

    Only Linux and FreeBSD can tell; elsewhere it shows when the bytes are read.
    """
    poll = select.poll()
    poll.register(fd, _HAS_ENDED)
    return bool(poll.poll(0))


class _Watcher:
    """The connections of one loop that somebody looks at."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._events: dict[int, asyncio.Event] = {}
        self._epoll = NestedEpoll(loop, self._tell)
        self._timer: asyncio.TimerHandle | None = None

    def add(self, fd: int, event: asyncio.Event) -> None:
        # A number that is watched already was closed by somebody, and is another's now.
        self._epoll.remove(fd)
        self._events[fd] = event
        try:
            self._epoll.add(fd, _EACH_TIME)
        except (AttributeError, OSError):
            if self._timer is None:
                self._timer = self._loop.call_later(INTERVAL, self._tell_all)

    def remove(self, fd: int, event: asyncio.Event) -> None:
        if self._events.get(fd) is not event:
            return
        del self._events[fd]
        self._epoll.remove(fd)
        if not self._events:
            _watchers.pop(self._loop, None)
            if self._timer is not None:
                self._timer.cancel()

    def _tell(self, fd: int) -> None:
        event = self._events.get(fd)
        if event is not None:
            event.set()

    def _tell_all(self) -> None:
        for event in self._events.values():
            event.set()
        self._timer = self._loop.call_later(INTERVAL, self._tell_all)
