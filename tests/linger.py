"""Sockets that somebody else, who holds a copy of them, has set to linger at their close."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator

ON = struct.pack("ii", 1, 3600)


def lingers(sock: socket.socket) -> bool:
    """Say whether a close of the last copy would wait for what was written."""
    value = sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, len(ON))
    on, _ = struct.unpack("ii", value)
    return bool(on)


@contextlib.contextmanager
def lingering() -> Iterator[tuple[int, socket.socket]]:
    """A descriptor to be closed, and the copy of whoever has set it to linger for an hour."""
    with socket.socket() as theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ON)
        assert lingers(theirs)
        yield os.dup(theirs.fileno()), theirs
