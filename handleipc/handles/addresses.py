"""Socket addresses as Python spells them, read from the kernel's bytes."""

from __future__ import annotations

import os
import socket
import struct
import sys
from typing import Any, TypeAlias

__all__ = ["Address", "parse"]

Address: TypeAlias = Any
"""(host, port) for IPv4, (host, port, flow, scope) for IPv6, str or bytes for Unix sockets."""

# BSD puts a length byte before a one-byte family; Linux has a two-byte family.
_FAMILY_AT = "=xB" if sys.platform != "linux" else "=H"


def parse(raw: bytes) -> Address:
    """Return the address in a ``struct sockaddr``, in the form ``socket.getpeername`` gives it."""
    if len(raw) < 2:
        return ""
    (family,) = struct.unpack_from(_FAMILY_AT, raw)
    if family == socket.AF_INET:
        (port,) = struct.unpack_from("!H", raw, 2)
        return socket.inet_ntop(family, raw[4:8]), port
    if family == socket.AF_INET6:
        port, flow = struct.unpack_from("!HI", raw, 2)
        (scope,) = struct.unpack_from("=I", raw, 24)
        return socket.inet_ntop(family, raw[8:24]), port, flow, scope
    path = raw[2:]
    if path.startswith(b"\0"):
        return path  # Linux's abstract names are bytes, zeros included
    return os.fsdecode(path.partition(b"\0")[0])
