"""How to have a loop do something, from its own thread, from another, or from a destructor."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

__all__ = ["post", "running_loop"]

# As get_running_loop(), but None where none runs.
running_loop: Callable[[], asyncio.AbstractEventLoop | None] = asyncio._get_running_loop


def post(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
    """Have ``loop`` call ``callback`` soon. May be called on any thread, at any time.

    A loop that is closed is left alone: nobody waits there any more.
    """
    call = loop.call_soon if running_loop() is loop else loop.call_soon_threadsafe
    with contextlib.suppress(RuntimeError):  # closed
        call(callback)
