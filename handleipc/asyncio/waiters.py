"""Tasks that wait for the same thing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

__all__ = ["Waiters"]


class Waiters(set[asyncio.Future[None]]):
    """Futures that are woken, or failed, together; none of them is done, but for a cancelled one.

    A set, so that to ask whether anybody waits, as every turn does, costs nothing.
    """

    __slots__ = ()

    def new(self, loop: asyncio.AbstractEventLoop) -> asyncio.Future[None]:
        """Return a future to wait with; ``leave`` is to be called for it."""
        waiter: asyncio.Future[None] = loop.create_future()
        self.add(waiter)
        return waiter

    def leave(self, waiter: asyncio.Future[None]) -> None:
        """Take a future out: nobody waits with it any more."""
        self.discard(waiter)
        if waiter.done() and not waiter.cancelled():
            waiter.exception()  # seen, if the wait itself was cancelled

    def wake(self) -> None:
        """End the wait."""
        for waiter in self:
            if not waiter.done():
                waiter.set_result(None)
        self.clear()

    def fail(self, exception: Callable[[], Exception]) -> None:
        """Fail the wait; each gets an exception of its own."""
        for waiter in self:
            if not waiter.done():
                waiter.set_exception(exception())
        self.clear()
