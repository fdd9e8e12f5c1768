"""Programs that listen at a port: which one, and when they do."""

from __future__ import annotations

import socket
import subprocess
import time
from typing import Any

__all__ = ["dial_when_it_listens", "free_port"]


def free_port() -> int:
    """Return a port that nobody has just now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def dial_when_it_listens(
    process: subprocess.Popen[Any], port: int, timeout: float
) -> socket.socket:
    """Connect to a program that is starting; ``timeout`` is the socket's, too."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=timeout)
        except ConnectionRefusedError:
            assert process.poll() is None and time.monotonic() < deadline, "nobody listens"
            time.sleep(0.01)  # a process starts; there is nothing else to wait for
