"""What the Python contenders share: the message, a live connection, the report."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
from collections.abc import Coroutine
from typing import Any

ANSWER = b"Child handled it."
OBJECT_BYTES = 81


def message(i: int, n: int) -> dict[str, Any]:
    """The message of about 40 bytes that all contenders send."""
    return {"op": "route", "n": i, "of": n, "ok": True}


def report(count: int, seconds: float, **more: Any) -> None:
    """Print the result."""
    print(json.dumps({"count": count, "seconds": seconds, **more}))


def connection() -> socket.socket:
    """Return a live TCP connection, whose client stays open until this process ends."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
    accepted.setblocking(False)
    client.detach()
    return accepted


def large(what: str, size: int) -> Any:
    """A message of about ``size`` bytes of JSON: one string, or many small objects."""
    if what == "string":
        return "x" * size
    return [
        {"id": i, "name": f"object {i}", "from": "127.0.0.1", "tags": ["a", "b"], "ok": True}
        for i in range(size // 86)
    ]


def cpu_seconds(who: int = resource.RUSAGE_SELF) -> float:
    """Return the CPU time used so far."""
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


class Answer(asyncio.Protocol):
    """Answers and closes."""

    def connection_made(self, transport: Any) -> None:
        """Write, and close when that has left."""
        transport.write(ANSWER)
        transport.close()


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run on the loop this benchmark is about."""
    if os.environ.get("BENCHMARK_LOOP") == "uvloop":
        import uvloop

        uvloop.run(main)
    else:
        asyncio.run(main)
