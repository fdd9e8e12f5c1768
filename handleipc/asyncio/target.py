"""The program behind ``fork("module:function")``, in the child."""

from __future__ import annotations

import asyncio
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from handleipc.asyncio.process import parent

__all__ = ["run"]


def run(module: str, function: str) -> None:
    """Import ``module`` and call its ``function`` with the channel to the parent."""
    # Adopted first: the parent may be sending already, and the import may take its time.
    asyncio.run(_run(module, function))


async def _run(module: str, function: str) -> None:
    channel = await parent()
    target: Callable[[Any], Any] = getattr(importlib.import_module(module), function)
    result = target(channel)
    if inspect.isawaitable(result):
        await result
    else:
        # A plain function has set up listeners: they are what the process is for.
        await channel.wait_disconnected()
