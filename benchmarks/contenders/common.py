"""What the Python contenders share: the message, a live connection, the report."""

from __future__ import annotations

import json
import resource
import socket
from typing import Any

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
