"""Tasks that wait for the same thing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Waiters"]


class Waiters:
    """A set of futures that are woken, or failed, together."""

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[None]] = set()

    def __bool__(self) -> bool:
        return bool(self._waiting) and any(not waiter.done() for waiter in self._waiting)

    @contextmanager
    def new(self, loop: asyncio.AbstractEventLoop) -> Iterator[asyncio.Future[None]]:
        """Wait with a future that is in the set while the block runs."""
        waiter: asyncio.Future[None] = loop.create_future()
        self._waiting.add(waiter)
        try:
            yield waiter
        finally:
            self._waiting.discard(waiter)
            if waiter.done() and not waiter.cancelled():
                waiter.exception()  # seen, if the wait itself was cancelled

    def wake(self) -> None:
        """The wait is over."""
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)

    def fail(self, exception: Callable[[], Exception]) -> None:
        """The wait has failed; each gets an exception of its own."""
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_exception(exception())
