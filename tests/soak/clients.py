"""Clients of a soak: ``python -m tests.soak.clients PORT SECONDS COUNT``, results as JSON.

Each connects, says one line, waits for one, and begins again. Nobody here knows of any child.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

from tests.soak.zygote import ANSWER, GREETING

PATIENCE = 20.0


async def client(port: int, until: float, results: list[tuple]) -> None:
    """Add ``(own port, began, ended, what went wrong or None)`` for each connection."""
    while (began := time.monotonic()) < until:
        own, writer = None, None
        try:
            async with asyncio.timeout(PATIENCE):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                own = writer.get_extra_info("sockname")[1]
                writer.write(GREETING)
                answer = await reader.readline()
            why = None if answer == ANSWER else f"end of file after {answer!r}"
        except TimeoutError:
            why = f"no answer in {PATIENCE:g} s"
        except OSError as error:
            why = error.strerror or repr(error)
        results.append((own, began, time.monotonic(), why))
        if writer is not None:
            writer.transport.abort()


async def main(port: int, seconds: float, count: int) -> None:
    """Run so many clients, then tell what became of their connections."""
    results: list[tuple] = []
    until = time.monotonic() + seconds
    await asyncio.gather(*(client(port, until, results) for _ in range(count)))
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])))
