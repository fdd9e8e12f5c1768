"""Children that end with the test, whatever happens in it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import handleipc

PATIENCE = 20.0


@contextlib.asynccontextmanager
async def spawned(*argv: str | os.PathLike[str], **options: Any) -> AsyncIterator[handleipc.Child]:
    """Spawn a child; the block has ``PATIENCE`` seconds, and whatever still runs then is killed."""
    child = await handleipc.spawn(*argv, **options)
    try:
        async with asyncio.timeout(PATIENCE):
            yield child
    finally:
        child.kill(signal.SIGKILL)  # does nothing once it has exited
        child.abort()
        await child.wait()
        await child.wait_disconnected()
