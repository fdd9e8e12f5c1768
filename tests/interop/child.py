"""What every Python child of these tests does: run on the wanted loop, and count descriptors."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
from collections.abc import Awaitable, Callable

import handleipc


def open_descriptors() -> dict[int, str]:
    """Return what this process has open, but for the listing itself.

    And but for /dev/null: libuv opens it with the first stream, for bad times, and keeps it.
    """
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return {fd: what for fd, what in found.items() if what != os.devnull}


async def _main(main: Callable[[handleipc.Channel], Awaitable[None]]) -> None:
    await asyncio.sleep(0)  # uvloop opens what it needs
    parent = await handleipc.parent()
    before = open_descriptors()
    await main(parent)
    parent.disconnect()
    await parent.wait_disconnected()
    gc.collect()
    after = open_descriptors()
    watching = sum("pidfd" in what for what in before.values())  # the parent's process
    assert len(after) == len(before) - 1 - watching, f"before {before}, after {after}"


def run(main: Callable[[handleipc.Channel], Awaitable[None]]) -> None:
    """Run ``main(parent)``; afterwards only the channel's descriptors may be gone."""
    factory = None
    if os.environ.get("TEST_LOOP") == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(_main(main))
