"""Peers that lose a descriptor which they read together with earlier bytes, and how to spare them.

Deno (2.9) gives the descriptor of a read to the first line of that read: behind an
acknowledgement or a plain message that it has not read yet, a handle is lost without a word, and
its sender waits for ever. No system call keeps two writes apart for a reader, so the handle waits
until the rest was read. Knows who the peer is, and what it has not read; waiting is the driver's.
"""

from __future__ import annotations

import array
import fcntl
import os
import socket
import struct
import sys

__all__ = ["creator", "has_unread", "loses_descriptors"]

# What has no name in the standard library: SIOCOUTQ (unix(7), "bytes in the send queue not read by
# the peer"), the same number as TIOCOUTQ.
_SIOCOUTQ = 0x5411


def creator(sock: socket.socket) -> int:
    """Return the id of the process that made this socket pair, or 0 where the system hides it."""
    if sys.platform != "linux":
        return 0
    pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(pid)


def loses_descriptors(pid: int) -> bool:
    """Say whether this process runs a program known for it.

    A guess by the program's name: a wrong one costs some milliseconds, or is as if there were none.
    """
    try:
        return os.path.basename(os.readlink(f"/proc/{pid}/exe")) == "deno"
    except OSError:
        return False  # another user's, gone, or a system without /proc


def has_unread(fd: int) -> bool:
    """Say whether the peer has still to read something that was written here."""
    count = array.array("i", [0])
    try:
        fcntl.ioctl(fd, _SIOCOUTQ, count)
    except OSError:
        return False  # a system that does not say
    return count[0] > 0
