"""How to have a loop do something, from its own thread, from another, or from a destructor."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

__all__ = ["post"]


def post(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
    """Have ``loop`` call ``callback`` soon. May be called on any thread, at any time.

    A loop that is closed is left alone: nobody waits there any more.
    """
    try:
        is_here = asyncio.get_running_loop() is loop
    except RuntimeError:
        is_here = False
    with contextlib.suppress(RuntimeError):  # closed
        if is_here:
            loop.call_soon(callback)
        else:
            loop.call_soon_threadsafe(callback)
