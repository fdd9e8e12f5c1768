"""How the calls of this front wait: for something in the event loop, or for the next of many."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Generic, Self, TypeVar

from handleipc.asyncio.runner import the_runner

__all__ = ["Takes", "call", "look", "run", "within"]

T = TypeVar("T")


def run(begin: Callable[[], Coroutine[Any, Any, T]], *, starts: bool = False) -> T:
    """Run the coroutine that ``begin`` makes; ``starts`` if it starts a process."""
    return the_runner().run(begin, starts=starts)


def call(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call a function in the event loop, and have a look at what has come."""
    return the_runner().call(function, *args, **kwargs)


def look() -> None:
    """Have a look at what has come."""
    call(lambda: None)


async def within(timeout: float | None, coroutine: Coroutine[Any, Any, T]) -> T:
    """Wait for so many seconds at most; None for ever. Raises TimeoutError."""
    async with asyncio.timeout(timeout):
        return await coroutine


class Takes(Generic[T]):
    """What is taken one by one, and never lost: an interrupted call leaves it to the next."""

    def __init__(self) -> None:
        self._taken: deque[T] = deque()

    async def _next(self) -> T:
        """Wait for the next one. Raises StopAsyncIteration if there is none."""
        raise NotImplementedError

    def _take(self, wait: Callable[[], Coroutine[Any, Any, T]], timeout: float | None) -> T:
        async def take() -> None:
            self._taken.append(await within(timeout, wait()))

        if not self._taken:
            run(take)
        return self._taken.popleft()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        try:
            return self._take(self._next, None)
        except StopAsyncIteration:
            raise StopIteration from None
