"""Sees the process at the other end of a socket pair end, though copies of it hold its descriptors.

A forked copy of a parent (a process pool's worker) keeps the parent's end of the channel open, so
there is no EOF when the parent is killed. The kernel says which process made the socket pair; never
``getppid()``, since a shell may stand between.
"""

from __future__ import annotations

import os
import socket
import struct
import sys

__all__ = ["peer_pid", "peer_pidfd"]

# asm-generic/socket.h, Linux 6.5: a pidfd of the process that SO_PEERCRED names.
_SO_PEERPIDFD = 77
_UCRED = "3i"


def peer_pid(sock: socket.socket) -> int:
    """Return the id of the process that made the other end; 0 where the system hides it."""
    if sys.platform != "linux":
        return 0
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize(_UCRED))
    except OSError:
        return 0
    return int(struct.unpack(_UCRED, raw)[0])


def peer_pidfd(sock: socket.socket) -> int:
    """Return a pidfd of the process that made the other end; -1 if there is none to watch.

    There is none on other systems than Linux, in another PID namespace (the pid is 0), of this
    process itself, and when that process has ended already: somebody else has its end then. The
    descriptor is close-on-exec, and the caller's.
    """
    pid = peer_pid(sock)
    if pid in (0, os.getpid()):
        return -1
    try:
        try:
            # Of just that process, even if the number has another one since.
            fd = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
        except OSError:
            return os.pidfd_open(pid)
        os.set_inheritable(fd, False)
        return fd
    except OSError:
        return -1
