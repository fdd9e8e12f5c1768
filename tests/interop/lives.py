"""The Python child of lives.js: ``lives.py disconnects|exits|waits``."""

from __future__ import annotations

import os
import sys

from child import run  # type: ignore[import-not-found]  # a program finds it beside it

import handleipc


async def main(parent: handleipc.Channel) -> None:
    """Say the last word, and end as told."""
    await parent.send("last")
    match sys.argv[1]:
        case "disconnects":
            parent.disconnect()
        case "exits":
            os._exit(3)
        case "waits":
            async for received in parent:
                raise AssertionError(f"unexpected: {received}")


run(main)
