"""An epoll of ours inside an event loop, for what ``add_reader`` cannot ask for.

``add_reader`` asks for readability, level-triggered, and nothing else. The descriptor of an epoll
is readable while something in it is due, so ``add_reader`` can have it in the place of all that it
holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
from collections.abc import Callable

from handleipc.system import close_quietly

__all__ = ["NestedEpoll"]


class NestedEpoll:
    """Descriptors to be told of. Holds nothing open while there are none.

    Args:
        loop: the event loop that waits for them.
        tell: called with each descriptor of which an event has come.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, tell: Callable[[int], None]) -> None:
        self._loop = loop
        self._tell = tell
        self._epoll: select.epoll | None = None
        self._fds: set[int] = set()

    def add(self, fd: int, events: int) -> None:
        """Watch ``fd`` for these events of epoll.

        Raises:
            AttributeError: this system has no epoll.
            OSError: the system refuses; nothing is watched that was not before.
        """
        if self._epoll is None:
            epoll = select.epoll()
            try:
                self._loop.add_reader(epoll.fileno(), self._on_event)
            except BaseException:
                close_quietly(epoll)
                raise
            self._epoll = epoll
        try:
            self._epoll.register(fd, events)
            self._fds.add(fd)
        finally:
            self._close_if_empty()

    def remove(self, fd: int) -> None:
        """Watch ``fd`` no longer; before it is closed, if a copy of it may stay open elsewhere."""
        if fd in self._fds:
            self._fds.remove(fd)
            assert self._epoll is not None
            with contextlib.suppress(OSError):  # it was closed, and is not in there any more
                self._epoll.unregister(fd)
            self._close_if_empty()

    def _close_if_empty(self) -> None:
        if not self._fds and self._epoll is not None:
            if not self._loop.is_closed():
                self._loop.remove_reader(self._epoll.fileno())
            close_quietly(self._epoll)
            self._epoll = None

    def _on_event(self) -> None:
        if self._epoll is not None:
            for fd, _ in self._epoll.poll(0):
                self._tell(fd)
